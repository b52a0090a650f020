"""Targets as a backbone's vocabulary writes them, for the comparison with free answers.

A tokenizer normalises: "blue " comes back as "blue", and a letter with a combining accent as one
character. So answers are compared with targets that were encoded and decoded too. A character that
the vocabulary lacks comes back as an unknown one, so no answer equals a target that has it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.batches import Example
from jaxprompt.data.references import Reference, references
from jaxprompt.data.rows import Rows
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.data.verbalizers import label_words


class EvalReferences(NamedTuple):
    """References of answers, and a warning for each kind of target that no answer can equal."""

    references: list[Reference]
    warnings: list[str]


def as_written(
    task: TaskConfig, judges: Sequence[Reference], tokenizer: Tokenizer, what: str = "targets"
) -> EvalReferences:
    """The references with their texts after encoding and decoding.

    Label words stay as they are, because an answer that spells a label becomes that label. A text
    with unknown characters stays too, with a warning.

    Args:
        what: the name of the rows in a warning, such as "validation targets".
    """
    if task.labels is not None:
        return EvalReferences(list(judges), [])
    texts = list(dict.fromkeys(text for one in judges for text in (one.text, *one.answers)))
    written, unknown, long = {}, set(), set()
    for text, ids in zip(texts, tokenizer.encode_targets(texts, task.separator), strict=True):
        if tokenizer.unk_id is not None and tokenizer.unk_id in ids:
            unknown.add(text)
        elif len(ids) - 1 > task.max_target_length:  # EOS need not be written
            long.add(text)
        written[text] = text if text in unknown else tokenizer.decode(ids)
    judged = [
        one._replace(text=written[one.text], answers=tuple(written[text] for text in one.answers))
        for one in judges
    ]
    unreachable = [one for one in judges if unknown.issuperset(one.answers)]
    out_of_reach = unknown | long
    cut = [
        one
        for one in judges
        if out_of_reach.issuperset(one.answers) and not unknown.issuperset(one.answers)
    ]
    return EvalReferences(
        judged,
        [
            *_unreachable_warnings(unreachable, len(judged), what),
            *_cut(task, cut, len(judged), what),
        ],
    )


def unknown_targets(
    task: TaskConfig,
    references: Sequence[Reference],
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    what: str,
) -> list[str]:
    """The warning about targets with unknown characters, from ids that are there already."""
    if task.labels is not None or tokenizer.unk_id is None:
        return []
    pairs = zip(references, examples, strict=True)
    unreachable = [one for one, example in pairs if (example.targets == tokenizer.unk_id).any()]
    return _unreachable_warnings(unreachable, len(references), what)


def eval_references(task: TaskConfig, rows: Rows, tokenizer: Tokenizer) -> list[Reference]:
    """What answers to these rows are compared with."""
    return as_written(task, references(task, rows), tokenizer).references


def _unreachable_warnings(unreachable: Sequence[Reference], count: int, what: str) -> list[str]:
    if not unreachable:
        return []
    return [
        f"{len(unreachable)} of {count} {what} have characters that the backbone's vocabulary "
        f"cannot write, such as {unreachable[0].text[:60]!r}; no answer can equal them"
    ]


def _cut(task: TaskConfig, cut: Sequence[Reference], count: int, what: str) -> list[str]:
    if not cut:
        return []
    return [
        f"{len(cut)} of {count} {what} are longer than task.max_target_length, "
        f"{task.max_target_length} tokens, at which answers end; raise it"
    ]


def label_warnings(task: TaskConfig, tokenizer: Tokenizer) -> list[str]:
    """A sentence on label words with unknown characters, and one on blanks that end a label."""
    labels = label_words(task).texts
    ids = tokenizer.encode_targets(labels, task.separator)
    unknown = [label for label, row in zip(labels, ids, strict=True) if tokenizer.unk_id in row]
    blank = [label for label in labels if label != label.rstrip()]
    warnings = []
    if unknown:
        warnings.append(
            f"the backbone's vocabulary lacks characters of the labels {_words(unknown)} and reads "
            "them as unknown; use other words, with task.label_map to reach them from the data"
        )
    if blank:
        warnings.append(
            f"the labels {_words(blank)} end with a blank, which may count in their scores; leave "
            "it out, with task.label_map to reach the label from the data"
        )
    return warnings


def _words(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, labels))[:200]


def label_of(task: TaskConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """The label of each decoded text; a word of a verbalizer is its label.

    Raises:
        UserError: two labels have the same decoded text, or a label is longer than an answer.
    """
    label_of_text: dict[str, str] = {}
    words, labels = label_words(task), list(task.labels or ())
    encoded = tokenizer.encode_targets(words.texts, task.separator)
    for number, word, ids in zip(words.labels, words.texts, encoded, strict=True):
        label = labels[number]
        if len(ids) - 1 > task.max_target_length:
            raise UserError(
                f"Label {word!r} has {len(ids) - 1} tokens, and task.max_target_length, at which "
                f"answers end, is {task.max_target_length}; raise it."
            )
        other = label_of_text.setdefault(tokenizer.decode(ids), label)
        if other != label:
            raise UserError(
                f"Labels {other!r} and {word!r} are the same text to this backbone; use other "
                "words, with task.label_map to reach them from the data."
            )
    return label_of_text
