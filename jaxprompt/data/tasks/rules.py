"""Row rules: from the rows of a data set to the rows that a task's template can be filled with.

Most tasks need none. A rule is for rows that hold several questions (SuperGLUE's own files), that
are dropped or multiplied in training, or whose text T5 rewrites (Raffel et al. 2020, appendix D;
Lester et al. 2021, section 3, whose data code leaves them as they are). ``task.rule`` names one.
"""

import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.schema import TaskConfig

Row = dict[str, Any]
Rule = Callable[[Iterable[Row], bool], Iterator[Row]]  # rows, whether they are trained on

UNKNOWN = "<unk>"  # T5's target where there is no answer


def apply_rule(
    task: TaskConfig, rows: Sequence[Row], *, training: bool, origin: str | None = None
) -> Sequence[Row]:
    """Rows as the task's template wants them; ``origin`` (a file or a split) is for errors."""
    if task.rule is None:
        return rows
    if task.rule not in RULES:
        raise UserError(
            f"Task {task.name!r} has the rule {task.rule!r}; known are {', '.join(RULES)}."
        )
    origin = origin or f"task {task.name!r}"
    seen = 0

    def counted() -> Iterator[Row]:
        nonlocal seen
        for seen, row in enumerate(rows, 1):  # noqa: B007
            yield row

    try:
        made = list(RULES[task.rule](counted(), training))
    except UserError as error:
        raise UserError(f"Row {seen} of {origin}: {error}") from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"Row {seen} of {origin} is not as the rule {task.rule!r} expects "
            f"({type(error).__name__}: {_short(error)}); it has "
            f"{listed(map(repr, rows[seen - 1])) if seen else 'no columns'}."
        ) from None
    if not made and len(rows) > 0:
        raise UserError(f"The rule {task.rule!r} leaves none of the {len(rows)} rows of {origin}.")
    return made


def _short(error: Exception) -> str:
    return " ".join(str(error)[:200].split())


def copa(rows: Iterable[Row], training: bool) -> Iterator[Row]:
    """COPA: labels 0 and 1 are the words choice1 and choice2; ``question`` is cause or effect."""
    names = {"0": "choice1", "1": "choice2"}
    for row in rows:
        label = _label(row)
        yield row | {"label": names.get(label or "", label)}


def _label(row: Row) -> str | None:
    """The label as text; -1 where it is unknown, as in test splits; null stays null."""
    label = row.get("label", -1)
    return None if label is None or label != label else str(label)


def _texts(row: Row, column: str, value: Any, training: bool) -> list[str]:
    """A column that has to be a list of texts; none of them where it is null.

    To iterate over a text would make a text of each of its letters.
    """
    if value is None and (not training or column in row):
        return []
    texts = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{column!r} is {shown(value)}, and it has to be a list of texts.")
    return list(texts)


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
            answers = _texts(flat, "answers", flat.get("answers"), training)
            passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", flat["passage"])
            common = flat | {
                "passage": passage.replace("\n@highlight\n", ". "),
                "entities": ", ".join(_texts(flat, "entities", flat["entities"], training)),
                "answers": answers or [UNKNOWN],
            }
            if training:
                yield from (common | {"answer": answer} for answer in common["answers"])
                continue
            key = flat["idx"]["passage"], flat["idx"]["query"]
            if key not in seen:
                seen.add(key)
                yield _judged(common | {"answer": common["answers"][0]}, flat.get("answers"))


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
        label = _label(row)
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


def _judged(row: Row, given: Any, column: str = "answers") -> Row:
    """The row, without accepted answers where its source gives none: it cannot be judged."""
    return row | {column: None} if given is None else row


def squad(rows: Iterable[Row], training: bool) -> Iterator[Row]:
    """SQuAD and MRQA: blanks around all punctuation; the first of the answers is the target."""
    for row in rows:
        answers = row.get("answers")
        texts = answers["text"] if isinstance(answers, dict) else answers
        padded = [pad_punctuation(text) for text in _texts(row, "answers", texts, training)]
        padded = padded or [UNKNOWN]
        question, context = pad_punctuation(row["question"]), pad_punctuation(row["context"])
        made = {"question": question, "context": context, "answers": padded, "answer": padded[0]}
        yield _judged(row | made, answers)


_PUNCTUATION = re.compile(f"([{re.escape(string.punctuation)}])")
_BLANKS = re.compile(r"[\t\n\f\r ]+")  # white space as RE2 has it: without U+000B


def pad_punctuation(text: str) -> str:
    """Blanks around each ASCII punctuation mark, single ones between words, none outside.

    T5 leaves a blank at the ends, which SentencePiece then drops.
    """
    return _BLANKS.sub(" ", _PUNCTUATION.sub(r" \1 ", text)).strip(" ")


def stsb(rows: Iterable[Row], training: bool) -> Iterator[Row]:
    """STS-B: the score rounded to the nearest fifth is the target text, as in 3.8."""
    for row in rows:
        label = _label(row)
        if label is not None:
            value = np.round(np.float32(row.get("label", -1)) * np.float32(5)) / np.float32(5)
            if not np.isfinite(value):
                raise UserError(f"its label is {shown(label)}; it is a number.")
            label = f"{value:.1f}"
        yield row | {"label": label}


def web_nlg(rows: Iterable[Row], training: bool) -> Iterator[Row]:
    """WebNLG: triples as text, and all references to judge an answer by."""
    for row in rows:
        target = row.get("target") or ""
        texts = _texts(row, "references", row.get("references"), False)
        if training and not target and not texts:
            raise UserError("it has neither a target nor references to learn from.")
        texts = texts or [target or UNKNOWN]  # unknown: rows to be answered
        triples = " && ".join(_texts(row, "input", row["input"], True))
        made = {"triples": triples, "references": texts, "target": target or texts[0]}
        given = target or row.get("references") or None
        yield _judged(row | made, given, "references")


RULES: dict[str, Rule] = {
    "copa": copa,
    "multirc": multirc,
    "record": record,
    "wsc": wsc,
    "squad": squad,
    "stsb": stsb,
    "web_nlg": web_nlg,
}
