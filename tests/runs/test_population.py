"""Populations whose prompts differ in length and task: each is what it would be alone."""

import itertools
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import (
    RUN_SUMS,
    Killer,
    assert_same_sums,
    diverge,
    make_backbone,
    make_rows,
    metrics,
    run_config,
    run_values,
    write_rows,
)

from jaxprompt import api
from jaxprompt.cli.progress import show_result
from jaxprompt.config.errors import UserError
from jaxprompt.config.overrides import load_config
from jaxprompt.data.batches import Example
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.inference.predict import Predictions
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.training import evaluator, tune
from jaxprompt.training.divergence import Diverged, check_members
from jaxprompt.training.loop import train
from jaxprompt.training.metric_log import MetricName
from jaxprompt.training.population import init_trainables, length_warnings, start_warnings

TASKS = ["mine", "other"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


def two_tasks(backbone, folder, **settings):
    """Eight prompts: two tasks, of other labels, targets and metrics, two lengths, two seeds."""
    folder.mkdir(exist_ok=True)
    mine = run_values(backbone, folder)["task"]
    rows = [{**row, "label": f"it was {row['label']}"} for row in make_rows(30)]
    other = mine | {
        "name": "other", "template": "{text} ?", "labels": ["it was yes", "it was no"],
        "train": str(write_rows(folder / "other.jsonl", rows)),
        "validation": str(write_rows(folder / "few.jsonl", rows[:6])),
        "test": str(write_rows(folder / "test.jsonl", rows[6:16])),
        "metrics": ["macro_f1", "accuracy"], "max_target_length": 8,
    }  # fmt: skip
    grid = {"task": [mine, other], "length": [5, 3], "seed": [0, 2]}
    return run_config(backbone, folder, task="mine", prompt={"population": grid}, **settings)


@pytest.fixture(scope="module")
def population(backbone, tmp_path_factory):
    run = two_tasks(backbone, tmp_path_factory.mktemp("population"))
    return run, train(run)


def prompt_of(run, k):
    return load_prompt(Path(run.output) / "population" / str(k) / "prompt")


def test_the_table_says_what_each_prompt_is(population):
    run, result = population
    rows = result["population"]
    told = [(row["task"], row["length"], row["seed"]) for row in rows]
    assert told == list(itertools.product(TASKS, [5, 3], [0, 2]))
    for k, row in enumerate(rows):
        prompt = prompt_of(run, k)
        assert len(prompt.vectors) == row["length"]
        assert prompt.metadata["task"]["name"] == row["task"]
    lines = (Path(run.output) / "population.md").read_text().splitlines()
    assert len(lines) == 10 and "accuracy or macro_f1" in lines[0]
    assert ["mine" in line for line in lines[2:]] == [True] * 4 + [False] * 4


@pytest.mark.parametrize("k", [0, 3, 4, 7])  # of each task the longer and the shorter
def test_each_prompt_is_that_of_a_lone_run(population, tmp_path, k):
    run, result = population
    member = run.members()[k].model_copy(update={"output": str(tmp_path / "alone")})
    alone, row = train(member), result["population"][k]
    assert (alone["value"], alone["best_step"]) == (row["value"], row["best_step"])
    other = load_prompt(tmp_path / "alone" / "prompt").vectors
    assert_same_sums(prompt_of(run, k).vectors, other, RUN_SUMS)
    for key in ("untuned", "majority", "rows", "metric"):
        assert result["tasks"][row["task"]][key] == alone[key]


def test_every_task_has_its_best_prompt(population, capsys):
    run, result = population
    assert list(result["tasks"]) == TASKS
    for name, found in result["tasks"].items():
        values = [row["value"] for row in result["population"] if row["task"] == name]
        assert found["value"] == max(values) and found["task"] == name
        report = api.evaluate(found["prompt"])
        assert report["metrics"][found["metric"]] == found["value"]
        assert found["trainable_parameters"] == load_prompt(found["prompt"]).vectors.size
        assert (Path(found["prompt"]).parent / "curves.png").exists()
    tested = api.evaluate(result["tasks"]["other"]["prompt"], split="test")
    assert result["tasks"]["other"]["test"] == tested["metrics"]
    assert not (Path(run.output) / "prompt").exists()  # which would be of what?
    assert result == json.loads((Path(run.output) / "result.json").read_text())
    keys = {key for row in metrics(Path(run.output)) for key in row}
    assert {"mine/validation/accuracy", "other/validation/macro_f1", "other/loss"} <= keys
    show_result(result)
    shown = capsys.readouterr().err
    assert "mine: accuracy" in shown and "other: macro_f1" in shown


def test_the_worse_half_of_every_task_stops_and_a_kill_changes_nothing(backbone, tmp_path):
    halving = {"successive_halving_every": 4, "checkpoint_every": 3}
    whole = train(two_tasks(backbone, tmp_path / "whole", train=halving))
    for name in TASKS:
        steps = [row["steps"] for row in whole["population"] if row["task"] == name]
        assert sorted(steps) == [4, 4, 8, 12]
    run = two_tasks(backbone, tmp_path / "killed", train=halving)
    for step in (5, 10):
        with pytest.raises(KeyboardInterrupt):
            train(run, Killer(step))
    again = train(run)
    assert again["population"] == whole["population"]
    for name in TASKS:
        a, b = (load_prompt(r["tasks"][name]["prompt"]).vectors for r in (whole, again))
        np.testing.assert_array_equal(a, b)


def test_it_goes_back_to_prompts_that_had_been_stopped(backbone, tmp_path, monkeypatch):
    """The checkpoint before has prompts of both lengths, what diverges maybe of one."""
    settings = {"successive_halving_every": 4, "evaluate_every": 4, "checkpoint_every": 100}
    run = two_tasks(backbone, tmp_path, train=settings | {"on_divergence": "go_back"})
    diverge(monkeypatch, at=7, times=1)
    result = train(run)
    assert sorted(row["steps"] for row in result["population"]) == [4] * 4 + [8] * 2 + [12] * 2


@pytest.mark.parametrize(
    "method, grid",
    [
        ("residual-prompt-tuning", {"length": [3, 9]}),
        ("superposition-prompt-tuning", {"length": [3, 9]}),  # the longer one has a larger basis
        ("low-rank-prompt-tuning", {"rank": [1, 3]}),
        ("p-tuning", {"p_tuning.encoder": ["mlp", "lstm"]}),
    ],
)
def test_a_reparameterised_prompt_of_any_size_is_that_of_a_lone_run(
    backbone, tmp_path, method, grid
):
    prompt = {"population": grid, "basis": 6, "bottleneck": 4}
    run = run_config(
        backbone, tmp_path / method, method=method, prompt=prompt,
        train={"learning_rate": 0.01, "steps": 4},
    )  # fmt: skip
    train(run)
    for k, member in enumerate(run.members()):
        folder = tmp_path / method / f"alone{k}"
        train(member.model_copy(update={"output": str(folder)}))
        alone = load_prompt(folder / "prompt").vectors
        assert_same_sums(prompt_of(run, k).vectors, alone, RUN_SUMS)


def test_a_prompt_that_has_diverged_is_kept_nowhere(backbone, tmp_path):
    """Numbers that are none answer too: always the first label."""
    grid = {"learning_rate": [0.3, 1e38]}
    run = run_config(backbone, tmp_path, prompt={"population": grid}, train={"clip": 0})
    result = train(run)
    assert result["population"][1]["value"] is None and result["value"] > 0
    assert len(load_prompt(result["prompt"]).vectors) == 3
    assert [p.name for p in (tmp_path / "run" / "population").iterdir()] == ["0"]
    assert "diverged" in (tmp_path / "run" / "population.md").read_text()


def test_a_task_of_which_no_prompt_is_left_is_told():
    shown = [
        MetricName("mine/", "accuracy"),
        MetricName("other/", "f1"),
        MetricName("other/", "f1"),
    ]
    nan, inf = math.nan, math.inf
    check_members(7, [0, 1, 2], [1.0, nan, 2.0], shown)
    with pytest.raises(Diverged, match="loss of task 'other' is inf at step 7"):
        check_members(7, [0, 1, 2], [1.0, inf, nan], shown)
    check_members(7, [0], [1.0], shown)  # the others had been stopped


def test_keys_of_a_task_stand_where_it_is_named(backbone, tmp_path):
    grid = {"task": ["spam", "supersense"]}
    with pytest.raises(UserError, match="move them there"):
        run_config(backbone, tmp_path, prompt={"population": grid})


def test_what_is_kept_names_the_dtype(population):
    run, _ = population
    assert run.model.dtype is None
    assert load_config(Path(run.output) / "config.yaml").model.dtype == "float32"
    assert prompt_of(run, 0).metadata["config"]["model"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "mine"}, "different tasks of the name 'mine'"),
        ({"name": "../other"}, "use letters, digits"),
        ({"metrics": ["speed"]}, "speed"),
    ],
)
def test_tasks_that_cannot_be_together(backbone, tmp_path, change, words):
    run = two_tasks(backbone, tmp_path)
    grid = dict(run.prompt.population)
    grid["task"] = [grid["task"][0], grid["task"][1] | change]
    prompt = run.prompt.model_copy(update={"population": grid})
    with pytest.raises(UserError, match=words):
        train(run.model_copy(update={"prompt": prompt}))
    assert not Path(run.output).exists()


