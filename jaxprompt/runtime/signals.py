"""Signals that end a run where it can go on."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import TypeAlias

import jax

# what the signal module takes and gives
Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None


class Interrupted(Exception):
    """A signal asked the run to end; its message says how to go on. Nothing that counts is lost."""


class Signals:
    """Turns SIGTERM and SIGINT into ``Interrupted``, at a moment that suits; a context manager.

    A signal raises at once, but within ``held`` it waits until ``check``: an update and its
    checkpoint are never torn apart. A second signal within ``held`` raises KeyboardInterrupt, and
    nothing is saved. Some callbacks swallow exceptions, such as those of the garbage collector, so
    the exception is raised again until the block ends.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)
    RESEND_SECONDS = 1.0  # seconds after which it is raised anew

    def __init__(self, install: bool = True):
        self._install, self._held, self._came = install, False, ""
        self._before: dict[int, Handler] = {}
        self._over, self._again, self._sending = threading.Event(), False, threading.Lock()

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
        self._held, self._before, before = True, {}, self._before
        with self._sending:  # no reminder may reach the old handlers, which end the process
            self._over.set()
        for number, handler in before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, again, self._again = signal.Signals(number).name, self._again, False
        if self._held and self._came and not again:
            raise KeyboardInterrupt(name)  # in the middle of a step: there is nothing to save
        if not self._came:
            threading.Thread(target=self._remind, args=(number,), daemon=True).start()
            self._came = name
        if not self._held:
            raise Interrupted(f"stopped by {self._came}")

    def _remind(self, number: int) -> None:
        while not self._over.wait(self.RESEND_SECONDS):
            with self._sending:
                if not self._held and not self._over.is_set():
                    self._again = True
                    signal.pthread_kill(threading.main_thread().ident or 0, number)

    def check(self, step: int | None = None) -> None:
        """Raise ``Interrupted`` if a signal came; with ``step``, in all processes at that step."""
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
    def interruptible(self) -> Iterator[None]:
        """A long part of ``held`` that leaves nothing half done: a signal in it raises at once."""
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
