"""Questions answered from a text: SQuAD, and the sets of MRQA that lie outside its domain."""

import re
import string
from collections.abc import Iterable, Iterator

from jaxprompt.data.rows import Row
from jaxprompt.data.tasks.entry import (
    TRAIN_AND_VALIDATION,
    UNKNOWN,
    Entry,
    Rule,
    drop_made_up_answers,
    list_of_texts,
)

_QA = {
    "template": "question: {question} context: {context}",
    "target": "{answer}",
    "rule": "squad",
    "answers": "answers",
    "metrics": ["token_f1", "exact_match"],
}


def _mrqa(name: str) -> Entry:
    """A set that prompts tuned on SQuAD are tested on (Lester et al. 2021, section 5)."""
    return _QA | {"source": f"tfds:mrqa/{name}", "validation": "test"}


TASKS: dict[str, Entry] = {
    "squad": TRAIN_AND_VALIDATION | _QA | {"source": "hf:rajpurkar/squad"},
    "mrqa_bio_asq": _mrqa("bio_asq"),
    "mrqa_drop": _mrqa("drop"),
    "mrqa_duo_rc": _mrqa("duo_rc"),
    "mrqa_race": _mrqa("race"),
    "mrqa_relation_extraction": _mrqa("relation_extraction"),
    "mrqa_textbook_qa": _mrqa("textbook_qa"),
}  # fmt: skip

PREFIXES = dict.fromkeys(TASKS, "")


def squad(rows: Iterable[Row], training: bool) -> Iterator[Row]:
    """SQuAD and MRQA: blanks around all punctuation; the first of the answers is the target."""
    for row in rows:
        answers = row.get("answers")
        texts = answers["text"] if isinstance(answers, dict) else answers
        padded = [pad_punctuation(text) for text in list_of_texts(row, "answers", texts, training)]
        padded = padded or [UNKNOWN]
        question, context = pad_punctuation(row["question"]), pad_punctuation(row["context"])
        made = {"question": question, "context": context, "answers": padded, "answer": padded[0]}
        yield drop_made_up_answers(row | made, answers)


_PUNCTUATION = re.compile(f"([{re.escape(string.punctuation)}])")
_BLANKS = re.compile(r"[\t\n\f\r ]+")  # white space as RE2 has it: without U+000B


def pad_punctuation(text: str) -> str:
    """Blanks around each ASCII punctuation mark, single ones between words, none outside.

    T5 leaves a blank at the ends, which SentencePiece then drops.
    """
    return _BLANKS.sub(" ", _PUNCTUATION.sub(r" \1 ", text)).strip(" ")


RULES: dict[str, Rule] = {"squad": squad}
