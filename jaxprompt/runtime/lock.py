"""The lock that keeps a second process out of a folder.

``filelock`` does less: it names no owner, accepts a hard link to a file of somebody's, leaves the
lock file behind, and falls back to a lock that outlives a killed process where a file system has
none. Working around each of these would take more lines than the ``flock`` here.
"""

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jaxprompt.config.errors import UserError

LOCK = "lock"


def _open_lock(path: Path) -> IO[str]:
    """Open the lock file. Raises UserError for a link: what it names must not be written to."""
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR):
            raise
    else:
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
            return file
        file.close()
    raise UserError(
        f"{str(path)!r} is no file of its own but a link or the like; remove it, or choose another "
        "output."
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let only one process at a time work in ``folder``.

    The kernel drops the lock with the process, however that ends, so no stale file blocks anyone.
    On a file system without locks nothing is locked.

    Raises:
        UserError: Another process is at work there.
    """
    path = folder / LOCK
    with _open_lock(path) as file:
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
