"""Tasks: one entry each. Text forms of the paper's tasks: Lester et al. 2021, section 3, which are
T5's own (Raffel et al. 2020, appendix D) without the task names that T5 puts in front. The first of
the metrics selects checkpoints.
"""

import collections
import difflib
import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.schema import TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.batches import Example
from jaxprompt.data.sources import read_rows
from jaxprompt.data.tasks.rules import apply_rule
from jaxprompt.data.templates import Piece, fill, place_prompt, to_target, to_text
from jaxprompt.data.token_cache import Ragged, tokenized
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.data.truncation import Truncation, columns_to_cut, fit
from jaxprompt.data.virtual_tokens import virtual_ids
from jaxprompt.runtime.cache import cache_folder

CACHED_FROM = 20_000  # texts whose ids are kept on disk
CACHE_BYTES = 8 * 2**30

_BOOLEAN = {"0": "False", "1": "True", "False": "False", "True": "True"}
_GLUE = {"train": "train", "validation": "validation"}
_BUILTIN = {"train": "train", "validation": "validation", "test": "test"}


def _labels(*words: str) -> dict[str, Any]:
    """Label words in the order of their numbers in the data."""
    return {"labels": list(words), "label_map": {str(i): word for i, word in enumerate(words)}}


_TRUTH = {"labels": ["False", "True"], "label_map": _BOOLEAN}
_ENTAILED = _labels("entailment", "not_entailment")
_NLI = _labels("entailment", "neutral", "contradiction") | {
    "template": "hypothesis: {hypothesis} premise: {premise}",
}  # fmt: skip
_QA = {
    "template": "question: {question} context: {context}",
    "target": "{answer}",
    "rule": "squad",
    "answers": "answers",
    "metrics": ["token_f1", "exact_match"],
}


def _mrqa(name: str) -> dict[str, Any]:
    """A set that prompts tuned on SQuAD are tested on (Lester et al. 2021, section 5)."""
    return _QA | {"source": f"tfds:mrqa/{name}", "validation": "test"}


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
    # SuperGLUE
    "boolq": _GLUE | _TRUTH | {
        "source": "hf:aps/super_glue/boolq",
        "template": "passage: {passage} question: {question}",
    },
    "cb": _GLUE | _labels("entailment", "contradiction", "neutral") | {
        "source": "hf:aps/super_glue/cb",
        "template": "hypothesis: {hypothesis} premise: {premise}",
        "metrics": ["macro_f1", "accuracy"],
    },
    "copa": _GLUE | _labels("choice1", "choice2") | {
        "source": "hf:aps/super_glue/copa",
        "template": "choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}",
    },
    "multirc": _GLUE | _TRUTH | {
        "source": "hf:aps/super_glue/multirc",
        "rule": "multirc",
        "template": "question: {question} answer: {answer} paragraph: {paragraph}",
        "group": "group",
        "metrics": ["f1", "group_exact_match"],
    },
    "record": _GLUE | {
        "source": "hf:aps/super_glue/record",
        "rule": "record",
        "template": "query: {query} entities: {entities} passage: {passage}",
        "target": "{answer}",
        "answers": "answers",
        # Lester et al. 2021, footnote 7
        "class_labels": ["commonsense", "reasoning", "reading", "comprehension"],
        "metrics": ["token_f1", "exact_match"],
    },
    "rte": _GLUE | _ENTAILED | {
        "source": "hf:aps/super_glue/rte",
        "template": "hypothesis: {hypothesis} premise: {premise}",
    },
    "wic": _GLUE | _TRUTH | {
        "source": "hf:aps/super_glue/wic",
        "template": "sentence1: {sentence1} sentence2: {sentence2} word: {word}",
    },
    "wsc": _GLUE | {
        "source": "hf:aps/super_glue/wsc.fixed",
        "rule": "wsc",
        "template": "{text}",
        "target": "{answer}",
        "answers": "referent",
        "class_labels": ["commonsense", "pronoun", "resolution"],  # footnote 7
        "metrics": ["wsc_accuracy"],
    },
    # GLUE; WNLI is left to WSC, as T5 leaves it
    "cola": _GLUE | _labels("unacceptable", "acceptable") | {
        "source": "hf:nyu-mll/glue/cola",
        "template": "sentence: {sentence}",
        "metrics": ["matthews", "accuracy"],
    },
    "sst2": _GLUE | _labels("negative", "positive") | {
        "source": "hf:nyu-mll/glue/sst2",
        "template": "sentence: {sentence}",
    },
    "mrpc": _GLUE | _labels("not_equivalent", "equivalent") | {
        "source": "hf:nyu-mll/glue/mrpc",
        "template": "sentence1: {sentence1} sentence2: {sentence2}",
        "metrics": ["f1", "accuracy"],
    },
    "qqp": _GLUE | _labels("not_duplicate", "duplicate") | {
        "source": "hf:nyu-mll/glue/qqp",
        "template": "question1: {question1} question2: {question2}",
        "metrics": ["f1", "accuracy"],
    },
    "stsb": _GLUE | {
        "source": "hf:nyu-mll/glue/stsb",
        "rule": "stsb",
        "template": "sentence1: {sentence1} sentence2: {sentence2}",
        "metrics": ["pearson", "spearman"],
        "max_target_length": 8,
    },
    "mnli": _NLI | {
        "source": "hf:nyu-mll/glue/mnli",
        "train": "train",
        "validation": "validation_matched",
    },
    "mnli_mismatched": _NLI | {
        "source": "hf:nyu-mll/glue/mnli",
        "train": "train",
        "validation": "validation_mismatched",
    },
    "qnli": _GLUE | _ENTAILED | {
        "source": "hf:nyu-mll/glue/qnli",
        "template": "question: {question} sentence: {sentence}",
    },
    "glue_rte": _GLUE | _ENTAILED | {
        "source": "hf:nyu-mll/glue/rte",
        "template": "sentence1: {sentence1} sentence2: {sentence2}",
    },
    # questions answered from a text; the six sets after SQuAD are of MRQA, out of its domain
    "squad": _GLUE | _QA | {"source": "hf:rajpurkar/squad"},
    "mrqa_bio_asq": _mrqa("bio_asq"),
    "mrqa_drop": _mrqa("drop"),
    "mrqa_duo_rc": _mrqa("duo_rc"),
    "mrqa_race": _mrqa("race"),
    "mrqa_relation_extraction": _mrqa("relation_extraction"),
    "mrqa_textbook_qa": _mrqa("textbook_qa"),
    # texts to write
    "xsum": _GLUE | {
        "source": "hf:EdinburghNLP/xsum",
        "template": "{document}",
        "target": "{summary}",
        "metrics": ["rouge2", "rouge1", "rougeLsum"],
        "max_target_length": 256,
    },
    "web_nlg": _GLUE | {
        "source": "hf:GEM/web_nlg/en",
        "rule": "web_nlg",
        "template": "{triples}",
        "target": "{target}",
        "answers": "references",
        "metrics": ["bleu"],
        "max_target_length": 256,
    },
}  # fmt: skip

