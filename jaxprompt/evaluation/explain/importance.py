"""Which vectors of a prompt matter: four measures, each beside that of a random prompt."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxprompt.data.batches import with_member
from jaxprompt.evaluation.explain.gradients import gate_gradients, integrated_gradients
from jaxprompt.evaluation.explain.variants import RANDOM, TUNED, Answers, Subject, answer

RANDOM_ORDERS = 5
STEPS = 10  # of the deletion curve
ROWS_OF_GRADIENTS = 8


class Measures(NamedTuple):
    """Of each vector of one prompt, in nats.

    left_out: by how much the mean log p of the right label falls without the vector.
    gate: mean absolute gradient of a gate before it.
    integrated: mean attribution of integrated gradients.
    """

    left_out: Float[np.ndarray, " P"]
    gate: Float[np.ndarray, " P"]
    integrated: Float[np.ndarray, " P"]
    gap: float  # see ``PathGradients``
    difference: float
    points: int
    complete: bool


class Curve(NamedTuple):
    """Answers with fewer and fewer vectors."""

    kept: list[int]
    accuracy: Float[np.ndarray, "O k"]  # of O orders
    log_p: Float[np.ndarray, "O k"]


class Importance(NamedTuple):
    """How much each vector matters, and what the answers are without the first of an order.

    Vectors are measured on some rows and deleted on others.
    """

    tuned: Measures
    random: Measures
    highest_first: Curve
    lowest_first: Curve
    random_orders: Curve
    rows: tuple[int, int]  # measured, deleted


def importance(subject: Subject, measured: int) -> Importance:
    """The importance of each vector.

    Args:
        subject: the prompt, with its random control.
        measured: rows for the measures; the others are for the deletion curve.
    """
    numbers = np.arange(len(subject.examples))
    first, rest = subject.part(numbers[:measured]), subject.part(numbers[measured:])
    tuned, random = (_measures(first, member) for member in (TUNED, RANDOM))
    falling = np.argsort(-tuned.left_out, kind="stable")
    generator = np.random.default_rng(0)
    shuffled = [generator.permutation(subject.length) for _ in range(RANDOM_ORDERS)]
    orders = [falling, falling[::-1], *shuffled]
    curve = deletion(rest, orders)
    some = lambda part: Curve(curve.kept, curve.accuracy[part], curve.log_p[part])
    return Importance(
        tuned, random, some(slice(0, 1)), some(slice(1, 2)), some(slice(2, None)),
        (len(first.examples), len(rest.examples)),
    )  # fmt: skip


def leave_one_out(subject: Subject, member: int) -> Answers:
    """Answers of the whole prompt, and of the prompt without each vector: [1 + P, n]."""
    nothing = np.zeros((1, subject.length), bool)
    dropped = np.concatenate([nothing, np.eye(subject.length, dtype=bool)])
    return answer(subject, [(member, row) for row in dropped])


def _measures(subject: Subject, member: int) -> Measures:
    log_p = leave_one_out(subject, member).log_p.mean(axis=1)
    some = subject.part(np.arange(min(ROWS_OF_GRADIENTS, len(subject.examples))))
    examples = [
        with_member(example, member, subject.vocabulary, subject.length)
        for example in some.examples
    ]
    path = integrated_gradients(some, examples, lambda ids: ids >= subject.vocabulary)
    integrated = np.zeros(subject.length)
    for example, values in zip(examples, path.values, strict=True):
        virtual = example.inputs >= subject.vocabulary
        positions = (example.inputs[virtual] - subject.vocabulary) % subject.length
        np.add.at(integrated, positions, values[virtual])
    return Measures(
        log_p[0] - log_p[1:], gate_gradients(some, examples), integrated / len(examples),
        path.gap, path.difference, path.points, path.complete,
    )  # fmt: skip


def deletion(subject: Subject, orders: Sequence[Int[np.ndarray, " P"]]) -> Curve:
    """Answers without the first 0, ... P vectors of each order."""
    length = subject.length
    counts = np.unique(np.linspace(0, length, min(STEPS, length) + 1).round().astype(int))
    variants = [(TUNED, _first(order, count)) for order in orders for count in counts]
    answers = answer(subject, variants)
    shape = len(orders), len(counts)
    return Curve(
        (length - counts).tolist(),
        answers.correct.mean(axis=1).reshape(shape),
        answers.log_p.mean(axis=1).reshape(shape),
    )


def _first(order: Int[np.ndarray, " P"], count: int) -> Bool[np.ndarray, " P"]:
    dropped = np.zeros(len(order), bool)
    dropped[order[:count]] = True
    return dropped
