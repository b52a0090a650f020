"""Which setting moves a score how much: variance components of a balanced design.

A score is a mean, an effect of each factor's level, and the rest:

    y_i = mu + sum over factors f of a_f[level of f in i] + e_i

with variances s_f^2 of effects and s_e^2 of the rest. In a balanced design in which all factors are
orthogonal, the mean squares are independent, and their expectation is

    E[MS_f] = s_e^2 + (n / l_f) s_f^2,    E[MS_e] = s_e^2

for n scores and l_f levels. Solved for s_f^2 this is the ANOVA estimator of a random-effects model
(Searle, Casella and McCulloch 1992, *Variance Components*, chapter 4).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxprompt.config.errors import UserError
from jaxprompt.evaluation.statistics import DRAWS, Interval, holm, interval_of

REST = "rest"
Levels = Mapping[str, Int[np.ndarray, " n"]]


class Component(NamedTuple):
    """The variance of one factor's effects.

    variance: never below 0.
    share: of the sum of all components.
    interval: of the variance, at 95%.
    p: of an F test that the factor does nothing, by Holm's correction over all factors; None for
        the rest.
    """

    variance: float
    share: float
    interval: Interval
    p: float | None


def orthogonal_array(factors: int) -> Int[np.ndarray, "27 F"]:
    """Levels 0, 1, 2 of up to 13 factors in 27 rows, each two of which have each pair three times.

    A row is a point of GF(3)^3, a factor a linear form of it, none a multiple of another (L27;
    Hedayat, Sloane and Stufken 1999, *Orthogonal Arrays*, section 3.4).
    """
    points = np.array([*itertools.product(range(3), repeat=3)])
    # forms whose first coefficient that is not 0 is 1, most coefficients last
    forms = [f for f in itertools.product(range(3), repeat=3) if next(filter(None, f), 0) == 1]
    forms.sort(key=lambda form: (sum(c > 0 for c in form) == 2, -sum(c > 0 for c in form), form))
    if not 0 < factors <= len(forms):
        raise UserError(f"There are {factors} factors; L27 has room for 1 to {len(forms)}.")
    return points @ np.array(forms[:factors]).T % 3


def components(
    scores: Float[np.ndarray, " n"], levels: Levels, draws: int = DRAWS, seed: int = 0
) -> dict[str, Component]:
    """The component of each factor, and of the ``rest``: noise and interactions.

    Intervals: sums of squares are their expected mean squares times independent chi squares. A
    parametric bootstrap draws those, and solves for the variances (generalized confidence
    intervals: Weerahandi 1993; Burdick, Borror and Montgomery 2005). Few levels make them wide:
    they speak of other levels than those that were tried.

    Raises:
        UserError: two factors are not crossed evenly, or nothing is left for the rest.
    """
    _check_balance(levels)
    count, mean = len(scores), scores.mean()
    squares: dict[str, tuple[float, int, float]] = {}  # sum, degrees of freedom, scores of a level
    for name, of_rows in levels.items():
        known = np.unique(of_rows)
        means = np.array([scores[of_rows == level].mean() for level in known])
        each = count / len(known)
        squares[name] = float(each * ((means - mean) ** 2).sum()), len(known) - 1, each
    freedom = count - 1 - sum(f for _, f, _ in squares.values())
    if freedom < 1:
        raise UserError(f"{count} scores are too few for {len(levels)} factors; add some.")
    rest = max(float(((scores - mean) ** 2).sum()) - sum(s for s, _, _ in squares.values()), 0.0)
    generator = np.random.default_rng(seed)
    drawn_rest = rest / generator.chisquare(freedom, draws)
    values, intervals, alone = {}, {}, {}
    for name, (total, own, each) in squares.items():
        values[name] = max((total / own - rest / freedom) / each, 0.0)
        drawn = (total / generator.chisquare(own, draws) - drawn_rest) / each
        intervals[name] = interval_of(np.maximum(drawn, 0.0))
        alone[name] = _p_of(total / own, own, rest / freedom, freedom)
    values[REST], intervals[REST] = rest / freedom, interval_of(drawn_rest)
    p_values = dict(zip(alone, holm([*alone.values()]), strict=True))
    whole = sum(values.values()) or 1.0
    return {
        name: Component(value, value / whole, intervals[name], p_values.get(name))
        for name, value in values.items()
    }


def _p_of(above: float, own: int, below: float, freedom: int) -> float:
    from scipy.special import fdtrc

    if below <= 0.0:
        return 0.0 if above > 0.0 else 1.0
    return float(fdtrc(own, freedom, above / below))


def _check_balance(levels: Levels) -> None:
    pairs: Sequence[tuple[str, str]] = [*itertools.combinations(levels, 2)]
    for one, other in pairs or [(name, name) for name in levels]:
        both = np.stack([levels[one], levels[other]])
        _, counts = np.unique(both, axis=1, return_counts=True)
        crossed = len(np.unique(both[0])) * (1 if one == other else len(np.unique(both[1])))
        if len(counts) != crossed or len({*counts.tolist()}) != 1:
            raise UserError(
                f"{one!r} and {other!r} are not crossed evenly; give each pair of levels as many "
                "scores."
            )
