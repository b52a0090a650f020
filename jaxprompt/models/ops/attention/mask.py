"""The attention mask: it says which keys a query attends to, and knows the kernel that computes it.

Every kernel has a file here with a mask of its own: ``DenseMask`` (whole rows), ``PerExampleMask``
(one example after another, which CPUs are fast at) and ``FlashMask`` (accelerators' kernels). A
mask is a pytree that is made once for all layers. Letters: see ``jaxprompt.data.virtual_tokens``;
R is B, or G B where each of the G examples of a row is answered in a row of its own.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from jaxprompt.models.base import Model, Runtime
from jaxprompt.models.injection import Prefix, Projection
from jaxprompt.models.ops.attention import flash_attention, per_example
from jaxprompt.models.ops.attention.dense import dense_mask
from jaxprompt.models.ops.attention.prefix import Part, with_prefix
from jaxprompt.models.ops.changes import low_rank_of_heads, scaled, transposed_low_rank
from jaxprompt.models.ops.matmul import dense
from jaxprompt.models.ops.quantization import Weight
from jaxprompt.models.ops.segments import segment_mask


@runtime_checkable
class AttentionMask(Protocol):
    """Which keys each query attends to."""

    def attend(
        self,
        query: Float[Array, "R T N H"],
        key: Float[Array, "B S N H"],
        value: Float[Array, "B S N H"],
        bias: Float[Array, "#B N T S"] | None = None,
        *,
        mixed: bool = False,
    ) -> Float[Array, "R T N H"]:
        """Multi-head attention with unscaled logits.

        Args:
            query: of each position and head.
            key: of the positions that are attended to.
            value: likewise.
            bias: added to the logits.
            mixed: products have bfloat16 operands and float32 sums, see ``matmul``.
        """
        ...

    def attend_part(
        self,
        query: Float[Array, "R T N H"],
        key: Float[Array, "B S N H"],
        value: Float[Array, "B S N H"],
        bias: Float[Array, "#B N T S"] | None = None,
        *,
        mixed: bool = False,
    ) -> Part:
        """``attend``, to which attention to other keys can be added."""
        ...


@runtime_checkable
class CrossAttentionMask(AttentionMask, Protocol):
    """Which positions of an encoder each query of a decoder attends to."""

    def attend_to_vectors(
        self,
        query: Float[Array, "R T N D"],
        vectors: Float[Array, "B S D"],
        keep: Float[Array, "B S N"] | None = None,
        *,
        mixed: bool = False,
    ) -> Float[Array, "R T N D"]:
        """Attention to vectors that are both keys and values of all heads.

        Args:
            query: of each position and head, as wide as the vectors.
            vectors: of the positions that are attended to.
            keep: multiplies the weights, by key and head (dropout).
            mixed: as in ``attend``.
        """
        ...

    def attend_part_to_vectors(
        self,
        query: Float[Array, "R T N D"],
        vectors: Float[Array, "B S D"],
        keep: Float[Array, "B S N"] | None = None,
        *,
        mixed: bool = False,
    ) -> Part:
        """``attend_to_vectors``, to which attention to other keys can be added."""
        ...


def encoder_mask(segments: Int[Array, "B S"], model: Model) -> tuple[AttentionMask, int]:
    """The mask of an encoder, in which each segment attends to itself.

    Returns:
        The mask, and the number of positions that its bias is for.
    """
    runtime, widths = model.runtime, model.layout.packed_widths
    rows, length = segments.shape
    if runtime.flash:
        return flash_attention.flash_mask(segments, runtime.flash, packed=bool(widths)), length
    many_logits = rows * model.config.num_heads * length**2 > per_example.LOGITS_AT_ONCE
    if runtime.per_example_attention and (widths or many_logits):
        mask = per_example.per_example_mask(segments, widths)
        return mask, mask.widths[-1]
    return dense_mask(segment_mask(segments, segments)), length


def cross_attention_mask(
    targets: Int[Array, "R T"], inputs: Int[Array, "B S"], packed_widths: tuple[int, ...]
) -> CrossAttentionMask:
    """The mask with which targets attend to the inputs of their segment.

    Args:
        targets: segments. Where R is G B, all of a row is one example (``data.batches.Batch``).
        inputs: segments.
        packed_widths: at which inputs are computed where examples share rows.
    """
    if len(targets) > len(inputs):
        each = len(targets) // len(inputs)
        return per_example.per_example_mask(inputs, packed_widths, queries_per_row=each)
    return dense_mask(segment_mask(targets, inputs))


class UnprojectedKernel(NamedTuple):
    """A kernel of keys or values [D, N, H], and a change of it that has no bias."""

    weight: Weight
    change: Projection | None = None


class CrossKernels(NamedTuple):
    """What the keys and the values of an encoder's output are made with, and a prefix of them.

    prefix: leaves [#R, P, ...].
    """

    key: UnprojectedKernel
    value: UnprojectedKernel
    prefix: Prefix | None = None


def attend_unprojected(
    query: Float[Array, "R T N H"],
    kernels: CrossKernels,
    encoded: Float[Array, "B S D"],
    mask: CrossAttentionMask,
    keep: Float[Array, "B S N"] | None = None,
    member: Int[Array, " B"] | None = None,
    runtime: Runtime = Runtime(),
) -> Float[Array, "R T N H"]:
    """Attention of few queries to ``encoded``, which is not projected to keys and values.

    (x W_q)(e W_k)^T = (x W_q W_k^T) e^T, and likewise for values. So the queries are projected
    instead of the S positions of the encoder, which is less work as long as T < H.

    Args:
        query: of each position and head.
        kernels: of keys and of values. Their prefix is in front of those of ``encoded``.
        encoded: output of the encoder.
        mask: which positions of it each query attends to.
        keep: multiplies the weights, by key and head (dropout).
        member: of each row of inputs, see ``Injection``.
        runtime: how products are computed.
    """
    (key, key_change), (value, value_change), prefix = kernels
    given = query
    if key_change is not None and key_change.scale is not None:
        query = scaled(query, key_change.scale, member)
    projected = dense("btnh,dnh->btnd", query, key, runtime)
    if key_change is not None and key_change.low_rank is not None:
        projected += transposed_low_rank(query, key_change.low_rank, member)
    log_total: Float[Array, "R T N"] | None = None
    if prefix is None:
        attended = mask.attend_to_vectors(projected, encoded, keep, mixed=runtime.mixed)
    else:
        attended, log_total = mask.attend_part_to_vectors(
            projected, encoded, keep, mixed=runtime.mixed
        )
    y = dense("btnd,dnh->btnh", attended, value, runtime)
    if value_change is not None and value_change.low_rank is not None:
        y += low_rank_of_heads(attended, value_change.low_rank, member)
    if value_change is not None and value_change.scale is not None:
        y = scaled(y, value_change.scale, member)
    if prefix is None or log_total is None:
        return y
    return with_prefix(Part(y, log_total), given, prefix)
