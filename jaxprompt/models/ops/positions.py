"""T5's relative positions: a learned bias for each bucket of the distance from query to key.

Source: Raffel et al. 2020 (arXiv 1910.10683), section 2.1.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def relative_buckets(
    offsets: Int[Array, "..."], *, bidirectional: bool, buckets: int, max_distance: int
) -> Int[Array, "..."]:
    """Bucket number of each offset (key position - query position).

    Half of the buckets are exact distances. The other half grow logarithmically up to
    ``max_distance``; all distances beyond it share the last bucket. A bidirectional stack gives
    half of the buckets to keys after the query; a causal one has only distances to the past.
    """
    if bidirectional:
        buckets //= 2
        first = (offsets > 0).astype(jnp.int32) * buckets
        distance = jnp.abs(offsets)
    else:
        first = jnp.zeros_like(offsets)
        distance = jnp.maximum(-offsets, 0)
    exact = buckets // 2
    # max(1) guards log(0) in the branch that the select discards
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
    relative position. Packed rows therefore need no positions of their own, and the whole batch
    shares one bias.
    """
    offsets = keys[None, :] - queries[:, None]
    numbers = relative_buckets(
        offsets, bidirectional=bidirectional, buckets=table.shape[0], max_distance=max_distance
    )
    return jnp.take(table, numbers, axis=0).transpose(2, 0, 1)[None]


def bias_of_offsets(
    table: Float[Array, "R N"],
    offsets: Int[Array, "#B T S"],
    *,
    bidirectional: bool,
    max_distance: int,
) -> Float[Array, "#B N T S"]:
    """``relative_bias`` of rows whose positions differ, and of a prefix's keys.

    Args:
        table: of R buckets.
        offsets: of each key from each query. Those of a prefix: see ``prefix_offsets``.
        bidirectional: whether the table has buckets of keys after a query.
        max_distance: from which on all distances share a bucket.
    """
    numbers = relative_buckets(
        offsets, bidirectional=bidirectional, buckets=table.shape[0], max_distance=max_distance
    )
    return jnp.take(table, numbers, axis=0).transpose(0, 3, 1, 2)


def prefix_offsets(queries: Int[Array, "#B T"], length: int) -> Int[Array, "#B T {length}"]:
    """From each query to the keys of a prefix, whose positions are -P to -1.

    Args:
        queries: their positions in their own segment, before which the prefix is.
        length: P.
    """
    return jnp.arange(-length, 0) - queries[:, :, None]
