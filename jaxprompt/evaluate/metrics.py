"""Metrics on texts: functions of predictions, references and labels; fractions, not per cent."""

import collections
import re
import string
from collections.abc import Callable, Sequence

Metric = Callable[[Sequence[str], Sequence[str], Sequence[str] | None], float]


def accuracy(
    predictions: Sequence[str], references: Sequence[str], labels: Sequence[str] | None = None
) -> float:
    """Share of predictions that equal their reference."""
    _check(predictions, references)
    return sum(map(str.__eq__, predictions, references)) / len(references)


def f1(
    predictions: Sequence[str], references: Sequence[str], labels: Sequence[str] | None = None
) -> float:
    """Binary F1 of the last label, the positive one (MRPC: equivalent, QQP: duplicate)."""
    _check(predictions, references)
    if not labels:
        raise ValueError("The metric 'f1' needs task.labels; its last one is the positive class.")
    return _class_f1(predictions, references, labels[-1])


def macro_f1(
    predictions: Sequence[str], references: Sequence[str], labels: Sequence[str] | None = None
) -> float:
    """Mean of the F1 of every label (CB in SuperGLUE)."""
    _check(predictions, references)
    names = labels or sorted(set(references) | set(predictions))
    return sum(_class_f1(predictions, references, name) for name in names) / len(names)


def exact_match(
    predictions: Sequence[str], references: Sequence[str], labels: Sequence[str] | None = None
) -> float:
    """Share of predictions equal to their reference after SQuAD's normalisation."""
    _check(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return sum(normalize(p) == normalize(r) for p, r in pairs) / len(references)


def token_f1(
    predictions: Sequence[str], references: Sequence[str], labels: Sequence[str] | None = None
) -> float:
    """Mean F1 of the words shared by prediction and reference (SQuAD, Rajpurkar et al. 2016)."""
    _check(predictions, references)
    total = 0.0
    for prediction, reference in zip(predictions, references, strict=True):
        found, wanted = normalize(prediction).split(), normalize(reference).split()
        shared = sum((collections.Counter(found) & collections.Counter(wanted)).values())
        if not found or not wanted:
            total += float(found == wanted)
        else:
            total += 2 * shared / (len(found) + len(wanted))
    return total / len(references)


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "exact_match": exact_match,
    "token_f1": token_f1,
}


def majority(metric: str, references: Sequence[str], labels: Sequence[str] | None) -> float:
    """What a constant answer, the most frequent reference, scores."""
    answer = collections.Counter(references).most_common(1)[0][0]
    return METRICS[metric]([answer] * len(references), references, labels)


def normalize(text: str) -> str:
    """SQuAD's answer normalisation: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _class_f1(predictions: Sequence[str], references: Sequence[str], name: str) -> float:
    pairs = list(zip(predictions, references, strict=True))
    hits = sum(p == r == name for p, r in pairs)
    named = sum((p == name) + (r == name) for p, r in pairs)
    return 2 * hits / named if named else 0.0


def _check(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references; give one for each, "
            "and at least one."
        )
