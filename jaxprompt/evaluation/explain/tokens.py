"""Which words of a row the answer depends on: with the prompt, without it, with a random one."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxprompt.data.batches import Example, with_member
from jaxprompt.evaluation.explain.gradients import (
    PathGradients,
    check_words_can_move,
    integrated_gradients,
)
from jaxprompt.evaluation.explain.variants import RANDOM, TUNED, Subject, without


class RowTokens(NamedTuple):
    """The words of a row with their attributions in nats: positive ones speak for its label."""

    row: int
    label: str
    tokens: list[str]
    prompt: Float[np.ndarray, " s"]
    bare: Float[np.ndarray, " s"]
    random: Float[np.ndarray, " s"]


class TokenAttributions(NamedTuple):
    """Attributions of rows.

    agreement: mean cosine of a row's attributions with and without the prompt.
    agreement_random: the same of a random prompt and none.
    gaps, differences: see ``PathGradients``; with the prompt, without, with a random one.
    """

    rows: list[RowTokens]
    agreement: float
    agreement_random: float
    gaps: list[float]
    differences: list[float]
    complete: bool


def token_attributions(subject: Subject, numbers: Sequence[int]) -> TokenAttributions:
    """Integrated gradients of log p of the right label, from the mean word to each word.

    Args:
        subject: whose rows are explained.
        numbers: of the rows in the data, which the result repeats.
    """
    check_words_can_move(subject)
    vocabulary, length = subject.vocabulary, subject.length
    mask = subject.tokenizer.mask_id if subject.tokenizer.masked else -1
    word = lambda ids: (ids < vocabulary) & (ids != mask)
    everything = np.ones(length, bool)
    forms = (
        [with_member(example, TUNED, vocabulary, length) for example in subject.examples],
        [without(example, vocabulary, length, everything) for example in subject.examples],
        [with_member(example, RANDOM, vocabulary, length) for example in subject.examples],
    )
    paths = [integrated_gradients(subject, examples, word) for examples in forms]
    each = [_of_words(path, form, vocabulary) for path, form in zip(paths, forms, strict=True)]
    names = subject.task.labels or []
    rows = [
        RowTokens(
            numbers[i], names[subject.right[i]],
            [subject.tokenizer.token_text(int(id)) for id in forms[1][i].inputs],
            *(values[i] for values in each),
        )
        for i in range(len(subject.examples))
    ]  # fmt: skip
    return TokenAttributions(
        rows,
        float(np.mean([cosine(row.prompt, row.bare) for row in rows])),
        float(np.mean([cosine(row.random, row.bare) for row in rows])),
        [path.gap for path in paths],
        [path.difference for path in paths],
        all(path.complete for path in paths),
    )


def _of_words(
    path: PathGradients, examples: Sequence[Example], vocabulary: int
) -> list[Float[np.ndarray, " s"]]:
    return [
        values[example.inputs < vocabulary]
        for values, example in zip(path.values, examples, strict=True)
    ]


def cosine(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> float:
    """The cosine of two vectors; 0 where one is nothing."""
    size = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / size if size else 0.0
