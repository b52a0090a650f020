"""The batcher: one thread that computes, and the rows that wait for it.

Requests come from an event loop and answers go back to it: ``post`` hands a function over, once a
batch. Between two chunks of a generation the thread runs the other batches that wait, so that no
long answer holds up a short one. There is no delay: a batch starts when the device is free, with
what has come meanwhile.
"""

import functools
import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from jaxprompt.config.errors import UserError
from jaxprompt.serving.fair_queue import FairQueue, Limits, Refused, Row
from jaxprompt.serving.work import Chunk, Engine, Failed, Outcome, Work

log = logging.getLogger(__name__)

State = Literal["warming", "ready", "draining", "stopped", "failed"]
Post = Callable[[Callable[[], None]], object]
R = TypeVar("R")


class Late(Failed):
    """The row's deadline passed before the device was free."""


class Broken(Failed):
    """The device raised an error, or the server ended."""


class Answer(NamedTuple):
    """An outcome of one row, and the seconds that it waited and that its batch was computed.

    A row that is generated has one answer for each chunk.
    """

    number: int  # of the row in its request
    outcome: Outcome
    queued: float
    device: float

    @property
    def last(self) -> bool:
        """Whether the row has no further answer."""
        return not isinstance(self.outcome, Chunk) or self.outcome.finish is not None


class BatchFacts(NamedTuple):
    """What a batch was, for the metrics."""

    kind: str
    rows: int
    versions: int
    tokens: int  # of the rows, each padded as if it were alone
    padded: int  # of the whole batch
    seconds: float


@dataclass(eq=False)
class Ticket:
    """The rows of one request. ``deliver`` is called where ``post`` runs functions."""

    works: Sequence[Work]
    deliver: Callable[[Answer], None]
    key: str = ""
    key_rows: int | None = None  # rows of this key that may wait; None: as many as the queue holds
    admitted: float = 0.0
    rows: Sequence[Row["_Part"]] = ()


class _Part(NamedTuple):
    """A row of a ticket."""

    ticket: Ticket
    number: int
    work: Work


@dataclass(eq=False)
class _Generation:
    """Rows that are generated together. Rows that have ended are no longer ``open``."""

    chunks: Iterator[Sequence[Chunk | Failed | None]]
    rows: list[Row[_Part]]
    open: set[int]
    started: float


class _Event(NamedTuple):
    ticket: Ticket
    answer: Answer


def _deliver(events: Sequence[_Event]) -> None:
    for event in events:
        try:
            event.ticket.deliver(event.answer)
        except Exception:  # one request must not take the answers of others with it
            log.exception("an answer could not be delivered")


