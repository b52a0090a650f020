"""Variance components, on designs whose components are known."""

import itertools

import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.evaluation.statistics_components import REST, components, orthogonal_array


def crossed(*sizes):
    points = np.array([*itertools.product(*map(range, sizes))])
    return {f"f{number}": points[:, number] for number in range(len(sizes))}


def test_effects_without_noise_are_recovered_exactly():
    levels = crossed(4, 3, 5)
    effects = [np.random.default_rng(number).normal(size=n) for number, n in enumerate((4, 3, 5))]
    scores = 0.5 + sum(e[levels[f"f{number}"]] for number, e in enumerate(effects))
    found = components(scores, levels)
    for number, effect in enumerate(effects):
        assert found[f"f{number}"].variance == pytest.approx(effect.var(ddof=1))
        assert found[f"f{number}"].p < 1e-6
    assert found[REST].variance == pytest.approx(0.0, abs=1e-12)
    assert sum(one.share for one in found.values()) == pytest.approx(1.0)


def test_each_two_factors_of_the_array_meet_equally_often():
    array = orthogonal_array(13)
    for one, other in itertools.combinations(array.T, 2):
        assert np.unique(3 * one + other, return_counts=True)[1].tolist() == [3] * 9
    with pytest.raises(UserError, match="room for 1 to 13"):
        orthogonal_array(14)


def test_estimates_are_unbiased_and_intervals_cover_in_a_simulation():
    levels, generator = crossed(6, 5), np.random.default_rng(0)
    means, covered, draws = [], 0, 400
    for _ in range(draws):
        scores = (2.0 * generator.normal(size=6))[levels["f0"]] + generator.normal(size=30)
        found = components(scores, levels, draws=400)
        means.append(found["f0"].variance)
        covered += found["f0"].interval.low <= 4.0 <= found["f0"].interval.high
        assert found["f1"].interval.low == 0.0 or found["f1"].p < 0.05
    assert np.mean(means) == pytest.approx(4.0, rel=0.12)  # its standard error is 3.5%
    assert 0.92 < covered / draws < 0.98


def test_a_design_that_is_not_balanced_is_refused():
    levels = {"a": np.array([0, 0, 1, 1, 1, 0]), "b": np.array([0, 1, 0, 1, 1, 1])}
    with pytest.raises(UserError, match="not crossed evenly"):
        components(np.arange(6.0), levels)
    with pytest.raises(UserError, match="too few"):
        components(np.arange(4.0), crossed(2, 2) | {"c": np.array([0, 1, 1, 0])})
