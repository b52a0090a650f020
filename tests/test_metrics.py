"""Metrics against figures worked out by hand and published ones."""

import pytest

from jaxprompt.evaluate.metrics import (
    METRICS,
    accuracy,
    exact_match,
    f1,
    macro_f1,
    majority,
    normalize,
    token_f1,
)

LABELS = ["no", "yes"]


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_one_for_the_truth_and_zero_for_none_of_it(name):
    references = ["yes", "no", "yes"]
    assert METRICS[name](references, references, LABELS) == 1.0
    assert METRICS[name](["x", "x", "x"], references, LABELS) == 0.0


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_refuses_nothing_and_unequal_numbers(name):
    with pytest.raises(ValueError, match="0 predictions for 0 references"):
        METRICS[name]([], [], LABELS)
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        METRICS[name](["yes"], ["yes", "no"], LABELS)


def test_accuracy_compares_exactly():
    assert accuracy(["yes", "Yes", "no", "no"], ["yes", "yes", "yes", "no"]) == 0.5


def test_f1_is_that_of_the_last_label():
    # 2 hits, 1 false alarm, 2 misses: precision 2/3, recall 1/2
    predictions = ["yes", "yes", "yes", "no", "no", "no"]
    references = ["yes", "yes", "no", "yes", "yes", "no"]
    assert f1(predictions, references, LABELS) == pytest.approx(4 / 7)
    # for the other label: 1 hit, 2 false alarms, 1 miss
    assert f1(predictions, references, LABELS[::-1]) == pytest.approx(2 / 5)
    assert macro_f1(predictions, references, LABELS) == pytest.approx((4 / 7 + 2 / 5) / 2)
    with pytest.raises(ValueError, match="needs task.labels"):
        f1(predictions, references)


def test_f1_of_all_positive_is_the_published_mrpc_baseline():
    # 68.4 per cent of MRPC's 408 validation pairs (279) are equivalent: accuracy 68.4, F1 81.2
    references = ["yes"] * 279 + ["no"] * 129
    assert majority("accuracy", references, LABELS) == pytest.approx(0.684, abs=5e-4)
    assert majority("f1", references, LABELS) == pytest.approx(0.812, abs=5e-4)


def test_macro_f1_of_three_classes():
    # confusion matrix, rows true, columns predicted: [2 1 0] [1 1 1] [0 0 2]
    references = ["a"] * 3 + ["b"] * 3 + ["c"] * 2
    predictions = ["a", "a", "b", "a", "b", "c", "c", "c"]
    by_hand = (2 / 3 + 2 / 5 + 4 / 5) / 3
    assert macro_f1(predictions, references, ["a", "b", "c"]) == pytest.approx(by_hand)
    # a label that never occurs counts as zero; an illegal answer is only a miss
    assert macro_f1(predictions, references, ["a", "b", "c", "d"]) == pytest.approx(by_hand * 3 / 4)


def test_squad_normalisation():
    assert normalize("The  Quick, brown fox's\ta-n!") == "quick brown foxs"
    assert exact_match(["the U.S.A.", "an apple"], ["usa", "the pear"]) == 0.5


@pytest.mark.parametrize(
    "prediction, reference, value",
    [
        ("the cat sat", "a cat", 2 / 3),  # precision 1/2, recall 1
        ("cat cat dog", "cat dog dog", 2 / 3),  # words count as often as both have them
        ("", "", 1.0),
        ("the", "", 1.0),
        ("cat", "", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_token_f1(prediction, reference, value):
    assert token_f1([prediction], [reference]) == pytest.approx(value)


def test_majority_is_the_best_constant_for_accuracy():
    references = ["a"] * 5 + ["b"] * 3 + ["c"] * 2
    assert majority("accuracy", references, ["a", "b", "c"]) == 0.5
    assert majority("macro_f1", references, ["a", "b", "c"]) == pytest.approx(10 / 15 / 3)
