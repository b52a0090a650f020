"""Other words around the vectors of a prompt: a template and label words, and the config of them.

``jaxprompt play`` and the page of the server change the words of a task while its vectors stay.
Both turn a wording into a task with ``reworded``, scores into ``probabilities``, and what is worth
keeping into a config with ``kept_config``.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxprompt.config import yaml12
from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.config.values import Values
from jaxprompt.data import openprompt, promptsource
from jaxprompt.data.examples import check_labels
from jaxprompt.data.jinja_templates import cut_columns
from jaxprompt.data.tasks.registry import TASKS, resolve_task
from jaxprompt.data.templates import input_columns, place_prompt, with_counts
from jaxprompt.data.tokenizer import Tokenizer

MOST_CHARACTERS = 2000  # of a template
MOST_LABELS, MOST_LABEL_CHARACTERS = 64, 200
MOST_LABEL_TOKENS = 256  # of all labels: their tree takes time that grows with the square


class Wording(NamedTuple):
    """The words that take the place of a task's own; None: they stay as they are."""

    template: str | None = None
    labels: Sequence[str] | None = None


def reworded(task: TaskConfig, wording: Wording, tokenizer: Tokenizer, length: int) -> TaskConfig:
    """The task in other words, which a prompt of ``length`` vectors can answer.

    Labels that are as many as before take the places of the old ones, so rows with the old labels
    are still judged. Words of a verbalizer, a prior and other texts that belonged to the old words
    go with them. Files are never read: a template is text with columns in braces.

    Raises:
        UserError: template or labels cannot be used, or the vectors have no place in the template.
    """
    changes: Values = {}
    if wording.template is not None and wording.template != task.template:
        changes |= _with_template(task, wording.template)
    if wording.labels is not None and list(wording.labels) != task.labels:
        changes |= _with_labels(task, [label.strip() for label in wording.labels])
    if not changes:
        return task
    changed = parse(TaskConfig, task.model_dump() | changes, "task.")
    place_prompt(with_counts(changed.template, tokenizer.encode), length)
    check_labels(changed, tokenizer)
    if "labels" in changes:
        _check_tokens(changed, tokenizer)
    return changed


def _check_tokens(task: TaskConfig, tokenizer: Tokenizer) -> None:
    count = sum(map(len, tokenizer.encode_targets(task.labels or [], task.separator)))
    if count > MOST_LABEL_TOKENS:
        raise UserError(
            f"The labels have {count} tokens together, with the ends of labels; give at most "
            f"{MOST_LABEL_TOKENS}."
        )


def _with_template(task: TaskConfig, template: str) -> Values:
    if len(template) > MOST_CHARACTERS:
        raise UserError(
            f"The template has {len(template):,} characters; give at most {MOST_CHARACTERS:,}."
        )
    _check_names_no_file(template)
    changed = task.model_copy(update={"template": template, "truncate": None})
    columns = input_columns(changed, all_of_jinja=True)
    cut = [name for name in cut_columns(task) if name in columns]
    return {"template": template, "templates": [], "truncate": cut or None}


def _check_names_no_file(template: str) -> None:
    if template.startswith((promptsource.PREFIX, openprompt.PREFIX)):
        raise UserError(
            f"Template {shown(template)} names a file; write its text, with columns in braces."
        )


def _with_labels(task: TaskConfig, labels: list[str]) -> Values:
    if not 2 <= len(labels) <= MOST_LABELS:
        raise UserError(
            f"There {'is' if len(labels) == 1 else 'are'} {len(labels)} label"
            f"{'' if len(labels) == 1 else 's'}; give 2 to {MOST_LABELS}, with commas between them."
        )
    long = [label for label in labels if len(label) > MOST_LABEL_CHARACTERS]
    if long:
        raise UserError(
            f"The label {shown(long[0])} has {len(long[0])} characters; give at most "
            f"{MOST_LABEL_CHARACTERS}."
        )
    names: dict[str, str] = {}
    if task.labels is not None and len(task.labels) == len(labels):
        new = dict(zip(task.labels, labels, strict=True))
        known = dict.fromkeys(task.labels) | (task.label_map or {})
        names = {value: new[label or value] for value, label in known.items()}
    moved = any(value != word for value, word in names.items())
    return {
        "labels": labels, "label_map": names if moved else None, "verbalizer": None,
        "label_prior": None, "class_labels": None, "decoding": "rank",
    }  # fmt: skip


