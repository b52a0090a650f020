"""K prompts in one run: where each starts, who goes on, and what came of them.

A lone prompt is a population of one. Each prompt is trained exactly as if it were alone: with the
batches of its own seed, the gradient of its own mean and an optimizer that sees nothing else.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprompt.config import RunConfig
from jaxprompt.train.step import TrainState


def stacked(trees: Sequence[Any]) -> Any:
    """The trees of prompts, [1, ...] each, as one tree [K, ...]."""
    if len(trees) == 1:
        return trees[0]  # a whole model may be in it: no copy
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def keep_of(state: TrainState, places: Sequence[int]) -> TrainState:
    """The state with the prompts at these places only."""
    chosen = jnp.asarray(places)
    take = lambda x: jnp.take(x, chosen, axis=0)
    tree, optimizer = (jax.tree.map(take, x) for x in (state.tree, state.optimizer))
    return state._replace(tree=tree, optimizer=optimizer)


def room_for(count: int, state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of the state of ``count`` prompts."""
    shape = lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype, sharding=x.sharding)
    step = jax.ShapeDtypeStruct((), state.step.dtype, sharding=state.step.sharding)
    tree, optimizer = (jax.tree.map(shape, x) for x in (state.tree, state.optimizer))
    return TrainState(step, tree, optimizer)  # pyright: ignore[reportArgumentType]


def better_half(best: Sequence[float], alive: Sequence[int]) -> list[int]:
    """Of the prompts that are still trained the better half, rounded up, in their order.

    Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943), by each one's best metric;
    of equals the earlier ones.
    """
    ranked = sorted(alive, key=lambda k: (-best[k], k))
    return sorted(ranked[: max(1, math.ceil(len(alive) / 2))])


def table(config: RunConfig, progress: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each prompt: what it differs in, its best metric, and when it stopped."""
    return [
        {**choice, "value": value, "best_step": step, "steps": steps}
        for choice, value, step, steps in zip(
            config.choices(), progress["best"], progress["best_step"], progress["trained"],
            strict=True,
        )
    ]  # fmt: skip


def as_markdown(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """The table, best prompt first."""
    names = list(rows[0])
    head = [metric if name == "value" else name for name in names]
    lines = [f"| {' | '.join(head)} |", "|---" * len(names) + "|"]
    for row in sorted(rows, key=lambda row: -row["value"]):
        cells = (f"{v:.4f}" if k == "value" else f"{v}" for k, v in row.items())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
