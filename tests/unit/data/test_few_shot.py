"""Few rows of a task: as many of each class, drawn by a seed."""

import json
from collections import Counter

import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.tasks.splits import load_rows


def task(folder, **few):
    """Of 30 rows in each split, one third of which are "no"."""
    values = {"name": "mine", "template": "{text}", "labels": ["no", "yes"]}
    for split in ("train", "validation", "test"):
        rows = [{"text": f"{split} {i}", "label": "yes" if i % 3 else "no"} for i in range(30)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values[split] = str(folder / f"{split}.jsonl")
    return parse(TaskConfig, values | {"few_shot": few or None})


@pytest.mark.parametrize("split", ["train", "validation"])
def test_each_class_has_as_many_rows_and_another_seed_has_others(split, tmp_path):
    rows = load_rows(task(tmp_path, per_class=4), split)
    assert Counter(row["label"] for row in rows) == {"no": 4, "yes": 4}
    assert len({row["text"] for row in rows}) == 8
    assert rows == load_rows(task(tmp_path, per_class=4, seed=0), split)
    assert rows != load_rows(task(tmp_path, per_class=4, seed=1), split)
    # more rows of the same seed hold the fewer ones, and come in turn from each class
    assert load_rows(task(tmp_path, per_class=7), split)[:8] == rows
    assert [row["label"] for row in rows[:4]] == ["no", "yes", "no", "yes"]


def test_test_rows_are_all_there(tmp_path):
    assert len(load_rows(task(tmp_path, per_class=4), "test")) == 30
    assert len(load_rows(task(tmp_path), "train")) == 30


def test_more_rows_than_a_class_has_are_refused(tmp_path):
    with pytest.raises(UserError, match="has 10 rows of 'no'; give that number or less"):
        load_rows(task(tmp_path, per_class=11), "train")


def test_a_class_without_any_row_is_refused(tmp_path):
    mine = task(tmp_path, per_class=1).model_copy(update={"labels": ["no", "perhaps", "yes"]})
    with pytest.raises(UserError, match="has 0 rows of 'perhaps'"):
        load_rows(mine, "train")


def test_tasks_without_classes_are_refused(tmp_path):
    values = task(tmp_path, per_class=4).model_dump()
    for change in ({"labels": None}, {"group": "text"}):
        with pytest.raises(UserError, match="few_shot is for tasks with labels"):
            parse(TaskConfig, values | change)
