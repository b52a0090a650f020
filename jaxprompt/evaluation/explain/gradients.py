"""Gradients of an answer with respect to every vector of a row.

Each row is a member of its own: its prompt's vectors, and where asked its words too, become a bank
of its own [R, S, D], whose ids stand where the words stood. So one gradient of the bank has that of
each vector of each row, and the model needs no code for it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprompt.config.errors import UserError
from jaxprompt.data.batches import Batch, Example
from jaxprompt.data.verbalizers import LabelWords, label_words
from jaxprompt.data.virtual_tokens import embed
from jaxprompt.evaluation.explain.variants import Subject, batches, mean_word
from jaxprompt.inference.rank import label_ids, label_log_likelihoods
from jaxprompt.methods.hard_prompt import table_of
from jaxprompt.models import registry
from jaxprompt.models.injection import Injection, Layers, label_rows
from jaxprompt.models.label_tree import LabelTrees, label_holes, label_trees, one_token_each

TOLERANCE = 0.02  # of integrated gradients: the gap, as a share of the mean difference
FEWEST_POINTS, MOST_POINTS = 16, 64
ROWS = 8  # of a batch
Where = Callable[[Int[np.ndarray, "R S"]], Bool[np.ndarray, "R S"]]


class Question(NamedTuple):
    """The labels of a task as arrays: which words stand for which label."""

    trees: LabelTrees
    of_label: Bool[np.ndarray, "C W"]
    lengths: Float[np.ndarray, " W"]  # by which scores are divided


def question_of(subject: Subject) -> tuple[Question, str]:
    """The labels of the task, and how the words of a label are pooled."""
    task, words = subject.task, label_words(subject.task)
    rows, masked = label_rows(subject.engine.injection), subject.tokenizer.masked
    if rows is not None:
        count = rows.bias.shape[1]
        trees = one_token_each(count, masked)
        return Question(trees, np.eye(count, dtype=bool), np.ones(count, np.float32)), "sum"
    ids = label_ids(words.texts, subject.tokenizer, task.separator)
    trees = label_holes(ids) if masked else label_trees(ids)
    lengths = (ids >= 0).sum(axis=1) if task.length_normalized else np.ones(len(ids))
    return Question(trees, _members(words), lengths.astype(np.float32)), words.pooling


def _members(words: LabelWords) -> Bool[np.ndarray, "C W"]:
    return np.arange(len(words.starts))[:, None] == words.labels[None]


def label_log_p(
    params: registry.Params,
    injection: Injection,
    model: registry.Model,
    inputs: Int[Array, "R S"],
    segments: Int[Array, "R S"],
    question: Question,
    pooling: str,
) -> Float[Array, "R C"]:
    """log p of each label, of which a row's add up to 1."""
    scores = label_log_likelihoods(params, injection, model, inputs, segments, question.trees)
    scores = (scores / question.lengths)[:, None]
    inside = jnp.where(question.of_label, scores, -jnp.inf)
    if pooling == "max":
        pooled = jnp.max(inside, axis=-1)
    else:
        pooled = jax.nn.logsumexp(inside, axis=-1)
        if pooling == "mean":
            pooled -= jnp.log(question.of_label.sum(axis=1))
    return jax.nn.log_softmax(pooled, axis=-1)


class _Rows(NamedTuple):
    """A batch whose vectors are a bank of its own."""

    inputs: Int[Array, "R S"]
    segments: Int[Array, "R S"]
    bank: Float[Array, "R S D"]
    right: Int[Array, " R"]


@functools.partial(jax.jit, static_argnames=("model", "pooling"))
def _value_and_gradient(params, layers, model, rows, question, pooling):
    """log p of each row's right label, and its gradient by the row's own vectors."""

    def total(bank):
        injection = Injection(bank, layers)
        log_p = label_log_p(params, injection, model, rows.inputs, rows.segments, question, pooling)
        log_p = jnp.take_along_axis(log_p, rows.right[:, None], axis=1)[:, 0]
        return jnp.sum(log_p), log_p

    (_, log_p), gradient = jax.value_and_grad(total, has_aux=True)(rows.bank)
    return log_p, gradient


def _own_vectors(
    subject: Subject, batch: Batch, right: Int[np.ndarray, " R"], own: Bool[np.ndarray, "R S"]
) -> _Rows:
    """The batch with a bank of its own, whose vectors stand where ``own`` says."""
    params, injection = subject.engine.params, subject.engine.injection
    inputs, segments = jnp.asarray(batch.inputs), jnp.asarray(batch.segments)
    bank = embed(inputs, table_of(params), injection.embeddings).astype(jnp.float32)
    numbers = jnp.arange(inputs.size).reshape(inputs.shape) + subject.vocabulary
    return _Rows(jnp.where(own, numbers, inputs), segments, bank, jnp.asarray(right))


