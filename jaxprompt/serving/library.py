"""A library: a directory of prompts of one backbone, with the statistics that a router needs.

Prompts stay as they are. Their statistics are in one file beside them, so a task is added and
removed without a change of any other task's prompt.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxprompt.config.errors import UserError, listed
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.tasks.splits import load_rows
from jaxprompt.data.templates import input_columns
from jaxprompt.inference.session import Session, check_pair, open_session, prompt_task
from jaxprompt.methods.tuned import Prompt
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.serving.artefacts import digest_of, read_artefact
from jaxprompt.serving.features import text_features, text_of
from jaxprompt.serving.router import (
    TENSORS,
    Decision,
    Router,
    Settings,
    TaskStatistics,
    load_router,
    save_router,
    statistics_of,
)
from jaxprompt.serving.store import DirectoryStore, PathStore

Say = Callable[[str], None]
MIN_ROWS = 4


class Collected(NamedTuple):
    """What ``collect`` did."""

    router: Router
    added: list[str]  # whose statistics are new
    removed: list[str]  # whose prompt is gone
    left_out: dict[str, str]  # prompts that cannot be routed to, and why


def add_prompts(folder: Path, prompts: Mapping[str, Path]) -> None:
    """Copy prompts into a library, each under a name. Raises UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    library = DirectoryStore(folder)
    given = PathStore(prompts)
    for name in prompts:
        files = given.read(name)
        read_artefact(files, name)
        library.write(name, files)


def collect(
    folder: Path,
    backbone: str | Backbone | None = None,
    *,
    rows: int = 256,
    held_out: int = 128,
    settings: Settings = Settings(),
    say: Say = lambda text: None,
) -> Collected:
    """Bring the statistics of a library up to date: only prompts that are new or other are read.

    Args:
        folder: the library.
        backbone: that all prompts were tuned on; None: the one that the first prompt records.
        rows: training rows of each task for its mean and covariance, at most.
        held_out: validation rows of each task for thresholds, at most.
        settings: when a text is left without a prompt.
        say: is told what goes on.

    Raises:
        UserError: there is no prompt, one is of another backbone, or a file is damaged.
    """
    prompts = {
        name: (read_artefact(files, name), digest_of(files))
        for name, files in _files(DirectoryStore(folder)).items()
    }
    if not prompts:
        raise UserError(
            f"The library {str(folder)!r} has no prompts; name some, as in `jaxprompt library "
            "LIBRARY spam=runs/spam/prompt`."
        )
    first = next(iter(prompts.values()))[0].metadata.get("backbone", {}).get("source")
    session = open_session(None, backbone or first)
    for name, (prompt, _) in prompts.items():
        try:
            check_pair(prompt, session.backbone)
        except UserError as error:
            raise UserError(f"The prompt {name!r} of the library: {error}") from None
    known, digests = _known(folder, session.backbone)
    tasks, added, left_out = {}, [], {}
    for name, (prompt, digest) in prompts.items():
        if name in known and digests.get(name) == digest:
            tasks[name] = known[name]
            continue
        try:
            tasks[name] = task_statistics(session, _task_of(prompt), rows, held_out)
        except UserError as error:
            left_out[name] = str(error)
            say(f"{name} cannot be routed to: {error}")
            continue
        added.append(name)
        say(f"{name}: statistics of {tasks[name].rows} rows")
    facts = {
        "backbone": session.backbone.source,
        "fingerprint": session.backbone.fingerprint,
        "digests": {name: prompts[name][1] for name in tasks},
    }
    router = Router(tasks, settings, facts)
    save_router(folder, router)
    return Collected(router, added, sorted(set(known) - set(prompts)), left_out)


def _files(store: DirectoryStore) -> dict[str, Mapping[str, bytes]]:
    return {name: store.read(name) for name in sorted(store.list())}


