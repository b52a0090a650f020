"""From a row to text, and to the places of virtual tokens in it.

``"question: {text}"`` puts the whole prompt in front. ``[prompt]`` and ``[prompt:n]`` place virtual
tokens anywhere (p-tuning, Liu et al. 2021, and hybrids of soft and hard prompts):
``"[prompt:10] {text} It was [prompt:2]"``. Braces that are text are doubled: ``{{`` and ``}}``.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxprompt.config import TaskConfig, UserError

_MARKER = re.compile(r"\[prompt(?::(\d+))?\]")
_NEARLY = re.compile(r"\[prompt\b[^\[\]]*\]")
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_BREAK = "\ufdd0"  # a noncharacter: nothing that means more than text begins or goes on here


class Piece(NamedTuple):
    """A part of a template: text with fields, or ``virtual`` tokens (-1: all that are left)."""

    text: str
    virtual: int


@functools.lru_cache(maxsize=64)
def split_template(template: str) -> tuple[Piece, ...]:
    """Pieces of a template in order; without a marker all virtual tokens come first."""
    _check_braces(template)
    for nearly in _NEARLY.findall(template):
        if not _MARKER.fullmatch(nearly):
            raise UserError(f"Template {template!r} has {nearly!r}; write [prompt] or [prompt:10].")
    pieces, end = [], 0
    for marker in _MARKER.finditer(template):
        pieces.append(Piece(template[end : marker.start()], 0))
        pieces.append(Piece("", int(marker[1]) if marker[1] else -1))
        end = marker.end()
    pieces.append(Piece(template[end:], 0))
    if end == 0:
        pieces.insert(0, Piece("", -1))
    if sum(piece.virtual == -1 for piece in pieces) > 1:
        raise UserError(
            f"Template {template!r} has more than one bare [prompt]; write [prompt:n] for the rest."
        )
    return tuple(p for p in pieces if p.text or p.virtual)


def place_prompt(template: str, length: int) -> tuple[Piece, ...]:
    """Pieces with the number of virtual tokens settled so that they add up to ``length``."""
    pieces = split_template(template)
    if length == 0:  # the bare backbone: the text alone
        return tuple(piece for piece in pieces if piece.text)
    fixed = sum(max(piece.virtual, 0) for piece in pieces)
    bare = any(piece.virtual == -1 for piece in pieces)
    if fixed > length or (fixed != length and not bare):
        raise UserError(
            f"Template {template!r} places {fixed} virtual tokens and the prompt has {length}; "
            f"set prompt.length={fixed} or change the markers."
        )
    settled = (p._replace(virtual=length - fixed) if p.virtual == -1 else p for p in pieces)
    return tuple(p for p in settled if p.text or p.virtual)


def columns_of(template: str) -> list[str]:
    """The columns that a template names, each once, in their order.

    >>> columns_of("{{x}} {a} {the b} [prompt] {a}")
    ['a', 'the b']
    """
    return list(dict.fromkeys(match[1] for match in _FIELD.finditer(template) if match[1]))


def fill(
    template: str,
    row: dict[str, Any],
    where: str = "the row",
    escape: Callable[[str], str] = lambda value: value,
    own: Callable[[str], str] = lambda text: text,
) -> str:
    """Replace ``{column}`` by the row's values.

    Each value goes through ``escape``, and what the template itself says through ``own``.
    """

    def value(match: re.Match) -> str:
        if match[1] is None:
            return match[0][0]
        if match[1] not in row:
            raise UserError(
                f"Template {template!r} needs column {match[1]!r}, which {where} lacks; it has "
                f"{', '.join(map(repr, row)) or 'no columns'}."
            )
        if row[match[1]] is None:
            raise UserError(f"Column {match[1]!r} is empty (null) in {where}; fill it or drop it.")
        return escape(str(row[match[1]]))

    _check_braces(template)
    return _FIELD.sub(value, own(template).replace(_BREAK, ""))


def literal(text: str) -> str:
    """A template that says ``text`` and nothing else: no field, no marker, no special token."""
    doubled = ({"{": "{{", "}": "}}"}.get(letter, letter) for letter in text)
    return f"{_BREAK}{_BREAK.join(doubled)}{_BREAK}"


def answered(task: TaskConfig, row: dict[str, Any], where: str = "the row") -> tuple[str, str]:
    """Templates that say the row's input and target; special tokens of the task's own template
    count in them, and markers of virtual tokens are left out.
    """

    def value(match: re.Match) -> str:
        return match[0] if match[1] is None else literal(fill(match[0], row, where))

    pieces = place_prompt(task.template, 0)
    filled = "".join(_FIELD.sub(value, piece.text) for piece in pieces)
    return filled, literal(to_target(task, row, where))


@functools.lru_cache(maxsize=64)
def _check_braces(template: str) -> None:
    if set("{}") & set(_FIELD.sub("", template)):
        raise UserError(
            f"Template {template!r} has a brace without its partner; write {{{{ or }}}} for a "
            "brace that is text."
        )


def to_text(task: TaskConfig, row: dict[str, Any], where: str = "the row") -> tuple[str, str]:
    """Input and target text of a row; markers of virtual tokens are left out of the input."""
    pieces = place_prompt(task.template, 0)
    return "".join(fill(piece.text, row, where) for piece in pieces), to_target(task, row, where)


def to_target(task: TaskConfig, row: dict[str, Any], where: str = "the row") -> str:
    """Target text of a row, mapped to label words and checked against the labels."""
    target = fill(task.target, row, where)
    if task.label_map is not None:
        target = task.label_map.get(target, target)
    if task.labels is not None and target not in task.labels:
        hint = "; rows without a label can be answered (predict), not trained on or judged"
        known = list(task.labels) + [k for k in task.label_map or {} if k not in task.labels]
        raise UserError(
            f"Task {task.name!r}: {where} has the label {target!r}; allowed are "
            f"{', '.join(map(repr, known))}{hint * (target == '-1')}."
        )
    return target
