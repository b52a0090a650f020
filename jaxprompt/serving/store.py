"""Where prompts are kept: a directory, a bucket, or a repository of the hub.

A store knows names and bytes. It has no opinion on what the bytes mean, so that anything that is
damaged or does not fit is found in one place, the catalogue. Every store can be changed behind the
server's back, and tells by a stamp of each prompt whether that happened.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast, runtime_checkable

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.paths import expanded
from jaxprompt.runtime.files import replace_directory
from jaxprompt.runtime.json_file import parse_json
from jaxprompt.serving.artefacts import CONFIGS, MAX_BYTES, NAMES, VALUES, Files, digest_of

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_PART = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")


class UnknownPrompt(UserError):
    """There is no prompt of this name, or of this version of the name."""


class ReadOnlyStore(UserError):
    """The store can be read and not written."""


class StoreUnavailable(UserError):
    """The store does not answer, or answers with an error of its own."""


def check_name(name: str) -> str:
    """The name of a prompt itself: ``name`` or ``tenant/name``. Raises UserError for any other.

    >>> check_name("acme/spam-v2")
    'acme/spam-v2'
    """
    parts = name.split("/") if isinstance(name, str) else []
    if not 1 <= len(parts) <= 2 or not all(map(_PART.fullmatch, parts)):
        raise UserError(
            f"{shown(name)} cannot be the name of a prompt; use small letters, digits, '.', '_' "
            "and '-', at most 64, first and last a letter or a digit; a tenant may stand before "
            "it, as in tenant/name."
        )
    return name


@runtime_checkable
class Store(Protocol):
    """Prompts by name. All methods may be called from several threads at once.

    Each may raise StoreUnavailable. A stamp is any text that changes when the content may have
    changed.
    """

    writable: bool
    interval: float  # seconds between two looks at what has changed

    def list(self) -> Mapping[str, str]:
        """The stamp of each prompt, by name. Nothing is read but what tells of a change."""
        ...

    def read(self, name: str, digest: str | None = None) -> Files:
        """The files of a prompt; with ``digest``, of that content. Raises UnknownPrompt."""
        ...

    def write(self, name: str, files: Files) -> str:
        """Put or replace a prompt as a whole; its stamp. Raises ReadOnlyStore."""
        ...

    def delete(self, name: str) -> None:
        """Remove a prompt and all its content. Raises UnknownPrompt and ReadOnlyStore."""
        ...


class Changes(NamedTuple):
    """What is different between two listings of a store."""

    changed: Mapping[str, str]  # the new stamp of each prompt that is new or different
    gone: frozenset[str]


def changes(store: Store, seen: Mapping[str, str]) -> Changes:
    """What has changed in a store since its prompts had the stamps ``seen``."""
    now = store.list()
    changed = {name: stamp for name, stamp in now.items() if seen.get(name) != stamp}
    return Changes(changed, frozenset(seen) - frozenset(now))


def open_store(place: str | Path) -> Store:
    """The store at a directory, a URL such as ``s3://bucket/prompts``, or ``hf://OWNER/NAME@REV``.

    Raises:
        UserError: the place cannot be a store.
    """
    text = str(place)
    if text.startswith("hf://"):
        from jaxprompt.serving.hub_store import HubStore  # asks the hub for the commit

        return HubStore(text.removeprefix("hf://"))
    if "://" in text:
        return ObjectStore(text)
    return DirectoryStore(Path(expanded(text)))


def _unknown(name: str, digest: str | None = None) -> UnknownPrompt:
    if digest is None:
        return UnknownPrompt(f"There is no prompt {shown(name)}.")
    return UnknownPrompt(f"The prompt {shown(name)} has no version sha256:{digest} any more.")


# ---- a directory


class DirectoryStore:
    """Folders of a directory, or folders of its folders, which are tenants.

    ``cp -r`` adds a prompt and ``rm -r`` removes one. Symbolic links are not followed, so that no
    name leads out of the directory. Folders whose names are no prompt's are left alone.
    """

    def __init__(self, root: Path, interval: float = 2.0) -> None:
        self.root = Path(os.path.realpath(root))
        self.interval = interval
        if not self.root.is_dir():
            raise UserError(f"There is no directory {shown(str(root))}; make it, or name another.")
        self.writable = os.access(self.root, os.W_OK)

    def list(self) -> Mapping[str, str]:
        stamps: dict[str, str] = {}
        for entry in _folders(self.root):
            stamp = _stamp(entry.path)
            if stamp is not None:
                stamps[entry.name] = stamp
                continue
            for inner in _folders(entry.path):
                if (stamp := _stamp(inner.path)) is not None:
                    stamps[f"{entry.name}/{inner.name}"] = stamp
        return stamps

    def read(self, name: str, digest: str | None = None) -> Files:
        check_name(name)
        return _read_whole(lambda: self._opened(name), name, digest)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """The folder's descriptor. It stays the same folder, whatever the name means later."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        opened = [os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)]
        try:
            for part in name.split("/"):
                opened.append(os.open(part, flags, dir_fd=opened[-1]))
            yield opened[-1]
        except NotADirectoryError:  # a file, or a link
            raise _unknown(name) from None
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise StoreUnavailable(
                f"The prompt {shown(name)} cannot be read: {error.strerror}."
            ) from None
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def write(self, name: str, files: Files) -> str:
        folder = self._folder(name)

        def write(fresh: Path) -> None:
            for file, content in files.items():
                (fresh / file).write_bytes(content)

        try:
            replace_directory(folder, write, lambda old: _stamp(old) is not None)
        except PermissionError as error:
            raise ReadOnlyStore(f"{shown(str(self.root))} cannot be written to: {error}.") from None
        except OSError as error:
            if isinstance(error, UserError):
                raise
            raise StoreUnavailable(
                f"The prompt {shown(name)} cannot be written: {error.strerror}."
            ) from None
        for stale in set(NAMES) - set(files):  # of an artefact of another kind
            (folder / stale).unlink(missing_ok=True)
        return _stamp(folder) or ""

    def delete(self, name: str) -> None:
        folder = self._folder(name)
        if _stamp(folder) is None:
            raise _unknown(name)
        try:
            # first what makes it a prompt, so that a kill leaves no half of one
            for file in NAMES:
                (folder / file).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other files in it stay, and so does a tenant's
                folder.rmdir()
                if folder.parent != self.root:
                    folder.parent.rmdir()
        except OSError as error:
            raise ReadOnlyStore(f"{shown(str(self.root))} cannot be written to: {error}.") from None

    def _folder(self, name: str) -> Path:
        """Where a prompt is written. Raises UserError where a link stands in the way."""
        folder = self.root
        for part in check_name(name).split("/"):
            folder = folder / part
            if folder.is_symlink():
                raise UserError(
                    f"{shown(str(folder))} is a symbolic link, which a store does not follow; "
                    "remove it, or use another name."
                )
        return folder


