"""Values of a checkpoint's metadata, checked for type and range.

Files come from anywhere, so nothing in them is trusted. Each ``read_`` function returns a value of
the right type in the right range, or raises UserError with the file, the key, the value and what is
allowed. ``damage_as_user_error`` is the last line of defence: it turns the exceptions that damage
can still cause into a sentence.

Arguments of the ``read_`` functions: the file (``where``), its object (``raw``), the key, and the
value to use if the key is absent or null (``default``).
"""

import contextlib
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jaxprompt.config.errors import UserError, listed, shown

MOST = 2**31 - 1  # what fits the index of an array
MOST_LAYERS = 10_000

# exceptions that damaged files cause in parsers, NumPy and our own code
_DAMAGE = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(RecursionError, MemoryError, BufferError, EOFError, StopIteration, struct.error),
)


@contextlib.contextmanager
def damage_as_user_error(where: str | Path, what: str) -> Iterator[None]:
    """Turn the exceptions that a damaged file can cause in the block into a UserError.

    Args:
        where: the file or folder.
        what: the end of the sentence, such as "cannot be read as a model".
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


def read_size(
    where: str | Path,
    raw: Mapping[str, object],
    key: str,
    default: int | None = None,
    *,
    max_value: int = MOST,
) -> int:
    """A whole number from 1 to ``max_value``."""
    value = raw.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: {key} is {shown(value)}, expected a whole number above 0")
    if value > max_value:
        raise UserError(
            f"{where}: {key} is {shown(value)}, expected a whole number up to {max_value:,}"
        )
    return value


def read_id(
    where: str | Path, raw: Mapping[str, object], key: str, default: int, *, rows: int
) -> int:
    """The id of a token, less than ``rows``; the first one if the file lists several."""
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
    raw: Mapping[str, object],
    key: str,
    default: float | None = None,
    *,
    min_value: float = 0.0,
    max_value: float = math.inf,
) -> float:
    """A finite number above or equal to ``min_value``, and at most ``max_value``."""
    value = raw.get(key)
    value = default if value is None else value
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300:
        number = float(value)
    if not min_value <= number <= min(max_value, 1e30):  # neither NaN nor a number beyond float32
        top = "" if max_value == math.inf else f" and at most {max_value:g}"
        raise UserError(
            f"{where}: {key} is {shown(value)}, expected a number of at least {min_value:g}{top}"
        )
    return number


def read_epsilon(
    where: str | Path, raw: Mapping[str, object], key: str, default: float | None
) -> float:
    """The number that a norm adds to the mean square: small, never negative."""
    return read_number(where, raw, key, default, max_value=1.0)


def read_choice(
    where: str | Path,
    raw: Mapping[str, object],
    key: str,
    choices: Sequence[str] | Mapping[str, object],
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


def read_flag(where: str | Path, raw: Mapping[str, object], key: str, default: bool) -> bool:
    """True or false."""
    value = raw.get(key)
    value = default if value is None else value
    if type(value) is not bool:
        raise UserError(f"{where}: {key} is {shown(value)}, expected true or false")
    return value
