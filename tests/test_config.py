"""The schema of a run: YAML 1.2 words and numbers, overrides, and one sentence for each mistake."""

from pathlib import Path
from typing import Any

import jax
import pytest

from jaxprompt.config import (
    PromptConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    UserError,
    dump_yaml,
    listed,
    load_config,
    parse,
    read_yaml,
    shown,
)
from jaxprompt.data.tasks import resolve_task
from jaxprompt.model import t5
from jaxprompt.model.t5_config import released
from jaxprompt.pretrain_config import PretrainConfig

MINIMAL = "task: supersense\noutput: runs/a\n"


def write(folder, text, name="run.yaml"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text, value",
    [
        ("[yes, no, on, off, y, n]", ["yes", "no", "on", "off", "y", "n"]),
        ("[true, False, TRUE]", [True, False, True]),
        ("[3e-4, 1E5, -.5, 1., +2.5e+1, .inf]", [3e-4, 1e5, -0.5, 1.0, 25.0, float("inf")]),
        ("[010, 0x1F, 0o17, -3, +3]", [10, 31, 15, -3, 3]),
        ("[1:30, 2024-01-01, 1_000, 0b1]", ["1:30", "2024-01-01", "1_000", "0b1"]),
        ("[~, null, '']", [None, None, ""]),
        ("[=, <<, 1.2.3, e5, .e5, '3']", ["=", "<<", "1.2.3", "e5", ".e5", "3"]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = read_yaml(text, "here")
    assert found == value and list(map(type, found)) == list(map(type, value))


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [1, 2", "here is not valid YAML: .*line 1"),
        ("a: 1\nb: 2\na: 3", "key 'a' is given twice"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("9" * 5000, "here is not valid YAML"),
        ("[" * 1500, "here is not valid YAML"),
        ("a: \x00", "here is not valid YAML"),
    ],
)
def test_bad_yaml_is_one_sentence_and_executes_nothing(text, message):
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(text, "here")
    assert "\n" not in str(caught.value)


def test_labels_and_rates_of_a_file_mean_what_they_say(tmp_path):
    text = """
task: {name: mine, train: t.jsonl, template: "{text}", labels: [yes, no]}
train: {learning_rate: 3e-4, steps: 10}
output: runs/mine
"""
    config = load_config(write(tmp_path, b"\xef\xbb\xbf" + text.encode()))
    assert config.task["labels"] == ["yes", "no"]
    assert config.train.learning_rate == 3e-4 and config.train.steps == 10
    assert config.prompt == PromptConfig()


def test_what_is_written_is_read_back_equal(tmp_path):
    words = ["yes", "3e-4", "1:30", "010", "0o7", "true", "null", "", " x", "é", "2024-01-01", "="]
    task: dict[str, Any] = {"name": "1e5", "template": "{a}: #{b}\n- c", "labels": words}
    config = parse(
        RunConfig, {"task": task, "output": "3e1", "train": {"weight_decay": 1e-5, "z_loss": 1e20}}
    )
    assert load_config(write(tmp_path, dump_yaml(config))) == config


def test_overrides(tmp_path):
    path = write(tmp_path, MINIMAL + "train: {steps: 5}\n")
    config = load_config(
        path,
        ["train.steps=7", "train.learning_rate=1e-3", "prompt.length=8", "task.max_input_length=64",
         "task.labels=[yes, no]", "output=a=b", "train.patience="],
    )  # fmt: skip
    assert config.train.steps == 7 and config.train.learning_rate == 1e-3
    assert config.train.patience is None
    assert config.task == {"name": "supersense", "max_input_length": 64, "labels": ["yes", "no"]}
    assert config.prompt.length == 8 and config.output == "a=b"


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.steps", "Override 'train.steps' must have the form key=value, e.g. train.steps"),
        ("=3", "must have the form key=value"),
        ("output.path=3", "Override 'output.path': 'output' is 'runs/a', which has no keys inside"),
        ("train.step=3", "Unknown config key 'train.step'; did you mean 'steps'"),
        ("train.steps=[1", "The value of 'train.steps' is not valid YAML"),
        ("train..steps=3", "Unknown config key 'train.'"),
        ("task={a}", "lacks|Unknown|task"),
    ],
)
def test_bad_overrides(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        config = load_config(write(tmp_path, MINIMAL), [override])
        parse(TaskConfig, config.task, "task.")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No config file at .*give the path of a YAML file"),
        ("", "must hold a mapping of keys, such as 'task: supersense'"),
        ("- a\n- b\n", "must hold a mapping"),
        ("task: [", "run.yaml is not valid YAML"),
        (b"task: \xff\n", "run.yaml cannot be read as UTF-8"),
        ("output: runs/a\n", "The config lacks 'task'; add it"),
        ("task: spam\n", "The config lacks 'output'; add it"),
        (MINIMAL + "lenght: 3\n", "Unknown config key 'lenght'; allowed are backbone, .*task,"),
        (MINIMAL + "trian: {}\n", "Unknown config key 'trian'; did you mean 'train'"),
        (MINIMAL + "prompt: {lenght: 3}\n", "key 'prompt.lenght'; did you mean 'length'"),
        (MINIMAL + "train: 5\n", "Config key 'train' is 5: input should be a valid dictionary"),
        (MINIMAL + "train: {steps: ten}\n", "Config key 'train.steps' is 'ten': .* valid integer"),
        (MINIMAL + "train: {steps: 1.5}\n", "Config key 'train.steps' is 1.5: .* valid integer"),
        (MINIMAL + "train: {steps: true}\n", "Config key 'train.steps' is True: .*integer"),
        (MINIMAL + "train: {optimizer: sgd}\n", "'train.optimizer' is 'sgd': .*'adafactor-t5x'"),
        (MINIMAL + "model: {remat: maybe}\n", "Config key 'model.remat' is 'maybe': .*boolean"),
        ("task: 123\noutput: a\n", "Config key 'task' is 123: input should be text; put it in"),
        ("task: spam\noutput: 2024\n", "Config key 'output' is 2024: input should be text"),
        (MINIMAL + "1: 2\n", "Config key '1' is 1: input should be text"),
    ],
)
def test_every_mistake_in_a_file_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    if content is not None:
        write(tmp_path, content)
    with pytest.raises(UserError, match=message) as caught:
        load_config(path)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and "pydantic" not in text


