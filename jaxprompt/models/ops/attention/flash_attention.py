"""Flash attention: kernels of cuDNN and Pallas, which never write the logits to memory.

On NVIDIA GPUs it is cuDNN's kernel, which ``jax.nn.dot_product_attention`` calls; on TPUs it is
JAX's own in Pallas. Both compute as Dao et al. (2022, arXiv 2205.14135) do and take T5's bias. Both
compute the bias's gradient even where it is not used; Pallas's kernel makes one [N, S, S] for
each row. Where examples share rows, cuDNN's kernel has a bias of that size too, since the mask of
each row is written into it. Letters: see ``jaxprompt.data.virtual_tokens``.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxprompt.config.errors import UserError
from jaxprompt.models.ops.attention.prefix import Part
from jaxprompt.models.ops.segments import segment_mask

KERNELS = {"gpu": "cudnn", "tpu": "pallas"}
# widths are multiples of these
_STEPS = {"cudnn": 2, "pallas": 128}
# fewer and larger ones are faster
_BLOCKS = (128, 256, 512)


@no_type_check  # JAX also builds it from objects that are not arrays
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["segments", "lengths", "allowed"], meta_fields=["kernel"],
)  # fmt: skip
@dataclass(frozen=True)
class FlashMask:
    """Each position attends to its own segment of its row, by a flash kernel.

    The arrays are as wide as the kernel needs them, which may be wider than the rows.
    """

    segments: Int[Array, "B S"]
    lengths: Int[Array, " B"] | None  # where each row is one segment
    allowed: Bool[Array, "B 1 S S"] | None  # where several share a row
    kernel: str  # cudnn | pallas

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T N H"],
        value: Float[Array, "B T N H"],
        bias: Float[Array, "1 N T T"] | None = None,
        *,
        mixed: bool = False,
    ) -> Float[Array, "B T N H"]:
        """Attention with operands rounded to bfloat16, see ``AttentionMask``.

        The result has the dtype of the query; at padding it means nothing. cuDNN's kernel rounds
        the bias too. The result is NaN where the mask was made for rows of one segment each, and a
        row has more.
        """
        size = query.shape[1]
        if bias is None:
            raise ValueError("Flash kernels are used with T5's bias; give one.")
        more = 0, self.segments.shape[1] - size
        wide = [jnp.pad(x.astype(jnp.bfloat16), ((0, 0), more, (0, 0), (0, 0)))
                for x in (query, key, value)]  # fmt: skip
        compute = _cudnn if self.kernel == "cudnn" else _pallas
        y = compute(wide, jnp.pad(bias, ((0, 0), (0, 0), more, more)), self)
        return y[:, :size].astype(query.dtype)

    def attend_part(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T N H"],
        value: Float[Array, "B T N H"],
        bias: Float[Array, "1 N T T"] | None = None,
        *,
        mixed: bool = False,
    ) -> Part:
        """Refused: the kernels' log totals have no gradient."""
        raise UserError(
            "model.flash is on and prefix.places has encoder; flash kernels have no attention to "
            "a prefix, leave model.flash out or set prefix.places to [decoder, cross]."
        )


def kernel(flash: bool, dtype: str, mesh: Mesh | None, backend: str | None = None) -> str:
    """The kernel that ``flash`` means on a backend; "" for none.

    Args:
        flash: the setting ``model.flash``.
        dtype: the setting ``model.dtype``, resolved.
        mesh: of the devices, or None for one.
        backend: cpu, gpu or tpu; None for that of this process.

    Raises:
        UserError: there is no kernel for the backend, the dtype or the mesh.
    """
    if not flash:
        return ""
    backend, parts = backend or jax.default_backend(), 1 if mesh is None else mesh.shape["tensor"]
    name = KERNELS.get(backend)
    if name is None:
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
    return name


def flash_mask(segments: Int[Array, "B S"], kernel: str, packed: bool) -> FlashMask:
    """The mask of a batch. packed: whether rows may have more than one segment."""
    segments = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % _STEPS[kernel])))
    lengths = allowed = None
    if kernel == "cudnn" and packed:
        allowed = segment_mask(segments, segments)
    elif kernel == "cudnn":
        # an empty row attends to one key: there is no softmax over none
        lengths = jnp.maximum(jnp.sum(segments > 0, axis=1, dtype=jnp.int32), 1)
    return FlashMask(segments, lengths, allowed, kernel)


def _cudnn(three: Sequence[jax.Array], bias: jax.Array, mask: FlashMask) -> jax.Array:
    query, key, value = three
    y = jax.nn.dot_product_attention(
        query, key, value, bias.astype(query.dtype), mask.allowed, scale=1.0,
        query_seq_lengths=mask.lengths, key_value_seq_lengths=mask.lengths, implementation="cudnn",
    )  # fmt: skip
    if mask.allowed is not None:
        return y
    return y + jnp.where(jnp.max(mask.segments) > 1, jnp.nan, 0.0)


def _pallas(three: Sequence[jax.Array], bias: jax.Array, mask: FlashMask) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import flash_attention as tpu

    block = max(width for width in _BLOCKS if three[0].shape[1] % width == 0)
    names = [name for name in tpu.BlockSizes.__dataclass_fields__ if name != "block_b"]
    blocks = tpu.BlockSizes(block_b=1, **dict.fromkeys(names, block))

    def of_row(segments, *three):
        # rows are computed one by one, so that all read one bias
        ids = tpu.SegmentIds(segments[None], segments[None])
        three = [x.swapaxes(0, 1)[None] for x in three]
        y = tpu.flash_attention(*three, bias, ids, sm_scale=1.0, block_sizes=blocks)
        return y[0].swapaxes(0, 1)

    return jax.vmap(of_row)(mask.segments, *three)
