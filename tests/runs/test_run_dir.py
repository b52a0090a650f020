"""The files of a run directory: what may change when a run goes on, and what damage does."""

import json
import shutil
from typing import Any

import jax.numpy as jnp
import pytest
from helpers import make_backbone, metrics, run_values

from jaxprompt.config import yaml12
from jaxprompt.config.errors import UserError
from jaxprompt.config.overrides import load_config
from jaxprompt.config.schema import RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.models.precision import resolve_config
from jaxprompt.training.checkpoint import Checkpoints
from jaxprompt.training.loop import train
from jaxprompt.training.metric_log import MetricWriter
from jaxprompt.training.run_dir import check_run, load_result, open_run
from jaxprompt.training.step import TrainState


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


@pytest.fixture(scope="module")
def whole(backbone, tmp_path_factory):
    """A complete run of four steps: (its config's values, its directory)."""
    folder = tmp_path_factory.mktemp("whole")
    values = run_values(backbone, folder)
    train(parse(RunConfig, values))
    return values, folder / "run"


def again(whole, tmp_path, **settings: Any) -> RunConfig:
    """A copy of the complete run, with other settings."""
    values, folder = whole
    shutil.copytree(folder, tmp_path / "run")
    values = values | {"output": str(tmp_path / "run")}
    return resolve_config(parse(RunConfig, values | {"train": values["train"] | settings}))


def begun(config: RunConfig, step: int) -> RunConfig:
    """A run directory that has got to a step."""
    with open_run(config) as folder:
        state = TrainState(jnp.int32(step), {"x": jnp.zeros((1, 2))}, ())
        Checkpoints(folder / "checkpoints", 2).save(step, state, {})
    return config


def plain(tmp_path, task: Any, **train_settings: Any) -> RunConfig:
    values = {"task": task, "train": train_settings, "output": str(tmp_path / "run")}
    return parse(RunConfig, values)


# -- settings --------------------------------------------------------------------------------------

SPELLINGS = [
    ["rte", {"name": "rte"}, {"name": "rte", "max_input_length": 512}],
    [{"name": "boolq", "prefix": True}, {"name": "boolq", "prefix": True}],
    [{"name": "rte", "source": "tfds:super_glue/rte"}],
    [{"name": "rte", "train": "a.jsonl", "validation": "b.jsonl"}],
]


@pytest.mark.parametrize("spellings", SPELLINGS)
def test_a_task_that_amends_a_known_one_is_itself_when_the_run_goes_on(tmp_path, spellings):
    begun(plain(tmp_path, spellings[0]), 5)
    for task in spellings:
        assert check_run(plain(tmp_path, task)) == tmp_path / "run"
    with pytest.raises(UserError, match="task.max_input_length was 512 and is 64"):
        check_run(plain(tmp_path, {"name": "rte"} | as_mapping(spellings[0]) | SHORT))


SHORT = {"max_input_length": 64}


def as_mapping(task):
    return {"name": task} if isinstance(task, str) else task


def test_tasks_of_a_population_are_compared_in_full(tmp_path):
    def run(tasks):
        values = {"task": "rte", "prompt": {"population": {"task": tasks}}}
        return parse(RunConfig, values | {"output": str(tmp_path / "run")})

    begun(run(["rte", "boolq"]), 5)
    assert check_run(run([{"name": "rte"}, {"name": "boolq"}])) == tmp_path / "run"
    with pytest.raises(UserError, match="prompt.population.task was"):
        check_run(run([{"name": "rte", "max_input_length": 64}, "boolq"]))


