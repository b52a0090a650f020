"""What a run writes besides checkpoints: config, ``metrics.jsonl``, TensorBoard, result."""

import contextlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.names import recorded_names
from jaxprompt.config.overrides import dump_yaml, read_yaml
from jaxprompt.config.pretrain import PretrainConfig
from jaxprompt.config.schema import Optimization, RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.runtime.files import PART, write_atomically
from jaxprompt.runtime.signals import LOCK, locked

# all that a run writes
RUN_FILES = frozenset((
    LOCK, "config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "damaged", "result.json",
    "curves.png", "losses.png", "samples.jsonl", "tokenizer", "tokens", "prompt", "model", "tasks",
    "population", "population.md",
))  # fmt: skip
LOG_EVERY = 10  # steps between rows of metrics.jsonl
CHECKSUMS = "sha256.json"  # the list of a checkpoint's files, which is written last

# settings that a run may change when it goes on
RESUMABLE_SETTINGS = {
    "output",
    "train.tensorboard",
    "train.keep",
    "train.eval_batch_size",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
}


def checkpoint_folders(path: Path) -> list[Path]:
    """The folders in ``path`` that a step names, newest first; what else is there is not ours."""
    named = [f for f in path.glob("*") if re.fullmatch("0|[1-9][0-9]{0,9}", f.name) and f.is_dir()]
    return sorted(named, key=lambda folder: int(folder.name), reverse=True)


def _settings(config: RunConfig | PretrainConfig) -> dict[str, Any]:
    """All settings by dotted key, tasks in full, so that two spellings of a run are equal."""
    values = config.model_dump(mode="json")
    grid = values.get("prompt", {}).get("population", {})
    whole = lambda task: resolve_task(task).model_dump(mode="json")
    if "task" in grid:
        grid["task"] = [whole(task) for task in grid["task"]]
    elif "task" in values:
        values["task"] = whole(values["task"])
    return _flat(values)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix[:-1]: values}
    return {
        k: v for name, inner in values.items() for k, v in _flat(inner, f"{prefix}{name}.").items()
    }


def _read_settings(file: Path) -> dict[str, Any] | None:
    """What ``config.yaml`` holds, not yet validated; None where it is not the file of a run."""
    try:
        values = read_yaml(file.read_text(encoding="utf-8"), str(file))
    except (UserError, UnicodeDecodeError):
        return None
    # a run writes all settings: a file that a person wrote has hardly ever all of these
    whole = isinstance(values, dict) and {"model", "train", "output"} <= values.keys()
    return recorded_names(values) if whole and isinstance(values["train"], dict) else None


def _newest_step(folder: Path) -> int | None:
    """Step of the newest complete checkpoint, or of the result; None where neither is known."""
    checkpoints = checkpoint_folders(folder / "checkpoints")
    steps = [int(f.name) for f in checkpoints if (f / CHECKSUMS).is_file()]
    result = _read_result(folder)
    return max(steps if result is None else [*steps, result["steps"]], default=None)


def _steps_are_free(old: Optimization, new: Optimization, done: int | None) -> bool:
    """Whether the steps that were taken do not depend on how many there will be."""
    if new.schedule not in ("constant", "rsqrt"):
        return False
    if not old.cooldown_steps and not new.cooldown_steps:
        return True
    # both cool-downs are yet to come
    return done is not None and all(done <= x.steps - x.cooldown_steps for x in (old, new))


def _check_settings(folder: Path, config: RunConfig | PretrainConfig) -> None:
    """Refuse other settings than those of the run in ``folder``, but for those that are free."""
    advice = "choose another output, or delete that directory to start again."
    try:
        values = _read_settings(folder / "config.yaml")
        if values is None:
            raise UserError("it does not hold all settings of a run.")
        # through the schema: settings that are newer than the run had their defaults; its mesh is
        # free, whatever axes had names then
        before = parse(type(config), {k: v for k, v in values.items() if k != "mesh"})
    except UserError as error:
        raise UserError(
            f"{folder} holds a run, and its config.yaml is damaged ({str(error).rstrip('.')}), so "
            f"that its settings are not known; put a copy of that file back, {advice}"
        ) from None
    old, new, free = _settings(before), _settings(config), set(RESUMABLE_SETTINGS)
    done = _newest_step(folder)
    if _steps_are_free(before.train, config.train, done):
        free |= {"train.steps", "train.cooldown_steps"}
    changed = [key for key in sorted({*old, *new} - free) if old.get(key) != new.get(key)]
    if not changed:
        return
    told = [f"{k} was {shown(old.get(k))} and is {shown(new.get(k))}" for k in changed]
    if "train.cooldown_steps" in changed and done is not None:
        told.append(f"a cool-down may change before it begins, and the run is at step {done}")
    raise UserError(f"{folder} holds a run with other settings ({'; '.join(told)}); {advice}")


