"""Prefix tuning: keys and values in front of the text's (Li and Liang 2021, arXiv 2101.00190).

In training a network makes them (section 4.3): an embedding for each place of the
prefix, a matrix to m, tanh, and a matrix to the keys and values of all layers. What is stored is
what it gives. Without it (P-tuning v2, Liu et al. 2022, arXiv 2110.07602) they are trained
themselves. Each of the encoder, the decoder and cross-attention has a prefix of its own, as in the
paper's code for BART.

The matrices start with unit variance and are divided by the square root of three times their
fan-in where they are used. They so start with the variance that PyTorch gives linear layers, and
one learning rate suits all leaves: about the one that suits keys and values themselves.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.errors import UserError
from jaxprompt.config.methods import STACKS, PrefixConfig
from jaxprompt.config.schema import PromptConfig
from jaxprompt.methods.base import Method, members_of, no_start_vectors, seeded
from jaxprompt.methods.layers import Kernel, kernels, nested
from jaxprompt.models.injection import Injection, Layers, Params, Prefix, leaf_at

# of keys and values that are trained themselves: P-tuning v2 starts with N(0, 0.02)
_FLAT_DEVIATION = 0.02

Leaves = Mapping[str, Float[Array, "K ..."]]  # of one prefix


def prefix(config: PrefixConfig) -> Method:
    """The method of these settings.

    The leaves of each prefix are named by its path. Without a network they are key and value
    [K, L, P, G, H]; with one they are

    embedding [K, P, D], down [K, D, m], down_bias [K, m], up [K, m, L, 2, G, H] and
    up_bias [K, 1, L, 2, G, H], or [K, P, L, 2, G, H] where ``init`` is text.

    zeros: the keys and values are 0, since key, value and up start there. That is near the frozen
    model but not the same, as keys of logit 0 take a share of the attention.
    """

    def init(
        params: Params, start: Float[np.ndarray, "K R D"], prompt: PromptConfig, seed: int
    ) -> dict[str, Array]:
        rng, leaves = seeded(seed, "prefix"), {}
        for kernel in _chosen_keys(params, config):
            name = "/".join((*kernel.path[:-1], "prefix"))
            if config.mlp is None:
                made = _flat(kernel, config, rng)
            else:
                made = _network(kernel, config, config.mlp, rng)
            leaves |= {f"{name}/{leaf}": array for leaf, array in made.items()}
        return members_of(leaves, start)

    def inject(trainables: Leaves, params: Params) -> Injection:
        prefixes: dict[str, dict[str, Array]] = {}
        for name, leaf in trainables.items():
            path, _, field = name.rpartition("/")
            prefixes.setdefault(path, {})[field] = leaf
        return Injection(layers=nested({path: _baked(of) for path, of in prefixes.items()}))

    return Method(init, inject, num_start_vectors=no_start_vectors, uses_prompt=False)


def _chosen_keys(params: Params, config: PrefixConfig) -> list[Kernel]:
    """The weights of keys of the attentions that have a prefix.

    Raises:
        UserError: the config names a place that the model lacks.
    """
    lacking = [place for place in config.places if not list(kernels(params, [place]))]
    # all places, which is the default, are all that there are
    if lacking and {*config.places} != {*STACKS}:
        kind = "encoder" if list(kernels(params, ["encoder"])) else "decoder"
        only = "has an encoder alone" if kind == "encoder" else "is decoder-only"
        raise UserError(
            f"prefix.places names {lacking[0]!r}, and this backbone {only}; set prefix.places to "
            f"[{kind}], or leave the key out."
        )
    if not config.places:
        raise UserError("prefix.places is empty; name at least one of encoder, decoder and cross.")
    return [kernel for kernel in kernels(params, config.places) if kernel.name == "key"]


def _flat(
    kernel: Kernel, config: PrefixConfig, rng: np.random.Generator
) -> dict[str, Float[np.ndarray, "L P G H"]]:
    shape = (kernel.layers, config.length, *kernel.outputs)
    if config.init != "normal":
        return {"key": np.zeros(shape), "value": np.zeros(shape)}
    normal = lambda: _FLAT_DEVIATION * rng.standard_normal(shape, np.float32)
    return {"key": normal(), "value": normal()}


def _network(
    kernel: Kernel, config: PrefixConfig, width: int, rng: np.random.Generator
) -> dict[str, Float[np.ndarray, "..."]]:
    """The leaves of a network. From text and zeros, only its last bias counts at the start."""
    inputs, length = kernel.inputs[0], config.length
    each = (kernel.layers, 2, *kernel.outputs)
    up = (width, *each)
    biases = length if config.init == "text" else 1
    return {
        "embedding": rng.standard_normal((length, inputs), np.float32),
        "down": rng.standard_normal((inputs, width), np.float32),
        "down_bias": np.zeros(width),
        "up": rng.standard_normal(up, np.float32) if config.init == "normal" else np.zeros(up),
        "up_bias": np.zeros((biases, *each)),
    }


def _baked(leaves: Leaves) -> Prefix:
    """The keys and values [K, L, P, G, H] that the leaves of one prefix stand for."""
    if "key" in leaves:
        return Prefix(leaves["key"], leaves["value"])
    _, inputs, width = leaves["down"].shape
    hidden = jnp.einsum("kpd,kdm->kpm", leaves["embedding"], leaves["down"]) / (3 * inputs) ** 0.5
    hidden = jnp.tanh(hidden + leaves["down_bias"][:, None])
    both = jnp.einsum("kpm,kmlcgh->kplcgh", hidden, leaves["up"]) / (3 * width) ** 0.5
    both = (both + leaves["up_bias"]).swapaxes(1, 2)
    return Prefix(both[:, :, :, 0], both[:, :, :, 1])


def from_words(trainables: Leaves, words: Layers) -> dict[str, Float[Array, "K ..."]]:
    """The trainables of a start from text, with the keys and values of real words in them.

    The prefix is exactly these: the rest of a network gives 0 at its start.

    Args:
        trainables: what ``init`` has made.
        words: what ``Model.prefix_of_words`` has made of as many words as the prefix has places.
    """
    started = dict(trainables)
    for name, leaf in trainables.items():
        *path, field = name.split("/")
        made = leaf_at(words, tuple(path))
        assert isinstance(made, Prefix)
        if field in ("key", "value"):
            new = getattr(made, field)
        elif field == "up_bias":
            new = jnp.stack([made.key, made.value], axis=3).swapaxes(1, 2)
        else:
            continue
        started[name] = jnp.broadcast_to(jnp.asarray(new, jnp.float32), leaf.shape)
    return started
