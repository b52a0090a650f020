"""Rows that wait for the device, and which of them make the next batch. No threads, no clock.

A row has a lane (rows of one lane may share a batch), a cost (its padded tokens) and a key (who
asked). The key that was served the fewest tokens comes first, with its oldest row; rows of the same
lane and of similar width fill the batch. So no row waits for ever, and one key cannot crowd out
another.
"""

import heapq
import itertools
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Limits(NamedTuple):
    """What may wait, and what may be in one batch."""

    queued_rows: int = 2048
    batch_rows: int = 32
    batch_tokens: int = 32_768  # rows x the widest of them
    batch_versions: int = 32  # different prompts in a batch: it must not exceed the slots
    row_sizes: tuple[int, ...] = (1, 4, 16, 32)  # of compiled programs; a batch is padded to one
    most_padding: float = 0.5  # the share of a batch that may be padding, where that can be chosen


class Refused(Exception):
    """Why rows were not admitted.

    reason: ``queue_full``, ``key_full``, ``too_large`` or ``draining``.
    """

    def __init__(self, reason: str, sentence: str):
        super().__init__(sentence)
        self.reason, self.sentence = reason, sentence


@dataclass(eq=False, slots=True)
class Row(Generic[T]):
    """One row that waits.

    version: rows of different versions take different slots.
    deadline: of the queue's clock; a row is not given out after it.
    """

    item: T
    key: str
    lane: Hashable
    cost: int
    version: Hashable = None
    deadline: float = math.inf
    sequence: int = -1  # the number of its arrival; -1: it does not wait


@dataclass(slots=True)
class _Account:
    """What a key has waiting, by lane and cost, and how much it was served."""

    served: float
    groups: dict[tuple[Hashable, int], OrderedDict[int, Row]] = field(default_factory=dict)
    rows: int = 0

    def oldest(self) -> Row:
        return min((first(group) for group in self.groups.values()), key=lambda r: r.sequence)


def first(group: OrderedDict[int, Row]) -> Row:
    """The row of a group that came first."""
    return next(iter(group.values()))


class Cut(NamedTuple):
    """A batch, and the rows that were found to be past their deadlines."""

    rows: list[Row]
    late: list[Row]


