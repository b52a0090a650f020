"""Tuning methods: pairs of pure functions. Only the tree that ``init`` makes is ever trained.

Every leaf of that tree has a leading axis K, one entry per prompt trained in the same step, so that
the optimizer can be vmapped over it and K prompts are tuned exactly as if each were alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Tree = Any
Params = dict[str, Any]


class Method(NamedTuple):
    """``init(params, prompts) -> tree`` and ``apply(tree, params) -> (params, bank)``."""

    init: Callable[[Params, Float[np.ndarray, "K P D"]], Tree]
    apply: Callable[[Tree, Params], tuple[Params, Float[Array, "K P D"] | None]]
    uses_prompt: bool


def _tune_prompt(params: Params, prompts: Float[np.ndarray, "K P D"]) -> Tree:
    return {"prompt": jnp.asarray(prompts, jnp.float32)}


def _tune_model(params: Params, prompts: Float[np.ndarray, "K P D"]) -> Tree:
    # a float32 copy: the frozen parameters may be bfloat16, and the step donates what it trains
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True)[None], params)


def _train_both(params: Params, prompts: Float[np.ndarray, "K P D"]) -> Tree:
    virtual = _tune_prompt(params, prompts) if prompts.size else {}
    return {"model": _tune_model(params, prompts), **virtual}


def _use_both(tree: Tree, params: Params) -> tuple[Params, Array | None]:
    return jax.tree.map(lambda x: x[0], tree["model"]), tree.get("prompt")


# pre-training: the backbone and, where the mixture has them, virtual tokens. Not among METHODS: its
# result is a backbone, not something tuned on one
PRETRAINING = Method(_train_both, _use_both, True)

METHODS = {
    # Lester et al. 2021: the prompt is the only trainable thing
    "prompt-tuning": Method(_tune_prompt, lambda tree, params: (params, tree["prompt"]), True),
    # "model tuning" in the paper: full fine-tuning, the baseline
    "model-tuning": Method(
        _tune_model, lambda tree, params: (jax.tree.map(lambda x: x[0], tree), None), False
    ),
}
