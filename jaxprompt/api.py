"""Using tuned prompts: load, evaluate, predict, score, inspect. The command line calls these."""

import functools
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.paths import expanded
from jaxprompt.config.schema import TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.batches import Example
from jaxprompt.data.examples import tokenize
from jaxprompt.data.references import Reference, references
from jaxprompt.data.targets import as_written, label_warnings
from jaxprompt.data.tasks.registry import class_words, resolve_task
from jaxprompt.data.tasks.rules import apply_rule
from jaxprompt.data.tasks.splits import read_split
from jaxprompt.data.templates import place_prompt
from jaxprompt.data.tokenizer import Tokenizer, load_tokenizer
from jaxprompt.data.truncation import Truncation, of_task
from jaxprompt.data.virtual_tokens import VirtualTokens, virtual_ids
from jaxprompt.evaluation.analysis import draw_prompt, figure_format, summarize
from jaxprompt.evaluation.metrics import check_metrics, diagnose, likeliest, majority, measure, vote
from jaxprompt.inference.engine import Engine
from jaxprompt.inference.predict import Predictions, predict_per_prompt, refuse_lost
from jaxprompt.inference.predict import predict as predict_examples
from jaxprompt.inference.score import log_likelihoods
from jaxprompt.methods.artefact import Prompt, checked_prompt, load_prompt
from jaxprompt.models import registry
from jaxprompt.models.checkpoints.load import Backbone, load_backbone, same_model
from jaxprompt.runtime import parallel

Progress = Callable[[int], None]
Warn = Callable[[str], None]


