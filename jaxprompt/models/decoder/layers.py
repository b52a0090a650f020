"""The maths that decoder-only models have and T5 lacks.

Letters are those of ``jaxprompt.data.virtual_tokens``, and G heads of keys and values.

Sources: Su et al. 2021 (arXiv 2104.09864) for rotary positions, Ainslie et al. 2023 (arXiv
2305.13245) for grouped queries, Grattafiori et al. 2024 (arXiv 2407.21783) for Llama 3.1's
frequencies.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Block(NamedTuple):
    """Keys and values that queries may look at; without a mask at all of them.

    A batch of 1 is shared by all rows.
    """

    key: Float[Array, "#B S G H"]
    value: Float[Array, "#B S G H"]
    mask: Bool[Array, "#B #T S"] | None


def rotary_frequencies(
    head_dim: int, theta: float, scaling: Sequence[float] = ()
) -> Float[np.ndarray, " H/2"]:
    """Radians a position, for each pair of a head's dimensions: theta ** (-2i / H).

    ``scaling`` is () or (factor,), which divides all of them, or Llama 3.1's (factor, low, high,
    original length): wavelengths longer than original / low are divided by the factor, those
    shorter than original / high stay, and the ones between are interpolated.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if not scaling:
        return frequencies
    if len(scaling) == 1:
        return frequencies / scaling[0]
    factor, low, high, original = scaling
    turns = original * frequencies / (2 * math.pi)  # in the length that was trained on
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (smooth + (1 - smooth) / factor)


def rotate(x: Float[Array, "B T N H"], angles: Float[Array, "#B T H/2"]) -> Float[Array, "B T N H"]:
    """Rotate dimension i and i + H/2 of every head by the position's angle, in float32."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def grouped_attention(
    query: Float[Array, "B T N H"], blocks: Sequence[Block]
) -> Float[Array, "B T N H"]:
    """Softmax over the keys of all blocks together; logits are divided by sqrt(H).

    Only logits are put side by side, never keys: what a cache holds is not copied, and a block that
    all rows share is multiplied once for all of them. A query that may see nothing gets a uniform
    average (finite, and read by nobody).
    """
    batch, length, heads, width = query.shape
    groups = blocks[0].key.shape[2]
    query = query.reshape(batch, length, groups, heads // groups, width) * width**-0.5
    lowest = jnp.finfo(jnp.float32).min

    def scores(block: Block) -> jax.Array:
        if block.key.shape[0] == 1:
            found = jnp.einsum(
                "btgrh,sgh->bgrts", query, block.key[0], preferred_element_type=jnp.float32
            )
        else:
            found = jnp.einsum(
                "btgrh,bsgh->bgrts", query, block.key, preferred_element_type=jnp.float32
            )
        return found if block.mask is None else jnp.where(block.mask[:, None, None], found, lowest)

    logits = jnp.concatenate([scores(block) for block in blocks], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    total, start = jnp.zeros((), query.dtype), 0
    for block in blocks:
        part = weights[..., start : start + block.key.shape[1]]
        start += block.key.shape[1]
        if block.value.shape[0] == 1:
            total += jnp.einsum("bgrts,sgh->btgrh", part, block.value[0])
        else:
            total += jnp.einsum("bgrts,bsgh->btgrh", part, block.value)
    return total.reshape(batch, length, heads, width)


def last_of_segment(segments: Int[Array, "B S"]) -> Bool[Array, "B S"]:
    """Whether a token is the last one of its segment (never padding)."""
    following = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    return (segments > 0) & (segments != following)
