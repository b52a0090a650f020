"""What the routes share: the parts of a server, its limits, and how a request is opened."""

import asyncio
import math
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
from pydantic import BaseModel
from starlette.requests import Request

from jaxprompt.config.errors import UserError
from jaxprompt.config.values import Values
from jaxprompt.methods.user_library import UserLibrary
from jaxprompt.serving.batcher import Batcher
from jaxprompt.serving.catalogue import Catalogue
from jaxprompt.serving.http.errors import ApiError, of_user_error, too_late
from jaxprompt.serving.http.json_body import BadBody, parse_body, read_body
from jaxprompt.serving.http.keys import Caller, Keys, Scope
from jaxprompt.serving.http.metrics import Metrics
from jaxprompt.serving.http.waiting import Pending
from jaxprompt.serving.prepare import Words
from jaxprompt.serving.store import UnknownPrompt
from jaxprompt.serving.version import Version
from jaxprompt.serving.work import Engine, Work

Model = TypeVar("Model", bound=BaseModel)
R = TypeVar("R")
_LONG = 4096  # characters of a request that another thread tokenizes


class HttpLimits(NamedTuple):
    """What one request may take."""

    body_bytes: int = 1 << 20
    upload_bytes: int = 256 << 20  # of a prompt
    rows: int = 256
    body_seconds: float = 30.0
    seconds: float = 60.0  # until the answer is there; timeout_ms may be less
    watchdog_seconds: float = 300.0  # a batch that takes longer means that the device hangs


class BackboneFacts(NamedTuple):
    """What clients are told of the backbone."""

    id: str  # its name among the models
    source: str
    fingerprint: str
    kind: Literal["encoder-decoder", "decoder-only"]
    width: int


@runtime_checkable
class Choice(Protocol):
    """What the router found for one input; ``serving.library.Choice`` is one."""

    @property
    def prompt(self) -> str | None:
        """The prompt that fits; None: none does."""
        ...

    @property
    def score(self) -> float:
        """How near it is."""
        ...

    @property
    def margin(self) -> float | None:
        """By how much it is before the second; None: there is none."""
        ...

    @property
    def candidates(self) -> Sequence[tuple[str, float]]:
        """Prompts by score, the best first."""
        ...

    @property
    def reason(self) -> str:
        """Why none fits, to go on with after "no prompt fits"."""
        ...


@runtime_checkable
class Router(Protocol):
    """Chooses a prompt for an input by what the bare backbone makes of it."""

    @property
    def names(self) -> Sequence[str]:
        """The prompts that it can choose."""
        ...

    def choose(self, vector: np.ndarray, candidates: Sequence[str] | None = None) -> Choice:
        """The prompt that fits. Raises UserError where no candidate is known."""
        ...


@runtime_checkable
class Device(Protocol):
    """What is told of the bank of slots. Any thread may read it."""

    def holds(self, version: Version) -> bool:
        """Whether a version is in a slot."""
        ...

    def pin(self, version: Version, pinned: bool) -> None:
        """Keep a version in its slot; only the compute thread calls it. Raises UserError."""
        ...

    def facts(self) -> Mapping[str, float]:
        """Figures by name: slots, slots_used, evictions, compilations, and the like."""
        ...


@dataclass
class Used:
    """How often a prompt answered, and when."""

    rows: int = 0
    last: float = 0.0


@dataclass
class Warming:
    """How many programs are compiled of how many."""

    done: int = 0
    programs: int = 0


