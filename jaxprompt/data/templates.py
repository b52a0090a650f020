"""From a row to text, and to the places of virtual tokens in it.

``"question: {text}"`` puts the whole prompt in front. ``[prompt]`` and ``[prompt:n]`` place virtual
tokens anywhere (p-tuning, Liu et al. 2021, and hybrids of soft and hard prompts):
``"[prompt:10] {text} It was [prompt:2]"``. ``[soft:It was]`` stands for as many virtual tokens as
the words have tokens, and these start from the words' own embeddings; ``[prompt:5=It was]`` stands
for five, of which the first start from them. Braces that are text are doubled: ``{{`` and ``}}``.
"""

import datetime
import decimal
import functools
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.jinja_templates import INPUT, TARGET, columns_of_jinja
from jaxprompt.data.rows import Row, separator_hint

_WORDS = r"([^\[\]{}]*[^\[\]{}\s][^\[\]{}]*)"
_MARKER = re.compile(rf"\[prompt(?::([0-9]{{1,6}})(?:={_WORDS})?)?\]|\[soft:{_WORDS}\]")
_SOFT = re.compile(rf"\[soft:{_WORDS}\]")
_NEARLY = re.compile(r"\[(?:prompt\b|soft:)[^\[\]]*\]")
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_BREAK = "\ufdd0"  # a noncharacter: nothing that means more than text begins or goes on here


class Piece(NamedTuple):
    """A part of a template: text with fields, or ``virtual`` tokens.

    -1: all other ones. -2: as many as ``start`` has tokens (``with_counts``).
    """

    text: str
    virtual: int
    start: str = ""  # the words whose embeddings the virtual tokens start from


@functools.lru_cache(maxsize=64)
def split_template(template: str) -> tuple[Piece, ...]:
    """Pieces of a template in order; without a marker all virtual tokens come first."""
    _check_braces(template)
    for nearly in _NEARLY.findall(template):
        if not _MARKER.fullmatch(nearly):
            raise UserError(
                f"Template {shown(template)} has {shown(nearly)}; write [prompt] or [prompt:10], "
                "or with words to start from [soft:It was] or [prompt:10=It was]."
            )
    pieces, end = [], 0
    for marker in _MARKER.finditer(template):
        pieces.append(Piece(template[end : marker.start()], 0))
        count = int(marker[1]) if marker[1] else -2 if marker[3] else -1
        pieces.append(Piece("", count, marker[2] or marker[3] or ""))
        end = marker.end()
    pieces.append(Piece(template[end:], 0))
    if end == 0:
        pieces.insert(0, Piece("", -1))
    if sum(piece.virtual == -1 for piece in pieces) > 1:
        raise UserError(
            f"Template {shown(template)} has more than one bare [prompt]; write [prompt:n] for the "
            "rest."
        )
    return tuple(p for p in pieces if p.text or p.virtual)


def place_prompt(template: str, length: int) -> tuple[Piece, ...]:
    """Pieces with the number of virtual tokens settled so that they add up to ``length``."""
    pieces = split_template(template)
    if length == 0:  # the bare backbone: the text alone
        return tuple(piece for piece in pieces if piece.text)
    if any(piece.virtual == -2 for piece in pieces):
        raise UserError(
            f"Template {shown(template)} has [soft:...], whose tokens are not counted here; write "
            "[prompt:n=...] with their number n."
        )
    fixed = sum(max(piece.virtual, 0) for piece in pieces)
    bare = any(piece.virtual == -1 for piece in pieces)
    if fixed > length or (fixed != length and not bare):
        raise UserError(
            f"Template {shown(template)} places {fixed} virtual tokens and the prompt has "
            f"{length}; set prompt.length={fixed} or change the markers."
        )
    settled = (p._replace(virtual=length - fixed) if p.virtual == -1 else p for p in pieces)
    return tuple(p for p in settled if p.text or p.virtual)


def with_counts(template: str, encode: Callable[[str], Sequence[int]]) -> str:
    """The template with ``[prompt:2=It was]`` where it has ``[soft:It was]``.

    Args:
        encode: the ids of a text, without what begins and ends it.
    """

    def counted(marker: re.Match) -> str:
        count = len(encode(marker[1]))
        if not count:
            raise UserError(
                f"Template {shown(template)} has {shown(marker[0])}, which has no token of this "
                "backbone; use other words."
            )
        return f"[prompt:{count}={marker[1]}]"

    return _SOFT.sub(counted, template)


