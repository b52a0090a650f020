"""Rows by name: packaged sets, local files, Hugging Face datasets, TFDS. A row is a dict."""

import contextlib
import csv
import importlib
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.paths import expanded, looked_in
from jaxprompt.data.rows import Row

DEEPEST = 100  # levels of lists and mappings in a row
LAZY_FROM = 100_000  # rows of a parquet file that are not all made at once
BLOCK = 1024  # of them that are
PACKAGED = Path(__file__).parent.parent / "builtin" / "data"


def read_rows(source: str | None, split: str, *, empty: bool = False) -> Sequence[Row]:
    """Rows of ``split``: a file where ``source`` is None, else a split of the source.

    Sources: ``builtin:NAME``; ``folder:PATH``, whose files are named by splits, as SuperGLUE's own
    ``BoolQ/val.jsonl`` is; ``hf:DATASET[/CONFIG]``, where DATASET may have a namespace, as in
    ``hf:nyu-mll/glue/sst2``; ``tfds:NAME[/CONFIG]``. ``empty``: there may be no rows.
    """
    kind, colon, name = (source or "").partition(":")
    if source is None:
        rows = _read_file(Path(expanded(split)))
    elif kind == "builtin" and colon:
        rows = _read_packaged(name, split)
    elif kind == "folder" and name:
        rows = _read_folder(Path(expanded(name)), split)
    elif kind == "hf" and colon:
        rows = _read_hugging_face(expanded(name), split)
    elif kind == "tfds" and colon:
        rows = _read_tfds(name, split)
    else:
        raise UserError(
            f"Source {shown(source)} is unknown; use builtin:NAME, folder:PATH, "
            "hf:DATASET[/CONFIG], tfds:NAME, or give files in train and validation."
        )
    if len(rows) == 0 and not empty:
        raise UserError(f"{split if source is None else f'{source} {split}'} holds no rows.")
    return rows


def _read_folder(folder: Path, split: str) -> Sequence[Row]:
    if not folder.is_dir():
        raise UserError(f"There is no folder {shown(str(folder))}{looked_in(folder)}.")
    names = (split, "val", "dev") if split == "validation" else (split,)
    for name in names:
        for suffix in _readers():
            if (folder / f"{name}{suffix}").is_file():
                return _read_file(folder / f"{name}{suffix}")
    raise UserError(
        f"{folder} has no file for the split {shown(split)}; it would be called "
        f"{' or '.join(names)}, and end in {', '.join(_readers())}."
    )


def _readers() -> dict[str, Callable[[Path], Sequence[Row]]]:
    """How each kind of file is read."""
    return {
        ".jsonl": _read_jsonl, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet
    }  # fmt: skip


def check_file(path: Path, whose: str = "") -> None:
    """Refuse a data file that is not there, and say where it was looked for."""
    if not path.is_file():
        raise UserError(f"There is no file {shown(str(path))}{whose}{looked_in(path)}.")


def _read_file(path: Path) -> Sequence[Row]:
    readers, suffix = _readers(), path.suffix.lower()
    if suffix not in readers:
        raise UserError(f"File {shown(str(path))} must end in {', '.join(readers)}.")
    check_file(path)
    try:
        return readers[suffix](path)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it to UTF-8.") from None


def _plain(value: Any) -> Any:
    """A value of a row without what only storage knows: bytes that are text are text.

    What is no number is null, as writers mean it that have no other sign for it, and a float of
    few bits is the shortest decimal that it stands for. Bytes that are no UTF-8 stay bytes.
    """
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value[()]) if value.ndim == 0 else [_plain(inner) for inner in value]
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        short = isinstance(value, np.floating) and value.itemsize < 8
        value = float(str(value)) if short else value.item()
    return None if isinstance(value, float) and value != value else value


class _NoRow(Exception):
    """Why a line of JSON is no row."""


class _Wrong:
    """A part of a JSON line that cannot be meant."""

    def __init__(self, problem: str):
        self.problem = problem


class _JsonLines:
    """Reads objects; what is valid JSON and no row is remembered in ``wrong``."""

    def __init__(self) -> None:
        self.wrong: list[_Wrong] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def row(self, line: str) -> Row:
        """The row of a line; _NoRow, or an error of the decoder, says why there is none."""
        self.wrong.clear()
        row = self._decoder.decode(line)
        if self.wrong:
            first, cells = self.wrong[0], row.items() if isinstance(row, dict) else ()
            places = [f"column {shown(key)}: " for key, value in cells if _holds(value, first)]
            raise _NoRow("".join(places[:1]) + first.problem)
        if not isinstance(row, dict):
            raise _NoRow(f"expected an object, found {shown(line.strip()[:40])}")
        if line.count("[") + line.count("{") > DEEPEST:
            for key, value in row.items():
                if _deeper(value, DEEPEST):
                    raise _NoRow(f"column {shown(key)}: nested deeper than {DEEPEST} levels")
        return row

    def _note(self, problem: str) -> _Wrong:
        self.wrong.append(_Wrong(problem))
        return self.wrong[-1]

    def _object(self, pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        return self._note(f"the key {shown(twice)} is given twice in one object")

    def _constant(self, name: str) -> Any:
        # NaN is how pandas and json.dumps write what is missing
        return None if name == "NaN" else self._note(f"{name} is no number of JSON")

    def _float(self, text: str) -> Any:
        value = float(text)
        return self._note(f"{text[:40]} is too large a number") if math.isinf(value) else value


def _holds(value: Any, part: _Wrong) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return value is part or isinstance(value, list) and any(_holds(inner, part) for inner in value)


def _deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper(part, levels - 1) for part in inner)