@dataclass
class Service:
    """The parts of a running server."""

    backbone: BackboneFacts
    words: Words
    catalogue: Catalogue
    engine: Engine
    device: Device
    inspect: Callable[[Version, int], Values]
    anyone: Caller | None  # who comes without a key; None: nobody may
    keys: Keys | None = None
    router: Router | None = None
    users: UserLibrary | None = None  # whose prompts the catalogue has
    limits: HttpLimits = HttpLimits()
    hosts: Sequence[str] | None = None  # that a Host header may name; None: any
    sources: Sequence[str] = ()  # folders that a client may name as a prompt's source
    batcher: Batcher = field(init=False)  # it belongs to an event loop
    metrics: Metrics = field(default_factory=Metrics)
    warming: Warming = field(default_factory=Warming)
    draining: bool = False
    used: dict[str, Used] = field(default_factory=dict)
    pinned: dict[str, Version] = field(default_factory=dict)
    # of versions that are calibrated by rows that say nothing: with the prompt, and (True) without
    priors: MutableMapping[Version, dict[bool, np.ndarray]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(2, thread_name_prefix="tokenize")
    )

    def __post_init__(self) -> None:
        self.catalogue.listener = self.changed

    def changed(self, name: str, version: Version | None) -> None:
        """A name means another version, or nothing any more: its pin goes along. For any thread."""
        if version is None:
            self.used.pop(name, None)
        pinned = self.pinned.pop(name, None)
        if pinned is None:
            return
        if version is not None:
            self.pinned[name] = version

        def move() -> None:
            self.device.pin(pinned, False)
            if version is not None:
                self.device.pin(version, True)

        self.batcher.call(move)

    def figures(self) -> Mapping[str, float]:
        """What is read when somebody asks for figures."""
        versions, size = self.catalogue.in_memory
        return {
            "queue_rows": self.batcher.waiting,
            "prompts": len(self.catalogue),
            "prompts_in_memory": versions,
            "prompt_bytes": size,
            "prompt_load_failures": self.catalogue.load_failures,
            "ready": float(self.batcher.state == "ready" and not self.draining),
        }

    def note_used(self, versions: Sequence[Version | None]) -> None:
        """Count rows that were answered."""
        now = time.time()
        for version in versions:
            if version is not None:
                used = self.used.setdefault(version.name, Used())
                used.rows += 1
                used.last = now

    async def apart(self, characters: int, make: Callable[[], R]) -> R:
        """What ``make`` makes; in a thread of its own where that takes long."""
        if characters < _LONG:
            return make()
        return await asyncio.get_running_loop().run_in_executor(self.pool, make)


class Opened(NamedTuple):
    """A request that was let in."""

    service: Service
    caller: Caller
    id: str
    began: float  # by time.monotonic()
    log: Values  # what the line of the log says of it

    def deadline(self, timeout_ms: float | None) -> float:
        """When the answer must be there."""
        seconds = self.service.limits.seconds
        if timeout_ms is not None:
            seconds = min(seconds, timeout_ms / 1000)
        return self.began + seconds

    def submit(self, works: Sequence[Work], deadline: float) -> Pending:
        """Let rows wait for the device. Raises ApiError where they may not."""
        service, caller = self.service, self.caller
        for number, work in enumerate(works):
            try:
                service.engine.check(work)
            except UserError as error:
                raise ApiError(413, "too_large", str(error), f"inputs.{number}") from None
        if service.keys is not None:
            seconds = service.keys.take(caller, len(works))
            if seconds:
                raise ApiError(
                    429,
                    "key_limit",
                    f"The key may send {caller.limits.rows_per_minute} rows a minute; send fewer.",
                    headers={"retry-after": str(math.ceil(seconds))},
                )
        return Pending(
            service.batcher, works, key=caller.id, key_rows=caller.limits.queued_rows,
            deadline=deadline, request_id=self.id, note_dropped=service.metrics.cancelled.inc,
        )  # fmt: skip

    def note(self, pending: Pending, versions: Sequence[Version | None], tokens: int) -> None:
        """What the log and the figures say of rows that were answered."""
        self.service.note_used(versions)
        self.service.metrics.queued.observe(pending.queued)
        names = sorted({reference(self.service, version) for version in versions})
        self.log.update(
            prompts=names[:8],
            rows=len(versions),
            tokens=tokens,
            queue_ms=_ms(pending.queued),
            device_ms=_ms(pending.device),
        )

    def timing(self, pending: Pending) -> dict[str, float]:
        """Where the time of a request went."""
        total = time.monotonic() - self.began
        return {
            "queue_ms": _ms(pending.queued),
            "device_ms": _ms(pending.device),
            "total_ms": _ms(total),
        }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def server_timing(timing: Mapping[str, float]) -> dict[str, str]:
    """The header that browsers show."""
    parts = (f"{name.removesuffix('_ms')};dur={value}" for name, value in timing.items())
    return {"server-timing": ", ".join(parts)}


