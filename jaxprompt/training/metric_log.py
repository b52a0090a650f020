"""What a run tells while it goes on: metrics.jsonl, trackers, throughput and a reporter."""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Bool, Float

from jaxprompt.config.values import Values
from jaxprompt.data.batches import Batch
from jaxprompt.losses import Losses
from jaxprompt.runtime.files import write_atomically
from jaxprompt.training.divergence import check_members
from jaxprompt.training.progress import Progress
from jaxprompt.training.trackers import Outcome, Tracker
from jaxprompt.training.trial import MetricName

Metrics = dict[str, float]
Row = Values  # of metrics.jsonl: a step, and numbers by name

LOG_EVERY = 10  # steps between rows of metrics.jsonl


class MetricWriter:
    """Appends to ``metrics.jsonl`` and passes rows on to trackers.

    Of several processes the first one alone writes.

    Args:
        step: rows after it, which a killed run has left, go; -1: all rows.
        trackers: opens the trackers of a run that goes on from a step.
        say: hears of damaged lines.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        *,
        trackers: Callable[[int], Sequence[Tracker]] = lambda step: (),
        say: Callable[[str], None] = lambda text: None,
    ):
        self.folder, self._say = folder, say
        self._writes = jax.process_index() == 0
        self._open_file(step)
        self._trackers = trackers(step) if self._writes else ()

    def _open_file(self, step: int) -> None:
        self.rows: list[Row] = []
        self._file = None
        if not self._writes:
            return
        path = self.folder / "metrics.jsonl"
        rows, damaged = _read_rows(path)
        if damaged:
            self._say(f"warning: {damaged} lines of {path} are damaged and left out")
        self.rows = [row for row in rows if row["step"] <= step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = path.open("a", buffering=1)

    def write(self, row: Row) -> None:
        """Add a row; it has a ``step``, and every other number becomes a curve.

        A row that is there already is not written twice: a run that was killed after an evaluation
        evaluates again.
        """
        if self._file is None or (self.rows and self.rows[-1] == row):
            return
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        metrics = {name: value for name, value in row.items() if name != "step"}
        for tracker in self._trackers:
            tracker.write(row["step"], metrics)

    def rows_of(self, prefix: str) -> list[Row]:
        """The rows so far with keys of this prefix alone, without it."""
        return [
            {key.removeprefix(prefix): x for key, x in row.items()
             if key == "step" or key.startswith(prefix)}
            for row in self.rows
        ]  # fmt: skip

    def truncate_after(self, step: int) -> None:
        """Forget the rows after ``step``."""
        if self._file is not None:
            self._file.close()
        self._open_file(step)
        for tracker in self._trackers:
            tracker.truncate_after(step)

    def close(self, outcome: Outcome = "finished") -> None:
        """Flush and close; trackers are told how the run ended."""
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close(outcome)


def _read_rows(path: Path) -> tuple[list[Row], int]:
    """The rows, and how many lines are none; the last line of a killed run may be half there."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    rows = [_row(line) for line in lines]
    damaged = [line for line, row in zip(lines[:-1], rows, strict=False) if row is None]
    return [row for row in rows if row is not None], sum(bool(line.strip()) for line in damaged)


