"""Few rows of a task: as many of each class, drawn by a seed."""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.rows import Rows
from jaxprompt.data.templates import to_target


def in_turn(answers: Sequence[str], order: Sequence[int]) -> list[int]:
    """Numbers of answers in the given order, but in turn from each class, as long as it has any.

    >>> in_turn(["a", "a", "a", "b"], [3, 2, 1, 0])
    [2, 3, 1, 0]
    """
    by_answer: dict[str, list[int]] = {}
    for number in order:
        by_answer.setdefault(answers[number], []).append(number)
    turns = itertools.zip_longest(*(by_answer[answer] for answer in sorted(by_answer)))
    return [number for turn in turns for number in turn if number is not None]


def few_rows(task: TaskConfig, rows: Rows, split: str) -> Rows:
    """The rows that ``task.few_shot`` names, in turn from each class; without it all rows.

    Raises:
        UserError: a class has fewer rows.
    """
    if task.few_shot is None:
        return rows
    wanted = task.few_shot.per_class
    answers = [to_target(task, row, f"row {n} of {split}") for n, row in enumerate(rows, 1)]
    order = np.random.default_rng(task.few_shot.seed).permutation(len(rows)).tolist()
    counts = dict.fromkeys(task.labels or answers, 0) | Counter(answers)
    rarest = min(counts, key=lambda answer: (counts[answer], answer))
    if counts[rarest] < wanted:
        raise UserError(
            f"task.few_shot.per_class is {wanted}, and {split} of task {task.name!r} has "
            f"{counts[rarest]} rows of {rarest!r}; give that number or less."
        )
    return [rows[number] for number in in_turn(answers, order)[: wanted * len(counts)]]