def reference(service: Service, version: Version | None) -> str:
    """A version as a client names it."""
    return service.backbone.id if version is None else f"{version.name}@{version.number}"


def named(service: Service, version: Version | None) -> Values:
    """Which version answered, as every answer says it."""
    if version is None:
        return {"prompt": service.backbone.id, "version": None, "digest": None}
    return {"prompt": version.name, "version": version.number, "digest": version.digest}


def open_request(request: Request, scope: Scope | None) -> Opened:
    """Who sends the request, and whether they may. ``scope`` None: anyone may.

    Raises:
        ApiError: no key, a wrong one, or one that may not do this.
    """
    service = cast(Service, request.app.state.service)
    state = request.scope["state"]
    caller = service.anyone
    if scope is not None and service.keys is not None:
        caller = _caller(service.keys, request.headers.get("authorization", ""))
    if caller is None:
        caller = Caller("", None, frozenset())
    if scope is not None and scope not in caller.scopes:
        raise ApiError(
            403,
            "missing_scope",
            f"The key lacks the scope {scope!r}."
            if service.keys is not None
            else "Prompts are not managed without keys where others reach the server; start it "
            "with --keys FILE.",
        )
    if caller.id:
        state["log"]["key"] = caller.id
    return Opened(service, caller, state["id"], state["began"], state["log"])


def _caller(keys: Keys, header: str) -> Caller:
    kind, _, key = header.partition(" ")
    caller = keys.find(key.strip()) if kind.lower() == "bearer" else None
    if caller is None:
        what = "The key is unknown" if key else "A key is needed"
        raise ApiError(
            401,
            "invalid_api_key",
            f"{what}; send the header Authorization: Bearer KEY.",
            headers={"www-authenticate": "Bearer"},
        )
    return caller


async def read(request: Request, service: Service, model: type[Model]) -> Model:
    """The body of a request. Raises ApiError."""
    limits = service.limits
    try:
        body = await read_body(request, limits.body_bytes, limits.body_seconds)
        return parse_body(body, model)
    except BadBody as bad:
        raise of_bad_body(bad) from None


def of_bad_body(bad: BadBody) -> ApiError:
    """The error of a body that cannot be used."""
    # what of the body is still to come is not read
    headers = {"connection": "close"} if bad.status in (408, 413) else {}
    return ApiError(bad.status, bad.code, bad.sentence, bad.param, headers)


def check_rows(service: Service, rows: int) -> None:
    """Raise ApiError for more rows than one request may have."""
    if rows > service.limits.rows:
        raise ApiError(
            413,
            "too_large",
            f"The request has {rows} rows and may have {service.limits.rows}; send several.",
            "inputs",
        )


async def resolve(
    opened: Opened, name: str, deadline: float, param: str = "prompt"
) -> Version | None:
    """The version that a name means now; None: the backbone. Raises ApiError."""
    service = opened.service
    if name == service.backbone.id:
        return None
    try:
        future = service.catalogue.resolve(name, opened.caller.tenant)
        return future.result() if future.done() else await within(future, deadline)
    except UnknownPrompt as error:
        raise of_user_error(error, param) from None
    except UserError as error:
        raise of_user_error(error, param, (422, "prompt_rejected")) from None


async def within(future: Future[R], deadline: float) -> R:
    """The result of a future. Raises ApiError after the deadline."""
    waiting: Awaitable[R] = asyncio.wrap_future(future)
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await waiting
    except TimeoutError:
        raise too_late() from None
