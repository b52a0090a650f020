"""SuperGLUE (Wang et al. 2019): the tasks that prompt tuning is judged by in the paper."""

import re
from collections.abc import Iterable, Iterator

from jaxprompt.config.errors import UserError, shown
from jaxprompt.data.rows import Row
from jaxprompt.data.tasks.entry import (
    ENTAILMENT,
    TRAIN_AND_VALIDATION,
    TRUE_OR_FALSE,
    UNKNOWN,
    Entry,
    Rule,
    drop_made_up_answers,
    label_text,
    label_words,
    list_of_texts,
)

TASKS: dict[str, Entry] = {
    "boolq": TRAIN_AND_VALIDATION | TRUE_OR_FALSE | {
        "source": "hf:aps/super_glue/boolq",
        "template": "passage: {passage} question: {question}",
    },
    "cb": TRAIN_AND_VALIDATION | label_words("entailment", "contradiction", "neutral") | {
        "source": "hf:aps/super_glue/cb",
        "template": "hypothesis: {hypothesis} premise: {premise}",
        "metrics": ["macro_f1", "accuracy"],
    },
    "copa": TRAIN_AND_VALIDATION | label_words("choice1", "choice2") | {
        "source": "hf:aps/super_glue/copa",
        "template": "choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}",
    },
    "multirc": TRAIN_AND_VALIDATION | TRUE_OR_FALSE | {
        "source": "hf:aps/super_glue/multirc",
        "rule": "multirc",
        "template": "question: {question} answer: {answer} paragraph: {paragraph}",
        "group": "group",
        "metrics": ["f1", "group_exact_match"],
    },
    "record": TRAIN_AND_VALIDATION | {
        "source": "hf:aps/super_glue/record",
        "rule": "record",
        "template": "query: {query} entities: {entities} passage: {passage}",
        "target": "{answer}",
        "answers": "answers",
        # Lester et al. 2021, footnote 7
        "class_labels": ["commonsense", "reasoning", "reading", "comprehension"],
        "metrics": ["token_f1", "exact_match"],
    },
    "rte": TRAIN_AND_VALIDATION | ENTAILMENT | {
        "source": "hf:aps/super_glue/rte",
        "template": "hypothesis: {hypothesis} premise: {premise}",
    },
    "wic": TRAIN_AND_VALIDATION | TRUE_OR_FALSE | {
        "source": "hf:aps/super_glue/wic",
        "template": "sentence1: {sentence1} sentence2: {sentence2} word: {word}",
    },
    "wsc": TRAIN_AND_VALIDATION | {
        "source": "hf:aps/super_glue/wsc.fixed",
        "rule": "wsc",
        "template": "{text}",
        "target": "{answer}",
        "answers": "referent",
        "class_labels": ["commonsense", "pronoun", "resolution"],  # footnote 7
        "metrics": ["wsc_accuracy"],
    },
}  # fmt: skip

PREFIXES = {name: f"{name} " for name in TASKS} | {"wsc": "wsc: "}


def copa(rows: Iterable[Row], training: bool) -> Iterator[Row]:
    """COPA: labels 0 and 1 are the words choice1 and choice2; ``question`` is cause or effect."""
    names = {"0": "choice1", "1": "choice2"}
    for row in rows:
        label = label_text(row)
        yield row | {"label": names.get(label or "", label)}


def multirc(rows: Iterable[Row], training: bool) -> Iterator[Row]:
    """MultiRC: one row an answer, without markup; ``group`` is the question it belongs to."""
    for row in rows:
        for flat in _multirc_answers(row) if "passage" in row else [row]:
            clean = {key: _no_markup(flat[key]) for key in ("question", "answer", "paragraph")}
            yield flat | clean | {"group": flat["idx"]["question"]}


