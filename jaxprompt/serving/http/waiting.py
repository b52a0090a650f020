"""How a request waits for its answers: until they come, its time is over, or its client goes."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence

from starlette.types import Receive

from jaxprompt.serving.batcher import Answer, Batcher, Ticket
from jaxprompt.serving.fair_queue import Refused
from jaxprompt.serving.http.errors import of_outcome, of_refused, too_late
from jaxprompt.serving.work import Failed, Work


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Pending:
    """The answers of one request, as they come. ``close`` drops what nobody waits for.

    Args:
        batcher: that computes them.
        works: one for each row.
        key, key_rows: whose they are, and how many rows of this key may wait.
        deadline: by ``time.monotonic``.
        request_id: for errors.
        note_dropped: hears how many rows were dropped in the queue because their client had gone.

    Raises:
        ApiError: the rows were not admitted.
    """

    def __init__(
        self,
        batcher: Batcher,
        works: Sequence[Work],
        *,
        key: str = "",
        key_rows: int | None = None,
        deadline: float,
        request_id: str = "",
        note_dropped: Callable[[int], None] = lambda rows: None,
    ):
        self.queued = 0.0  # seconds of the longest wait
        self._device = [0.0] * len(works)  # seconds of each row's batches; rows share batches
        self._batcher, self._deadline, self._request_id = batcher, deadline, request_id
        self._note_dropped, self._gone = note_dropped, False
        self._came: asyncio.Queue[Answer | None] = asyncio.Queue()
        self._open = set(range(len(works)))
        for work in works:
            work.key, work.deadline = key, deadline
        self._ticket = Ticket(works, self._came.put_nowait, key, key_rows)
        try:
            batcher.submit(self._ticket)
        except Refused as refused:
            raise of_refused(refused, batcher.retry_after()) from None

    async def answers(self) -> AsyncIterator[Answer]:
        """Answers in the order in which they come, until every row has its last one.

        Raises:
            ApiError: a row has failed, or the deadline has passed.
            ClientGone: see ``client_gone``.
        """
        while self._open:
            left = self._deadline - time.monotonic()
            try:
                async with asyncio.timeout(left):
                    answer = await self._came.get()
            except TimeoutError:
                raise too_late() from None
            if answer is None:
                raise ClientGone
            if answer.number not in self._open:  # see ``cancel``
                continue
            self.queued = max(self.queued, answer.queued)
            self._device[answer.number] += answer.device
            if isinstance(answer.outcome, Failed):
                param = f"inputs.{answer.number}"
                raise of_outcome(answer.outcome, param, self._request_id)
            if answer.last:
                self._open.discard(answer.number)
            yield answer

    @property
    def device(self) -> float:
        """Seconds in which the row that took longest was computed."""
        return max(self._device, default=0.0)

    def client_gone(self) -> None:
        """Let whoever waits for answers hear that nobody wants them."""
        self._gone = True
        self._came.put_nowait(None)

    def cancel(self, number: int) -> None:
        """One row needs no more chunks, and its answers are not waited for."""
        self._ticket.works[number].cancelled = True
        self._open.discard(number)

    def close(self) -> None:
        """Drop the rows that have no answer yet."""
        if self._open:
            dropped = self._batcher.cancel(self._ticket)
            if self._gone:
                self._note_dropped(dropped)


@contextlib.asynccontextmanager
async def watched(pending: Pending, receive: Receive) -> AsyncIterator[None]:
    """While inside, a client that goes away is noticed. Afterwards nothing is left to compute."""
    task = asyncio.create_task(_watch(pending, receive))
    try:
        yield
    finally:
        task.cancel()
        pending.close()


async def _watch(pending: Pending, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    pending.client_gone()
