"""Tasks: one entry each. Text forms of the paper's tasks: Lester et al. 2021, section 3, which are
T5's own (Raffel et al. 2020, appendix D) without the task names that T5 puts in front.
"""

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxprompt.bank import virtual_ids
from jaxprompt.config import TaskConfig, UserError, parse
from jaxprompt.data.pipeline import Example
from jaxprompt.data.templates import Piece, fill, place_prompt, to_target
from jaxprompt.data.tokenizer import Tokenizer

_BOOLEAN = {"0": "False", "1": "True", "False": "False", "True": "True"}
_GLUE = {"train": "train", "validation": "validation"}
_BUILTIN = {"train": "train", "validation": "validation", "test": "test"}

TASKS: dict[str, dict[str, Any]] = {
    # a dictionary definition -> the kind of thing that it defines (WordNet)
    "supersense": _BUILTIN | {
        "source": "builtin:supersense",
        "template": "{gloss}",
        "labels": ["object", "person", "animal", "plant", "food", "place"],
        "max_input_length": 64,
    },
    # a mail -> ham or spam (SpamAssassin public corpus)
    "spam": _BUILTIN | {
        "source": "builtin:spam",
        "template": "subject: {subject} text: {text}",
        "labels": ["ham", "spam"],
        "metrics": ["accuracy", "macro_f1"],
        "max_input_length": 192,
    },
    "boolq": _GLUE | {
        "source": "hf:aps/super_glue/boolq",
        "template": "passage: {passage} question: {question}",
        "labels": ["False", "True"],
        "label_map": _BOOLEAN,
    },
    "cb": _GLUE | {
        "source": "hf:aps/super_glue/cb",
        "template": "hypothesis: {hypothesis} premise: {premise}",
        "labels": ["entailment", "contradiction", "neutral"],
        "label_map": {"0": "entailment", "1": "contradiction", "2": "neutral"},
        "metrics": ["accuracy", "macro_f1"],
    },
    "rte": _GLUE | {
        "source": "hf:aps/super_glue/rte",
        "template": "hypothesis: {hypothesis} premise: {premise}",
        "labels": ["entailment", "not_entailment"],
        "label_map": {"0": "entailment", "1": "not_entailment"},
    },
    "sst2": _GLUE | {
        "source": "hf:nyu-mll/glue/sst2",
        "template": "sentence: {sentence}",
        "labels": ["negative", "positive"],
        "label_map": {"0": "negative", "1": "positive"},
    },
    "mrpc": _GLUE | {
        "source": "hf:nyu-mll/glue/mrpc",
        "template": "sentence1: {sentence1} sentence2: {sentence2}",
        "labels": ["not_equivalent", "equivalent"],
        "label_map": {"0": "not_equivalent", "1": "equivalent"},
        "metrics": ["f1", "accuracy"],
    },
    "qqp": _GLUE | {
        "source": "hf:nyu-mll/glue/qqp",
        "template": "question1: {question1} question2: {question2}",
        "labels": ["not_duplicate", "duplicate"],
        "label_map": {"0": "not_duplicate", "1": "duplicate"},
        "metrics": ["f1", "accuracy"],
    },
}  # fmt: skip


