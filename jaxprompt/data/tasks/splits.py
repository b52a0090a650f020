"""The rows of a task's splits: read, brought into the form of the template, checked, limited."""

import collections

import numpy as np

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.rows import Rows
from jaxprompt.data.sources import read_rows
from jaxprompt.data.tasks.few_shot import few_rows
from jaxprompt.data.tasks.rules import apply_rule
from jaxprompt.data.templates import to_text


def read_split(
    task: TaskConfig, split: str, data: str | Rows | None = None, *, training: bool = False
) -> Rows:
    """Rows of "train", "validation" or "test" in the form that the template wants.

    Args:
        data: A file to read, or rows to take, instead of the split.
        training: The rows are to be trained on, not to be answered and judged.
    """
    name = data if isinstance(data, str) else getattr(task, split)
    if data is not None and not isinstance(data, str):
        return apply_rule(task, data, training=training, origin=name)
    if name is None:
        raise UserError(
            f"Task {task.name!r} names no {split} data; give task.{split}, or a file with --data."
        )
    rows = read_rows(task.source if data is None else None, name)
    return apply_rule(task, rows, training=training, origin=name)


def load_rows(
    task: TaskConfig, split: str, limit: int | None = None, rows: Rows | None = None
) -> Rows:
    """Rows of "train", "validation" or "test", evenly spaced where there are more than ``limit``.

    The input of every row is checked, and the target of rows to be trained on. Other rows may lack
    a usable label, as test splits do: they can be answered, and ``references`` refuses them. Where
    the task names a group, whole groups are taken, so that metrics of groups keep their meaning.
    With ``task.few_shot``, "train" and "validation" have as many rows of each class.

    Args:
        rows: Take these rows instead of reading those of the split.
    """
    rows, name = read_split(task, split, rows, training=split == "train"), getattr(task, split)
    asked = task if split == "train" else task.model_copy(update={"target": "", "labels": None})
    for number, row in enumerate(rows, 1):
        to_text(asked, row, f"row {number} of {name}")
    if split != "test":
        rows = few_rows(task, rows, split)
    if limit is None or limit >= len(rows):
        return rows
    if task.group is None:
        return [rows[i] for i in _evenly_spaced(len(rows), limit)]
    return _whole_groups(rows, task.group, limit)


def _evenly_spaced(count: int, chosen: int) -> list[int]:
    """``chosen`` of ``count`` places, from the first to the last, evenly spaced."""
    return np.linspace(0, count - 1, chosen).astype(int).tolist()


def _whole_groups(rows: Rows, column: str, limit: int) -> Rows:
    """The rows of evenly spaced groups: as many as have at most ``limit`` rows, at least one."""
    group_of = [str(row.get(column)) for row in rows]
    sizes = collections.Counter(group_of)
    names, count = list(sizes), min(len(sizes), limit)
    while True:
        chosen = {names[i] for i in _evenly_spaced(len(names), count)}
        total = sum(sizes[name] for name in chosen)
        if total <= limit or count == 1:
            return [row for row, name in zip(rows, group_of, strict=True) if name in chosen]
        count = max(1, min(count - 1, count * limit // total))
