"""A row of a data set, as every part of this package passes it on."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxprompt.config.schema import TaskConfig

Row = dict[str, Any]  # column -> value, which may be anything that a file can hold
Rows = Sequence[Row]  # a list, or rows that are read when they are asked for


def row_name(task: TaskConfig, number: int, origin: str | None = None) -> str:
    """How an error names row ``number`` (from 0) of a file, or else of the task."""
    return f"row {number + 1} of {origin or f'task {task.name!r}'}"


def plain_value(value: Any) -> Any:
    """A value as plain Python has it, without what only storage knows.

    Bytes that are UTF-8 become text, and other bytes stay. NaN becomes null, because writers
    without another sign mean that by it. A float of few bits becomes the shortest decimal that it
    stands for.

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
    """For an error about the columns of a table: a lone column that looks like several.

    >>> separator_hint(["text;label"])
    "; they look separated by ';', and a .csv file has commas (a .tsv file tabs)"
    """
    if len(columns) != 1:
        return ""
    other = next((sign for sign in (";", "\t", "|", ",") if sign in columns[0]), None)
    if other is None:
        return ""
    return f"; they look separated by {other!r}, and a .csv file has commas (a .tsv file tabs)"
