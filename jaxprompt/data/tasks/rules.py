"""Row rules: from the rows of a data set to the rows that a task's template can be filled with.

Then the Jinja template of a task, if it has one, adds its texts to each row.

Most tasks need none. A rule is for rows that hold several questions (SuperGLUE's own files), that
are dropped or multiplied in training, or whose text T5 rewrites (Raffel et al. 2020, appendix D;
Lester et al. 2021, section 3, whose data code leaves them as they are). ``task.rule`` names one.
Each rule stands beside the entries of its tasks.
"""

import warnings
from collections.abc import Iterator

from jaxprompt.config.errors import UserError, listed
from jaxprompt.config.schema import JinjaConfig, TaskConfig
from jaxprompt.data.jinja_templates import cut_columns, render, with_texts
from jaxprompt.data.rows import Row, Rows
from jaxprompt.data.tasks import generation, glue, qa, superglue
from jaxprompt.data.tasks.entry import Rule

RULES: dict[str, Rule] = superglue.RULES | qa.RULES | glue.RULES | generation.RULES


class _Counted:
    """Gives out rows and counts them, so that an error can name the row at hand."""

    def __init__(self, rows: Rows):
        self._rows, self.count = rows, 0

    def __iter__(self) -> Iterator[Row]:
        for row in self._rows:
            self.count += 1
            yield row


def apply_rule(task: TaskConfig, rows: Rows, *, training: bool, origin: str | None = None) -> Rows:
    """Rows in the form that the task's template wants, with the texts of ``task.jinja``.

    Rows for which a Jinja template has no text are left out, with a warning.

    Args:
        training: The rows are to be trained on, not to be answered and judged.
        origin: The file or split that errors name.

    Raises:
        UserError: The rule is unknown, a row has another form than it or the Jinja template
            expects, or no row is left.
    """
    origin = origin or f"task {task.name!r}"
    if task.rule is not None:
        rows = _ruled(task, rows, training, origin)
    return rows if task.jinja is None else _rendered(task, task.jinja, rows, training, origin)


def makes_rows(task: TaskConfig) -> bool:
    """Whether ``apply_rule`` may change rows or their number."""
    return task.rule is not None or task.jinja is not None


def _ruled(task: TaskConfig, rows: Rows, training: bool, origin: str) -> Rows:
    if task.rule not in RULES:
        raise UserError(
            f"Task {task.name!r} has the rule {task.rule!r}; known are {', '.join(RULES)}."
        )
    counted = _Counted(rows)
    try:
        made = list(RULES[task.rule](counted, training))
    except UserError as error:
        raise UserError(f"Row {counted.count} of {origin}: {error}") from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        columns = listed(map(repr, rows[counted.count - 1])) if counted.count else "no columns"
        raise UserError(
            f"Row {counted.count} of {origin} is not as the rule {task.rule!r} expects "
            f"({type(error).__name__}: {_short(error)}); it has {columns}."
        ) from None
    if not made and len(rows) > 0:
        raise UserError(f"The rule {task.rule!r} leaves none of the {len(rows)} rows of {origin}.")
    return made


def _rendered(
    task: TaskConfig, jinja: JinjaConfig, rows: Rows, training: bool, origin: str
) -> Rows:
    """The rows for which the Jinja template has texts, with these as columns."""
    made, cut = [], cut_columns(task)
    for number, row in enumerate(rows, 1):
        try:
            texts = render(jinja, row, cut)
        except UserError as error:
            raise UserError(f"Row {number} of {origin}: {error}") from None
        if texts is None:
            continue
        if training and texts.target is None:
            raise UserError(
                f"Row {number} of {origin}: its template makes no target of it, as of a row whose "
                "label is unknown, or is a word where the template counts; such rows can be "
                "answered (predict), not trained on."
            )
        made.append(with_texts(row, texts))
    if not made and len(rows) > 0:
        raise UserError(
            f"The Jinja template of task {task.name!r} makes an input and a target, with ||| "
            f"between them, of none of the {len(rows)} rows of {origin}."
        )
    if len(made) < len(rows):
        warnings.warn(
            f"the Jinja template of task {task.name!r} has no text for {len(rows) - len(made)} of "
            f"the {len(rows)} rows of {origin}; they are left out",
            stacklevel=3,
        )
    return made


def _short(error: Exception) -> str:
    return " ".join(str(error)[:200].split())
