"""Which prompt fits a text, by what the bare backbone makes of the text.

Each task is a Gaussian of features: a mean of its own, and a covariance that all tasks share. The
nearest task by Mahalanobis distance is linear discriminant analysis. Everything is a sum over
rows, so a task is added or removed in closed form, in any order, and none is trained again.

The shared covariance is shrunk by the oracle approximating shrinkage of Chen et al. (2010,
arXiv 0907.4698, equation 23), applied to correlations. The shrinkage of Ledoit and Wolf needs the
rows themselves; this one needs their sums alone.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors import safe_open
from safetensors.numpy import save

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.runtime.files import write_atomically
from jaxprompt.runtime.json_file import parse_json

TENSORS, FACTS = "router.safetensors", "router.json"
FORMAT = 1
_FIELDS = ("mean", "scatter", "held_out")

Features = Float[np.ndarray, "_ D"]


class TaskStatistics(NamedTuple):
    """What is kept of a task's rows."""

    rows: int  # n, the rows of mean and scatter
    mean: Float[np.ndarray, " D"]
    scatter: Float[np.ndarray, " t"]  # sum of (x - mean)(x - mean)^T, its lower triangle
    held_out: Float[np.ndarray, "M D"]  # float16; rows that thresholds are set by


def statistics_of(features: Features, held_out: Features) -> TaskStatistics:
    """The statistics of one task.

    Args:
        features: of training rows, at least 2.
        held_out: of other rows, at least 1.

    Raises:
        UserError: there are too few rows, or numbers that are not finite.
    """
    if len(features) < 2 or not len(held_out):
        raise UserError(
            f"There are {len(features)} rows for the statistics of a task and {len(held_out)} for "
            "its thresholds; give at least 2 and 1."
        )
    if not (np.isfinite(features).all() and np.isfinite(held_out).all()):
        raise UserError("Features hold numbers that are not finite; use a backbone in float32.")
    exact = np.asarray(features, np.float64)
    mean = exact.mean(axis=0)
    scatter = (exact - mean).T @ (exact - mean)
    lower = scatter[np.tril_indices(len(mean))]
    return TaskStatistics(
        len(features), mean.astype(np.float32), lower.astype(np.float32),
        np.asarray(held_out, np.float16),
    )  # fmt: skip


class Settings(NamedTuple):
    """When a text is left without a prompt."""

    # of a task's own held-out rows, the share that is nearer than the threshold of its distance
    inside: float = 0.99
    # of all held-out rows that are routed, the share that may go to a wrong task: the threshold of
    # the margin is the lowest that keeps to it
    wrong: float = 0.05


class Decision(NamedTuple):
    """Which prompt fits a text."""

    name: str | None  # None: no prompt does
    # minus the squared Mahalanobis distance to the nearest task, of each feature: about -1 for the
    # rows of a task
    score: float
    margin: float  # log odds of the nearest task against the second, in nats; inf: there is none
    reason: str  # one sentence
    # the tasks that could be chosen with their scores, the nearest first
    candidates: tuple[tuple[str, float], ...] = ()

    @property
    def nearest(self) -> str | None:
        """The nearest task, also where no prompt fits."""
        return self.candidates[0][0] if self.candidates else None


