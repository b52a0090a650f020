"""The maths of T5 as pure functions (letters: see ``jaxprompt.bank``).

Sources: Raffel et al. 2020 (arXiv 1910.10683) section 2.1; Shazeer 2020 (arXiv 2002.05202) for the
gated MLP. T5 differs from other transformers in three ways that matter here: normalisation is RMS
only, attention logits are not divided by sqrt(H), and positions enter as a learned bias per bucket
of the distance between query and key.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


def product(
    spec: str, a: Float[Array, "..."], b: Float[Array, "..."], mixed: bool = False
) -> Float[Array, "..."]:
    """``jnp.einsum(spec, a, b)`` with ``b`` in the dtype of ``a``.

    mixed: both operands, in the backward pass too, are rounded to bfloat16 and multiplied with
    float32 sums and results: the form for which matrix units exist. It is for activations times
    weights; the batched products of attention have no such form in XLA's CPU runtime (jax 0.10).
    Every index of an operand must occur in the other one or in the result.
    """
    return _mixed_product(spec, a, b) if mixed else jnp.einsum(spec, a, b.astype(a.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed_product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _mixed_forward(spec, a, b):
    kept = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return _mixed_product(spec, *kept), (kept, jnp.zeros((0,), a.dtype), jnp.zeros((0,), b.dtype))


def _mixed_backward(spec, kept, cotangent):
    # without this, JAX would multiply the float32 cotangent by the operands in float32
    (a, b), like_a, like_b = kept
    names, result = spec.split("->")
    first, second = names.split(",")
    grad_a: Any = _mixed_product(f"{result},{second}->{first}", cotangent, b)
    grad_b: Any = _mixed_product(f"{first},{result}->{second}", a, cotangent)
    return grad_a.astype(like_a.dtype), grad_b.astype(like_b.dtype)


_mixed_product.defvjp(_mixed_forward, _mixed_backward)


def head(
    y: Float[Array, "B T D"], table: Float[Array, "..."], mixed: bool = False, tied: bool = False
) -> Float[Array, "B T V"]:
    """Float32 logits of every word; the table is [D, V] or, tied to the embedding, [V, D].

    It is not transposed for the latter: XLA's CPU runtime (jax 0.10) has no bfloat16 product
    with a transposed result, which the table's gradient would be.
    """
    spec = "btd,vd->btv" if tied else "btd,dv->btv"
    if mixed:
        return product(spec, y, table, mixed=True)
    return jnp.einsum(spec, y, table.astype(y.dtype), preferred_element_type=jnp.float32)


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """Divide by the root mean square, in float32, then scale; the result has the dtype of ``x``."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def relative_buckets(
    offsets: Int[Array, "..."], *, bidirectional: bool, buckets: int, max_distance: int
) -> Int[Array, "..."]:
    """Bucket number of each offset (key position - query position).

    Half of the buckets are exact distances, the other half grow logarithmically up to
    ``max_distance``; beyond it everything shares the last bucket. A bidirectional stack gives half
    of the buckets to keys after the query; a causal one sees only distances to the past.
    """
    if bidirectional:
        buckets //= 2
        first = (offsets > 0).astype(jnp.int32) * buckets
        distance = jnp.abs(offsets)
    else:
        first = jnp.zeros_like(offsets)
        distance = jnp.maximum(-offsets, 0)
    exact = buckets // 2
    # max(1) only guards log(0) in the branch that the select throws away
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    far = exact + (ratio / math.log(max_distance / exact) * (buckets - exact)).astype(jnp.int32)
    return first + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


def relative_bias(
    table: Float[Array, "R N"],
    queries: Int[Array, " T"],
    keys: Int[Array, " S"],
    *,
    bidirectional: bool,
    max_distance: int,
) -> Float[Array, "1 N T S"]:
    """Attention bias from a table of R buckets, for query and key offsets within a row.

    Segments are contiguous, so within a segment the difference of two offsets in the row *is* the
    relative position: packed rows need no positions of their own and the bias is shared by the
    batch.
    """
    offsets = keys[None, :] - queries[:, None]
    numbers = relative_buckets(
        offsets, bidirectional=bidirectional, buckets=table.shape[0], max_distance=max_distance
    )
    return jnp.take(table, numbers, axis=0).transpose(2, 0, 1)[None]


def segment_mask(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B 1 T S"]:
    """True where query and key are in the same segment; segment 0 is padding and sees nothing."""
    same = queries[:, :, None] == keys[:, None, :]
    return (same & (keys[:, None, :] > 0))[:, None]


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    bias: Float[Array, "#B N T S"] | None,
    mask: Bool[Array, "#B 1 #T S"],
    drop: Callable[[jax.Array], jax.Array] = lambda weights: weights,
) -> Float[Array, "B T N H"]:
    """Multi-head attention with additive bias, unscaled logits and float32 softmax.

    A query that may see nothing gets a uniform average (finite, and read by nobody).
    """
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = drop(jax.nn.softmax(logits, axis=-1).astype(value.dtype))
    return jnp.einsum("bnts,bsnh->btnh", weights, value)


def shift_right(
    targets: Int[Array, "B T"], segments: Int[Array, "B T"], start_id: int | Int[Array, "B T"]
) -> Int[Array, "B T"]:
    """Decoder inputs for teacher forcing: each segment starts with ``start_id``.

    It is one id, or one for each place where a segment may start.

    targets  [7 8 1 9 1 0], segments [1 1 1 2 2 0]  ->  [0 7 8 0 9 0] for start id 0.
    """
    shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
    previous = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(previous == segments, shifted, start_id)