class Batcher:
    """Rows in, answers out.

    Args:
        engine: computes; only this object's thread calls ``run`` and ``generate``.
        post: hands a function to the thread that ``Ticket.deliver`` belongs to, in order, such as
            ``loop.call_soon_threadsafe``.
        limits: of the queue and of batches.
        warm: is called by the thread before it is ready.
        observe: is called in the thread with the facts of each batch.
        ended: is posted when the thread has ended.
        room: how many different versions a batch may have now.
    """

    most_generating = 4  # batches of generation at a time
    patience = 3  # failures of the device, one after another, after which the batcher gives up

    def __init__(
        self,
        engine: Engine,
        post: Post,
        limits: Limits = Limits(),
        *,
        warm: Callable[[], None] = lambda: None,
        observe: Callable[[BatchFacts], None] = lambda facts: None,
        ended: Callable[[], None] = lambda: None,
        room: Callable[[], int] = lambda: sys.maxsize,
    ):
        self.state: State = "warming"
        self.busy_since: float | None = None  # by time.monotonic(): the batch that is computed
        self._engine, self._post = engine, post
        self._warm, self._observe, self._ended, self._room = warm, observe, ended, room
        self._queue: FairQueue[_Part] = FairQueue(limits)
        self._wake = threading.Condition()
        self._generating: deque[_Generation] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._failures = 0
        self._rate = 0.0  # tokens a second, lately
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread's end. False: it goes on."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return len(self._queue)

    def retry_after(self) -> int:
        """Seconds after which the queue of now will be empty: from 1 to 30."""
        seconds = self._queue.tokens / self._rate if self._rate else 1.0
        return min(max(math.ceil(seconds), 1), 30)

    def submit(self, ticket: Ticket) -> None:
        """Let all rows of a request wait, or none.

        Raises:
            Refused: and none waits. ``reason`` may also be ``not_ready`` and ``draining``.
        """
        now = time.monotonic()
        ticket.admitted = now
        ticket.rows = [self._row(ticket, number) for number in range(len(ticket.works))]
        with self._wake:
            if self.state == "warming":
                raise Refused("not_ready", "The server compiles its programs; try again later.")
            if self.state != "ready":
                raise Refused("draining", "The server ends; ask another one.")
            self._queue.admit(ticket.rows, ticket.key_rows)
            self._wake.notify()

    def _row(self, ticket: Ticket, number: int) -> Row[_Part]:
        work = ticket.works[number]
        return Row(
            _Part(ticket, number, work),
            ticket.key,
            self._engine.lane(work),
            self._engine.cost(work),
            work.version,
            math.inf if work.deadline is None else work.deadline,
        )

    def cancel(self, ticket: Ticket) -> int:
        """Nobody waits for a request any more. Rows that wait are dropped, and counted.

        What is computed already ends with its batch, or with its next chunk.
        """
        for work in ticket.works:
            work.cancelled = True
        with self._wake:
            return sum(self._queue.discard(row) for row in ticket.rows)

    def drain(self) -> None:
        """Admit no more rows. The thread ends when it has answered those that it has."""
        with self._wake:
            if self.state in ("warming", "ready"):
                self.state = "draining"
            self._wake.notify()

    def call(self, function: Callable[[], R]) -> Future[R]:
        """Run a function in the thread, between two batches: what only that thread may touch."""
        future: Future[R] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._wake:
            if self.state in ("stopped", "failed"):
                future.set_exception(UserError("The server ends; ask another one."))
            else:
                self._calls.append(run)
                self._wake.notify()
        return future

    # what follows runs in the thread

    def _work(self) -> None:
        try:
            self._warm()
            with self._wake:
                if self.state == "warming":
                    self.state = "ready"
            while self.state != "failed":
                turn = self._next()
                if turn is None:
                    break
                self._turn(*turn)
        except BaseException:
            log.exception("the compute thread ended")
            self.state = "failed"
        self._end()

    def _end(self) -> None:
        """Rows that are left get an answer, too."""
        with self._wake:
            self.state = "failed" if self.state == "failed" else "stopped"
            left = [row for g in self._generating for row in _open_rows(g)]
            self._generating.clear()
            while (cut := self._queue.cut(-math.inf)).rows:
                left += cut.rows
            calls = list(self._calls)
        for call in calls:
            call()
        self._send([_event(row, Broken("The server ended; ask another one.")) for row in left])
        self._post(self._ended)

    def _may_run(self, lane: Hashable) -> bool:
        return not _generates(lane) or len(self._generating) < self.most_generating

    def _next(self) -> tuple[list[Row[_Part]], list[Row[_Part]]] | None:
        """The rows of the next batch and late ones, waiting for them; None: there will be none."""
        with self._wake:
            while True:
                while self._calls:
                    self._calls.popleft()()
                cut = self._queue.cut(time.monotonic(), self._may_run, self._room())
                if cut.rows or cut.late or self._generating:
                    return cut.rows, cut.late
                if self.state != "ready":
                    return None
                self._wake.wait()

    def _turn(self, rows: list[Row[_Part]], late: list[Row[_Part]]) -> None:
        """One batch, and one chunk of one generation."""
        self._send([_event(row, Late("The deadline passed in the queue.")) for row in late])
        rows = [row for row in rows if not row.item.work.cancelled]
        if rows and _generates(rows[0].lane):
            self._begin(rows)
        elif rows:
            self._answer(rows)
        if self._generating:
            self._advance(self._generating.popleft())

    def _answer(self, rows: list[Row[_Part]]) -> None:
        started = time.monotonic()
        outcomes = self._computed(rows)
        seconds = time.monotonic() - started
        self._send([
            _event(row, outcome, started - row.item.ticket.admitted, seconds)
            for row, outcome in zip(rows, outcomes, strict=True)
        ])  # fmt: skip
        self._note(rows, seconds)

    def _computed(self, rows: list[Row[_Part]]) -> Sequence[Outcome]:
        """The outcomes of rows. Where a batch fails, each row is tried once alone."""
        together = self._tried(rows)
        if not isinstance(together, Failed):
            self._count(sound=True)
            return together
        outcomes: list[Outcome] = []
        for row in rows if len(rows) > 1 else ():
            alone = self._tried([row])
            outcomes += [alone] if isinstance(alone, Failed) else alone
        outcomes = outcomes or [together]
        self._count(any(not isinstance(outcome, Broken) for outcome in outcomes))
        return outcomes

    def _tried(self, rows: list[Row[_Part]]) -> Sequence[Outcome] | Failed:
        """The outcomes of rows, or why there are none."""
        try:
            outcomes = self._watched(lambda: self._engine.run([row.item.work for row in rows]))
            if len(outcomes) != len(rows):
                raise RuntimeError(f"{len(rows)} rows gave {len(outcomes)} outcomes")
            return outcomes
        except Exception as error:
            return _explained(error, len(rows))

    def _watched(self, compute: Callable[[], R]) -> R:
        """What the device computes; ``busy_since`` tells others since when it does."""
        self.busy_since = time.monotonic()
        try:
            return compute()
        finally:
            self.busy_since = None

    def _count(self, sound: bool) -> None:
        """Give up after some batches, one after another, of which no row had an answer."""
        self._failures = 0 if sound else self._failures + 1
        if self._failures >= self.patience:
            log.error("%d batches failed one after another: the server ends", self._failures)
            self.state = "failed"

    def _begin(self, rows: list[Row[_Part]]) -> None:
        chunks = self._engine.generate([row.item.work for row in rows])
        numbers = set(range(len(rows)))
        self._generating.append(_Generation(chunks, rows, numbers, time.monotonic()))

    def _advance(self, generation: _Generation) -> None:
        """Deliver the next chunks; a generation that goes on gets its next turn after others."""
        rows, started = generation.rows, time.monotonic()
        try:
            chunks = self._watched(lambda: next(generation.chunks, None))
            if chunks is None:
                raise RuntimeError("a generation ended before its rows did")
        except Exception as error:
            chunks = [_explained(error, len(rows))] * len(rows)
        self._count(any(not isinstance(chunk, Broken) for chunk in chunks))
        seconds = time.monotonic() - started
        events = []
        for at, chunk in enumerate(chunks):
            if chunk is not None and at in generation.open:
                queued = generation.started - rows[at].item.ticket.admitted
                events.append(_event(rows[at], chunk, queued, seconds))
                if events[-1].answer.last:
                    generation.open.discard(at)
        self._send(events)
        self._note(rows, seconds)
        if generation.open:
            self._generating.append(generation)

    def _note(self, rows: list[Row[_Part]], seconds: float) -> None:
        tokens = sum(row.cost for row in rows)
        padded = len(rows) * max(row.cost for row in rows)
        versions = len({id(row.version) for row in rows})
        if seconds > 0 and not _generates(rows[0].lane):
            rate = tokens / seconds
            self._rate = 0.8 * self._rate + 0.2 * rate if self._rate else rate
        kind = rows[0].item.work.kind
        self._observe(BatchFacts(kind, len(rows), versions, tokens, padded, seconds))

    def _send(self, events: list[_Event]) -> None:
        if events:
            self._post(functools.partial(_deliver, events))


def _generates(lane: Hashable) -> bool:
    return isinstance(lane, tuple) and lane[0] == "generate"


def _explained(error: Exception, rows: int) -> Failed:
    """What rows are told whose computation raised an error."""
    if isinstance(error, UserError):
        return Failed(str(error))
    log.error("a batch of %d rows failed", rows, exc_info=error)
    return Broken("The device failed; the log of the server says how.")


def _open_rows(generation: _Generation) -> list[Row[_Part]]:
    return [generation.rows[at] for at in sorted(generation.open)]


def _event(row: Row[_Part], outcome: Outcome, queued: float = 0.0, device: float = 0.0) -> _Event:
    ticket, number, _ = row.item
    return _Event(ticket, Answer(number, outcome, queued, device))
