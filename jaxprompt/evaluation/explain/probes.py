"""Linear probes: what can be read from the hidden states, and what a probe learns by itself.

Hewitt and Liang 2019 (arXiv 1909.03368): a control task gives each type of word a random label of
its own. Selectivity is the accuracy on the task less that on the control task. A probe that is good
at both memorises. They probe words; here rows are probed, so a row's type is one of its words.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.special import log_softmax

from jaxprompt.data.batches import AnyArray

_PENALTY = 1e-2  # times the mean square of the weights of standardised features
_STEPS = 60
FEWEST_ROWS = 60


class Probe(NamedTuple):
    """Accuracies on held-out rows of the probes behind each layer, and of the majority label."""

    task: list[float]
    control: list[float]
    majority: float
    control_majority: float

    @property
    def selectivity(self) -> list[float]:
        """Task less control."""
        return [a - b for a, b in zip(self.task, self.control, strict=True)]


def fit(
    features: Float[np.ndarray, "n D"], labels: Int[np.ndarray, " n"], classes: int
) -> tuple[Float[np.ndarray, "D C"], Float[np.ndarray, " C"]]:
    """Weights and biases of a multinomial logistic regression, by L-BFGS."""
    count, width = features.shape
    wanted = np.eye(classes)[labels]

    def loss(flat):
        weights = flat.reshape(width + 1, classes)
        log_p = log_softmax(features @ weights[:-1] + weights[-1], axis=1)
        error = (np.exp(log_p) - wanted) / count
        gradient = np.concatenate([features.T @ error, error.sum(axis=0, keepdims=True)])
        gradient[:-1] += _PENALTY * weights[:-1]
        value = -(log_p * wanted).sum() / count + 0.5 * _PENALTY * (weights[:-1] ** 2).sum()
        return value, gradient.ravel()

    start = np.zeros((width + 1) * classes)
    best = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": _STEPS}).x
    weights = best.reshape(width + 1, classes)
    return weights[:-1], weights[-1]


def held_out_accuracy(
    features: Float[np.ndarray, "n D"],
    labels: Int[np.ndarray, " n"],
    training: Int[np.ndarray, " m"],
    held_out: Int[np.ndarray, " h"],
) -> float:
    """The accuracy on held-out rows of a probe that the other rows train."""
    seen = features[training].astype(np.float64)
    mean, deviation = seen.mean(axis=0), seen.std(axis=0) + 1e-6
    standard = (features.astype(np.float64) - mean) / deviation
    weights, biases = fit(standard[training], labels[training], int(labels.max()) + 1)
    found = (standard[held_out] @ weights + biases).argmax(axis=1)
    return float((found == labels[held_out]).mean())


def control_labels(
    types: Sequence[str], labels: Int[np.ndarray, " n"], seed: int = 0
) -> Int[np.ndarray, " n"]:
    """A random label for each type, drawn as often as the labels are."""
    generator = np.random.default_rng(seed)
    of_type = {name: int(generator.choice(labels)) for name in sorted(set(types))}
    return np.array([of_type[name] for name in types])


def probe(
    states: Float[AnyArray, "n L D"], labels: Int[np.ndarray, " n"], types: Sequence[str]
) -> Probe:
    """A probe behind each layer: two thirds of the rows train it, the others judge it."""
    states, order = np.asarray(states), np.random.default_rng(0).permutation(len(labels))
    training, held_out = np.split(order, [len(labels) * 2 // 3])
    control = control_labels(types, labels)
    layers = range(states.shape[1])
    task, controls = (
        [held_out_accuracy(states[:, i], wanted, training, held_out) for i in layers]
        for wanted in (labels, control)
    )
    majority, of_control = (
        float((wanted[held_out] == np.bincount(wanted[training]).argmax()).mean())
        for wanted in (labels, control)
    )
    return Probe(task, controls, majority, of_control)
