"""Tasks: what stands in a data set's rows, and how it becomes text and is judged."""

from jaxprompt.data.examples import tokenize
from jaxprompt.data.references import Reference, references
from jaxprompt.data.tasks.registry import TASKS, resolve_task
from jaxprompt.data.tasks.splits import load_rows

__all__ = ["TASKS", "Reference", "load_rows", "references", "resolve_task", "tokenize"]
