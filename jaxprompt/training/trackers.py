"""Where metrics go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow.

A run never depends on a tracker: one that fails is told of once and gets no more rows. A run that
goes on continues what it began there, whose id is in ``trackers.json`` of its directory.
"""

import contextlib
import importlib.util
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from jaxprompt.config.errors import UserError
from jaxprompt.runtime.files import write_atomically

T = TypeVar("T")

IDS = "trackers.json"
Outcome = Literal["finished", "failed", "interrupted"]  # of a run
PROJECT = "jaxprompt"  # where WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME say nothing else


@runtime_checkable
class Tracker(Protocol):
    """Something that draws metrics by step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step; a step may come more than once."""

    def truncate_after(self, step: int) -> None:
        """The run goes back to ``step``, and repeats the steps after it."""

    def close(self, outcome: Outcome = "finished") -> None:
        """Send what is left, and say how the run ended."""


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
        self._open = lambda purge: SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)
        self._board = self._open(purge)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """A point of each curve."""
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def truncate_after(self, step: int) -> None:
        """Go on in a file that hides the points after ``step``."""
        self._board.close()
        self._board = self._open(step + 1)

    def close(self, outcome: Outcome = "finished") -> None:
        """Flush and close the file."""
        self._board.close()


class WandB:
    """A run of Weights & Biases. WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE and so on are its own.

    ``step`` is an axis of our own there: the library's counter cannot go back, and a run that was
    killed repeats the steps since its last checkpoint.
    """

    def __init__(self, run: TrackedRun):
        import wandb  # pyright: ignore[reportMissingImports]

        # its own default is 90
        seconds = os.environ.get("WANDB_INIT_TIMEOUT", "30")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=_recorded_id(run.folder, "wandb", lambda: uuid.uuid4().hex[:12])[0],
            resume="allow",
            name=os.environ.get("WANDB_NAME", run.folder.name),
            dir=str(run.folder),
            config=dict(run.settings),
            reinit="create_new",  # a run that the caller has open is none of ours
            settings=wandb.Settings(console="off", init_timeout=float(seconds)),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """A row of the run's history."""
        self._run.log({"step": step, **metrics})

    def truncate_after(self, step: int) -> None:
        """Nothing: steps that are repeated are drawn on the axis ``step``."""

    def close(self, outcome: Outcome = "finished") -> None:
        """Send what is left, and end the run; it can be resumed."""
        self._run.finish(exit_code=int(outcome != "finished"))


class MLflow:
    """A run of MLflow. MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and so on are its own.

    It is written through a client of its own, so that a run that the caller has open stays open.
    """

    def __init__(self, run: TrackedRun):
        import mlflow.entities  # pyright: ignore[reportMissingImports]

        self._entities = mlflow.entities
        with _short_requests():
            self._client = mlflow.MlflowClient()
            # recorded before anything else is sent, so that no second run is made of it
            self._id, is_new = _recorded_id(run.folder, "mlflow", lambda: self._begin(run.folder))
            self._client.update_run(self._id, status="RUNNING")
            if is_new:
                self._log_settings(run.settings)

    def _begin(self, folder: Path) -> str:
        """The id of a new run."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        return self._client.create_run(self._experiment(name), run_name=folder.name).info.run_id

    def _experiment(self, name: str) -> str:
        """The id of the experiment, which is made where there is none."""
        known = self._client.get_experiment_by_name(name)
        if known is None:
            try:
                return self._client.create_experiment(name)
            except Exception:  # another run may have made it meanwhile
                known = self._client.get_experiment_by_name(name)
                if known is None:
                    raise
        return known.experiment_id

    def _log_settings(self, settings: Mapping[str, object]) -> None:
        """The settings as parameters of the run. Their names may have no slash: not a path."""
        params = {re.sub(r"[^\w. -]", "_", key)[:250]: str(x)[:500] for key, x in settings.items()}
        values = [self._entities.Param(key, value) for key, value in params.items()]
        for some in _batches(values, 100):  # of one request, at most
            self._client.log_batch(self._id, params=some)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """A point of each curve."""
        now = int(1000 * time.time())
        values = [
            self._entities.Metric(re.sub(r"[^\w./ -]", "_", name), value, now, step)
            for name, value in metrics.items()
        ]
        with _short_requests():
            for some in _batches(values, 1000):  # of one request, at most
                self._client.log_batch(self._id, metrics=some)

    def truncate_after(self, step: int) -> None:
        """Nothing: a step may have several points."""

    def close(self, outcome: Outcome = "finished") -> None:
        """End the run; it can be resumed."""
        status = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}[outcome]
        with _short_requests():
            self._client.set_terminated(self._id, status)


@contextlib.contextmanager
def _short_requests() -> Iterator[None]:
    """Within it MLflow waits for seconds for a server that does not answer, and not for minutes.

    It reads these variables at every request. Those that the user has set stay.
    """
    ours = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    added = {name: value for name, value in ours.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _batches(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


_TRACKERS: Mapping[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow
}  # fmt: skip


def check_installed(names: Sequence[str]) -> None:
    """Refuse a tracker whose library is not there."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without an origin it is any folder of that name
            raise UserError(
                f"train.trackers names {name}, which is not installed; run: pip install {name}, or "
                "leave it out."
            )


def open_trackers(
    names: Sequence[str], run: TrackedRun, say: Callable[[str], None]
) -> list[Tracker]:
    """The trackers of a run; ``say`` hears of one that fails, now or later.

    A run that begins anew forgets what it was called before.
    """
    if run.step < 0:
        (run.folder / IDS).unlink(missing_ok=True)
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
        self._try(lambda tracker: tracker.write(step, metrics))

    def truncate_after(self, step: int) -> None:
        """Pass it on."""
        self._try(lambda tracker: tracker.truncate_after(step))

    def close(self, outcome: Outcome = "finished") -> None:
        """Close it."""
        self._try(lambda tracker: tracker.close(outcome))

    def _try(self, call: Callable[[Tracker], None]) -> None:
        if self._tracker is not None:
            try:
                call(self._tracker)
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._tracker = None
        text = re.sub(r"//[^/@\s]+@", "//", " ".join(str(error).split()))  # passwords of URLs
        problem = text[:200] or type(error).__name__
        self._say(
            f"warning: {self._name} has failed ({problem}) and gets no more of this run; "
            "metrics.jsonl has it all"
        )


def _recorded_id(folder: Path, name: str, make: Callable[[], str]) -> tuple[str, bool]:
    """The id under which a tracker knows the run in ``folder``, and whether it is a new one.

    A new one is made and recorded.
    """
    path = folder / IDS
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        ids = {}
    ids = ids if isinstance(ids, dict) else {}
    is_new = not isinstance(ids.get(name), str)
    if is_new:
        ids[name] = make()
        write_atomically(path, json.dumps(ids) + "\n")
    return ids[name], is_new