# What T5 put in front of a task's text when it was trained on many at once (Raffel et al. 2020).
# Prompt tuning leaves it out: the prompt says what the task is.
PREFIXES = {name: f"{name} " for name in TASKS if name not in ("supersense", "spam")} | {
    "mnli_mismatched": "mnli ",
    "glue_rte": "rte ",
    "wsc": "wsc: ",
    "xsum": "summarize: ",
    "web_nlg": "",
    **{name: "" for name in TASKS if TASKS[name].get("rule") == "squad"},
}


class Reference(NamedTuple):
    """What a prediction is judged by."""

    text: str  # the target
    answers: tuple[str, ...]  # all texts that are right
    group: Hashable  # rows of one group are right together (MultiRC: the question)


def resolve_task(task: str | dict[str, Any]) -> TaskConfig:
    """A task by name, or from a mapping; with a known name, the mapping changes that task.

    ``prefix: true`` puts T5's name of the task in front of its text, as in "boolq passage: ...".
    """
    if not isinstance(task, str | dict):
        raise UserError(f"A task is {shown(task)}; give a name, or a mapping with a template.")
    values = {"name": task} if isinstance(task, str) else dict(task)
    name, prefix = values.get("name"), values.pop("prefix", False)
    if not isinstance(name, str | None):
        raise UserError(f"task.name is {shown(name)}; give one word, in quotes if it is a number.")
    if not isinstance(prefix, bool) or (prefix and name not in PREFIXES):
        raise UserError(
            f"task.prefix is {shown(prefix)}; it is true or false, and true only for the tasks "
            "that T5 was trained on; write other prefixes into task.template."
        )
    if name in TASKS:
        # rows from files replace the entry's source, and with it the splits it names
        entry = TASKS[name]
        if "source" not in values and any(split in values for split in _BUILTIN):
            entry = {k: v for k, v in entry.items() if k not in ("source", *_BUILTIN)}
        values = entry | values
        if prefix and isinstance(values["template"], str):  # else it is refused below
            values["template"] = PREFIXES[name] + values["template"]
    elif name is not None and "template" not in values:
        close = difflib.get_close_matches(name[:80], TASKS, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"known are {', '.join(TASKS)}."
        raise UserError(
            f"Task {shown(name)} is unknown; {hint} A task of your own is a mapping with a "
            "template."
        )
    found = parse(TaskConfig, values, "task.")
    columns_to_cut(found)
    return found


def class_words(task: TaskConfig) -> list[str]:
    """The words that ``prompt.init=class_labels`` starts from, in order; none is no mistake."""
    return list(task.class_labels or task.labels or ())


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
    note: Callable[[Truncation], None] = lambda truncation: None,
) -> list[Example]:
    """Ids of each row, with the virtual tokens of prompt number ``prompt`` in place.

    How input and target end is the tokenizer's matter. Text is cut to ``max_input_length`` tokens
    with what ends it, first in the columns of ``task.truncate``, then at its end; ``note`` hears of
    what was cut. Virtual tokens are never cut. Template and separator may name special tokens, as
    in the marks of a chat; what rows hold stays text. A target that is too long is an error: a cut
    target would be a wrong one. ``origin`` (a file) names the rows in errors, which count from 1.
    """
    _check_labels(task, tokenizer)
    pieces = place_prompt(task.template, prompt_length)
    virtual = virtual_ids(vocab_rows, prompt_length, prompt)
    encode = partial(_encoded, task, tokenizer, vocab_rows, origin)
    encoded, count = encode(rows, pieces), sum(bool(piece.text) for piece in pieces)
    ends = tokenizer.start_ids, tokenizer.input_end(task.separator)
    room = task.max_input_length - sum(map(len, ends))
    if room < 0:
        raise UserError(
            f"task.max_input_length is {task.max_input_length}, and the separator "
            f"{task.separator!r} alone has {len(ends[1])} tokens; raise it."
        )
    parts = lambda some, pieces: _of_rows(encode(some, pieces), len(some))
    whole = lambda number: [encoded.at(number * count + i) for i in range(count)]
    sizes = np.diff(encoded.starts[::count])
    shortened, truncation = fit(task, rows, sizes, pieces, room, parts, whole)
    note(truncation)
    targets: list[list[int]] = [[]] * len(rows)
    if need_targets:
        wanted = target_texts(task, rows, origin)
        targets = tokenizer.encode_targets(wanted, task.separator)
        for number, ids in enumerate(targets):
            tokenizer.check(ids, vocab_rows, wanted[number])
            if len(ids) > task.max_target_length:
                raise UserError(
                    f"The target in {_where(task, origin, number)} has {len(ids)} tokens with EOS "
                    f"and task.max_target_length is {task.max_target_length}; raise it."
                )
    return [
        Example(
            _join(pieces, iter(shortened.get(number) or whole(number)), virtual, room, *ends),
            np.array(target, np.int32),
        )
        for number, target in enumerate(targets)
    ]


