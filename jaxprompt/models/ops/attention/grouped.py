"""Attention of decoder-only models: grouped queries, and keys that lie in several blocks.

Ainslie et al. 2023 (arXiv 2305.13245). Letters: see ``jaxprompt.data.virtual_tokens``; G heads of
keys and values.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class KeyBlock(NamedTuple):
    """Keys and values, and which of them each query attends to; without a mask to all.

    All rows share a batch of 1.
    """

    key: Float[Array, "#B S G H"]
    value: Float[Array, "#B S G H"]
    mask: Bool[Array, "#B #T S"] | None

    def logits(self, query: Float[Array, "B T G r H"]) -> Float[Array, "B G r T S"]:
        """Float32 logits of each query, the lowest number where it does not attend."""
        if self.key.shape[0] == 1:
            logits = jnp.einsum(
                "btgrh,sgh->bgrts", query, self.key[0], preferred_element_type=jnp.float32
            )
        else:
            logits = jnp.einsum(
                "btgrh,bsgh->bgrts", query, self.key, preferred_element_type=jnp.float32
            )
        if self.mask is None:
            return logits
        return jnp.where(self.mask[:, None, None], logits, jnp.finfo(jnp.float32).min)

    def weighted_sum(self, weights: Float[Array, "B G r T S"]) -> Float[Array, "B T G r H"]:
        """The sum of the values times their weights."""
        if self.value.shape[0] == 1:
            return jnp.einsum("bgrts,sgh->btgrh", weights, self.value[0])
        return jnp.einsum("bgrts,bsgh->btgrh", weights, self.value)


def grouped_attention(
    query: Float[Array, "B T N H"], blocks: Sequence[KeyBlock]
) -> Float[Array, "B T N H"]:
    """Softmax over the keys of all blocks together; logits are divided by sqrt(H).

    Only logits are concatenated, never keys. So no cache is copied, and a block that all rows share
    is multiplied once for all of them. A query that may attend to nothing gets a uniform average,
    which is finite and unused.
    """
    batch, length, heads, width = query.shape
    groups = blocks[0].key.shape[2]
    query = query.reshape(batch, length, groups, heads // groups, width) * width**-0.5
    logits = jnp.concatenate([block.logits(query) for block in blocks], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    total, start = jnp.zeros((), query.dtype), 0
    for block in blocks:
        part = weights[..., start : start + block.key.shape[1]]
        start += block.key.shape[1]
        total += block.weighted_sum(part)
    return total.reshape(batch, length, heads, width)