def check_run(config: RunConfig | PretrainConfig) -> Path:
    """The run directory, if a run may start there or the one in it go on; nothing is written.

    A run that has no checkpoint yet has nothing to lose: its settings may change.
    """
    folder = Path(config.output)
    file = folder / "config.yaml"
    begun = any(folder.glob("checkpoints/*")) or (folder / "result.json").is_file()
    if file.is_file() and begun:
        _check_settings(folder, config)
    elif folder.exists():
        own = RUN_FILES if file.is_file() and _read_settings(file) else {LOCK}
        if not folder.is_dir() or _foreign(folder, own):
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


def _foreign(folder: Path, own: Collection[str]) -> list[str]:
    """What is in a folder beside files of these names, and what a killed run was writing."""
    names = (path.name for path in folder.iterdir())
    return [name for name in names if name not in own and not PART.fullmatch(name)]


def clear_run(folder: Path) -> None:
    """Remove all that a run wrote but its settings, so that it begins anew; other files stay."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name in RUN_FILES - {"config.yaml"} or PART.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def load_result(config: RunConfig | PretrainConfig) -> dict[str, Any] | None:
    """What ``result.json`` holds, if the run is complete; else whether it may go on was checked.

    A damaged result counts as none: it follows from the last checkpoint.
    """
    folder = check_run(config)
    result, steps = _read_result(folder), config.train.steps
    if result and (result["steps"] >= steps or result.get("stopped_early")):
        return result
    done = _newest_step(folder)
    if done is not None and done > steps:
        raise UserError(
            f"{folder} holds a run that has done {done} steps, and train.steps is {steps}; make it "
            f"{done} or more, or choose another output."
        )
    return None


def _read_result(folder: Path) -> dict[str, Any] | None:
    """What ``result.json`` holds; None where there is none, or it is damaged."""
    try:
        value = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and _is_result(value) else None


_NUMBERS = ("rows", "majority", "untuned", "value", "trainable_parameters")
_SCORES = ("loss", "perplexity", "token_accuracy", "tokens")


def _is_result(result: dict[str, Any]) -> bool:
    """Whether it has what a run's result has, as far as anything reads it again."""
    has = lambda values, *names: (
        isinstance(values, dict)
        and all(isinstance(values.get(name), int | float) for name in names)
    )
    if not has(result, "steps", "seconds") or type(result["steps"]) is not int:
        return False
    if "held_out" in result:
        sets, model = result["held_out"], result.get("model")
        fine = isinstance(sets, dict) and all(has(found, *_SCORES) for found in sets.values())
        return fine and has(result, "tokens") and isinstance(model, str)
    tasks = result["tasks"] if "tasks" in result else {"": result}
    return isinstance(tasks, dict) and all(
        has(found, *_NUMBERS)
        and {"task", "prompt"} <= found.keys()
        and isinstance(found.get("metric"), str)
        and ("test" not in found or has(found["test"], found["metric"]))
        for found in tasks.values()
    )


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


class MetricWriter:
    """Appends to ``metrics.jsonl`` and TensorBoard; rows after ``step`` of a killed run go.

    Of several processes the first one alone writes. ``say`` hears of damaged lines.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        *,
        tensorboard: bool,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.folder, self.tensorboard, self._say = folder, tensorboard, say
        self._writes = jax.process_index() == 0
        self._open(step)

    def _open(self, step: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self._file = self._board = None
        if not self._writes:
            return
        path = self.folder / "metrics.jsonl"
        rows, damaged = _read_rows(path)
        if damaged:
            self._say(f"warning: {damaged} lines of {path} are damaged and left out")
        self.rows = [row for row in rows if row["step"] <= step]
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


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows, and how many lines are none; the last line of a killed run may be half there."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    found = [_row(line) for line in lines]
    damaged = [line for line, row in zip(lines[:-1], found, strict=False) if row is None]
    return [row for row in found if row is not None], sum(bool(line.strip()) for line in damaged)


def _row(line: bytes) -> dict[str, Any] | None:
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

    def count(self, batches) -> None:
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


class NullReporter:
    """A reporter that shows nothing; ``cli/progress.py`` has the one that draws a bar."""

    def say(self, text: str) -> None:
        """A line for the person who watches."""

    def step(self, done: int, rates: dict[str, float]) -> None:
        """``done`` steps are complete."""


class MetricName(NamedTuple):
    """How a member is told in logs."""

    prefix: str  # of its task's keys: none where there is one task
    metric: str


def check_members(step: int, alive: Sequence[int], losses: Any, shown: list[MetricName]) -> None:
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
    pending: Any,
    logbook: MetricWriter,
    reporter,
    clock: Throughput,
    progress,
    shown: list[MetricName],
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
    logbook: MetricWriter,
    reporter,
    step: int,
    judged: Sequence[tuple[int, dict[str, float]]],
    shown: list[MetricName],
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
