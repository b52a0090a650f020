"""What a run does when numbers that it trains are not finite any more."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.errors import UserError
from jaxprompt.training.trial import MetricName


class Diverged(UserError):
    """What is trained is not finite any more."""


def check_loss(loss: float, step: int, task: str = "") -> None:
    """Raise Diverged for a loss (of one of several tasks) that is not finite."""
    if not math.isfinite(loss):
        which = f" of task {task!r}" if task else ""
        raise Diverged(
            f"The loss{which} is {loss} at step {step}; lower train.learning_rate, use "
            "model.dtype=float32, or let train.on_divergence=go_back do it. The checkpoint before "
            "it is intact."
        )


def check_members(
    step: int,
    active: Sequence[int],
    losses: Float[Array | np.ndarray, " K"],
    names: Sequence[MetricName],
) -> None:
    """Raise Diverged if no trial of some task has a finite loss.

    Trials do not influence each other: while one of a task is finite, its run goes on.

    Args:
        active: the numbers of the trials, by slot.
        losses: one for each of them, [K].
        names: of all trials, by number.
    """
    by_task: dict[str, list[float]] = {}
    for number, loss in zip(active, losses, strict=True):
        by_task.setdefault(names[number].prefix, []).append(float(loss))
    for prefix, of_task in by_task.items():
        if not any(map(math.isfinite, of_task)):
            check_loss(of_task[0], step, prefix.rstrip("/"))
