"""Rows become examples: ids of inputs and targets, with the virtual tokens in place."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.batches import Example
from jaxprompt.data.jinja_templates import rendered_again
from jaxprompt.data.references import target_texts
from jaxprompt.data.rows import Rows, row_name
from jaxprompt.data.templates import (
    Piece,
    columns_of,
    fill,
    first_word,
    place_prompt,
    with_counts,
)
from jaxprompt.data.token_cache import Ragged, tokenized
from jaxprompt.data.tokenizer import MASK, Tokenizer
from jaxprompt.data.truncation import Truncation, fit
from jaxprompt.data.verbalizers import label_words
from jaxprompt.data.virtual_tokens import VirtualTokens, virtual_ids
from jaxprompt.runtime.cache import cache_folder

CACHED_FROM = 20_000  # texts; ids of so many are kept on disk
CACHE_BYTES = 8 * 2**30


def tokenize(
    task: TaskConfig,
    rows: Rows,
    tokenizer: Tokenizer,
    prompt: VirtualTokens,
    *,
    need_targets: bool = True,
    origin: str | None = None,
    note: Callable[[Truncation], None] = lambda truncation: None,
) -> list[Example]:
    """The ids of each row, with the virtual tokens of ``prompt`` in place.

    The tokenizer says how inputs and targets end. Text is cut to ``max_input_length`` tokens with
    that end: first in the columns of ``task.truncate``, then at the end of the text. Virtual tokens
    are never cut. Template and separator may name special tokens, as in the marks of a chat; what
    rows hold stays text. A target that is too long is an error: a cut target would be a wrong one.

    Args:
        need_targets: False leaves targets empty; the rows need no labels then.
        origin: The file that errors name. Rows count from 1 in them.
        note: is called once with the number of rows that were cut.

    Raises:
        UserError: A row lacks a column, a label or target does not fit the tokenizer or the limits.
    """
    if tokenizer.masked:
        task = _with_mask(task, tokenizer)
    check_labels(task, tokenizer)
    pieces = place_prompt(with_counts(task.template, tokenizer.encode), prompt.length)
    encoder = _Encoder(task, tokenizer, prompt.vocab_rows, origin)
    encoded, count = encoder.encode(rows, pieces), sum(bool(piece.text) for piece in pieces)
    start, end = tokenizer.start_ids, tokenizer.input_end(task.separator)
    room = task.max_input_length - len(start) - len(end)
    if room < 0:
        raise UserError(
            f"task.max_input_length is {task.max_input_length}, and the separator "
            f"{task.separator!r} alone has {len(end)} tokens; raise it."
        )
    whole = lambda number: [encoded.at(number * count + i) for i in range(count)]
    sizes = np.diff(encoded.starts[::count])
    shortened, truncation = fit(task, rows, sizes, pieces, room, encoder.encode_rows, whole)
    note(truncation)
    targets = (
        _target_ids(task, rows, tokenizer, prompt.vocab_rows, origin) if need_targets else None
    )
    virtual = virtual_ids(*prompt)
    examples = [
        Example(
            _join(pieces, iter(shortened.get(number) or whole(number)), virtual, room, start, end),
            np.array([] if targets is None else targets[number], np.int32),
        )
        for number in range(len(rows))
    ]
    if tokenizer.masked:
        _check_masks(task, examples, tokenizer)
    return examples


def _with_mask(task: TaskConfig, tokenizer: Tokenizer) -> TaskConfig:
    """The task as an encoder with a mask reads it: long columns are cut, and never the mask.

    Raises:
        UserError: the task wants text, or its template has no mask or several.
    """
    if task.labels is None or task.decoding != "rank":
        raise UserError(
            f"Task {shown(task.name)} has its answers generated, and this backbone, an encoder "
            "with a mask, only chooses from labels; set task.labels with decoding: rank, or use a "
            "T5 or a decoder-only model."
        )
    if tokenizer.num_masks(task.template) != 1:
        raise UserError(
            f"Template {shown(task.template)} has {tokenizer.num_masks(task.template) or 'no'} "
            f"{MASK}, and an encoder with a mask answers at one; write it once in task.template, "
            f"as in '{{text}} It was {MASK}.'."
        )
    columns = task.truncate or columns_of(task.template)
    return task.model_copy(update={"truncate": columns})


def _check_masks(task: TaskConfig, examples: Sequence[Example], tokenizer: Tokenizer) -> None:
    """Raise UserError where a row has lost its mask."""
    for number, example in enumerate(examples):
        if np.count_nonzero(example.inputs == tokenizer.mask_id) != 1:
            raise UserError(
                f"The {MASK} of {row_name(task, number)} is beyond task.max_input_length, "
                f"{task.max_input_length} tokens; raise it, or name all long columns in "
                "task.truncate."
            )


class _Encoder(NamedTuple):
    """Encodes the texts between the virtual tokens of a task's rows."""

    task: TaskConfig
    tokenizer: Tokenizer
    vocab_rows: int  # of the embedding table; text with higher ids is refused
    origin: str | None

    def encode(self, rows: Rows, pieces: Sequence[Piece]) -> Ragged:
        """The ids of all texts, row by row."""
        task, tokenizer = self.task, self.tokenizer
        marked = filled(task, rows, pieces, tokenizer, self.origin)
        texts = [tokenizer.start_of(text, task.max_input_length) for text in marked]
        folder = cache_folder("tokens") if len(texts) >= CACHED_FROM else None
        ids = tokenized(texts, tokenizer, folder, trusted=True, largest=CACHE_BYTES)
        ids.check(self.vocab_rows, texts, tokenizer)
        return ids

    def encode_rows(self, rows: Rows, pieces: Sequence[Piece]) -> list[list[np.ndarray]]:
        """For each row the ids of each of its texts, after its columns have been shortened."""
        ids = self.encode(rendered_again(self.task, rows), pieces)
        count = len(ids) // max(len(rows), 1)
        return [[ids.at(row * count + i) for i in range(count)] for row in range(len(rows))]