def _read_jsonl(path: Path) -> list[Row]:
    rows, reader = [], _JsonLines()
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append(reader.row(line))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}, column {error.colno}: not valid JSON ({error.msg}); "
                    "each line is to hold one object."
                ) from None
            except _NoRow as error:
                raise UserError(f"{path}, line {number}: {error}.") from None
            except (ValueError, RecursionError) as error:  # endless digits or brackets
                raise UserError(f"{path}, line {number}: not usable JSON ({error}).") from None
    return rows


class _Record(NamedTuple):
    """Cells of a CSV file that belong together, and the lines that they were read from."""

    first: int  # number of the first of its lines
    lines: list[str]
    cells: list[str]


def _records(path: Path, delimiter: str) -> Iterator[_Record]:
    """The records of a CSV file, blank lines too, which have no cells."""
    read: list[str] = []

    def remembered(lines: Iterable[str]) -> Iterator[str]:
        for number, line in enumerate(lines, 1):
            read.append(line)
            if "\0" in line:
                raise UserError(
                    f"{path}, line {number}: a NUL character, as in UTF-16; convert it to UTF-8."
                )
            yield line

    with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a BOM
        csv.field_size_limit(2**31 - 1)  # texts may be longer than the 128 KiB of old
        # strict: a stray quote is an error, where it would silently swallow the rows up to the next
        reader = csv.reader(remembered(file), delimiter=delimiter, strict=True)
        first = 1
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                runs = f" (its quote runs to line {reader.line_num})" * (len(read) > 1)
                raise UserError(
                    f"{path}, line {first}: {error}{runs}; quote cells that contain quotes and "
                    "double those quotes, or use .jsonl."
                ) from None
            yield _Record(first, read.copy(), cells)
            first += len(read)
            read.clear()


def _swallows_rows(record: _Record, columns: int, delimiter: str) -> bool:
    """Whether a quoted cell over several lines looks like rows between two stray quotes.

    It does where its first and last line and half of the others have the cells of a row, as
    unquoted rows have them (separators without a space behind them, unlike commas of prose), and
    there are no quotes but the two.
    """
    text = "".join(record.lines)
    lines = [line for line in record.lines if line.strip()]
    if len(lines) < 2 or columns < 2 or text.count('"') != 2:
        return False
    spaced = re.compile("(?!)" if delimiter == "\t" else rf"{re.escape(delimiter)}\s")
    inside = text[text.index('"') : text.rindex('"')].split("\n")
    if any(spaced.search(line + "\n") for line in (inside[0], inside[-1])):
        return False
    rows = [line.count(delimiter) == columns - 1 for line in lines]
    return rows[0] and rows[-1] and sum(rows[1:-1]) * 2 >= len(rows) - 2


