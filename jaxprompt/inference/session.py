"""A session: a loaded backbone with its tokenizer and, unless it is used bare, one prompt."""

from pathlib import Path
from typing import Any, NamedTuple

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.overrides import override_value
from jaxprompt.config.schema import TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.config.values import Values
from jaxprompt.data.tasks.others import with_files_of_others
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.inference.engine import Engine, make_engine
from jaxprompt.methods.artefact import Prompt, checked_prompt, fitted, load_prompt
from jaxprompt.methods.layers import check_fit
from jaxprompt.models import registry
from jaxprompt.models.checkpoints.load import Backbone, load_backbone, same_model
from jaxprompt.models.injection import VERBALIZER, Injection
from jaxprompt.runtime import parallel

TaskLike = str | dict[str, Any] | TaskConfig | None


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


PromptLike = str | Path | Prompt | Session | None


def open_session(
    prompt: str | Path | Prompt | None = None,
    backbone: str | Path | Backbone | None = None,
    *,
    tokenizer: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    weights: str | None = None,
    any_backbone: bool = False,
) -> Session:
    """Load a prompt (or none) with its backbone.

    Args:
        prompt: a folder or file, a loaded prompt, or None for the bare backbone.
        backbone: a name, a path or a loaded backbone; None: the one that the prompt records.
        tokenizer: None: the one that the prompt records, else the one beside the weights.
        dtype: of the weights, see ``load_backbone``.
        quantization: how the weights are stored, see ``load_backbone``.
        weights: the old name of ``quantization``.
        any_backbone: allow other weights of the same width than those that the prompt records.

    Raises:
        UserError: prompt and backbone do not belong together, or one cannot be read.
    """
    if isinstance(prompt, str | Path):
        prompt = load_prompt(prompt)
    elif prompt is not None:  # made in Python
        prompt = checked_prompt(prompt)
    recorded = {} if prompt is None else prompt.metadata.get("backbone", {})
    loaded = _load(backbone, recorded.get("source"), dtype, quantization, weights)
    injection = Injection()
    if prompt is not None:
        model = registry.with_attention(loaded.model, attention_of(prompt))
        loaded = loaded._replace(model=model)
        prompt = fitted(prompt, loaded)
        check_pair(prompt, loaded, any_backbone)
        injection = prompt.injection
    source = tokenizer or recorded.get("tokenizer") or loaded.path
    words = registry.tokenizer_for(loaded.config, source)
    engine = make_engine(loaded.params, injection, loaded.model, loaded.mesh)
    return Session(loaded, words, prompt, engine)


def as_session(prompt: PromptLike, backbone: str | Path | Backbone | None = None) -> Session:
    """The session itself, or a new one of a prompt."""
    return prompt if isinstance(prompt, Session) else open_session(prompt, backbone)


def _load(
    backbone: str | Path | Backbone | None,
    recorded: str | None,
    dtype: str | None,
    quantization: str | None,
    weights: str | None,
) -> Backbone:
    if isinstance(backbone, Path):
        backbone = str(backbone)
    if not isinstance(backbone, str | Backbone | None):
        raise UserError(f"A backbone is {shown(backbone)}; give a name, a path or a Backbone.")
    if backbone is None:
        backbone = recorded
    if backbone is None:
        raise UserError(
            "The prompt does not say which backbone it is for; name it with --backbone."
        )
    if isinstance(backbone, Backbone):
        return backbone
    return load_backbone(
        backbone, dtype=dtype, quantization=quantization, weights=weights,
        mesh=parallel.make_mesh(),
    )  # fmt: skip


def attention_of(prompt: Prompt) -> str:
    """The attention that the prompt was tuned with: causal, prompt or prefix."""
    value: object = prompt.metadata
    for key in ("config", "model", "attention"):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) and value in ("prompt", "prefix") else "causal"