def _row(line: bytes) -> Row | None:
    """A line of ``metrics.jsonl``; None where it is no mapping of names to numbers with a step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    number = lambda x: isinstance(x, float) or (isinstance(x, int) and abs(x) < 2**63)
    return row if all(map(number, row.values())) else None


class Throughput:
    """Training time of a run over all its starts, and throughput of this one."""

    def __init__(self, earlier: float):
        self.earlier, self.start = earlier, time.monotonic()
        self.examples = self.tokens = 0
        self.first: float | None = None  # after the first step, so that compilation does not count

    def count(self, batches: Iterable[Batch]) -> None:
        """A step on these micro-batches is on its way."""
        if self.first is None:
            self.first = time.monotonic()
            return
        for batch in batches:
            self.examples += int((batch.target_segments[:, 0] > 0).sum())
            self.tokens += int((batch.segments > 0).sum() + (batch.target_segments > 0).sum())

    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self.start

    def rates(self) -> dict[str, float]:
        passed = max(time.monotonic() - (self.first or self.start), 1e-9)
        return {
            "examples_per_second": round(self.examples / passed, 2),
            "tokens_per_second": round(self.tokens / passed, 1),
        }


@runtime_checkable
class Reporter(Protocol):
    """What a run tells the person who watches; ``cli/progress.py`` has one that draws a bar."""

    def say(self, text: str) -> None:
        """A line of text."""

    def step(self, done: int, rates: dict[str, float]) -> None:
        """``done`` steps are complete; ``rates`` has the loss, the best metrics and the speed."""


class NullReporter:
    """A reporter that shows nothing."""

    def say(self, text: str) -> None:
        """Ignore the line."""

    def step(self, done: int, rates: dict[str, float]) -> None:
        """Ignore the step."""


class StepLog:
    """Logs the losses of each step while the next one runs on the devices.

    Fetching the losses of a step waits for its end, so they are fetched one step late.
    """

    def __init__(
        self, metrics: MetricWriter, reporter: Reporter, names: Sequence[MetricName], seconds: float
    ):
        self.metrics, self.reporter, self.names = metrics, reporter, names
        self.clock = Throughput(seconds)
        self._pending: tuple[Progress, Losses] | None = None

    def add(self, progress: Progress, losses: Losses, batches: Iterable[Batch]) -> None:
        """The step that led to ``progress`` is on its way. Logs the one before it.

        Raises:
            Diverged: the losses of the step before are not finite.
        """
        self.clock.count(batches)
        self.flush()
        self._pending = progress, losses

    def flush(self) -> None:
        """Wait for the newest step, and log it. Raises Diverged."""
        pending, self._pending = self._pending, None
        if pending is not None:
            log_step(self, *pending)

    def truncate_after(self, step: int) -> None:
        """Forget everything after ``step``."""
        self._pending = None
        self.metrics.truncate_after(step)


def log_step(log: StepLog, progress: Progress, losses: Losses) -> None:
    """Log the losses of the step that led to ``progress``.

    Raises:
        Diverged: no trial of a task has a finite loss.
    """
    fetched: Losses = jax.device_get(losses)
    loss_of, accuracy_of = np.asarray(fetched.loss), np.asarray(fetched.accuracy)
    is_finite = np.isfinite(loss_of)
    check_members(progress.step, progress.active, loss_of, log.names)
    loss, accuracy = float(loss_of[is_finite].mean()), float(accuracy_of[is_finite].mean())
    rates = log.clock.rates()
    if progress.step % LOG_EVERY == 0:
        row: Row = {"step": progress.step, "loss": loss, "token_accuracy": accuracy}
        row |= _parts(fetched, is_finite)
        if len(log.names) > 1:
            row |= _losses_by_trial(progress, loss_of, log.names)
        if progress.tokens is not None:
            row["tokens"] = progress.tokens
        log.metrics.write(row | rates)
    log.reporter.step(progress.step, {"loss": loss, **_best_metrics(progress, log.names), **rates})


def _parts(losses: Losses, is_finite: Bool[np.ndarray, " K"]) -> Metrics:
    """What an objective has beside cross-entropy, without its factors: means of trials."""
    parts = {
        "unlikelihood_loss": losses.unlikelihood,
        "length_normalized_loss": losses.length_normalized,
    }
    of_trials = {name: np.asarray(part) for name, part in parts.items() if part is not None}
    return {name: float(part[is_finite].mean()) for name, part in of_trials.items()}


def _losses_by_trial(
    progress: Progress, loss_of: Float[np.ndarray, " K"], names: Sequence[MetricName]
) -> Metrics:
    """The finite losses of trials, and their mean for each of several tasks."""
    pairs = zip(progress.active, loss_of.tolist(), strict=True)
    finite = {number: loss for number, loss in pairs if math.isfinite(loss)}
    by_task: dict[str, list[float]] = {}
    for number, loss in finite.items():
        by_task.setdefault(names[number].prefix, []).append(loss)
    return {f"prompt{number}/loss": loss for number, loss in finite.items()} | {
        f"{prefix}loss": float(np.mean(losses)) for prefix, losses in by_task.items() if prefix
    }


def _best_metrics(progress: Progress, names: Sequence[MetricName]) -> Metrics:
    """The best metric of each task so far."""
    best: Metrics = {}
    for (prefix, metric), value in zip(names, progress.best, strict=True):
        name = f"best {prefix}{metric}"
        if math.isfinite(value):
            best[name] = max(best.get(name, -math.inf), value)
    return best


def log_scores(
    metrics: MetricWriter,
    reporter: Reporter,
    step: int,
    scores: Mapping[int, Metrics],
    names: Sequence[MetricName],
) -> None:
    """Log an evaluation: the metrics of each task's best trial, and of each trial of several.

    Args:
        scores: the metrics of trials by number; those that are not finite are left out.
    """
    row: Row = {"step": step}
    for prefix, metric in dict.fromkeys(names):
        of_task = [values for number, values in scores.items() if names[number].prefix == prefix]
        if not of_task:
            continue
        best = max(of_task, key=lambda values: values[metric])
        row |= {f"{prefix}validation/{name}": value for name, value in best.items()}
        among = f", the best of {len(of_task)} prompts" if len(of_task) > 1 else ""
        reporter.say(f"step {step}: {prefix}validation {metric} {best[metric]:.4f}{among}")
    if len(scores) > 1:
        for number, values in scores.items():
            row |= {f"prompt{number}/validation/{name}": x for name, x in values.items()}
    metrics.write(row)
