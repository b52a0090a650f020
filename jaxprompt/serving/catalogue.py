"""The prompts that a server has, by name: which version each name means at this moment.

A name is one immutable record. Whoever asks gets the version that the record names, and whoever
replaces or removes a prompt puts another record in its place, so nobody ever sees half of a change.
What a name means is kept for all prompts; their vectors are in memory for those that were asked for
lately, and are read again from the store by a few threads when others are.
"""

import collections
import contextlib
import dataclasses
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import jax

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.paths import is_count
from jaxprompt.serving.artefacts import Files, check_files, digest_of
from jaxprompt.serving.store import (
    ReadOnlyStore,
    Store,
    StoreUnavailable,
    UnknownPrompt,
    changes,
    check_name,
)
from jaxprompt.serving.version import Version

log = logging.getLogger(__name__)

EVERY_TENANT = "*"  # of whoever may see all prompts
HISTORY = 16  # versions of a name that can be asked for
_HOST_BYTES = 1 << 30
_METADATA_BYTES = 4096  # of a version, roughly
_REMOVED_TWICE = 0.1  # seconds after which a folder that is being replaced is there again

State = Literal["stored", "loading", "ready", "failed"]


class Conflict(UserError):
    """The prompt is not in the version that a change was made for."""


class FailedPrompt(UserError):
    """The content of a prompt is damaged, or does not fit the backbone or the server."""


class Candidate(NamedTuple):
    """Content that is about to become a version of a name."""

    name: str
    tenant: str | None
    digest: str
    files: Files


# makes and checks a version; the catalogue gives it its number. Raises UserError
Make = Callable[[Candidate], Version]


class Facts(NamedTuple):
    """What is known of a prompt without reading it."""

    name: str
    tenant: str | None
    state: State
    number: int  # of the current version; 0: it was not read yet
    digest: str | None  # None: it was not read yet
    reason: str | None  # why the last content could not be loaded; an old version may still answer
    writable: bool


@dataclasses.dataclass(frozen=True)
class _Record:
    """What a name means. It is never changed, only replaced."""

    store: Store
    stamp: str
    history: tuple[tuple[int, str], ...] = ()  # numbers and digests, the current version last
    loading: Future[Version] | None = None
    reason: str | None = None
    refused: bool = False  # the content itself is wrong, so there is no use in reading it again
    # the last good version of a prompt that failed: nobody else may have it
    good: Version | None = None

    @property
    def digest(self) -> str | None:
        return self.history[-1][1] if self.history else None

    @property
    def number(self) -> int:
        return self.history[-1][0] if self.history else 0


class _HostCache:
    """Versions in memory, the least recently used go first. The catalogue's lock guards it."""

    def __init__(self, max_bytes: int) -> None:
        self._max, self._bytes = max_bytes, 0
        self._held: collections.OrderedDict[tuple[str, str], tuple[Version, int]]
        self._held = collections.OrderedDict()
        # a version that a request or the device still has is not read a second time
        self._alive: weakref.WeakValueDictionary[tuple[str, str], Version]
        self._alive = weakref.WeakValueDictionary()

    def get(self, name: str, digest: str) -> Version | None:
        key = name, digest
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][0]
        version = self._alive.get(key)
        if version is not None:
            self.put(version)
        return version

    def put(self, version: Version) -> None:
        key = version.name, version.digest
        self.drop(*key)
        size = _bytes_of(version)
        self._held[key] = version, size
        self._alive[key] = version
        self._bytes += size
        while self._bytes > self._max and len(self._held) > 1:
            _, (_, freed) = self._held.popitem(last=False)
            self._bytes -= freed

    def drop(self, name: str, digest: str) -> None:
        self._alive.pop((name, digest), None)
        held = self._held.pop((name, digest), None)
        self._bytes -= held[1] if held else 0

    @property
    def size(self) -> tuple[int, int]:
        return len(self._held), self._bytes


def _bytes_of(version: Version) -> int:
    arrays = jax.tree.leaves((version.prompt.vectors, version.prompt.layers))
    return sum(array.nbytes for array in arrays) + _METADATA_BYTES


