"""Metrics on texts: functions of predictions, references and labels; fractions, not per cent."""

import collections
import importlib
import re
import string
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.references import Reference

_ILLEGAL = "\0illegal"  # a class for predictions that are no label; no label is spelt like this

Metric = Callable[[Sequence[str], Sequence[Reference], Sequence[str] | None], float]


def accuracy(
    predictions: Sequence[str], references: Sequence[Reference], labels: Sequence[str] | None = None
) -> float:
    """Share of predictions that equal their reference."""
    return _mean(p == r.text for p, r in _pairs(predictions, references))


def f1(
    predictions: Sequence[str], references: Sequence[Reference], labels: Sequence[str] | None = None
) -> float:
    """Binary F1 of the last label, the positive one (MRPC: equivalent, QQP: duplicate).

    A prediction that is no label counts as the wrong one, as in T5's evaluation.
    """
    pairs = _pairs(predictions, references)
    if not labels:
        raise ValueError("The metric 'f1' needs task.labels; its last one is the positive class.")
    positive = labels[-1]
    predicted = [p == positive if p in labels else r.text != positive for p, r in pairs]
    return _binary_f1(predicted, [r.text == positive for _, r in pairs])


def macro_f1(
    predictions: Sequence[str], references: Sequence[Reference], labels: Sequence[str] | None = None
) -> float:
    """Mean of the F1 of every label (CB in SuperGLUE)."""
    pairs = _pairs(predictions, references)
    names = labels or sorted({r.text for r in references} | set(predictions))
    return _mean(
        _binary_f1([p == name for p, _ in pairs], [r.text == name for _, r in pairs])
        for name in names
    )


def group_exact_match(
    predictions: Sequence[str], references: Sequence[Reference], labels: Sequence[str] | None = None
) -> float:
    """Share of groups of which every prediction is right (MultiRC's exact match)."""
    right: dict[Hashable, bool] = {}
    for p, r in _pairs(predictions, references):
        right[r.group] = right.get(r.group, True) and p == r.text
    return _mean(right.values())


def exact_match(
    predictions: Sequence[str], references: Sequence[Reference], labels: Sequence[str] | None = None
) -> float:
    """Share of predictions equal to an accepted answer after SQuAD's normalisation."""
    return _mean(
        normalize(p) in map(normalize, r.answers) for p, r in _pairs(predictions, references)
    )


def token_f1(
    predictions: Sequence[str], references: Sequence[Reference], labels: Sequence[str] | None = None
) -> float:
    """Mean F1 of the words shared with the best accepted answer (SQuAD 1.1, Rajpurkar et al. 2016).

    Without a shared word it is 0, also where neither side has a word left.
    """
    return _mean(
        max(_shared_f1(normalize(p).split(), normalize(answer).split()) for answer in r.answers)
        for p, r in _pairs(predictions, references)
    )


def matthews(
    predictions: Sequence[str], references: Sequence[Reference], labels: Sequence[str] | None = None
) -> float:
    """Matthews correlation of predictions and references (CoLA); -1 to 1.

    All predictions that are no label are one class of their own, as in T5's evaluation.
    """
    pairs = _pairs(predictions, references)
    wanted = [r.text for _, r in pairs]
    legal = set(labels or wanted)
    predicted = [p if p in legal else _ILLEGAL for p, _ in pairs]
    return float(_package("matthews").matthews_corrcoef(wanted, predicted))


def pearson(
    predictions: Sequence[str], references: Sequence[Reference], labels: Sequence[str] | None = None
) -> float:
    """Pearson correlation of numbers written as text (STS-B); text that is no number is -1."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, references)


def spearman(
    predictions: Sequence[str], references: Sequence[Reference], labels: Sequence[str] | None = None
) -> float:
    """Spearman's rank correlation of numbers written as text; text that is no number is -1."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, references)


def wsc_accuracy(
    predictions: Sequence[str], references: Sequence[Reference], labels: Sequence[str] | None = None
) -> float:
    """Share of pronouns judged right (WSC): references are True or False, answers the referent."""
    return _mean(
        str(names_referent(p, r.answers[0])) == r.text for p, r in _pairs(predictions, references)
    )


_DETERMINERS = frozenset(
    "a an few her his each every many much my our some that the their these this those which whose"
    " your".split()
)


def names_referent(prediction: str, referent: str) -> bool | None:
    """Whether an answer names the referent of WSC's pronoun (Raffel et al. 2020, appendix).

    Case and determiners do not count. The words of one must be among the words of the other, and
    both have an apostrophe or neither: Bob is not Bob's hat. A prediction without words gives None,
    which is never right. As in T5's code, text is split at single blanks, so an empty text and a
    run of blanks are the empty word; only that names a referent made of determiners alone.
    """
    predicted, wanted = (
        " ".join(word for word in text.strip().lower().split(" ") if word not in _DETERMINERS)
        for text in (prediction, referent)
    )
    if not predicted:
        return None
    if ("'" in predicted) != ("'" in wanted):
        return False
    one, other = set(predicted.split(" ")), set(wanted.split(" "))
    return one <= other or other <= one


