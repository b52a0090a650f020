"""A row of a data set, as every part of this package passes it on."""

from collections.abc import Sequence
from typing import Any

from jaxprompt.config.schema import TaskConfig

Row = dict[str, Any]  # column -> value, which may be anything that a file can hold
Rows = Sequence[Row]  # a list, or rows that are read when they are asked for


def row_name(task: TaskConfig, number: int, origin: str | None = None) -> str:
    """How an error names row ``number`` (from 0) of a file, or else of the task."""
    return f"row {number + 1} of {origin or f'task {task.name!r}'}"
