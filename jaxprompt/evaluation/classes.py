"""How a classifier does on each class: precision, recall, F1, support, and what is confused."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
from jaxtyping import Int

from jaxprompt.data.references import Reference

OTHER = "(no label)"  # the column of predictions that are none of the labels


class ClassMetrics(TypedDict):
    """Of one class. Precision, recall and F1 are fractions; without any such row they are 0."""

    precision: float
    recall: float
    f1: float
    support: int  # rows whose reference is the class


class ClassReport(TypedDict):
    """What ``class_report`` says; JSON-ready."""

    classes: dict[str, ClassMetrics]
    macro: dict[str, float]  # unweighted means of precision, recall and f1
    confusion: dict[str, list]  # rows and columns: names; counts: a list for each row


class Confusion(NamedTuple):
    """``counts[i, j]``: rows of class i for which class j was predicted; the last j is no label."""

    labels: tuple[str, ...]
    counts: Int[np.ndarray, "C C+1"]


def confusion_of(
    predictions: Sequence[str], references: Sequence[Reference], labels: Sequence[str]
) -> Confusion:
    """The confusion matrix. Classes are the labels, then references that are none of them."""
    texts = [reference.text for reference in references]
    classes = tuple(dict.fromkeys([*labels, *texts]))
    number = {name: i for i, name in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes) + 1), int)
    for predicted, text in zip(predictions, texts, strict=True):
        counts[number[text], number.get(predicted, len(classes))] += 1
    return Confusion(classes, counts)


def class_metrics(confusion: Confusion) -> dict[str, ClassMetrics]:
    """The metrics of each class, by its name."""
    hits = confusion.counts[:, :-1].diagonal()
    predicted, support = confusion.counts[:, :-1].sum(axis=0), confusion.counts.sum(axis=1)
    share = lambda part, of: float(part / of) if of else 0.0
    return {
        name: {
            "precision": share(hits[i], predicted[i]),
            "recall": share(hits[i], support[i]),
            "f1": share(2 * hits[i], predicted[i] + support[i]),
            "support": int(support[i]),
        }
        for i, name in enumerate(confusion.labels)
    }


def class_report(confusion: Confusion) -> ClassReport:
    """JSON: ``classes`` by name, the unweighted mean over them, and the ``confusion`` matrix.

    ``confusion.counts`` has a row for each reference class and a column for each of
    ``confusion.columns``, the predictions.
    """
    classes = class_metrics(confusion)
    mean = lambda values: float(np.mean(list(values)))
    return {
        "classes": classes,
        "macro": {
            "precision": mean(own["precision"] for own in classes.values()),
            "recall": mean(own["recall"] for own in classes.values()),
            "f1": mean(own["f1"] for own in classes.values()),
        },
        "confusion": {
            "rows": list(confusion.labels),
            "columns": [*confusion.labels, OTHER],
            "counts": confusion.counts.tolist(),
        },
    }
