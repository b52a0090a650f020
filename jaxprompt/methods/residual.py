"""Residual prompt tuning (Razdaibiedina et al. 2023, arXiv 2305.03937, section 3).

The vectors go through a shallow network with a residual connection. The network is thrown away in
the end: an artefact holds the vectors that it gives, so nothing that uses a prompt can tell.

Its weights start with unit variance and are divided by the square root of their fan-in where they
are used, so that one learning rate suits all leaves.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.schema import PromptConfig
from jaxprompt.methods.base import Method
from jaxprompt.models.injection import Injection, Params


def init(
    params: Params, start: Float[np.ndarray, "K P D"], config: PromptConfig, seed: int
) -> dict[str, Array]:
    """The start vectors, and a network whose random weights are the same for all members."""
    count, _, width = start.shape
    rng = np.random.Generator(np.random.Philox(key=[seed, 1]))  # apart from that of the start

    def normal(*shape):  # the same for each member, as if it were alone
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


def inject(trainables: dict[str, jax.Array], params: Params) -> Injection:
    """p + LayerNorm(W_up relu(W_down p)), one network for all vectors of a prompt."""
    width, inner = trainables["down"].shape[1:]
    vectors = trainables["prompt"]
    hidden = jnp.einsum("kpd,kdm->kpm", vectors, trainables["down"]) / width**0.5
    hidden = jax.nn.relu(hidden + trainables["down_bias"][:, None])
    out = jnp.einsum("kpm,kmd->kpd", hidden, trainables["up"]) / inner**0.5
    out = jax.nn.standardize(out + trainables["up_bias"][:, None], axis=-1, epsilon=1e-5)
    scaled = out * trainables["scale"][:, None]
    return Injection(vectors + scaled + trainables["shift"][:, None])


RESIDUAL_PROMPT_TUNING = Method(init, inject)
