"""Signals that end a run where it can go on, and the lock that keeps a second run away."""

import contextlib
import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from jaxprompt.config import UserError

LOCK = "lock"


class Interrupted(Exception):
    """A signal asked the run to end; its message says how to go on. Nothing that counts is lost."""


class Signals:
    """Turns SIGTERM and SIGINT into ``Interrupted``, at a moment that suits; a context manager.

    A signal raises at once, but within ``held`` it waits until ``check``: an update and its
    checkpoint are never torn apart. The second signal of a held run is not waited for: it is a
    KeyboardInterrupt, which saves nothing.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, install: bool = True):
        self._install, self._held, self._came = install, False, ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if self._install:
            self._before = {n: signal.signal(n, self._handle) for n in self.NUMBERS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if self._held and self._came:
            raise KeyboardInterrupt(name)  # in the middle of a step: there is nothing to save
        self._came = name
        if not self._held:
            raise Interrupted(f"stopped by {name}")

    def check(self, step: int | None = None) -> None:
        """Raise what came while it was held; with a ``step``, at the same one in all processes."""
        if self._came:
            raise Interrupted(f"stopped by {self._came}")
        if step is not None and jax.process_count() > 1:
            from jax.experimental import multihost_utils

            # JAX's runtime hears SIGTERM in any process and agrees upon a step
            if multihost_utils.reached_preemption_sync_point(step):
                raise Interrupted("stopped by SIGTERM")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within it, the first signal waits for ``check``."""
        with self._set(True):
            yield

    @contextlib.contextmanager
    def free(self) -> Iterator[None]:
        """A long part of what is held, after which nothing is torn: a signal raises at once."""
        self.check()
        with self._set(False):
            yield

    @contextlib.contextmanager
    def _set(self, held: bool) -> Iterator[None]:
        before, self._held = self._held, held
        try:
            yield
        finally:
            self._held = before


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process at a time works in ``folder``; a second is refused with a UserError.

    The kernel drops the lock with the process, however that ends.
    """
    path = folder / LOCK
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                raise FileNotFoundError  # its owner has just taken it away
        except (BlockingIOError, FileNotFoundError):
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise UserError(
                f"{owner} is at work in {str(folder)!r}; wait for its end, or choose another "
                "output."
            ) from None
        except OSError:  # a file system without locks: nothing can be promised
            yield
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