def _known(folder: Path, backbone: Backbone) -> tuple[dict[str, TaskStatistics], dict[str, str]]:
    """The statistics that are there already, with the digest of the prompt that each is of."""
    if not (folder / TENSORS).is_file():
        return {}, {}
    router = load_router(folder)
    digests = router.facts.get("digests")
    if router.facts.get("fingerprint") != backbone.fingerprint or not isinstance(digests, dict):
        return {}, {}
    return router.tasks, digests


def _task_of(prompt: Prompt) -> TaskConfig:
    task = prompt_task(prompt, None)
    if task.train is None:
        raise UserError(f"its task {task.name!r} names no training rows")
    return task


def task_statistics(session: Session, task: TaskConfig, rows: int, held_out: int) -> TaskStatistics:
    """The statistics of a task's rows in the bare backbone of a session.

    A task without validation rows gives every fourth training row for the thresholds.

    Raises:
        UserError: the rows cannot be read, or are too few.
    """
    columns = input_columns(task)
    if task.validation is not None:
        training = load_rows(task, "train", rows)
        others = load_rows(task, "validation", held_out)
    else:
        every = list(load_rows(task, "train", rows + held_out))
        others = every[::4][:held_out]
        training = [row for place, row in enumerate(every) if place % 4]
    if len(training) < MIN_ROWS or not len(others):
        raise UserError(
            f"its task has {len(training)} training rows and {len(others)} others; statistics need "
            f"{MIN_ROWS} and 1"
        )
    texts = [text_of(row, columns) for split in (training, others) for row in split]
    features = text_features(session, texts)
    return statistics_of(features[: len(training)], features[len(training) :])


class Choice(NamedTuple):
    """What the router of a server finds for one input."""

    prompt: str | None  # None: it abstains
    score: float
    margin: float | None  # None: there is no second prompt
    candidates: tuple[tuple[str, float], ...]  # prompts by score, the best first
    reason: str = ""  # why it abstains, to go on with after "no prompt fits"


class LibraryRouter:
    """The router of a library as it is now: its file is read again when it has changed."""

    def __init__(self, folder: Path, backbone: Backbone, interval: float = 2.0) -> None:
        """Raises UserError where there is no router, or it is of another backbone."""
        self._path, self._interval = folder, interval
        self._fingerprint, self._source = backbone.fingerprint, backbone.source
        self._stamp, self._looked = self._current_stamp(), time.monotonic()
        self.router = self._load()

    @property
    def names(self) -> Sequence[str]:
        """The prompts that it can choose now."""
        self._refresh()
        return self.router.names

    def choose(
        self, vector: Sequence[float] | np.ndarray, candidates: Sequence[str] | None = None
    ) -> Choice:
        """The prompt that fits features [D]. Raises UserError where no candidate is known."""
        self._refresh()
        decision = self.router.route(np.asarray(vector, np.float32), candidates)
        if not decision.candidates:
            raise UserError(
                f"{decision.reason} There are {listed(self.router.names) or 'none'}; name a prompt."
            )
        return _choice(decision)

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._looked < self._interval:
            return
        self._looked = now
        stamp = self._current_stamp()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self.router = self._load()
            except UserError:  # the old one goes on, as a prompt's old version does
                return

    def _current_stamp(self) -> tuple[int, int, int]:
        try:
            status = (self._path / TENSORS).stat()
        except OSError:
            return 0, 0, 0
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _load(self) -> Router:
        router = load_router(self._path)
        if router.facts.get("fingerprint") not in (None, self._fingerprint):
            raise UserError(
                f"The router of {str(self._path)!r} is of {router.facts.get('backbone')!r} and the "
                f"server has {self._source!r}: other weights; make it again with `jaxprompt "
                "library`."
            )
        return router


def _choice(decision: Decision) -> Choice:
    reason = decision.reason[:1].lower() + decision.reason[1:].rstrip(".")
    return Choice(
        decision.name,
        decision.score,
        None if decision.margin == float("inf") else decision.margin,
        decision.candidates,
        "" if decision.name else f" ({reason})",
    )
