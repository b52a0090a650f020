"""Tasks in other forms: another task's label words, several tasks as one, a sentinel in front."""

import json
from collections.abc import Sequence
from pathlib import Path

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.config.values import Values
from jaxprompt.data.tasks.splits import load_rows
from jaxprompt.data.templates import to_text
from jaxprompt.runtime.files import write_atomically


def relabelled(target: TaskConfig, source: TaskConfig) -> TaskConfig:
    """``target`` in the label words of ``source``, by position, as the paper's transfer does."""
    if source.labels == target.labels or not source.labels or not target.labels:
        return target
    if len(source.labels) != len(target.labels):
        raise UserError(
            f"{source.name!r} has {len(source.labels)} labels and {target.name!r} "
            f"{len(target.labels)}; transfer needs as many."
        )
    words = dict(zip(target.labels, source.labels, strict=True))
    reached = {label: label for label in target.labels} | (target.label_map or {})
    mapped = {value: words[label] for value, label in reached.items()}
    return target.model_copy(update={"labels": list(source.labels), "label_map": mapped})


def mixture(tasks: Sequence[TaskConfig], folder: Path) -> tuple[TaskConfig, list[TaskConfig]]:
    """One task of all the training rows, with task names in front, and the tasks in that form.

    Multi-task model tuning, the paper's stronger baseline: rows in proportion to their number, up
    to 2^19 of a task (Raffel et al. 2020, section 3.5.2).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        rows = []
        for task in tasks:
            for row in list(load_rows(task, split))[: 2**19]:
                text, target = to_text(task, row)
                rows.append({"input": f"{task.name}: {text}", "target": target})
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(folder / f"{split}.jsonl", lines)
    prefixed = [
        task.model_copy(update={"template": f"{task.name}: {task.template}"}) for task in tasks
    ]
    values: Values = {"name": "multitask", "template": "{input}", "target": "{target}"}
    values |= {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}
    values |= {
        key: max(getattr(task, key) for task in tasks)
        for key in ("max_input_length", "max_target_length")
    }
    return TaskConfig(**values, metrics=["exact_match"]), prefixed


CLOZE = "<extra_id_0>"


def with_sentinel(task: TaskConfig) -> TaskConfig:
    """The task with a sentinel before each target, as span corruption writes (Lester et al., 3.1).

    Without labels the target's template has it.
    """
    if task.labels is None:
        return task.model_copy(update={"target": f"{CLOZE} {task.target}"})
    words = {label: label for label in task.labels} | (task.label_map or {})
    return task.model_copy(
        update={
            "labels": [f"{CLOZE} {label}" for label in task.labels],
            "label_map": {value: f"{CLOZE} {label}" for value, label in words.items()},
        }
    )