def test_trees_of_one_length_stay_one_tree():
    from jaxprompt.methods.base import member_groups, num_members
    from jaxprompt.training.population import keep_members, stack_trainables
    from jaxprompt.training.step import TrainState

    tree = lambda length, value: {"prompt": np.full((1, length, 2), value, np.float32)}
    trees = [tree(3, 0), tree(3, 1), tree(5, 2), tree(5, 3)]
    assert stack_trainables(trees[:2])["prompt"].shape == (2, 3, 2)
    both = stack_trainables(trees)
    assert [t["prompt"].shape for t in member_groups(both)] == [(2, 3, 2), (2, 5, 2)]
    assert num_members(both) == 4
    state = TrainState(jax.numpy.int32(0), both, tuple(t["prompt"] + 10 for t in both))
    kept = keep_members(state, [2, 3])
    np.testing.assert_array_equal(kept.trainables["prompt"][:, 0, 0], [2, 3])
    np.testing.assert_array_equal(kept.optimizer[:, 0, 0], [12, 13])
    kept = keep_members(state, [1, 2])
    assert [t["prompt"][0, 0, 0] for t in kept.trainables] == [1, 2]


def test_a_start_from_words_that_are_not_there_is_warned_of(backbone, tmp_path):
    def warnings(task, **prompt):
        run = run_config(backbone, tmp_path, prompt=prompt)
        return start_warnings([run, run], [resolve_task(task)] * 2)

    [told] = warnings("squad")
    assert "task 'squad' has none" in told and "prompt.init=sampled_vocabulary" in told
    assert not warnings("squad", init="sampled_vocabulary") and not warnings("record", length=4)
    [told] = warnings("record", length=3)
    assert "has 4 class labels and the prompt 3 vectors" in told and "last 1 are left out" in told
    assert not warnings("cb", length=3) and warnings("cb", length=2)
    # what a superposition starts from are its basis vectors
    run = run_config(backbone, tmp_path, prompt={"length": 2}, method="superposition-prompt-tuning")
    assert not start_warnings([run], [resolve_task("cb")])
    free = {"labels": None}
    run = run_config(backbone, tmp_path, task=free)
    with pytest.raises(KeyboardInterrupt):  # and a run says so
        train(run, Killer("warning: prompt.init is class_labels and task 'mine' has none"))


