"""Texts to write: a summary of an article, a text about triples."""

from collections.abc import Iterable, Iterator

from jaxprompt.config.errors import UserError
from jaxprompt.data.rows import Row
from jaxprompt.data.tasks.entry import (
    TRAIN_AND_VALIDATION,
    UNKNOWN,
    Entry,
    Rule,
    drop_made_up_answers,
    list_of_texts,
)

TASKS: dict[str, Entry] = {
    "xsum": TRAIN_AND_VALIDATION | {
        "source": "hf:EdinburghNLP/xsum",
        "template": "{document}",
        "target": "{summary}",
        "metrics": ["rouge2", "rouge1", "rougeLsum"],
        "max_target_length": 256,
    },
    "web_nlg": TRAIN_AND_VALIDATION | {
        "source": "hf:GEM/web_nlg/en",
        "rule": "web_nlg",
        "template": "{triples}",
        "target": "{target}",
        "answers": "references",
        "metrics": ["bleu"],
        "max_target_length": 256,
    },
}  # fmt: skip

PREFIXES = {"xsum": "summarize: ", "web_nlg": ""}


def web_nlg(rows: Iterable[Row], training: bool) -> Iterator[Row]:
    """WebNLG: triples as text, and all references to judge an answer by."""
    for row in rows:
        target = row.get("target") or ""
        texts = list_of_texts(row, "references", row.get("references"), False)
        if training and not target and not texts:
            raise UserError("it has neither a target nor references to learn from.")
        texts = texts or [target or UNKNOWN]  # unknown: rows to be answered
        triples = " && ".join(list_of_texts(row, "input", row["input"], True))
        made = {"triples": triples, "references": texts, "target": target or texts[0]}
        given = target or row.get("references") or None
        yield drop_made_up_answers(row | made, given, "references")


RULES: dict[str, Rule] = {"web_nlg": web_nlg}
