"""Verdicts of comparisons, from scores of rows alone."""

import json

import numpy as np
import pytest

from jaxprompt.config.compare import CompareConfig
from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.references import Reference
from jaxprompt.studies.compare import (
    Arm,
    Compared,
    Rules,
    compare_arms,
    disagreements,
    frontier,
)
from jaxprompt.studies.compare_prompts import row_metric, score_rows
from jaxprompt.studies.compare_report import check_folder, write_comparison
from jaxprompt.studies.compare_runs import formulations_of, populations_of
from jaxprompt.training.datasets import tasks_of

ROWS = 400


def arm(name, *shares, tokens=10.0):
    """An arm of which each seed answers the first share of rows rightly."""
    scores = np.array([np.arange(ROWS) < share * ROWS for share in shares], float)
    return Arm(name, scores, ["yes" if right else "no" for right in scores[0]], tokens)


def compared(arms, rules=Rules()):
    facts = {"data": "rows.csv", "rows": ROWS, "metric": "accuracy"}
    texts = [f"text {i} | <b>" for i in range(ROWS)]
    pairs = compare_arms(arms, rules)
    return Compared(arms, pairs, rules, facts, range(ROWS), texts, ["yes"] * ROWS)


def test_the_same_answers_cannot_be_told_apart():
    [pair] = compare_arms([arm("x", 0.5), arm("y", 0.5)], Rules())
    found = pair.to_json()
    assert found["verdict"] == "cannot be told apart"
    assert (found["p"], found["difference"], found["interval"]) == (1.0, 0.0, [0.0, 0.0])
    assert found["detectable"] == 6 / ROWS  # with fewer rows that differ nothing is ever found


def test_the_better_one_is_named_from_either_side():
    pairs = compare_arms([arm("x", 0.7), arm("y", 0.5), arm("z", 0.505)], Rules())
    assert [pair.verdict() for pair in pairs] == [
        "a is better", "a is better", "cannot be told apart",
    ]  # fmt: skip
    assert pairs[0].wins == 80 and pairs[0].losses == 0 and pairs[0].p < 1e-9
    [pair] = compare_arms([arm("y", 0.5), arm("x", 0.7)], Rules())
    assert pair.verdict() == "b is better" and "x is better" in pair.sentence()


def test_values_of_p_are_corrected_for_the_number_of_pairs():
    pairs = compare_arms([arm("x", 0.5), arm("y", 0.52), arm("z", 0.5)], Rules())
    assert pairs[0].raw_p == 2 * 0.5**8 and pairs[0].p == 3 * pairs[0].raw_p
    assert [pair.verdict() for pair in pairs[::2]] == ["b is better", "a is better"]


def test_a_margin_says_which_is_not_worse():
    [pair] = compare_arms([arm("x", 0.5), arm("y", 0.505)], Rules(margin=0.02))
    assert pair.verdict() == (
        "cannot be told apart; a is not worse than b by more than 0.02; "
        "b is not worse than a by more than 0.02"
    )
    [pair] = compare_arms([arm("x", 0.5), arm("y", 0.52)], Rules(margin=0.05))
    assert pair.verdict() == "b is better; a is not worse than b by more than 0.05"
    [pair] = compare_arms([arm("x", 0.5), arm("y", 0.7)], Rules(margin=0.05))
    assert pair.verdict() == "b is better"


def test_few_seeds_that_vary_tell_less_than_rows_alone():
    [pair] = compare_arms([arm("x", 0.5, 0.6, 0.7), arm("y", 0.5, 0.5, 0.5)], Rules())
    assert pair.difference == pytest.approx(0.1) and pair.verdict() == "cannot be told apart"
    assert pair.detectable > 0.1
    [pair] = compare_arms([arm("x", 0.6, 0.6, 0.6), arm("y", 0.5, 0.5, 0.5)], Rules())
    assert pair.verdict() == "a is better"


def test_arms_that_stopped_early_are_compared_on_the_rows_of_both():
    long, short = arm("x", 0.9), arm("y", 0.2)
    short = short._replace(scores=short.scores[:, 50:150])
    long = long._replace(scores=long.scores[:, 50:])
    [pair] = compare_arms([long, short], Rules(sequential=True))
    assert pair.rows == 100 and pair.verdict() == "a is better" and pair.detectable is None


def test_rows_of_disagreement_and_paretos_front():
    arms = [arm("x", 0.5), arm("y", 0.51, tokens=20.0), arm("z", 0.4, tokens=30.0)]
    assert disagreements(arms, 3) == [160, 161, 162]
    assert [one.name for one in frontier(arms)] == ["x", "y"]


