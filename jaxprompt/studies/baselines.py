"""What prompts are compared with: prompt design (zero-shot, few-shot, calibrated), free generation.

Hand-written prompts are answered by rank classification, as in GPT-3 (Brown et al. 2020).
"""

import collections
import itertools
import time
from typing import NamedTuple

import numpy as np

from jaxprompt.api import Session, predict_rows
from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.config.values import Values
from jaxprompt.data.references import target_texts
from jaxprompt.data.rows import Rows
from jaxprompt.data.targets import eval_references
from jaxprompt.data.templates import answered, to_text
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.data.verbalizers import label_words
from jaxprompt.evaluation.metrics import measure
from jaxprompt.studies.tasks import CLOZE, with_sentinel

Record = Values

# Hand-written prompts beside the task's own template. Instructions precede texts that may be cut;
# <> is a sentinel, and its template a cloze: the form that span corruption has taught T5 to answer
TEMPLATES = {
    "supersense": "What kind of thing is this? {gloss} | definition: {gloss} category:"
    " | {gloss} is a kind of <> | This <> is {gloss}",
    "spam": "Is this mail spam or ham? subject: {subject} text: {text}"
    " | classify as ham or spam: {subject} {text}"
    " | This mail is <> . subject: {subject} text: {text}"
    " | category: <> subject: {subject} text: {text}",
    "boolq": "{question}? {passage} | Answer yes or no. {question}? {passage}"
    " | {question}? <> , {passage} | question: {question}? answer: <> passage: {passage}",
    "sentiment": "{text} | Is this review positive or negative? {text}"
    " | {text} This was a <> review. | A <> opinion: {text}",
}
# For models that go on writing; what follows || stands between input and answer
CONTINUED = {
    "supersense": "Definition: {gloss} || \nIs it an object, a person, an animal, a plant, a food"
    " or a place? It is a | {gloss} || \nThis is a kind of"
    " | What is meant by '{gloss}'? || \nA kind of",
    "spam": "Subject: {subject}\n{text} || \nIs this mail spam or ham? It is | Classify the mail as"
    " spam or ham.\n\nSubject: {subject}\n{text} || \nClass:",
    "boolq": "{passage}\nQuestion: {question}? || \nAnswer yes or no:"
    " | Question: {question}?\n{passage} || \nIs the answer yes or no? It is",
    "sentiment": "Review: {text} || \nSentiment: | {text} || \nThe review is"
    " | {text} || \nAll in all the reviewer was",
}


def with_template(task: TaskConfig, template: str) -> TaskConfig:
    """The task in another form; where that is a cloze, answers begin with the sentinel."""
    if "||" in template:
        template, separator = template.split(" || ")
        return task.model_copy(update={"template": template, "separator": separator.rstrip(" ")})
    changed: Record = {"template": template.replace("<>", CLOZE)}
    return (with_sentinel(task) if "<>" in template else task).model_copy(update=changed)


def quality(session: Session, task: TaskConfig, rows: Rows) -> float:
    """The task's first metric."""
    predictions = predict_rows(session, task, rows).predictions
    return measure(task, predictions, eval_references(task, rows, session.tokenizer))[
        task.metrics[0]
    ]


def calibrated_quality(session: Session, task: TaskConfig, rows: Rows) -> float | None:
    """The same after contextual calibration (Zhao et al. 2021, section 5); None without labels."""
    if task.labels is None or task.decoding != "rank":
        return None
    return quality(session, task.model_copy(update={"calibration": "content_free"}), rows)


def hard_prompt(
    session: Session, task: TaskConfig, rows: dict[str, Rows], few: Rows
) -> tuple[Record, TaskConfig]:
    """The template that is best on the validation rows ``few``, measured on all of ``rows``."""
    start = time.monotonic()
    known = CONTINUED if session.tokenizer.one_sequence else TEMPLATES
    others = [text for text in known.get(task.name, "").split(" | ") if text]
    forms = [with_template(task, template) for template in (task.template, *others)]
    scores = [quality(session, form, few) for form in forms]
    best = forms[int(np.argmax(scores))]
    record = measured(session, best, rows)
    record |= {
        "template": best.template,
        "separator": best.separator,
        "templates": len(forms),
        "template_scores": scores,
    }
    return record | {"steps": 0, "seconds": round(time.monotonic() - start, 3)}, best


