"""References of answers: the target text of each row, all accepted answers, and its group."""

import math
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.rows import Row, Rows, row_name
from jaxprompt.data.templates import to_target


class Reference(NamedTuple):
    """The texts that a prediction is compared with."""

    text: str  # the target
    answers: tuple[str, ...]  # all texts that are right
    group: Hashable  # rows of one group are right together (MultiRC: the question)


def target_texts(task: TaskConfig, rows: Rows, origin: str | None = None) -> list[str]:
    """The target text of each row."""
    return [to_target(task, row, row_name(task, i, origin)) for i, row in enumerate(rows)]


def references(task: TaskConfig, rows: Rows, origin: str | None = None) -> list[Reference]:
    """The reference of each row."""
    judged = []
    for number, text in enumerate(target_texts(task, rows, origin)):
        row, where = rows[number], row_name(task, number, origin)
        for column in filter(None, (task.answers, task.group)):
            value = row.get(column)
            if value is None or (isinstance(value, float) and value != value):
                raise UserError(f"{where} has no {column!r}, by which task {task.name!r} judges.")
        _check_judged(task, text, where)
        answers = (text,) if task.answers is None else _answers(task, row, where)
        group = number if task.group is None else str(row[task.group])
        judged.append(Reference(text, answers, group))
    return judged


def _check_judged(task: TaskConfig, text: str, where: str) -> None:
    """Raise UserError for a reference that the task's metrics cannot use, such as no label."""
    hint = "rows without a label can be answered (predict), not judged"
    if "wsc_accuracy" in task.metrics and text not in ("True", "False"):
        raise UserError(f"{where} has the label {shown(text)}; allowed are True and False; {hint}.")
    if {"pearson", "spearman"} & set(task.metrics):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (task.rule == "stsb" and value < 0):
            raise UserError(f"{where} has the label {shown(text)}, which is no score; {hint}.")


def _answers(task: TaskConfig, row: Row, where: str) -> tuple[str, ...]:
    """All accepted answers of a row; UserError unless they are a list of texts."""
    value = row[task.answers or ""]
    texts = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(texts, list | tuple) or not texts:
        hint = "; rows of SQuAD's form have the rule 'squad'" * isinstance(texts, dict)
        raise UserError(
            f"{where} has {shown(value)} in {task.answers!r}; give a list of texts{hint}."
        )
    for text in texts:
        if isinstance(text, bool) or not isinstance(text, str | int | float) or text != text:
            raise UserError(
                f"{where} has {shown(text)} among its {task.answers!r}; give a list of texts."
            )
    return tuple(map(str, texts))