def resolve_task(task: str | dict[str, Any]) -> TaskConfig:
    """A task by name, or from a mapping; with a known name, the mapping changes that task."""
    values = {"name": task} if isinstance(task, str) else dict(task)
    name = values.get("name")
    if name in TASKS:
        # rows from files replace the entry's source, and with it the splits it names
        entry = TASKS[name]
        if "source" not in values and any(split in values for split in _BUILTIN):
            entry = {k: v for k, v in entry.items() if k not in ("source", *_BUILTIN)}
        values = entry | values
    elif name is not None and "template" not in values:
        close = difflib.get_close_matches(str(name), TASKS, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"known are {', '.join(TASKS)}."
        raise UserError(
            f"Task {name!r} is unknown; {hint} A task of your own is a mapping with a template."
        )
    return parse(TaskConfig, values, "task.")


def tokenize(
    task: TaskConfig,
    rows: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    prompt_length: int,
    vocab_rows: int,
    *,
    prompt: int = 0,
    need_targets: bool = True,
    origin: str | None = None,
) -> list[Example]:
    """Ids of each row, with the virtual tokens of prompt number ``prompt`` in place.

    How input and target end is the tokenizer's matter. Text is cut from its end to
    ``max_input_length`` tokens with what ends it; virtual tokens are never cut. Template and
    separator may name special tokens, as in the marks of a chat; what rows hold stays text.
    A target that is too long is an error: a cut target would be a wrong one. ``origin`` (a file)
    names the rows in errors, which count from 1.
    """
    _check_labels(task, tokenizer)
    pieces = place_prompt(task.template, prompt_length)
    virtual = virtual_ids(vocab_rows, prompt_length, prompt)
    texts = [
        fill(piece.text, row, _where(task, origin, i), tokenizer.plain)
        for i, row in enumerate(rows)
        for piece in pieces if piece.text
    ]  # fmt: skip
    encoded = iter(tokenizer.encode_all(texts, trusted=True))
    ends = tokenizer.start_ids, tokenizer.input_end(task.separator)
    room = task.max_input_length - sum(map(len, ends))
    if room < 0:
        raise UserError(
            f"task.max_input_length is {task.max_input_length}, and the separator "
            f"{task.separator!r} alone has {len(ends[1])} tokens; raise it."
        )
    targets: list[list[int]] = [[]] * len(rows)
    if need_targets:
        targets = tokenizer.encode_targets(target_texts(task, rows, origin), task.separator)
        for number, ids in enumerate(targets):
            if len(ids) > task.max_target_length:
                raise UserError(
                    f"The target in {_where(task, origin, number)} has {len(ids)} tokens with EOS "
                    f"and task.max_target_length is {task.max_target_length}; raise it."
                )
    return [
        Example(
            _join(pieces, encoded, virtual, room, *ends),
            np.array(target, np.int32),
        )
        for target in targets
    ]


def _check_labels(task: TaskConfig, tokenizer: Tokenizer) -> None:
    """Refuse labels that the tokenizer cannot tell apart, or that leave it nothing to say."""
    seen: dict[tuple[int, ...], str] = {}
    labels = task.labels or ()
    for label, ids in zip(labels, tokenizer.encode_targets(labels, task.separator), strict=True):
        if not set(ids) - set(tokenizer.special_ids):
            raise UserError(f"Label {label!r} has no token of this backbone; use another word.")
        other = seen.setdefault(tuple(ids), label)
        if other != label:
            raise UserError(
                f"Labels {other!r} and {label!r} are the same tokens to this backbone; use other "
                "words, with task.label_map to reach them from the data."
            )


def target_texts(
    task: TaskConfig, rows: Sequence[dict[str, Any]], origin: str | None = None
) -> list[str]:
    """The target text of each row: what predictions are compared with."""
    return [to_target(task, row, _where(task, origin, i)) for i, row in enumerate(rows)]


def _where(task: TaskConfig, origin: str | None, number: int) -> str:
    return f"row {number + 1} of {origin or f'task {task.name!r}'}"


def _join(
    pieces: Sequence[Piece], encoded, virtual, room: int, start: list[int], end: list[int]
) -> np.ndarray:
    """Pieces in order; ``start`` stands before the first text, ``end`` closes the input."""
    used, parts = 0, []
    for piece in pieces:
        if piece.text:
            ids = [*start, *(words := next(encoded)[:room])]
            start, room = [], room - len(words)
        else:
            ids = virtual[used : used + piece.virtual]
            used += piece.virtual
        parts.append(np.asarray(ids, np.int32))
    return np.concatenate([*parts, np.array([*start, *end], np.int32)])