class Shots(NamedTuple):
    """Answered training rows that stand before each question."""

    num_shots: int
    seed: int = 0


def few_shot(
    session: Session, task: TaskConfig, rows: dict[str, Rows], training: Rows, shots: Shots
) -> tuple[Record, TaskConfig]:
    """The task's template after answered training rows, measured on all of ``rows``."""
    start = time.monotonic()
    task = with_shots(task, training, shots, session.tokenizer)
    scores = {"steps": 0, "shots": shots.num_shots} | measured(session, task, rows)
    return scores | {"seconds": round(time.monotonic() - start, 3)}, task


def measured(session: Session, task: TaskConfig, rows: dict[str, Rows]) -> Record:
    """Scores on each split, plain and calibrated."""
    plain: Record = {"test": None, **{name: quality(session, task, rows[name]) for name in rows}}
    calibrated = {name: calibrated_quality(session, task, rows[name]) for name in rows}
    return plain | {"calibrated": calibrated}


def with_shots(task: TaskConfig, rows: Rows, shots: Shots, words: Tokenizer) -> TaskConfig:
    """The task with answered training rows in front, labels in turn.

    Rows of at most 48 tokens come first, since each is read again with every question.
    """
    order = np.random.default_rng(shots.seed).permutation(len(rows))
    texts = {int(i): to_text(task, rows[i]) for i in order[:2000]}
    short = {i: pair for i, pair in texts.items() if len(words.encode(pair[0])) <= 48}
    ordered = short | texts
    chosen: dict[int, tuple[str, str]] = {}
    for label in itertools.islice(itertools.cycle(task.labels or [None]), shots.num_shots):
        left = (i for i, pair in ordered.items() if pair not in chosen.values())
        row = next((i for i in left if label in (ordered[i][1], None)), None)
        if row is None:
            raise UserError(
                f"{shots.num_shots} shots: too few rows of label {label!r}; ask for fewer."
            )
        chosen[row] = ordered[row]
    space = "" if task.separator[-1:].isspace() else " "
    shown = "".join(f"{text}{task.separator}{space}{label}\n\n" for text, label in chosen.values())
    room = task.max_input_length + len(words.encode(shown))
    # what the rows say stays text; the task's own template and separator may name special tokens
    between = task.separator.replace("{", "{{").replace("}", "}}") + space
    answers = "".join(f"{between.join(answered(task, rows[i]))}\n\n" for i in chosen)
    return task.model_copy(update={"template": answers + task.template, "max_input_length": room})


def free_generation(session: Session, task: TaskConfig, rows: Rows) -> Record:
    """Greedy generation without labels: the share of outputs that are none of the labels.

    Sentinels count: "<extra_id_0> food" is not "food".
    """
    words, each = session.tokenizer, label_words(task)
    encoded = words.encode_targets(each.texts, task.separator)
    labels = [(task.labels or [])[number] for number in each.labels]
    legal = {words.decode(ids): label for ids, label in zip(encoded, labels, strict=True)}
    # a few tokens more than the longest label settle whether an output is one
    free = {"labels": None, "max_target_length": max(map(len, encoded)) + 3}
    outputs = predict_rows(session, task.model_copy(update=free), rows).predictions
    illegal = [output for output in outputs if output not in legal]
    right = [legal.get(o) == t for o, t in zip(outputs, target_texts(task, rows), strict=True)]
    common = collections.Counter(illegal).most_common(5)
    record = {"illegal": len(illegal) / len(rows), "illegal_rows": len(rows)}
    return record | {"illegal_examples": common, "generated_accuracy": sum(right) / len(rows)}
