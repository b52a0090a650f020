"""From the scores of words to the scores of labels: the words of each label, and calibration.

A verbalizer says which words stand for a label (Schick and Schuetze 2021). A prior says how likely
a model finds each label whatever it reads, and calibration divides by it. All that rank labels
(``inference/predict.py``, ``serving``) use these functions, and no others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.jinja_templates import render, with_texts
from jaxprompt.data.rows import Row
from jaxprompt.data.templates import first_word, input_columns

FEWEST_ROWS = 8  # of which calibration by batch takes the mean


class LabelWords(NamedTuple):
    """The W words that stand for the C labels of a task, those of a label together."""

    texts: tuple[str, ...]
    starts: tuple[int, ...]  # the number of the first word of each label
    pooling: str = "sum"

    @property
    def labels(self) -> Int[np.ndarray, " W"]:
        """The number of each word's label."""
        numbers = np.zeros(len(self.texts), int)
        numbers[list(self.starts[1:])] = 1
        return numbers.cumsum()

    def pooled(self, scores: Float[np.ndarray, "*n W"]) -> Float[np.ndarray, "*n C"]:
        """The scores of labels, from log-likelihoods of their words.

        sum: the log of the sum of a label's likelihoods. mean: that of their mean. max: the highest
        log-likelihood. Labels of one word keep its score.
        """
        if len(self.starts) == len(self.texts):
            return scores
        starts, labels = list(self.starts), self.labels
        highest = np.maximum.reduceat(scores, starts, axis=-1)
        if self.pooling == "max":
            return highest
        total = np.add.reduceat(np.exp(scores - highest[..., labels]), starts, axis=-1)
        if self.pooling == "mean":
            total = total / np.bincount(labels).astype(scores.dtype)
        return highest + np.log(total)


def label_words(task: TaskConfig) -> LabelWords:
    """The words of a task's labels; a label without words in the verbalizer is its own word."""
    each = [words_of(task, label) for label in task.labels or ()]
    starts = np.cumsum([0, *map(len, each)])[:-1].tolist()
    return LabelWords(tuple(word for words in each for word in words), tuple(starts), task.pooling)


def words_of(task: TaskConfig, label: str) -> list[str]:
    """The words that stand for a label."""
    return (task.verbalizer or {}).get(label) or [label]


def first_words(task: TaskConfig) -> list[str]:
    """The text that training writes for each label."""
    return [first_word(task, label) for label in task.labels or ()]


def log_prior(scores: Float[np.ndarray, "n C"]) -> Float[np.ndarray, " C"]:
    """The log of each label's mean probability over rows, of which the labels' add up to 1.

    Contextual calibration takes rows without content (Zhao et al. 2021, section 5), batch
    calibration the rows that are asked (Zhou et al. 2023, arXiv 2309.17249, section 3). Rows whose
    scores are not finite are left out.
    """
    finite = scores[np.isfinite(scores).all(axis=1)]
    if not len(finite):
        return np.full(scores.shape[1], np.nan, scores.dtype)
    log_p = finite - _log_sum(finite, axis=1)[:, None]
    return _log_sum(log_p, axis=0) - np.log(np.float32(len(finite)))


def _log_sum(x: Float[np.ndarray, "*n"], axis: int) -> Float[np.ndarray, "*m"]:
    highest = x.max(axis=axis, keepdims=True)
    return np.squeeze(highest + np.log(np.exp(x - highest).sum(axis=axis, keepdims=True)), axis)


def prior_of(
    task: TaskConfig, scores: Float[np.ndarray, "n C"], content_free: Float[np.ndarray, "m C"]
) -> Float[np.ndarray, " C"] | None:
    """The log prior by which a task's scores are divided; None: they stay as they are.

    Args:
        scores: of the rows that are asked together.
        content_free: of the rows of ``content_free_rows``.

    Raises:
        UserError: too few rows are asked together for their mean to say something.
    """
    if task.label_prior is not None:
        given = [task.label_prior.get(label, 1.0) for label in task.labels or ()]
        return np.log(given).astype(np.float32)
    if task.calibration == "content_free":
        return log_prior(content_free)
    if task.calibration == "batch":
        check_batch(task, len(scores))
        return log_prior(scores)
    return None


def check_batch(task: TaskConfig, count: int) -> None:
    """Raise a UserError where ``count`` rows are too few for calibration by batch."""
    if task.calibration == "batch" and task.label_prior is None and count < FEWEST_ROWS:
        raise UserError(
            "task.calibration is batch, the mean over the rows that are asked together, "
            f"and {count} {'is' if count == 1 else 'are'} fewer than {FEWEST_ROWS}; ask more "
            "together, use content_free, or give task.label_prior."
        )


def wants_content_free(task: TaskConfig) -> bool:
    """Whether the rows of ``content_free_rows`` must be scored."""
    return task.calibration == "content_free" and task.label_prior is None


def content_free_rows(task: TaskConfig) -> Sequence[Row]:
    """Rows that say nothing, in the form that the task's template wants.

    Raises:
        UserError: the task's Jinja template has no text for any of them.
    """
    columns = input_columns(task)
    rows: list[Row] = [dict.fromkeys(columns, text) for text in task.content_free]
    if task.jinja is None:
        return rows
    made = []
    for row in rows:
        try:
            texts = render(task.jinja, row)
        except UserError:  # such as a list that it looks for a place in
            continue
        if texts is not None:
            made.append(with_texts(row, texts))
    if not made:
        raise UserError(
            f"task.calibration is content_free, and the Jinja template of task {task.name!r} has "
            "no text for rows without content; use batch, or give task.label_prior."
        )
    return made
