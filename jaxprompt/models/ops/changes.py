"""How a layer applies what a tuning method adds to it, for rows of one member or of several.

Each row gathers the leaves of its own member: a product of [B, D, r] beside one of [D, N H]. Unlike
a mask over the products of all members, this lets no NaN of one member reach the rows of another.
Letters: see ``jaxprompt.data.virtual_tokens``; r is a rank, m the width of an adapter.
"""

import math
import re
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprompt.models.base import Runtime
from jaxprompt.models.injection import Adapter, LabelRows, LowRank, Projection
from jaxprompt.models.ops.activations import ACTIVATIONS
from jaxprompt.models.ops.matmul import dense
from jaxprompt.models.ops.quantization import Weight

# of each row of inputs, for which there may be several rows of targets, so it has its own letter
Member = Int[Array, " inputs"] | None

T = TypeVar("T")


def of_rows(leaves: T, member: Member, rows: int) -> T:
    """Leaves [K, ...] as [R, ...], or as they are where there is one member.

    Args:
        leaves: of all members.
        member: of each of the B rows of inputs; None where K is 1.
        rows: R, a multiple of B: the answers, or the beams, of a row follow each other.
    """
    if member is None:
        return leaves
    each = jnp.repeat(member, rows // len(member))
    return jax.tree.map(lambda leaf: jnp.take(leaf, each, axis=0), leaves)


def label_logits(
    y: Float[Array, "R T D"], labels: LabelRows, member: Member
) -> Float[Array, "R T C"]:
    """The float32 logits of labels; leaves of ``labels`` have K first."""
    rows, bias = of_rows(labels, member, len(y))
    return jnp.matmul(y.astype(jnp.float32), rows.swapaxes(1, 2)) + bias[:, None]


def project(
    spec: str,
    x: Float[Array, "B T ..."],
    weight: Weight,
    change: Projection | None,
    member: Member,
    runtime: Runtime,
    dropped: Float[Array, "B T ..."] | None = None,
) -> Float[Array, "B T ..."]:
    """``dense`` with a change of the projection, see ``Projection``.

    Args:
        spec: as in ``dense``: of x, the weight and the result.
        change: leaves [K, ...]; None for none.
        member: of each row of inputs, see ``of_rows``.
        dropped: what a low-rank change reads instead of ``x``; None: ``x``.
    """
    y = dense(spec, x, weight, runtime)
    if change is None:
        return y
    return changed(y, spec, x if dropped is None else dropped, change, member)


def changed(
    y: Float[Array, "B T ..."],
    spec: str,
    x: Float[Array, "B T ..."],
    change: Projection,
    member: Member,
) -> Float[Array, "B T ..."]:
    """``y``, the product of ``x`` and a frozen weight, with a change of the projection.

    Only a low-rank change reads ``x``.
    """
    if change.low_rank is not None:
        first, second, _ = re.split(",|->", spec)
        summed = sum(letter in first for letter in second)
        y = y + low_rank(x, change.low_rank, member, summed).astype(y.dtype)
    if change.bias is not None:
        y = y + _at_positions(change.bias, y, member)
    return y if change.scale is None else scaled(y, change.scale, member)


def scaled(
    y: Float[Array, "B T ..."], scale: Float[Array, "K ..."], member: Member
) -> Float[Array, "B T ..."]:
    """y (1 + scale), the same at all positions of a row."""
    return y * (1 + _at_positions(scale, y, member))


def _at_positions(leaf: Array, y: Array, member: Member) -> Float[Array, "#B 1 ..."]:
    return jnp.expand_dims(of_rows(leaf, member, len(y)), 1).astype(y.dtype)


def low_rank(
    x: Float[Array, "B T ..."], factors: LowRank, member: Member, summed: int
) -> Float[Array, "B T ..."]:
    """x a b, in the dtype of ``x``, with float32 sums.

    Args:
        summed: how many axes of the weight are summed over: 1 for d or f, 2 for n h.
    """
    a, b = of_rows(factors, member, len(x))
    out, rank = b.shape[2:], b.shape[1]
    flat = x.reshape(*x.shape[:2], -1)
    a = a.reshape(len(a), math.prod(a.shape[1 : 1 + summed]), rank)
    narrow = _times(flat, a)
    return _times(narrow, b.reshape(len(b), rank, -1)).reshape(*x.shape[:2], *out)


def adapted(
    x: Float[Array, "B T D"],
    normed: Float[Array, "B T D"],
    result: Float[Array, "B T D"],
    adapter: Adapter | None,
    member: Member,
) -> Float[Array, "B T D"]:
    """The residual stream behind a sublayer: x + result and, if there is one, what an adapter adds.

    An adapter's products are in the dtype of ``x``, with float32 sums.

    Args:
        x: the residual stream before the sublayer.
        normed: x behind the sublayer's norm.
        result: what the sublayer gives, after its dropout. That of an adapter is not dropped.
        adapter: leaves [K, ...]; None for none. See ``Adapter``.
        member: of each row of inputs, see ``of_rows``.
    """
    total = x + result
    if adapter is None:
        return total
    read = {"output": result, "sum": total, "input": x, "normed": normed}[adapter.reads]
    mine = of_rows(adapter, member, len(x))
    narrow = _times(read.astype(x.dtype), mine.down) + mine.down_bias[:, None].astype(x.dtype)
    wide = _times(ACTIVATIONS[adapter.activation](narrow), mine.up)
    return total + adapter.scale * (wide + mine.up_bias[:, None].astype(x.dtype))


def transposed_low_rank(
    y: Float[Array, "B T N H"], factors: LowRank, member: Member
) -> Float[Array, "B T N D"]:
    """y (a b)^T for each head: queries times the change of the kernel of keys [D, N, H]."""
    a, b = of_rows(factors, member, len(y))
    narrow = jnp.einsum("btnh,#rnh->btnr".replace("#", _rows(b)), y, _drop(b).astype(y.dtype))
    return jnp.einsum("btnr,#dr->btnd".replace("#", _rows(a)), narrow, _drop(a).astype(y.dtype))


def low_rank_of_heads(
    y: Float[Array, "B T N D"], factors: LowRank, member: Member
) -> Float[Array, "B T N H"]:
    """y a b for vectors that each head has of its own, with the kernel's head of that number."""
    a, b = of_rows(factors, member, len(y))
    narrow = jnp.einsum("btnd,#dr->btnr".replace("#", _rows(a)), y, _drop(a).astype(y.dtype))
    return jnp.einsum("btnr,#rnh->btnh".replace("#", _rows(b)), narrow, _drop(b).astype(y.dtype))


def _rows(leaf: Array) -> str:
    return "" if leaf.shape[0] == 1 else "b"


def _drop(leaf: Array) -> Array:
    """The leaf of a single member without its first axis."""
    return leaf[0] if leaf.shape[0] == 1 else leaf


def _times(x: Float[Array, "B T i"], factor: Float[Array, "#B i o"]) -> Float[Array, "B T o"]:
    spec = "bti,io->bto" if len(factor) == 1 else "bti,bio->bto"
    return jnp.einsum(spec, x, _drop(factor).astype(x.dtype))