def test_class_labels_of_a_task_without_labels_start_its_prompt(backbone, tmp_path):
    words = {"labels": None, "class_labels": ["good", "it was", "one"]}
    run = run_config(backbone, tmp_path, task=words)
    loaded, task = load_backbone(str(backbone)), resolve_task(run.task)
    tokenizer = load_tokenizer(backbone)
    table = np.asarray(loaded.params["token_embedder"]["embedding"])
    found = np.asarray(init_trainables(run, task, loaded, tokenizer)["prompt"])[0]
    wanted = [table[tokenizer.encode(word)].mean(axis=0) for word in words["class_labels"]]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    strange = task.model_copy(update={"class_labels": ["good", "zebra"]})
    with pytest.raises(UserError, match="class label 'zebra' of task 'mine' has no token"):
        init_trainables(run, strange, loaded, tokenizer)
    # words in the template start the vectors that stand in their place
    mixed = task.model_copy(update={"template": "[prompt] {text} [soft:it was]"})
    found = np.asarray(init_trainables(run, mixed, loaded, tokenizer)["prompt"])[0]
    np.testing.assert_allclose(found[:1], wanted[:1], rtol=1e-6)
    np.testing.assert_allclose(found[1:], table[tokenizer.encode("it was")], rtol=1e-6)


def test_a_prompt_that_is_most_of_what_a_row_holds_is_warned_of():
    rows = [Example(np.zeros(5020, np.int32), np.zeros(2, np.int32))] * 3
    [told] = length_warnings(5000, rows)
    assert "prompt.length is 5000" in told and "has 20 tokens" in told and "251 times" in told
    assert not length_warnings(100, rows)


def test_answers_that_are_no_numbers_are_one_members_matter(backbone, tmp_path, monkeypatch):
    """The vectors are finite here and the answers right: only the scores are not."""
    predict = evaluator.predict_per_member

    def lost(model, task, examples, *args, **kwargs):
        found = predict(model, task, examples, *args, **kwargs)
        if len(found) == 2:
            right = [examples_of[id(examples)][i] for i in range(len(examples))]
            found[0] = Predictions(right, None, non_finite_rows=[1])
        return found

    split_of, examples_of = tune.build_dataset, {}

    def assigned(*args):
        given = split_of(*args)
        texts = [reference.text for reference in given.validation.references]
        examples_of[id(given.validation.examples)] = texts
        return given

    monkeypatch.setattr(evaluator, "predict_per_member", lost)
    monkeypatch.setattr(tune, "build_dataset", assigned)
    run = run_config(backbone, tmp_path / "a", prompt={"population": {"seed": [0, 1]}})
    result = train(run)
    first, second = result["population"]
    assert first["best_step"] == -1 and second["best_step"] > 0
    assert not (Path(run.output) / "population" / "0").exists()
    assert "NaN" not in (Path(run.output) / "metrics.jsonl").read_text()


def test_a_backbone_that_answers_no_numbers_ends_the_run(backbone, tmp_path, monkeypatch):
    lost = [Predictions(["yes"] * 8, None, non_finite_rows=[2, 5])]
    monkeypatch.setattr(evaluator, "predict_per_member", lambda *args, **kwargs: lost)
    with pytest.raises(UserError, match="tiny gives scores that are not finite .* for 2 of 8 rows, "
                       "first for row 3"):  # fmt: skip
        train(run_config(backbone, tmp_path / "a"))