def _layers(subject: Subject) -> Layers | None:
    """The prompt's changes of layers, which are the same for all rows."""
    return jax.tree.map(lambda leaf: leaf[:1], subject.engine.injection.layers)


class PathGradients(NamedTuple):
    """Attributions of n rows to their positions, in nats, and how complete they are.

    gap: mean of |sum of a row's attributions - difference of its outputs|.
    difference: mean of |difference of the outputs|, from the start of the path to its end.
    points: of the path at which gradients were taken.
    """

    values: list[Float[np.ndarray, " s"]]
    gap: float
    difference: float
    points: int

    @property
    def complete(self) -> bool:
        """Whether the gap is within the tolerance; float32 alone leaves 1e-4."""
        return self.gap <= TOLERANCE * self.difference + 1e-4


def integrated_gradients(subject: Subject, examples: list[Example], moved: Where) -> PathGradients:
    """Attributions of log p of the right label (Sundararajan et al. 2017, arXiv 1703.01365).

    The path leads from the mean word to the vectors at the positions that ``moved`` picks; all else
    stays. Points are those of Gauss and Legendre; they are doubled until the attributions add up
    to the difference within ``TOLERANCE``, or there are ``MOST_POINTS``.

    Args:
        subject: the right labels are those of its rows.
        examples: one for each of its rows; their ids say which member's vectors they have.
        moved: from ids to the positions that move; virtual tokens or words.
    """
    points = FEWEST_POINTS
    while True:
        found = _integrated(subject, examples, moved, points)
        if found.complete or points >= MOST_POINTS:
            return found
        points *= 2


def _integrated(
    subject: Subject, examples: list[Example], moved: Where, points: int
) -> PathGradients:
    question, pooling = question_of(subject)
    nodes, weights = np.polynomial.legendre.leggauss(points)
    nodes, weights = (nodes + 1) / 2, weights / 2
    start = jnp.asarray(mean_word(subject))
    values: list[np.ndarray] = [np.empty(0)] * len(examples)
    gaps, differences = [], []
    run = functools.partial(_value_and_gradient, subject.engine.params, _layers(subject))
    for numbers, batch in batches(examples, ROWS):
        right = np.zeros(len(batch.inputs), np.int32)
        right[: len(numbers)] = subject.right[numbers]
        moves = moved(np.asarray(batch.inputs)) & (np.asarray(batch.segments) > 0)
        own = moves | (np.asarray(batch.inputs) >= subject.vocabulary)
        rows = _own_vectors(subject, batch, right, own)
        step = jnp.where(moves[..., None], rows.bank - start, 0)

        def at(share, rows=rows, step=step):
            moved_rows = rows._replace(bank=rows.bank - (1 - share) * step)
            return run(subject.engine.model, moved_rows, question, pooling)

        total = jnp.zeros_like(step)
        for node, weight in zip(nodes, weights, strict=True):
            total += float(weight) * at(jnp.float32(node))[1]
        each = np.asarray(jnp.sum(total * step, axis=-1))
        change = np.asarray(at(jnp.float32(1))[0] - at(jnp.float32(0))[0])
        for row, number in enumerate(numbers):
            values[number] = each[row, : len(examples[number].inputs)]
            gaps.append(abs(values[number].sum() - change[row]))
            differences.append(abs(change[row]))
    return PathGradients(values, float(np.mean(gaps)), float(np.mean(differences)), points)


def gate_gradients(subject: Subject, examples: list[Example]) -> Float[np.ndarray, " P"]:
    """The mean over rows of the absolute gradient of a gate of 1 before each vector.

    Michel et al. 2019 (arXiv 1905.10650), section 3.3, of attention heads; XPrompt (Ma et al. 2022,
    arXiv 2210.04457) of the vectors of a prompt.
    """
    question, pooling = question_of(subject)
    total, params, layers = np.zeros(subject.length), subject.engine.params, _layers(subject)
    for numbers, batch in batches(examples, ROWS):
        right = np.zeros(len(batch.inputs), np.int32)
        right[: len(numbers)] = subject.right[numbers]
        ids = np.asarray(batch.inputs)
        virtual = ids >= subject.vocabulary
        rows = _own_vectors(subject, batch, right, virtual)
        _, gradient = _value_and_gradient(
            params, layers, subject.engine.model, rows, question, pooling
        )
        gates = np.abs(np.asarray(jnp.sum(gradient * rows.bank, axis=-1)))
        np.add.at(total, (ids[virtual] - subject.vocabulary) % subject.length, gates[virtual])
    return total / len(examples)


def check_words_can_move(subject: Subject) -> None:
    """Refuse the one attention that tells words from virtual tokens by their ids.

    Raises:
        UserError: it is the prompt's.
    """
    if subject.engine.model.runtime.attention == "prompt":
        raise UserError(
            "The prompt was tuned with model.attention: prompt, which tells words from vectors by "
            "their ids, so words have no attributions here; leave out the part tokens."
        )
