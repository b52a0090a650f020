"""Segments of a row: examples that share it, numbered from 1; 0 is padding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def segment_mask(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B 1 T S"]:
    """True where query and key are in the same segment. Padding, segment 0, attends to nothing."""
    same = queries[:, :, None] == keys[:, None, :]
    return (same & (keys[:, None, :] > 0))[:, None]


def positions_in_segments(segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The position of each token in its segment.

    segments [1 1 2 2 2 0] -> [0 1 0 1 2 0].
    """
    positions = jnp.arange(segments.shape[1])
    first = segments != jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return positions - jax.lax.cummax(jnp.where(first, positions, 0), axis=1)


def last_of_segment(segments: Int[Array, "B S"]) -> Bool[Array, "B S"]:
    """Whether a token is the last one of its segment (never padding)."""
    following = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    return (segments > 0) & (segments != following)


def shift_right(
    targets: Int[Array, "B T"], segments: Int[Array, "B T"], start_id: int | Int[Array, "B T"]
) -> Int[Array, "B T"]:
    """Decoder inputs for teacher forcing: each segment starts with ``start_id``.

    start_id: one id, or one for each position where a segment may start.

    targets  [7 8 1 9 1 0], segments [1 1 1 2 2 0]  ->  [0 7 8 0 9 0] for start id 0.
    """
    shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
    previous = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(previous == segments, shifted, start_id)
