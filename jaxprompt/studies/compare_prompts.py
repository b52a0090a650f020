"""Answers of finished prompts to the same rows, and what makes them comparable.

Prompts may have other templates, other label words, other lengths, other methods and other
backbones. What must be the same: the rows, the metric, and which rows have the same right answer.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxprompt.api import PredictOptions, predict_rows, prompt_task
from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.examples import tokenize
from jaxprompt.data.references import Reference, references
from jaxprompt.data.rows import Rows
from jaxprompt.data.targets import as_written, label_warnings
from jaxprompt.data.tasks.splits import read_split
from jaxprompt.data.templates import to_text
from jaxprompt.data.truncation import Truncation, of_task
from jaxprompt.data.virtual_tokens import VirtualTokens
from jaxprompt.evaluation.metrics import METRICS, check_metrics
from jaxprompt.evaluation.statistics_sequential import anytime_p
from jaxprompt.inference.session import Session, TaskLike, open_session
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.studies.compare import Arm, Compared, Pair, Rules, compare_arms

# metrics that are the mean of a score of each row
OF_ROWS = (
    "accuracy", "exact_match", "token_f1", "wsc_accuracy", "rouge1", "rouge2", "rougeLsum",
)  # fmt: skip
Say = Callable[[str], None]
Scores = Float[np.ndarray, " n"]


class Asked(NamedTuple):
    """A prompt with the rows that it is to answer.

    origin: the file or split of the rows.
    texts: the right answer of each row, in the words of the prompt's task.
    references: what answers are compared with: the same as the prompt's tokenizer writes it.
    tokens: positions of an input, virtual tokens included; the mean over rows.
    """

    name: str
    session: Session
    task: TaskConfig
    rows: Rows
    origin: str
    texts: Sequence[str]
    references: Sequence[Reference]
    tokens: float


class Questions(NamedTuple):
    """Which rows are asked: of a file, or of a split of the task."""

    task: TaskLike = None
    data: str | None = None
    split: str = "validation"


class Answering(NamedTuple):
    """How rows are answered.

    seed: of the order of rows where looks are sequential.
    """

    batch_size: int = 64
    progress: Callable[[int], None] = lambda rows: None
    warn: Say = lambda text: None
    seed: int = 0


def compare_prompts(
    sessions: Mapping[str, Session], questions: Questions, rules: Rules, how: Answering
) -> Compared:
    """Compare prompts, by their names, on the same rows."""
    asked = [ask(name, session, questions, how.warn) for name, session in sessions.items()]
    check_pairing(asked, questions)
    if rules.sequential:
        _check_rows_are_alone(asked)
    first = asked[0]
    metric = row_metric(first.task, how.warn)
    arms, order = answer_all(asked, metric, rules, how)
    return compared(arms, compare_arms(arms, rules), rules, first, order)


def compared(
    arms: Sequence[Arm], pairs: Sequence[Pair], rules: Rules, first: Asked, order: Sequence[int]
) -> Compared:
    """A comparison with what a page tells of its rows.

    Args:
        first: asks the rows of all arms.
        order: of the rows in the arms' scores.
    """
    facts = {"data": first.origin, "rows": len(first.rows),
             "metric": row_metric(first.task, silent)}  # fmt: skip
    asked = first.task.model_copy(update={"target": "", "labels": None})  # texts of inputs alone
    texts = [to_text(asked, first.rows[i])[0] for i in order]
    return Compared(arms, pairs, rules, facts, order, texts, [first.texts[i] for i in order])


# ---- what is asked


def open_all(
    prompts: Mapping[str, Path],
    backbone: str | None = None,
    *,
    tokenizer: str | None = None,
    any_backbone: bool = False,
) -> dict[str, Session]:
    """A session of each prompt, by its name; prompts of one backbone share it."""
    loaded: dict[str | None, Backbone] = {}
    sessions: dict[str, Session] = {}
    for name, path in prompts.items():
        prompt = load_prompt(path)
        source = backbone or prompt.metadata.get("backbone", {}).get("source")
        session = open_session(
            prompt, loaded.get(source, source), tokenizer=tokenizer, any_backbone=any_backbone
        )
        sessions[name] = session
        loaded.setdefault(source, session.backbone)
    return sessions


def ask(name: str, session: Session, questions: Questions, warn: Say) -> Asked:
    """A prompt with its rows. Raises UserError where the rows do not fit its task."""
    try:
        return _ask(name, session, questions, lambda text: warn(f"{name}: {text}"))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _ask(name: str, session: Session, questions: Questions, warn: Say) -> Asked:
    task, tokenizer = prompt_task(session.prompt, questions.task), session.tokenizer
    check_metrics(task)
    rows = read_split(task, questions.split, questions.data)
    origin = questions.data or f"the {questions.split} rows of {task.name}"
    if not rows:
        raise UserError(f"{origin} has no rows.")
    judges = references(task, rows, questions.data)
    written = as_written(task, judges, tokenizer)
    notes: list[Truncation] = []
    examples = tokenize(
        task, rows, tokenizer, VirtualTokens(session.backbone.config.vocab_size, session.length),
        need_targets=False, origin=questions.data, note=notes.append,
    )  # fmt: skip
    cut = (of_task(note, task) for note in notes)
    for text in (*label_warnings(task, tokenizer), *written.warnings, *cut):
        if text is not None:
            warn(text)
    tokens = float(np.mean([len(example.inputs) for example in examples]))
    texts = [judge.text for judge in judges]
    return Asked(name, session, task, rows, origin, texts, written.references, tokens)


def check_pairing(asked: Sequence[Asked], questions: Questions) -> None:
    """Refuse prompts that cannot be compared row by row.

    Raises:
        UserError: they have other rows, another metric, or other questions.
    """
    first = asked[0]
    for other in asked[1:]:
        _check_rows(first, other, questions)
        metrics = first.task.metrics[0], other.task.metrics[0]
        if metrics[0] != metrics[1]:
            raise UserError(
                f"{first.name!r} is judged by {metrics[0]} and {other.name!r} by {metrics[1]}; "
                "compare prompts of one metric, or name the task of all with --task."
            )
        _check_questions(first, other)


def _check_rows(first: Asked, other: Asked, questions: Questions) -> None:
    ours, theirs = (
        (one.task.source, getattr(one.task, questions.split), one.task.rule)
        for one in (first, other)
    )
    if questions.data is None and ours != theirs:
        raise UserError(
            f"{first.name!r} has its {questions.split} rows from {shown(ours[:2])} and "
            f"{other.name!r} from {shown(theirs[:2])}, so they cannot be compared row by row; name "
            "a file for all with --data."
        )
    if len(first.rows) != len(other.rows):
        raise UserError(
            f"{first.origin} is {len(first.rows)} rows to {first.name!r} and {len(other.rows)} to "
            f"{other.name!r}: their tasks leave out other rows (task.rule, task.jinja), so they "
            "cannot be compared row by row."
        )


def _check_questions(first: Asked, other: Asked) -> None:
    """Label words may differ, but not which rows have the same label."""
    known: tuple[dict[str, str], dict[str, str]] = {}, {}
    labelled = first.task.labels is not None or other.task.labels is not None
    for number, (ours, theirs) in enumerate(zip(first.texts, other.texts, strict=True), 1):
        if labelled:
            fits = known[0].setdefault(ours, theirs) == theirs
            fits = known[1].setdefault(theirs, ours) == ours and fits
        else:
            fits = ours == theirs
        if not fits:
            raise UserError(
                f"{first.name!r} and {other.name!r} do not answer the same question: the right "
                f"answer of row {number} is {shown(ours)} to one and {shown(theirs)} to the other, "
                "which does not fit the rows before; compare prompts for one task."
            )


def _check_rows_are_alone(asked: Sequence[Asked]) -> None:
    """Refuse answers that other rows of a block would change."""
    for one in asked:
        if one.task.calibration == "batch" and one.task.label_prior is None:
            raise UserError(
                f"{one.name!r} is calibrated by all rows together (task.calibration is batch), and "
                "--sequential answers a few at a time; leave it out, or set task.label_prior."
            )


def row_metric(task: TaskConfig, warn: Say) -> str:
    """The metric by which rows are compared: the task's first, if that is a mean over rows.

    Raises:
        UserError: neither that nor accuracy means anything here.
    """
    metric = task.metrics[0]
    if metric in OF_ROWS:
        return metric
    if not task.labels:
        raise UserError(
            f"Task {task.name!r} is judged by {metric}, which is no mean over rows; pairs are "
            f"compared by {', '.join(OF_ROWS)}: name one of them first in task.metrics."
        )
    warn(f"{metric} is no mean over rows; prompts are compared by accuracy")
    return "accuracy"


# ---- answers


def score_rows(metric: str, predictions: Sequence[str], judges: Sequence[Reference]) -> Scores:
    """The score of each row, from 0 to 1."""
    function = METRICS[metric]
    return np.array([function([p], [r], None) for p, r in zip(predictions, judges, strict=True)])


def answer(
    asked: Asked, metric: str, how: Answering, numbers: Sequence[int] | None = None
) -> tuple[Scores, list[str]]:
    """Scores and predictions of the rows with these numbers; None: of all."""
    options = PredictOptions(
        how.batch_size, pack=True, progress=how.progress, origin=asked.origin, warn=silent
    )
    rows = asked.rows if numbers is None else [asked.rows[i] for i in numbers]
    judges = asked.references if numbers is None else [asked.references[i] for i in numbers]
    found = predict_rows(asked.session, asked.task, rows, options).predictions
    return score_rows(metric, found, judges), found


def silent(text: str) -> None:
    """``ask`` has told it, of all rows."""


def answer_all(
    asked: Sequence[Asked], metric: str, rules: Rules, how: Answering
) -> tuple[list[Arm], list[int]]:
    """What each prompt answers, and the order of the rows in it.

    With sequential looks, rows are answered until each pair is decided.
    """
    count = len(asked[0].rows)
    if rules.sequential:
        # files are often sorted
        order = np.random.default_rng(how.seed).permutation(count).tolist()
        answered = _answer_until_decided(asked, metric, rules, how, order)
    else:
        order, answered = list(range(count)), [answer(one, metric, how) for one in asked]
    arms = [
        Arm(one.name, scores[None], found, one.tokens)
        for one, (scores, found) in zip(asked, answered, strict=True)
    ]
    return arms, order


def _answer_until_decided(
    asked: Sequence[Asked], metric: str, rules: Rules, how: Answering, order: Sequence[int]
) -> list[tuple[Scores, list[str]]]:
    """Batch after batch; a prompt of which all pairs are decided answers no more."""
    scores: list[Scores] = [np.zeros(0) for _ in asked]
    answers: list[list[str]] = [[] for _ in asked]
    undecided = set(itertools.combinations(range(len(asked)), 2))
    # by Bonferroni for all pairs: Holm's p of a decided pair is then small enough, too
    alpha = (1 - rules.level) / len(undecided)
    for start in range(0, len(order), how.batch_size):
        block = order[start : start + how.batch_size]
        for number in sorted({number for pair in undecided for number in pair}):
            new, found = answer(asked[number], metric, how, block)
            scores[number] = np.concatenate([scores[number], new])
            answers[number] += found
        undecided = {(a, b) for a, b in undecided if anytime_p(scores[a] - scores[b]) > alpha}
        if not undecided:
            break
    return list(zip(scores, answers, strict=True))