def _encoded(
    task: TaskConfig,
    tokenizer: Tokenizer,
    vocab_rows: int,
    origin: str | None,
    rows: Sequence[dict[str, Any]],
    pieces: Sequence[Piece],
) -> Ragged:
    """Ids of the texts between a row's virtual tokens, row by row."""
    whole = filled(task, rows, pieces, tokenizer, origin)
    texts = [tokenizer.start_of(text, task.max_input_length) for text in whole]
    folder = cache_folder("tokens") if len(texts) >= CACHED_FROM else None
    ids = tokenized(texts, tokenizer, folder, trusted=True, largest=CACHE_BYTES)
    ids.check(vocab_rows, texts, tokenizer)
    return ids


def _of_rows(ids: Ragged, rows: int) -> list[list[np.ndarray]]:
    """The sequences of each row, of which each has as many."""
    count = len(ids) // max(rows, 1)
    return [[ids.at(row * count + i) for i in range(count)] for row in range(rows)]


def filled(
    task: TaskConfig,
    rows: Sequence[dict[str, Any]],
    pieces: Sequence[Piece],
    tokenizer: Tokenizer,
    origin: str | None = None,
) -> list[str]:
    """The texts of each row between its virtual tokens, to be encoded as trusted.

    Only what the template itself says may name special tokens.
    """
    own, between = tokenizer.marked, [piece.text for piece in pieces if piece.text]
    texts = [
        fill(text, row, _where(task, origin, i), tokenizer.plain, own)
        for i, row in enumerate(rows)
        for text in between
    ]
    if not tokenizer.one_sequence:
        return texts
    # the parts of one sequence are parts of one text
    return [t if i % len(between) == 0 else tokenizer.continued(t) for i, t in enumerate(texts)]


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