class FairQueue(Generic[T]):
    """A bounded queue of rows."""

    def __init__(self, limits: Limits = Limits()):
        self.limits = limits
        self.tokens = 0  # of all rows that wait
        self._arrivals = itertools.count()
        self._accounts: dict[str, _Account] = {}
        self._debts: dict[str, float] = {}  # served, of keys with nothing waiting
        self._now = 0.0  # served, of the key whose turn it was last
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def waiting(self, key: str) -> int:
        """The rows of a key that wait."""
        account = self._accounts.get(key)
        return 0 if account is None else account.rows

    def admit(self, rows: Sequence[Row[T]], key_rows: int | None = None) -> None:
        """Let all rows wait, or none.

        Args:
            rows: of one request, hence of one key.
            key_rows: how many rows of this key may wait; None: as many as the queue holds.

        Raises:
            Refused: and nothing was admitted.
        """
        most = self.limits.batch_tokens
        for row in rows:
            if row.cost > most:
                raise Refused(
                    "too_large",
                    f"An input needs {row.cost} tokens with its padding, and a batch holds {most}; "
                    "send shorter inputs.",
                )
        if key_rows is not None and self._of_key(rows) + len(rows) > key_rows:
            raise Refused(
                "key_full",
                f"The key may have {key_rows} rows waiting; wait for answers, or send fewer rows.",
            )
        if self._rows + len(rows) > self.limits.queued_rows:
            raise Refused(
                "queue_full",
                f"{self._rows} rows are waiting of at most {self.limits.queued_rows}; try again "
                "later.",
            )
        for row in rows:
            self._put(row)

    def _of_key(self, rows: Sequence[Row[T]]) -> int:
        return self.waiting(rows[0].key) if rows else 0

    def _put(self, row: Row[T]) -> None:
        account = self._accounts.get(row.key)
        if account is None:
            served = max(self._debts.pop(row.key, 0.0), self._now)
            account = self._accounts[row.key] = _Account(served)
        row.sequence = next(self._arrivals)
        group = account.groups.setdefault((row.lane, row.cost), OrderedDict())
        group[row.sequence] = row
        account.rows += 1
        self._rows += 1
        self.tokens += row.cost

    def discard(self, row: Row[T]) -> bool:
        """Take a row out. False: it does not wait here any more."""
        account = self._accounts.get(row.key)
        place = (row.lane, row.cost)
        group = None if account is None else account.groups.get(place)
        if account is None or group is None or group.pop(row.sequence, None) is None:
            return False
        if not group:
            del account.groups[place]
        account.rows -= 1
        self._rows -= 1
        self.tokens -= row.cost
        if not account.rows:
            del self._accounts[row.key]
            self._debts[row.key] = account.served
        return True

    def cut(
        self,
        now: float,
        may_run: Callable[[Hashable], bool] = lambda lane: True,
        room: int = sys.maxsize,
    ) -> Cut:
        """Take out the rows of the next batch; none if nothing may run.

        Args:
            now: rows with earlier deadlines are taken out as late.
            may_run: whether a batch of a lane may run now.
            room: different versions that a batch may have, beside ``limits.batch_versions``.
        """
        late: list[Row] = []
        while True:
            anchor = self._anchor(may_run)
            if anchor is None:
                return Cut([], late)
            if anchor.deadline >= now:
                break
            self.discard(anchor)
            late.append(anchor)
        account = self._accounts[anchor.key]
        self._now = max(self._now, account.served)
        rows = self._filled(anchor, now, min(room, self.limits.batch_versions))
        for row in rows:
            self._accounts[row.key].served += row.cost
            self.discard(row)
        self._forget_debts()
        return Cut(rows, late)

    def _anchor(self, may_run: Callable[[Hashable], bool]) -> Row | None:
        """The row that must be in the next batch."""
        turns = sorted(
            (account.served, account.oldest().sequence, account)
            for account in self._accounts.values()
        )
        for _, _, account in turns:
            able = [first(g) for (lane, _), g in account.groups.items() if may_run(lane)]
            if able:
                return min(able, key=lambda row: row.sequence)
        return None

    def _filled(self, anchor: Row, now: float, most_versions: int) -> list[Row]:
        """The anchor and the rows that go with it, as many as their padding is worth."""
        limits = self.limits
        rows, versions = [anchor], {anchor.version}
        widest, tokens = anchor.cost, anchor.cost
        beside = itertools.islice(self._beside(anchor), 4 * limits.batch_rows)
        for row in beside:
            if len(rows) == limits.batch_rows:
                break
            if row is anchor or row.deadline < now:
                continue
            if row.version not in versions and len(versions) >= most_versions:
                continue
            width = max(widest, row.cost)
            padded = width * (len(rows) + 1)
            if padded > limits.batch_tokens:
                continue
            if tokens + row.cost < (1 - limits.most_padding) * padded:
                continue
            rows.append(row)
            versions.add(row.version)
            widest, tokens = width, tokens + row.cost
        return rows[: self._worth(len(rows))]

    def _worth(self, count: int) -> int:
        """How many rows to run now: a few beyond a compiled size would be mostly padding."""
        limits = self.limits
        above = min((size for size in limits.row_sizes if size >= count), default=count)
        below = max((size for size in limits.row_sizes if size <= count), default=count)
        return count if count >= (1 - limits.most_padding) * above else below

    def _beside(self, anchor: Row) -> Iterator[Row]:
        """Rows of the anchor's lane: of its width first, then narrower ones, then wider ones.

        Of one width, those first whose key was served least, if all before them were taken.
        """
        lane = anchor.lane
        costs = {c for a in self._accounts.values() for (l, c) in a.groups if l == lane}
        for cost in sorted(costs, key=lambda cost: (cost > anchor.cost, abs(cost - anchor.cost))):
            groups = (
                (account.served, account.groups[lane, cost])
                for account in self._accounts.values()
                if (lane, cost) in account.groups
            )
            turns = (
                [(served + turn * cost, row.sequence, row) for turn, row in enumerate(each)]
                for served, group in groups
                for each in [itertools.islice(group.values(), 4 * self.limits.batch_rows)]
            )
            for _, _, row in heapq.merge(*turns):
                yield row

    def _forget_debts(self) -> None:
        if len(self._debts) > 1000:
            self._debts = {k: served for k, served in self._debts.items() if served > self._now}