def _target_ids(
    task: TaskConfig, rows: Rows, tokenizer: Tokenizer, vocab_rows: int, origin: str | None
) -> list[list[int]]:
    """The ids of each row's target. Raises UserError where one is too long."""
    texts = [first_word(task, text) for text in target_texts(task, rows, origin)]
    targets = tokenizer.encode_targets(texts, task.separator)
    for number, ids in enumerate(targets):
        tokenizer.check(ids, vocab_rows, texts[number])
        if len(ids) > task.max_target_length:
            raise UserError(
                f"The target in {row_name(task, number, origin)} has {len(ids)} tokens with EOS "
                f"and task.max_target_length is {task.max_target_length}; raise it."
            )
    return targets


def filled(
    task: TaskConfig,
    rows: Rows,
    pieces: Sequence[Piece],
    tokenizer: Tokenizer,
    origin: str | None = None,
) -> list[str]:
    """The texts of each row between its virtual tokens, marked for ``encode_all(trusted=True)``.

    Special tokens count where the template itself names them; in a row's values they are text.
    """
    templates = [piece.text for piece in pieces if piece.text]
    texts = [
        fill(template, row, row_name(task, number, origin), tokenizer.plain, tokenizer.marked)
        for number, row in enumerate(rows)
        for template in templates
    ]
    if not tokenizer.one_sequence:
        return texts
    # the parts of one sequence are parts of one text
    count = len(templates)
    return [t if i % count == 0 else tokenizer.continued(t) for i, t in enumerate(texts)]


def check_labels(task: TaskConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError for a label without tokens of its own, and for two with the same tokens."""
    label_of_ids: dict[tuple[int, ...], str] = {}
    labels = label_words(task).texts
    for label, ids in zip(labels, tokenizer.encode_targets(labels, task.separator), strict=True):
        if not set(ids) - set(tokenizer.special_ids):
            raise UserError(f"Label {label!r} has no token of this backbone; use another word.")
        other = label_of_ids.setdefault(tuple(ids), label)
        if other != label:
            raise UserError(
                f"Labels {other!r} and {label!r} are the same tokens to this backbone; use other "
                "words, with task.label_map to reach them from the data."
            )


def _join(
    pieces: Sequence[Piece],
    encoded: Iterator[Sequence[int] | np.ndarray],
    virtual: np.ndarray,
    room: int,
    start: list[int],
    end: list[int],
) -> np.ndarray:
    """The ids of an input: pieces in order, ``start`` before the first text, ``end`` at the end."""
    used, parts = 0, []
    for piece in pieces:
        if piece.text:
            words = next(encoded)[:room]
            parts += [start, words]
            start, room = [], room - len(words)
        else:
            parts.append(virtual[used : used + piece.virtual])
            used += piece.virtual
    return np.concatenate([np.asarray(part, np.int32) for part in (*parts, start, end)])
