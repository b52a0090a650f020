"""The process that listens: signals, the drain, and what its end means."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import NamedTuple

import uvicorn

from jaxprompt.config.errors import UserError
from jaxprompt.serving.batcher import Batcher
from jaxprompt.serving.http.app import make_app
from jaxprompt.serving.http.operations import hangs
from jaxprompt.serving.http.service import Service

log = logging.getLogger(__name__)

_LOOK_EVERY = 1.0  # seconds between two looks at a device that may hang


class Drain(NamedTuple):
    """How a server ends after a SIGTERM."""

    delay: float = 5.0  # seconds in which it still admits requests, and says that it is not ready
    timeout: float = 60.0  # seconds in which it answers what it has


class _Quiet(uvicorn.Server):
    """uvicorn without signal handlers of its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises UserError where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(
            f"The server cannot listen on {host} port {port} ({error.strerror}); name another "
            "--host or --port."
        ) from None
    return bound


def run(
    service: Service,
    make_batcher: Callable[[asyncio.AbstractEventLoop, Callable[[], None]], Batcher],
    bound: socket.socket,
    drain: Drain = Drain(),
) -> int:
    """Serve until a signal comes, or the device fails.

    Args:
        service: without its batcher.
        make_batcher: the batcher that posts to a loop; it calls the function when it has ended.
        bound: the socket.
        drain: how to end.

    Returns:
        0: a signal ended it, and every admitted request was answered. 1: the device failed, or
        requests were left.
    """
    return asyncio.run(_Process(service, bound, drain).serve(make_batcher))


class _Process:
    """A server and how it ends."""

    def __init__(self, service: Service, bound: socket.socket, drain: Drain):
        self._service, self._bound, self._drain = service, bound, drain
        config = uvicorn.Config(
            make_app(service), log_config=None, access_log=False, lifespan="off",
            server_header=False, timeout_keep_alive=5, limit_concurrency=4096,
            timeout_graceful_shutdown=10,
        )  # fmt: skip
        self._server = _Quiet(config)
        self._ended = asyncio.Event()
        self._ending: asyncio.Task | None = None
        self._code = 0

    async def serve(
        self, make_batcher: Callable[[asyncio.AbstractEventLoop, Callable[[], None]], Batcher]
    ) -> int:
        loop = asyncio.get_running_loop()
        batcher = self._service.batcher = make_batcher(loop, self._batcher_ended)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        batcher.start()
        watchdog = asyncio.create_task(self._watch())
        await self._server.serve([self._bound])
        watchdog.cancel()
        if self._ending is not None:
            self._ending.cancel()
        return self._code

    def _signalled(self, number: int) -> None:
        if self._ending is not None:
            log.warning("a second signal: the server ends now")
            self._code = 1
            self._server.force_exit = self._server.should_exit = True
            return
        delay = self._drain.delay if number == signal.SIGTERM else 0.0
        log.info("the server ends: it answers what it has")
        self._service.draining = True
        self._ending = asyncio.create_task(self._end(delay))

    async def _end(self, delay: float) -> None:
        batcher = self._service.batcher
        if batcher.state == "ready":
            await asyncio.sleep(delay)
        warming = batcher.state == "warming"
        batcher.drain()
        if not warming:  # nothing was admitted yet
            try:
                async with asyncio.timeout(self._drain.timeout):
                    await self._ended.wait()
            except TimeoutError:
                log.error("%d rows were not answered in time", batcher.waiting)
                self._code = 1
        self._server.should_exit = True

    def _batcher_ended(self) -> None:
        self._ended.set()
        if self._service.batcher.state == "failed":
            log.error("the device failed: the server ends")
            self._code = 1
            self._server.should_exit = True

    async def _watch(self) -> None:
        """A device that hangs ends the process: nothing else would."""
        while not hangs(self._service):
            await asyncio.sleep(_LOOK_EVERY)
        log.error("a batch does not end: the server ends")
        self._code = 1
        self._server.should_exit = True