def test_a_run_of_an_amended_task_goes_on_and_is_complete(tmp_path):
    """The advertised way: the same command again."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "backbone: builtin-small\ntask: supersense\nprompt: {length: 2}\n"
        "train: {batch_size: 4, max_eval_examples: 4, evaluate_every: 1, checkpoint_every: 1, "
        f"tensorboard: false}}\noutput: {tmp_path / 'run'}\n"
    )
    run = lambda steps: train(
        load_config(file, ["task.max_input_length=48", f"train.steps={steps}"])
    )
    first = run(1)
    assert run(1) == first
    assert run(2)["steps"] == 2


@pytest.mark.parametrize(
    ("step", "before", "after", "free"),
    [
        (10, (20, 4), (20, 0), True),  # dropped before it began
        (16, (20, 4), (20, 0), True),
        (17, (20, 4), (20, 0), False),  # in the middle of it
        (20, (20, 4), (40, 4), False),  # after it
        (20, (20, 0), (26, 6), True),  # added to a constant run
        (20, (20, 0), (26, 7), False),  # it would have begun at step 19
        (10, (20, 4), (40, 8), True),
        (20, (20, 0), (40, 0), True),
    ],
)
@pytest.mark.parametrize("schedule", ["constant", "rsqrt"])
def test_a_cool_down_may_change_until_it_begins(tmp_path, step, before, after, free, schedule):
    run = lambda steps, cooldown: plain(
        tmp_path, "rte", steps=steps, cooldown_steps=cooldown, schedule=schedule
    )
    begun(run(*before), step)
    if free:
        assert check_run(run(*after)) == tmp_path / "run"
    else:
        with pytest.raises(UserError, match=f"the run is at step {step}|train.steps was"):
            check_run(run(*after))


def test_schedules_that_count_their_steps_keep_them(tmp_path):
    begun(plain(tmp_path, "rte", steps=20, schedule="linear"), 5)
    with pytest.raises(UserError, match="train.steps was 20 and is 30"):
        check_run(plain(tmp_path, "rte", steps=30, schedule="linear"))


def test_fewer_steps_than_done_are_refused_and_change_nothing(whole, tmp_path):
    run = again(whole, tmp_path, steps=3)
    (tmp_path / "run" / "result.json").unlink()
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="has done 4 steps, and train.steps is 3; make it 4"):
        train(run)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_result_without_checkpoints_is_that_of_its_settings(whole, tmp_path):
    run = again(whole, tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert load_result(run)["steps"] == 4
    other = run.model_copy(update={"train": run.train.model_copy(update={"seed": 7})})
    with pytest.raises(UserError, match="train.seed was 0 and is 7"):
        load_result(other)


ODD = ["a\x85b", "a\u2028b", "a\u2029b", "\ufeffa", "\x85", " a\x85 b ", "a\nb\x85", "é\x85"]


@pytest.mark.parametrize("text", ODD)
def test_odd_characters_survive_config_yaml(tmp_path, text):
    task = {
        "name": "mine", "train": "a.jsonl", "validation": "b.jsonl", "template": "{text}" + text,
        "labels": [text + "x", "y"], "separator": text,
    }  # fmt: skip
    run = begun(plain(tmp_path, task), 5)
    assert yaml12.load((tmp_path / "run" / "config.yaml").read_text("utf-8"))["task"] == task
    assert load_config(tmp_path / "run" / "config.yaml") == run
    assert check_run(run) == tmp_path / "run"


@pytest.mark.parametrize("output", ["a\0b", "runs/\ud800"])
def test_an_output_that_is_no_path_is_told(output):
    with pytest.raises(UserError, match="cannot be the name of a file|valid string"):
        check_run(parse(RunConfig, {"task": "rte", "output": output}))


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"- 1\n", b"a: [", b"task: rte\n", b"train: 3\n", b"[" * 5000]
)
def test_a_damaged_config_is_one_sentence_and_stays(whole, tmp_path, content):
    run = again(whole, tmp_path, steps=6)
    (tmp_path / "run" / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match="config.yaml is damaged .* put a copy of that file back"):
        train(run)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == content


def test_a_folder_with_a_persons_own_config_is_no_run(tmp_path):
    """``jaxprompt train config.yaml output=.`` must not replace the file that it read."""
    text = f"task: rte  # with a comment\noutput: {tmp_path}\n"
    (tmp_path / "config.yaml").write_text(text)
    with (
        pytest.raises(UserError, match="exists and is not a run"),
        open_run(load_config(tmp_path / "config.yaml")),
    ):
        pass
    assert (tmp_path / "config.yaml").read_text() == text


def test_no_row_after_a_damaged_line_is_lost(tmp_path):
    rows = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3, 4)]
    lines = [json.dumps(row).encode() for row in rows]
    odd = [b"", b'{"loss": 1}', b"\xff", b'{"step": "2", "loss": 1}', b"[1]", b'{"step": 2, "lo',
           b"[" * 100_000, b'{"step": 2, "loss": "x"}', b"3", b'{"step": true}']  # fmt: skip
    text = b"\n".join(
        [odd[0], lines[0], *odd[1:5], lines[1], *odd[5:], *lines[2:], b'{"step": 5, ']
    )
    (tmp_path / "metrics.jsonl").write_bytes(text)
    said = []
    book = MetricWriter(tmp_path, 3, say=said.append)
    book.write({"step": 4, "loss": 0.5})
    book.close()
    assert metrics(tmp_path) == [*rows[:3], {"step": 4, "loss": 0.5}]
    assert said == [f"warning: 9 lines of {tmp_path / 'metrics.jsonl'} are damaged and left out"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b'{"stopped_early": true}', b'{"steps": 9}', b"\xff", b"[" * 100_000,
     b'{"steps": "4", "stopped_early": true}', b'{"steps": 9, "seconds": 1, "tasks": {"a": 1}}'],
)  # fmt: skip
def test_a_damaged_result_is_made_again(whole, tmp_path, content):
    run = again(whole, tmp_path)
    good = json.loads((tmp_path / "run" / "result.json").read_text())
    (tmp_path / "run" / "result.json").write_bytes(content)
    found = train(run)
    same = ("task", "metric", "value", "untuned", "majority", "rows", "best_step", "steps")
    assert {key: found[key] for key in same} == {key: good[key] for key in same}
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == found


@pytest.mark.parametrize("name", ["²", "١٢", "05", "5.5", "-1", "latest"])
def test_a_folder_among_the_checkpoints_that_no_step_names_is_left_alone(whole, tmp_path, name):
    run = again(whole, tmp_path, steps=5)
    (tmp_path / "run" / "checkpoints" / name).mkdir()
    (tmp_path / "run" / "checkpoints" / name / "mine.txt").write_text("mine")
    assert Checkpoints(tmp_path / "run" / "checkpoints", 2).latest_step() == 4
    assert load_result(run) is None
    assert (tmp_path / "run" / "checkpoints" / name / "mine.txt").read_text() == "mine"