def read_split(
    task: TaskConfig, split: str, data: str | None = None, *, training: bool = False
) -> Sequence[dict[str, Any]]:
    """Rows of "train", "validation" or "test", as the template wants them; ``data``: of a file.

    ``training``: to be trained on, and not to be answered and judged.
    """
    name = data if data is not None else getattr(task, split)
    if name is None:
        raise UserError(
            f"Task {task.name!r} names no {split} data; give task.{split}, or a file with --data."
        )
    rows = read_rows(task.source if data is None else None, name)
    return apply_rule(task, rows, training=training, origin=name)


def load_rows(task: TaskConfig, split: str, limit: int | None = None) -> Sequence[dict[str, Any]]:
    """Rows of "train", "validation" or "test", evenly spaced where there are more than ``limit``.

    The input of every row is checked, and the target of rows to be trained on. Other rows may lack
    a usable label, as test splits do: they can be answered, and ``references`` refuses them. Where
    the task names a group, whole groups are taken, so that metrics of groups keep their meaning.
    """
    rows, name = read_split(task, split, training=split == "train"), getattr(task, split)
    asked = task if split == "train" else task.model_copy(update={"target": "", "labels": None})
    for number, row in enumerate(rows, 1):
        to_text(asked, row, f"row {number} of {name}")
    if limit is None or limit >= len(rows):
        return rows
    if task.group is None:
        return [rows[i] for i in _spread(len(rows), limit)]
    return _whole_groups(rows, task.group, limit)


def _spread(count: int, chosen: int) -> list[int]:
    """``chosen`` of ``count`` places, from the first to the last, evenly spaced."""
    return np.linspace(0, count - 1, chosen).astype(int).tolist()


def _whole_groups(
    rows: Sequence[dict[str, Any]], column: str, limit: int
) -> Sequence[dict[str, Any]]:
    """The rows of evenly spaced groups: as many as have at most ``limit`` rows, at least one."""
    group_of = [str(row.get(column)) for row in rows]
    sizes = collections.Counter(group_of)
    names, count = list(sizes), min(len(sizes), limit)
    while True:
        chosen = {names[i] for i in _spread(len(names), count)}
        total = sum(sizes[name] for name in chosen)
        if total <= limit or count == 1:
            return [row for row, name in zip(rows, group_of, strict=True) if name in chosen]
        count = max(1, min(count - 1, count * limit // total))


def references(
    task: TaskConfig, rows: Sequence[dict[str, Any]], origin: str | None = None
) -> list[Reference]:
    """What the prediction of each row is judged by."""
    found = []
    for number, text in enumerate(target_texts(task, rows, origin)):
        row, where = rows[number], _where(task, origin, number)
        for column in filter(None, (task.answers, task.group)):
            value = row.get(column)
            if value is None or (isinstance(value, float) and value != value):
                raise UserError(f"{where} has no {column!r}, by which task {task.name!r} judges.")
        _check_judged(task, text, where)
        answers = (text,) if task.answers is None else _answers(task, row, where)
        group = number if task.group is None else str(row[task.group])
        found.append(Reference(text, answers, group))
    return found


def _check_judged(task: TaskConfig, text: str, where: str) -> None:
    """Refuse a reference that the task's metrics cannot mean, such as the mark of no label."""
    hint = "rows without a label can be answered (predict), not judged"
    if "wsc_accuracy" in task.metrics and text not in ("True", "False"):
        raise UserError(f"{where} has the label {shown(text)}; allowed are True and False; {hint}.")
    if {"pearson", "spearman"} & set(task.metrics):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (task.rule == "stsb" and value < 0):
            raise UserError(f"{where} has the label {shown(text)}, which is no score; {hint}.")


def _answers(task: TaskConfig, row: dict[str, Any], where: str) -> tuple[str, ...]:
    """All accepted answers of a row. Raises UserError unless they are a list of texts."""
    value = row[task.answers or ""]
    texts = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(texts, list | tuple) or not texts:
        hint = "; rows of SQuAD's form have the rule 'squad'" * isinstance(texts, dict)
        raise UserError(
            f"{where} has {shown(value)} in {task.answers!r}; give a list of texts{hint}."
        )
    for text in texts:
        if isinstance(text, bool) or not isinstance(text, str | int | float) or text != text:
            raise UserError(
                f"{where} has {shown(text)} among its {task.answers!r}; give a list of texts."
            )
    return tuple(map(str, texts))


def _where(task: TaskConfig, origin: str | None, number: int) -> str:
    return f"row {number + 1} of {origin or f'task {task.name!r}'}"


def _join(
    pieces: Sequence[Piece], encoded, virtual, room: int, start: list[int], end: list[int]
) -> np.ndarray:
    """Pieces in order; ``start`` stands before the first text, ``end`` closes the input."""
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
