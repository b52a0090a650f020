"""Tasks: what stands in a data set's rows, and how it becomes text and is judged."""

from jaxprompt.data.tasks.registry import (
    TASKS,
    Reference,
    load_rows,
    references,
    resolve_task,
    tokenize,
)

__all__ = ["TASKS", "Reference", "load_rows", "references", "resolve_task", "tokenize"]
