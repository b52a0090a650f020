"""Matrix products of activations with weights, plain, mixed, gathered and dequantized.

Letters: see ``jaxprompt.data.virtual_tokens``.
"""

import functools
import re

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from jaxprompt.models.base import Runtime
from jaxprompt.models.ops.quantization import Weight, dequantize, is_quantized
from jaxprompt.runtime import parallel


def matmul(
    spec: str, a: Float[Array, "..."], b: Float[Array, "..."], mixed: bool = False
) -> Float[Array, "..."]:
    """``jnp.einsum(spec, a, b)`` with ``b`` in the dtype of ``a``.

    Args:
        spec: of two operands. Every index of one must occur in the other or in the result.
        mixed: round both operands to bfloat16, in the backward pass too, and multiply them with
            float32 sums and results, for which there are matrix units. It is for activations times
            weights: XLA's CPU runtime (jax 0.10) has no such form of attention's batched products.
    """
    if mixed or _of_heads(spec):
        return _product(spec, mixed, a, b)
    return jnp.einsum(spec, a, b.astype(a.dtype))


def dense(
    spec: str, x: Float[Array, "..."], weight: Weight, runtime: Runtime = Runtime()
) -> Float[Array, "..."]:
    """``matmul`` of activations with a weight.

    Where this device holds a part of the weight (``runtime.place``), or the frozen weight is
    quantized, the weight is gathered and dequantized for the product, and again for the backward
    pass: it is never kept.

    Args:
        spec: as in ``matmul``; d is the model's dimension, n heads, f the MLP's.
        x: activations.
        weight: an array, its bits or a quantized array.
        runtime: says whether the product is mixed, and which part of a weight this device holds.
    """
    if runtime.place.fsdp == 1 and not is_quantized(weight):
        return matmul(spec, x, dequantize(weight, x.dtype), runtime.mixed)
    if runtime.place.trained:
        return jax.checkpoint(functools.partial(_dense_stored, spec, runtime=runtime))(x, weight)
    return _dense_frozen(spec, x, weight, runtime)


_AXES = {"d": "embed", "n": "heads", "f": "mlp"}


def _dense_stored(spec: str, x: jax.Array, stored: Weight, runtime: Runtime) -> jax.Array:
    return matmul(spec, x, _full_weight(spec, stored, x.dtype, runtime), runtime.mixed)


_dense_frozen = jax.custom_vjp(_dense_stored, nondiff_argnums=(0, 3))


def _full_weight(spec: str, stored: Weight, dtype: jnp.dtype, runtime: Runtime) -> jax.Array:
    """The weight that ``stored`` stands for, with the parts that other devices hold."""
    if runtime.place.fsdp > 1:
        axes = [_AXES.get(letter) for letter in re.split(",|->", spec)[1]]
        stored = parallel.all_gather_fsdp(stored, axes, runtime.place)
    return dequantize(stored, dtype)


def _dense_frozen_forward(spec, x, stored, runtime):
    return _dense_frozen(spec, x, stored, runtime), (stored, jnp.zeros((0,), x.dtype))


def _dense_frozen_backward(spec, runtime, residuals, cotangent):
    stored, like_x = residuals
    # without the barrier, the compiler would keep the weight of the forward pass in unrolled layers
    stored, cotangent = jax.lax.optimization_barrier((stored, cotangent))
    first, second, result = re.split(",|->", spec)
    back = f"{result},{second}->{first}"
    weight = _full_weight(spec, stored, cotangent.dtype, runtime)
    return matmul(back, cotangent, weight, runtime.mixed).astype(like_x.dtype), None


_dense_frozen.defvjp(_dense_frozen_forward, _dense_frozen_backward)


def _of_heads(spec: str) -> bool:
    """Whether n and h are one axis, wherever they are."""
    terms = re.split(",|->", spec)
    return "nh" in spec and all("nh" in term or not {"n", "h"} & {*term} for term in terms)


def _multiply(spec: str, mixed: bool, a: jax.Array, b: jax.Array) -> jax.Array:
    kind = jnp.bfloat16 if mixed else a.dtype
    a, b = a.astype(kind), b.astype(kind)
    first, second, result = re.split(",|->", spec)
    if _of_heads(spec):
        # as one axis: XLA (jax 0.10) would sum over h before n, and copy both operands for it
        term, x = (first, a) if "nh" in first else (second, b)
        sizes = x.shape[term.index("nh") :][:2]
        a, b = _reshaped(a, first, (-1,)), _reshaped(b, second, (-1,))
        product = _product(spec.replace("nh", "m"), mixed, a, b)
        return _reshaped(product, result, sizes, "m")
    # the operand whose index comes first in the result goes first: XLA's CPU runtime (jax 0.10)
    # has no bfloat16 product whose result is transposed
    leading = next((i for i in result if (i in first) != (i in second)), "")
    if mixed and leading in second and leading not in first:
        spec, a, b = f"{second},{first}->{result}", b, a
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32 if mixed else None)


_product = jax.custom_vjp(_multiply, nondiff_argnums=(0, 1))


def _reshaped(x: jax.Array, term: str, sizes: tuple[int, ...], old: str = "nh") -> jax.Array:
    """``x`` of axes ``term`` with axes of these sizes for its ``old`` ones, if it has those."""
    if "nh" not in term:
        return x
    at = term.index("nh")
    return x.reshape(*x.shape[:at], *sizes, *x.shape[at + len(old) :])


def _product_forward(spec, mixed, a, b):
    # An operand is kept for the gradient of the other, so beside frozen weights no activation is.
    # A weight is kept uncast: in a loop over layers, the cast ones would be a copy of all weights.
    like = jnp.zeros((0,), a.value.dtype), jnp.zeros((0,), b.value.dtype)
    a_learned, b_learned, (a, b) = a.perturbed, b.perturbed, (a.value, b.value)
    if mixed:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    residuals = a if b_learned else None, b if a_learned else None
    return _product(spec, mixed, a, b), (*residuals, *like)


def _product_backward(spec, mixed, residuals, cotangent):
    # without this, JAX would multiply the float32 cotangent by the operands in float32
    a, b, like_a, like_b = residuals
    names, result = spec.split("->")
    first, second = names.split(",")
    grad_a: jax.Array | None = None
    grad_b: jax.Array | None = None
    if not isinstance(cotangent, SymbolicZero):
        if b is not None:
            product = _product(f"{result},{second}->{first}", mixed, cotangent, b)
            grad_a = product.astype(like_a.dtype)
        if a is not None:
            product = _product(f"{first},{result}->{second}", mixed, a, cotangent)
            grad_b = product.astype(like_b.dtype)
    return grad_a, grad_b


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def head(
    y: Float[Array, "B T D"], table: Weight, mixed: bool = False, tied: bool = False
) -> Float[Array, "B T V"]:
    """Float32 logits of every word; the table is [D, V] or, tied to the embedding, [V, D].

    It is not transposed for the latter: XLA's CPU runtime (jax 0.10) has no bfloat16 product
    with a transposed result, which the table's gradient would be.
    """
    spec = "btd,vd->btv" if tied else "btd,dv->btv"
    plain = dequantize(table, y.dtype)
    if mixed:
        return matmul(spec, y, plain, mixed=True)
    return jnp.einsum(spec, y, plain.astype(y.dtype), preferred_element_type=jnp.float32)


def float32_product(spec: str, a: jax.Array, b: jax.Array, mixed: bool) -> Float[Array, "..."]:
    """``jnp.einsum(spec, a, b)`` with a float32 result; ``mixed`` as in ``matmul``."""
    if mixed:
        return matmul(spec, a, b, mixed=True)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
