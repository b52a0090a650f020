"""The T5-base table of DePT (Shi and Lipani 2023, arXiv 2309.05173) with the methods that are here.

The table compares DePT, MPT, ATTEMPT, SPoT and others on eight tasks of GLUE and five of SuperGLUE.
Its authors took most rows from the papers of ATTEMPT (arXiv 2205.11961), MPT (arXiv 2303.02861) and
LST (arXiv 2206.06522). It has no spread, and its test sets are halves of validation sets: 28 rows
of CB, 52 of WSC. Here the whole validation sets are used, and three seeds. DePT itself, whose
offsets of embeddings depend on the position, is no method here.
"""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial

from jaxprompt.config.methods import METHOD_NAMES
from jaxprompt.config.schema import TaskConfig
from jaxprompt.studies.baselines import Record
from jaxprompt.studies.method_runs import MODEL_TUNING
from jaxprompt.studies.methods import label_of
from jaxprompt.studies.runs import Run, Settings, of_method
from jaxprompt.studies.study import Records, StudyPlan, Table, Variant
from jaxprompt.studies.tables import NOTHING, mean_and_spread

# ours -> the table's name, in the table's order: eight of GLUE, five of SuperGLUE
GLUE = {
    "mnli": "MNLI", "qqp": "QQP", "qnli": "QNLI", "sst2": "SST-2", "stsb": "STS-B",
    "mrpc": "MRPC", "glue_rte": "RTE", "cola": "CoLA",
}  # fmt: skip
SUPERGLUE = {"multirc": "MultiRC", "boolq": "BoolQ", "wic": "WiC", "wsc": "WSC", "cb": "CB"}
TASKS = {**GLUE, **SUPERGLUE}
BACKBONE = "google-t5/t5-base"

# percent, in the order of TASKS (table 1 of the paper and, of DePT, the released test results)
_ROWS: Mapping[str, tuple[str, str]] = {
    MODEL_TUNING: ("220M", "86.8 91.6 93.0 94.6 89.7 90.2 71.9 61.8 72.8 81.1 70.2 59.6 85.7"),
    "houlsby": ("1.9M", "86.5 90.2 93.2 93.8 90.7 85.3 71.9 64.0 75.9 82.5 67.1 67.3 85.7"),
    "bitfit": ("280K", "85.3 90.1 93.0 94.2 90.9 86.8 67.6 58.2 74.5 79.6 70.0 59.6 78.6"),
    "lora": ("3.8M", "86.3 89.0 93.2 94.3 90.9 90.1 75.5 63.3 72.6 81.3 68.3 67.3 92.9"),
    "prompt-tuning": ("76.8K", "83.4 90.2 93.1 91.9 90.2 90.1 78.8 60.7 65.7 63.7 50.8 51.9 67.9"),
    "multitask-prompt-tuning": (
        "77.6K", "85.9 90.3 93.1 93.8 90.4 89.1 79.4 62.4 74.8 79.6 69.0 67.3 79.8"
    ),
    "SPoT": ("76.8K", "85.4 90.1 93.0 93.4 90.0 79.7 69.8 57.1 74.0 77.2 67.0 50.0 46.4"),
    "ATTEMPT": ("232K", "84.3 90.3 93.0 93.2 89.7 85.7 73.4 57.4 74.4 78.8 66.8 53.8 78.6"),
    "DePT": ("76.8K", "85.0 90.4 93.2 94.2 90.8 90.7 79.1 63.8 74.3 79.3 68.7 67.3 92.9"),
}  # fmt: skip
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    name: {task: float(x) / 100 for task, x in zip(TASKS, text.split(), strict=True)}
    for name, (_, text) in _ROWS.items()
}
METHODS = tuple(name for name in _ROWS if name in METHOD_NAMES)  # the others are in the table alone

# the steps of the released checkpoints of DePT; all methods have as many
STEPS = {
    "mnli": 250_000, "qnli": 100_000, "qqp": 100_000, "cola": 40_000, "mrpc": 10_000,
    "wic": 20_000, "wsc": 20_000,
}  # fmt: skip
USUAL_STEPS = 30_000
_LINEAR: Settings = {
    "train.optimizer": "adamw", "train.schedule": "linear", "train.warmup_steps": 500
}  # fmt: skip
_PROMPT: Settings = {
    **_LINEAR, "prompt.length": 100, "prompt.init": "sampled_vocabulary",
    "train.learning_rate": 0.3, "train.weight_decay": 1e-5,
}  # fmt: skip
# the options of the code of ATTEMPT and DePT; of LoRA and adapters those of LST's rows
RECIPES: Mapping[str, Settings] = {
    "prompt-tuning": _PROMPT,
    "multitask-prompt-tuning": _PROMPT,
    # width 24; the scales of norms are trained, too
    "houlsby": {
        **_LINEAR, "train.learning_rate": 3e-4, "adapter.reduction": 32.0,
        "adapter.activation": "gelu", "adapter.norms": True,
    },
    "bitfit": {**_LINEAR, "train.learning_rate": 3e-4},
    # rank 32 at query and value has 3.5 million parameters
    "lora": {**_LINEAR, "train.learning_rate": 3e-4, "lora.rank": 32, "lora.alpha": 32.0},
    MODEL_TUNING: {**_LINEAR, "train.learning_rate": 3e-4, "train.weight_decay": 0.0},
}  # fmt: skip
# for tests of the cells and for a first look
MINIATURE_STEPS = 200


