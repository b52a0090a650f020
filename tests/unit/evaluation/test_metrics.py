"""Metrics against figures worked out by hand and published ones."""

import sys

import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.references import Reference
from jaxprompt.evaluation.metrics import (
    METRICS,
    SUPERGLUE,
    accuracy,
    bleu,
    check_metrics,
    diagnose,
    exact_match,
    f1,
    group_exact_match,
    macro_f1,
    majority,
    matthews,
    names_referent,
    normalize,
    pearson,
    spearman,
    superglue_score,
    token_f1,
)
from jaxprompt.inference.ensemble import likeliest, vote

LABELS = ["no", "yes"]


def judge(metric, predictions, texts, labels=None):
    """The metric where each row has one answer."""
    return metric(predictions, rows(texts), labels)


def rows(texts):
    return [Reference(t, (t,), i) for i, t in enumerate(texts)]


NUMBERS = ["pearson", "spearman"]
# one word has no pair of words, and none of BLEU's fours
OTHERS = [n for n in METRICS if n not in (*NUMBERS, "wsc_accuracy", "rouge2", "bleu")]


@pytest.mark.parametrize("name", OTHERS)
def test_every_metric_is_one_for_the_truth_and_zero_for_none_of_it(name):
    texts = ["yes", "no", "yes"]
    assert judge(METRICS[name], texts, texts, LABELS) == pytest.approx(1.0)
    assert judge(METRICS[name], ["x", "x", "x"], texts, LABELS) == 0.0


@pytest.mark.parametrize("name", NUMBERS)
def test_correlations_of_texts_that_are_numbers(name):
    texts = ["0.2", "5.0", "1.8", "3.4"]
    assert judge(METRICS[name], texts, texts) == pytest.approx(1.0)
    assert judge(METRICS[name], [f"-{t}" for t in texts], texts) == pytest.approx(-1.0)
    for constant in ("1.0", "no number", "nan", "inf"):
        assert judge(METRICS[name], [constant] * 4, texts) == 0.0


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_refuses_nothing_and_unequal_numbers(name):
    with pytest.raises(ValueError, match="0 predictions for 0 references"):
        judge(METRICS[name], [], [], LABELS)
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        judge(METRICS[name], ["yes"], ["yes", "no"], LABELS)


def test_accuracy_compares_exactly():
    assert judge(accuracy, ["yes", "Yes", "no", "no"], ["yes", "yes", "yes", "no"]) == 0.5


def test_f1_is_that_of_the_last_label():
    # 2 hits, 1 false alarm, 2 misses: precision 2/3, recall 1/2
    predictions = ["yes", "yes", "yes", "no", "no", "no"]
    references = ["yes", "yes", "no", "yes", "yes", "no"]
    assert judge(f1, predictions, references, LABELS) == pytest.approx(4 / 7)
    # for the other label: 1 hit, 2 false alarms, 1 miss
    assert judge(f1, predictions, references, LABELS[::-1]) == pytest.approx(2 / 5)
    assert judge(macro_f1, predictions, references, LABELS) == pytest.approx((4 / 7 + 2 / 5) / 2)
    with pytest.raises(ValueError, match="needs task.labels"):
        judge(f1, predictions, references)


def test_f1_of_all_positive_is_the_published_mrpc_baseline():
    # 68.4 per cent of MRPC's 408 validation pairs (279) are equivalent: accuracy 68.4, F1 81.2
    references = ["yes"] * 279 + ["no"] * 129
    assert majority("accuracy", rows(references), LABELS) == pytest.approx(0.684, abs=5e-4)
    assert majority("f1", rows(references), LABELS) == pytest.approx(0.812, abs=5e-4)