@contextlib.contextmanager
def _opened_folder(folder: Path) -> Iterator[int]:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield opened
    finally:
        os.close(opened)


def _read_whole(
    opened: Callable[[], contextlib.AbstractContextManager[int]], name: str, digest: str | None
) -> Files:
    """The files of a folder at one moment: one that changes meanwhile is read again.

    Raises:
        UnknownPrompt: it is not there, is never the same for long, or has another digest.
    """
    for tries in range(6):
        time.sleep(0.01 * tries)  # the two renames of a replacement take less
        with contextlib.suppress(FileNotFoundError), opened() as folder:
            before = _stamp(folder)
            files = _read_all(folder, name)
            if before is not None and before == _stamp(folder):
                if digest is not None and digest != digest_of(files):
                    raise _unknown(name, digest)
                return files
    raise _unknown(name)


def _folders(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """The folders in a folder whose names may be a prompt's or a tenant's."""
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except FileNotFoundError:  # it was removed meanwhile
        return
    except OSError as error:
        raise StoreUnavailable(f"{shown(str(folder))} cannot be listed: {error}.") from None
    for entry in found:
        if _PART.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            yield entry


def _stamp(folder: str | Path | int) -> str | None:
    """Sizes, times and inodes of the files of a prompt; None where a folder is no prompt."""
    at = folder if isinstance(folder, int) else None
    known: list[tuple[str, int, int, int]] = []
    for name in (*CONFIGS, *VALUES):
        try:
            place = name if at is not None else os.path.join(str(folder), name)
            status = os.stat(place, dir_fd=at, follow_symlinks=False)
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            known.append((name, status.st_size, status.st_mtime_ns, status.st_ino))
    if not {name for name, *_ in known} & set(CONFIGS):
        return None
    return hashlib.sha256(repr(known).encode()).hexdigest()[:32]


def _read_all(folder: int, name: str) -> dict[str, bytes]:
    """The files of a prompt. Raises UserError for links, and for more bytes than allowed."""
    files: dict[str, bytes] = {}
    left = MAX_BYTES
    for file in NAMES:
        try:
            opened = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(
                f"{name}: {file} cannot be read ({error.strerror}); it has to be a plain file."
            ) from None
        with open(opened, "rb") as content:
            status = os.fstat(opened)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{name}: {file} is no plain file.")
            left = _room(left, status.st_size, name)
            files[file] = content.read(status.st_size)
    return files


def _room(left: int, size: int, name: str) -> int:
    if size > left:
        raise UserError(f"{name} has more than {MAX_BYTES:,} bytes; a prompt may have that many.")
    return left - size


class PathStore:
    """Prompts that the command line names: a folder each, anywhere. They can only be read.

    A folder that is replaced, as a run does that is trained again, is noticed.
    """

    writable = False
    interval = 2.0

    def __init__(self, folders: Mapping[str, str | Path]) -> None:
        self._folders: dict[str, Path] = {}
        for name, folder in folders.items():
            path = Path(expanded(folder))
            if _stamp(path) is None:
                inner = path / "prompt"  # of a run
                hint = f"; did you mean {str(inner)!r}?" if _stamp(inner) else "."
                raise UserError(f"There is no prompt in the folder {shown(str(path))}{hint}")
            self._folders[check_name(name)] = Path(os.path.realpath(path))

    def list(self) -> Mapping[str, str]:
        stamps = {name: _stamp(folder) for name, folder in self._folders.items()}
        return {name: stamp for name, stamp in stamps.items() if stamp is not None}

    def read(self, name: str, digest: str | None = None) -> Files:
        if name not in self._folders:
            raise _unknown(name)
        return _read_whole(lambda: _opened_folder(self._folders[name]), name, digest)

    def write(self, name: str, files: Files) -> str:
        raise ReadOnlyStore(
            f"The prompt {shown(name)} was named when the server was started, and cannot be "
            "written or removed; start it with --library DIR and use a name of your own."
        )

    def delete(self, name: str) -> None:
        self.write(name, {})


# ---- a bucket

_FORMAT = 1


class ObjectStore:
    """Any file system of fsspec. What a name means is one object, so that a reader never sees half.

    ``names/NAME.json`` says which content is current. The content is in
    ``data/NAME/DIGEST/FILE``, is written before and never changes. Older contents stay until
    ``KEPT`` newer ones are there.
    """

    KEPT = 4

    def __init__(self, url: str, interval: float = 30.0) -> None:
        self.url, self.interval, self.writable = url, interval, True
        self._fs, root = _file_system(url)
        self._root = PurePosixPath(root)
        bucket = self._root.parts[0] if self._root.parts else ""
        with _asking(url):  # a list of a bucket that is not there is empty, and a write makes it
            if bucket != "/" and not self._fs.exists(bucket):
                raise UserError(
                    f"There is no bucket {shown(bucket)} of {shown(url)}; make it, or name another."
                )

    def _object(self, *parts: str) -> str:
        return str(self._root.joinpath(*parts))

    def list(self) -> Mapping[str, str]:
        with _asking(self.url):
            self._fs.invalidate_cache()
            found = cast(
                "dict[str, dict[str, object]]", self._fs.find(self._object("names"), detail=True)
            )
        stamps: dict[str, str] = {}
        for path, facts in found.items():
            text = str(path)
            name = text[text.rfind("/names/") + len("/names/") :].removesuffix(".json")
            if text.endswith(".json") and _is_name(name):
                known = repr(sorted((str(k), str(v)) for k, v in facts.items()))
                stamps[name] = hashlib.sha256(known.encode()).hexdigest()[:32]
        return stamps

    def _manifest(self, name: str) -> dict[str, dict[str, int]]:
        """Names and sizes of the files of each digest, the current one first."""
        path = self._object("names", f"{check_name(name)}.json")
        with _asking(self.url):
            try:
                content = self._fs.cat_file(path)
            except FileNotFoundError:
                raise _unknown(name) from None
        values = parse_json(content, path)
        contents = values.get("contents") if isinstance(values, dict) else None
        if not isinstance(contents, dict) or not contents or not all(map(_is_digest, contents)):
            raise UserError(f"{path} is damaged; write the prompt {shown(name)} again.")
        for files in contents.values():
            wrong = not isinstance(files, dict) or set(files) - set(NAMES)
            if wrong or not all(isinstance(size, int) for size in files.values()):
                raise UserError(f"{path} is damaged; write the prompt {shown(name)} again.")
        return contents

    def read(self, name: str, digest: str | None = None) -> Files:
        contents = self._manifest(name)
        wanted = next(iter(contents)) if digest is None else digest
        if wanted not in contents:
            raise _unknown(name, digest)
        left, files = MAX_BYTES, {}
        for file, size in contents[wanted].items():
            left = _room(left, size, name)
            with _asking(self.url):
                # one byte more than promised tells that the object is another
                path = self._object("data", name, wanted, file)
                files[file] = self._fs.cat_file(path, start=0, end=size + 1)
        if digest_of(files) != wanted:
            raise UserError(f"{name}: the content is not what its digest says; write it again.")
        return files

    def write(self, name: str, files: Files) -> str:
        digest = digest_of(files)
        try:
            older = self._manifest(check_name(name))
        except UnknownPrompt:
            older = {}
        sizes = {file: len(content) for file, content in files.items()}
        contents = {digest: sizes} | {d: s for d, s in older.items() if d != digest}
        kept = dict(list(contents.items())[: self.KEPT + 1])
        manifest = json.dumps({"format": _FORMAT, "contents": kept}, indent=1).encode()
        path = self._object("names", f"{name}.json")
        with _asking(self.url):
            for file, content in files.items():
                self._put(self._object("data", name, digest, file), content)
            self._put(path, manifest)
            for old in set(contents) - set(kept):
                self._fs.rm(self._object("data", name, old), recursive=True)
        return self.list().get(name, "")

    def _put(self, path: str, content: bytes) -> None:
        self._fs.makedirs(self._fs._parent(path), exist_ok=True)  # of a real file system
        self._fs.pipe_file(path, content)

    def delete(self, name: str) -> None:
        path = self._object("names", f"{check_name(name)}.json")
        with _asking(self.url):
            self._fs.invalidate_cache()
            if not self._fs.exists(path):
                raise _unknown(name)
            self._fs.rm_file(path)
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(self._object("data", name), recursive=True)


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except UserError:
        return False
    return True


def _is_digest(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def _file_system(url: str) -> "tuple[AbstractFileSystem, str]":
    try:
        import fsspec.core
    except ImportError:
        raise UserError(
            f"{shown(url)} needs fsspec; run: pip install 'jaxprompt[cloud]'."
        ) from None
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(
            f"{shown(url)} needs another package ({error}); of s3:// run: pip install "
            "'jaxprompt[cloud]'."
        ) from None
    except ValueError as error:
        raise UserError(f"{shown(url)} cannot be a store: {error}.") from None


@contextlib.contextmanager
def _asking(url: str) -> Iterator[None]:
    """What a file system of fsspec raises, as StoreUnavailable: each has errors of its own."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except PermissionError as error:
        raise StoreUnavailable(f"The store {url} refuses access ({_short(error)}).") from None
    except Exception as error:
        raise StoreUnavailable(f"The store {url} does not answer ({_short(error)}).") from None


def _short(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")
