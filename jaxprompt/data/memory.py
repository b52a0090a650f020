"""Rows that a Python program holds: which kinds there are, and the name that a run knows them by.

The name of such rows is the digest of what they hold, as in ``memory:5f1c...``. It stands in the
settings of a run, so that a run which is resumed with other rows is refused like one with other
settings, and a name can never mean other rows.
"""

import datetime
import decimal
import hashlib
import itertools
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Protocol, runtime_checkable

import numpy as np

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.limits import SPLITS
from jaxprompt.data.rows import Indexed, IndexedRows, LazyRows, Row, Rows, plain_value

# values that say the same in every process: what JSON and data frames hold
_PLAIN = (
    str, bytes, bool, int, float, np.generic, decimal.Decimal, uuid.UUID, datetime.date,
    datetime.time, datetime.timedelta, type(None),
)  # fmt: skip


@runtime_checkable
class DataFrame(Protocol):
    """What is used of a pandas data frame; pandas itself is not needed."""

    columns: object

    def astype(self, dtype: type) -> "DataFrame": ...

    def notna(self) -> object: ...

    def where(self, kept: object, other: object) -> "DataFrame": ...

    def to_dict(self, orient: str) -> object: ...


RowsLike = Sequence[Row] | DataFrame | Indexed  # Indexed: a datasets.Dataset
Data = RowsLike | Mapping[str, RowsLike]  # rows, or the rows of each split


def rows_in_memory(rows: object, origin: str | None = None) -> Rows:
    """Rows of any kind as a sequence of mappings from column names to values.

    Args:
        rows: A list of mappings, a pandas data frame or a ``datasets.Dataset``. Missing values of a
            data frame (NaN, NA, NaT) become None.
        origin: What errors call the rows.

    Raises:
        UserError: They are of another kind, or a column has a name that is not text.
    """
    if isinstance(rows, DataFrame):
        rows = rows.astype(object).where(rows.notna(), None).to_dict("records")
    check_rows(rows, origin)
    assert isinstance(rows, Sequence | Iterable)
    if not isinstance(rows, list | tuple):  # a data set on disk is read row by row
        return _PlainRows(IndexedRows(rows))  # pyright: ignore[reportArgumentType]
    return [_plain_row(row) for row in rows]


def _plain_row(row: Row, left_out: Collection[str] = ()) -> Row:
    return {key: plain_value(value) for key, value in row.items() if key not in left_out}


class _PlainRows(LazyRows):
    """Rows that are read when they are asked for, with values of plain Python."""

    def __init__(self, source: Rows, left_out: Collection[str] = ()):
        self._source, self._left_out = source, left_out

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[Row]:
        return (_plain_row(row, self._left_out) for row in self._source)

    def row(self, number: int) -> Row:
        return _plain_row(self._source[number], self._left_out)


def only_plain(rows: Rows, used: Collection[str] | None, origin: str) -> Rows:
    """The rows without the columns that hold objects, such as images, and that nothing uses.

    Args:
        used: The columns that a task uses. None: all.
        origin: What errors call the rows.

    Raises:
        UserError: A used column holds an object. What it says may differ in the next process, so
            that a run could not tell whether it goes on with the same rows.
    """
    left_out: set[str] = set()
    for number, row in enumerate(rows, 1):
        for column, value in row.items():
            if column in left_out or _is_plain(value):
                continue
            if used is None or column in used:
                raise UserError(
                    f"Column {column!r} is {shown(value)} in row {number} of {origin}; give text, "
                    "a number, a date, or a list or mapping of these."
                )
            left_out.add(column)
    if not left_out:
        return rows
    if isinstance(rows, list):
        return [_plain_row(row, left_out) for row in rows]
    return _PlainRows(rows, left_out)


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    return isinstance(value, _PLAIN)


def check_rows(rows: object, origin: str | None = None) -> None:
    """Refuse what is no sequence of mappings from column names to values.

    A string and a mapping are sequences of other things.
    """
    of = f" of {origin}" if origin else ""
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Sized):
        wrong = [rows]
    elif not isinstance(rows, Iterable):
        wrong = [rows]
    else:  # the first row of a data set on disk tells enough
        some = rows if isinstance(rows, list | tuple) else list(itertools.islice(rows, 1))
        wrong = [row for row in some if not isinstance(row, Mapping)]
        names = (name for row in some if isinstance(row, Mapping) for name in row)
        name = next((name for name in names if not isinstance(name, str)), "")
        if name != "" and not wrong:
            raise UserError(
                f"Rows{of} have a column {shown(name)}; names of columns are text: rename it."
            )
    if wrong:
        raise UserError(
            f"Rows{of} are mappings, of column names to values, such as [{{'text': 'a sentence'}}] "
            f"with the columns of the task's template; one is {shown(wrong[0])}."
        )


def splits_in_memory(data: Mapping[str, object]) -> dict[str, Rows]:
    """The rows of each split of a mapping such as ``{"train": rows, "validation": rows}``.

    Splits that are None are left out.

    Raises:
        UserError: A key is no split, or rows are of another kind, or there are none.
    """
    if not data or not data.keys() <= set(SPLITS):
        raise UserError(
            f"data is a mapping with the keys {listed(map(repr, data)) or '(none)'}; give rows, or "
            "a mapping of train, validation and test to rows."
        )
    splits = {
        name: rows_in_memory(data[name], f"the {name} data")
        for name in SPLITS
        if data.get(name) is not None
    }
    for name, rows in splits.items():
        if len(rows) == 0:
            raise UserError(f"The {name} data holds no rows; give some, or leave the split out.")
    return splits


def digest_of(splits: Mapping[str, Rows]) -> str:
    """SHA-256 of all values of all splits. The order of columns does not matter."""
    digest = hashlib.sha256()
    for name, rows in sorted(splits.items()):
        digest.update(f"{name} {len(rows)}\n".encode())
        for row in rows:
            text = repr([(key, plain_value(row[key])) for key in sorted(row)])
            digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