def _multirc_answers(row: Row) -> Iterator[Row]:
    """The answers of one line of SuperGLUE's own file."""
    for question in row["passage"]["questions"]:
        for answer in question["answers"]:
            numbers = {"question": question["idx"], "answer": answer["idx"]}
            yield {
                "paragraph": row["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "label": answer.get("label", -1),
                "idx": {"paragraph": row["idx"]} | numbers,
            }


def _no_markup(text: str) -> str:
    return re.sub("</?b>", "", text.replace("<br>", " "))


def record(rows: Iterable[Row], training: bool) -> Iterator[Row]:
    """ReCoRD: one row an answer in training, one a query else, which is judged by all answers.

    Summary points marked by @highlight become sentences of the passage.
    """
    seen = set()
    for row in rows:
        for flat in _record_queries(row) if "qas" in row else [row]:
            answers = list_of_texts(flat, "answers", flat.get("answers"), training)
            passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", flat["passage"])
            common = flat | {
                "passage": passage.replace("\n@highlight\n", ". "),
                "entities": ", ".join(list_of_texts(flat, "entities", flat["entities"], training)),
                "answers": answers or [UNKNOWN],
            }
            if training:
                yield from (common | {"answer": answer} for answer in common["answers"])
                continue
            key = flat["idx"]["passage"], flat["idx"]["query"]
            if key not in seen:
                seen.add(key)
                yield drop_made_up_answers(
                    common | {"answer": common["answers"][0]}, flat.get("answers")
                )


def _record_queries(row: Row) -> Iterator[Row]:
    """The queries of one line of SuperGLUE's own file; entities and answers sorted, each once."""
    text = row["passage"]["text"]
    spans = row["passage"]["entities"]
    entities = sorted({text[span["start"] : span["end"] + 1] for span in spans})
    for query in row["qas"]:
        yield {
            "passage": text,
            "query": query["query"],
            "entities": entities,
            "answers": sorted({answer["text"] for answer in query.get("answers", ())}),
            "idx": {"passage": row["idx"], "query": query["idx"]},
        }


def wsc(rows: Iterable[Row], training: bool) -> Iterator[Row]:
    """WSC: stars around the pronoun; the target is what it refers to, trained on where it is right.

    Where it is not trained on, the target is the label (True, False) and ``referent`` what an
    answer has to name for it to be True: the metric is ``wsc_accuracy``.
    """
    for row in rows:
        if "target" in row:  # SuperGLUE's own file
            row = _wsc_spans(row | row["target"])
        label = label_text(row)
        label = {"0": "False", "1": "True"}.get(label or "", label)
        if training and label not in ("True", "False", "-1"):
            raise UserError(f"its label is {shown(row.get('label'))}; it is True or False.")
        if training and label != "True":
            continue
        referent = row["span1_text"]
        yield row | {
            "text": _star(row["text"], row["span2_index"], row["span2_text"]),
            "answer": referent if training else label,
            "referent": [referent],
        }


def _star(text: str, index: int, pronoun: str) -> str:
    """Put stars around word ``index``, or around the pronoun where that is not it.

    Two rows of WSC need help (T5 has them by heart): one where punctuation clings to the pronoun,
    one whose index is that of the word before it.
    """
    words = text.split(" ")
    marked = f"*{pronoun}*"
    if words[index] != pronoun:
        tail = words[index].removeprefix(pronoun)
        clings = tail != words[index] and not tail[0].isalnum()
        if clings:
            marked = f"{marked} {tail}"
        else:
            places = [i for i, word in enumerate(words) if word == pronoun]
            if not places:
                raise UserError(f"the pronoun {pronoun!r} is no word of its text.")
            index = min(places, key=lambda place: abs(place - index))
    return " ".join([*words[:index], marked, *words[index + 1 :]]).strip()


def _wsc_spans(row: Row) -> Row:
    """SuperGLUE's own spans as in ``wsc.fixed``: first letter, final stop, line break of the text.

    Two texts interrupt their subject; nothing can be done for those.
    """
    row = dict(row)
    for name in ("span1", "span2"):
        span = row[f"{name}_text"]
        if span in row["text"] or not span:
            continue
        first = row["text"].split()[row[f"{name}_index"]][0]
        span = (span[0].lower() if first.islower() else span[0].upper()) + span[1:]
        span = span.rstrip(".").replace("\n", " ")
        if span in row["text"]:
            row[f"{name}_text"] = span
    return row


RULES: dict[str, Rule] = {"copa": copa, "multirc": multirc, "record": record, "wsc": wsc}
