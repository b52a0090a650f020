"""Checkpoints on disk: what names their parts have, and that they come back as they were."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt.training.checkpoint import Checkpoints
from jaxprompt.training.step import TrainState


def test_a_state_comes_back_and_its_parts_keep_their_names_on_disk(tmp_path):
    """Runs of earlier versions go on from their checkpoints."""
    groups = tuple({"prompt": jnp.full((1, n, 4), float(n))} for n in (2, 3))
    state = TrainState(jnp.int32(7), groups, {"moment": jnp.ones(3)})
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(7, state, {})
    parts = json.loads((tmp_path / "7" / "state" / "_METADATA").read_text())["tree_metadata"]
    assert sorted(parts) == [
        "('optimizer', 'moment')", "('step',)", "('tree', '0', 'prompt')", "('tree', '1', 'prompt')"
    ]  # fmt: skip
    restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, state))
