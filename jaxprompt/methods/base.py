"""Tuning methods: functions of a tree and the frozen parameters. Only that tree is ever trained.

Every leaf of the tree has a leading axis K, one entry per prompt trained in the same step, so that
the optimizer can be vmapped over it and K prompts are tuned exactly as if each were alone. Prompts
of several lengths are a tuple of trees, one a length: none is padded where it is trained.

Reparameterised prompts are trained in other coordinates and stored as the vectors they come to:
nothing that uses a prompt can tell. Their weights start with unit variance and are divided by the
square root of their fan-in where they are used, so that one learning rate suits all leaves.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.schema import PromptConfig

Tree = Any
Params = dict[str, Any]


class Method(NamedTuple):
    """What is trained, how it starts, and what the model is given.

    ``init(params, start, config, seed) -> tree`` begins from ``rows(config)`` start vectors for
    each prompt; ``apply(tree, params) -> (params, bank)``.
    """

    init: Callable[[Params, Float[np.ndarray, "K R D"], PromptConfig, int], Tree]
    apply: Callable[[Tree, Params], tuple[Params, Float[Array, "K P D"] | None]]
    rows: Callable[[PromptConfig], int] = lambda config: config.length
    uses_prompt: bool = True
    frozen: bool = True  # params are the model's, not the tree


def trees_of(tree: Tree) -> tuple[Tree, ...]:
    """The trees of prompts that have one length each."""
    return tree if isinstance(tree, tuple) else (tree,)


def joined(trees: Sequence[Tree]) -> Tree:
    """The opposite of ``trees_of``."""
    return trees[0] if len(trees) == 1 else tuple(trees)


def parts_of(value: Any, tree: Tree) -> tuple[Any, ...]:
    """What belongs to each of ``trees_of(tree)``, of what ``joined`` has made in the same way."""
    return value if isinstance(tree, tuple) else (value,)


def count(tree: Tree) -> int:
    """K, the prompts in a tree."""
    return sum(len(jax.tree.leaves(own)[0]) for own in trees_of(tree))


def by_length(tree: Tree, values: Any) -> tuple[tuple[Tree, ...], list[Any]]:
    """The trees of one length each, and the part of ``values`` [K, ...] that belongs to each."""
    trees = trees_of(tree)
    ends = list(itertools.accumulate(map(count, trees)))
    return trees, [values[end - count(own) : end] for own, end in zip(trees, ends, strict=True)]


@contextlib.contextmanager
def lent(tree: Tree) -> Iterator[Any]:
    """The tree of a lone member without axis K, in the same memory, which it has back afterwards.

    Within it, no array of the tree itself can be used.
    """
    own = _without_members(tree)
    try:
        yield own
    finally:
        _give_back(tree, _with_members(own))


# donated, so that no copy of a whole model is made
_without_members = jax.jit(lambda tree: jax.tree.map(lambda x: x[0], tree), donate_argnums=0)
_with_members = jax.jit(lambda tree: jax.tree.map(lambda x: x[None], tree), donate_argnums=0)


def _give_back(tree: dict[str, Any], arrays: dict[str, Any]) -> None:
    for name, value in arrays.items():
        if isinstance(value, dict):
            _give_back(tree[name], value)
        else:
            tree[name] = value


def applied(
    method: Method, tree: Tree, params: Params
) -> tuple[Params, Float[Array, "K P D"] | None]:
    """``method.apply``; in a bank of several lengths the shorter prompts end with zeros."""
    if not isinstance(tree, tuple):
        return method.apply(tree, params)
    banks: list[Any] = [method.apply(own, params)[1] for own in tree]
    longest = max(bank.shape[1] for bank in banks)
    wide = [jnp.pad(bank, ((0, 0), (0, longest - bank.shape[1]), (0, 0))) for bank in banks]
    return params, jnp.concatenate(wide)


def _tune_prompt(params: Params, start, config: PromptConfig, seed: int) -> Tree:
    return {"prompt": jnp.asarray(start, jnp.float32)}


def _residual_start(params: Params, start, config: PromptConfig, seed: int) -> Tree:
    count, _, width = start.shape
    rng = np.random.Generator(np.random.Philox(key=[seed, 1]))  # apart from that of the start

    def normal(*shape):  # the same for each prompt, as if it were alone
        return jnp.tile(jnp.asarray(rng.standard_normal(shape), jnp.float32), (count, 1, 1))

    zeros = lambda n: jnp.zeros((count, n), jnp.float32)
    return {
        "prompt": jnp.asarray(start, jnp.float32),
        "down": normal(width, config.bottleneck),
        "down_bias": zeros(config.bottleneck),
        "up": normal(config.bottleneck, width),
        "up_bias": zeros(width),
        "scale": jnp.ones((count, width), jnp.float32),
        "shift": zeros(width),
    }


def _residual_prompt(tree: Tree, params: Params) -> tuple[Params, Float[Array, "K P D"]]:
    """p + LayerNorm(W_up relu(W_down p)), one network for all vectors of a prompt."""
    width, inner = tree["down"].shape[1:]
    vectors = tree["prompt"]
    hidden = jnp.einsum("kpd,kdm->kpm", vectors, tree["down"]) / width**0.5
    hidden = jax.nn.relu(hidden + tree["down_bias"][:, None])
    out = jnp.einsum("kpm,kmd->kpd", hidden, tree["up"]) / inner**0.5 + tree["up_bias"][:, None]
    out = jax.nn.standardize(out, axis=-1, epsilon=1e-5)
    return params, vectors + out * tree["scale"][:, None] + tree["shift"][:, None]


def _superposition_start(params: Params, start, config: PromptConfig, seed: int) -> Tree:
    count, words, _ = start.shape
    mixture = np.eye(config.length, words, dtype=np.float32) * words**0.5
    return {
        "mixture": jnp.tile(jnp.asarray(mixture), (count, 1, 1)),
        "basis": jnp.asarray(start, jnp.float32),
    }


def _superposed_prompt(tree: Tree, params: Params) -> tuple[Params, Float[Array, "K P D"]]:
    """Each vector is a weighted sum of the rows of one basis."""
    mixture, basis = tree["mixture"], tree["basis"]
    return params, jnp.einsum("kpm,kmd->kpd", mixture, basis) / mixture.shape[-1] ** 0.5


def _tune_model(params: Params, start, config: PromptConfig, seed: int) -> Tree:
    # a float32 copy: the frozen parameters may be bfloat16, and the step donates what it trains
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True)[None], params)


def _train_both(params: Params, start, config: PromptConfig, seed: int) -> Tree:
    virtual = _tune_prompt(params, start, config, seed) if start.size else {}
    return {"model": _tune_model(params, start, config, seed), **virtual}


def _use_both(tree: Tree, params: Params) -> tuple[Params, Array | None]:
    return jax.tree.map(lambda x: x[0], tree["model"]), tree.get("prompt")


# pre-training: the backbone and, where the mixture has them, virtual tokens. Not among METHODS: its
# result is a backbone, not something tuned on one
PRETRAINING = Method(_train_both, _use_both, frozen=False)

METHODS = {
    # Lester et al. 2021: the prompt is the only trainable thing
    "prompt-tuning": Method(_tune_prompt, lambda tree, params: (params, tree["prompt"])),
    # Razdaibiedina et al. 2023 (arXiv 2305.03937), section 3: through a shallow network with a
    # residual connection, which is thrown away in the end
    "residual-prompt-tuning": Method(_residual_start, _residual_prompt),
    # after SadraeiJavaheri et al. 2024 (arXiv 2406.05279): vectors are superpositions of
    # embeddings of sampled words. Here one basis serves all vectors, is trained along, and holds
    # the usual start, which so is the start of this method too
    "superposition-prompt-tuning": Method(
        _superposition_start,
        _superposed_prompt,
        rows=lambda config: max(config.basis, config.length),
    ),
    # "model tuning" in the paper: full fine-tuning, the baseline
    "model-tuning": Method(
        _tune_model,
        lambda tree, params: (jax.tree.map(lambda x: x[0], tree), None),
        rows=lambda config: 0,
        uses_prompt=False,
        frozen=False,
    ),
}