def test_a_directory_is_no_config_file(tmp_path):
    with pytest.raises(UserError, match="No config file at"):
        load_config(tmp_path)


def test_several_mistakes_are_all_named_in_one_sentence():
    with pytest.raises(UserError) as caught:
        parse(RunConfig, {"task": 1, "train": {"steps": "5", "sed": 1}})
    text = str(caught.value)
    for key in ("'task'", "'output'", "'train.steps'", "'train.sed'"):
        assert text.count(key) == 1
    assert text.count(".\n") == 0 and text.endswith(".")


@pytest.mark.parametrize(
    "schema, key, value",
    [
        (TrainConfig, "seed", -1),  # neither NumPy's nor JAX's generators take these seeds
        (TrainConfig, "seed", 2**32),
        (TrainConfig, "seed", 0.5),
        (TrainConfig, "steps", 0),
        (TrainConfig, "steps", 10**30),
        (TrainConfig, "batch_size", 10**9),
        (TrainConfig, "eval_batch_size", -1),
        (TrainConfig, "warmup_steps", -1),
        (TrainConfig, "learning_rate", 0),
        (TrainConfig, "learning_rate", float("inf")),
        (TrainConfig, "learning_rate", float("nan")),
        (TrainConfig, "z_loss", -0.1),
        (TrainConfig, "weight_decay", float("inf")),
        (PromptConfig, "length", 0),
        (PromptConfig, "length", 10**9),
    ],
)
def test_numbers_out_of_range(schema, key, value):
    with pytest.raises(UserError, match=rf"Config key 'x\.{key}' is {value}: "):
        parse(schema, {key: value}, "x.")


