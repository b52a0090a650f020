"""Looks at growing data: statements that hold at every look together, however many there are.

Somebody bets against each mean that the differences might have. His wealth is fair under the true
mean, so it ever reaches 1/alpha with probability alpha at most (Ville 1939). Means against which he
got that rich are refuted for good. So a comparison may stop as soon as 0 is among them, and a
person may label more rows until it is (Waudby-Smith and Ramdas 2024, arXiv 2010.09686).
"""

import numpy as np
from jaxtyping import Float

from jaxprompt.evaluation.statistics import LEVEL, Interval

# Shares of the largest bet that cannot lose everything. The wealth is the mean over them all
# (diversified Kelly betting), and one of them suits any difference that thousands of rows can show.
BETS = tuple(0.9 * 1.5**-k for k in range(12))
GRID = np.linspace(-1, 1, 801)


def log_wealth(
    differences: Float[np.ndarray, " n *streams"], means: Float[np.ndarray, " M"]
) -> Float[np.ndarray, " n *streams M"]:
    """The logarithm of the wealth after each row, of bets against each of ``means``.

    Args:
        differences: in [-1, 1], in an order that does not depend on them.
        means: between -1 and 1, and none of both.
    """
    above = differences[..., None] - means
    total = np.full(above.shape, -np.inf)
    for share in BETS:
        for side in (share / (1 + means), -share / (1 - means)):
            total = np.logaddexp(total, np.log1p(side * above).cumsum(axis=0))
    return total - np.log(2 * len(BETS))


def anytime_p(differences: Float[np.ndarray, " n"]) -> float:
    """A p of a mean of 0 that holds whenever the rows were ended, for whatever reason."""
    if not len(differences):
        return 1.0
    highest = float(log_wealth(differences, np.zeros(1)).max())
    return float(np.exp(-max(highest, 0.0)))


def confidence_sequence(differences: Float[np.ndarray, " n"], level: float = LEVEL) -> Interval:
    """The means that no row so far has refuted. With confidence ``level`` the true one never is.

    The ends are rounded outwards to multiples of 1/400.
    """
    if not len(differences):
        return Interval(-1.0, 1.0)
    highest = log_wealth(differences, GRID[1:-1]).max(axis=0)
    left = np.flatnonzero(highest < -np.log(1 - level))  # places in the grid, one step further
    if not len(left):  # as rarely as it errs: nearest to what was seen
        left = np.array([highest.argmin()])
    return Interval(float(GRID[left[0]]), float(GRID[left[-1] + 2]))
