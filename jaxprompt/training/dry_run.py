"""All of a run up to its first step, of which nothing is written."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import jax

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig
from jaxprompt.evaluation.metrics import majority
from jaxprompt.models import precision
from jaxprompt.runtime import parallel
from jaxprompt.runtime.devices import describe
from jaxprompt.runtime.signals import Signals
from jaxprompt.training import tune, users
from jaxprompt.training.datasets import Split, TaskDataset
from jaxprompt.training.metric_log import Reporter
from jaxprompt.training.plan import DEVICES, GIB, plan_of
from jaxprompt.training.run_dir import RunDir
from jaxprompt.training.trial import Trial, by_task


class SplitFacts(TypedDict):
    """rows: how many there are. truncated: how many of them are too long and lose tokens."""

    rows: int
    truncated: int


class TaskFacts(TypedDict):
    """What a task looks like to a run."""

    splits: dict[str, SplitFacts]
    labels: list[str] | None
    metric: str
    majority: float  # the metric on validation rows of always giving the commonest label


class DryRun(TypedDict):
    """What a run would be."""

    devices: str
    backbone: str
    tasks: dict[str, TaskFacts]
    trained_parameters: int
    memory_gib: float | None  # of a device, in a step; None where its kind is not known
    steps: int
    output: str


def dry_run(config: RunConfig, reporter: Reporter) -> DryRun:
    """Prepare a run as ``train`` does: config, rows, weights, tokens, start of the prompts.

    Raises:
        UserError: whatever ``train`` would refuse before its first step.
    """
    config = precision.resolve_config(config)
    signals = Signals(install=False)
    with RunDir(config, reporter.say) as run:  # not opened: nothing is written
        if config.users is None:
            run.finished(lambda: tune.inputs_of_files(config))
            job = tune.prepare(config, run, reporter, signals)
            trained = sum(x.size for x in jax.tree.leaves(job.shapes))
        else:
            run.finished(lambda: users.known_inputs(config))
            of_users = users.prepare(config, run, reporter, signals, tune=lambda *given: {})
            job, trained = of_users.base, of_users.num_trained
    return {
        "devices": describe(),
        "backbone": config.backbone,
        "tasks": {
            part.task.name: _facts(part)
            for trials in by_task(job.trials).values()
            for part in trials[0].dataset.tasks()
        },
        "trained_parameters": trained,
        "memory_gib": _memory(config, job.trials),
        "steps": config.train.steps,
        "output": config.output,
    }


def _facts(dataset: TaskDataset) -> TaskFacts:
    splits: Mapping[str, Split | None] = {
        "train": dataset.training, "validation": dataset.validation, "test": dataset.test
    }  # fmt: skip
    return {
        "splits": {
            name: {"rows": split.num_rows, "truncated": split.truncation.cut}
            for name, split in splits.items()
            if split is not None
        },
        "labels": dataset.task.labels,
        "metric": dataset.metric,
        "majority": majority(dataset.metric, dataset.validation.references, dataset.task.labels),
    }


def _memory(config: RunConfig, trials: Sequence[Trial]) -> float | None:
    """GiB of a device in a step, with the mesh of the config and the rows that there are."""
    devices = jax.devices()
    kind = device_kind(devices[0].platform, devices[0].device_kind)
    if kind is None:
        return None
    mesh = parallel.make_mesh(config.mesh)
    longest = max(len(e.inputs) for trial in trials for e in trial.dataset.training.examples)
    try:
        plan = plan_of(config, devices=mesh.devices.size, kind=kind, inputs=longest)
    except UserError:  # no layout is possible, or a kernel is not for this device
        return None
    ways = dict(mesh.shape) | {"remat": config.model.remat}
    totals = [
        layout["total"] / GIB
        for layout in plan["layouts"]
        if all(layout[key] == ways.get(key, 1) for key in ("data", "fsdp", "tensor", "remat"))
    ]
    return round(totals[0], 3) if totals else None


def device_kind(platform: str, words: str) -> str | None:
    """The name that ``plan`` has for a device; None for one that it does not know."""
    if platform == "cpu":
        return "cpu"
    words = words.lower().replace(" ", "-")
    return next((kind for kind in DEVICES if kind in words), None)