class Catalogue:
    """Names, tenants and versions over one or several stores.

    Of two stores that have the same name the first one counts. New prompts go to the first store
    that can be written. All methods may be called from any thread. ``resolve`` never waits; what
    changes a store takes as long as the store does.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        make: Make,
        *,
        max_bytes: int = _HOST_BYTES,
        loaders: int = 4,
    ) -> None:
        self._stores, self._make = tuple(stores), make
        self._lock = threading.RLock()
        self._records: dict[str, _Record] = {}
        self._last_gone = 0  # the largest number that a removed name had
        self._busy: set[str] = set()  # names that somebody changes here
        self._idle = threading.Condition(self._lock)
        self._scans = 0  # that go on, and the names that were changed here since they began
        self._touched: set[str] = set()
        self._cache = _HostCache(max_bytes)
        self._pool = ThreadPoolExecutor(loaders, thread_name_prefix="load-prompt")
        self._closing = threading.Event()
        self._watchers: list[threading.Thread] = []
        # hears of a name that means another version from now on, or nothing; it must not wait
        self.listener: Callable[[str, Version | None], None] = lambda name, version: None
        self.store_errors: dict[int, str] = {}  # by the store's place, while it does not answer
        self.load_failures = 0

    # ---- reading

    def resolve(self, reference: str, tenant: str | None = None) -> Future[Version]:
        """The version that a reference means now, as a future that is done if it is in memory.

        Args:
            reference: ``name``, ``name@2`` or ``name@sha256:DIGEST``; a tenant's own prompt hides
                a public one of the same name.
            tenant: who asks. None sees public prompts, EVERY_TENANT all.

        Raises:
            UnknownPrompt: the tenant sees no such prompt, or it has no such version any more.
        """
        name, _, version = reference.partition("@")
        with self._lock:
            full = self._visible(name, tenant)
            record = self._records[full]
            digest = _wanted(record, reference, version)
            found = self._cache.get(full, digest) if digest else None
            if found is not None:
                return _done(found)
            if digest is None or digest == record.digest:
                if record.refused:
                    return _refusal(FailedPrompt(_cannot(full, record.reason)))
                return self._load(full, record)
        return self._pool.submit(self._read_old, full, record, digest)

    def loaded(self, reference: str, tenant: str | None = None) -> Version | None:
        """The version if it is in memory, without loading it. Raises UnknownPrompt."""
        name, _, version = reference.partition("@")
        with self._lock:
            full = self._visible(name, tenant)
            digest = _wanted(self._records[full], reference, version)
            return self._cache.get(full, digest) if digest else None

    def facts(self, name: str, tenant: str | None = None) -> Facts:
        """What is known of a prompt. Raises UnknownPrompt."""
        with self._lock:
            full = self._visible(name, tenant)
            return self._facts(full, self._records[full])

    def list(
        self, tenant: str | None = None, *, limit: int = 1000, after: str | None = None
    ) -> Sequence[Facts]:
        """Prompts that a tenant sees, by name. Nothing is loaded.

        Args:
            tenant: who asks, see ``resolve``.
            limit: so many at most.
            after: only names behind this one, which is the last of the page before.
        """
        with self._lock:
            names = [name for name in self._records if after is None or name > after]
            seen = sorted(name for name in names if _sees(tenant, name))[: max(limit, 0)]
            return [self._facts(name, self._records[name]) for name in seen]

    def sees(self, name: str, tenant: str | None = None) -> bool:
        """Whether a prompt has this whole name and a tenant sees it."""
        return name in self._records and _sees(tenant, name)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def in_memory(self) -> tuple[int, int]:
        """The number of versions in the memory of the host, and their bytes."""
        with self._lock:
            return self._cache.size

    def _visible(self, name: str, tenant: str | None) -> str:
        """The whole name of a prompt that a tenant means. Raises UnknownPrompt."""
        own = f"{tenant}/{name}"
        if tenant not in (None, EVERY_TENANT) and "/" not in name and own in self._records:
            return own
        if name in self._records and _sees(tenant, name):
            return name
        raise UnknownPrompt(
            f"There is no prompt {shown(name)}; GET /v1/models lists those that there are."
        )

    def _facts(self, name: str, record: _Record) -> Facts:
        state: State = "stored"
        if record.digest and self._cache.get(name, record.digest):
            state = "ready"
        if record.loading is not None:
            state = "loading"
        elif record.reason is not None:
            state = "failed"
        return Facts(
            name, _tenant_of(name), state, record.number, record.digest, record.reason,
            record.store.writable,
        )  # fmt: skip

    # ---- loading

    def _load(self, name: str, record: _Record) -> Future[Version]:
        """Load what the store has now, once for all who wait. The lock is held."""
        if record.loading is not None:
            return record.loading
        begun: Future[Version] = Future()
        begun.set_running_or_notify_cancel()  # nobody can cancel it for the others
        self._records[name] = dataclasses.replace(record, loading=begun)
        self._pool.submit(self._load_now, name, record, begun)
        return begun

    def _load_now(self, name: str, record: _Record, begun: Future[Version]) -> None:
        """Do it, in a thread of the pool."""
        failure: Exception | None = None
        version: Version | None = None
        try:
            version = self._version(name, record.store.read(name))
        except Exception as error:  # of a store of somebody else, or of a library
            failure = error
        with self._lock:
            now = self._records.get(name)
            if now is None:  # it was removed meanwhile
                failure = failure or UnknownPrompt(f"There is no prompt {shown(name)} any more.")
            elif now.loading is not begun:  # it means something newer already
                self._follow(name, now, begun)
                return
            elif version is not None:
                begun.set_result(self._install(name, now, version))
                return
            elif failure is not None:
                failure = self._fail(name, now, failure)
        begun.set_exception(failure or RuntimeError(name))

    def _follow(self, name: str, record: _Record, begun: Future[Version]) -> None:
        """Answer those who wait with what the name means now. The lock is held."""
        found = self._cache.get(name, record.digest) if record.digest else None

        def pass_on(done: Future[Version]) -> None:
            error = done.exception()
            if error is None:
                begun.set_result(done.result())
            else:
                begun.set_exception(error)

        newer = _done(found) if found else self._load(name, record)
        newer.add_done_callback(pass_on)

    def _fail(self, name: str, record: _Record, error: Exception) -> Exception:
        """Note that what the store has cannot be used; the old version stays. The lock is held.

        A store that does not answer, or has the prompt no more, is asked again by the next scan.
        """
        self.load_failures += 1
        passing = isinstance(error, StoreUnavailable | UnknownPrompt)
        refused = isinstance(error, UserError) and not passing
        reason = str(error) if isinstance(error, UserError) else repr(error)
        log.warning("The prompt %s cannot be loaded: %s", name, reason)
        self._records[name] = dataclasses.replace(
            record, loading=None, reason=reason, refused=refused,
            stamp=record.stamp if refused else "",
            good=self._cache.get(name, record.digest) if record.digest else None,
        )  # fmt: skip
        return FailedPrompt(_cannot(name, reason)) if refused else error

    def _version(self, name: str, files: Files) -> Version:
        """A version without its number, or the one with this content if it is in memory."""
        check_files(files)
        digest = digest_of(files)
        with self._lock:
            known = self._cache.get(name, digest)
        return known or self._make(Candidate(name, _tenant_of(name), digest, files))

    def _install(self, name: str, record: _Record, version: Version) -> Version:
        """Let a name mean a version. The lock is held. Content that was current stays as it was."""
        history = record.history
        new = version.digest != record.digest
        if new:
            # no number of a name means two things: a new name goes on behind all that are gone
            number = (record.number or self._last_gone) + 1
            version = dataclasses.replace(version, number=number)
            history = (*history, (version.number, version.digest))
        elif version.number != record.number:  # it was read again
            version = dataclasses.replace(version, number=record.number)
        kept = history[-HISTORY:]
        for _, digest in history[:-HISTORY]:
            if digest not in {digest for _, digest in kept}:
                self._cache.drop(name, digest)
        self._cache.put(version)
        self._records[name] = _Record(record.store, record.stamp, kept)
        if new:
            self.listener(name, version)
        return version

    def _read_old(self, name: str, record: _Record, digest: str) -> Version:
        """A version that is no longer current, from a store that keeps such."""
        version = self._version(name, record.store.read(name, digest))
        numbers = {known: number for number, known in record.history}
        version = dataclasses.replace(version, number=numbers.get(digest, 0))
        with self._lock:
            if name in self._records:
                self._cache.put(version)
        return version

    # ---- changing

    def put(
        self,
        name: str,
        files: Files,
        tenant: str | None = None,
        *,
        if_match: str | None = None,
        create: bool = False,
    ) -> Version:
        """Check content, store it, and let a name mean it from now on.

        Args:
            name: of the prompt; a tenant's prompts are under the tenant's own name.
            files: of the artefact, see ``artefacts``.
            tenant: who writes. EVERY_TENANT writes public prompts, and those of the tenant that the
                name begins with.
            if_match: the digest that the current version must have.
            create: the name must be free.

        Raises:
            UserError: the content is no prompt, or does not fit the backbone or the server.
            Conflict: see ``if_match`` and ``create``.
            ReadOnlyStore: no store can be written.
        """
        full = check_name(_own_name(name, tenant))
        with self._changing(full):
            self._check_conflict(full, if_match, create)
            version = self._version(full, files)
            record = self._records.get(full)
            store = record.store if record else self._writable()
            stamp = store.write(full, files)
            with self._lock:
                # whoever waits for an older content gets this one, which may have come meanwhile
                now = self._records.get(full)
                history = now.history if now else ()
                return self._install(full, _Record(store, stamp, history), version)

    def remove(self, name: str, tenant: str | None = None, *, if_match: str | None = None) -> None:
        """Forget a name. Requests that hold its version are still answered by it.

        Raises:
            UnknownPrompt: there is no such prompt of this tenant.
            Conflict: the current version has another digest than ``if_match``.
            ReadOnlyStore: the prompt is in a store that is only read.
        """
        full = _own_name(name, tenant)
        with self._changing(full):
            record = self._records.get(full)
            if record is None:
                raise UnknownPrompt(f"There is no prompt {shown(name)} of yours.")
            self._check_conflict(full, if_match, False)
            with contextlib.suppress(UnknownPrompt):  # somebody else was faster
                record.store.delete(full)
            with self._lock:
                self._forget(full)

    @contextlib.contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        """One change of a name at a time, which no scan of a store overtakes."""
        with self._idle:
            self._idle.wait_for(lambda: name not in self._busy)
            self._busy.add(name)
        try:
            yield
        finally:
            with self._idle:
                self._busy.discard(name)
                if self._scans:
                    self._touched.add(name)
                self._idle.notify_all()

    def _check_conflict(self, name: str, if_match: str | None, create: bool) -> None:
        record = self._records.get(name)
        if create and record is not None:
            raise Conflict(f"The prompt {shown(name)} exists; replace it, or use another name.")
        digest = None if record is None else record.digest
        if if_match is not None and if_match.removeprefix("sha256:") != digest:
            raise Conflict(
                f"The prompt {shown(name)} has the digest {digest} and not {shown(if_match)}; read "
                "it again before you change it."
            )

    def _writable(self) -> Store:
        for store in self._stores:
            if store.writable:
                return store
        raise ReadOnlyStore(
            "This server has no store that can be written; start it with --library DIR."
        )

    def _forget(self, name: str) -> None:
        record = self._records.pop(name)
        self._last_gone = max(self._last_gone, record.number)
        for _, digest in record.history:
            self._cache.drop(name, digest)
        self.listener(name, None)

    # ---- watching the stores

    def scan(self) -> None:
        """Look at all stores for prompts that are new, different or gone."""
        for place in range(len(self._stores)):
            self._scan(place)

    def _scan(self, place: int) -> None:
        """Look at one store. One that does not answer changes nothing."""
        store = self._stores[place]
        with self._lock:
            self._scans += 1
            seen = {n: r.stamp for n, r in self._records.items() if r.store is store}
        try:
            changed, gone = changes(store, seen)
            if gone:  # a folder is away for a moment while it is replaced
                time.sleep(_REMOVED_TWICE)
                gone = gone & changes(store, seen).gone
        except Exception as error:
            reason = str(error) if isinstance(error, UserError) else repr(error)
            if self.store_errors.get(place) != reason:
                log.warning("A store cannot be listed: %s", reason)
            self.store_errors[place] = reason
            changed, gone = {}, frozenset()
        else:
            self.store_errors.pop(place, None)
        with self._lock:
            # what was changed here since the listing began is newer than the listing
            late = self._touched | self._busy
            for name in gone - late:
                if name in self._records:
                    self._forget(name)
            for name in set(changed) - late:
                self._notice(name, changed[name], place)
            self._scans -= 1
            if not self._scans:
                self._touched.clear()

    def _notice(self, name: str, stamp: str, place: int) -> None:
        """Content of a store is new or different. The lock is held."""
        record = self._records.get(name)
        store = self._stores[place]
        if record is None:
            self._records[name] = _Record(store, stamp)
            return
        if record.store is not store:  # the first store that has the name counts
            if self._stores.index(record.store) < place:
                return
            record = dataclasses.replace(record, store=store)
        loading = record.loading
        record = dataclasses.replace(record, stamp=stamp, loading=None, reason=None, refused=False)
        self._records[name] = record
        if record.history or loading:  # somebody uses it: the new content is checked at once
            self._load(name, record)

    def watch(self) -> None:
        """Scan each store again and again in a thread of its own, until ``close``."""

        def follow(place: int) -> None:
            pause = self._stores[place].interval
            while not self._closing.wait(pause):
                begun = time.monotonic()
                with contextlib.suppress(RuntimeError):  # the pool is closing
                    self._scan(place)
                # of a store of many thousand prompts a scan takes a while, and is not all we do
                pause = max(self._stores[place].interval, 20 * (time.monotonic() - begun))

        for place in range(len(self._stores)):
            thread = threading.Thread(
                target=follow, args=(place,), name=f"watch-store-{place}", daemon=True
            )
            thread.start()
            self._watchers.append(thread)

    def warm(self, references: Iterable[str]) -> None:
        """Load prompts, and wait for them. Raises UserError for the first one that fails."""
        for future in [self.resolve(reference, EVERY_TENANT) for reference in references]:
            future.result()

    def close(self) -> None:
        """Stop watching and loading."""
        self._closing.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _done(version: Version) -> Future[Version]:
    future: Future[Version] = Future()
    future.set_result(version)
    return future


def _refusal(error: Exception) -> Future[Version]:
    future: Future[Version] = Future()
    future.set_exception(error)
    return future


def _cannot(name: str, reason: str | None) -> str:
    return f"The prompt {shown(name)} cannot be used: {reason}"


def _tenant_of(name: str) -> str | None:
    return name.partition("/")[0] if "/" in name else None


def _sees(tenant: str | None, name: str) -> bool:
    return tenant == EVERY_TENANT or _tenant_of(name) in (None, tenant)


def _own_name(name: str, tenant: str | None) -> str:
    """The whole name of a prompt that a tenant changes. Raises UnknownPrompt for another's."""
    if tenant in (None, EVERY_TENANT):
        return name
    if "/" not in name:
        return f"{tenant}/{name}"
    if _tenant_of(name) != tenant:
        raise UnknownPrompt(f"There is no prompt {shown(name)} of yours.")
    return name


def _wanted(record: _Record, reference: str, version: str) -> str | None:
    """The digest that a reference means; None: the current content, which was not read yet.

    Raises UnknownPrompt.
    """
    if "@" not in reference:
        return record.digest
    if version.startswith("sha256:"):
        digest = version.removeprefix("sha256:")
        if len(digest) == 64 and set(digest) <= {*"0123456789abcdef"}:
            return digest
    elif is_count(version):
        for number, digest in record.history:
            if number == int(version):
                return digest
    known = ", ".join(str(number) for number, _ in record.history) or "none that was read yet"
    raise UnknownPrompt(
        f"There is no version {shown(version)} of the prompt {shown(reference.partition('@')[0])};"
        f" there is {known}, and name@sha256:DIGEST."
    )
