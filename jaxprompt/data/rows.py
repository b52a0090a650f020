"""A row of a data set, as every part of this package passes it on."""

import operator
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, SupportsIndex, overload, runtime_checkable

import numpy as np

from jaxprompt.config.schema import TaskConfig
from jaxprompt.config.values import Values

Row = Values  # column -> value, which may be anything that a file can hold


@runtime_checkable
class Rows(Protocol):
    """Rows in their order: a list, or rows that are read when they are asked for."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Row]: ...

    def __getitem__(self, index: int, /) -> Row: ...


class LazyRows(Sequence[Row]):
    """Rows that are made when they are asked for, by ``row``."""

    @abstractmethod
    def row(self, number: int) -> Row:
        """Row ``number``, from 0 to the length."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self.row(number) for number in range(*index.indices(len(self)))]
        number = operator.index(index)
        number += len(self) * (number < 0)
        if not 0 <= number < len(self):
            raise IndexError(index)
        return self.row(number)

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(len(self)))


@runtime_checkable
class Indexed(Protocol):
    """A length and a row for each number, as ``datasets.Dataset`` and TFDS have them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class IndexedRows(LazyRows):
    """The rows of a data set of another library, which is no ``Sequence``."""

    def __init__(self, source: Indexed):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._source)  # some libraries read rows in order faster than by number

    def row(self, number: int) -> Row:
        return self._source[number]


def row_name(task: TaskConfig, number: int, origin: str | None = None) -> str:
    """How an error names row ``number`` (from 0) of a file, or else of the task."""
    return f"row {number + 1} of {origin or f'task {task.name!r}'}"


def plain_value(value: object) -> object:
    """A value of a file or an array as a value of plain Python.

    Bytes that are UTF-8 become text, and other bytes stay. NaN becomes None, because writers that
    have no null write NaN instead. A float of few bits becomes the shortest decimal that rounds to
    it.

    >>> plain_value({"a": np.float32(0.1), "b": [b"text", float("nan")]})
    {'a': 0.1, 'b': ['text', None]}
    """
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {key: plain_value(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return plain_value(value[()]) if value.ndim == 0 else [plain_value(v) for v in value]
    if isinstance(value, list):
        return [plain_value(inner) for inner in value]
    if isinstance(value, np.generic):
        short = isinstance(value, np.floating) and value.itemsize < 8
        value = float(str(value)) if short else value.item()
    return None if isinstance(value, float) and value != value else value


def separator_hint(columns: Sequence[str]) -> str:
    """The end of an error about the columns of a table, if its one column looks like several.

    >>> separator_hint(["text;label"])
    "; they look separated by ';', and a .csv file has commas (a .tsv file tabs)"
    """
    if len(columns) != 1:
        return ""
    other = next((sign for sign in (";", "\t", "|", ",") if sign in columns[0]), None)
    if other is None:
        return ""
    return f"; they look separated by {other!r}, and a .csv file has commas (a .tsv file tabs)"
