"""Rows of a .csv or .tsv file.

Both follow the CSV convention of spreadsheets: a cell wholly in quotes is the text between them,
and quotes inside it are doubled.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from jaxprompt.config.errors import UserError, shown
from jaxprompt.data.rows import Row, separator_hint


class _Record(NamedTuple):
    """Cells of a CSV file that belong together, and the lines that they were read from."""

    first: int  # number of the first of its lines
    lines: list[str]
    cells: list[str]


def _records(path: Path, delimiter: str) -> Iterator[_Record]:
    """The records of a CSV file; a blank line is a record without cells."""
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

    It does if its first and last line, and half of the others, have as many cells as a row, and
    there are no other quotes. In unquoted rows no space follows a separator, unlike the commas of
    prose.
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


def _quote_after_blank(record: _Record, delimiter: str) -> bool:
    """Whether a blank stands before a quoted cell, so that the quotes count as text.

    That is so if the record has other cells when blanks after separators are skipped.
    """
    text = "".join(record.lines)
    if not re.search(rf"(^|{re.escape(delimiter)}) +\"", text):
        return False
    skipping = csv.reader(record.lines, delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        cells = next(skipping)
    except (csv.Error, StopIteration):  # quotes in the middle of a text
        return False
    return cells != [cell.lstrip(" ") for cell in record.cells]


def read_csv(path: Path) -> list[Row]:
    """Rows of a .csv or .tsv file.

    An empty cell is null, because CSV has no other null. In a file of one column, a blank line
    between others is a null.

    Raises:
        UserError: the file is no such table; the error names the line.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows: list[Row] = []
    header: list[str] | None = None
    blank = 0
    for record in _records(path, delimiter):
        if not record.cells:
            blank += 1
            continue
        if header is None:
            header, blank = _header(path, record), 0
            _check_quotes(path, record, header, delimiter)
            continue
        _check_quotes(path, record, header, delimiter)
        if len(record.cells) != len(header):
            raise UserError(
                f"{path}, line {record.first}: {len(record.cells)} cells, and the header has "
                f"{len(header)}; quote cells that contain separators or line breaks"
                f"{separator_hint(header)}."
            )
        if len(header) == 1:
            rows += [{header[0]: None} for _ in range(blank)]
        blank = 0
        rows.append({name: cell or None for name, cell in zip(header, record.cells, strict=True)})
    return rows


def _header(path: Path, record: _Record) -> list[str]:
    header = [record.cells[0].lstrip("\ufeff"), *record.cells[1:]]
    if len(set(header)) != len(header):
        raise UserError(f"{path} has two columns of the same name in {shown(header)}.")
    return header


def _check_quotes(path: Path, record: _Record, header: list[str], delimiter: str) -> None:
    """Raise UserError for quotes that would become text or swallow rows."""
    if _quote_after_blank(record, delimiter):
        raise UserError(
            f"{path}, line {record.first}: a blank stands before the quotes of a cell, and they "
            "would count as text; remove the blank."
        )
    if len(record.cells) == len(header) and _swallows_rows(record, len(header), delimiter):
        last = record.first + len(record.lines) - 1
        raise UserError(
            f"{path}, line {record.first}: a quote opens here and the next one is in line "
            f"{last}, which makes one cell of what looks like {len(record.lines)} rows; double "
            "quotes that are text, and quote their cells, or use .jsonl."
        )
