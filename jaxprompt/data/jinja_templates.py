"""Jinja templates: one template makes the input and the target of a row.

    {{premise}} Does it follow that "{{hypothesis}}"? ||| {{answer_choices[label]}}

is the form of PromptSource (Bach et al. 2022, arXiv 2202.01279): ``|||`` stands between input and
target, and ``answer_choices`` is a list that a template of its own makes. A row for which there is
no ``|||`` is none of the template's. The texts become columns of the row, ``rendered_input`` and
``rendered_target``, which the task's template and target name.

Jinja's sandbox runs the templates, so that they reach nothing but their row. It does not limit
their time. What a template draws is a function of the row.
"""

import collections
import functools
import hashlib
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, cast

import jinja2
from jinja2 import meta, nodes, sandbox

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.schema import JinjaConfig, TaskConfig
from jaxprompt.data.rows import Row, plain_value

INPUT, TARGET = "rendered_input", "rendered_target"
SEPARATOR = "|||"
MOST_CHARACTERS = 2_000_000  # of a rendered row

_CHOICES, _DRAWS = "answer_choices", "_draws"
_PIPE = "\ufdd1\ufdd1\ufdd1"  # noncharacters: the separator where a row's values have it


class Texts(NamedTuple):
    """What a template makes of a row."""

    input: str
    target: str | None  # None: the template leaves it empty, or the row has no label


class _Missing(jinja2.StrictUndefined):
    """A column that a row lacks. A template may ask whether it is defined, and nothing else."""

    __slots__ = ()

    def __index__(self) -> int:  # of a list; Jinja would take any other error for a missing item
        self._fail_with_undefined_error()


class _Program(NamedTuple):
    """A compiled template."""

    text: jinja2.Template
    choices: jinja2.Template | None
    columns: tuple[str, ...]  # all that it names
    input_columns: tuple[str, ...]  # those that it names before the target
    draws: bool


def render(jinja: JinjaConfig, row: Row, cut: Collection[str] = ()) -> Texts | None:
    """The texts of a row; None where the template has none for it.

    Args:
        cut: columns that may have been shortened; what is drawn does not depend on them.

    Raises:
        UserError: the row lacks a column of the input, or the template fails.
    """
    program = _compiled(jinja.text, jinja.answer_choices)
    values = {
        name: _protected(plain_value(row[name])) if name in row else _Missing(name=name)
        for name in program.columns
    }
    kept = [name for name in program.input_columns if name in row and name not in cut]
    seed = repr([(name, values[name]) for name in kept]) if program.draws else ""
    values[_DRAWS] = random.Random(hashlib.sha256(seed.encode("utf-8", "replace")).digest())
    values[_CHOICES] = None
    if program.choices is not None:
        values[_CHOICES] = _split(_run(program.choices, values, row)[0])
    text, complete = _run(program.text, values, row, may_lack_target=True)
    parts = _split(text)
    if not complete:
        parts = [parts[0], ""]
    return Texts(parts[0], parts[1] or None) if len(parts) == 2 else None


def with_texts(row: Row, texts: Texts) -> Row:
    """The row with the texts as columns."""
    return {**row, INPUT: texts.input, TARGET: texts.target}


def rendered_again(task: TaskConfig, rows: Iterable[Row]) -> list[Row]:
    """Rows of which columns have been shortened, with the inputs that they have now."""
    if task.jinja is None:
        return list(rows)
    cut = cut_columns(task)
    each = [(row, render(task.jinja, row, cut)) for row in rows]
    return [{**row, INPUT: "" if texts is None else texts.input} for row, texts in each]


def cut_columns(task: TaskConfig) -> list[str]:
    """The names in ``task.truncate``."""
    return [task.truncate] if isinstance(task.truncate, str) else list(task.truncate or ())


def columns_of_jinja(jinja: JinjaConfig, *, all_of_them: bool = False) -> list[str]:
    """The columns that the input needs, in order, or all that the template names.

    Raises:
        UserError: it is no Jinja.
    """
    program = _compiled(jinja.text, jinja.answer_choices)
    return list(program.columns if all_of_them else program.input_columns)


def fixed_choices(answer_choices: str | None) -> list[str] | None:
    """The answers that every row chooses from; None where there are none, or rows have their own.

    >>> fixed_choices("yes ||| no"), fixed_choices("{{ choice1 }} ||| {{ choice2 }}")
    (['yes', 'no'], None)
    """
    if answer_choices is None or _compiled(answer_choices, None).columns:
        return None
    return _split(_run(_compiled(answer_choices, None).text, {}, {})[0])


