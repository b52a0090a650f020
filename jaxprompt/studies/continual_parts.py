"""What the study of continual learning measures with: tasks, trainings, features, figures."""

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from jaxprompt.api import PredictOptions, Session, open_session, predict_rows
from jaxprompt.config.limits import SPLITS
from jaxprompt.config.schema import TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.config.values import Values
from jaxprompt.data.rows import Rows
from jaxprompt.data.targets import eval_references
from jaxprompt.data.tasks.splits import load_rows
from jaxprompt.data.templates import columns_of, to_target
from jaxprompt.evaluation.metrics import measure as measure_answers
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.runtime.files import write_atomically
from jaxprompt.serving.features import text_features, text_of
from jaxprompt.studies.runs import PassWarnings, Run, Suite, run_config
from jaxprompt.training.loop import train

GROUP = 2  # labels of each part of a task that is split
TEST_ROWS = 300
Matrix = list[list[float]]  # a[i][j]: the score on task j after learning i + 1 tasks


# ---- tasks


def number_of_parts(task: TaskConfig) -> int:
    """How many tasks ``parts_of`` makes of it."""
    count = len(task.labels or ()) // GROUP
    return count if count > 1 and task.rule is None else 1


def parts_of(task: TaskConfig, folder: Path) -> list[TaskConfig]:
    """A task with four labels or more as several tasks with two labels each, none in common.

    Of an odd number of labels the last one is left out. The rows of each part are in files of
    ``folder``. Other tasks stay as they are.
    """
    if number_of_parts(task) == 1:
        return [task]
    labels = task.labels or []
    rows_of = functools.cache(lambda split: load_rows(task, split))  # none if all files are there
    mapped = task.label_map or {}
    found = []
    for start in range(0, len(labels) - GROUP + 1, GROUP):
        chosen = labels[start : start + GROUP]
        name = "-".join([task.name, *chosen])
        values: Values = task.model_dump() | {"name": name, "source": None, "labels": chosen}
        values["label_map"] = {k: v for k, v in mapped.items() if v in chosen} or None
        values["class_labels"] = None
        for key in ("verbalizer", "label_prior"):
            values[key] = {k: v for k, v in (values[key] or {}).items() if k in chosen} or None
        for split in (s for s in SPLITS if getattr(task, s)):
            file = folder / name / f"{split}.jsonl"
            values[split] = str(file.absolute())
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                kept = [row for row in rows_of(split) if to_target(task, row) in chosen]
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
                write_atomically(file, lines)
        found.append(parse(TaskConfig, values, "task."))
    return found


def tasks_in(suite: Suite, folder: str = "continual") -> list[TaskConfig]:
    """The tasks of a study, whose files are in ``folder`` of its output."""
    return [part for task in suite.tasks.values() for part in parts_of(task, suite.out / folder)]


def order_of(tasks: Sequence[TaskConfig], number: int) -> list[TaskConfig]:
    """One of three orders: as given, backwards, and the second half before the first."""
    half = len(tasks) // 2
    return [list(tasks), list(tasks)[::-1], [*tasks[half:], *tasks[:half]]][number]


# ---- training and answers


def trained(run: Run, suite: Suite, task: TaskConfig | Values, folder: Path) -> Path:
    """Where what is tuned on a task lies: it is trained, unless it is there already.

    ``run.method`` is prompt or full. A mixture is given as the values of the config.
    """
    tuned = folder / ("prompt" if run.method == "prompt" else "model")
    if tuned.is_dir() and (folder / "result.json").is_file():
        return tuned
    first = task if isinstance(task, TaskConfig) else tasks_in(suite)[0]
    config = run_config(run, suite.recipe, first, suite.backbones[run.backbone], folder)
    values = config.model_dump()
    values["task"] = (first.model_dump() if first is task else dict(task)) | (
        {"test": None} if first is task else {}
    )
    if "backbone" in run.settings:
        values["backbone"] = run.settings["backbone"]
    train(parse(type(config), values), PassWarnings(suite.say))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return tuned


def rows_to_test(task: TaskConfig) -> Rows:
    """The rows that scores are of."""
    return load_rows(task, "test" if task.test else "validation", TEST_ROWS)


def right(session: Session, task: TaskConfig) -> Bool[np.ndarray, " n"]:
    """Which of a task's rows are answered rightly, among the task's own labels."""
    rows = rows_to_test(task)
    found = predict_rows(session, task, rows, PredictOptions(pack=True)).predictions
    wanted = eval_references(task, rows, session.tokenizer)
    return np.array(
        [
            measure_answers(one_metric(task), [answer], [reference])["accuracy"] == 1
            for answer, reference in zip(found, wanted, strict=True)
        ]
    )


def one_metric(task: TaskConfig) -> TaskConfig:
    """The task with accuracy alone."""
    return task.model_copy(update={"metrics": ["accuracy"]})


def scores(session: Session, tasks: Sequence[TaskConfig]) -> list[float]:
    """The accuracy on each task."""
    return [float(right(session, task).mean()) for task in tasks]


# ---- features


def features_of(
    task: TaskConfig, backbone: Backbone, folder: Path, name: str
) -> dict[str, Float[np.ndarray, "n D"]]:
    """Features of training, validation and test rows in the bare backbone, kept in a file."""
    file = folder / f"features-{name}-{backbone.fingerprint}-{task.name}.npz"
    if file.is_file():
        with np.load(file, allow_pickle=False) as kept:
            return dict(kept)
    session, columns = open_session(None, backbone), columns_of(task.template)
    rows = {
        "train": load_rows(task, "train", 256),
        "held_out": load_rows(task, "validation", 128),
        "test": rows_to_test(task),
    }
    found = {
        split: text_features(session, [text_of(row, columns) for row in some])
        for split, some in rows.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part.npz")
    np.savez(part, allow_pickle=False, **found)
    part.replace(file)
    return found


# ---- figures of sequences


def average(matrix: Matrix) -> float:
    """The mean score on all tasks after the last one."""
    return float(np.mean(matrix[-1]))


def forgetting(matrix: Matrix) -> float:
    """The mean over all tasks but the last of the best score since it was learnt, less the last.

    Chaudhry et al. 2018 (arXiv 1801.10112, section 4).
    """
    scores = np.array(matrix)
    drops = [scores[j:, j].max() - scores[-1, j] for j in range(len(scores) - 1)]
    return float(np.mean(drops)) if drops else 0.0


def forward_transfer(matrix: Matrix, untuned: Sequence[float]) -> float:
    """The mean over all tasks but the first of the score just before it is learnt, less untuned.

    Lopez-Paz and Ranzato 2017 (arXiv 1706.08840, section 3).
    """
    gains = [matrix[j - 1][j] - untuned[j] for j in range(1, len(matrix))]
    return float(np.mean(gains)) if gains else 0.0


def auroc(inside: Float[np.ndarray, " n"], outside: Float[np.ndarray, " m"]) -> float:
    """The chance that a row from outside has the larger value than one from inside.

    >>> auroc(np.array([1.0, 2.0]), np.array([2.0, 3.0]))
    0.875
    """
    larger = (outside[:, None] > inside[None]).mean()
    return float(larger + (outside[:, None] == inside[None]).mean() / 2)
