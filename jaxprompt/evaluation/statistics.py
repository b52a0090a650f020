"""Is a difference between two systems that answered the same rows more than chance?

Everything here works on *paired differences*: the score of one system less that of the other, row
by row, each in [-1, 1]. Only numpy and scipy are used. For looks at growing data see
``statistics_sequential.py``.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import bdtr, ndtri, stdtrit

LEVEL = 0.95  # of intervals
POWER = 0.8
DRAWS = 10_000

Differences = Float[np.ndarray, "S n"]  # by seed and row
Draws = Float[np.ndarray, " draws"]


class Interval(NamedTuple):
    """From ``low`` to ``high``."""

    low: float
    high: float


# ---- tests


def mcnemar(wins: int, losses: int) -> float:
    """The exact two-sided p of McNemar's test: rows that one alone and the other alone got right.

    If neither is better, a row on which they differ is won with probability 1/2. So p is twice the
    tail of a binomial distribution (McNemar 1947).

    >>> mcnemar(9, 1)
    0.021484375
    """
    count = wins + losses
    return min(1.0, 2 * float(bdtr(min(wins, losses), count, 0.5))) if count else 1.0


def sign_flips(differences: Float[np.ndarray, " n"], draws: int = DRAWS, seed: int = 0) -> float:
    """The two-sided p of a randomization test: each row's systems change places at random.

    For scores that are not 0 or 1, such as F1 of words (Noreen 1989; Yeh 2000). The differences
    that were seen count as one more draw, so p is never 0.
    """
    values = differences[differences != 0]
    if not len(values):
        return 1.0
    generator = np.random.default_rng(seed)
    seen = abs(values.sum()) * (1 - 1e-12)  # sums of equal numbers in another order are as large
    extreme = 0
    for count in _parts(draws, len(values)):
        signs = generator.integers(0, 2, (count, len(values))) * 2 - 1
        extreme += int((abs(signs @ values) >= seen).sum())
    return (extreme + 1) / (draws + 1)


def paired_p(differences: Float[np.ndarray, " n"], seed: int = 0) -> float:
    """``mcnemar`` where rows are right or wrong, else ``sign_flips``."""
    if np.isin(differences, (-1.0, 0.0, 1.0)).all():
        return mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))
    return sign_flips(differences, seed=seed)


def holm(p_values: Sequence[float]) -> list[float]:
    """Values of p for several tests at once: the chance of any false finding is bounded.

    Holm 1979: the i-th smallest of m (from 0) is multiplied by m - i, and none is below a smaller
    one.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, above = [1.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        above = max(above, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = above
    return adjusted


# ---- intervals


class Spread(NamedTuple):
    """How much the mean of differences would vary with other rows and other seeds.

    rows, seeds: variances of the mean. A single seed says nothing of others: then ``seeds`` is 0.
    rest: what is neither of a row nor of a seed; ``rows`` and ``seeds`` both hold it.
    num_seeds: S.
    """

    rows: float
    seeds: float = 0.0
    rest: float = 0.0
    num_seeds: int = 1

    @property
    def of_rows_alone(self) -> float:
        """The variance of the mean that rows have without the rest."""
        return max(self.rows - self.rest, 0.0)

    def errors(self) -> list[tuple[float, float]]:
        """Standard errors of the mean, each with its degrees of freedom (Satterthwaite 1946).

        That of rows; and of rows and seeds, where there are several. Neither may be left out: seeds
        that happen to agree make the second one too small.
        """
        found = [(math.sqrt(self.rows), math.inf)]
        if self.seeds:
            both = self.of_rows_alone + self.seeds
            found.append((math.sqrt(both), (self.num_seeds - 1) * (both / self.seeds) ** 2))
        return found


def spread_of(differences: Differences) -> Spread:
    """The variances. All seeds have answered the same rows, so the design is crossed.

    These are the moments of two crossed random factors (Searle, Casella and McCulloch 1992).
    """
    seeds, count = differences.shape
    if count == 1:
        return Spread(0.0)
    by_row, by_seed = differences.mean(axis=0), differences.mean(axis=1)
    rows = float(by_row.var(ddof=1)) / count
    if seeds == 1:
        return Spread(rows)
    left = differences - by_row - by_seed[:, None] + differences.mean()
    rest = float((left**2).sum()) / ((seeds - 1) * (count - 1)) / (seeds * count)
    return Spread(rows, float(by_seed.var(ddof=1)) / seeds, rest, seeds)


def bootstrap(differences: Differences, draws: int = DRAWS, seed: int = 0) -> Draws:
    """Means as they might be with other rows and other seeds: a two-level bootstrap.

    Rows are drawn with replacement, all seeds of a row together (Efron and Tibshirani 1993; paired:
    Koehn 2004). Three or five seeds are too few to be drawn from: the smallest and the largest
    would bound what is drawn. So the mean over seeds varies around what was seen as Student's t
    does, with the variances of ``spread_of``. With one seed, rows alone are drawn.

    Seeds may agree by chance, and then say that nothing varies. So the result is never narrower
    than that of rows alone.
    """
    generator = np.random.default_rng(seed)
    values, counts = np.unique(differences.mean(axis=0), return_counts=True)
    total = int(counts.sum())
    means = np.concatenate([
        generator.multinomial(total, counts / total, part) @ values / total
        for part in _parts(draws, len(values))
    ])  # fmt: skip
    spread, mean = spread_of(differences), float(differences.mean())
    if not spread.seeds:
        return means
    rows = means - mean
    shrunk = math.sqrt(spread.of_rows_alone / spread.rows) if spread.rows else 0.0
    of_seeds = math.sqrt(spread.seeds) * generator.standard_t(spread.num_seeds - 1, draws)
    rows, both = np.sort(rows), np.sort(shrunk * rows + of_seeds)
    return mean + np.where(abs(rows) > abs(both), rows, both)  # at each quantile the wider one


def interval_of(means: Draws, level: float = LEVEL) -> Interval:
    """The middle of what was drawn: the percentile interval.

    Each of its ends is a one-sided bound at (1 + level) / 2. A system is not worse by more than a
    margin where the lower bound is above minus the margin (non-inferiority; in both directions it
    is equivalence, Schuirmann 1987).
    """
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def p_of(means: Draws) -> float:
    """The two-sided p of a mean of 0: twice the share of draws on the rarer side of 0."""
    below, above = int((means <= 0).sum()), int((means >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(means) + 1))


# ---- power


def detectable_difference(
    spread: Spread, count: int, level: float = LEVEL, power: float = POWER
) -> float:
    """The smallest true difference that a two-sided test finds with this power.

    With rows alone the error is sqrt(share of rows that differ / rows). Fewer rows than a finding
    needs at least, if all of them fall on one side, are never found.

    Args:
        spread: of the differences that were seen.
        count: rows.
    """
    alpha = 1 - level

    def found(error: float, freedom: float) -> float:
        quantile = ndtri if math.isinf(freedom) else lambda share: stdtrit(freedom, share)
        return float(quantile(1 - alpha / 2) + quantile(power)) * error

    fewest = math.ceil(1 - math.log2(alpha))  # 2 * 0.5**fewest <= alpha
    return min(1.0, max(fewest / count, *(found(*each) for each in spread.errors())))


def _parts(draws: int, width: int) -> list[int]:
    """``draws`` in parts whose arrays [part, width] have at most four million numbers."""
    most = max(1, 4_000_000 // max(width, 1))
    return [most] * (draws // most) + [draws % most] * (draws % most > 0)
