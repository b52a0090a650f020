"""What a run writes besides checkpoints: config, ``metrics.jsonl``, TensorBoard, result."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml

from jaxprompt.config import RunConfig, TaskConfig, UserError, dump_yaml, parse, read_yaml
from jaxprompt.files import write_atomically
from jaxprompt.model.hf import read_json
from jaxprompt.pretrain_config import PretrainConfig
from jaxprompt.training.interrupt import LOCK, locked

LOG_EVERY = 10  # steps between rows of metrics.jsonl

# settings that a run may change when it goes on
FREE = {
    "output",
    "train.tensorboard",
    "train.keep",
    "train.eval_batch_size",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
}


def _settings(config: RunConfig | PretrainConfig) -> dict[str, Any]:
    values = yaml.safe_load(dump_yaml(config))
    if isinstance(values.get("task"), dict):
        values["task"] = parse(TaskConfig, values["task"]).model_dump()
    return _flat(values)


def check_run(config: RunConfig | PretrainConfig) -> Path:
    """The run directory, if a run may start there or the one in it go on; nothing is written.

    A run that has no checkpoint yet has nothing to lose: its settings may change.
    """
    folder = Path(config.output)
    file = folder / "config.yaml"
    if file.is_file() and any(folder.glob("checkpoints/*")):
        # through the schema: settings that are newer than the run had their defaults; its mesh is
        # free, whatever axes had names then
        values = read_yaml(file.read_text(), str(file))
        old = _settings(parse(type(config), {k: v for k, v in values.items() if k != "mesh"}))
        new = _settings(config)
        free = set(FREE)
        if config.train.schedule in ("constant", "rsqrt") and not config.train.cooldown_steps:
            # these schedules do not depend on the number of steps, and a cool-down is yet to come
            free |= {"train.steps", "train.cooldown_steps"}
        changed = [
            f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
            for key in sorted({*old, *new} - free)
            if old.get(key) != new.get(key)
        ]
        if changed:
            raise UserError(
                f"{folder} holds a run with other settings ({'; '.join(changed)}); "
                "choose another output, or delete that directory to start again."
            )
    elif folder.exists() and not file.is_file():
        if not folder.is_dir() or {path.name for path in folder.iterdir()} - {LOCK}:
            raise UserError(
                f"Output {str(folder)!r} exists and is not a run; choose another output."
            )
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"Output {str(folder)!r} cannot be written: {str(there)!r} is no directory that may be "
            "written to; choose another output."
        )
    return folder


def complete(config: RunConfig | PretrainConfig) -> dict[str, Any] | None:
    """What ``result.json`` holds, if there is one; else whether the run may start was checked."""
    file = check_run(config) / "result.json"
    return read_json(file) if file.is_file() else None


@contextlib.contextmanager
def open_run(config: RunConfig | PretrainConfig) -> Iterator[Path]:
    """Make the run directory, or go on with the run in it; no other process can meanwhile."""
    folder = check_run(config)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder))
            check_run(config)  # another one may have begun since
            write_atomically(folder / "config.yaml", dump_yaml(config))
        except OSError as error:
            raise UserError(
                f"Output {str(folder)!r} cannot be written: {error.strerror}."
            ) from None
        yield folder


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix[:-1]: values}
    return {
        k: v for name, inner in values.items() for k, v in _flat(inner, f"{prefix}{name}.").items()
    }


class Logbook:
    """Appends to ``metrics.jsonl`` and TensorBoard; rows after ``step`` of a killed run go.

    Of several processes the first one alone writes.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool):
        self.folder, self.tensorboard = folder, tensorboard
        self._writes = jax.process_index() == 0
        self._open(step)

    def _open(self, step: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self._file = self._board = None
        if not self._writes:
            return
        path = self.folder / "metrics.jsonl"
        self.rows = [row for row in _read_rows(path) if row["step"] <= step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = path.open("a", buffering=1)
        if self.tensorboard:
            from tensorboardX import SummaryWriter

            purge = step + 1 if step >= 0 else None
            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge)

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; it has a ``step``, and every other number becomes a curve."""
        if self._file is None:
            return
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if self._board is not None and name != "step":
                self._board.add_scalar(name, value, row["step"])

    def rows_of(self, prefix: str) -> list[dict[str, Any]]:
        """The rows so far with keys of this prefix alone, without it."""
        return [
            {key.removeprefix(prefix): x for key, x in row.items()
             if key == "step" or key.startswith(prefix)}
            for row in self.rows
        ]  # fmt: skip

    def back_to(self, step: int) -> None:
        """Forget the rows after ``step``."""
        self.close()
        self._open(step)

    def close(self) -> None:
        """Flush and close."""
        for file in (self._file, self._board):
            if file is not None:
                file.close()


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line of a killed run may be half there
            break
    return rows


class Clock:
    """Training time of a run over all its starts, and throughput of this one."""

    def __init__(self, earlier: float):
        self.earlier, self.start = earlier, time.monotonic()
        self.examples = self.tokens = 0
        self.first: float | None = None  # after the first step, so that compilation does not count

    def count(self, batches) -> None:
        """A step on these micro-batches is on its way."""
        if self.first is None:
            self.first = time.monotonic()
            return
        for batch in batches:
            self.examples += int((batch.target_segments[:, 0] > 0).sum())
            self.tokens += int((batch.input_segments > 0).sum() + (batch.target_segments > 0).sum())

    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self.start

    def rates(self) -> dict[str, float]:
        passed = max(time.monotonic() - (self.first or self.start), 1e-9)
        return {
            "examples_per_second": round(self.examples / passed, 2),
            "tokens_per_second": round(self.tokens / passed, 1),
        }


class Diverged(UserError):
    """What is trained is no number any more."""


def check_loss(loss: float, step: int, task: str = "") -> None:
    """Refuse to go on with a loss (of one of several tasks) that is no number."""
    if not math.isfinite(loss):
        which = f" of task {task!r}" if task else ""
        raise Diverged(
            f"The loss{which} is {loss} at step {step}; lower train.learning_rate, use "
            "model.dtype=float32, or let train.on_divergence=go_back do it. The checkpoint before "
            "it is intact."
        )


class Silent:
    """A reporter that shows nothing; ``progress.py`` has the one that draws a bar."""

    def say(self, text: str) -> None:
        """A line for the person who watches."""

    def step(self, done: int, rates: dict[str, float]) -> None:
        """``done`` steps are complete."""


class Shown(NamedTuple):
    """How a member is told in logs."""

    prefix: str  # of its task's keys: none where there is one task
    metric: str


def check_members(step: int, alive: Sequence[int], losses: Any, shown: list[Shown]) -> None:
    """Raise Diverged where no member of a task has a loss that is a number.

    Of several prompts some may diverge, which is nothing to the others.
    """
    by_task: dict[str, list[float]] = {}
    for k, loss in zip(alive, losses, strict=True):
        by_task.setdefault(shown[k].prefix, []).append(float(loss))
    for prefix, own in by_task.items():
        if not any(map(math.isfinite, own)):
            check_loss(own[0], step, prefix.rstrip("/"))


def log_step(
    pending: Any, logbook: Logbook, reporter, clock: Clock, progress, shown: list[Shown]
) -> None:
    """A step's losses, which ``pending`` has with its number and the members that took it."""
    step, losses, alive = pending
    each, accuracy = (np.asarray(x) for x in jax.device_get(losses))
    sound = np.isfinite(each)
    check_members(step, alive, each, shown)
    loss, right, rates = float(each[sound].mean()), float(accuracy[sound].mean()), clock.rates()
    if step % LOG_EVERY == 0:
        row: dict[str, Any] = {"step": step, "loss": loss, "token_accuracy": right}
        if len(shown) > 1:
            finite = [(k, float(x)) for k, x in zip(alive, each, strict=True) if np.isfinite(x)]
            row |= {f"prompt{k}/loss": x for k, x in finite}
            by_task: dict[str, list[float]] = {}
            for k, x in finite:
                by_task.setdefault(shown[k].prefix, []).append(x)
            row |= {f"{name}loss": float(np.mean(own)) for name, own in by_task.items() if name}
        logbook.write(row | rates)
    best: dict[str, float] = {}
    for (prefix, metric), value in zip(shown, progress["best"], strict=True):
        name = f"best {prefix}{metric}"
        if math.isfinite(value):
            best[name] = max(best.get(name, -math.inf), value)
    reporter.step(step, {"loss": loss, **best, **rates})


def log_scores(
    logbook: Logbook,
    reporter,
    step: int,
    judged: Sequence[tuple[int, dict[str, float]]],
    shown: list[Shown],
) -> None:
    """The metrics of a task's best prompt as the task's, and of each where there are several.

    judged: members with what was found.
    """
    row: dict[str, Any] = {"step": step}
    for prefix, metric in dict.fromkeys(shown):
        mine = [found for k, found in judged if shown[k].prefix == prefix]
        if not mine:
            continue
        best = max(mine, key=lambda found: found[metric])
        row |= {f"{prefix}validation/{name}": value for name, value in best.items()}
        among = f", the best of {len(mine)} prompts" if len(mine) > 1 else ""
        reporter.say(f"step {step}: {prefix}validation {metric} {best[metric]:.4f}{among}")
    if len(judged) > 1:
        for k, found in judged:
            row |= {f"prompt{k}/validation/{name}": value for name, value in found.items()}
    logbook.write(row)
