"""Continual learning: one task after another, with a prompt for each, or one model for all.

A prompt for each task forgets nothing as long as the right one is chosen. So each result is there
three times: with the task known, chosen by the router, and chosen at random. A row that goes to
another task's prompt counts as wrong: the tasks' labels have nothing in common.
"""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from jaxprompt.api import open_session
from jaxprompt.config.schema import TaskConfig
from jaxprompt.config.values import Values
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.models.checkpoints.load import Backbone, load_backbone
from jaxprompt.runtime.files import write_atomically
from jaxprompt.serving.router import Router, statistics_of
from jaxprompt.studies.baselines import Record
from jaxprompt.studies.continual_parts import (
    Matrix,
    auroc,
    average,
    features_of,
    forgetting,
    forward_transfer,
    order_of,
    right,
    scores,
    tasks_in,
    trained,
)
from jaxprompt.studies.runs import Run, Settings, Suite, of_method
from jaxprompt.studies.study import Hypothesis, Records, StudyPlan, Table, Variant
from jaxprompt.studies.tables import NOTHING, mean_and_spread

ORDERS = 3
ISOLATED, PROMPT, MODEL, JOINT = "prompt-per-task", "one-prompt", "one-model", "joint-prompt"
KINDS = {ISOLATED: "prompt", PROMPT: "prompt", MODEL: "full", JOINT: "prompt"}
KNOWN, ROUTED, RANDOM = (
    "a prompt for each task, task known", "a prompt for each task, routed",
    "a prompt for each task, at random",
)  # fmt: skip
LABELS = {
    PROMPT: "one prompt, in sequence", MODEL: "full fine-tuning, in sequence",
    JOINT: "one prompt, all tasks at once",
}  # fmt: skip
SHORT: Settings = {"train.steps": 150, "train.batch_size": 16, "train.max_eval_examples": 100}


def runs_of(plan: StudyPlan, method: str) -> list[Run]:
    """A run for each order and seed; joint training has no order."""
    kind, first = KINDS[method], next(iter(plan.tasks))
    settings = dict(SHORT) if plan.recipe == "miniature" else {}
    settings |= of_method(plan.settings, kind)
    length = plan.length if kind == "prompt" else None
    orders = range(1 if method == JOINT else ORDERS)
    return [
        Run(next(iter(plan.backbones)), first, method, length, seed, f"order{order}", settings)
        for order in orders
        for seed in range(plan.seeds)
    ]


def _field(name: str, record: Record) -> float | None:
    return record.get(name)


ACCURACY, FORGOTTEN, CHOICE = "average accuracy", "forgetting", "choice of the prompt"


def variants(plan: StudyPlan) -> list[Variant]:
    """Average accuracy, forgetting, and how well the router chooses."""
    found, own = [], runs_of(plan, ISOLATED)
    for group, suffix in ((ACCURACY, "average"), (FORGOTTEN, "forgetting")):
        for label, prefix in ((KNOWN, ""), (ROUTED, "routed_"), (RANDOM, "random_")):
            found.append(Variant(label, group, own, read=partial(_field, prefix + suffix)))
        for method, label in LABELS.items():
            if method != JOINT or group == ACCURACY:
                runs = runs_of(plan, method)
                found.append(Variant(label, group, runs, read=partial(_field, suffix)))
    for label, name in (("routing accuracy", "routing"), ("AUROC of abstention", "auroc")):
        found.append(Variant(label, CHOICE, own, read=partial(_field, name), judged=False))
    return found


def measure(run: Run, suite: Suite, backbone: Backbone) -> Record:
    """The record of one order and seed."""
    tasks = order_of(tasks_in(suite), int((run.variant or "order0").removeprefix("order")))
    bare = scores(open_session(None, backbone), tasks)
    how = {ISOLATED: _isolated, PROMPT: _one_prompt, MODEL: _one_model, JOINT: _joint}[run.method]
    found = how(run, suite, backbone, tasks)
    matrix = found["matrix"]
    found |= {"order": [task.name for task in tasks], "untuned": bare, "average": average(matrix)}
    if run.method != JOINT:
        found |= {"forgetting": forgetting(matrix), "forward": forward_transfer(matrix, bare)}
    return {"validation": None, "test": found["average"], "steps": 0, **found}


def _stages(run: Run, suite: Suite) -> Path:
    """The folder of what a seed has trained, which all its runs share."""
    return suite.out / "runs" / run.backbone / "continual" / f"seed{run.seed}"