def test_seeds_of_the_whole_range_are_allowed():
    assert parse(TrainConfig, {"seed": 2**32 - 1}).seed == 2**32 - 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": []}, r"'task': labels are \[\], and some different ones are needed; leave"),
        ({"labels": ["a", "b", "a"]}, "'task': labels are .*'a'.*different ones are needed"),
        ({"labels": ["a", " "]}, "one of them is blank"),
        ({"labels": [1, 2]}, "'task.labels.0' is 1: input should be text; put it in quotes"),
        ({"labels": "yes"}, "'task.labels' is 'yes': .*list"),
        ({"label_map": {0: "a"}}, "'task.label_map.0' is 0: input should be text; put it in"),
        ({"template": "question"}, "template 'question' names no column; write one in braces"),
        ({"template": "{{text}} {}"}, "names no column"),
        ({"metrics": []}, "Config key 'task.metrics' is .*at least 1 item"),
        ({"max_input_length": 0}, "Config key 'task.max_input_length' is 0: "),
        ({"template": None}, "Config key 'task.template' is None"),
        ({"sauce": "x"}, "Unknown config key 'task.sauce'; did you mean 'source'"),
    ],
)
def test_tasks_that_cannot_be_answered(changes, message):
    with pytest.raises(UserError, match=message):
        parse(TaskConfig, {"name": "mine", "template": "{text}"} | changes, "task.")


@pytest.mark.parametrize("init", ["text", "file"])
def test_an_initialisation_needs_what_it_reads(init):
    with pytest.raises(UserError, match=f"init={init} needs prompt.{init}; give it"):
        parse(RunConfig, {"task": "spam", "output": "a", "prompt": {"init": init}})
    parse(RunConfig, {"task": "spam", "output": "a", "prompt": {"init": init, init: "x"}})


CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(p.stem for p in (CONFIGS / "paper").glob("*.yaml"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda p: p.stem)
def test_configurations_that_come_along_are_valid(path):
    if path.parent.name == "pretrain":
        parse(PretrainConfig, read_yaml(path.read_text(), path.name))
    else:
        resolve_task(load_config(path).task)


def test_recipes_of_the_paper_have_its_sizes_and_settings():
    # frozen and trained parameters of Lester et al. 2021, table 4 (small to XXL, 100 vectors)
    table = {"small": (76_961_152, 51_200), "base": (247_577_856, 76_800),
             "large": (783_150_080, 102_400), "xl": (2_849_757_184, 204_800),
             "xxl": (11_135_332_352, 409_600)}  # fmt: skip
    assert RECIPES == sorted(table)
    for size, (frozen, trained) in table.items():
        paper, code = (load_config(CONFIGS / kind / f"{size}.yaml")
                       for kind in ("paper", "authors_code"))  # fmt: skip
        shape = released(paper.backbone)
        leaves = jax.tree.leaves(t5.abstract_params(shape))
        assert sum(leaf.size for leaf in leaves) == frozen
        assert paper.prompt.length * shape.d_model == trained
        # A.1 and table 6: the best of the search
        train = paper.train
        assert (train.learning_rate, train.batch_size, train.steps) == (0.3, 32, 30_000)
        assert train.schedule == "constant" and not train.parameter_scale
        same = {"train": {"steps", "batch_size"}, "model": {"dropout"},
                "prompt": {"init", "uniform", "special_ids"}, "output": True}  # fmt: skip
        assert paper.model_dump(exclude=same) == code.model_dump(exclude=same)
        assert (code.model.dropout, code.prompt.init, code.prompt.uniform) == (
            0.1, "uniform", "code"
        )  # fmt: skip


def test_names_of_released_backbones():
    assert released("google/t5-v1_1-xl") == released("google/t5-xl-lm-adapt")
    for name in ("google/t5-xl", "google/t5-v1_1-xl-lm-adapt", "t5-small", "google/t5-v1_1-11b"):
        assert released(name) is None


def test_a_value_in_a_message_is_bounded_and_so_is_the_work():
    bomb = ["x"] * 10
    for _ in range(12):  # 10^13 words when printed
        bomb = [bomb] * 10
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (bomb, deep, {"a": bomb}, "x" * 10**7, 10**5000, list(range(10**6)), bomb[0]):
        assert len(shown(value)) < 450
    for value in ("it's", {"b": 1, "a": [None, 2.5]}, ["x", ("y",)], 7, True, None, b"x"):
        assert shown(value) == repr(value)
    assert listed(["a", "b"]) == "a, b"
    assert listed(map(str, range(100_000))).endswith(", 29, ... (100000 in all)")
