"""Where metrics go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow.

A run never depends on a tracker: one that fails is told of once and gets no more rows. A run that
goes on continues what it began there, whose id is in ``trackers.json`` of its directory.
"""

import importlib.util
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from jaxprompt.config.errors import UserError
from jaxprompt.runtime.files import write_atomically

T = TypeVar("T")

IDS = "trackers.json"
PROJECT = "jaxprompt"  # where WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME say nothing else


@runtime_checkable
class Tracker(Protocol):
    """Something that draws metrics by step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step; a step may come more than once."""

    def close(self) -> None:
        """Send what is left."""


class TrackedRun(NamedTuple):
    """What a tracker is told of a run."""

    folder: Path
    settings: Mapping[str, object]  # by dotted key
    step: int  # what was written after it belongs to a killed run; -1: all


class TensorBoard:
    """Event files in ``tensorboard/`` of the run."""

    def __init__(self, run: TrackedRun):
        from tensorboardX import SummaryWriter

        purge = run.step + 1 if run.step >= 0 else None
        self._board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """A point of each curve."""
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the file."""
        self._board.close()


class WandB:
    """A run of Weights & Biases. WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE and so on are its own.

    ``step`` is an axis of our own there: the library's counter cannot go back, and a run that was
    killed repeats the steps since its last checkpoint.
    """

    def __init__(self, run: TrackedRun):
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=_recorded_id(run.folder, "wandb", lambda: uuid.uuid4().hex[:12]),
            resume="allow",
            name=os.environ.get("WANDB_NAME", run.folder.name),
            dir=str(run.folder),
            config=dict(run.settings),
            reinit="create_new",  # a run that the caller has open is none of ours
            settings=wandb.Settings(console="off"),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """A row of the run's history."""
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """Send what is left, and end the run; it can be resumed."""
        self._run.finish()


class MLflow:
    """A run of MLflow. MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and so on are its own.

    It is written through a client of its own, so that a run that the caller has open stays open.
    """

    def __init__(self, run: TrackedRun):
        # its own default, 7, lets a run wait for four minutes where there is no server
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        import mlflow.entities  # pyright: ignore[reportMissingImports]

        self._entities, self._client = mlflow.entities, mlflow.MlflowClient()
        self._id = _recorded_id(run.folder, "mlflow", lambda: self._begin(run))
        self._client.update_run(self._id, status="RUNNING")

    def _begin(self, run: TrackedRun) -> str:
        """The id of a new run, which has the settings as its parameters."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        place = self._client.create_experiment(name) if known is None else known.experiment_id
        begun = self._client.create_run(place, run_name=run.folder.name).info.run_id
        values = [
            self._entities.Param(key, str(value)[:500]) for key, value in run.settings.items()
        ]
        for some in _batches(values, 100):  # of one request, at most
            self._client.log_batch(begun, params=some)
        return begun

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """A point of each curve."""
        now = int(1000 * time.time())
        values = [
            self._entities.Metric(re.sub(r"[^\w./ -]", "_", name), value, now, step)
            for name, value in metrics.items()
        ]
        for some in _batches(values, 1000):  # of one request, at most
            self._client.log_batch(self._id, metrics=some)

    def close(self) -> None:
        """End the run; it can be resumed."""
        self._client.set_terminated(self._id)


def _batches(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


_TRACKERS: Mapping[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow
}  # fmt: skip


def check_installed(names: Sequence[str]) -> None:
    """Refuse a tracker whose library is not there."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.trackers names {name}, which is not installed; run: pip install {name}, or "
                "leave it out."
            )


def open_trackers(
    names: Sequence[str], run: TrackedRun, say: Callable[[str], None]
) -> list[Tracker]:
    """The trackers of a run; ``say`` hears of one that fails, now or later."""
    return [_Optional(name, run, say) for name in dict.fromkeys(names)]


class _Optional:
    """A tracker that may fail: then it is told of once, and gets no more rows."""

    def __init__(self, name: str, run: TrackedRun, say: Callable[[str], None]):
        self._name, self._say = name, say
        self._tracker: Tracker | None = None
        try:
            self._tracker = _TRACKERS[name](run)
        except Exception as error:  # of networks, servers and accounts, of any type
            self._give_up(error)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass them on."""
        if self._tracker is not None:
            try:
                self._tracker.write(step, metrics)
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        """Close it."""
        if self._tracker is not None:
            try:
                self._tracker.close()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._tracker = None
        problem = " ".join(str(error).split())[:200] or type(error).__name__
        self._say(
            f"warning: {self._name} has failed ({problem}) and gets no more of this run; "
            "metrics.jsonl has it all"
        )


def _recorded_id(folder: Path, name: str, make: Callable[[], str]) -> str:
    """The id under which a tracker knows the run in ``folder``; a new one is made and recorded."""
    path = folder / IDS
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        ids = {}
    ids = ids if isinstance(ids, dict) else {}
    if not isinstance(ids.get(name), str):
        ids[name] = make()
        write_atomically(path, json.dumps(ids) + "\n")
    return ids[name]
