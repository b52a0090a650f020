"""Attention by kernels that keep logits out of memory, maintained by others (letters: layers.py).

cuDNN's, as ``jax.nn.dot_product_attention`` calls it, for NVIDIA GPUs, and JAX's own in Pallas for
TPUs. Both compute as Dao et al. (2022, arXiv 2205.14135) do and take T5's bias. They give its
gradient whether it is asked for or not, Pallas's as one [N, S, S] for each row; so large is cuDNN's
bias too, in which what each row sees is written, where examples share rows.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxprompt.config.errors import UserError
from jaxprompt.models.ops import layers

KERNELS = {"gpu": "cudnn", "tpu": "pallas"}
# widths are multiples of these
_STEPS = {"cudnn": 2, "pallas": 128}
# fewer and larger ones are faster
_BLOCKS = (128, 256, 512)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["segments", "lengths", "mask"], meta_fields=["kernel"],
)  # fmt: skip
@dataclass(frozen=True)
class Rows:
    """What positions of a batch see of their own row, and the kernel that computes it.

    Rows are as wide as it takes them, which may be more than they were.
    """

    segments: Int[Array, "B S"]
    lengths: Int[Array, " B"] | None  # where each row is one segment
    mask: Bool[Array, "B 1 S S"] | None  # where several share a row
    kernel: str


def kernel(flash: bool, dtype: str, mesh: Mesh | None, backend: str | None = None) -> str:
    """The kernel that is meant by ``flash`` on a backend, this one if None; "" for none.

    Raises UserError where there is none for backend, dtype or mesh.
    """
    if not flash:
        return ""
    backend, parts = backend or jax.default_backend(), 1 if mesh is None else mesh.shape["tensor"]
    found = KERNELS.get(backend)
    if found is None:
        raise UserError(
            f"model.flash is on and JAX runs on {backend}; there are flash kernels for "
            f"{' and '.join(KERNELS)}, leave the key out."
        )
    if dtype == "float32":
        raise UserError(
            "model.flash is on and model.dtype is float32; flash kernels multiply in bfloat16, "
            "set model.dtype to mixed or bfloat16."
        )
    if parts > 1:
        raise UserError(
            f"model.flash is on and mesh.tensor is {parts}; flash kernels are used where a device "
            "has all heads, set mesh.tensor to 1."
        )
    return found


def rows(segments: Int[Array, "B S"], kernel: str, packed: bool) -> Rows:
    """What is seen in a batch. packed: whether rows may have more than one segment."""
    segments = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % _STEPS[kernel])))
    lengths = mask = None
    if kernel == "cudnn" and packed:
        mask = layers.segment_mask(segments, segments)
    elif kernel == "cudnn":
        # of no keys at all there would be no mean
        lengths = jnp.maximum(jnp.sum(segments > 0, axis=1, dtype=jnp.int32), 1)
    return Rows(segments, lengths, mask, kernel)


def attention(
    query: Float[Array, "B S N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    bias: Float[Array, "1 N S S"],
    seen: Rows,
) -> Float[Array, "B S N H"]:
    """``layers.attention`` with operands rounded to bfloat16, for positions that are no padding.

    The result has the dtype of the query. cuDNN's kernel rounds the bias too. All is NaN where it
    was told that each row is one segment, and one has more.
    """
    size = query.shape[1]
    more = 0, seen.segments.shape[1] - size
    wide = [jnp.pad(x.astype(jnp.bfloat16), ((0, 0), more, (0, 0), (0, 0)))
            for x in (query, key, value)]  # fmt: skip
    compute = _cudnn if seen.kernel == "cudnn" else _pallas
    found = compute(wide, jnp.pad(bias, ((0, 0), (0, 0), more, more)), seen)
    return found[:, :size].astype(query.dtype)


def _cudnn(three, bias, seen: Rows):
    query, key, value = three
    found = jax.nn.dot_product_attention(
        query, key, value, bias.astype(query.dtype), seen.mask, scale=1.0,
        query_seq_lengths=seen.lengths, key_value_seq_lengths=seen.lengths, implementation="cudnn",
    )  # fmt: skip
    if seen.mask is not None:
        return found
    return found + jnp.where(jnp.max(seen.segments) > 1, jnp.nan, 0.0)


def _pallas(three, bias, seen: Rows):
    from jax.experimental.pallas.ops.tpu import flash_attention as tpu

    block = max(width for width in _BLOCKS if three[0].shape[1] % width == 0)
    names = [name for name in tpu.BlockSizes.__dataclass_fields__ if name != "block_b"]
    blocks = tpu.BlockSizes(block_b=1, **dict.fromkeys(names, block))

    def of_row(segments, *three):
        # a row by itself, so that all read one bias
        ids = tpu.SegmentIds(segments[None], segments[None])
        three = [x.swapaxes(0, 1)[None] for x in three]
        found: Any = tpu.flash_attention(*three, bias, ids, sm_scale=1.0, block_sizes=blocks)
        return found[0].swapaxes(0, 1)

    return jax.vmap(of_row)(seen.segments, *three)