def probabilities(scores: Float[np.ndarray, "*n C"]) -> Float[np.ndarray, "*n C"]:
    """The probability of each label among all labels, from scores in nats."""
    powers = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


# ---- what is kept


def kept_config(
    metadata: Mapping[str, object], task: TaskConfig, output: str, vectors: str | None = None
) -> str:
    """A config that tunes a prompt with the words of ``task``, as YAML.

    The settings are those of the run that the prompt records; what has its default is left out.

    Args:
        metadata: of the prompt.
        task: in the words that are kept.
        output: the directory of the new run.
        vectors: the path of the prompt whose vectors the run starts from; None: it starts anew.

    Raises:
        UserError: the recorded settings are no config, or a template would name a file.
    """
    for template in (task.template, *task.templates):
        _check_names_no_file(template)
    recorded, backbone = metadata.get("config"), metadata.get("backbone")
    source = backbone.get("source") if isinstance(backbone, Mapping) else None
    values: Values = {**recorded} if isinstance(recorded, Mapping) else {}
    if not values:
        values = {"backbone": source} if source else {}
        method = metadata.get("method")
        values |= {"method": method} if isinstance(method, str) else {}
    values |= {"task": _task_values(task), "output": output, "users": None}
    prompt: Values = {**(values.get("prompt") or {}), "population": {}}
    if vectors is not None and values.get("method", "prompt-tuning") == "prompt-tuning":
        prompt |= {"length": metadata.get("length"), "init": "file", "file": vectors}
    values["prompt"] = prompt
    own = ("backbone", "method", "task", "output")
    config = parse(RunConfig, values)
    given = {key: values[key] for key in own if key in values}
    plain = parse(RunConfig, given).model_dump()
    short = _difference(config.model_dump(), plain)
    ordered = {key: {**given, **short}[key] for key in dict.fromkeys([*given, *short])}
    kept = ordered if parse(RunConfig, ordered) == config else config.model_dump()
    return yaml12.dump(kept)


def _difference(values: Values, plain: Values) -> Values:
    """What ``values`` has otherwise than ``plain``, section by section."""
    found: Values = {}
    for key, value in values.items():
        other = plain.get(key)
        if value == other:
            continue
        section = key != "task" and value and other
        if section and isinstance(value, dict) and isinstance(other, dict):
            value = _difference(value, other)
        found[key] = value
    return found


def _task_values(task: TaskConfig) -> Values:
    """A task as a config names it: a registered one with its changes, or all that is not usual."""
    values = task.model_dump()
    if task.name in TASKS:
        plain = resolve_task(task.name).model_dump()
    else:
        plain = {key: field.default for key, field in TaskConfig.model_fields.items()}
    changed = {key: value for key, value in values.items() if plain.get(key) != value}
    short = {"name": task.name, **changed}
    return short if _same(short, task) else values


def _same(values: Values, task: TaskConfig) -> bool:
    try:
        return resolve_task(values) == task
    except UserError:
        return False


# ---- what a person types


def labels_in(text: str) -> list[str]:
    """The labels in a text with commas between them.

    >>> labels_in("good, very bad")
    ['good', 'very bad']
    """
    return [label.strip() for label in text.split(",")]


def row_of(task: TaskConfig, text: str) -> Values:
    """The row that a line means: its text where the task reads one column, else an object.

    Args:
        task: whose columns are wanted.
        text: a text, or a JSON object with the columns.

    Raises:
        UserError: the task has several columns and the text is no object.
    """
    columns = input_columns(task)
    value: object = None
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except ValueError:
            value = None
    if isinstance(value, dict):
        return value
    if len(columns) == 1:
        return {columns[0]: text}
    raise UserError(
        f"The template has the columns {listed(columns)}; give each one its text with /set COLUMN "
        'TEXT, or all as JSON, {"' + columns[0] + '": "..."}.'
    )