def unnamed_counts(template: str, encode: Callable[[str], Sequence[int]]) -> str:
    """The template with ``[prompt:2]`` where it has ``[soft:It was]``: it names no words.

    >>> unnamed_counts("[prompt] {a} [prompt:2=It was]", list)
    '[prompt] {a} [prompt:2]'
    """
    named = lambda marker: f"[prompt:{marker[1]}]" if marker[2] else marker[0]
    return _MARKER.sub(named, with_counts(template, encode))


def start_words(template: str, length: int) -> list[tuple[int, int, str]]:
    """The virtual tokens that start from words: first, number of them, and the words.

    Args:
        template: of ``with_counts``.

    >>> start_words("[prompt] {a} [prompt:2=It was]", 5)
    [(3, 2, 'It was')]
    """
    found, used = [], 0
    for piece in place_prompt(template, length):
        if piece.start:
            found.append((used, piece.virtual, piece.start))
        used += piece.virtual
    return found


def columns_of(template: str) -> list[str]:
    """The columns that a template names, in order and without repetition.

    >>> columns_of("{{x}} {a} {the b} [prompt] {a}")
    ['a', 'the b']
    """
    return list(dict.fromkeys(match[1] for match in _FIELD.finditer(template) if match[1]))


def input_columns(task: TaskConfig, *, all_of_jinja: bool = False) -> list[str]:
    """The columns that a row needs for its input, before ``task.jinja`` adds some.

    Args:
        all_of_jinja: with the columns that a Jinja template names in its target alone.
    """
    columns = columns_of(task.template)
    if task.jinja is None:
        return columns
    own = columns_of_jinja(task.jinja, all_of_them=all_of_jinja)
    each = (own if name == INPUT else [name] for name in columns)
    return list(dict.fromkeys(name for names in each for name in names))


def places_of(pieces: Sequence[Piece]) -> list[tuple[str, list[Piece]]]:
    """Each column as often as the pieces name it, with the texts before it.

    >>> places_of([Piece("a: {x} b: {y}", 0)])[1]
    ('y', [Piece(text='a: {x} b:', virtual=0)])
    """
    places, before = [], []
    for piece in pieces:
        for match in _FIELD.finditer(piece.text):
            if match[1] is not None:
                head = piece.text[: match.start()].rstrip()
                places.append((match[1], [*before, *([Piece(head, 0)] if head else [])]))
        if piece.text:
            before.append(piece)
    return places


def fill(
    template: str,
    row: Row,
    where: str = "the row",
    escape: Callable[[str], str] = lambda value: value,
    own: Callable[[str], str] = lambda text: text,
) -> str:
    """Replace ``{column}`` by the row's values.

    Each value goes through ``escape``, and the template's own text through ``own``.
    """
    _check_braces(template)
    value = functools.partial(_at_field, template=template, row=row, where=where, escape=escape)
    return _FIELD.sub(value, own(template).replace(_BREAK, ""))


# not within ``fill``: tests that check annotations would decorate it for each row
def _at_field(
    match: re.Match, template: str, row: Row, where: str, escape: Callable[[str], str]
) -> str:
    """What stands in place of a column in braces, or of a doubled brace."""
    if match[1] is None:
        return match[0][0]
    if not isinstance(row, Mapping):
        raise UserError(
            f"A row maps columns to values, as {{{match[1]!r}: ...}}, and {where} is {shown(row)}."
        )
    if match[1] not in row:
        raise UserError(
            f"Template {shown(template)} needs column {match[1]!r}, which {where} lacks; it "
            f"has {listed(map(repr, row)) or 'no columns'}{separator_hint(list(row))}."
        )
    return escape(as_text(row[match[1]], match[1], where))


def literal(text: str) -> str:
    """A template that says ``text`` and nothing else: no field, no marker, no special token."""
    doubled = ({"{": "{{", "}": "}}"}.get(letter, letter) for letter in text)
    return f"{_BREAK}{_BREAK.join(doubled)}{_BREAK}"


