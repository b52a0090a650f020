"""Whose prompt is it? The rows of each user, answered with the prompt of each user."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxprompt.studies.baselines import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHIFTS = (5, 11, 17)  # whose prompts users are given in the swap control


def per_user(
    values: Bool[np.ndarray, " n"] | Float[np.ndarray, " n"],
    owners: Int[np.ndarray, " n"],
    count: int,
) -> Float[np.ndarray, " K"]:
    """The mean of the rows of each user."""
    total = np.bincount(owners, np.asarray(values, float), minlength=count)
    return total / np.maximum(np.bincount(owners, minlength=count), 1)


def swap_matrix(
    answer: Callable[[Float[np.ndarray, "K P D"]], Bool[np.ndarray, " n"]],
    bank: Float[np.ndarray, "K P D"],
    owners: Int[np.ndarray, " n"],
) -> Float[np.ndarray, "K K"]:
    """The share of the rows of user i (line) that the prompt of user j (column) answers rightly.

    Args:
        answer: which rows are right where user k has the prompt ``bank[k]``.
        bank: the prompt of each user.
        owners: the number of the user of each row.
    """
    count = len(bank)
    matrix, users = np.zeros((count, count)), np.arange(count)
    for shift in range(count):
        right = answer(np.roll(bank, -shift, axis=0))
        matrix[users, (users + shift) % count] = per_user(right, owners, count)
    return matrix


def swap_control(
    matrix: Float[np.ndarray, "K K"], rows: Int[np.ndarray, " K"], shifts: Sequence[int] = SHIFTS
) -> Record:
    """How rows are answered with the prompt of another user, and for whom his own one is better.

    Args:
        matrix: of ``swap_matrix``.
        rows: how many rows each user has.
        shifts: user k is given the prompt of user k + shift, for each of them.
    """
    count = len(matrix)
    users = np.arange(count)
    others = [matrix[users, (users + (shift % count or 1)) % count] for shift in shifts]
    own, theirs = matrix.diagonal(), np.mean(others, axis=0)
    return {
        "swapped": float(np.average(theirs, weights=rows)),
        "own_wins": float((own > theirs).mean()),
        "own_loses": float((own < theirs).mean()),
    }


def draw_swaps(matrix: Float[np.ndarray, "K K"], rows: Int[np.ndarray, " K"], axis: "Axes") -> None:
    """Draw the matrix with users in the order of their training rows, most first.

    Nobody is named: the axes have numbers of rows.
    """
    order = np.argsort(-rows, kind="stable")
    image = axis.imshow(matrix[np.ix_(order, order)], vmin=0, vmax=1, cmap="viridis")
    marks = range(0, len(order), max(1, len(order) // 6))
    names = [str(rows[order[mark]]) for mark in marks]
    axis.set_xticks(marks, names)
    axis.set_yticks(marks, names)
    axis.set(xlabel="whose prompt (training rows)", ylabel="whose rows (training rows)")
    axis.figure.colorbar(image, ax=axis, shrink=0.75)
