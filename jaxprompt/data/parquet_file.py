"""Rows of a parquet file, all at once or as they are asked for."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.data.rows import LazyRows, Row, Rows, plain_value

if TYPE_CHECKING:
    import pyarrow

LAZY_FROM = 100_000  # rows; a file with more rows is not read at once
BLOCK = 1024  # rows that are then made together


class _ParquetRows(LazyRows):
    """Rows of a parquet file that are made when they are asked for.

    Python's objects take more memory than the file, so only a batch of rows is there at a time.
    Rows asked for in their order are read once; a step back reads the row group again.
    """

    def __init__(self, path: Path):
        import pyarrow.parquet

        self._path = path
        with self._readable():
            self._file = pyarrow.parquet.ParquetFile(path)
            metadata = self._file.metadata
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        if any(size < 0 for size in sizes):
            raise UserError(f"{path} cannot be read as parquet: a row group of {min(sizes)} rows.")
        self._starts = np.cumsum([0, *sizes])
        self._batches, self._next = iter(()), len(self)  # what is read next, from which row on
        self._start, self._rows = 0, []  # of the current batch
        names = self._file.schema_arrow.names
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise UserError(f"{path} has two columns of the same name: {listed(twice)}.")

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError) as error:
            problem = " ".join(str(error).split())[:200]
            raise UserError(f"{self._path} cannot be read as parquet: {problem}") from None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[Row]:
        for start, batch in self._read(0):
            yield from self._rows_of(batch, start)

    def _read(self, group: int) -> "Iterator[tuple[int, pyarrow.RecordBatch]]":
        """Batches from a row group on, each with the number of its first row."""
        start = int(self._starts[group])
        batches = self._file.iter_batches(BLOCK, row_groups=range(group, len(self._starts) - 1))
        while True:
            with self._readable():
                batch = next(batches, None)
            if batch is None:
                break
            yield start, batch
            start += batch.num_rows
        if start != len(self):
            raise UserError(f"{self._path} cannot be read as parquet: it has {start} rows.")

    def row(self, number: int) -> Row:
        if not self._start <= number < self._start + len(self._rows):
            self._load(number)
        return dict(self._rows[number - self._start])

    def _load(self, index: int) -> None:
        """Make the rows of the batch that holds a row."""
        group = self._group(index)
        if index < self._next or group > self._group(self._next):
            self._batches, self._next = self._read(group), int(self._starts[group])
        for start, batch in self._batches:
            self._next = start + batch.num_rows
            if index < self._next:
                self._start, self._rows = start, self._rows_of(batch, start)
                return
        self._next = len(self)
        raise UserError(f"{self._path} cannot be read as parquet: row {index + 1} is missing.")

    def _group(self, index: int) -> int:
        """The row group of a row."""
        return int(np.searchsorted(self._starts, index, "right")) - 1

    def _rows_of(self, batch: "pyarrow.RecordBatch", start: int) -> list[Row]:
        """The rows of an arrow table or batch, the first of which is number ``start`` from 0."""
        columns = []
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                columns.append(_cells(column))
            except _UNREADABLE:
                wrong = (i for i, value in enumerate(column) if not _readable(value))
                row = start + next(wrong, 0)
                raise UserError(
                    f"{self._path}, row {row + 1}, column {shown(name)}: a value of type "
                    f"{str(column.type)[:80]} that cannot be read; store the column as text, or "
                    "leave it out."
                ) from None
        if not columns:
            return [{} for _ in range(batch.num_rows)]
        return [dict(zip(batch.schema.names, cells, strict=True))
                for cells in zip(*columns, strict=True)]  # fmt: skip


# what arrow raises for values that Python cannot hold; its own exceptions are of these too
_UNREADABLE = (ValueError, ArithmeticError, KeyError, TypeError, NotImplementedError)


def _readable(value: "pyarrow.Scalar") -> bool:
    try:
        value.as_py()
    except _UNREADABLE:
        return False
    return True


def _cells(column: "pyarrow.Array") -> list[object]:
    """The values of an arrow column as Python's; _UNREADABLE where it has none for one of them."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_temporal(kind) and getattr(kind, "unit", "") == "ns":
        column = _without_nanoseconds(column)
        kind = column.type
    values = column.to_pylist()
    if pa.types.is_floating(kind):
        if kind.bit_width < 64:
            narrow = np.float32 if kind.bit_width == 32 else np.float16
            return [None if value is None else plain_value(narrow(value)) for value in values]
        return [None if value != value else value for value in values]
    if pa.types.is_nested(kind) or any(isinstance(value, bytes) for value in values):
        return [plain_value(value) for value in values]
    return values


def _without_nanoseconds(column: "pyarrow.Array") -> "pyarrow.Array":
    """Times that Python can hold, else the text of those that it cannot."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_duration(kind):
        wanted = [pa.duration("us")]
    elif pa.types.is_timestamp(kind):
        wanted = [pa.timestamp("us", kind.tz), pa.string()]
    else:
        wanted = [pa.time64("us"), pa.string()]
    for other in wanted:
        try:
            return column.cast(other)
        except pa.ArrowException:
            continue
    return column


def read_parquet(path: Path) -> Rows:
    """All rows of a small parquet file; of a large one they are read when they are asked for."""
    rows = _ParquetRows(path)
    return list(rows) if len(rows) <= LAZY_FROM else rows
