"""Checkpoints of a run: trainables, optimizer and step. The only file that knows orbax.

The backbone is never copied: it is recorded by source and fingerprint in the run's files. The data
position is the step, and random keys are pure functions of seed and step.

A checkpoint is good when it holds a list of the SHA-256 of all of its files, which is written last,
and when they agree. What is not is put aside, and the newest good one is used.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint import options

from jaxprompt.config.errors import UserError
from jaxprompt.runtime import parallel, processes
from jaxprompt.runtime.files import write_atomically
from jaxprompt.training.step import TrainState

CHECKSUMS = "sha256.json"  # the list of a checkpoint's files, which is written last
UNFINISHED = f"it has no {CHECKSUMS}"


class _Stored(NamedTuple):
    """A ``TrainState`` with the names that its parts have in files."""

    step: PyTree
    tree: PyTree
    optimizer: PyTree


def checkpoint_folders(path: Path) -> list[Path]:
    """The folders in ``path`` that a step names, newest first; what else is there is not ours."""
    named = [f for f in path.glob("*") if re.fullmatch("0|[1-9][0-9]{0,9}", f.name) and f.is_dir()]
    return sorted(named, key=lambda folder: int(folder.name), reverse=True)


class Checkpoints:
    """The checkpoints in one directory; the newest ``keep`` are kept.

    Of several processes the first one alone reads and writes: no other needs to see the directory.
    sharded: for states as large as a model. Each process reads and writes what its devices hold,
    in a directory that all of them see.
    """

    def __init__(
        self, path: Path, keep: int, say: Callable[[str], None] = lambda text: None,
        *, sharded: bool = False,
    ):  # fmt: skip
        self.path, self._keep, self._sharded = path.absolute(), keep, sharded
        self._latest = processes.on_process_zero(lambda: newest_good(self.path, say))

    def save(self, step: int, state: TrainState, progress: dict[str, object]) -> None:
        """Write ``state`` (arrays) and ``progress`` (JSON); complete or absent, never half."""
        if self._latest == step:
            return
        stored = _Stored(*state)
        what = ocp.args.Composite(
            state=ocp.args.StandardSave(
                stored if self._sharded else jax.tree.map(np.asarray, processes.fetch(stored))
            ),
            progress=ocp.args.JsonSave(progress),
        )
        write = partial(self._writing, step, partial(self._write, step, what))
        if self._sharded:
            write()
        else:
            processes.on_process_zero(write)
        processes.on_process_zero(partial(self._writing, step, partial(self._complete, step)))
        self._latest = step

    def _write(self, step: int, what: ocp.args.Composite) -> None:
        self.path.mkdir(exist_ok=True)
        with _no_tracebacks(), _orbax(self._sharded) as orbax:
            orbax.save(self.path / str(step), args=what)

    def _complete(self, step: int) -> None:
        folder = self.path / str(step)
        sums = {"step": step, "files": checksums(folder)}
        write_atomically(folder / CHECKSUMS, json.dumps(sums, indent=1) + "\n")
        for old in checkpoint_folders(self.path)[self._keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def _writing(self, step: int, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, ValueError, RuntimeError) as error:  # a full disk has many names
            raise UserError(
                f"Checkpoint {step} cannot be written to {str(self.path)!r} ({_brief(error)}); "
                "mend that and run the same command again: the checkpoint before it is intact."
            ) from None

    def latest_step(self) -> int | None:
        """Step of the newest good checkpoint."""
        return self._latest

    def progress(self) -> dict[str, object]:
        """The newest progress alone: it may say what shape the state has."""
        return processes.on_process_zero(lambda: self._load(False, progress=ocp.args.JsonRestore()))

    def restore(self, like: TrainState) -> TrainState:
        """The newest state, with the shapes, dtypes and shardings of ``like``.

        The devices may be others than those that it was saved from.
        """
        if self._sharded:
            place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            what = ocp.args.StandardRestore(jax.tree.map(place, _Stored(*like)))
            state = TrainState(*self._load(True, state=what))
        else:
            abstract = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), _Stored(*like))
            what = ocp.args.StandardRestore(abstract)
            stored = processes.broadcast_from_zero(lambda: self._load(False, state=what), abstract)
            state = TrainState(*stored)
        if int(state.step) != self._latest:
            raise UserError(
                f"Checkpoint {self._latest} in {str(self.path)!r} holds step {int(state.step)}; "
                "delete its folder to go on from an earlier one."
            )
        if self._sharded:
            return state
        return jax.tree.map(
            lambda value, x: parallel.device_put_global(value, x.sharding), state, like
        )

    def _load(self, by_all: bool, **what: ocp.args.CheckpointArgs) -> PyTree:
        """Read the one part of the newest checkpoint that ``what`` names."""
        try:
            with _orbax(by_all) as orbax:
                parts = orbax.restore(
                    self.path / str(self._latest), args=ocp.args.Composite(**what)
                )
            return next(iter(parts.values()))
        except (ValueError, OSError, KeyError) as error:
            raise UserError(
                f"Checkpoint {self._latest} in {str(self.path)!r} cannot be read "
                f"({_brief(error)}); delete its folder to go on from an earlier one, or the run "
                "directory to start again."
            ) from None


@contextlib.contextmanager
def _no_tracebacks() -> Iterator[None]:
    """Orbax raises an error of its threads where the caller waits, so it need not log it too."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _orbax(by_all: bool) -> ocp.Checkpointer:
    """A checkpointer for all processes, or for the first one alone: it waits for no other."""
    # one process would be told of no one else
    several = jax.process_count() > 1 and not by_all
    alone = options.MultiprocessingOptions(
        primary_host=0,
        active_processes={0} if several else None,
        barrier_sync_key_prefix="first" if several else None,
    )
    parts = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
        state=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        progress=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    )
    return ocp.Checkpointer(parts, multiprocessing_options=alone)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder`` by its path there, the list itself left out."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != CHECKSUMS:
            with path.open("rb") as file:
                sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def problem_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None; ``UNFINISHED`` is what a killed run may leave."""
    try:
        content = json.loads((folder / CHECKSUMS).read_text())
        step, files = content["step"], dict(content["files"])
    except FileNotFoundError:
        return UNFINISHED
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"its {CHECKSUMS} is damaged"
    if str(step) != folder.name:
        return f"it is that of step {step}"
    actual = checksums(folder)
    differs = sorted(name for name in {*actual, *files} if actual.get(name) != files.get(name))
    return f"{differs[0]} is not what was saved" if differs else None


def newest_good(path: Path, say: Callable[[str], None]) -> int | None:
    """Step of the newest good checkpoint; newer ones are moved to ``damaged/`` beside ``path``.

    Raises UserError if there were checkpoints, one of them damaged, and none is good.
    """
    for part in path.glob("*.orbax-checkpoint-tmp*"):  # what a killed run was writing
        shutil.rmtree(part, ignore_errors=True)
    moved, place = [], path.parent / "damaged"
    for folder in checkpoint_folders(path):
        problem = problem_of(folder)
        if problem is None:
            return int(folder.name)
        place.mkdir(exist_ok=True)
        number = next(n for n in itertools.count() if not (place / f"{folder.name}-{n}").exists())
        os.replace(folder, place / f"{folder.name}-{number}")
        moved.append((folder.name, problem))
        say(f"warning: checkpoint {folder.name} is not used ({problem}); it is now in {place}")
    damaged = [f"{name}: {problem}" for name, problem in moved if problem != UNFINISHED]
    if damaged:
        raise UserError(
            f"No checkpoint in {str(path)!r} is good ({'; '.join(damaged)}), and all were moved to "
            f"{str(place)!r}; put a backup in their place, or run the same command again to start "
            "from the beginning."
        )
    return None
