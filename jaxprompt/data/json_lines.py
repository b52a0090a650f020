"""Rows of a file of JSON lines."""

import json
import math
from pathlib import Path

from jaxprompt.config.errors import UserError, shown
from jaxprompt.data.rows import Row

DEEPEST = 100  # levels of lists and mappings in a row


class _NoRow(Exception):
    """A line of JSON is no row."""


class _Wrong:
    """Stands in place of a value that is valid JSON and cannot be part of a row."""

    def __init__(self, problem: str):
        self.problem = problem


class _JsonLines:
    """Reads rows. ``wrong`` has the values of a line that cannot be part of a row."""

    def __init__(self) -> None:
        self.wrong: list[_Wrong] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def row(self, line: str) -> Row:
        """The row of a line. Raises _NoRow or an error of the decoder if it has none."""
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

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object] | _Wrong:
        mapping = dict(pairs)
        if len(mapping) == len(pairs):
            return mapping
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        return self._note(f"the key {shown(twice)} is given twice in one object")

    def _constant(self, name: str) -> _Wrong | None:
        # NaN is how pandas and json.dumps write what is missing
        return None if name == "NaN" else self._note(f"{name} is no number of JSON")

    def _float(self, text: str) -> float | _Wrong:
        value = float(text)
        return self._note(f"{text[:40]} is too large a number") if math.isinf(value) else value


def _holds(value: object, part: _Wrong) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return value is part or isinstance(value, list) and any(_holds(inner, part) for inner in value)


def _deeper(value: object, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper(part, levels - 1) for part in inner)


def read_jsonl(path: Path) -> list[Row]:
    """The rows of a .jsonl file; UserError names a line that is no row."""
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