def answered(task: TaskConfig, row: Row, where: str = "the row") -> tuple[str, str]:
    """Templates whose text is the row's input and target.

    Special tokens in the task's own template count. Markers of virtual tokens are left out.
    """

    def value(match: re.Match) -> str:
        return match[0] if match[1] is None else literal(fill(match[0], row, where))

    pieces = place_prompt(task.template, 0)
    filled = "".join(_FIELD.sub(value, piece.text) for piece in pieces)
    return filled, literal(first_word(task, to_target(task, row, where)))


def first_word(task: TaskConfig, target: str) -> str:
    """The text that training writes for a target: the first word of a label in the verbalizer."""
    words = (task.verbalizer or {}).get(target) if task.labels is not None else None
    return words[0] if words else target


def as_text(value: object, column: str, where: str = "the row") -> str:
    """A value of a row as text; UserError for null, lists and the like."""
    if getattr(value, "shape", None) == ():  # of NumPy and its kind
        value = value.item() if isinstance(value, np.ndarray) else value
    if value is None or (isinstance(value, _SINGLE) and value != value):
        raise UserError(f"Column {column!r} is empty (null) in {where}; fill it or drop it.")
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise UserError(
                f"Column {column!r} holds bytes in {where} that are not UTF-8 text "
                f"({shown(value[:20])}); store it as text."
            ) from None
    if isinstance(value, str):
        if _SURROGATE.search(value):
            raise UserError(
                f"Column {column!r} holds half of a surrogate pair in {where}, which "
                "is not Unicode; mend that character."
            )
        return str(value)
    if not isinstance(value, _SINGLE):
        raise UserError(
            f"Column {column!r} is {shown(value)} in {where}, and a template wants text; name a "
            "column of text, or make one."
        )
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    text = str(value)
    if text.lower().lstrip("+-") in ("inf", "infinity"):
        raise UserError(f"Column {column!r} is {text} in {where}, which is no number; mend it.")
    return text


# what has one text, which is str's; a truth value is a number to NumPy and Python
_SINGLE = (int, float, np.number, np.bool_, decimal.Decimal, uuid.UUID, datetime.date,
           datetime.time, datetime.timedelta, np.datetime64, np.timedelta64)  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")


@functools.lru_cache(maxsize=64)
def _check_braces(template: str) -> None:
    if set("{}") & set(_FIELD.sub("", template)):
        raise UserError(
            f"Template {shown(template)} has a brace without its partner; write {{{{ or }}}} for a "
            "brace that is text."
        )


def to_text(task: TaskConfig, row: Row, where: str = "the row") -> tuple[str, str]:
    """Input and target text of a row; markers of virtual tokens are left out of the input."""
    pieces = place_prompt(task.template, 0)
    return "".join(fill(piece.text, row, where) for piece in pieces), to_target(task, row, where)


_NUMBER = re.compile(r"[-+]?[0-9]{1,9}(\.[0-9]{1,9})?")


def to_target(task: TaskConfig, row: Row, where: str = "the row") -> str:
    """Target text of a row, mapped to label words and checked against the labels."""
    if task.jinja is not None and row.get(TARGET, "") is None and TARGET in columns_of(task.target):
        raise UserError(
            f"Task {shown(task.name)}: the Jinja template makes no target of {where}, as of a row "
            "whose label is unknown; such rows can be answered (predict), not trained on or judged."
        )
    target = fill(task.target, row, where)
    if task.label_map is not None:
        target = task.label_map.get(target, target)
    if task.labels is not None and target not in task.labels:
        known = list(task.labels) + [k for k in task.label_map or {} if k not in task.labels]
        hint = ""
        if target == "-1":
            hint = "; rows without a label can be answered (predict), not trained on or judged"
        elif _NUMBER.fullmatch(target):
            hint = (
                f"; task.label_map names the word of a number, as in {{{target!r}: {known[0]!r}}}"
            )
        raise UserError(
            f"Task {shown(task.name)}: {where} has the label {shown(target)}; allowed are "
            f"{listed(map(repr, known))}{hint}."
        )
    return target