def test_macro_f1_of_three_classes():
    # confusion matrix, rows true, columns predicted: [2 1 0] [1 1 1] [0 0 2]
    references = ["a"] * 3 + ["b"] * 3 + ["c"] * 2
    predictions = ["a", "a", "b", "a", "b", "c", "c", "c"]
    by_hand = (2 / 3 + 2 / 5 + 4 / 5) / 3
    assert judge(macro_f1, predictions, references, ["a", "b", "c"]) == pytest.approx(by_hand)
    # a label that never occurs counts as zero; an illegal answer is only a miss
    assert judge(macro_f1, predictions, references, ["a", "b", "c", "d"]) == pytest.approx(
        by_hand * 3 / 4
    )


def test_squad_normalisation():
    assert normalize("The  Quick, brown fox's\ta-n!") == "quick brown foxs"
    assert judge(exact_match, ["the U.S.A.", "an apple"], ["usa", "the pear"]) == 0.5


@pytest.mark.parametrize(
    "prediction, reference, value",
    [
        ("the cat sat", "a cat", 2 / 3),  # precision 1/2, recall 1
        ("cat cat dog", "cat dog dog", 2 / 3),  # words count as often as both have them
        ("", "", 0.0),  # as the official script of SQuAD 1.1 has it
        ("the", "", 0.0),
        ("cat", "", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_token_f1(prediction, reference, value):
    assert judge(token_f1, [prediction], [reference]) == pytest.approx(value)


def test_majority_is_the_best_constant_for_accuracy():
    references = ["a"] * 5 + ["b"] * 3 + ["c"] * 2
    assert majority("accuracy", rows(references), ["a", "b", "c"]) == 0.5
    assert majority("macro_f1", rows(references), ["a", "b", "c"]) == pytest.approx(10 / 15 / 3)


def test_best_of_all_accepted_answers():
    found = [Reference("x", ("a red cat", "dog"), 0), Reference("x", ("bird",), 1)]
    assert exact_match(["the dog", "bird"], found) == 1.0
    assert token_f1(["red dog", "fish"], found) == pytest.approx((2 / 3) / 2)


def test_groups_are_right_as_a_whole():
    found = [Reference("yes", ("yes",), group) for group in ("a", "b", "a", "c")]
    assert group_exact_match(["yes", "yes", "no", "yes"], found) == pytest.approx(2 / 3)


def test_matthews_of_a_known_table():
    # TP 6, TN 3, FP 1, FN 2 (12 rows): (6 * 3 - 1 * 2) / sqrt(7 * 8 * 4 * 5) = 0.478
    predictions = ["yes"] * 6 + ["no"] * 3 + ["yes"] + ["no"] * 2
    references = ["yes"] * 6 + ["no"] * 3 + ["no"] + ["yes"] * 2
    assert judge(matthews, predictions, references) == pytest.approx(16 / 1120**0.5)
    assert judge(matthews, ["yes"] * 12, references) == 0.0


def test_illegal_answers_are_one_class_to_matthews():
    # rows true, columns predicted (no, yes, illegal): [1 0 1] [0 1 1]; by Gorodkin's formula
    # c 2, s 4, p (1, 1, 2), t (2, 2, 0): (2*4 - 4) / sqrt((16 - 6) (16 - 8)) = 4 / sqrt(80)
    references = ["no", "no", "yes", "yes"]
    for others in (("x", "y"), ("x", "x"), ("no yes", "")):
        predictions = ["no", others[0], "yes", others[1]]
        assert judge(matthews, predictions, references, LABELS) == pytest.approx(4 / 80**0.5)
        assert judge(matthews, predictions, references) == pytest.approx(4 / 80**0.5)


def test_ranks_are_compared_and_not_distances():
    texts = ["1.0", "2.0", "3.0", "100.0"]
    assert judge(spearman, ["1", "2", "3", "4"], texts) == pytest.approx(1.0)
    # covariance 149, squares 5 and 7205
    assert judge(pearson, ["1", "2", "3", "4"], texts) == pytest.approx(149 / 36025**0.5)


@pytest.mark.parametrize(
    "prediction, referent, named",
    [
        ("Mark", "mark", True),
        ("the fuzzy bunny", "bunny", True),
        ("bunny", "His fuzzy bunny", True),
        ("Bob", "Bob's hat", False),
        ("Bob's", "Bob's hat", True),
        ("John", "Mary", False),
        ("", "Mary", None),
        (" the ", "Mary", None),
        ("Mary", "the", False),  # a referent without a word is not a part of everything
        ("the", "the", None),
        ("the   a", "Mary", False),  # the blanks between are what T5's code compares
        ("the   a", "the", True),
    ],
)
def test_what_names_a_referent(prediction, referent, named):
    assert names_referent(prediction, referent) is named


def test_bleu_counts_every_reference():
    found = [Reference("", ("a b c d e",), 0), Reference("", ("v w x y z", "k l m n o"), 1)]
    assert bleu(["a b c d e", "k l m n o"], found) == pytest.approx(1.0)
    # 4-grams of one row of two are right: the precisions are 1/2 each, no brevity penalty
    assert bleu(["a b c d e", "1 2 3 4 5"], found) == pytest.approx(0.5)


@pytest.mark.parametrize("column, score", [*enumerate([90.5, 91.0, 91.3])])
def test_superglue_score_is_the_papers(column, score):
    # Lester et al. 2021, table 3, T5-XXL: mean of 5 prompts, best of them, ensemble
    table = {
        "boolq": {"accuracy": (91.1, 91.3, 91.7)},
        "cb": {"accuracy": (99.3, 100, 100), "macro_f1": (99.0, 100, 100)},
        "copa": {"accuracy": (98.8, 100, 100)},
        "multirc": {"group_exact_match": (65.7, 66.3, 67.1), "f1": (88.7, 89.0, 89.4)},
        "record": {"exact_match": (92.7, 92.9, 93.2), "token_f1": (93.4, 93.5, 93.9)},
        "rte": {"accuracy": (92.6, 93.5, 93.5)},
        "wic": {"accuracy": (76.2, 76.6, 77.4)},
        "wsc": {"wsc_accuracy": (95.8, 96.2, 96.2)},
    }
    assert set(table) == set(SUPERGLUE)
    results = {
        task: {metric: values[column] / 100 for metric, values in metrics.items()}
        for task, metrics in table.items()
    }
    # the table is rounded, and so is what can be had from it
    assert 100 * superglue_score(results) == pytest.approx(score, abs=0.06)
    with pytest.raises(UserError, match="needs all of boolq.*; wsc are missing"):
        superglue_score({k: v for k, v in results.items() if k != "wsc"})


def test_diagnosis():
    found = diagnose(["yes", "no", "maybe", "yes"], LABELS)
    assert found == {"illegal": 0.25, "predicted": {"no": 1, "yes": 2}}


@pytest.mark.parametrize("metric, package", [("bleu", "sacrebleu"), ("rouge2", "rouge_score")])
def test_a_package_that_is_not_there_is_named_before_any_work(metric, package, monkeypatch):
    task = TaskConfig(name="t", template="{a}", metrics=["accuracy", metric])
    check_metrics(task)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(UserError, match=rf"'{metric}' needs '{package}.*jaxprompt\[metrics\]"):
        check_metrics(task)


def test_majority_vote_and_the_first_of_equals():
    answers = [["a", "b", "c", "a"], ["b", "b", "c", "b"], ["b", "c", "a", "c"]]
    assert vote(answers) == ["b", "b", "c", "a"]
    assert vote([["x"], ["y"]]) == ["x"] and vote([["x"]]) == ["x"]


def test_the_highest_mean_likelihood_can_outvote_the_majority():
    # two prompts lean to no, one is sure of yes; their probabilities of no: 0.6, 0.6, 0.01
    shares = np.array([[[0.6, 0.4]], [[0.6, 0.4]], [[0.01, 0.99]]])
    assert likeliest(np.log(shares), LABELS) == ["yes"]
    # only the ratio of a prompt's likelihoods counts: targets may be long for one of them
    assert likeliest(np.log(shares) - [[[900.0]], [[3.0]], [[90.0]]], LABELS) == ["yes"]
    assert likeliest(np.log(shares[:2]), LABELS) == ["no"]
