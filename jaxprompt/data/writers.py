"""Rows with answers as the files that ``sources.py`` reads: JSON lines, CSV, TSV and parquet.

What was computed for hours is never lost to a value that a format cannot hold: that is refused
before the work (``check_rows``), and whatever fails afterwards leaves the answers in another file.
"""

import csv
import io
import json
import math
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from jaxprompt.config.errors import UserError, shown
from jaxprompt.data.rows import LazyRows, Row, Rows
from jaxprompt.runtime.files import write_output

Dump = Callable[[IO[bytes], Rows], None]


class Answered(LazyRows):
    """Rows with their answers, joined one by one, because rows may be read from a file."""

    def __init__(self, rows: Rows, answers: Rows):
        self._rows, self._answers = rows, answers

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> Row:
        return {**self._rows[number], **self._answers[number]}

    def __iter__(self) -> Iterator[Row]:
        return ({**row, **mine} for row, mine in zip(self._rows, self._answers, strict=True))


def format_of(path: Path) -> Dump:
    """The writer of the file's format; JSON lines if its name has no ending."""
    dumps: dict[str, Dump] = {
        "": _dump_jsonl, ".jsonl": _dump_jsonl, ".csv": _dump_csv, ".tsv": _dump_tsv,
        ".parquet": _dump_parquet,
    }  # fmt: skip
    suffix = path.suffix.lower()  # as they are read
    if suffix not in dumps:
        raise UserError(
            f"{str(path)!r} says no format that can be written; let it end in "
            f"{', '.join(filter(None, dumps))}."
        )
    return dumps[suffix]


def check_rows(path: Path, rows: Rows, answer: Row) -> None:
    """Check that rows can be written with answers of this form, before any is answered.

    Raises:
        UserError: a row has a column of the answer's name, or a value that the format cannot hold.
    """
    flat = [*answer, *_flat(answer)]
    for number, row in enumerate(rows, 1):
        taken = [name for name in flat if name in row]
        if taken:
            raise UserError(
                f"Row {number} has a column {taken[0]!r} already, which would be overwritten; "
                "rename it in the input."
            )
    with open(os.devnull, "wb") as nothing:
        format_of(path)(nothing, Answered(rows, [answer] * len(rows)))


def write_rows(path: Path, rows: Rows, held: int | None = None) -> None:
    """Write rows in the format of the file's name. A crash leaves no half file.

    Args:
        held: what ``files.check_output`` returned.

    Raises:
        UserError: the file cannot be written. The error says where the rows are instead.
    """
    dump = format_of(path)
    try:
        write_output(path, lambda file: dump(file, rows), held)
    except Exception as error:  # a full disk, a reader that has gone, a value of an odd type
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(
            f"{str(path)!r} cannot be written ({reason[:200]}); the {len(rows)} rows are in "
            f"{_rescue(path, rows)}, as JSON lines."
        ) from None


def _rescue(path: Path, rows: Rows) -> str:
    """Write the rows to the first folder that can hold them, and return the file."""
    folders = [Path.cwd, lambda: Path(tempfile.gettempdir())]
    if path.is_file() or not path.exists():  # no device among others
        folders.insert(0, lambda: path.absolute().parent)
    for folder in folders:
        place = None
        try:
            place = folder() / f"{path.stem[:40]}-{secrets.token_hex(4)}.jsonl"
            with place.open("xb") as file:
                _dump_jsonl(file, rows)
            return repr(str(place))
        except OSError:
            if place is not None:
                place.unlink(missing_ok=True)
    sys.stdout.flush()
    _dump_jsonl(sys.stdout.buffer, rows)
    sys.stdout.buffer.flush()
    return "standard output"


def _dump_jsonl(file: IO[bytes], rows: Rows) -> None:
    """JSON lines in UTF-8: half a surrogate as an escape, dates and the like as text."""
    for number, row in enumerate(rows, 1):
        try:
            try:
                text = json.dumps(row, ensure_ascii=False, default=str, allow_nan=False)
            except ValueError:  # a float that JSON does not know, or a cycle
                text = json.dumps(_finite(row), ensure_ascii=False, default=str)
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"Row {number} cannot be written as JSON ({error}).") from None
        file.write(text.encode("utf-8", "backslashreplace") + b"\n")


def _finite(value: object) -> object:
    """NaN, a missing value in parquet, becomes null, and an infinite number its name."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
    return value


def _dump_tsv(file: IO[bytes], rows: Rows) -> None:
    _dump_csv(file, rows, "\t")


def _dump_csv(file: IO[bytes], rows: Rows, delimiter: str = ",") -> None:
    """A header and a line for each row. All text is in quotes, so that reading gives it back.

    Scores are columns ``score:LABEL``. A null is an empty cell, as empty text is, and a list or
    mapping its JSON.
    """
    names = list(dict.fromkeys(name for row in rows for name in _flat(row)))
    if not names:  # no rows: an empty file, not a line without cells
        return
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_NONNUMERIC)
    for number, cells in enumerate(_lines(names, rows)):
        try:
            writer.writerow(cells)
            file.write(text.getvalue().encode())
        except UnicodeEncodeError:
            where = f"Row {number}" if number else "The header"
            raise UserError(
                f"{where} has half a surrogate (text that is not Unicode) in "
                f"{shown([cell for cell in cells if not _unicode(cell)])}, which a table cannot "
                "hold; write to .jsonl."
            ) from None
        text.seek(0)
        text.truncate()


def _lines(names: list[str], rows: Rows) -> Iterator[Sequence[object]]:
    if names:
        yield names
    for row in rows:
        flat = _flat(row)
        yield [_cell(flat.get(name)) for name in names]


def _cell(value: object) -> object:
    if value is None:
        return ""
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    if isinstance(value, bool | dict | list | tuple):
        return json.dumps(_finite(value), ensure_ascii=False, default=str)
    return str(value)


def _unicode(value: object) -> bool:
    return str(value).encode("utf-8", "replace") == str(value).encode("utf-8", "surrogatepass")


def _flat(row: Row) -> Row:
    """A row whose scores are columns of their own."""
    scores = row.get("scores")
    if not isinstance(scores, dict):
        return row
    rest = {name: value for name, value in row.items() if name != "scores"}
    return rest | {f"score:{label}": value for label, value in scores.items()}


def _dump_parquet(file: IO[bytes], rows: Rows) -> None:
    import pyarrow
    import pyarrow.parquet

    values: dict[str, list[object]] = {}
    for number, row in enumerate(rows):
        for name, value in row.items():
            column = values.setdefault(name, [])
            column.extend([None] * (number - len(column)))  # of rows without it
            column.append(value)
    columns = {}
    for name, column in values.items():
        column.extend([None] * (len(rows) - len(column)))
        try:
            columns[name] = pyarrow.array(column)
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"Column {name!r} cannot be written as parquet "
                f"({' '.join(str(error).split())[:200]}); write to .jsonl."
            ) from None
    whole = io.BytesIO()  # a FIFO has no position
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), whole)
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        raise UserError(
            f"The rows cannot be written as parquet ({' '.join(str(error).split())[:200]}); write "
            "to .jsonl."
        ) from None
    file.write(whole.getbuffer())
