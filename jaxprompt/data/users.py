"""Rows of users: cut by time inside each user, and drawn for steps that have a few users each."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Int

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.users import UsersConfig
from jaxprompt.data.batches import Example, with_member
from jaxprompt.data.rows import Row, Rows
from jaxprompt.data.sampling import EpochOrder, MixedExamples, batch_indices, epoch_order


class Histories(NamedTuple):
    """The rows of each split, and who has a prompt of his own."""

    users: tuple[str, ...]  # with rows enough, in the order of their first rows
    splits: Mapping[str, list[Row]]  # train, validation and perhaps test
    sharing: int  # users with too few rows

    def owners(self, column: str, split: str) -> Int[np.ndarray, " n"]:
        """For each row of a split the number of its user; -1: who has no prompt of his own."""
        numbers = {user: number for number, user in enumerate(self.users)}
        own = [numbers.get(user_of(row, column, 0), -1) for row in self.splits[split]]
        return np.array(own, int)


def user_of(row: Row, column: str, number: int) -> str:
    """Whose the row is; ``number`` counts rows from 1 in errors. Raises UserError."""
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(
            f"Row {number} has {shown(value)} in users.column, {column!r} (its columns are "
            f"{listed(row)}); it must say whose the row is, by a text or a whole number."
        )
    return str(value)


def histories(rows: Rows, settings: UsersConfig) -> Histories:
    """Cut the rows: of each user the latest are test rows, those before them validation rows.

    Raises:
        UserError: a row has no user or no time, or no user has rows enough.
    """
    every: dict[str, list[Row]] = {}
    for number, row in enumerate(rows, 1):
        every.setdefault(user_of(row, settings.column, number), []).append(row)
    own = {user: some for user, some in every.items() if len(some) >= settings.min_rows}
    if not own:
        raise UserError(
            f"None of {len(every):,} users in {settings.column!r} has users.min_rows, "
            f"{settings.min_rows}, rows (the most are {max(map(len, every.values()), default=0)}); "
            "lower it, or tune one prompt without users."
        )
    splits: dict[str, list[Row]] = {"train": [], "validation": []}
    if settings.test:
        splits["test"] = []
    for user, some in every.items():
        if user not in own:
            splits["train"] += some
            continue
        ordered = _in_time(some, settings.time)
        count = len(ordered)
        test = max(1, int(count * settings.test)) if settings.test else 0
        last = count - test
        first = last - max(1, int(count * settings.validation))
        splits["train"] += ordered[:first]
        splits["validation"] += ordered[first:last]
        if test:
            splits["test"] += ordered[last:]
    return Histories(tuple(own), splits, len(every) - len(own))


def _in_time(rows: list[Row], column: str | None) -> list[Row]:
    """Rows in the order of a column, those of one time in their order. Raises UserError.

    Texts that are all numbers, as a CSV file has them, are ordered as numbers.
    """
    if column is None:
        return rows
    times = [row.get(column) for row in rows]
    if all(isinstance(time, str) and time for time in times):
        texts = cast(list[str], times)
        numbers = [_as_number(text) for text in texts]
        keys = texts if None in numbers else numbers
    else:
        keys = times
        for time in times:
            if isinstance(time, bool) or not isinstance(time, int | float) or time != time:
                raise UserError(
                    f"A row has {shown(time)} in users.time, {column!r}; all rows of a user must "
                    "have a number there, or all a text that sorts by time, such as 2026-11-30."
                )
    order = sorted(range(len(rows)), key=cast(list[float], keys).__getitem__)
    return [rows[i] for i in order]


def _as_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


class UserExamples(MixedExamples):
    """The training examples of users, of which each step has some users and rows of each.

    Users are drawn in epochs in which each comes once, so all of them have as many steps. Which
    users and rows a step has is a pure function of the seed and the step.
    """

    def __init__(self, users: Sequence[Sequence[Example]], size: int, rows: int):
        """Args:
        users: the examples of each, at least one.
        size: users of a step, at most as many as there are.
        rows: of a user in a step.
        """
        super().__init__([[examples] for examples in users])
        self._none = np.zeros(len(users), int)
        self.size, self.rows = size, rows
        # two epochs suffice: batches are made in their order
        self._order = functools.lru_cache(maxsize=4)(epoch_order)

    @property
    def visits(self) -> int:
        """In how many steps each user comes once."""
        return max(len(self._none) // self.size, 1)

    def users(self, seed: int, step: int) -> Int[np.ndarray, " M"]:
        """The numbers of the users of a step, all different."""
        return batch_indices(
            self._none, batch_size=self.size, seed=seed, step=step, window=0, order_of=self._order
        )

    def indices(
        self,
        lengths: Int[np.ndarray, " n"],
        *,
        batch_size: int,
        seed: int,
        step: int,
        window: int,
        order_of: EpochOrder = epoch_order,
    ) -> Int[np.ndarray, " B"]:
        """The numbers of the examples in a step: the rows of its users, one user after another."""
        visit, numbers = step // self.visits, []
        for user in self.users(seed, step):
            first, count, _ = self.parts[user]
            own = batch_indices(
                self._none[:1].repeat(count), batch_size=self.rows,
                seed=seed + (int(user) + 1) * 2**32, step=visit, window=0, order_of=order_of,
            )  # fmt: skip
            numbers.append(first + own)
        return np.concatenate(numbers)

    def in_slots(self, examples: Sequence[Example], vocabulary: int, length: int) -> list[Example]:
        """The examples of a step as those of members 0, 1, ...: the places of its users.

        Args:
            examples: as ``indices`` chose them.
            vocabulary: the first virtual id.
            length: vectors of each prompt.
        """
        slots = [i // self.rows for i in range(len(examples))]
        pairs = zip(examples, slots, strict=True)
        return [with_member(example, slot, vocabulary, length) for example, slot in pairs]
