"""Tests and intervals of paired differences, against simulation and against what others compute."""

import numpy as np
import pytest
from scipy.stats import binomtest

from jaxprompt.evaluation.statistics import (
    Spread,
    bootstrap,
    detectable_difference,
    holm,
    interval_of,
    mcnemar,
    p_of,
    paired_p,
    sign_flips,
    spread_of,
)
from jaxprompt.evaluation.statistics_sequential import (
    GRID,
    anytime_p,
    confidence_sequence,
    log_wealth,
)

SIMULATIONS = 1000


def differences(generator, shape, better=0.0, differ=0.2):
    """Differences of right and wrong answers: a share ``differ`` is no tie."""
    return generator.choice(
        [-1.0, 0.0, 1.0], shape, p=[(differ - better) / 2, 1 - differ, (differ + better) / 2]
    )


# ---- tests


@pytest.mark.parametrize("wins, losses", [(9, 1), (1, 9), (5, 5), (40, 22), (1, 0)])
def test_mcnemar_is_the_binomial_test(wins, losses):
    wanted = binomtest(wins, wins + losses, 0.5).pvalue
    assert mcnemar(wins, losses) == pytest.approx(wanted, rel=1e-9)


def test_nothing_that_differs_is_no_evidence():
    assert mcnemar(0, 0) == paired_p(np.zeros(5)) == sign_flips(np.zeros(5)) == 1.0


def test_signs_that_are_flipped_at_random_give_mcnemars_p():
    values = np.repeat([1.0, -1.0, 0.0], [15, 5, 30])
    assert sign_flips(values, 20_000) == pytest.approx(mcnemar(15, 5), abs=0.005)
    assert paired_p(values) == mcnemar(15, 5)
    assert paired_p(values / 2) == pytest.approx(mcnemar(15, 5), abs=0.01)  # no rows of 0 and 1


def test_holms_p_is_that_of_his_paper():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


# ---- intervals


def test_intervals_over_rows_cover_the_truth_as_often_as_they_say():
    generator, better = np.random.default_rng(0), 0.06
    found = differences(generator, (SIMULATIONS, 1, 200), better)
    intervals = [interval_of(bootstrap(each, 1000)) for each in found]
    covered = np.mean([low <= better <= high for low, high in intervals])
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("seeds, of_seeds, most", [(3, 0.05, 0.97), (5, 0.05, 0.97), (3, 0, 0.99)])
def test_intervals_over_seeds_and_rows_cover_the_truth_as_often_as_they_say(seeds, of_seeds, most):
    """Rows are easy or hard for all seeds, and seeds are good or bad on all rows.

    Of few seeds that do not vary it is not known that they do not: intervals are too wide.
    """
    generator, rows, better = np.random.default_rng(1), 200, 0.05
    shape = (SIMULATIONS, seeds, rows)
    right = []
    for mean in (0.5 + better, 0.5):
        hard = generator.uniform(-0.2, 0.2, (SIMULATIONS, 1, rows))
        good = generator.normal(0, of_seeds, (SIMULATIONS, seeds, 1))
        right.append((generator.uniform(size=shape) < mean + hard + good).astype(float))
    intervals = [interval_of(bootstrap(each, 600)) for each in right[0] - right[1]]
    covered = np.mean([low <= better <= high for low, high in intervals])
    assert 0.93 <= covered <= most


def test_seeds_that_agree_by_chance_do_not_make_an_interval_narrower():
    """Three seeds with the same score, each right on other rows."""
    right = np.zeros((3, 90))
    right[0, :10], right[1, 10:20], right[2, 20:30] = 1, 1, 1
    low, high = interval_of(bootstrap(right))
    alone = interval_of(bootstrap(right.mean(axis=0, keepdims=True)))
    assert (low, high) == pytest.approx(alone) and low < high
    right[2, 30] = 1
    wide = interval_of(bootstrap(right))
    assert wide.low <= low + 0.01 and wide.high >= high


def test_an_interval_without_zero_goes_with_a_small_p():
    generator = np.random.default_rng(2)
    for better in (0.0, 0.1, 0.15):
        means = bootstrap(differences(generator, (3, 150), better))
        low, high = interval_of(means)
        assert (low <= 0 <= high) == (p_of(means) > 0.05)


def test_the_error_over_rows_is_the_root_of_the_share_that_differs_over_rows():
    found = differences(np.random.default_rng(3), (1, 10_000), differ=0.15)
    share = np.mean(found != 0)
    assert spread_of(found).rows == pytest.approx(share / 10_000, rel=2e-3)
    assert spread_of(found[:, :1]) == Spread(0.0)


# ---- power


def test_the_detectable_difference_is_found_four_times_in_five():
    generator, rows = np.random.default_rng(4), 600
    found = detectable_difference(Spread(0.15 / rows), rows)
    assert found == pytest.approx(0.0443, abs=1e-4)
    streams = differences(generator, (2 * SIMULATIONS, rows), found, differ=0.15)
    wins, losses = (streams > 0).sum(axis=1).tolist(), (streams < 0).sum(axis=1).tolist()
    power = np.mean([mcnemar(w, x) < 0.05 for w, x in zip(wins, losses, strict=True)])
    assert 0.74 <= power <= 0.84  # the exact test is a little conservative


def test_rows_that_are_too_few_to_find_anything_say_so():
    assert detectable_difference(Spread(0.0), 600) == 6 / 600  # 2 / 2**6 < 0.05
    assert detectable_difference(Spread(0.0), 4) == 1.0


# ---- looks at growing data


@pytest.mark.parametrize("differ, truth", [(0.3, 0.0), (0.1, 0.05), (1.0, 0.0)])
def test_a_sequence_of_looks_errs_in_at_most_a_twentieth_of_the_streams(differ, truth):
    streams = differences(np.random.default_rng(5), (500, SIMULATIONS), truth, differ)
    highest = log_wealth(streams, np.array([truth])).max(axis=(0, 2))
    assert np.mean(highest >= np.log(20)) <= 0.05


def test_bets_against_the_truth_are_fair():
    """The mean wealth is 1, over all streams of four rows."""
    rows = np.array(np.meshgrid(*[[-1.0, 1.0]] * 4)).reshape(4, -1)
    chances = np.prod(np.where(rows > 0, 0.75, 0.25), axis=0)
    wealth = np.exp(log_wealth(rows, np.array([0.5]))[-1, :, 0])
    assert wealth @ chances == pytest.approx(1.0)


def test_a_difference_is_found_long_before_all_rows_are_answered():
    stream = differences(np.random.default_rng(6), 2000, 0.15, 0.3)
    looks = [number for number in range(50, 501, 50) if anytime_p(stream[:number]) < 0.05]
    assert looks[0] <= 400
    low, high = confidence_sequence(stream)
    assert 0 < low < 0.15 < high < 0.25


def test_an_interval_of_no_rows_is_everything_and_more_rows_never_widen_it():
    assert confidence_sequence(np.zeros(0)) == (-1.0, 1.0) and anytime_p(np.zeros(0)) == 1.0
    stream = differences(np.random.default_rng(7), 400)
    before = (-1.0, 1.0)
    for number in (10, 100, 400):
        low, high = confidence_sequence(stream[:number])
        assert before[0] <= low <= high <= before[1]
        assert low in GRID and high in GRID
        before = low, high
