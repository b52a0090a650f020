"""Which of several systems is better on the same rows: pairs, tests, verdicts. No model runs here.

A system is an *arm*: a finished prompt, or a formulation that was trained with several seeds.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxprompt.config.values import Values
from jaxprompt.evaluation import statistics
from jaxprompt.evaluation.statistics import Interval
from jaxprompt.evaluation.statistics_sequential import anytime_p, confidence_sequence


class Arm(NamedTuple):
    """What is compared: its score on each row, in an order that all arms have in common.

    scores: of each seed and row, from 0 (wrong) to 1 (right).
    answers: of the first seed, by row.
    tokens: positions of an input, virtual tokens included; the mean over rows.
    note: something that a reader of the table should know.
    """

    name: str
    scores: Float[np.ndarray, "S n"]
    answers: Sequence[str]
    tokens: float
    note: str = ""

    @property
    def score(self) -> float:
        return float(self.scores.mean())

    def interval(self, level: float) -> Interval:
        """Of the score."""
        return statistics.interval_of(statistics.bootstrap(self.scores), level)


class Rules(NamedTuple):
    """How arms are judged.

    level: of intervals; 1 - level is the chance of any false finding among all pairs.
    margin: a system that is worse by less is as good, for its user; None: no such question.
    sequential: rows are looked at while they are answered.
    """

    level: float = statistics.LEVEL
    margin: float | None = None
    sequential: bool = False


class Pair(NamedTuple):
    """Two arms, and what their rows say of them.

    difference: the score of a less that of b; ``interval`` is of this pair alone.
    p: after Holm's correction for all pairs; ``raw_p`` before.
    wins: rows on which a's score is the higher one, over all seeds; losses: b's.
    detectable: the smallest true difference that these rows find with a power of 80%, among as many
        pairs; None where looks were sequential.
    better: "a" or "b", or "" where nobody can tell.
    not_worse: those of "a" and "b" that are not worse than the other one by more than ``margin``.
    """

    a: str
    b: str
    difference: float
    interval: Interval
    p: float
    raw_p: float
    wins: int
    losses: int
    rows: int
    detectable: float | None
    better: str = ""
    not_worse: tuple[str, ...] = ()
    margin: float | None = None

    def verdict(self, a: str = "a", b: str = "b") -> str:
        """The verdict in words; ``a`` and ``b`` are what they are called."""
        names = {"a": a, "b": b}
        parts = [f"{names[self.better]} is better" if self.better else "cannot be told apart"]
        for side in self.not_worse:
            other = b if side == "a" else a
            if side != self.better:
                parts.append(
                    f"{names[side]} is not worse than {other} by more than {self.margin:g}"
                )
        return "; ".join(parts)

    def to_json(self) -> Values:
        """As the command prints it."""
        kept = {k: v for k, v in self._asdict().items() if k not in _IN_VERDICT}
        return kept | {"interval": list(self.interval), "verdict": self.verdict()}

    def sentence(self) -> str:
        """The verdict with names and figures."""
        power = ""
        if not self.better and self.detectable is not None:
            power = f"; a difference of {self.detectable:.3f} would be found four times in five"
        return (
            f"{self.a} and {self.b}: {self.verdict(self.a, self.b)} ({self.difference:+.4f}, "
            f"{interval_text(self.interval)}, p {p_text(self.p)}){power}."
        )


_IN_VERDICT = ("better", "not_worse", "margin")


def interval_text(interval: Interval) -> str:
    """As in a table."""
    return f"{interval.low:+.3f} to {interval.high:+.3f}"


def p_text(p: float) -> str:
    """As in a table."""
    return f"{p:.4f}" if p >= 1e-4 else "< 0.0001"


def compare_arms(arms: Sequence[Arm], rules: Rules) -> list[Pair]:
    """All pairs of arms, in order. A pair is compared on the rows that both have answered."""
    couples = list(itertools.combinations(arms, 2))
    look = _look_sequentially if rules.sequential else partial(_look_once, pairs=len(couples))
    found = [look(a, b, rules) for a, b in couples]
    adjusted = statistics.holm([pair.raw_p for pair in found])
    return [
        pair._replace(p=p, better=_better(pair.difference, p, rules.level))
        for pair, p in zip(found, adjusted, strict=True)
    ]


def _look_once(a: Arm, b: Arm, rules: Rules, pairs: int) -> Pair:
    """A pair before it is known what others say."""
    differences = _differences(a, b)
    means, spread = statistics.bootstrap(differences), statistics.spread_of(differences)
    one_seed = len(differences) == 1
    p = statistics.paired_p(differences[0]) if one_seed else statistics.p_of(means)
    bounds = statistics.interval_of(means, 2 * rules.level - 1)  # each side at ``level``
    strictest = 1 - (1 - rules.level) / pairs
    return _pair(a, b, rules, statistics.interval_of(means, rules.level), bounds)._replace(
        raw_p=p,
        detectable=statistics.detectable_difference(spread, differences.shape[1], strictest),
    )


def _look_sequentially(a: Arm, b: Arm, rules: Rules) -> Pair:
    """The same, as it holds at every look together."""
    stream = _differences(a, b).mean(axis=0)
    interval = confidence_sequence(stream, rules.level)
    bounds = interval
    if rules.margin is not None:
        bounds = confidence_sequence(stream, 2 * rules.level - 1)
    return _pair(a, b, rules, interval, bounds)._replace(raw_p=anytime_p(stream))


def _differences(a: Arm, b: Arm) -> Float[np.ndarray, "S n"]:
    rows = min(a.scores.shape[1], b.scores.shape[1])
    return a.scores[:, :rows] - b.scores[:, :rows]


def _pair(a: Arm, b: Arm, rules: Rules, interval: Interval, bounds: Interval) -> Pair:
    """A pair without its p. ``bounds``: what the difference is above, and what it is below."""
    differences, margin = _differences(a, b), rules.margin
    not_worse: tuple[str, ...] = ()
    if margin is not None:
        not_worse = ("a",) * (bounds.low > -margin) + ("b",) * (bounds.high < margin)
    return Pair(
        a.name, b.name, float(differences.mean()), interval, 1.0, 1.0,
        int((differences > 0).sum()), int((differences < 0).sum()), differences.shape[1], None,
        not_worse=not_worse, margin=margin,
    )  # fmt: skip


def _better(difference: float, p: float, level: float) -> str:
    if p > 1 - level or not difference:
        return ""
    return "a" if difference > 0 else "b"


class Compared(NamedTuple):
    """A comparison: what its JSON and its page tell of.

    facts: what was asked: data, metric and so on.
    rows: the place of each row in the data, in the order of the arms' scores, which those below
        have, too.
    texts, references: of each row, as the first arm's task has them.
    """

    arms: Sequence[Arm]
    pairs: Sequence[Pair]
    rules: Rules
    facts: Values
    rows: Sequence[int]
    texts: Sequence[str]
    references: Sequence[str]

    def to_json(self) -> Values:
        """What the command prints."""
        level = self.rules.level
        return {
            **self.facts,
            **self.rules._asdict(),
            "prompts": [
                {
                    "name": arm.name,
                    "score": arm.score,
                    "interval": list(arm.interval(level)),
                    "seeds": len(arm.scores),
                    "rows": arm.scores.shape[1],
                    "tokens": arm.tokens,
                    "note": arm.note,
                }
                for arm in self.arms
            ],
            "pairs": [pair.to_json() for pair in self.pairs],
        }


def disagreements(arms: Sequence[Arm], most: int) -> list[int]:
    """The first rows that some arms got right and others wrong, with their first seeds."""
    rows = min(arm.scores.shape[1] for arm in arms)
    first = np.stack([arm.scores[0, :rows] for arm in arms])
    return np.flatnonzero(first.max(axis=0) > first.min(axis=0))[:most].tolist()


def frontier(arms: Sequence[Arm]) -> list[Arm]:
    """The arms that no other beats in score with as few tokens: Pareto's front, by tokens."""
    best: list[Arm] = []
    for arm in sorted(arms, key=lambda arm: (arm.tokens, -arm.score)):
        if not best or arm.score > best[-1].score:
            best.append(arm)
    return best
