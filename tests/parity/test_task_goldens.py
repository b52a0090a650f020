"""Text forms, targets and metrics of the paper's tasks against files written by hand."""

from pathlib import Path

import pytest

from jaxprompt.config import yaml12
from jaxprompt.config.errors import UserError
from jaxprompt.data import tasks
from jaxprompt.data.references import references
from jaxprompt.data.tasks.qa import pad_punctuation
from jaxprompt.data.tasks.registry import PREFIXES, TASKS, resolve_task
from jaxprompt.data.tasks.rules import apply_rule
from jaxprompt.data.templates import to_text
from jaxprompt.evaluation.metrics import METRICS

FOLDER = Path(tasks.__file__).parent / "goldens"
GOLDENS = {path.stem: yaml12.load(path.read_text(encoding="utf-8"))
           for path in sorted(FOLDER.glob("*.yaml"))}  # fmt: skip
# tasks that differ from one with a file only in where their rows come from
SAME = {"mnli_mismatched": "mnli"} | {
    name: "mrqa_drop" for name in TASKS if name.startswith("mrqa_") and name != "mrqa_drop"
}
BUILTIN = {"supersense", "spam"}


def texts(name, rows, training=False):
    task = resolve_task(name)
    rows = apply_rule(task, rows, training=training)
    return [to_text(task, row) for row in rows]


def judged(name):
    golden, task = GOLDENS[name], resolve_task(name)
    rows = apply_rule(task, golden["rows"], training=False)
    return golden["predictions"], references(task, rows), task.labels


def test_every_task_has_a_golden_file():
    assert set(GOLDENS) | set(SAME) | BUILTIN == set(TASKS)
    for name, other in SAME.items():
        different = {"name", "source", "validation"}
        mine, theirs = (resolve_task(n).model_dump(exclude=different) for n in (name, other))
        assert mine == theirs


@pytest.mark.parametrize("name", GOLDENS)
def test_inputs_and_targets(name):
    golden = GOLDENS[name]
    assert len(golden["rows"]) >= 5
    found = texts(name, golden["rows"])
    assert [text for text, _ in found] == golden["inputs"]
    assert [target for _, target in found] == golden["targets"]
    wanted = golden.get("training", [list(pair) for pair in found])
    assert [list(pair) for pair in texts(name, golden["rows"], training=True)] == wanted


@pytest.mark.parametrize("name", [name for name in GOLDENS if "own" in GOLDENS[name]])
def test_superglues_own_files_give_the_same(name):
    golden = GOLDENS[name]
    inputs = [text for text, _ in texts(name, golden["own"])]
    assert inputs == golden.get("own_inputs", golden["inputs"])


@pytest.mark.parametrize("name", GOLDENS)
def test_metrics(name):
    golden, (predictions, found, labels) = GOLDENS[name], judged(name)
    for metric, values in golden["each"].items():
        each = [METRICS[metric]([p], [r], labels)
                for p, r in zip(predictions, found, strict=True)]  # fmt: skip
        assert each == pytest.approx(values)
    assert set(golden["metrics"]) == set(resolve_task(name).metrics)
    for metric, value in golden["metrics"].items():
        assert METRICS[metric](predictions, found, labels) == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("name", [n for n in GOLDENS if resolve_task(n).labels or n == "wsc"])
def test_rows_without_label_can_be_asked_and_not_judged(name):
    task = resolve_task(name)
    row = GOLDENS[name]["rows"][0]
    for unlabelled in (row | {"label": -1}, {k: v for k, v in row.items() if k != "label"}):
        made = apply_rule(task, [unlabelled], training=False)
        task_input = task.model_copy(update={"target": "x", "labels": None})
        assert to_text(task_input, made[0])[0] == GOLDENS[name]["inputs"][0]
    if task.labels:
        with pytest.raises(UserError, match="has the label '-1'; allowed are"):
            references(task, apply_rule(task, [row | {"label": -1}], training=False))


