"""The maths of T5 as pure functions (letters: see ``jaxprompt.data.virtual_tokens``).

Sources: Raffel et al. 2020 (arXiv 1910.10683) section 2.1; Shazeer 2020 (arXiv 2002.05202) for the
gated MLP. T5 differs from other transformers in three ways that matter here: normalisation is RMS
only, attention logits are not divided by sqrt(H), and positions enter as a learned bias per bucket
of the distance between query and key.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from jaxprompt.models.base import Runtime
from jaxprompt.models.ops.attention import per_example
from jaxprompt.models.ops.attention.per_example import Segments
from jaxprompt.models.ops.quantization import dequantize, is_quantized
from jaxprompt.models.precision import from_bits, to_bits
from jaxprompt.runtime import parallel

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


def matmul(
    spec: str, a: Float[Array, "..."], b: Float[Array, "..."], mixed: bool = False
) -> Float[Array, "..."]:
    """``jnp.einsum(spec, a, b)`` with ``b`` in the dtype of ``a``.

    mixed: both operands, in the backward pass too, are rounded to bfloat16 and multiplied with
    float32 sums and results: the form for which matrix units exist. It is for activations times
    weights; the batched products of attention have no such form in XLA's CPU runtime (jax 0.10).
    Every index of an operand must occur in the other one or in the result.
    """
    if mixed or _of_heads(spec):
        return _product(spec, mixed, a, b)
    return jnp.einsum(spec, a, b.astype(a.dtype))


def dense(
    spec: str, x: Float[Array, "..."], weight: Float[Array, "..."], runtime: Runtime = Runtime()
) -> Float[Array, "..."]:
    """``matmul`` of activations with a weight: d is the model's dimension, n heads, f the MLP's.

    Where this device holds a part of the weight (``runtime.place``), or the frozen weight is
    quantized, the weight is gathered and dequantized for the product, and again for the backward
    pass: it is never kept.
    """
    if runtime.place.fsdp == 1 and not is_quantized(weight):
        return matmul(spec, x, weight, runtime.mixed)
    if runtime.place.trained:
        return jax.checkpoint(functools.partial(_dense_stored, spec, runtime=runtime))(x, weight)
    return _dense_frozen(spec, x, weight, runtime)


_AXES = {"d": "embed", "n": "heads", "f": "mlp"}


def _dense_stored(spec, x, stored, runtime):
    return matmul(spec, x, _full_weight(spec, stored, x.dtype, runtime), runtime.mixed)


_dense_frozen = jax.custom_vjp(_dense_stored, nondiff_argnums=(0, 3))


def _full_weight(spec, stored, dtype, runtime):
    if runtime.place.fsdp > 1:
        axes = [_AXES.get(letter) for letter in re.split(",|->", spec)[1]]
        stored = parallel.all_gather_fsdp(stored, axes, runtime.place)
    return dequantize(stored, dtype) if is_quantized(stored) else stored


def _dense_frozen_forward(spec, x, stored, runtime):
    return _dense_frozen(spec, x, stored, runtime), stored


def _dense_frozen_backward(spec, runtime, stored, cotangent):
    # unrolled, the compiler would else keep what the forward pass has made
    stored, cotangent = jax.lax.optimization_barrier((stored, cotangent))
    first, second, result = re.split(",|->", spec)
    back = f"{result},{second}->{first}"
    weight = _full_weight(spec, stored, cotangent.dtype, runtime)
    return matmul(back, cotangent, weight, runtime.mixed), None


_dense_frozen.defvjp(_dense_frozen_forward, _dense_frozen_backward)


def _of_heads(spec: str) -> bool:
    """Whether n and h are one axis, wherever they are."""
    terms = re.split(",|->", spec)
    return "nh" in spec and all("nh" in term or not {"n", "h"} & {*term} for term in terms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(spec: str, mixed: bool, a: jax.Array, b: jax.Array) -> jax.Array:
    kind = jnp.bfloat16 if mixed else a.dtype
    a, b = a.astype(kind), b.astype(kind)
    first, second, result = re.split(",|->", spec)
    if _of_heads(spec):
        # as one axis: XLA (jax 0.10) would sum over h before n, and copy both operands for it
        term, x = (first, a) if "nh" in first else (second, b)
        sizes = x.shape[term.index("nh") :][:2]
        a, b = _reshaped(a, first, (-1,)), _reshaped(b, second, (-1,))
        found: Any = _product(spec.replace("nh", "m"), mixed, a, b)
        return _reshaped(found, result, sizes, "m")
    # the operand whose index comes first in the result goes first: XLA's CPU runtime (jax 0.10)
    # has no bfloat16 product whose result is transposed
    own = next((i for i in result if (i in first) != (i in second)), "")
    if mixed and own in second and own not in first:
        spec, a, b = f"{second},{first}->{result}", b, a
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32 if mixed else None)


def _reshaped(x, term, sizes, old="nh"):
    """``x`` of axes ``term`` with axes of these sizes for its ``old`` ones, if it has those."""
    if "nh" not in term:
        return x
    at = term.index("nh")
    return x.reshape(*x.shape[:at], *sizes, *x.shape[at + len(old) :])


def _product_forward(spec, mixed, a, b):
    # an operand is kept for the gradient of the other: beside frozen weights, no activation is;
    # a weight is kept as it is, in a loop over layers else another copy of all would be
    like = jnp.zeros((0,), a.value.dtype), jnp.zeros((0,), b.value.dtype)
    a_learned, b_learned, (a, b) = a.perturbed, b.perturbed, (a.value, b.value)
    if mixed:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    kept = a if b_learned else None, b if a_learned else None
    return _product(spec, mixed, a, b), (*kept, *like)


def _product_backward(spec, mixed, kept, cotangent):
    # without this, JAX would multiply the float32 cotangent by the operands in float32
    a, b, like_a, like_b = kept
    names, result = spec.split("->")
    first, second = names.split(",")
    grad_a: Any = None
    grad_b: Any = None
    if not isinstance(cotangent, SymbolicZero):
        if b is not None:
            grad_a = _product(f"{result},{second}->{first}", mixed, cotangent, b)
            grad_a = grad_a.astype(like_a.dtype)
        if a is not None:
            grad_b = _product(f"{first},{result}->{second}", mixed, a, cotangent)
            grad_b = grad_b.astype(like_b.dtype)
    return grad_a, grad_b


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def gate(
    a: Float[Array, "*B F"], b: Float[Array, "*B F"], activation: str, mixed: bool = False
) -> Float[Array, "*B F"]:
    """The activation of ``a``, times ``b``. For the gradient these two alone are kept.

    mixed: kept as bfloat16, which their gradients are rounded to in the next product anyway.
    """
    return ACTIVATIONS[activation](a) * b


def _gate_forward(a, b, activation, mixed):
    kept = (to_bits(a), to_bits(b), jnp.zeros((0,), a.dtype)) if mixed else (a, b, a)
    return gate(a, b, activation, mixed), kept


def _gate_backward(activation, mixed, kept, cotangent):
    a, b, like = kept
    if mixed:
        a, b = (from_bits(x).astype(like.dtype) for x in (a, b))
    return jax.vjp(lambda a, b: ACTIVATIONS[activation](a) * b, a, b)[1](cotangent)


gate.defvjp(_gate_forward, _gate_backward)


def head(
    y: Float[Array, "B T D"], table: Float[Array, "..."], mixed: bool = False, tied: bool = False
) -> Float[Array, "B T V"]:
    """Float32 logits of every word; the table is [D, V] or, tied to the embedding, [V, D].

    It is not transposed for the latter: XLA's CPU runtime (jax 0.10) has no bfloat16 product
    with a transposed result, which the table's gradient would be.
    """
    spec = "btd,vd->btv" if tied else "btd,dv->btv"
    table = dequantize(table, y.dtype) if is_quantized(table) else table
    if mixed:
        return matmul(spec, y, table, mixed=True)
    return jnp.einsum(spec, y, table.astype(y.dtype), preferred_element_type=jnp.float32)


@functools.partial(jax.checkpoint, static_argnums=2)
def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """Divide by the root mean square, in float32, then scale; the result has the dtype of ``x``.

    For the gradient ``x`` alone is kept, which the layers around it keep anyway.
    """
    x32 = x.astype(jnp.float32)
    size = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1) + eps)
    # as a product, whose gradient is one too: the sum of two arrays' product along rows, which that
    # of a broadcast would be, takes ten times as long in XLA's CPU runtime (jax 0.10)
    normed = jnp.einsum("...d,...->...d", x32, size)
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


def ranks(segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """How many earlier tokens of the row belong to a token's own segment.

    segments [1 1 2 2 2 0] -> [0 1 0 1 2 0].
    """
    places = jnp.arange(segments.shape[1])
    first = segments != jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return places - jax.lax.cummax(jnp.where(first, places, 0), axis=1)


def additive(mask: Bool[Array, "*B"]) -> Float[Array, "*B"]:
    """A mask as what is added to logits: 0 where it is true, else so low that a weight is 0.

    Made once for all layers: a comparison of segments inside each would cost as much as a product.
    """
    return jnp.where(mask, 0.0, -1e30)


def seen_of_inputs(
    targets: Int[Array, "R T"], inputs: Int[Array, "B S"], widths: tuple[int, ...]
) -> Float[Array, "B 1 T S"] | Segments:
    """What targets see of inputs, by their segments: with R = B those of the same number.

    With R = G B, all of a row of targets see one, see ``pipeline.Batch``. widths: of segments.
    """
    if len(targets) > len(inputs):
        return per_example.find(inputs, widths, each=len(targets) // len(inputs))
    return additive(segment_mask(targets, inputs))


def _scores(spec: str, a: jax.Array, b: jax.Array, mixed: bool) -> jax.Array:
    """A product with a float32 result."""
    if mixed:
        return matmul(spec, a, b, mixed=True)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    bias: Float[Array, "#B N T S"] | None,
    mask: Float[Array, "#B 1 #T S"],
    *,
    mixed: bool = False,
) -> Float[Array, "B T N H"]:
    """Multi-head attention with additive bias and mask, unscaled logits and float32 softmax.

    mixed: as in ``product``. A query that may see nothing gets a uniform average (finite, and read
    by nobody).
    """
    logits = _scores("btnh,bsnh->bnts", query, key, mixed) + mask
    logits = logits if bias is None else logits + bias
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return matmul("bnts,bsnh->btnh", weights, value, mixed)


def attention_to(
    query: Float[Array, "R T N H"],
    key_kernel: Float[Array, "D N H"],
    value_kernel: Float[Array, "D N H"],
    encoded: Float[Array, "B S D"],
    seen: Float[Array, "#B 1 #T S"] | Segments,
    keep: Float[Array, "B S N"] | None = None,
    runtime: Runtime = Runtime(),
) -> Float[Array, "R T N H"]:
    """``attention`` to what is encoded, for few queries: no token is projected to key or value.

    (x W_q)(e W_k)^T = (x W_q W_k^T) e^T, and likewise for values: the projections move from the S
    rows of the encoder to the T x N of the queries, which is less work as long as T < H.
    Segments have rows of queries of their own, R of them; with a mask R is B.
    keep: what weights are multiplied with.
    """
    rows, length, heads, _ = query.shape
    flat = lambda x: x.reshape(rows, length * heads, -1)
    asked = flat(dense("btnh,dnh->btnd", query, key_kernel, runtime))
    if isinstance(seen, Segments):
        one = encoded[:, :, None]
        found = per_example.attention(
            asked[:, :, None], one, one, None, seen, keep, mixed=runtime.mixed
        )
    else:
        found = _attention_to(asked, encoded, seen, keep, (rows, length, heads), runtime.mixed)
    found = found.reshape(rows, length, heads, -1)
    return dense("btnd,dnh->btnh", found, value_kernel, runtime)


def _attention_to(asked, encoded, mask, keep, shape, mixed):
    logits = _scores("bqd,bsd->bqs", asked, encoded, mixed)
    logits = logits.reshape(*shape, -1) + mask.swapaxes(1, 2)
    weights = jax.nn.softmax(logits, axis=-1).astype(encoded.dtype)
    weights = weights if keep is None else weights * keep.swapaxes(1, 2)[:, None]
    return matmul("bqs,bsd->bqd", weights.reshape(*asked.shape[:2], -1), encoded, mixed)


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