def _as(run: Run, **settings: object) -> Run:
    """The run as one of prompt tuning or full fine-tuning."""
    return run._replace(method=KINDS[run.method], settings=run.settings | settings)


def _isolated(run: Run, suite: Suite, backbone: Backbone, tasks: Sequence[TaskConfig]) -> Record:
    """A prompt for each task; after each task the router is asked among those that are known."""
    count, folder = len(tasks), _stages(run, suite)
    answered: list[list[np.ndarray]] = []  # [prompt][task]: which rows are right
    sizes = []
    for task in tasks:
        place = trained(_as(run), suite, task, folder / f"prompt-{task.name}")
        session = open_session(load_prompt(place), backbone)
        answered.append([right(session, other) for other in tasks])
        sizes.append(sum(file.stat().st_size for file in place.iterdir()))
    features = [
        features_of(task, backbone, suite.out / "continual", run.backbone) for task in tasks
    ]
    known: Matrix = []
    routed: Matrix = []
    random: Matrix = []
    router, names = Router({}), [task.name for task in tasks]
    chosen: list[np.ndarray] = []
    for stage in range(count):
        mine = features[stage]
        router = router.add(names[stage], statistics_of(mine["train"], mine["held_out"]))
        # before its turn a task has the latest prompt
        own = [answered[min(j, stage)][j] for j in range(count)]
        known.append([float(rows.mean()) for rows in own])
        random.append([float(rows.mean()) / (stage + 1) for rows in own])
        places = [router.names.index(name) for name in names[: stage + 1]]
        chosen = [router.distances(f["test"])[:, places].argmin(axis=1) for f in features]
        routed.append(
            [float((rows & (c == min(j, stage))).mean())
             for j, (rows, c) in enumerate(zip(own, chosen, strict=True))]
        )  # fmt: skip
    confusion = [np.bincount(c, minlength=count).tolist() for c in chosen]
    return {
        "matrix": known, "routed_matrix": routed, "random_matrix": random,
        "routed_average": average(routed), "routed_forgetting": forgetting(routed),
        "random_average": average(random), "random_forgetting": forgetting(random),
        "routing": float(np.mean([(c == j).mean() for j, c in enumerate(chosen)])),
        "confusion": confusion, "auroc": _abstention(router, names, features),
        "bytes": max(sizes), "bytes_of_statistics": _bytes_of(router),
    }  # fmt: skip


def _bytes_of(router: Router) -> int:
    task = next(iter(router.tasks.values()))
    return task.mean.nbytes + task.scatter.nbytes + task.held_out.nbytes


def _abstention(
    router: Router, names: Sequence[str], features: Sequence[dict[str, np.ndarray]]
) -> float | None:
    """AUROC of the distance: rows of a task that was removed, against those of the others.

    The distance is relative to the threshold of the nearest task. The mean over the tasks.
    """
    found = []
    for name, own in zip(names, features, strict=True):
        left = router.remove(name)
        if not left.names:
            return None
        ratio = lambda rows, left=left: _ratio(left, rows)
        others = [f["test"] for n, f in zip(names, features, strict=True) if n != name]
        found.append(auroc(np.concatenate([ratio(rows) for rows in others]), ratio(own["test"])))
    return float(np.mean(found))


def _ratio(router: Router, rows: np.ndarray) -> np.ndarray:
    distances = router.distances(rows)
    nearest = distances.argmin(axis=1)
    return distances[np.arange(len(rows)), nearest] / router.limits[nearest]


def _one_prompt(run: Run, suite: Suite, backbone: Backbone, tasks: Sequence[TaskConfig]) -> Record:
    """One prompt, which each task trains further."""
    folder, matrix = _stages(run, suite), []
    place = trained(_as(run), suite, tasks[0], folder / f"prompt-{tasks[0].name}")
    for stage, task in enumerate(tasks):
        if stage:
            start = {"prompt.init": "file", "prompt.file": str(place.absolute())}
            name = f"{run.variant}-prompt-{stage}-{task.name}"
            place = trained(_as(run, **start), suite, task, folder / name)
        matrix.append(scores(open_session(load_prompt(place), backbone), tasks))
    return {"matrix": matrix}


