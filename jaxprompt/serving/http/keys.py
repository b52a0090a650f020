"""Who asks: bearer keys with tenants, scopes and limits. Keys themselves are never kept."""

import hashlib
import hmac
import logging
import time
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from jaxprompt.config.errors import UserError
from jaxprompt.config.validation import parse
from jaxprompt.runtime.json_file import parse_json
from jaxprompt.serving.catalogue import EVERY_TENANT

log = logging.getLogger(__name__)

Scope = Literal["predict", "manage"]
_LOOK_EVERY = 2.0  # seconds between two looks at the file
# a part of a prompt's name, or all tenants
_PART = r"^([a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?|\*)$"
_Tenant = Annotated[str, StringConstraints(pattern=_PART)]


class KeyLimits(BaseModel):
    """What one key may use."""

    model_config = ConfigDict(extra="forbid")

    queued_rows: Annotated[int, Field(ge=1)] | None = None  # that wait at a time
    rows_per_minute: Annotated[int, Field(ge=1)] | None = None


class KeyEntry(BaseModel):
    """What the file says of a key."""

    model_config = ConfigDict(extra="forbid")

    tenant: _Tenant | None = None
    scopes: list[Scope] = ["predict"]
    limits: KeyLimits = KeyLimits()


class Caller(NamedTuple):
    """Who sends a request.

    id: of the key, for logs and fair shares; it does not tell the key.
    tenant: sees public prompts and its own; None: public ones.
    """

    id: str
    tenant: str | None
    scopes: frozenset[Scope]
    limits: KeyLimits = KeyLimits()


# of a server without keys: whoever reaches this machine's own address
OPEN = Caller("", EVERY_TENANT, frozenset(("predict", "manage")))
# of a server without keys that others reach, too
PUBLIC = Caller("", EVERY_TENANT, frozenset(("predict",)))


class Keys:
    """The keys of a file, which is read again when it changes; one that is wrong changes nothing.

    Args:
        path: of the file.

    Raises:
        UserError: the file cannot be read, or has another form.
    """

    def __init__(self, path: Path):
        self._path = path
        self._stamp = self._stamp_now()
        self._callers = read_keys(path)
        self._looked = time.monotonic()
        self._buckets: dict[str, _Bucket] = {}

    def find(self, key: str) -> Caller | None:
        """Who has this key; None: nobody."""
        self._look()
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for known, caller in self._callers.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def take(self, caller: Caller, rows: int) -> float:
        """Count rows of a key. Seconds until they may come; 0: they may come now."""
        most = caller.limits.rows_per_minute
        if most is None:
            return 0.0
        bucket = self._buckets.setdefault(caller.id, _Bucket(float(most), time.monotonic()))
        return bucket.take(rows, most)

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY:
            return
        self._looked = now
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._callers = read_keys(self._path)
        except UserError as error:
            log.error("the keys stay as they were: %s", error)

    def _stamp_now(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


class _Bucket:
    """Rows of a key in the last minute: a bucket that is filled again at a steady rate."""

    def __init__(self, level: float, now: float):
        self.level, self.time = level, now

    def take(self, rows: int, most: int) -> float:
        now = time.monotonic()
        self.level = min(self.level + (now - self.time) * most / 60, most)
        self.time = now
        # a request of more rows than a minute allows waits for a full bucket, and leaves a debt
        missing = min(rows, most) - self.level
        if missing > 0:
            return missing * 60 / most
        self.level -= rows
        return 0.0


def read_keys(path: Path) -> dict[str, Caller]:
    """The callers of a file by the SHA-256 of their keys.

    Raises:
        UserError: the file cannot be read, or has another form.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"The keys {str(path)!r} cannot be read: {error.strerror}.") from None
    values = parse_json(content, path)
    if not isinstance(values, dict) or not values:
        raise UserError(
            f'{path} has no keys; write {{"SHA-256 OF THE KEY": {{"scopes": ["predict"]}}}}.'
        )
    callers: dict[str, Caller] = {}
    for digest, entry in values.items():
        if len(digest) != 64 or set(digest) - {*"0123456789abcdef"}:
            raise UserError(
                f"{path} has the key {digest[:12]!r}..., and a key is written as its SHA-256 in 64 "
                "hex digits: printf %s KEY | sha256sum."
            )
        if not isinstance(entry, dict):
            raise UserError(f"{path}: the entry of {digest[:12]}... is not an object.")
        read = parse(KeyEntry, entry, f"{digest[:12]}.")
        scopes = frozenset(read.scopes)
        callers[digest] = Caller(digest[:12], read.tenant, scopes, read.limits)
    return callers
