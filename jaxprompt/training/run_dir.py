"""The directory of a run: its lock, settings, checkpoints, metrics and result."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import jax

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.names import recorded_names
from jaxprompt.config.overrides import dump_yaml, read_yaml
from jaxprompt.config.pretrain import PretrainConfig
from jaxprompt.config.schema import Optimization, RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.config.values import Value, Values
from jaxprompt.data.tasks.registry import resolve_learnt
from jaxprompt.runtime import processes
from jaxprompt.runtime.files import PART, write_atomically
from jaxprompt.runtime.lock import LOCK, locked
from jaxprompt.runtime.signals import Interrupted
from jaxprompt.training import inputs
from jaxprompt.training.checkpoint import CHECKSUMS, Checkpoints, checkpoint_folders
from jaxprompt.training.metric_log import MetricWriter
from jaxprompt.training.trackers import (
    IDS,
    Outcome,
    TrackedRun,
    Tracker,
    check_installed,
    open_trackers,
)

# what ``result.json`` holds; a run of several tasks has a ``tune.TaskResult`` of each in ``tasks``
Result: TypeAlias = Values

# all that a run writes
RUN_FILES = frozenset((
    LOCK, "config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "damaged", "result.json",
    "curves.png", "losses.png", "samples.jsonl", "tokenizer", "tokens", "prompt", "model", "tasks",
    "population", "population.md", IDS, "wandb", "shared", "users",
))  # fmt: skip

# settings that a run may change when it goes on
RESUMABLE_SETTINGS = {
    "output",
    "train.tensorboard",
    "train.trackers",
    "train.keep",
    "train.eval_batch_size",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
}


def _settings(config: RunConfig | PretrainConfig) -> Values:
    """All settings by dotted key, tasks in full, so that two spellings of a run are equal."""
    values = config.model_dump(mode="json")
    grid = values.get("prompt", {}).get("population", {})
    whole = lambda task: resolve_learnt(task).model_dump(mode="json")
    if "task" in grid:
        grid["task"] = [whole(task) for task in grid["task"]]
    elif "task" in values:
        values["task"] = whole(values["task"])
    return _flat(values)


def _flat(values: Value, prefix: str = "") -> Values:
    if not isinstance(values, dict):
        return {prefix[:-1]: values}
    return {
        k: v for name, inner in values.items() for k, v in _flat(inner, f"{prefix}{name}.").items()
    }


def _read_settings(file: Path) -> Values | None:
    """What ``config.yaml`` holds, not yet validated; None where it is not the file of a run."""
    try:
        values = read_yaml(file.read_text(encoding="utf-8"), str(file))
    except (UserError, UnicodeDecodeError):
        return None
    # a run writes all settings; a file that a person wrote rarely has all three sections
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
        # the schema gives settings that are newer than the run their defaults. The mesh may change,
        # and its axes may have had other names
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
    changes = [f"{k} was {shown(old.get(k))} and is {shown(new.get(k))}" for k in changed]
    if "train.cooldown_steps" in changed and done is not None:
        changes.append(f"a cool-down may change before it begins, and the run is at step {done}")
    raise UserError(f"{folder} holds a run with other settings ({'; '.join(changes)}); {advice}")


def check_run(config: RunConfig | PretrainConfig) -> Path:
    """The run directory, if a run may start or resume there. Nothing is written.

    A run that has no checkpoint yet has nothing to lose: its settings may change.
    """
    folder = Path(config.output)
    file = folder / "config.yaml"
    begun = any(folder.glob("checkpoints/*")) or (folder / "result.json").is_file()
    if file.is_file() and begun:
        _check_settings(folder, config)
    elif folder.exists():
        written = RUN_FILES if file.is_file() and _read_settings(file) else {LOCK}
        if not folder.is_dir() or _foreign(folder, written):
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


def _foreign(folder: Path, known: Collection[str]) -> list[str]:
    """What is in a folder beside files of these names and what a killed run was writing."""
    names = (path.name for path in folder.iterdir())
    return [name for name in names if name not in known and not PART.fullmatch(name)]


def clear_run(folder: Path) -> None:
    """Remove all that a run wrote but its settings, so that it begins anew; other files stay."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name in RUN_FILES - {"config.yaml"} or PART.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def load_result(config: RunConfig | PretrainConfig) -> Result | None:
    """What ``result.json`` holds if the run is complete, else None if the run may go on.

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


def _read_result(folder: Path) -> Result | None:
    """What ``result.json`` holds; None where there is none, or it is damaged."""
    try:
        value = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and _is_result(value) else None


_NUMBERS = ("rows", "majority", "untuned", "value", "trainable_parameters")
_SCORES = ("loss", "perplexity", "token_accuracy", "tokens")


def _is_result(result: Result) -> bool:
    """Whether it has what a run's result has, as far as anything reads it again."""
    has = lambda values, *names: (
        isinstance(values, dict)
        and all(isinstance(values.get(name), int | float) for name in names)
    )
    if not has(result, "steps", "seconds") or type(result["steps"]) is not int:
        return False
    if "held_out" in result:
        sets, model = result["held_out"], result.get("model")
        fine = isinstance(sets, dict) and all(has(values, *_SCORES) for values in sets.values())
        return fine and has(result, "tokens") and isinstance(model, str)
    tasks = result["tasks"] if "tasks" in result else {"": result}
    return isinstance(tasks, dict) and all(
        has(values, *_NUMBERS)
        and {"task", "prompt"} <= values.keys()
        and isinstance(values.get("metric"), str)
        and ("test" not in values or has(values["test"], values["metric"]))
        for values in tasks.values()
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


def _outcome(error: type[BaseException] | None) -> Outcome:
    """How a run ended that was left with this kind of error, or with none."""
    if error is None:
        return "finished"
    return "interrupted" if issubclass(error, Interrupted | KeyboardInterrupt) else "failed"


class RunDir:
    """The directory of one run. It knows nothing of what is trained.

    Within ``with``, ``open`` locks it; ``checkpoints`` and ``metrics`` are there after
    ``open_checkpoints`` and ``open_metrics``. Of several processes the first one alone writes.
    """

    checkpoints: Checkpoints
    metrics: MetricWriter

    def __init__(self, config: RunConfig | PretrainConfig, say: Callable[[str], None]):
        self.config, self.path, self._say = config, Path(config.output), say
        self._open = contextlib.ExitStack()
        self._locked = False

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def finished(self, known_inputs: Callable[[], inputs.Inputs]) -> Result | None:
        """The result of a complete run; None for a run that begins or goes on.

        Args:
            known_inputs: digests of what the run would read now, as far as they are cheap.
        Raises:
            UserError: the directory holds another run, or one that read other inputs.
        """
        result = processes.on_process_zero(lambda: load_result(self.config))
        if not result:
            processes.on_process_zero(lambda: check_installed(self.config.train.trackers))
            return None
        inputs.check_inputs(self.path, result.get("inputs"), known_inputs())
        self._say(
            f"{self.path} is complete after {result['steps']} steps; delete it to start again."
        )
        return result

    def open(self) -> None:
        """Make the directory, lock it and write ``config.yaml``; nothing if that is done."""
        if self._locked:
            return
        self._locked = True
        processes.on_process_zero(self._lock)

    def _lock(self) -> None:
        self._open.enter_context(open_run(self.config))

    def open_checkpoints(self, *, sharded: bool) -> None:
        """``sharded``: for states as large as a model, see ``Checkpoints``."""
        self.checkpoints = Checkpoints(
            self.path / "checkpoints", self.config.train.keep, self._say, sharded=sharded
        )

    def open_metrics(self, step: int) -> None:
        """Rows after ``step``, which a killed run has left, go; -1: all rows."""
        metrics = MetricWriter(self.path, step, trackers=self._trackers, say=self._say)
        self.metrics = metrics
        self._open.push(lambda kind, error, trace: metrics.close(_outcome(kind)))

    def _trackers(self, step: int) -> list[Tracker]:
        train = self.config.train
        names = ["tensorboard"] * train.tensorboard + list(train.trackers)
        return open_trackers(names, TrackedRun(self.path, _settings(self.config), step), self._say)

    def oldest_checkpoint(self) -> int | None:
        """The step of the oldest checkpoint that is kept."""
        return min((int(f.name) for f in checkpoint_folders(self.checkpoints.path)), default=None)

    def remove_result(self) -> None:
        """A result of an earlier number of steps goes before what it tells of is replaced."""
        if jax.process_index() == 0:
            (self.path / "result.json").unlink(missing_ok=True)

    def write_result(self, result: Result) -> None:
        """Write ``result.json``, which marks the run as complete."""
        if jax.process_index() == 0:
            write_atomically(self.path / "result.json", json.dumps(result, indent=2) + "\n")
