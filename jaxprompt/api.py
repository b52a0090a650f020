"""Tuning prompts and using them: train, evaluate, predict, score, inspect.

Rows may be in files or in memory (``data/memory.py``). The command line calls these functions, too.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NotRequired, TypedDict, Unpack, cast

import numpy as np

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.limits import SPLITS
from jaxprompt.config.overrides import load_config
from jaxprompt.config.paths import expanded
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.config.values import Values
from jaxprompt.data.batches import Example
from jaxprompt.data.examples import tokenize
from jaxprompt.data.holdout import FEWEST_ROWS, hold_out
from jaxprompt.data.memory import (
    Data,
    RowsLike,
    check_rows,
    digest_of,
    only_plain,
    rows_in_memory,
    splits_in_memory,
)
from jaxprompt.data.references import Reference, references
from jaxprompt.data.rows import Row, Rows
from jaxprompt.data.targets import as_written, label_warnings
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.data.tasks.rules import apply_rule, makes_rows
from jaxprompt.data.tasks.splits import read_split
from jaxprompt.data.templates import columns_of, to_text
from jaxprompt.data.truncation import Truncation, of_task
from jaxprompt.data.virtual_tokens import VirtualTokens
from jaxprompt.evaluation.analysis import PromptReport
from jaxprompt.evaluation.classes import Confusion, class_report, confusion_of
from jaxprompt.evaluation.inspection import ChangesAlone, Inspection, inspect_prompt
from jaxprompt.evaluation.metrics import check_metrics, diagnose, majority, measure
from jaxprompt.evaluation.plots import draw_confusion, draw_prompt, figure_format
from jaxprompt.inference.engine import Progress, ignore_progress
from jaxprompt.inference.ensemble import check_one_form, ensemble_engine, likeliest, vote
from jaxprompt.inference.predict import Predictions, check_finite_scores, predict_per_member
from jaxprompt.inference.predict import predict as predict_examples
from jaxprompt.inference.score import PairTokenizer, log_likelihoods
from jaxprompt.inference.session import (
    PromptLike,
    Session,
    TaskLike,
    as_session,
    check_pair,
    open_session,
    prompt_task,
)
from jaxprompt.methods.artefact import Prompt
from jaxprompt.models.checkpoints.export import check_output, save_backbone
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.models.merge import merge as merge_weights
from jaxprompt.runtime.processes import on_process_zero

if TYPE_CHECKING:
    from jaxprompt.runtime.signals import Signals
    from jaxprompt.training.metric_log import Reporter

__all__ = [
    "EvaluationOptions", "PredictOptions", "Session", "answer_form", "check_pair", "check_pairs",
    "evaluate", "evaluate_ensemble", "inspect", "merge", "open_session", "predict",
    "predict_rows", "prompt_task", "rows_of", "score", "train",
]  # fmt: skip

Warn = Callable[[str], None]
Result = Values  # JSON


def _warned(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def train(
    config: RunConfig | str | Path | Mapping[str, object],
    reporter: "Reporter | None" = None,
    signals: "Signals | None" = None,
    *,
    data: Data | None = None,
) -> Result:
    """Tune the prompts of ``config``, or resume the run in its output.

    Killed at any moment and called again, it ends with a bit-identical prompt.

    Args:
        config: what to tune and the output directory: the path of a YAML file, a mapping with the
            same keys, or what ``load_config`` returns.
        reporter: gets lines of text and the figures of every step. None: a progress bar where
            standard error is a terminal or in a notebook, else nothing. ``NullReporter()``: none.
        signals: they end the run after a step whose state is saved.
        data: rows instead of those that the task names: a list of mappings, a pandas data frame, a
            ``datasets.Dataset``, or a mapping of train, validation and perhaps test to one of
            these. Rows without splits are cut into three, the same in every
            call; rows with one value in the column ``task.group`` stay together.

    Returns:
        What ``result.json`` holds.

    Raises:
        UserError: a mistake in ``config`` or ``data``, or the output holds a run with others.
        Interrupted: one of ``signals`` came. The state is saved.
    """
    from jaxprompt.training import loop  # which using a prompt does not need

    config = _as_config(config)
    if data is None:
        return loop.train(config, reporter, signals)
    config, splits = _with_rows(config, data)
    return loop.train(config, reporter, signals, splits)


def _as_config(config: object) -> RunConfig:
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, str | Path):
        return load_config(config)
    if isinstance(config, Mapping):
        return parse(RunConfig, dict(config))
    raise UserError(
        f"A config is {shown(config)}; give the path of a YAML file, a mapping with its keys, or "
        "what load_config returns."
    )


def _with_rows(config: RunConfig, data: Data) -> tuple[RunConfig, Mapping[str, Rows]]:
    """The config of a run whose task has its rows in memory, and the rows of each split."""
    if "task" in config.prompt.population:
        raise UserError(
            "data holds the rows of one task, and prompt.population.task names several; leave one "
            "of them out."
        )
    task = {"name": config.task} if isinstance(config.task, str) else dict(config.task)
    if "mixture" in task:
        raise UserError("data holds the rows of one task, and task.mixture names several.")
    resolved = resolve_task(task)
    used = _columns_used(resolved)
    if isinstance(data, Mapping):
        splits = splits_in_memory(data)
        missing = [name for name in ("train", "validation") if name not in splits]
        if missing:
            raise UserError(
                f"data has no {missing[0]} rows; give {{'train': rows, 'validation': rows}}, or "
                "rows alone, which are cut into both."
            )
        splits = {name: only_plain(rows, used, f"the {name} data") for name, rows in splits.items()}
    else:
        rows = only_plain(rows_in_memory(data, "data"), used, "data")
        splits = _cut(resolved, rows)
    names = {name: name if name in splits else None for name in SPLITS}
    source = f"memory:{digest_of(splits)}"
    return config.model_copy(update={"task": task | {"source": source} | names}), splits


def _columns_used(task: TaskConfig) -> list[str] | None:
    """The columns that a task reads; None: its rule or its Jinja template may read any."""
    if makes_rows(task):
        return None
    texts = (task.template, *task.templates, task.target)
    columns = [*(column for text in texts for column in columns_of(text)), task.answers, task.group]
    return [column for column in columns if column is not None]


def _cut(task: TaskConfig, rows: Rows) -> dict[str, list[Row]]:
    """The rows of each split, of which no two share a group or, where there is none, a text."""
    advice = "give {'train': rows, 'validation': rows}."
    if makes_rows(task):
        raise UserError(f"Rows of task {task.name!r} are not cut into splits; {advice}")
    if len(rows) < FEWEST_ROWS:
        raise UserError(
            f"data has {len(rows)} rows, too few to cut validation rows off; give at least "
            f"{FEWEST_ROWS}, or {advice}"
        )
    for number, row in enumerate(rows, 1):
        to_text(task, row, f"row {number} of data")
    references(task, rows, "data")  # every row may be one that is judged
    together = columns_of(task.template) if task.group is None else [task.group]
    parts = hold_out(rows, together, columns_of(task.target), SPLITS)
    if not all(parts.values()):
        raise UserError(
            f"data has too few rows of each label to cut validation and test rows off; {advice}"
        )
    return parts


@dataclass(frozen=True)
class PredictOptions:
    """How rows are answered.

    batch_size: rows at a time, at most.
    pack: rows may share the rows of a batch, which suits large evaluations (``Engine.run``).
    progress: is called with the number of rows of each batch.
    origin: the file that errors name.
    warn: gets a sentence on rows that were cut, and on labels outside of the vocabulary.
    """

    batch_size: int = 64
    pack: bool = False
    progress: Progress = ignore_progress
    origin: str | None = None
    warn: Warn = _warned


def predict_rows(
    session: Session, task: TaskConfig, rows: Rows, options: PredictOptions = PredictOptions()
) -> Predictions:
    """Predictions for rows with the columns that the task's template names.

    Raises:
        UserError: a row does not fit the template, or the model's scores are not finite numbers.
    """
    for text in label_warnings(task, session.tokenizer):
        options.warn(text)
    return _predict(session, task, rows, options)


def _predict(
    session: Session, task: TaskConfig, rows: Rows, options: PredictOptions
) -> Predictions:
    check_rows(rows, options.origin)
    examples = _inputs(session, task, rows, options.origin, options.warn)
    predictions = predict_examples(
        session.engine, task, examples, session.tokenizer, batch_size=options.batch_size,
        pack=options.pack, progress=options.progress,
    )  # fmt: skip
    check_finite_scores(predictions.non_finite_rows, len(examples), session.backbone.source)
    return predictions


def _inputs(
    session: Session, task: TaskConfig, rows: Rows, origin: str | None, warn: Warn
) -> list[Example]:
    """Examples without targets; ``warn`` gets a sentence on rows that were cut."""

    def note(truncation: Truncation) -> None:
        text = of_task(truncation, task)
        if text is not None:
            warn(text)

    return tokenize(
        task, rows, session.tokenizer,
        VirtualTokens(session.backbone.config.vocab_size, session.length),
        need_targets=False, origin=origin, note=note,
    )  # fmt: skip


def predict(
    prompt: PromptLike,
    rows: RowsLike,
    *,
    backbone: str | Path | Backbone | None = None,
    task: TaskLike = None,
    batch_size: int = 64,
    progress: Progress = ignore_progress,
    warn: Warn = _warned,
) -> list[Result]:
    """The prediction for each row, as ``{"prediction": text, "scores": {label: log p}}``.

    Where the task has a rule, for each row that the rule makes (a line of SuperGLUE's own MultiRC
    file holds many questions). Generated texts have no scores.

    Args:
        prompt: a folder or file, a loaded prompt, None for the bare backbone, or a ``Session``,
            which loads the backbone only once.
        rows: a list of mappings of column names to values, a pandas data frame, or a
            ``datasets.Dataset``.
        backbone: None: the one that the prompt records.
        task: None: the one that the prompt records.
        batch_size: rows at a time, at most.
        progress: is called with the number of rows of each batch.
        warn: gets a sentence on rows that were cut, and on labels that the vocabulary cannot write.
    """
    session = as_session(prompt, backbone)
    chosen = prompt_task(session.prompt, task)
    asked = apply_rule(chosen, rows_in_memory(rows), training=False)
    options = PredictOptions(batch_size, progress=progress, warn=warn)
    return rows_of(chosen, predict_rows(session, chosen, asked, options))


def answer_form(task: TaskConfig) -> Result:
    """A row as ``rows_of`` gives it, with empty values: which columns it has."""
    if task.labels is None or task.decoding != "rank":
        return {"prediction": ""}
    return {"prediction": task.labels[0], "scores": dict.fromkeys(task.labels, 0.0)}


def rows_of(task: TaskConfig, predictions: Predictions) -> list[Result]:
    """Predictions as JSON-ready rows."""
    if predictions.scores is None or task.labels is None:
        return [{"prediction": text} for text in predictions.predictions]
    return [
        {
            "prediction": text,
            "scores": dict(zip(task.labels, map(float, scores), strict=True)),
        }
        for text, scores in zip(predictions.predictions, predictions.scores, strict=True)
    ]


class EvaluationOptions(TypedDict):
    """Keyword arguments of ``evaluate`` and ``evaluate_ensemble``.

    task: None: the one that the prompt records.
    data: a file with the task's columns, instead of a split; or rows, as for ``train``.
    split: train, validation or test.
    batch_size: rows at a time, at most.
    progress: is called with the number of rows of each batch.
    warn: gets a sentence on rows that were cut, and on targets that no prediction can equal.
    """

    task: NotRequired[TaskLike]
    data: NotRequired[str | Path | Data | None]
    split: NotRequired[str]
    batch_size: NotRequired[int]
    progress: NotRequired[Progress]
    warn: NotRequired[Warn]


def evaluate(
    prompt: PromptLike,
    *,
    backbone: str | Path | Backbone | None = None,
    figure: str | Path | None = None,
    **options: Unpack[EvaluationOptions],
) -> Result:
    """The task's metrics on one of its splits, or on a file or rows ``data`` with its columns.

    For a task with labels, ``"report"`` has precision, recall, F1 and support of each class, their
    unweighted means, and the confusion matrix (``evaluation.classes.class_report``).

    Args:
        prompt: as for ``predict``.
        backbone: None: the one that the prompt records.
        figure: draw the confusion matrix there (.png, .svg or .pdf).
        options: see ``EvaluationOptions``.

    Raises:
        UserError: among others where a figure is wanted of a task without labels.
    """
    given = _Evaluation(**options)
    session = as_session(prompt, backbone)
    questions = _questions(session, given)
    task = questions.task
    if figure is not None:
        _check_figure(task, Path(figure))
    for text in questions.warnings:
        given.warn(text)
    asked = PredictOptions(
        given.batch_size, pack=True, progress=given.progress, origin=questions.origin,
        warn=given.warn,
    )  # fmt: skip
    answers = _predict(session, task, questions.rows, asked)
    predictions = answers.predictions
    result = questions.facts | {"metrics": measure(task, predictions, questions.references)}
    if answers.log_prior is not None:
        shares = map(float, np.exp(answers.log_prior))
        result["label_prior"] = dict(zip(task.labels or (), shares, strict=True))
    if task.labels:
        confusion = confusion_of(predictions, questions.references, task.labels)
        result |= diagnose(predictions, task.labels) | {"report": class_report(confusion)}
        if figure is not None:
            _draw_confusion(confusion, Path(expanded(figure)))
    return result


@dataclass(frozen=True)
class _Evaluation:
    """The values of ``EvaluationOptions`` with their defaults."""

    task: TaskLike = None
    data: str | Path | Data | None = None
    split: str = "validation"
    batch_size: int = 64
    progress: Progress = ignore_progress
    warn: Warn = _warned


def _check_figure(task: TaskConfig, path: Path) -> None:
    figure_format(path)
    if not task.labels:
        raise UserError(
            f"Task {task.name!r} has no labels, so there is no confusion matrix to draw; leave out "
            "the figure."
        )


def _draw_confusion(confusion: Confusion, path: Path) -> None:
    on_process_zero(lambda: draw_confusion(confusion, path))


class _Questions(NamedTuple):
    """Rows to be answered, what judges the predictions, and what a result says of both."""

    task: TaskConfig
    rows: Rows
    origin: str
    references: list[Reference]
    facts: Result
    warnings: list[str]  # of targets that no prediction can equal


def _questions(session: Session, given: _Evaluation) -> _Questions:
    data, split = given.data, given.split
    if split not in SPLITS:
        raise UserError(f"The split is {shown(split)}; give train, validation or test.")
    task = prompt_task(session.prompt, given.task)
    check_metrics(task)
    if data is None:
        rows, origin = read_split(task, split), getattr(task, split)
    elif isinstance(data, str | Path):
        rows, origin = read_split(task, split, str(data)), str(data)
    else:
        origin = "the given rows"
        rows = apply_rule(task, _rows_of_split(data, split), training=False, origin=origin)
    if not rows:
        raise UserError(f"{origin} holds no rows that task {task.name!r} can judge.")
    written = as_written(task, references(task, rows, origin), session.tokenizer)
    odd = [*label_warnings(task, session.tokenizer), *written.warnings]
    facts: Result = {
        "task": task.name,
        "data": split if data is None else origin,
        "rows": len(rows),
        "majority": majority(task.metrics[0], written.references, task.labels),
        "backbone": session.backbone.source,
        "prompt_length": session.length,
    }
    return _Questions(task, rows, origin, written.references, facts, odd)


def _rows_of_split(data: Data, split: str) -> Rows:
    """The rows, or those of one split where there are several."""
    if not isinstance(data, Mapping):
        return rows_in_memory(data)
    splits = splits_in_memory(data)
    if split not in splits:
        raise UserError(f"data has no {split} rows; it has {listed(splits)}.")
    return splits[split]


def evaluate_ensemble(sessions: Sequence[Session], **options: Unpack[EvaluationOptions]) -> Result:
    """The metrics of several prompts for one task and of their joint predictions.

    All prompts share the same batches: they are one bank, and a row is there once for each (Lester
    et al. 2021, section 6). ``vote`` is the majority's prediction, ``likelihood`` the label of the
    highest mean probability (where labels are ranked). Sessions share a backbone.
    """
    given = _Evaluation(**options)
    if not sessions:
        raise UserError("An ensemble needs prompts; give the sessions of one or more.")
    first = sessions[0]
    engine = ensemble_engine(sessions)
    check_one_form(sessions, given.task)
    questions = _questions(first, given)
    for text in questions.warnings:
        given.warn(text)
    task, judges = questions.task, questions.references
    examples = _inputs(first, task, questions.rows, questions.origin, given.warn)
    each = predict_per_member(
        engine, task, examples, first.tokenizer, batch_size=given.batch_size,
        progress=given.progress,
    )  # fmt: skip
    for number, own in enumerate(each, 1):
        check_finite_scores(
            own.non_finite_rows, len(examples), f"Prompt {number} on {first.backbone.source}"
        )
    metrics = [measure(task, own.predictions, judges) for own in each]
    main = [own[task.metrics[0]] for own in metrics]
    joint = {way: measure(task, texts, judges) for way, texts in _joint(task, each).items()}
    return questions.facts | {
        "prompts": metrics, "mean": sum(main) / len(main), "best": max(main), **joint
    }  # fmt: skip


def _joint(task: TaskConfig, each: Sequence[Predictions]) -> dict[str, list[str]]:
    """The predictions of all prompts together, by how they are joined."""
    joint = {"vote": vote([own.predictions for own in each])}
    scores = [own.scores for own in each if own.scores is not None]
    if scores and task.labels is not None:
        joint["likelihood"] = likeliest(np.stack(scores), task.labels)
    return joint


def score(
    session: Session,
    pairs: Rows,
    *,
    raw: bool = False,
    max_input_length: int | None = None,
    batch_size: int = 64,
    progress: Progress = ignore_progress,
    warn: Warn = _warned,
) -> list[Result]:
    """Log-likelihoods of targets given inputs, as ``predict`` would find them.

    Args:
        session: the backbone, with a prompt or bare.
        pairs: rows ``{"input": text, "target": text}``. The input is a filled template.
        raw: a decoder-only model gets input and target as they are. Otherwise, where the prompt
            records a task, its separator stands between them (unless the input ends with it) and
            the target gets its leading space, as when the prompt was tuned. Without a recorded
            task text is raw in any case.
        max_input_length: text tokens with what ends them; None: those of the prompt's task, or 512.
        batch_size: rows at a time, at most.
        progress: is called with the number of rows of each batch.
        warn: gets a sentence on inputs that were cut at their end, and on places where the task's
            template says what the text of an input cannot.

    Returns:
        For each row ``{"log_likelihood": log p(target | prompt, input) in nats, EOS included,
        "tokens": of the target with EOS}``.
    """
    check_pairs(pairs)
    if not isinstance(session, Session):
        raise UserError(f"A session is {shown(session)}; open one with open_session.")
    if max_input_length is not None and not (
        isinstance(max_input_length, int | np.integer) and max_input_length > 0
    ):
        raise UserError(
            f"max_input_length is {shown(max_input_length)}; give a whole number from 1 on."
        )
    recorded = None if session.prompt is None else session.prompt.metadata.get("task")
    task = None if recorded is None else parse(TaskConfig, recorded, "task.")
    tokenizer = PairTokenizer(
        session.tokenizer, session.backbone.config.vocab_size, session.length, task, raw,
        None if max_input_length is None else int(max_input_length),
    )  # fmt: skip
    examples, odd = tokenizer.encode(pairs)
    for text in odd:
        warn(text)
    values = log_likelihoods(session.engine, examples, batch_size=batch_size, progress=progress)
    non_finite_rows = np.flatnonzero(~np.isfinite(values)).tolist()
    check_finite_scores(non_finite_rows, len(examples), session.backbone.source)
    return [
        {"log_likelihood": float(value), "tokens": len(example.targets)}
        for value, example in zip(values, examples, strict=True)
    ]


def check_pairs(pairs: Rows, origin: str | None = None) -> None:
    """Refuse rows without text in "input" and "target"."""
    check_rows(pairs, origin)
    for number, pair in enumerate(pairs, 1):
        wrong = [name for name in ("input", "target") if not isinstance(pair.get(name), str)]
        if wrong:
            raise UserError(
                f"Row {number}{f' of {origin}' if origin else ''} has no text in {wrong[0]!r}; it "
                f"has {listed(sorted(map(str, pair)))}, and 'input' and 'target' are needed."
            )


def inspect(
    session: Session, *, nearest: int = 5, figure: str | Path | None = None
) -> Inspection | ChangesAlone:
    """What the session's prompt is.

    Nearest words, norms and similarities of its vectors, which ``figure`` draws (.png); and of
    what changes the layers the kind, what is changed, the rank or width, and how many numbers.
    """
    if session.prompt is None:
        raise UserError("There is no prompt to inspect.")
    vectors = session.prompt.vectors
    if figure is not None and not len(vectors):
        raise UserError("The prompt has no vectors to draw; leave out the figure.")
    if figure is not None:
        figure_format(Path(figure))
    report = inspect_prompt(session.prompt, session.backbone, session.tokenizer, nearest)
    if figure is not None:
        draw_prompt(cast(PromptReport, report), vectors, Path(expanded(figure)))
    return report


def merge(
    prompt: str | Path | Prompt,
    output: str | Path,
    *,
    backbone: str | Path | Backbone | None = None,
    dtype: str = "float32",
    any_backbone: bool = False,
) -> Backbone:
    """Write a backbone with a prompt's changes of its weights as a plain Hugging Face directory.

    LoRA, IA3 and norms become part of the weights, so the merged model takes no longer than the
    backbone, and any library reads it. Sums are in float32.

    Args:
        prompt: a folder or a loaded prompt.
        output: a new directory, or one that this function or ``save_backbone`` has written.
        backbone: None: the one that the prompt records.
        dtype: of the weights that are read and written: "float32" or "bfloat16".
        any_backbone: allow other weights of the same shapes than those that the prompt records.

    Returns:
        The merged model.

    Raises:
        UserError: no weight can hold a part of the prompt, ``output`` has other contents, or the
            prompt is of another backbone.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {shown(dtype)}; give float32 or bfloat16.")
    check_output(output)
    session = open_session(prompt, backbone, dtype=dtype, any_backbone=any_backbone)
    assert session.prompt is not None
    base, tuned = session.backbone, session.prompt
    merged = base._replace(params=merge_weights(base.params, tuned.injection))
    task = tuned.metadata.get("task", {}).get("name")
    made_of = {"method": tuned.metadata.get("method"), "task": task}
    save_backbone(output, merged, note={"merged": made_of})
    return merged
