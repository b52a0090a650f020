"""Per-class metrics and the confusion matrix against figures worked out by hand."""

import json

import pytest

from jaxprompt.data.references import Reference
from jaxprompt.evaluation.classes import OTHER, class_metrics, class_report, confusion_of
from jaxprompt.evaluation.metrics import macro_f1

LABELS = ["cat", "dog", "owl"]
TEXTS = ["cat", "cat", "cat", "dog", "dog"]
PREDICTED = ["cat", "cat", "dog", "dog", "a dog"]


def rows(texts):
    return [Reference(text, (text,), i) for i, text in enumerate(texts)]


def test_predictions_are_counted_by_reference_and_those_that_are_no_label_apart():
    confusion = confusion_of(PREDICTED, rows(TEXTS), LABELS)
    assert confusion.labels == ("cat", "dog", "owl")
    assert confusion.counts.tolist() == [[2, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]


def test_each_class_has_precision_recall_f1_and_support():
    found = class_metrics(confusion_of(PREDICTED, rows(TEXTS), LABELS))
    assert found["cat"] == pytest.approx({"precision": 1, "recall": 2 / 3, "f1": 0.8, "support": 3})
    assert found["dog"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert found["owl"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


def test_the_mean_f1_is_the_metric_macro_f1():
    report = class_report(confusion_of(PREDICTED, rows(TEXTS), LABELS))
    assert report["macro"]["f1"] == pytest.approx(macro_f1(PREDICTED, rows(TEXTS), LABELS))
    assert report["confusion"]["columns"] == [*LABELS, OTHER]
    assert json.loads(json.dumps(report)) == report


def test_a_reference_that_is_no_label_is_a_class_too():
    confusion = confusion_of(["cat", "fox"], rows(["fox", "fox"]), ["cat"])
    assert confusion.labels == ("cat", "fox") and confusion.counts.tolist() == [[0] * 3, [1, 1, 0]]
