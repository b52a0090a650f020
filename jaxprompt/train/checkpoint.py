"""Checkpoints of a run: tree, optimizer and step. The only file that knows orbax.

The backbone is never copied: it is recorded by source and fingerprint in the run's files. The data
position is the step, and random keys are pure functions of seed and step.
"""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxprompt.config import UserError


class Checkpoints:
    """The checkpoints in one directory; the newest ``keep`` are kept."""

    def __init__(self, path: Path, keep: int):
        # orbax 0.12.8 declares a protocol that its own policies do not match
        policy: Any = ocp.training.preservation_policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(
            str(path.absolute()), preservation_policy=policy
        )

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Write ``state`` (arrays) and ``progress`` (JSON); complete or absent, never half."""
        if self.latest_step() == step:
            return
        self._checkpointer.save_checkpointables(step, {"state": state, "progress": progress})

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def progress(self) -> dict[str, Any]:
        """The newest progress alone: it may say what shape the state has."""
        return self._load({"progress": None})["progress"]

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """The newest state, with the shapes, dtypes and shardings of ``like``, and its progress."""
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        loaded = self._load({"state": abstract, "progress": None})
        return loaded["state"], loaded["progress"]

    def _load(self, what: dict[str, Any]) -> dict[str, Any]:
        step = self.latest_step()
        try:
            return self._checkpointer.load_checkpointables(step, what)
        except (ValueError, OSError, KeyError) as error:
            problem = " ".join(str(error).split())[:300]
            raise UserError(
                f"Checkpoint {step} cannot be read ({problem}); delete its folder to go on from an "
                "earlier one, or the run directory to start again."
            ) from None

    def close(self) -> None:
        """Wait for writes and release the directory."""
        self._checkpointer.close()