def _warned(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def _cut(task: TaskConfig, warn: Warn) -> Callable[[Truncation], None]:
    """Tells ``warn`` what tokenizing has cut off rows."""

    def note(truncation: Truncation) -> None:
        text = of_task(truncation, task)
        if text is not None:
            warn(text)

    return note


class Session(NamedTuple):
    """A backbone with its tokenizer and, unless it is used bare, one prompt."""

    backbone: Backbone
    tokenizer: Tokenizer
    prompt: Prompt | None
    engine: Engine

    @property
    def length(self) -> int:
        """Number of virtual tokens before each text."""
        return 0 if self.prompt is None else len(self.prompt.vectors)


def open_session(
    prompt: str | Path | Prompt | None = None,
    backbone: str | Backbone | None = None,
    *,
    tokenizer: str | None = None,
    dtype: str | None = None,
    weights: str | None = None,
    any_backbone: bool = False,
) -> Session:
    """Load a prompt (or none) with its backbone, and refuse a pair that does not belong together.

    ``backbone`` and ``tokenizer`` default to those that the prompt records, the tokenizer then to
    the one beside the weights; ``any_backbone`` allows other weights of the same width; ``dtype``
    and ``weights`` are those of ``load_backbone``.
    """
    if isinstance(prompt, str | Path):
        prompt = load_prompt(prompt)
    elif prompt is not None:  # made in Python
        prompt = checked_prompt(prompt)
    if isinstance(backbone, Path):
        backbone = str(backbone)
    if not isinstance(backbone, str | Backbone | None):
        raise UserError(f"A backbone is {shown(backbone)}; give a name, a path or a Backbone.")
    recorded = {} if prompt is None else prompt.facts.get("backbone", {})
    if backbone is None:
        backbone = recorded.get("source")
    if backbone is None:
        raise UserError(
            "The prompt does not say which backbone it is for; name it with --backbone."
        )
    if isinstance(backbone, str):
        mesh = parallel.make_mesh()
        backbone = load_backbone(backbone, dtype=dtype, quantization=weights, mesh=mesh)
    bank = None
    if prompt is not None:
        backbone = backbone._replace(
            config=registry.with_attention(backbone.config, _attention(prompt))
        )
        check_pair(prompt, backbone, any_backbone)
        bank = jnp.asarray(prompt.vectors)[None]
    engine = Engine(backbone.params, bank, backbone.config, backbone.mesh)
    words = tokenizer or recorded.get("tokenizer") or backbone.path
    words = load_tokenizer(words, one_sequence=registry.one_sequence(backbone.config))
    return Session(backbone, words.for_table(backbone.config.vocab_size), prompt, engine)


def _attention(prompt: Prompt) -> str:
    """Who saw whom where the prompt was tuned."""
    found: Any = prompt.facts
    for key in ("config", "model", "attention"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if found in ("prompt", "prefix") else "causal"


def check_pair(prompt: Prompt, backbone: Backbone, any_backbone: bool = False) -> None:
    """Raise a UserError unless ``prompt`` was tuned on ``backbone`` (known by its fingerprint)."""
    width = prompt.vectors.shape[1]
    if width != backbone.config.d_model:
        raise UserError(
            f"The prompt has vectors of {width} numbers and {backbone.source} has d_model "
            f"{backbone.config.d_model}; use the backbone that the prompt was tuned on."
        )
    kind = prompt.facts.get("peft", {}).get("task_type")
    fitting = "CAUSAL_LM" if registry.one_sequence(backbone.config) else "SEQ_2_SEQ_LM"
    if kind in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and kind != fitting:
        raise UserError(
            f"The adapter is for {kind} and {backbone.source} is a model for {fitting}; use the "
            "backbone that it was tuned on."
        )
    recorded = prompt.facts.get("backbone", {})
    expected = recorded.get("fingerprint")
    if expected is not None and not any_backbone and not same_model(backbone, recorded):
        raise UserError(
            f"The prompt was tuned on {recorded.get('source')!r} with fingerprint {expected} and "
            f"{backbone.source!r} has {backbone.fingerprint}: other weights; name the right "
            "backbone with --backbone, or allow this one with --any-backbone."
        )


def prompt_task(
    prompt: Prompt | None, task: str | dict[str, Any] | TaskConfig | None
) -> TaskConfig:
    """The task that is named, else the one that the prompt was tuned on."""
    if isinstance(task, TaskConfig):
        return task
    if task is not None:
        return resolve_task(task)
    recorded = None if prompt is None else prompt.facts.get("task")
    if recorded is None:
        raise UserError("The prompt does not say which task it is for; name one with --task.")
    return parse(TaskConfig, recorded, "task.")


def answer_rows(
    session: Session,
    task: TaskConfig,
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int = 64,
    share: bool = False,
    progress: Progress = lambda rows: None,
    origin: str | None = None,
    warn: Warn = _warned,
) -> Predictions:
    """Predictions for rows with the columns that the task's template names.

    share: as in ``evaluation.score.answer``. ``origin`` (a file) names the rows in errors. ``warn``
    is told how many rows are too long and were cut.
    Raises UserError where the model's scores are not finite numbers.
    """
    check_rows(rows, origin)
    examples = tokenize(
        task, rows, session.tokenizer,
        VirtualTokens(session.backbone.config.vocab_size, session.length),
        need_targets=False, origin=origin, note=_cut(task, warn),
    )  # fmt: skip
    answers = predict_examples(
        session.engine, task, examples, session.tokenizer, batch_size=batch_size, pack=share,
        progress=progress,
    )  # fmt: skip
    refuse_lost(answers.lost, len(examples), session.backbone.source)
    return answers


def check_rows(rows: Any, origin: str | None = None) -> None:
    """Refuse what is no sequence of mappings from names of columns to values.

    A string, a mapping and a pandas data frame are sequences of other things.
    """
    if isinstance(rows, str | bytes | Mapping) or not hasattr(rows, "__len__"):
        wrong = [rows]
    else:  # the first of a data set on disk tells enough
        some = rows if isinstance(rows, list | tuple) else itertools.islice(rows, 1)
        wrong = [row for row in some if not isinstance(row, Mapping)]
    if wrong:
        raise UserError(
            f"Rows{f' of {origin}' if origin else ''} are mappings, such as "
            f"[{{'text': 'a sentence'}}] with the columns of the task's template; one is "
            f"{shown(wrong[0])}."
        )


def predict(
    prompt: str | Path | Prompt | Session | None,
    rows: Sequence[dict[str, Any]],
    *,
    backbone: str | Backbone | None = None,
    task: str | dict[str, Any] | TaskConfig | None = None,
    batch_size: int = 64,
    warn: Warn = _warned,
) -> list[dict[str, Any]]:
    """``{"prediction": text, "scores": {label: log-likelihood}}`` for each row.

    Where the task has a rule, for each row that the rule makes (a line of SuperGLUE's own MultiRC
    file holds many questions). Answers that are written freely have no scores. Pass a
    :class:`Session` to load the backbone only once.
    """
    session = prompt if isinstance(prompt, Session) else open_session(prompt, backbone)
    chosen = prompt_task(session.prompt, task)
    check_rows(rows)
    rows = apply_rule(chosen, rows, training=False)
    return rows_of(chosen, answer_rows(session, chosen, rows, batch_size=batch_size, warn=warn))


def answer_form(task: TaskConfig) -> dict[str, Any]:
    """An answer as ``rows_of`` gives it, with empty values: which columns it has."""
    if task.labels is None or task.decoding != "rank":
        return {"prediction": ""}
    return {"prediction": task.labels[0], "scores": dict.fromkeys(task.labels, 0.0)}


def rows_of(task: TaskConfig, answers: Predictions) -> list[dict[str, Any]]:
    """Answers as JSON-ready rows."""
    if answers.scores is None or task.labels is None:
        return [{"prediction": text} for text in answers.predictions]
    return [
        {
            "prediction": text,
            "scores": dict(zip(task.labels, map(float, scores), strict=True)),
        }
        for text, scores in zip(answers.predictions, answers.scores, strict=True)
    ]


def evaluate(
    prompt: str | Path | Prompt | Session | None,
    *,
    backbone: str | Backbone | None = None,
    task: str | dict[str, Any] | TaskConfig | None = None,
    data: str | None = None,
    split: str = "validation",
    batch_size: int = 64,
    progress: Progress = lambda rows: None,
    warn: Warn = _warned,
) -> dict[str, Any]:
    """The task's metrics on one of its splits, or on a file ``data`` with the task's columns."""
    session = prompt if isinstance(prompt, Session) else open_session(prompt, backbone)
    asked = _questions(session, task, data, split)
    for text in asked.warnings:
        warn(text)
    answers = answer_rows(
        session, asked.task, asked.rows, batch_size=batch_size, share=True, progress=progress,
        origin=asked.origin, warn=warn,
    )  # fmt: skip
    labels = asked.task.labels
    return asked.facts | {
        "metrics": measure(asked.task, answers.predictions, asked.judged_by),
        **(diagnose(answers.predictions, labels) if labels else {}),
    }


class _Questions(NamedTuple):
    """Rows to be answered, what judges the answers, and what a report says of both."""

    task: TaskConfig
    rows: Sequence[dict[str, Any]]
    origin: str
    judged_by: list[Reference]
    facts: dict[str, Any]
    warnings: list[str]  # of targets that no answer can equal


def _questions(session: Session, task, data: str | None, split: str) -> _Questions:
    if split not in ("train", "validation", "test"):
        raise UserError(f"The split is {shown(split)}; give train, validation or test.")
    chosen = prompt_task(session.prompt, task)
    check_metrics(chosen)
    rows = read_split(chosen, split, data)
    origin = data if data is not None else getattr(chosen, split)
    if not rows:
        raise UserError(f"{origin} holds no rows that task {chosen.name!r} can judge.")
    written = as_written(chosen, references(chosen, rows, origin), session.tokenizer)
    judged_by = written.references
    odd = [*label_warnings(chosen, session.tokenizer), *written.warnings]
    facts = {
        "task": chosen.name,
        "data": data if data is not None else split,
        "rows": len(rows),
        "majority": majority(chosen.metrics[0], judged_by, chosen.labels),
        "backbone": session.backbone.source,
        "prompt_length": session.length,
    }
    return _Questions(chosen, rows, origin, judged_by, facts, odd)


def evaluate_ensemble(
    sessions: Sequence[Session],
    *,
    task: str | dict[str, Any] | TaskConfig | None = None,
    data: str | None = None,
    split: str = "validation",
    batch_size: int = 64,
    progress: Progress = lambda rows: None,
    warn: Warn = _warned,
) -> dict[str, Any]:
    """The metrics of several prompts for one task and of their joint answers.

    All prompts are answered for in the same batches: they are one bank, and a row is there once for
    each (Lester et al. 2021, section 6). ``vote`` is the majority's answer, ``likelihood`` the
    label of the highest mean probability (where labels are ranked). Sessions share a backbone.
    """
    if not sessions:
        raise UserError("An ensemble needs prompts; give the sessions of one or more.")
    first, count = sessions[0], len(sessions)
    vectors = _one_bank(sessions)
    _check_one_form(sessions, task)
    asked = _questions(first, task, data, split)
    for text in asked.warnings:
        warn(text)
    chosen, rows, vocabulary = asked.task, asked.rows, first.backbone.config.vocab_size
    plain = tokenize(
        chosen, rows, first.tokenizer, VirtualTokens(vocabulary, first.length),
        need_targets=False, origin=asked.origin, note=_cut(chosen, warn),
    )  # fmt: skip
    engine = first.engine._replace(bank=jnp.stack([jnp.asarray(v) for v in vectors]))
    found = predict_per_prompt(
        engine, chosen, plain, first.tokenizer, batch_size=batch_size, progress=progress
    )
    for number, answers in enumerate(found, 1):
        refuse_lost(answers.lost, len(rows), f"Prompt {number} on {first.backbone.source}")
    each = [answers.predictions for answers in found]
    scores = [answers.scores for answers in found if answers.scores is not None]
    joint = {"vote": vote(each)}
    if scores and chosen.labels is not None:
        joint["likelihood"] = likeliest(np.stack(scores), chosen.labels)
    figures = [measure(chosen, predictions, asked.judged_by) for predictions in each]
    main = [figure[chosen.metrics[0]] for figure in figures]
    ways = {way: measure(chosen, answers, asked.judged_by) for way, answers in joint.items()}
    return asked.facts | {
        "prompts": figures, "mean": sum(main) / count, "best": max(main), **ways
    }  # fmt: skip


def _one_bank(sessions: Sequence[Session]) -> list[np.ndarray]:
    """The vectors of each prompt. Raises UserError unless all fit one bank of one backbone."""
    vectors = [session.prompt.vectors for session in sessions if session.prompt is not None]
    if len(vectors) < len(sessions) or len({rows.shape for rows in vectors}) > 1:
        raise UserError(
            f"Prompts of an ensemble have one length; these have {sorted(map(len, vectors))}; "
            "leave out those of another length."
        )
    if len({(id(s.backbone.params), s.backbone.config) for s in sessions}) > 1:
        raise UserError(
            "Prompts of an ensemble share one loaded backbone and its attention; open all sessions "
            "with the same Backbone, and leave out prompts tuned with another model.attention."
        )
    return vectors


# keys of a task that say which rows there are and what is measured, not how a row is asked
_NOT_ASKED = {"name", "source", "train", "validation", "test", "metrics", "class_labels"}


def _check_one_form(
    sessions: Sequence[Session], task: str | dict[str, Any] | TaskConfig | None
) -> None:
    """Raise a UserError unless all prompts are asked the same text, in the same ids."""
    tasks = [prompt_task(session.prompt, task) for session in sessions]
    names = {task.name for task in tasks}
    if len(names) > 1:
        raise UserError(
            f"Prompts of an ensemble are for one task; these are for {', '.join(sorted(names))}; "
            "leave out the others, or name the task with --task."
        )
    first, *others = (task.model_dump(exclude=_NOT_ASKED) for task in tasks)
    for number, other in enumerate(others, 2):
        for key, value in first.items():
            if other[key] != value:
                raise UserError(
                    f"Prompts of an ensemble are asked in one form, and task.{key} is "
                    f"{shown(value)} to prompt 1 and {shown(other[key])} to prompt {number}; leave "
                    "one of them out, or give the form for all with --task."
                )
    tokenizers = {id(session.tokenizer): session.tokenizer for session in sessions}
    if len(tokenizers) > 1 and len({words.identity() for words in tokenizers.values()}) > 1:
        raise UserError(
            "Prompts of an ensemble are asked in one tokenizer's ids, and these have different "
            "tokenizers; leave out those of another, or name one for all with --tokenizer."
        )


def score(
    session: Session,
    pairs: Sequence[dict[str, str]],
    *,
    raw: bool = False,
    max_input_length: int | None = None,
    batch_size: int = 64,
    progress: Progress = lambda rows: None,
    warn: Warn = _warned,
) -> list[dict[str, Any]]:
    """Log-likelihoods of targets given inputs, as ``predict`` would find them.

    Args:
        session: the backbone, with a prompt or bare.
        pairs: rows ``{"input": text, "target": text}``. The input is a filled template.
        raw: a decoder-only model gets input and target as they are. Otherwise, where the prompt
            records a task, its separator stands between them (unless the input ends with it) and
            the target gets its leading space, as when the prompt was tuned. Without a recorded
            task text is raw in any case.
        max_input_length: text tokens with what ends them; None: those of the prompt's task, or 512.
        batch_size: rows at a time.
        progress: hears how many rows a batch had.
        warn: is told how many inputs are too long and were cut at their end, and where the task's
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
    tokenizer = session.tokenizer
    virtual = virtual_ids(session.backbone.config.vocab_size, session.length)
    recorded = session.prompt is not None and session.prompt.facts.get("task") is not None
    task = prompt_task(session.prompt, None) if recorded else None
    joined = task is not None and tokenizer.one_sequence and not raw
    separator = task.separator if task is not None and joined else ""
    if task is not None and not raw:
        for text in _beyond_text(task, tokenizer, session.length):
            warn(text)
    end = tokenizer.input_end(separator)
    start = tokenizer.start_ids
    longest = max_input_length or (512 if task is None else task.max_input_length)
    room = max(longest - len(start) - len(end), 0)

    def input_ids(words: list[int]) -> np.ndarray:
        found = [*start, *words[:room], *end]
        # what a sequence begins with where there is no text
        found = found or ([] if len(virtual) else [tokenizer.eos_id])
        return np.concatenate([virtual, np.array(found, np.int32)])

    def target_ids(pair: dict[str, str]) -> np.ndarray:
        if joined or not tokenizer.one_sequence:
            [ids] = tokenizer.encode_targets([pair["target"]], separator)
        else:
            ids = [*tokenizer.encode_rest(pair["input"], pair["target"]), tokenizer.eos_id]
        return np.array(ids, np.int32)

    inputs = [pair["input"].removesuffix(separator) for pair in pairs]
    texts = [tokenizer.encode_start(text, room) for text in inputs]
    cut = Truncation(len(pairs), sum(len(words) > room for words in texts), {})
    told = cut.sentence("inputs", f"max_input_length, {longest}")
    if told is not None:
        warn(f"{told}; raise it")
    both = zip(texts, pairs, strict=True)
    examples = [Example(input_ids(words), target_ids(pair)) for words, pair in both]
    values = log_likelihoods(session.engine, examples, batch_size=batch_size, progress=progress)
    lost = np.flatnonzero(~np.isfinite(values)).tolist()
    refuse_lost(lost, len(examples), session.backbone.source)
    return [
        {"log_likelihood": float(value), "tokens": len(example.targets)}
        for value, example in zip(values, examples, strict=True)
    ]


def _beyond_text(task: TaskConfig, tokenizer: Tokenizer, length: int) -> list[str]:
    """A sentence for each thing in the task's template that a text cannot say."""
    pieces = place_prompt(task.template, length)
    inside = any(piece.virtual for piece in pieces[1:])
    [named] = tokenizer.encode_all([tokenizer.marked(task.template)], trusted=True)
    special = named != tokenizer.encode(task.template)
    found = [
        ("places virtual tokens within the text; here all of them stand in front", inside),
        ("names special tokens; in an input they are text", special),
    ]
    return [
        f"the template {shown(task.template)} of the prompt's task {what}, so these are other "
        "likelihoods than those of eval and predict"
        for what, there in found
        if there
    ]


def check_pairs(pairs: Sequence[dict[str, str]], origin: str | None = None) -> None:
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
) -> dict[str, Any]:
    """Nearest words, norms, similarities of the session's prompt; ``figure`` draws them (.png)."""
    if session.prompt is None:
        raise UserError("There is no prompt to inspect.")
    if not isinstance(nearest, int | np.integer) or nearest < 1:
        raise UserError(f"nearest is {shown(nearest)}; give a whole number from 1 on.")
    if figure is not None:
        figure_format(Path(figure))
    tokenizer, vectors = session.tokenizer, session.prompt.vectors
    report = summarize(
        vectors,
        session.backbone.params["token_embedder"]["embedding"],
        pieces=min(tokenizer.size, session.backbone.config.vocab_size),
        word=functools.partial(_word, tokenizer),
        count=nearest,
        labels=_label_pieces(session),
    )
    if figure is not None:
        draw_prompt(report, vectors, Path(expanded(figure)))
    return report


def _label_pieces(session: Session) -> dict[str, list[int]]:
    """Ids of the class labels of the prompt's task, without what ends them."""
    recorded = session.prompt.facts.get("task") if session.prompt is not None else None
    if recorded is None:
        return {}
    task = parse(TaskConfig, recorded, "task.")
    labels = class_words(task)
    ids = session.tokenizer.encode_targets(labels, task.separator)
    special = set(session.tokenizer.special_ids)
    return {
        label: [i for i in row if i not in special] for label, row in zip(labels, ids, strict=True)
    }


def _word(tokenizer: Tokenizer, id: int) -> str:
    return tokenizer.piece(id)
