"""Where prompts are kept: a directory, a bucket, or a repository of the hub.

A store knows names and bytes. It has no opinion on what the bytes mean, so that anything that is
damaged or does not fit is found in one place, the catalogue. Every store can be changed behind the
server's back, and tells by a stamp of each prompt whether that happened.
"""

import abc
import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

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


@contextlib.contextmanager
def store_errors(place: str, done: Literal["listed", "read", "written"]) -> Iterator[None]:
    """What a disk, a network or a library raises inside, as an error of a store.

    Every file system and every library has errors of its own, so each exception counts.

    Args:
        place: what the sentence calls the store.
        done: what is done to it. A store that refuses to be written can only be read.

    Raises:
        ReadOnlyStore: the store may not be written.
        StoreUnavailable: for any other exception. A UserError stays as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        refused = isinstance(error, PermissionError) or _number(error) == errno.EROFS
        kind = ReadOnlyStore if refused and done == "written" else StoreUnavailable
        raise kind(f"{place} cannot be {done} ({_reason(error)}).") from error


def _number(error: Exception) -> int | None:
    return error.errno if isinstance(error, OSError) else None


def _reason(error: Exception) -> str:
    """What an exception says, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())[:200].rstrip(".")
    if isinstance(error, OSError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Store(abc.ABC):
    """Prompts by name. All methods may be called from several threads at once.

    A kind of store says how it lists, reads, writes and deletes in the methods with an underscore,
    and lets exceptions pass. What others call checks names, and turns exceptions into errors of a
    store: so a server has a status and a sentence for each. A stamp is any text that changes when
    the content may have changed.
    """

    place: str  # what errors call it
    writable: bool
    interval: float  # seconds between two looks at what has changed

    def list(self) -> Mapping[str, str]:
        """The stamp of each prompt, by name. Nothing is read but what tells of a change.

        Raises StoreUnavailable.
        """
        with store_errors(self.place, "listed"):
            return self._list()

    def read(self, name: str, digest: str | None = None) -> Files:
        """The files of a prompt; with ``digest``, of that content.

        Raises:
            UnknownPrompt: there is no such prompt, or no such content of it.
            StoreUnavailable: see there.
            UserError: the content is damaged, or is more than a prompt may have.
        """
        check_name(name)
        with store_errors(self.place, "read"):
            return self._read(name, digest)

    def write(self, name: str, files: Files) -> str:
        """Put or replace a prompt as a whole; its stamp. Raises ReadOnlyStore, StoreUnavailable."""
        check_name(name)
        with store_errors(self.place, "written"):
            return self._write(name, files)

    def delete(self, name: str) -> None:
        """Remove a prompt and all its content.

        Raises UnknownPrompt, ReadOnlyStore and StoreUnavailable.
        """
        check_name(name)
        with store_errors(self.place, "written"):
            self._delete(name)

    @abc.abstractmethod
    def _list(self) -> Mapping[str, str]: ...

    @abc.abstractmethod
    def _read(self, name: str, digest: str | None) -> Files: ...

    @abc.abstractmethod
    def _write(self, name: str, files: Files) -> str: ...

    @abc.abstractmethod
    def _delete(self, name: str) -> None: ...


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


class DirectoryStore(Store):
    """Folders of a directory, or folders of its folders, which are tenants.

    ``cp -r`` adds a prompt and ``rm -r`` removes one. Symbolic links are not followed, so that no
    name leads out of the directory. Folders whose names are no prompt's are left alone.
    """

    def __init__(self, root: Path, interval: float = 2.0) -> None:
        self.root = Path(os.path.realpath(root))
        self.interval = interval
        self.place = f"The directory {shown(str(self.root))}"
        with store_errors(self.place, "read"):
            there = self.root.is_dir()
        if not there:
            raise UserError(f"There is no directory {shown(str(root))}; make it, or name another.")
        self.writable = os.access(self.root, os.W_OK)

    def _list(self) -> Mapping[str, str]:
        stamps: dict[str, str] = {}
        for entry in _folders(self.root):
            stamp = _stamp(entry.path)
            if stamp is not None:
                stamps[entry.name] = stamp
                continue
            with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
                for inner in _folders(entry.path):
                    if (stamp := _stamp(inner.path)) is not None:
                        stamps[f"{entry.name}/{inner.name}"] = stamp
        return stamps

    def _read(self, name: str, digest: str | None) -> Files:
        return _read_whole(lambda: self._opened(name), name, digest)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """The folder's descriptor. It stays the same folder, whatever the name means later."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        opened = [self._open_root()]
        try:
            for part in name.split("/"):
                opened.append(os.open(part, flags, dir_fd=opened[-1]))
            yield opened[-1]
        except NotADirectoryError:  # a file, or a link
            raise _unknown(name) from None
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def _open_root(self) -> int:
        try:
            return os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError as error:  # of a prompt it would mean that only that is gone
            raise StoreUnavailable(f"{self.place} is not there any more.") from error

    def _write(self, name: str, files: Files) -> str:
        folder = self._folder(name)

        def write(fresh: Path) -> None:
            for file, content in files.items():
                (fresh / file).write_bytes(content)

        replace_directory(folder, write, lambda old: _stamp(old) is not None)
        for stale in set(NAMES) - set(files):  # of an artefact of another kind
            (folder / stale).unlink(missing_ok=True)
        return _stamp(folder) or ""

    def _delete(self, name: str) -> None:
        folder = self._folder(name)
        if _stamp(folder) is None:
            raise _unknown(name)
        # first what makes it a prompt, so that a kill leaves no half of one
        for file in NAMES:
            (folder / file).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other files in it stay, and so does a tenant's
            folder.rmdir()
            if folder.parent != self.root:
                folder.parent.rmdir()

    def _folder(self, name: str) -> Path:
        """Where a prompt is written. Raises UserError where a link stands in the way."""
        folder = self.root
        for part in name.split("/"):
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
    with os.scandir(folder) as entries:
        found = list(entries)
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
        except (FileNotFoundError, NotADirectoryError):
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
            if error.errno not in (errno.ELOOP, errno.ENXIO):
                raise
            # a link, or a socket
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


class PathStore(Store):
    """Prompts that the command line names: a folder each, anywhere. They can only be read.

    A folder that is replaced, as a run does that is trained again, is noticed.
    """

    place = "The folder that was named for the prompt"
    writable = False
    interval = 2.0

    def __init__(self, folders: Mapping[str, str | Path]) -> None:
        self._folders: dict[str, Path] = {}
        for name, folder in folders.items():
            path = Path(expanded(folder))
            if not _is_prompt(path):
                inner = path / "prompt"  # of a run
                hint = f"; did you mean {str(inner)!r}?" if _is_prompt(inner) else "."
                raise UserError(f"There is no prompt in the folder {shown(str(path))}{hint}")
            self._folders[check_name(name)] = Path(os.path.realpath(path))

    def _list(self) -> Mapping[str, str]:
        stamps = {name: _stamp(folder) for name, folder in self._folders.items()}
        return {name: stamp for name, stamp in stamps.items() if stamp is not None}

    def _read(self, name: str, digest: str | None) -> Files:
        if name not in self._folders:
            raise _unknown(name)
        return _read_whole(lambda: _opened_folder(self._folders[name]), name, digest)

    def _write(self, name: str, files: Files) -> str:
        raise ReadOnlyStore(
            f"The prompt {shown(name)} was named when the server was started, and cannot be "
            "written or removed; start it with --library DIR and use a name of your own."
        )

    def _delete(self, name: str) -> None:
        self._write(name, {})


def _is_prompt(folder: Path) -> bool:
    """Whether a folder is a prompt. A name that no folder can have is none."""
    try:
        return _stamp(folder) is not None
    except OSError:
        return False


# ---- a bucket

_FORMAT = 1


class ObjectStore(Store):
    """Any file system of fsspec. What a name means is one object, so that a reader never sees half.

    ``names/NAME.json`` says which content is current. The content is in
    ``data/NAME/DIGEST/FILE``, is written before and never changes. Older contents stay until
    ``KEPT`` newer ones are there.
    """

    KEPT = 4

    def __init__(self, url: str, interval: float = 30.0) -> None:
        self.interval, self.writable = interval, True
        self.place = f"The store {_without_password(url)}"
        with store_errors(self.place, "read"):
            self._fs, root = _file_system(url)
            self._root = PurePosixPath(root)
            bucket = self._root.parts[0] if self._root.parts else ""
            # a list of a bucket that is not there is empty, and a write makes it
            if bucket != "/" and not self._fs.exists(bucket):
                raise UserError(
                    f"There is no bucket {shown(bucket)} of {shown(_without_password(url))}; make "
                    "it, or name another."
                )

    def _object(self, *parts: str) -> str:
        return str(self._root.joinpath(*parts))

    def _list(self) -> Mapping[str, str]:
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
        """Names and sizes of the files of each digest, the current one first.

        Raises UnknownPrompt, and UserError where it is damaged.
        """
        path = self._object("names", f"{name}.json")
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

    def _read(self, name: str, digest: str | None) -> Files:
        contents = self._manifest(name)
        wanted = next(iter(contents)) if digest is None else digest
        if wanted not in contents:
            raise _unknown(name, digest)
        left, files = MAX_BYTES, {}
        for file, size in contents[wanted].items():
            left = _room(left, size, name)
            path = self._object("data", name, wanted, file)
            try:
                # one byte more than promised tells that the object is another
                files[file] = self._fs.cat_file(path, start=0, end=size + 1)
            except FileNotFoundError:
                raise UserError(f"{name}: {file} is not in the store; write it again.") from None
        if digest_of(files) != wanted:
            raise UserError(f"{name}: the content is not what its digest says; write it again.")
        return files

    def _write(self, name: str, files: Files) -> str:
        digest = digest_of(files)
        try:
            older = self._manifest(name)
        except UserError:  # there is none, or it is damaged and replaced
            older = {}
        sizes = {file: len(content) for file, content in files.items()}
        contents = {digest: sizes} | {d: s for d, s in older.items() if d != digest}
        kept = dict(list(contents.items())[: self.KEPT + 1])
        manifest = json.dumps({"format": _FORMAT, "contents": kept}, indent=1).encode()
        for file, content in files.items():
            self._put(self._object("data", name, digest, file), content)
        self._put(self._object("names", f"{name}.json"), manifest)
        for old in set(contents) - set(kept):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(self._object("data", name, old), recursive=True)
        return self._list().get(name, "")

    def _put(self, path: str, content: bytes) -> None:
        self._fs.makedirs(self._fs._parent(path), exist_ok=True)  # of a real file system
        self._fs.pipe_file(path, content)

    def _delete(self, name: str) -> None:
        path = self._object("names", f"{name}.json")
        self._fs.invalidate_cache()
        if not self._fs.exists(path):
            raise _unknown(name)
        self._fs.rm_file(path)
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._object("data", name), recursive=True)


def _without_password(url: str) -> str:
    """A URL as errors may show it.

    >>> _without_password("sftp://me:secret@host/prompts"), _without_password("s3://bucket")
    ('sftp://host/prompts', 's3://bucket')
    """
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


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
