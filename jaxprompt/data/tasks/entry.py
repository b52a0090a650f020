"""What entries and row rules of several benchmarks share."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.limits import SPLITS
from jaxprompt.config.values import Values
from jaxprompt.data.rows import Row

Entry = Values  # of a TaskConfig
Rule = Callable[[Iterable[Row], bool], Iterator[Row]]  # (rows, whether they are trained on)

UNKNOWN = "<unk>"  # T5's target where there is no answer


def label_words(*words: str) -> Entry:
    """Label words in the order of their numbers in the data.

    >>> label_words("no", "yes")
    {'labels': ['no', 'yes'], 'label_map': {'0': 'no', '1': 'yes'}}
    """
    return {"labels": list(words), "label_map": {str(i): word for i, word in enumerate(words)}}


TRAIN_AND_VALIDATION: Entry = {"train": "train", "validation": "validation"}
THREE_SPLITS: Entry = {name: name for name in SPLITS}
TRUE_OR_FALSE: Entry = {
    "labels": ["False", "True"],
    "label_map": {"0": "False", "1": "True", "False": "False", "True": "True"},
}
ENTAILMENT = label_words("entailment", "not_entailment")


def label_text(row: Row) -> str | None:
    """The label as text; -1 where it is unknown, as in test splits; null stays null."""
    label = row.get("label", -1)
    return None if label is None or label != label else str(label)


def list_of_texts(row: Row, column: str, value: object, training: bool) -> list[str]:
    """A column that has to be a list of texts; none of them where it is null.

    To iterate over a text would make a text of each of its letters.
    """
    if value is None and (not training or column in row):
        return []
    texts = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{column!r} is {shown(value)}, and it has to be a list of texts.")
    return list(texts)


def drop_made_up_answers(row: Row, given: object, column: str = "answers") -> Row:
    """The row, without accepted answers where its source gives none: it cannot be judged."""
    return row | {column: None} if given is None else row
