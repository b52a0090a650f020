"""All known tasks by name, and how a task's settings are resolved.

Each task is one entry of ``builtin``, ``superglue``, ``glue``, ``qa`` or ``generation``, beside its
row rule. The text forms are those of Lester et al. 2021, section 3, which are T5's own (Raffel et
al. 2020, appendix D) without the task names that T5 puts in front. The first of a task's metrics
selects checkpoints.
"""

import difflib
import math

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.mixture import Mixture, MixtureConfig
from jaxprompt.config.schema import TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.config.values import Values
from jaxprompt.data.tasks import builtin, generation, glue, qa, superglue
from jaxprompt.data.tasks.entry import THREE_SPLITS, Entry
from jaxprompt.data.tasks.others import with_files_of_others
from jaxprompt.data.truncation import columns_to_cut
from jaxprompt.data.verbalizers import first_words

TASKS: dict[str, Entry] = builtin.TASKS | superglue.TASKS | glue.TASKS | qa.TASKS | generation.TASKS

# the metric of a mixture: the mean of the first metrics of its tasks
MEAN = "mean"

# What T5 put in front of a task's text when it was trained on many at once (Raffel et al. 2020).
# Prompt tuning leaves it out: the prompt says what the task is.
PREFIXES: dict[str, str] = superglue.PREFIXES | glue.PREFIXES | qa.PREFIXES | generation.PREFIXES


def resolve_task(task: str | Values) -> TaskConfig:
    """A task by name, or from a mapping; with a known name, the mapping changes that task.

    ``prefix: true`` puts T5's name of the task in front of its text, as in "boolq passage: ...".
    """
    if not isinstance(task, str | dict):
        raise UserError(f"A task is {shown(task)}; give a name, or a mapping with a template.")
    values = {"name": task} if isinstance(task, str) else dict(task)
    if "mixture" in values:
        raise UserError("A mixture is for training alone; name one of its tasks here.")
    name, prefix = values.get("name"), values.pop("prefix", False)
    if not isinstance(name, str | None):
        raise UserError(f"task.name is {shown(name)}; give one word, in quotes if it is a number.")
    if not isinstance(prefix, bool) or (prefix and name not in PREFIXES):
        raise UserError(
            f"task.prefix is {shown(prefix)}; it is true or false, and true only for the tasks "
            "that T5 was trained on; write other prefixes into task.template."
        )
    values = with_files_of_others(TASKS.get(name or "", {}), values)
    if name in TASKS:
        values = _changed_entry(TASKS[name], values)
        if prefix and isinstance(values["template"], str):  # else it is refused below
            values["template"] = PREFIXES[name] + values["template"]
    elif name is not None and "template" not in values:
        close = difflib.get_close_matches(name[:80], TASKS, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"known are {', '.join(TASKS)}."
        raise UserError(
            f"Task {shown(name)} is unknown; {hint} A task of your own is a mapping with a "
            "template."
        )
    config = parse(TaskConfig, values, "task.")
    for template in (config.template, *config.templates):
        columns_to_cut(config.model_copy(update={"template": template}))
    return config


def resolve_learnt(task: str | Values) -> TaskConfig:
    """What a run learns: a task, as ``resolve_task`` has it, or a ``Mixture``."""
    if not isinstance(task, dict) or "mixture" not in task:
        return resolve_task(task)
    config = parse(MixtureConfig, task, "task.")
    tasks, weights = [], []
    for name, values in config.mixture.items():
        changes = dict(values) if isinstance(values, dict) else {"weight": values}
        weights.append(_weight(name, changes.pop("weight", 1.0)))
        tasks.append(resolve_task({"name": name, **changes}))
    if len({each.name for each in tasks}) < len(tasks):
        raise UserError(f"task.mixture has two tasks of one name; it has {listed(config.mixture)}.")
    first, words = tasks[0], [word for each in tasks for word in class_words(each)]
    return Mixture(
        name=config.name,
        template=first.template,
        separator=first.separator,
        class_labels=list(dict.fromkeys(words)) or None,
        metrics=[MEAN],
        tasks=tuple(tasks),
        weights=tuple(weights),
        temperature=config.temperature,
        cap=config.cap,
    )


def _weight(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(
            f"task.mixture.{name}.weight is {shown(value)}; give a number above 0, or leave the "
            "task out."
        )
    return float(value)


def _changed_entry(entry: Entry, values: Values) -> Values:
    """An entry with the user's values in it.

    Rows from files replace the entry's source, and with it the splits that the source names.
    """
    if "source" not in values and any(split in values for split in THREE_SPLITS):
        entry = {key: v for key, v in entry.items() if key not in ("source", *THREE_SPLITS)}
    return entry | values


def class_words(task: TaskConfig) -> list[str]:
    """The words that ``prompt.init=class_labels`` starts from, in order; there may be none."""
    return list(task.class_labels or first_words(task))
