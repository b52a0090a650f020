"""Attention to a prefix of keys and values, beside attention to the text by whichever kernel.

The two are computed apart, and each query shares its weight between them: with the log of the sum
of the exponentials of its logits, the softmax over all keys follows from the parts. Letters: see
``jaxprompt.data.virtual_tokens``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprompt.models.injection import Prefix

_LOW = -1e30


class Part(NamedTuple):
    """Attention to some of the keys of each query.

    log_total: the log of the sum of the exponentials of its logits, by query and head.
    """

    y: Float[Array, "R T N H"]
    log_total: Float[Array, "R T N"]


def with_prefix(
    part: Part,
    query: Float[Array, "R T N H"],
    prefix: Prefix,
    bias: Float[Array, "#R N T P"] | None = None,
) -> Float[Array, "R T N H"]:
    """Attention to the keys of ``part`` and to those of a prefix, in one softmax.

    Every query sees the prefix of its row. Logits are not scaled.

    Args:
        part: attention to the text.
        query: what ``part`` was computed of.
        prefix: leaves [R, P, ...], or [1, P, ...] where all rows share it.
        bias: added to the logits of the prefix.
    """
    row = "" if len(prefix.key) == 1 else "r"
    key, value, used = prefix if row else jax.tree.map(lambda leaf: leaf[0], prefix)
    logits = jnp.einsum(
        f"rtnh,{row}pnh->rntp", query, key.astype(query.dtype), preferred_element_type=jnp.float32
    )
    logits = logits if bias is None else logits + bias
    if used is not None:
        logits = jnp.where(used[..., None, None, :], logits, _LOW)
    text = part.log_total.swapaxes(1, 2)[..., None]
    weights = jax.nn.softmax(jnp.concatenate([text, logits], axis=-1), axis=-1)
    weights = weights.astype(part.y.dtype)
    of_text = weights[..., 0].swapaxes(1, 2)[..., None]
    of_prefix = jnp.einsum(f"rntp,{row}pnh->rtnh", weights[..., 1:], value.astype(part.y.dtype))
    return part.y * of_text + of_prefix
