"""Frozen weights in 8 or 4 bits, dequantized where a product uses them (qwix does the arithmetic).

A quantized weight is a ``qwix.QArray``: integers and the scales that they are multiplied with. int8
has one scale for each output of the product. int4 and nf4 (Dettmers et al. 2023, arXiv 2305.14314)
have one for each 32 inputs of an output.
"""

import importlib
import math
from typing import Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jaxprompt.config.errors import UserError
from jaxprompt.models.precision import from_bits

# parameters that are operands of products and nothing else
MATMUL_WEIGHTS = ("query", "key", "value", "out", "wi", "wi_0", "wi_1", "wo", "head")
GROUP = 32
BITS = {"int8": 8, "int4": 4, "nf4": 4}


@runtime_checkable
class QuantizedArray(Protocol):
    """A ``qwix.QArray``, as far as this package reads it."""

    qvalue: jax.Array
    scale: jax.Array


# a weight of a product: numbers, the bits of bfloat16 numbers as uint16, or a quantized array
Weight = jax.Array | QuantizedArray


def check_installed() -> None:
    """Raise UserError where qwix is missing."""
    try:
        importlib.import_module("qwix")
    except ImportError as error:
        raise UserError(
            "model.quantization needs the package qwix; install it with "
            "pip install 'jaxprompt[small]'"
        ) from error


def quantize(weight: jax.Array, axes: tuple[str, ...], kind: str, parts: int = 1) -> QuantizedArray:
    """A weight of a product as a ``qwix.QArray``.

    Args:
        weight: in any float dtype.
        axes: its logical axes.
        kind: int8, int4 or nf4.
        parts: into which the model's dimension will be cut.

    Raises:
        UserError: a cut would be within a group that shares a scale.
    """
    import qwix

    inputs = _inputs(axes)
    groups = {}
    if kind != "int8":
        last = inputs[-1]
        size = math.gcd(weight.shape[last], GROUP)
        if axes[last] == "embed" and parts > 1:
            part = weight.shape[last] // parts
            if part % size or part == size:
                raise UserError(
                    f"model.quantization is {kind!r}, whose groups of {size} mesh.fsdp, {parts}, "
                    "would cut; use a smaller mesh.fsdp, or int8."
                )
        groups, inputs = {last: size}, inputs[-1:]
    outputs = [i for i in range(len(axes)) if i not in inputs]
    return qwix.quantize(
        weight, kind, channelwise_axes=outputs, tiled_axes=groups, scale_dtype=jnp.float32
    )


def bytes_each(kind: str, axes: tuple[str, ...], shape: tuple[int, ...]) -> float:
    """Bytes that each number of a weight takes, its share of a float32 scale included."""
    inputs = [shape[i] for i in _inputs(axes)]
    shared = math.prod(inputs) if kind == "int8" else math.gcd(inputs[-1], GROUP)
    return BITS[kind] / 8 + 4 / shared


def view_as_uint16(params: PyTree) -> PyTree:
    """Parameters with the layers' bfloat16 operands on CPUs as uint16 in the same memory.

    A loop slices the layers from them, see ``precision.to_bits``. Not for weights that are to have
    gradients.
    """

    def view(path, leaf):
        names = [getattr(part, "key", "") for part in path]
        if "layers" not in names or names[-1] not in MATMUL_WEIGHTS or isinstance(leaf, Tracer):
            return leaf
        if not isinstance(leaf, jax.Array):
            return leaf
        if leaf.dtype != jnp.bfloat16 or next(iter(leaf.devices())).platform != "cpu":
            return leaf
        parts = [
            jax.device_put(np.asarray(shard.data).view(np.uint16), shard.device)
            for shard in leaf.addressable_shards
        ]
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)

    return jax.tree_util.tree_map_with_path(view, params)


def is_quantized(weight: Weight) -> bool:
    """Whether a weight is stored in another form than it is used in; then it is frozen."""
    return not isinstance(weight, jax.Array) or weight.dtype == jnp.uint16


def dequantize(stored: Weight, dtype: DTypeLike) -> jax.Array:
    """The numbers of a weight: of a quantized array in ``dtype``, of bits in bfloat16.

    A weight that is not quantized is returned as it is.
    """
    if isinstance(stored, jax.Array):
        return from_bits(stored) if is_quantized(stored) else stored
    import qwix

    return qwix.dequantize(cast("qwix.QArray", stored)).astype(dtype)


def count(params: PyTree) -> int:
    """How many numbers a tree of weights has, scales not counted."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: not isinstance(x, dict))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def _inputs(axes: tuple[str, ...]) -> list[int]:
    """The axes that a product sums over; they come first, after that of the layers."""
    first = 1 if axes[0] == "layers" else 0
    if axes[first] == "embed":
        return [first]
    return list(range(first, len(axes) - 1))