def bleu(
    predictions: Sequence[str], references: Sequence[Reference], labels: Sequence[str] | None = None
) -> float:
    """Corpus BLEU by sacrebleu with T5's tokenization "intl"; every reference counts; 0 to 1."""
    pairs = _pairs(predictions, references)
    sacrebleu = _package("bleu")
    max_answers = max(len(r.answers) for _, r in pairs)
    streams = [
        [r.answers[i] if i < len(r.answers) else None for _, r in pairs] for i in range(max_answers)
    ]
    result = sacrebleu.corpus_bleu(list(predictions), streams, tokenize="intl")
    return result.score / 100


def _rouge(kind: str) -> Metric:
    def metric(predictions, references, labels=None) -> float:
        pairs = _pairs(predictions, references)
        scorer = _package(kind).RougeScorer([kind])
        # sentences on lines of their own, as rougeLsum wants them and T5 gives them
        lines = [(p.replace(" . ", " .\n"), r.text.replace(" . ", " .\n")) for p, r in pairs]
        return _mean(scorer.score(wanted, predicted)[kind].fmeasure for predicted, wanted in lines)

    metric.__doc__ = f"Mean F-measure of {kind} by rouge-score, without stemming, as in T5."
    return metric


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "group_exact_match": group_exact_match,
    "exact_match": exact_match,
    "token_f1": token_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "wsc_accuracy": wsc_accuracy,
    "bleu": bleu,
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeLsum": _rouge("rougeLsum"),
}

SUPERGLUE = ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")


def superglue_score(results: dict[str, dict[str, float]]) -> float:
    """SuperGLUE's score: the mean of the eight tasks, of a task with two metrics their mean first.

    ``results``: task -> metric -> fraction. Wang et al. 2019, section 3; Lester et al. 2021,
    table 3 (in per cent there).
    """
    missing = [task for task in SUPERGLUE if not results.get(task)]
    if missing:
        raise UserError(
            f"The SuperGLUE score needs all of {', '.join(SUPERGLUE)}; {', '.join(missing)} "
            "are missing."
        )
    return _mean(_mean(results[task].values()) for task in SUPERGLUE)


def majority(metric: str, references: Sequence[Reference], labels: Sequence[str] | None) -> float:
    """The metric of a constant prediction, the most frequent reference."""
    answer = collections.Counter(r.text for r in references).most_common(1)[0][0]
    return METRICS[metric]([answer] * len(references), references, labels)


def diagnose(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float | dict]:
    """How often each label was predicted, and the share of predictions that are no label."""
    counts = collections.Counter(predictions)
    return {
        "illegal": 1 - sum(counts[label] for label in labels) / max(len(predictions), 1),
        "predicted": {label: counts[label] for label in labels},
    }


def normalize(text: str) -> str:
    """SQuAD's answer normalisation: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _shared_f1(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    shared = sum((collections.Counter(predicted) & collections.Counter(wanted)).values())
    return 2 * shared / (len(predicted) + len(wanted)) if shared else 0.0


def _binary_f1(predicted: Sequence[bool], wanted: Sequence[bool]) -> float:
    hits = sum(map(bool.__and__, predicted, wanted))
    return 2 * hits / (sum(predicted) + sum(wanted)) if hits else 0.0


def _correlation(function, predictions, references) -> float:
    pairs = _pairs(predictions, references)
    predicted, wanted = [_number(p) for p, _ in pairs], [_number(r.text) for _, r in pairs]
    if len(set(predicted)) < 2 or len(set(wanted)) < 2:
        return 0.0  # a constant is correlated with nothing
    return float(function(predicted, wanted)[0])


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if np.isfinite(value) else -1.0


def _mean(values) -> float:
    return float(np.mean([float(value) for value in values]))


_PACKAGES = {
    "matthews": "sklearn.metrics",
    "bleu": "sacrebleu",
    **dict.fromkeys(("rouge1", "rouge2", "rougeLsum"), "rouge_score.rouge_scorer"),
}


def check_packages(metrics: Iterable[str]) -> None:
    """Raise a UserError if one of the metrics needs a package that is not installed."""
    for metric in metrics:
        if metric in _PACKAGES:
            _package(metric)


def _package(metric: str):
    try:
        return importlib.import_module(_PACKAGES[metric])
    except ImportError as error:
        raise UserError(
            f"The metric {metric!r} needs {error.name!r}, which is not installed; run "
            "\"pip install 'jaxprompt[metrics]'\"."
        ) from None


def _pairs(
    predictions: Sequence[str], references: Sequence[Reference]
) -> list[tuple[str, Reference]]:
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references; give one for each, "
            "and at least one."
        )
    return list(zip(predictions, references, strict=True))


def measure(
    task: TaskConfig, predictions: Sequence[str], references: Sequence[Reference]
) -> dict[str, float]:
    """The metrics that the task names."""
    check_metrics(task)
    return {
        name: METRICS[name](list(predictions), list(references), task.labels)
        for name in task.metrics
    }


def check_metrics(task: TaskConfig) -> None:
    """Refuse a metric that is unknown, lacks its package or that the task has no labels for."""
    unknown = [name for name in task.metrics if name not in METRICS]
    if unknown:
        raise UserError(
            f"Task {task.name!r} asks for metric {unknown[0]!r}; known are {', '.join(METRICS)}."
        )
    check_packages(task.metrics)
    if "f1" in task.metrics and not task.labels:
        raise UserError(
            f"Task {task.name!r} asks for metric 'f1', which is that of the last of its labels; "
            "give task.labels, or ask for 'macro_f1' or 'token_f1'."
        )
