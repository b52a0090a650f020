"""GLUE (Wang et al. 2018). WNLI is left to SuperGLUE's WSC, as T5 leaves it."""

from collections.abc import Iterable, Iterator

import numpy as np

from jaxprompt.config.errors import UserError, shown
from jaxprompt.data.rows import Row
from jaxprompt.data.tasks.entry import (
    ENTAILMENT,
    TRAIN_AND_VALIDATION,
    Entry,
    Rule,
    label_text,
    label_words,
)

_NLI = label_words("entailment", "neutral", "contradiction") | {
    "template": "hypothesis: {hypothesis} premise: {premise}",
}  # fmt: skip

TASKS: dict[str, Entry] = {
    "cola": TRAIN_AND_VALIDATION | label_words("unacceptable", "acceptable") | {
        "source": "hf:nyu-mll/glue/cola",
        "template": "sentence: {sentence}",
        "metrics": ["matthews", "accuracy"],
    },
    "sst2": TRAIN_AND_VALIDATION | label_words("negative", "positive") | {
        "source": "hf:nyu-mll/glue/sst2",
        "template": "sentence: {sentence}",
    },
    "mrpc": TRAIN_AND_VALIDATION | label_words("not_equivalent", "equivalent") | {
        "source": "hf:nyu-mll/glue/mrpc",
        "template": "sentence1: {sentence1} sentence2: {sentence2}",
        "metrics": ["f1", "accuracy"],
    },
    "qqp": TRAIN_AND_VALIDATION | label_words("not_duplicate", "duplicate") | {
        "source": "hf:nyu-mll/glue/qqp",
        "template": "question1: {question1} question2: {question2}",
        "metrics": ["f1", "accuracy"],
    },
    "stsb": TRAIN_AND_VALIDATION | {
        "source": "hf:nyu-mll/glue/stsb",
        "rule": "stsb",
        "template": "sentence1: {sentence1} sentence2: {sentence2}",
        "metrics": ["pearson", "spearman"],
        "max_target_length": 8,
    },
    "mnli": _NLI | {
        "source": "hf:nyu-mll/glue/mnli",
        "train": "train",
        "validation": "validation_matched",
    },
    "mnli_mismatched": _NLI | {
        "source": "hf:nyu-mll/glue/mnli",
        "train": "train",
        "validation": "validation_mismatched",
    },
    "qnli": TRAIN_AND_VALIDATION | ENTAILMENT | {
        "source": "hf:nyu-mll/glue/qnli",
        "template": "question: {question} sentence: {sentence}",
    },
    "glue_rte": TRAIN_AND_VALIDATION | ENTAILMENT | {
        "source": "hf:nyu-mll/glue/rte",
        "template": "sentence1: {sentence1} sentence2: {sentence2}",
    },
}  # fmt: skip

PREFIXES = {name: f"{name} " for name in TASKS} | {
    "mnli_mismatched": "mnli ",
    "glue_rte": "rte ",
}


def stsb(rows: Iterable[Row], training: bool) -> Iterator[Row]:
    """STS-B: the score rounded to the nearest fifth is the target text, as in 3.8."""
    for row in rows:
        label = label_text(row)
        if label is not None:
            value = np.round(np.float32(row.get("label", -1)) * np.float32(5)) / np.float32(5)
            if not np.isfinite(value):
                raise UserError(f"its label is {shown(label)}; it is a number.")
            label = f"{value:.1f}"
        yield row | {"label": label}


RULES: dict[str, Rule] = {"stsb": stsb}
