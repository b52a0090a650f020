"""What a checkpoint says of itself: JSON files, and typed values of theirs within their bounds.

Files come from anywhere, so nothing in them is trusted. Each function here returns a value of the
right type in the right range, or raises UserError with the file, the key, the value and what is
allowed. ``told`` is the last line of defence: it turns what damage can still raise into a sentence.
"""

import contextlib
import json
import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprompt.config.errors import UserError, listed, shown

MOST = 2**31 - 1  # what fits the index of an array
MOST_LAYERS = 10_000

# what parsers, NumPy and our own code raise when a file is not what it should be
_DAMAGE = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(RecursionError, MemoryError, BufferError, EOFError, StopIteration, struct.error),
)


@contextlib.contextmanager
def told(where: str | Path, what: str) -> Iterator[None]:
    """Raise UserError in place of what a damaged file can make the block raise.

    where: the file or folder; what: the sentence's end, such as "cannot be read as a model".
    """
    try:
        yield
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{where} {what}: there is not enough memory for it") from error
    except _DAMAGE as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"{where} {what} ({type(error).__name__}: {detail}); it may be damaged, download it "
            "again"
        ) from error


def parse_json(text: str | bytes, where: str | Path) -> Any:
    """A JSON value; UserError where the text is none, nests too deep or names a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = counts.most_common(1)[0][0]
            raise UserError(f"{where} names the key {shown(twice)} twice; keep one of them")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"{where} is not valid JSON: it nests too deep") from error
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {str(error)[:200]}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError where there is none."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    value = parse_json(text, path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def read_size(
    where: str | Path,
    raw: Mapping[str, Any],
    key: str,
    default: int | None = None,
    *,
    most: int = MOST,
) -> int:
    """A whole number from 1 to ``most``; an absent or null one is the default."""
    value = raw.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: {key} is {shown(value)}, expected a whole number above 0")
    if value > most:
        raise UserError(f"{where}: {key} is {shown(value)}, expected a whole number up to {most:,}")
    return value


def read_id(where: str | Path, raw: Mapping[str, Any], key: str, default: int, *, rows: int) -> int:
    """The id of a token, the first where the file lists several; one of ``rows`` of the table."""
    value = raw.get(key)
    if isinstance(value, list) and value:
        value = value[0]
    elif isinstance(value, list) or value is None:
        value = default
    if type(value) is not int or not 0 <= value < rows:
        raise UserError(
            f"{where}: {key} is {shown(value)}, expected the id of a token, a whole number from 0 "
            f"to {rows - 1}"
        )
    return value


def read_number(
    where: str | Path,
    raw: Mapping[str, Any],
    key: str,
    default: float | None = None,
    *,
    least: float = 0.0,
    most: float = math.inf,
) -> float:
    """A finite number above or equal to ``least``, and at most ``most``."""
    value: Any = raw.get(key)
    value = default if value is None else value
    # neither NaN, nor what float32 has no number for
    if type(value) not in (int, float) or not least <= value <= min(most, 1e30):
        top = "" if most == math.inf else f" and at most {most:g}"
        raise UserError(
            f"{where}: {key} is {shown(value)}, expected a number of at least {least:g}{top}"
        )
    return float(value)


def read_epsilon(
    where: str | Path, raw: Mapping[str, Any], key: str, default: float | None
) -> float:
    """What a norm adds to the mean square: a small number, never negative."""
    return read_number(where, raw, key, default, most=1.0)


def read_choice(
    where: str | Path,
    raw: Mapping[str, Any],
    key: str,
    choices: Sequence[str] | Mapping[str, Any],
    default: str | None = None,
) -> str:
    """One of the names in ``choices``."""
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, str) or value not in choices:
        raise UserError(
            f"{where}: {key} {shown(value)} is not supported, use one of {listed(choices)}"
        )
    return value


def read_flag(where: str | Path, raw: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false."""
    value = raw.get(key)
    value = default if value is None else value
    if type(value) is not bool:
        raise UserError(f"{where}: {key} is {shown(value)}, expected true or false")
    return value
