"""From what a client sends to work for the engine, and back to text. No HTTP, no JAX."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.batches import Example
from jaxprompt.data.examples import tokenize
from jaxprompt.data.rows import Row
from jaxprompt.data.targets import label_of
from jaxprompt.data.tasks.rules import apply_rule
from jaxprompt.data.templates import input_columns
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.data.truncation import Truncation, of_task
from jaxprompt.data.verbalizers import content_free_rows, wants_content_free
from jaxprompt.data.virtual_tokens import VirtualTokens, virtual_ids
from jaxprompt.inference.score import PairTokenizer
from jaxprompt.serving.features import feature_ids, text_of
from jaxprompt.serving.version import LabelPlan, Version
from jaxprompt.serving.work import Sampling, Work

NO_IDS = np.zeros(0, np.int32)


class BadInput(UserError):
    """An input that cannot be used; ``number`` is its place in the request, from 0."""

    def __init__(self, number: int, sentence: str):
        super().__init__(sentence)
        self.number = number


class Words(NamedTuple):
    """How a backbone reads text."""

    tokenizer: Tokenizer
    vocab_rows: int  # V, rows of the embedding table: higher ids are virtual tokens


class Asked(NamedTuple):
    """Rows of one version: what the engine computes for each, and what was cut."""

    works: list[Work]
    warnings: list[str]


def answering(version: Version) -> TaskConfig:
    """The task that a version answers. Raises UserError where it has none."""
    task = version.task
    if task is None:
        raise UserError(
            f"The prompt {shown(version.name)} does not say which one task it is for; use "
            "/v1/completions or /v1/score with it."
        )
    if task.decoding == "beam" and version.labels is None:
        raise UserError(
            f"The task {shown(task.name)} of the prompt {shown(version.name)} is decoded with "
            "beams, which a server does not do; use jaxprompt predict, or tune it with "
            "task.decoding=greedy."
        )
    return task


def prediction_works(
    words: Words, version: Version, inputs: Sequence[str | Mapping[str, object]], bare: bool = False
) -> Asked:
    """Work that answers inputs by the task of a version; as many as the task's rule makes.

    Args:
        words: of the backbone.
        version: whose task it is.
        inputs: rows with the columns of the task's template, or texts where it has one column.
        bare: the backbone answers without the prompt.

    Raises:
        UserError: the version answers no task, or an input does not fit it (BadInput).
    """
    task = answering(version)
    rows = [_as_row(task, number, given) for number, given in enumerate(inputs)]
    warnings: list[str] = []

    def note(truncation: Truncation) -> None:
        text = of_task(truncation, task, "inputs")
        if text is not None:
            warnings.append(text)

    virtual = VirtualTokens(words.vocab_rows, 0 if bare else version.length)

    def examples_of(rows: Sequence[Row]) -> list[Example]:
        ruled = apply_rule(task, list(rows), training=False, origin="the inputs")
        return tokenize(
            task, ruled, words.tokenizer, virtual, need_targets=False, origin="the inputs",
            note=note,
        )  # fmt: skip

    try:
        examples = examples_of(rows)
    except UserError as error:
        raise _found(error, rows, examples_of) from None
    settings = None if version.labels else Sampling(task.max_target_length)
    kind = "generate" if version.labels is None else "rank"
    used = None if bare else version.placed
    return Asked(
        [Work(kind, used, example, settings, version.labels) for example in examples], warnings
    )


def content_free_works(words: Words, version: Version, bare: bool = False) -> list[Work]:
    """Work that says what a version answers to nothing, where its task is calibrated by that."""
    task = answering(version)
    if version.labels is None or not wants_content_free(task):
        return []
    virtual = VirtualTokens(words.vocab_rows, 0 if bare else version.length)
    rows = content_free_rows(task)
    examples = tokenize(task, rows, words.tokenizer, virtual, need_targets=False)
    used = None if bare else version.placed
    return [Work("rank", used, example, None, version.labels) for example in examples]


def _as_row(task: TaskConfig, number: int, given: str | Mapping[str, object]) -> Row:
    if not isinstance(given, str):
        return dict(given)
    columns = input_columns(task)
    if len(columns) != 1:
        raise BadInput(
            number,
            f"The input is a text, and the task {shown(task.name)} has the columns "
            f"{', '.join(columns)}; send an object with these.",
        )
    return {columns[0]: given}


def _found(error: UserError, rows: Sequence[Row], make) -> UserError:  # noqa: ANN001
    """The error with the number of the row that it is about, if one row alone has it."""
    if isinstance(error, BadInput):
        return error
    for number, row in enumerate(rows):
        try:
            make([row])
        except UserError as own:
            text = str(error) if len(rows) == 1 else str(own)
            return BadInput(number, text)
    return error


class Pair(NamedTuple):
    """A filled template, and what may follow."""

    input: str
    target: str


def score_works(
    words: Words,
    version: Version | None,
    pairs: Sequence[Pair],
    raw: bool = False,
    max_input_length: int | None = None,
) -> Asked:
    """Work that scores targets given inputs, as ``jaxprompt score`` does."""
    task = None if version is None else version.task
    length = 0 if version is None else version.length
    encoder = PairTokenizer(words.tokenizer, words.vocab_rows, length, task, raw, max_input_length)
    examples, warnings = encoder.encode([pair._asdict() for pair in pairs])
    return Asked([Work("score", version, example) for example in examples], warnings)


def prompt_ids(words: Words, text: str | Sequence[int]) -> list[int]:
    """The ids of what a completion continues: of a text with what begins and ends it.

    Raises:
        UserError: an id is none of the tokenizer's. Such ids may be another client's prompt.
    """
    tokenizer = words.tokenizer
    most = min(tokenizer.ids, words.vocab_rows)
    if isinstance(text, str):
        ids = [*tokenizer.start_ids, *tokenizer.encode(text)]
    else:
        ids = list(text)
        wrong = [id for id in ids if not 0 <= id < most]
        if wrong:
            raise UserError(
                f"The id {wrong[0]} is no token's; ids are from 0 to {most - 1}, see /tokenize."
            )
    if not tokenizer.one_sequence and ids[-1:] != [tokenizer.eos_id]:
        ids.append(tokenizer.eos_id)
    return ids or [tokenizer.eos_id]


def completion_work(
    words: Words, version: Version | None, ids: Sequence[int], settings: Sampling | None
) -> Work:
    """Work that continues ids; without settings, that tells how likely they are."""
    virtual = virtual_ids(words.vocab_rows, 0 if version is None else version.length)
    inputs = np.concatenate([virtual, np.array(ids, np.int32)])
    kind = "echo" if settings is None else "generate"
    return Work(kind, version, Example(inputs, NO_IDS), settings)


def feature_work(words: Words, given: str | Mapping[str, object]) -> Work:
    """Work that finds what the bare backbone makes of an input, for the router.

    The text is that of the values alone: a template would tell which task it is.
    """
    text = given if isinstance(given, str) else text_of(given)
    return Work("features", None, Example(feature_ids(words.tokenizer, text), NO_IDS))


def generated_answer(words: Words, task: TaskConfig, ids: Sequence[int]) -> str:
    """The text that was generated; one that spells a label is that label."""
    text = words.tokenizer.decode(np.array(ids, np.int32))
    return label_of(task, words.tokenizer).get(text, text) if task.labels else text


def text_tokens(words: Words, work: Work) -> int:
    """The tokens of a row's text, without virtual ones."""
    return int((work.example.inputs < words.vocab_rows).sum())


def label_numbers(plan: LabelPlan, scores: np.ndarray, top: int | None) -> list[int]:
    """Which labels are told of: all in their order, or the likeliest, best first."""
    if top is None:
        return list(range(len(plan.labels)))
    return np.argsort(-scores, kind="stable")[:top].tolist()