def test_triples_without_a_text_can_be_asked():
    row = {"input": ["a | b | c", "d | e | f"]}
    for unlabelled in (row, row | {"target": None, "references": []}, row | {"target": ""}):
        made = apply_rule(resolve_task("web_nlg"), [unlabelled], training=False)
        assert to_text(resolve_task("web_nlg"), made[0])[0] == "a | b | c && d | e | f"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("wsc", {"label": -1}), ("stsb", {"label": -1}), ("stsb", {"label": -1.0}),
        ("stsb", {"label": None}), ("wsc", {"label": None}), ("squad", {"answers": None}),
        ("mrqa_drop", {"answers": None}), ("record", {"answers": None}),
        ("web_nlg", {"target": None, "references": None}),
        ("web_nlg", {"target": "", "references": []}),
    ],
)  # fmt: skip
def test_rows_that_nothing_is_known_of_are_answered_and_never_judged(name, change):
    """Each would count as wrong, and figures would be those of something else."""
    task, row = resolve_task(name), GOLDENS[SAME.get(name, name)]["rows"][0]
    missing = {key: value for key, value in row.items() if key not in change}
    for unlabelled in (row | change, missing):
        made = apply_rule(task, [unlabelled], training=False)
        asked = task.model_copy(update={"target": ""})
        assert to_text(asked, made[0])[0] == GOLDENS[SAME.get(name, name)]["inputs"][0]
        with pytest.raises(UserError, match="row 1 "):
            references(task, made)


@pytest.mark.parametrize("name", GOLDENS)
def test_names_that_t5_puts_in_front(name):
    prefix = GOLDENS[name].get("prefix", "")
    assert PREFIXES[name] == prefix
    named = resolve_task({"name": name, "prefix": True})
    assert named.template == prefix + resolve_task(name).template
    assert resolve_task({"name": name, "prefix": False}) == resolve_task(name)


def test_prefix_is_for_t5s_tasks():
    for values in ({"name": "spam", "prefix": True}, {"name": "boolq", "prefix": "boolq"}):
        with pytest.raises(UserError, match="task.prefix is .*true or false"):
            resolve_task(values)


def test_punctuation_as_re2_has_it():
    # all of ASCII's marks, and no others: RE2's [[:punct:]] does not know Unicode
    marks = "".join(map(chr, range(33, 127)))
    marks = [c for c in marks if not c.isalnum()]
    assert pad_punctuation("a" + "a".join(marks)) == "a " + " a ".join(marks)
    assert pad_punctuation("a…b«c\u00a0d") == "a…b«c\u00a0d"


def test_white_space_as_re2_has_it():
    # RE2's \\s is tab, line feed, form feed, carriage return and blank; U+000B is none of it
    assert pad_punctuation("a\t\n\f\r  b") == "a b"
    assert pad_punctuation("a\u000bb \u000b c") == "a\u000bb \u000b c"


def test_a_row_that_is_not_the_rules_kind_is_named():
    with pytest.raises(UserError, match=r"Row 2 of v.jsonl is not as the rule 'multirc' expects"):
        rows = [GOLDENS["multirc"]["rows"][0], {"question": "Who?"}]
        apply_rule(resolve_task("multirc"), rows, training=False, origin="v.jsonl")
    lost = {"text": "He ran", "span1_text": "He", "span1_index": 0, "span2_text": "it",
            "span2_index": 1, "label": 1}  # fmt: skip
    with pytest.raises(UserError, match="Row 1 of task 'wsc': the pronoun 'it' is no word"):
        apply_rule(resolve_task("wsc"), [lost], training=False)
    with pytest.raises(UserError, match="leaves none of the 1 rows of train"):
        apply_rule(resolve_task("wsc"), [lost | {"label": 0}], training=True, origin="train")
    mine = resolve_task({"name": "mine", "template": "{a}", "rule": "squat"})
    with pytest.raises(UserError, match="has the rule 'squat'; known are copa, multirc"):
        apply_rule(mine, [{"a": 1}], training=True)


def test_rows_without_what_they_are_judged_by():
    mine = resolve_task({"name": "mine", "template": "{a}", "target": "{b}", "answers": "all"})
    with pytest.raises(UserError, match="row 1 of v.csv has no 'all', by which task 'mine' judges"):
        references(mine, [{"a": 1, "b": 2}], "v.csv")
    grouped = mine.model_copy(update={"answers": None, "group": "all"})
    for lost in (None, float("nan")):  # rows without a group are not one group
        with pytest.raises(
            UserError, match="row 1 of v.csv has no 'all', by which task 'mine' jud"
        ):
            references(grouped, [{"a": 1, "b": 2, "all": lost}], "v.csv")
    with pytest.raises(UserError, match="row 1 of v.csv has 'one' in 'all'; give a list"):
        references(mine, [{"a": 1, "b": 2, "all": "one"}], "v.csv")