def _split(text: str) -> list[str]:
    return [part.replace(_PIPE, SEPARATOR).strip() for part in text.split(SEPARATOR)]


def _protected(value: object) -> object:
    """A value whose texts do not have the separator."""
    if isinstance(value, str):
        return value.replace(SEPARATOR, _PIPE)
    if isinstance(value, list | tuple):
        return [_protected(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _protected(inner) for key, inner in value.items()}
    return value


def _run(
    template: jinja2.Template,
    values: Mapping[str, object],
    row: Row,
    may_lack_target: bool = False,
) -> tuple[str, bool]:
    """The text, and whether it is complete: the row may lack a column of the target alone."""
    chunks, size, separated = [], 0, False
    try:
        for chunk in template.generate(values):
            chunks.append(chunk)
            size += len(chunk)
            separated = separated or SEPARATOR in chunk
            if size > MOST_CHARACTERS:
                raise OverflowError(f"more than {MOST_CHARACTERS:,} characters")
    except jinja2.UndefinedError as error:
        missing = [name for name, value in values.items() if isinstance(value, _Missing)]
        if separated and missing and may_lack_target:
            return "".join(chunks), False
        if missing:
            raise UserError(
                f"its template needs the column {missing[0]!r}, which it lacks; it has "
                f"{listed(map(repr, row)) or 'no columns'}."
            ) from None
        raise _failed(error) from None
    except _FAILURES as error:
        raise _failed(error) from None
    return "".join(chunks), True


# what a template's expressions can raise; the sandbox's own error is one of Jinja's
_FAILURES = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError,
             TypeError, ValueError)  # fmt: skip


def _failed(error: Exception) -> UserError:
    problem = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(f"its template cannot be filled ({problem[:200]}); mend the template.")


@jinja2.pass_context
def _choice(context: jinja2.runtime.Context, items: object) -> object:
    return context[_DRAWS].choice(cast(Sequence[object], items))


def _most_frequent(items: object) -> list[object] | None:
    counts = collections.Counter(cast(Iterable[object], items))
    most = max(counts.values(), default=0)
    return [item for item, count in counts.items() if count == most] or None


@functools.cache
def _environment() -> sandbox.SandboxedEnvironment:
    """The sandbox, with the names that PromptSource adds to Jinja's."""
    environment = sandbox.SandboxedEnvironment()
    environment.globals["zip"] = zip
    environment.filters |= {"choice": _choice, "random": _choice, "most_frequent": _most_frequent}
    return environment


@functools.lru_cache(maxsize=256)
def _compiled(text: str, answer_choices: str | None) -> _Program:
    """Raises UserError where a text is no Jinja."""
    environment = _environment()
    sources = [text] if answer_choices is None else [answer_choices, text]
    try:
        programs = [environment.from_string(source) for source in sources]
        trees = [environment.parse(source) for source in sources]
    except jinja2.TemplateError as error:  # of syntax, or of a filter that is unknown
        raise UserError(
            f"The Jinja template {shown(text)} cannot be read ({' '.join(str(error).split())}); "
            "mend it."
        ) from None
    ahead, behind = _names(trees[-1])
    for tree in trees[:-1]:  # what the answers need, the input may show
        ahead = [*sum(_names(tree), []), *ahead]
    draws = any(
        node.name in ("choice", "random") for tree in trees for node in tree.find_all(nodes.Filter)
    )
    every = tuple(dict.fromkeys([*ahead, *behind]))
    choices = programs[0] if len(programs) > 1 else None
    return _Program(programs[-1], choices, every, tuple(dict.fromkeys(ahead)), draws)


def _names(tree: nodes.Template) -> tuple[list[str], list[str]]:
    """The columns that stand before and behind the first separator, in order."""
    known = {_CHOICES, *_environment().globals}
    columns = meta.find_undeclared_variables(tree) - known
    ahead: list[str] = []
    behind: list[str] = []
    names = ahead
    for node in tree.find_all((nodes.Name, nodes.TemplateData)):
        if isinstance(node, nodes.TemplateData):
            names = behind if SEPARATOR in node.data else names
        elif isinstance(node, nodes.Name) and node.name in columns:
            names.append(node.name)
    return ahead, behind