def _one_model(run: Run, suite: Suite, backbone: Backbone, tasks: Sequence[TaskConfig]) -> Record:
    """One model, all of which each task trains further. Only the latest is kept on disk."""
    matrix: Matrix = []
    before: Path | None = None
    for stage, task in enumerate(tasks):
        folder = _stages(run, suite) / f"{run.variant}-model-{stage}-{task.name}"
        row, start = folder / "row.json", {} if before is None else {"backbone": str(before)}
        if not row.is_file():
            place = trained(_as(run, **start), suite, task, folder)
            model = load_backbone(str(place))
            write_atomically(row, json.dumps(scores(open_session(None, model), tasks)))
            if before is not None:  # hundreds of megabytes
                shutil.rmtree(before, ignore_errors=True)
        matrix.append(json.loads(row.read_text()))
        before = (folder / "model").absolute()
    if before is not None:
        shutil.rmtree(before, ignore_errors=True)
    return {"matrix": matrix}


def _joint(run: Run, suite: Suite, backbone: Backbone, tasks: Sequence[TaskConfig]) -> Record:
    """One prompt for all tasks at once, with as many steps as all tasks have together."""
    steps = {"train.steps": run.settings.get("train.steps", 30_000) * len(tasks)}
    parts: Values = {
        task.name: {k: v for k, v in task.model_dump().items() if k != "name"} for task in tasks
    }
    place = trained(
        _as(run, **steps), suite, {"mixture": parts}, _stages(run, suite) / "joint-prompt"
    )
    return {"matrix": [scores(open_session(load_prompt(place), backbone), tasks)]}


# ---- the report

COLUMNS = ("average accuracy", "forgetting", "forward transfer", "routing accuracy", "AUROC")


def tables(plan: StudyPlan, records: Records) -> list[tuple[str, Table]]:
    """A line for each way to learn, over all orders and seeds."""
    lines = [["", *COLUMNS]]
    wanted = [
        (KNOWN, ISOLATED, ("average", "forgetting", "forward", None, None)),
        (ROUTED, ISOLATED, ("routed_average", "routed_forgetting", None, "routing", "auroc")),
        (RANDOM, ISOLATED, ("random_average", "random_forgetting", None, None, None)),
        (LABELS[PROMPT], PROMPT, ("average", "forgetting", "forward", None, None)),
        (LABELS[MODEL], MODEL, ("average", "forgetting", "forward", None, None)),
        (LABELS[JOINT], JOINT, ("average", None, None, None, None)),
    ]
    for label, method, names in wanted:
        known = [records[run.key] for run in runs_of(plan, method) if run.key in records]
        cells = []
        for name in names:
            values = [record[name] for record in known if name and record.get(name) is not None]
            cells.append(mean_and_spread(values) if values else NOTHING)
        lines.append([label, *cells])
    return [("All orders and seeds", lines)]


def summary(plan: StudyPlan, records: Records) -> list[str]:
    """What the runs say about the claims."""
    known = [records[run.key] for run in runs_of(plan, ISOLATED) if run.key in records]
    if not known:
        return []
    worst = max(record["forgetting"] for record in known)
    size = max(record["bytes"] for record in known)
    more = max(record["bytes_of_statistics"] for record in known)
    return [
        f"No forgetting: with the task known the largest loss on an earlier task is {worst:.4f}; "
        "what is lost when prompts are routed are errors of the router.",
        f"Kilobytes a task: {size / 1024:.0f} KiB of a prompt with its card, and "
        f"{more / 1024:.0f} KiB of the router's statistics.",
    ]


def notes(plan: StudyPlan) -> list[str]:
    """How the figures are to be read."""
    return [
        "A task with four labels or more is split into tasks of two labels each, which have no "
        "rows and labels in common; of an odd number the last label is left out. Three orders: as "
        "given, backwards, second half first. Scores are of up to 300 test rows. One prompt and "
        "one model are asked with the task's own template and labels. Before its turn a task has "
        "the latest prompt. Abstention: each task is removed from the router in turn.",
    ]


HYPOTHESES = (
    Hypothesis(
        KNOWN, ">", LABELS[PROMPT], "a prompt for each task is better than one prompt", ACCURACY
    ),
    Hypothesis(
        KNOWN, ">", LABELS[MODEL], "a prompt for each task is better than one model", ACCURACY
    ),
    Hypothesis(
        ROUTED, "~", KNOWN, "the router chooses as well as if the task were known", ACCURACY
    ),
    Hypothesis(ROUTED, ">", RANDOM, "the router is better than chance", ACCURACY),
    Hypothesis(
        KNOWN, "<", LABELS[PROMPT], "a prompt for each task forgets less than one prompt", FORGOTTEN
    ),
    Hypothesis(
        KNOWN, "<", LABELS[MODEL], "a prompt for each task forgets less than one model", FORGOTTEN
    ),
    Hypothesis(ROUTED, "<", LABELS[PROMPT], "routed prompts forget less than one", FORGOTTEN),
)
