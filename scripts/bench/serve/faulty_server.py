"""``jaxprompt`` whose store and device fail when somebody asks for it; faults.py runs it.

Files in the folder FAULTS say what goes wrong, for as long as they are there: ``slow-store`` (its
reads and listings wait), ``no-store`` (they fail), ``device`` (every batch raises an error),
``device-once`` (one does) and ``clock`` (the wall clock is a day later).
"""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxprompt.runtime.compilation import keep_compiled

keep_compiled()  # before JAX is imported, as the command does it

from jaxprompt.cli.app import main  # noqa: E402
from jaxprompt.serving import store  # noqa: E402
from jaxprompt.serving.compute import Compute  # noqa: E402

FAULTS = Path(os.environ["FAULTS"])


def is_on(name: str) -> bool:
    return (FAULTS / name).exists()


def failing_store(function: Callable) -> Callable:
    """The function with the error that a disk, or a network file system, makes it meet."""

    def call(*arguments: Any) -> Any:
        while is_on("slow-store"):
            time.sleep(0.05)
        if is_on("no-store"):
            raise OSError(errno.EIO, "Input/output error")
        return function(*arguments)

    return call


def failing_device(method: Callable) -> Callable:
    def call(*arguments: Any) -> Any:
        if is_on("device-once"):
            (FAULTS / "device-once").unlink()
            raise RuntimeError("the device failed once")
        if is_on("device"):
            raise RuntimeError("the device failed")
        return method(*arguments)

    return call


def jumping_clock(clock: Callable[[], float]) -> Callable[[], float]:
    return lambda: clock() + 86_400 * is_on("clock")


store._folders = failing_store(store._folders)
store._read_all = failing_store(store._read_all)
Compute.run = failing_device(Compute.run)
time.time = jumping_clock(time.time)

if __name__ == "__main__":
    main()