def test_a_report_has_verdicts_tables_and_a_figure(tmp_path):
    result = compared([arm("x", 0.5, 0.6), arm("$y|", 0.7, 0.7, tokens=20.0)], Rules(margin=0.1))
    page = write_comparison(tmp_path / "out", result)
    text = (tmp_path / "out" / "report.md").read_text()
    assert result.pairs[0].verdict("x", "$y\\|") in text and "&lt;b&gt;" in text
    assert "data:image/png" in page.read_text()
    known = json.loads((tmp_path / "out" / "report.json").read_text())
    assert known["pairs"][0]["a"] == "x" and known["prompts"][1]["seeds"] == 2
    check_folder(tmp_path / "out")  # it may be written again
    (tmp_path / "out" / "report.json").write_text("[]")
    with pytest.raises(UserError, match="another report"):
        check_folder(tmp_path / "out")
    with pytest.raises(UserError, match="is a file"):
        check_folder(tmp_path / "out" / "report.md")


# ---- scores of rows


def test_a_metric_that_is_no_mean_over_rows_gives_way_to_accuracy():
    task = TaskConfig(name="t", template="{x}", labels=["yes", "no"], metrics=["macro_f1"])
    heard = []
    assert row_metric(task, heard.append) == "accuracy" and "macro_f1" in heard[0]
    free = task.model_copy(update={"labels": None, "metrics": ["bleu"]})
    with pytest.raises(UserError, match="no mean over rows"):
        row_metric(free, heard.append)
    judges = [Reference(text, (text,), 0) for text in ("a cat", "dog")]
    assert score_rows("token_f1", ["cat sat", "dog"], judges).tolist() == [2 / 3, 1.0]


# ---- formulations


VALUES = {
    "task": {"name": "mine", "train": "a.jsonl", "validation": "b.jsonl", "template": "{text}",
             "labels": ["yes", "no"]},
    "prompt": {"length": 3}, "output": "out",
}  # fmt: skip


def formulations(**changes):
    return formulations_of(VALUES, parse(CompareConfig, {"formulations": changes}, "compare."))


def test_formulations_of_one_method_are_one_population(tmp_path):
    found = formulations(
        plain={}, asked={"template": "is it? {text}"}, short={"prompt.length": 2},
        lora={"method": "lora", "lora": {"rank": 2}},
    )  # fmt: skip
    compare = parse(CompareConfig, {"formulations": {"a": {}, "b": {}}, "seeds": [0, 1]})
    runs = populations_of(found, compare, tmp_path)
    assert [[one.name for one in members] for _, members in runs] == [
        ["plain", "asked"], ["short"], ["lora"],
    ]  # fmt: skip
    config = runs[0][0]
    assert [member.task["template"] for member in config.members()] == [
        "{text}", "{text}", "is it? {text}", "is it? {text}",
    ]  # fmt: skip
    assert [member.train.seed for member in config.members()] == [0, 1, 0, 1]
    assert config.task == "mine-plain" and config.train.successive_halving_of == "tasks"
    assert runs[2][0].lora.rank == 2 and runs[2][0].train.optimizer == "adamw"  # LoRA's recipe
    assert len({run.output for run, _ in runs}) == 3


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"a": {}}, "give two or more"),
        ({"a": {}, "b": {"train": "c.jsonl"}}, "b changes train, and all formulations have the"),
        ({"a": {}, "b": {"tmplate": "{x}"}}, "b has .tmplate., no key .* did you mean .template."),
        ({"a": {}, "b": {"template": "no column"}}, "b: .*names no column"),
        ({"a": {}, "b/c": {}}, "formulation name 'b/c'"),
        ({"a": {}, "b": {"method": "model-tuning"}}, "trains no population"),
    ],
)
def test_a_formulation_that_cannot_be_is_refused_by_name(changes, words):
    with pytest.raises(UserError, match=words):
        formulations(**changes)


def test_templates_of_a_population_are_tasks_with_numbers():
    values = VALUES | {"prompt": {"length": 3, "population": {
        "template": ["{text}", "is it? {text}"], "seed": [0, 1]}}}  # fmt: skip
    tasks = tasks_of(parse(RunConfig, values).members())
    assert [(task.name, task.template) for task in tasks] == [
        ("mine-0", "{text}"), ("mine-0", "{text}"),
        ("mine-1", "is it? {text}"), ("mine-1", "is it? {text}"),
    ]  # fmt: skip
    one = values | {"prompt": {"population": {"template": ["{text}"]}}}
    assert [task.name for task in tasks_of(parse(RunConfig, one).members())] == ["mine"]
    mixed = {"mixture": {"boolq": 1, "rte": 1}}
    with pytest.raises(UserError, match="population varies template, and task.mixture"):
        parse(RunConfig, values | {"task": mixed})
