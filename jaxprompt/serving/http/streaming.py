"""Server-sent events, with a sign of life where nothing comes, and an end where the client goes."""

import asyncio
import json
from collections.abc import AsyncIterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxprompt.config.values import Values

PING = b": ping\n\n"
_EVERY = 10.0  # seconds without an event after which the client hears that all is well


class EventStream(Response):
    """Values as events, and ``[DONE]`` after the last one.

    The iterator is closed when the client has gone.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[Values], headers: dict[str, str] | None = None):
        super().__init__(None, headers={"cache-control": "no-store"} | (headers or {}))
        self._events = events
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"type": "http.response.start", "status": self.status_code}
        await send({**head, "headers": self.raw_headers})
        coming: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=64)
        task = asyncio.create_task(self._produce(coming))
        try:
            while True:
                try:
                    async with asyncio.timeout(_EVERY):
                        event = await coming.get()
                except TimeoutError:
                    event = PING
                await send(
                    {"type": "http.response.body", "body": event or b"", "more_body": bool(event)}
                )
                if event is None:
                    break
            await task
        finally:
            task.cancel()

    async def _produce(self, coming: asyncio.Queue[bytes | None]) -> None:
        async for event in self._events:
            text = json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            await coming.put(b"data: " + text.encode("utf-8", "backslashreplace") + b"\n\n")
        await coming.put(b"data: [DONE]\n\n")
        await coming.put(None)