class Router:
    """The tasks of a library, and the decision among them. It never changes.

    ``add`` and ``remove`` give another router. The order of additions and removals makes no
    difference, to the bit.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskStatistics],
        settings: Settings = Settings(),
        facts: Mapping[str, object] | None = None,
    ) -> None:
        """``facts``: what else is known, by name of the task or of the whole; see ``save``."""
        self.tasks = {name: tasks[name] for name in sorted(tasks)}
        self.settings, self.facts = settings, dict(facts or {})
        self.names = list(self.tasks)
        widths = {len(task.mean) for task in self.tasks.values()}
        if len(widths) > 1:
            raise UserError(
                f"The tasks have features of {listed(sorted(widths))} numbers; collect those of "
                "one backbone."
            )
        self.width = widths.pop() if widths else 0
        self._whitening = _whitening(list(self.tasks.values())) if self.tasks else None
        self._means = self._whitened(np.stack([t.mean for t in self.tasks.values()])) \
            if self.tasks else np.zeros((0, 0))  # fmt: skip
        self.limits, self.least_margin = self._thresholds()

    def add(self, name: str, task: TaskStatistics) -> "Router":
        """A router with one task more, or with other statistics of it."""
        return Router({**self.tasks, name: task}, self.settings, self.facts)

    def remove(self, name: str) -> "Router":
        """A router without a task. Raises KeyError where there is no such task."""
        left = dict(self.tasks)
        del left[name]
        return Router(left, self.settings, self.facts)

    def distances(self, features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N T"]:
        """Squared Mahalanobis distances of rows to the tasks, divided by D."""
        white = self._whitened(features)
        squared = (
            (white**2).sum(axis=1)[:, None]
            - 2 * white @ self._means.T
            + (self._means**2).sum(axis=1)[None]
        )
        return np.maximum(squared, 0.0) / max(self.width, 1)

    def route(
        self, features: Float[np.ndarray, " D"], candidates: Iterable[str] | None = None
    ) -> Decision:
        """The task that a text belongs to, if it belongs to any.

        Args:
            features: of the text, see ``serving/features.py``.
            candidates: only these tasks; None: all. Names without statistics are left out.

        Raises:
            UserError: the features are of another backbone.
        """
        if self.tasks and len(features) != self.width:
            raise UserError(
                f"The features have {len(features)} numbers and the router's {self.width}; collect "
                "the library with this backbone."
            )
        allowed = None if candidates is None else set(candidates)
        places = [i for i, name in enumerate(self.names) if allowed is None or name in allowed]
        if not places:
            return Decision(None, -math.inf, 0.0, "No prompt with statistics may be chosen.")
        if not np.isfinite(features).all():
            return Decision(None, -math.inf, 0.0, "The features of the text are not finite.")
        distances = self.distances(np.asarray(features)[None])[0][places]
        order = np.argsort(distances, kind="stable")
        ranked = tuple((self.names[places[i]], -float(distances[i])) for i in order)
        margin = math.inf
        if len(ranked) > 1:
            margin = (ranked[0][1] - ranked[1][1]) * self.width / 2
        return self._decision(ranked, float(self.limits[places[order[0]]]), margin)

    def _decision(
        self, ranked: tuple[tuple[str, float], ...], limit: float, margin: float
    ) -> Decision:
        name, score = ranked[0]
        if -score > limit:
            reason = (
                f"The text is unlike all tasks: from the nearest, {name!r}, it is "
                f"{-score / limit:.2f} times as far as the rows of that task are."
            )
            return Decision(None, score, margin, reason, ranked)
        if margin < self.least_margin:
            reason = (
                f"The text is between tasks: the margin of the nearest, {name!r}, is {margin:.2f} "
                f"and has to be {self.least_margin:.2f}."
            )
            return Decision(None, score, margin, reason, ranked)
        return Decision(name, score, margin, f"The nearest task is {name!r}.", ranked)

    def _whitened(self, features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        if self._whitening is None:
            return np.zeros((len(features), 0))
        return np.asarray(features, np.float64) @ self._whitening

    def _thresholds(self) -> tuple[Float[np.ndarray, " T"], float]:
        """The largest distance of each task, and the least margin of all."""
        limits, margins, right = np.zeros(len(self.tasks)), [], []
        for place, task in enumerate(self.tasks.values()):
            distances = self.distances(task.held_out)
            limits[place] = np.quantile(distances[:, place], self.settings.inside)
            if len(self.tasks) > 1:
                two = np.partition(distances, 1, axis=1)[:, :2]
                margins.append((two[:, 1] - two[:, 0]) * self.width / 2)
                right.append(distances.argmin(axis=1) == place)
        if not margins:
            return limits, 0.0
        # each task counts as much, however many rows it has
        weights = np.concatenate([np.full(len(m), 1 / len(m)) for m in margins])
        return limits, least_margin(
            np.concatenate(margins), np.concatenate(right), weights, self.settings.wrong
        )

    def confusion(self) -> Float[np.ndarray, "T T"]:
        """Of the held-out rows of each task, the share that is nearest to each task."""
        shares = np.zeros((len(self.tasks), len(self.tasks)))
        for place, task in enumerate(self.tasks.values()):
            nearest = self.distances(task.held_out).argmin(axis=1)
            shares[place] = np.bincount(nearest, minlength=len(self.tasks)) / len(nearest)
        return shares


def least_margin(
    margins: Float[np.ndarray, " N"],
    right: np.ndarray,
    weights: Float[np.ndarray, " N"],
    wrong: float,
) -> float:
    """The lowest margin from which on at most a share ``wrong`` of the rows is wrong.

    >>> least_margin(np.array([3.0, 2.0, 1.0]), np.array([True, True, False]), np.ones(3), 0.1)
    2.0
    """
    order = np.argsort(-margins, kind="stable")
    total = np.cumsum(weights[order])
    share = np.cumsum(np.where(right[order], 0.0, weights[order])) / total
    allowed = np.flatnonzero(share <= wrong)
    if len(allowed) == len(margins) or (len(allowed) and allowed[-1] == len(margins) - 1):
        return 0.0  # every row may be routed
    return float(margins[order[allowed[-1]]]) if len(allowed) else math.inf


def _whitening(tasks: list[TaskStatistics]) -> Float[np.ndarray, "D D"]:
    """W with W W^T the inverse of the shared covariance, which is shrunk."""
    width = len(tasks[0].mean)
    total = np.zeros(width * (width + 1) // 2)
    for task in tasks:
        total += task.scatter
    freedom = max(sum(task.rows - 1 for task in tasks), 1)
    covariance = np.zeros((width, width))
    covariance[np.tril_indices(width)] = total / freedom
    covariance += np.tril(covariance, -1).T
    deviations = np.sqrt(np.diag(covariance))
    deviations = np.maximum(deviations, 1e-6 * max(deviations.max(), 1e-6))
    correlations = covariance / np.outer(deviations, deviations)
    np.fill_diagonal(correlations, 1.0)
    share = shrinkage(correlations, freedom)
    shrunk = (1 - share) * correlations + share * np.eye(width)
    factor = np.linalg.cholesky(shrunk)
    return np.linalg.inv(factor).T / deviations[:, None]


def shrinkage(correlations: Float[np.ndarray, "D D"], freedom: int) -> float:
    """How far correlations are drawn to none, between 0 and 1: the larger, the fewer rows.

    Chen et al. 2010, equation 23; the trace of correlations is D.
    """
    width = len(correlations)
    if width == 1:
        return 0.0
    squares = float((correlations**2).sum())
    above = (1 - 2 / width) * squares + width**2
    below = (freedom + 1 - 2 / width) * (squares - width)
    # at least a little, so that features that are sums of others do no harm
    return 1.0 if below <= 0 else float(min(1.0, max(above / below, 1e-4)))


# ---- files


def save_router(folder: Path, router: Router) -> None:
    """Write ``router.safetensors``, and ``router.json`` for people to read.

    The tensor file has all that is read again, so that one file is always whole.
    """
    facts = {
        "format": FORMAT,
        "settings": router.settings._asdict(),
        "width": router.width,
        **router.facts,
        "tasks": {name: task.rows for name, task in router.tasks.items()},
    }
    tensors = {
        f"{name}/{field}": np.ascontiguousarray(getattr(task, field))
        for name, task in router.tasks.items()
        for field in _FIELDS
    }
    content = save(tensors, metadata={"router": json.dumps(facts)})
    write_atomically(folder / TENSORS, content)
    routed = np.diag(router.confusion())
    shown_facts = facts | {
        "tasks": {
            name: {
                "rows": task.rows,
                "held_out_rows": len(task.held_out),
                "routed_right": round(float(routed[place]), 4),
                "largest_distance": round(float(router.limits[place]), 4),
            }
            for place, (name, task) in enumerate(router.tasks.items())
        },
        "least_margin": router.least_margin if math.isfinite(router.least_margin) else None,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_atomically(folder / FACTS, json.dumps(shown_facts, indent=2, ensure_ascii=False) + "\n")


def load_router(folder: Path) -> Router:
    """The router of a library.

    Raises:
        UserError: there is none, or its file is damaged.
    """
    path = folder / TENSORS
    if not path.is_file():
        raise UserError(
            f"{shown(str(folder))} has no {TENSORS}; make it with `jaxprompt library FOLDER`."
        )
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = parse_json(metadata.get("router", ""), path)
        return _read(facts, tensors)
    except UserError as error:
        raise UserError(f"{error}; make {path} again with `jaxprompt library`.") from None
    except Exception as error:  # of the library; of what is not as it was written
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{path} is damaged ({problem}); make it again with `jaxprompt library`."
        ) from None


def _read(facts: object, tensors: Mapping[str, np.ndarray]) -> Router:
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ValueError("it is of another format")
    tasks: dict[str, TaskStatistics] = {}
    for name, count in facts["tasks"].items():
        mean, scatter, held_out = (tensors[f"{name}/{field}"] for field in _FIELDS)
        width = len(mean)
        shapes = mean.shape, scatter.shape, held_out.shape[1:]
        if shapes != ((width,), (width * (width + 1) // 2,), (width,)) or not len(held_out):
            raise ValueError(f"the tensors of {name} do not belong together")
        if not all(np.isfinite(array).all() for array in (mean, scatter, held_out)):
            raise ValueError(f"the tensors of {name} are not finite")
        tasks[name] = TaskStatistics(int(count), mean, scatter, held_out)
    own = {"format", "settings", "width", "tasks"}
    kept = {key: value for key, value in facts.items() if key not in own}
    return Router(tasks, Settings(**facts["settings"]), kept)
