"""Files are written whole or not at all, and never replace somebody else's data.

Temporary names are new each time and are created exclusively, so that nobody's file or link is
followed by accident; modes follow the umask, or what is replaced.
"""

import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

from jaxprompt.config.errors import UserError

Write = Callable[[IO[bytes]], object]

# names of what is being written, or kept aside for a while
PART = re.compile(r"\..*(-[0-9a-f]{12}|@[0-9]+)(\.part)?")
# tensor files, of which a new version may have fewer. Group 1: the common part of their names
_SHARD = re.compile(r"([\w.-]+?)(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index\.json)?")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content. A crash leaves the old or the new content, never a part.

    Where ``path`` is a symbolic link, the link's target is replaced.
    """
    # half of a surrogate pair has no UTF-8 form: it is written as an escape, so nothing is lost
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    write_whole(path, lambda file: file.write(data))


def write_whole(path: Path, write: Write) -> None:
    """Let ``write`` fill a new file and put it at ``path``; an error leaves the old one."""
    place = _target(path)
    part = _beside(place)
    try:
        with part.open("xb") as file:
            write(file)
        with suppress(OSError):
            status = place.stat()
            os.chown(part, status.st_uid, status.st_gid)
            part.chmod(stat.S_IMODE(status.st_mode))
        os.replace(part, place)
    finally:
        part.unlink(missing_ok=True)


def check_output(path: Path, inputs: Iterable[Path | str] = ()) -> int | None:
    """Refuse an output that cannot be written before any work is done.

    Args:
        path: A file, or a device, FIFO or open descriptor (``/dev/stdout``, ``/dev/fd/3``).
        inputs: Files that are still needed, so that none of them may be the output.

    Returns:
        The descriptor of a FIFO, which stays open so that its reader waits; for ``write_output``.
    """
    try:
        return _check_output(path, inputs)
    except (OSError, ValueError) as error:  # a loop of links; a NUL in the name
        if isinstance(error, UserError):
            raise
        raise _unwritable(path, getattr(error, "strerror", None) or str(error)) from None


def _check_output(path: Path, inputs: Iterable[Path | str]) -> int | None:
    descriptor = _descriptor(path)
    try:
        status = os.stat(path) if descriptor is None else os.fstat(descriptor)
    except FileNotFoundError:
        folder = _target(path).parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise _unwritable(path) from None
        return None
    same = [p for p in inputs if os.path.exists(p) and os.path.samestat(os.stat(p), status)]
    if same and stat.S_ISREG(status.st_mode):
        raise UserError(
            f"{_shown(path)} is {_shown(same[0])} itself, which is needed to make it; name another "
            "output."
        )
    if descriptor is not None:
        return None
    kinds = (stat.S_ISREG, stat.S_ISCHR, stat.S_ISFIFO)
    if not any(kind(status.st_mode) for kind in kinds) or not os.access(path, os.W_OK):
        raise _unwritable(path)
    return _open_fifo(path) if stat.S_ISFIFO(status.st_mode) else None


def _open_fifo(path: Path) -> int:
    try:  # a shell would wait for a reader, perhaps for ever
        held = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise UserError(
            f"{_shown(path)} is a FIFO that nobody reads; start its reader first."
        ) from None
    os.set_blocking(held, True)
    return held


def write_output(path: Path, write: Write, held: int | None = None) -> None:
    """Write a file as a shell's ``>`` would: through links, into devices and FIFOs.

    A regular file is replaced as a whole. held: what ``check_output`` returned.
    """
    descriptor = _descriptor(path)
    if descriptor is not None:
        sys.stdout.flush()
        held = os.dup(descriptor)
    if held is not None:
        with os.fdopen(held, "wb") as file:
            write(file)
        return
    place = _target(path)
    if _in_place(place):
        with place.open("wb") as file:
            write(file)
    else:
        write_whole(place, write)


def _in_place(place: Path) -> bool:
    """Whether a file must be written in place: it is a device, or has several names."""
    try:
        status = place.stat()
    except FileNotFoundError:
        return False
    alone = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    return not alone or not os.access(place.parent, os.W_OK)


def _descriptor(path: Path) -> int | None:
    """The open descriptor that a path names, such as 1 for ``/dev/stdout``; else None."""
    for _ in range(40):
        text = os.path.normpath(os.path.abspath(path))
        if text in ("/dev/stdout", "/dev/stderr"):
            return 1 if text.endswith("out") else 2
        match = re.fullmatch(rf"(?:/dev/fd|/proc/(?:self|{os.getpid()})/fd)/(\d{{1,9}})", text)
        if match:
            return int(match[1])
        if not os.path.islink(text):
            return None
        path = Path(os.path.dirname(text), os.readlink(text))
    return None


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _beside(path: Path, ending: str = ".part") -> Path:
    """A new hidden name beside ``path``."""
    return path.with_name(f".{path.name[:40]}-{secrets.token_hex(6)}{ending}")


def replace_directory(
    path: Path, write: Callable[[Path], None], ours: Callable[[Path], bool] = lambda folder: True
) -> None:
    """Let ``write`` fill a new directory and put it at ``path``; an error leaves the old one.

    An old directory is replaced only where ``ours(path)`` says that this program made it, and then
    file by file: other files in it stay. Where ``path`` is a symbolic link, the link's target is
    replaced.

    It takes two renames, because no portable call exchanges two directories. A kill between them
    can leave the old directory beside its place, under a name that begins with a dot and ends in
    ``-old``.

    Raises:
        UserError: ``path`` is a file, or a directory that holds other things; nothing is written.
    """
    place = check_replaceable(path, ours)
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = _beside(place, "")
    old = fresh.with_name(fresh.name + "-old")
    fresh.mkdir()
    try:
        write(fresh)
        _swap(fresh, place, old)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_replaceable(path: Path, ours: Callable[[Path], bool]) -> Path:
    """Where ``replace_directory`` would write.

    Raises:
        UserError: it would write nothing, see there.
    """
    place = _target(path)
    if place.exists() and not place.is_dir():
        raise UserError(f"{_shown(path)} is a file and a directory is to be written; name another.")
    if place.is_dir() and any(place.iterdir()) and not ours(place):
        some = sorted(entry.name for entry in place.iterdir())
        more = ", ..." if len(some) > 3 else ""
        raise UserError(
            f"{_shown(path)} holds other things ({_shown(', '.join(some[:3]))[1:-1]}{more}), which "
            "would be lost; name a new or an empty directory."
        )
    return place


def _swap(fresh: Path, place: Path, old: Path) -> None:
    written = {entry.name for entry in fresh.iterdir()}
    stems = _stems(written)
    if place.exists():
        with suppress(OSError):
            fresh.chmod(stat.S_IMODE(place.stat().st_mode))
        os.replace(place, old)
    try:
        os.replace(fresh, place)
    except OSError:
        if old.exists():
            os.replace(old, place)
        raise
    if not old.exists():
        return
    for entry in sorted(old.iterdir()):
        stale = entry.name in written or _stems([entry.name]) & stems  # or an old shard of these
        if stale and not _folder(entry):
            entry.unlink()
        elif not os.path.lexists(place / entry.name):
            os.replace(entry, place / entry.name)
        elif _folder(entry) and _folder(place / entry.name):
            shutil.rmtree(entry)
    with suppress(OSError):  # what could not be moved stays where it is
        old.rmdir()


def _stems(names: Iterable[str]) -> set[str]:
    return {match[1] for match in map(_SHARD.fullmatch, names) if match}


def _folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _shown(path: Path | str) -> str:
    text = repr(str(path))
    return text if len(text) <= 400 else f"{text[:400]}...'"


def _unwritable(path: Path, reason: str = "") -> UserError:
    reason = f" ({reason})" if reason else ""
    return UserError(
        f"{_shown(path)} cannot be written{reason}; name a file in a directory that exists and may "
        "be written to."
    )