def check_pair(prompt: Prompt, backbone: Backbone, any_backbone: bool = False) -> None:
    """Raise a UserError unless ``prompt`` was tuned on ``backbone`` (known by its fingerprint)."""
    width = prompt.vectors.shape[1]
    if width != backbone.config.d_model:
        raise UserError(
            f"The prompt has vectors of {width} numbers and {backbone.source} has d_model "
            f"{backbone.config.d_model}; use the backbone that the prompt was tuned on."
        )
    if prompt.layers is not None:
        check_fit(prompt.layers, backbone.params, backbone.source)
    kind = prompt.metadata.get("peft", {}).get("task_type")
    fitting = "CAUSAL_LM" if registry.one_sequence(backbone.config) else "SEQ_2_SEQ_LM"
    if registry.masked(backbone.config):
        fitting = "masked words"
    if kind in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and kind != fitting:
        raise UserError(
            f"The adapter is for {kind} and {backbone.source} is a model for {fitting}; use the "
            "backbone that it was tuned on."
        )
    recorded = prompt.metadata.get("backbone", {})
    expected = recorded.get("fingerprint")
    if expected is not None and not any_backbone and not same_model(backbone, recorded):
        raise UserError(
            f"The prompt was tuned on {recorded.get('source')!r} with fingerprint {expected} and "
            f"{backbone.source!r} has {backbone.fingerprint}: other weights; name the right "
            "backbone with --backbone, or allow this one with --any-backbone."
        )


def prompt_task(prompt: Prompt | None, task: TaskLike) -> TaskConfig:
    """The task that is named, else the one that the prompt was tuned on.

    Of a prompt that learnt several tasks, a name means the task as it was learnt.

    Args:
        prompt: None for the bare backbone.
        task: a mapping without a name changes the task that the prompt was tuned on; it may be
            written as in YAML, "{calibration: batch}".

    Raises:
        UserError: no task is known, or it has other labels than the prompt has label rows for.
    """
    chosen = _named_task(prompt, task)
    if prompt is not None and VERBALIZER in (prompt.layers or {}):
        _check_label_rows(prompt, chosen)
    return chosen


def _check_label_rows(prompt: Prompt, task: TaskConfig) -> None:
    """Raise a UserError unless the task has the labels that the prompt's rows stand for."""
    learnt = prompt.metadata.get("task", {}).get("labels")
    labels = task.labels if task.decoding == "rank" else None
    if labels is None or labels != (learnt or labels) or len(labels) != _num_label_rows(prompt):
        raise UserError(
            f"The prompt has a soft verbalizer for the labels {shown(learnt)}, and task "
            f"{task.name!r} asks for {'text' if labels is None else shown(labels)}; use the task "
            "that it was tuned on, with its labels in their order."
        )


def _num_label_rows(prompt: Prompt) -> int:
    return len((prompt.layers or {})[VERBALIZER].bias)


def _named_task(prompt: Prompt | None, task: TaskLike) -> TaskConfig:
    """The task of ``prompt_task``, not checked."""
    if isinstance(task, TaskConfig):
        return task
    if isinstance(task, str) and task.lstrip().startswith("{"):
        written = override_value(task, "task")
        task = written if isinstance(written, dict) else task
    learnt = None if prompt is None else prompt.metadata.get("mixture")
    by_name = {each["name"]: each for each in learnt or ()}
    if isinstance(task, str) and task in by_name:
        return parse(TaskConfig, by_name[task], "task.")
    if by_name and task is None:
        raise UserError(
            f"The prompt was tuned on several tasks ({listed(by_name)}); name one with --task."
        )
    recorded = None if prompt is None else prompt.metadata.get("task")
    if isinstance(task, dict) and "name" not in task and recorded is not None and not by_name:
        own: Values = {**recorded}
        return parse(TaskConfig, own | with_files_of_others(own, task), "task.")
    if task is not None:
        return resolve_task(task)
    if recorded is None:
        raise UserError("The prompt does not say which task it is for; name one with --task.")
    return parse(TaskConfig, recorded, "task.")