def _read_csv(path: Path) -> list[Row]:
    """Rows of a .csv or .tsv file. An empty cell is null, as nothing tells them apart.

    A file of one column has a cell, and so a null, in a blank line between others.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows: list[Row] = []
    header: list[str] | None = None
    blank = 0
    for record in _records(path, delimiter):
        cells = record.cells
        if not cells:
            blank += 1
            continue
        if header is None:
            header, blank = [cells[0].lstrip("\ufeff"), *cells[1:]], 0
            if len(set(header)) != len(header):
                raise UserError(f"{path} has two columns of the same name in {shown(header)}.")
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{path}, line {record.first}: {len(cells)} cells, and the header has "
                f"{len(header)}; quote cells that contain separators or line breaks."
            )
        if _swallows_rows(record, len(header), delimiter):
            last = record.first + len(record.lines) - 1
            raise UserError(
                f"{path}, line {record.first}: a quote opens here and the next one is in line "
                f"{last}, which makes one cell of what looks like {len(record.lines)} rows; double "
                "quotes that are text, and quote their cells, or use .jsonl."
            )
        if len(header) == 1:
            rows += [{header[0]: None} for _ in range(blank)]
        blank = 0
        rows.append({name: cell or None for name, cell in zip(header, cells, strict=True)})
    return rows


class _ParquetRows(Sequence[Row]):
    """Rows of a parquet file, made when they are asked for: a file is larger in Python's objects.

    A batch of them is in memory at a time. In their order they are read once; a step back begins
    again with the row group.
    """

    def __init__(self, path: Path):
        import pyarrow.parquet

        self._path = path
        with self._readable():
            self._file = pyarrow.parquet.ParquetFile(path)
            facts = self._file.metadata
            sizes = [facts.row_group(i).num_rows for i in range(facts.num_row_groups)]
        if any(size < 0 for size in sizes):
            raise UserError(f"{path} cannot be read as parquet: a row group of {min(sizes)} rows.")
        self._starts = np.cumsum([0, *sizes])
        self._batches, self._next = iter(()), len(self)  # what is read next, from which row on
        self._start, self._rows = 0, []  # of the batch at hand
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

    def _read(self, group: int) -> Iterator[tuple[int, Any]]:
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

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = operator.index(index)
        index += len(self) * (index < 0)
        if not 0 <= index < len(self):
            raise IndexError(index)
        if not self._start <= index < self._start + len(self._rows):
            self._load(index)
        return dict(self._rows[index - self._start])

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

    def _rows_of(self, batch: Any, start: int) -> list[Row]:
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


def _readable(value: Any) -> bool:
    try:
        value.as_py()
    except _UNREADABLE:
        return False
    return True


def _cells(column: Any) -> list[Any]:
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
            return [None if value is None else _plain(narrow(value)) for value in values]
        return [None if value != value else value for value in values]
    if pa.types.is_nested(kind) or any(isinstance(value, bytes) for value in values):
        return [_plain(value) for value in values]
    return values


def _without_nanoseconds(column: Any) -> Any:
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


def _read_parquet(path: Path) -> Sequence[Row]:
    """Rows of a parquet file: of a small one all, of a large one as they are asked for."""
    rows = _ParquetRows(path)
    return list(rows) if len(rows) <= LAZY_FROM else rows


def _read_packaged(name: str, split: str) -> Sequence[Row]:
    path = PACKAGED / name / f"{split}.parquet"
    if not path.is_file():
        sets = sorted(p.name for p in PACKAGED.iterdir() if p.is_dir())
        raise UserError(
            f"There is no built-in split {name}/{split}; sets are {', '.join(sets)}, with splits "
            "train, validation and test."
        )
    return _read_parquet(path)


def _read_hugging_face(name: str, split: str) -> Sequence[Row]:
    if Path(name).is_dir():  # a folder of files that the library can read
        return _load_dataset([(name, None)], split)
    parts = name.split("/")
    # a lone slash is ambiguous: super_glue/boolq is a configuration, google/boolq is a namespace
    tries: list[tuple[str, str | None]] = (
        [(name, None)] if len(parts) == 1 else [("/".join(parts[:-1]), parts[-1])]
    )
    if len(parts) == 2:
        tries.append((name, None))
    return _load_dataset(tries, split)


def _load_dataset(tries: Sequence[tuple[str, str | None]], split: str) -> Sequence[Row]:
    import datasets

    problems = []
    for dataset, config in tries:
        try:
            loaded = datasets.load_dataset(dataset, config, split=split)
            return loaded  # pyright: ignore[reportReturnType]
        except Exception as error:  # datasets and its hub client raise dozens of unrelated types
            problems.append(" ".join(str(error).split())[:160])
    name = "/".join(filter(None, tries[0]))
    raise UserError(
        f"Hugging Face dataset {name!r}, split {split!r}, cannot be loaded ({problems[0]}); check "
        "the name and the network, or give local files in train and validation."
    )


def _read_tfds(name: str, split: str) -> Sequence[Row]:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import naming, read_only_builder

    try:
        # files first: they need no TensorFlow, and the code of super_glue does even to read them
        plain, options = naming.parse_builder_name_kwargs(name)
        builder = read_only_builder.builder_from_files(str(plain), **options)
        return _Decoded(builder.as_data_source(split))  # pyright: ignore[reportCallIssue]
    except tfds.core.DatasetNotFoundError:
        pass
    except Exception as error:  # TFDS raises many unrelated types
        raise _unreadable(name, split, error) from None
    for group in ("text", "question_answering", "summarization", "translate"):
        # without TensorFlow a data set such as glue is known only once its group is imported
        importlib.import_module(f"tensorflow_datasets.{group}")
    try:
        return _Decoded(tfds.data_source(name, split=split))
    except ImportError as error:
        package = (error.name or "tensorflow").partition(".")[0]
        raise UserError(
            f"TFDS data set {name!r} is not prepared yet, and TFDS needs {package!r} for that; "
            f"run 'pip install {package}', or prepare it elsewhere with 'tfds build {name} "
            "--file_format=array_record' and set TFDS_DATA_DIR to the folder that holds it."
        ) from None
    except Exception as error:
        raise _unreadable(name, split, error) from None


def _unreadable(name: str, split: str, error: Exception) -> UserError:
    # the first line: after it comes a list of all data sets
    problem = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return UserError(
        f"TFDS data set {name!r}, split {split!r}, cannot be read ({problem}); prepare it once "
        f"where TensorFlow is installed with 'tfds build {name} --file_format=array_record', and "
        "set TFDS_DATA_DIR to the folder that holds it."
    )


class _Decoded(Sequence[Row]):
    """A TFDS source whose byte strings are text."""

    def __init__(self, source: Any):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[Row]:
        # Sequence would stop at IndexError, and the source raises ValueError at its end
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        return {key: _plain(value) for key, value in self._source[index].items()}