def in_table(task: TaskConfig) -> TaskConfig:
    """A task as the table has it: inputs of 256 tokens, and one metric."""
    metrics = {"qqp": "accuracy", "mrpc": "accuracy", "cb": "accuracy"}
    changes: dict[str, object] = {"max_input_length": 348 if task.name == "multirc" else 256}
    if task.name in metrics:
        first = metrics[task.name]
        changes["metrics"] = [first, *(m for m in task.metrics if m != first)]
    return task.model_copy(update=changes)


def chosen_methods(plan: StudyPlan) -> list[str]:
    """The methods of the table that are here, or those of the user."""
    return plan.methods or list(METHODS)


def runs_of(plan: StudyPlan, task: str, method: str) -> list[Run]:
    """A run for each seed. One learning rate is trained, that of the recipe."""
    steps = STEPS.get(task, USUAL_STEPS)
    settings: Settings = {"train.steps": steps, "train.batch_size": 32}
    settings |= RECIPES.get(method, {**_LINEAR})
    if plan.recipe == "miniature":
        settings |= {"train.steps": MINIATURE_STEPS, "train.warmup_steps": 10}
    if "prompt.length" in settings:
        settings |= {"prompt.length": plan.length}
    settings |= {"seeds": plan.seeds, "factors": [1.0]} | of_method(plan.settings, method)
    name = next(iter(plan.backbones))
    return [Run(name, task, method, None, s, "table", settings) for s in range(plan.seeds)]


def variants(plan: StudyPlan) -> list[Variant]:
    """Each task is a group, each method a line."""
    return [
        Variant(
            label_of(method),
            TASKS.get(task, task),
            runs_of(plan, task, method),
            read=_validation,
            paper=PUBLISHED.get(method, {}).get(task),
        )
        for task in plan.tasks
        for method in chosen_methods(plan)
    ]


def _validation(record: Record) -> float | None:
    """The table's tasks have no other labelled rows."""
    return record.get("validation")


def tables(plan: StudyPlan, records: Records) -> list[tuple[str, Table]]:
    """Ours above the published figures, and the means of both benchmarks."""
    names = [task for task in TASKS if task in plan.tasks]
    names += [task for task in plan.tasks if task not in TASKS]
    head = ["", "parameters", *(TASKS.get(task, task) for task in names)]
    head += ["mean of GLUE", "mean of SuperGLUE"]
    lines = [head]
    for method in chosen_methods(plan):
        read = partial(_scores, plan, records, method)
        scores = {task: read(task) for task in names}
        means = {task: statistics.mean(values) for task, values in scores.items() if values}
        cells = [mean_and_spread([100 * x for x in scores[task]]) for task in names]
        lines.append(
            [f"{label_of(method)}, here", _parameters(plan, records, method), *cells]
            + [_mean_of(some, means) for some in (GLUE, SUPERGLUE)]
        )
    for name, figures in PUBLISHED.items():
        cells = [f"{100 * figures[task]:.1f}" if task in figures else NOTHING for task in names]
        lines.append(
            [f"{label_of(name)}, published", _ROWS[name][0], *cells]
            + [_mean_of(some, figures) for some in (GLUE, SUPERGLUE)]
        )
    return [("T5-base, percent on validation rows", lines)]


def _scores(plan: StudyPlan, records: Records, method: str, task: str) -> list[float]:
    known = [records[run.key] for run in runs_of(plan, task, method) if run.key in records]
    values = [_validation(record) for record in known]
    return [value for value in values if value is not None]


def _parameters(plan: StudyPlan, records: Records, method: str) -> str:
    for task in plan.tasks:
        for run in runs_of(plan, task, method):
            count = records.get(run.key, {}).get("trainable_parameters")
            if count:
                return f"{count:,}"
    return NOTHING


def _mean_of(tasks: Sequence[str] | Mapping[str, str], means: Mapping[str, float]) -> str:
    """The mean over a benchmark's tasks, if all are there."""
    if not all(task in means for task in tasks):
        return NOTHING
    return f"{100 * statistics.mean(means[task] for task in tasks):.1f}"


def notes(plan: StudyPlan) -> list[str]:
    """What the two halves of the table have in common, and what not."""
    return [
        "Published figures: table 1 of DePT, with the rows of earlier papers. They are of one half "
        "of a validation set where it is small (RTE 139 rows, WSC 52, CB 28), of one checkpoint, "
        "and without a spread; the checkpoint was chosen on the other half. Ours are of whole "
        "validation sets, on which the step is chosen, too. DePT, SPoT and ATTEMPT are not "
        "trained here.",
    ]
