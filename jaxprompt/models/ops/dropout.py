"""Dropout that is drawn for an example, not for its place in a batch.

What is dropped of an example is a pure function of the seed that it brings along
(``Example.dropout_seed``). It does not depend on how a batch is cut, sorted or packed, nor on the
number of devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxprompt.models.ops.segments import positions_in_segments


class DropoutSeeds(NamedTuple):
    """The seeds from which dropout is drawn in the rows of a stack."""

    seeds: Int[Array, " R"]
    positions: Int[Array, "#B S"]  # of each token in its example
    examples: Int[Array, "B S"] | None = None  # the example of each token; None: row b is example b

    def keep_per_example(
        self, key: PRNGKeyArray, rate: float, size: int
    ) -> Bool[Array, "B _ {size}"]:
        """True for a share ``rate`` of the last axis, the same at all positions of an example."""
        keep = jax.vmap(lambda n: _draw(jax.random.fold_in(key, n), rate, size))(self.seeds)
        return keep[:, None] if self.examples is None else keep[self.examples]

    def uniform_per_example(self, key: PRNGKeyArray, size: int) -> Float[Array, "B _ {size}"]:
        """Numbers of [0, 1), the same at all positions of an example."""
        draw = lambda n: jax.random.uniform(jax.random.fold_in(key, n), (size,))
        each = jax.vmap(draw)(self.seeds)
        return each[:, None] if self.examples is None else each[self.examples]

    def keep_per_position(
        self, key: PRNGKeyArray, rate: float, size: int
    ) -> Bool[Array, "B S {size}"]:
        """The same, drawn anew at each position."""
        seeds = self.seeds[:, None] if self.examples is None else self.seeds[self.examples]
        seeds, positions = jnp.broadcast_arrays(seeds, self.positions)

        def draw(seed, position):
            return _draw(jax.random.fold_in(jax.random.fold_in(key, seed), position), rate, size)

        return jax.vmap(jax.vmap(draw))(seeds, positions)


def _draw(key, rate: float, size: int):
    return jax.random.bernoulli(key, rate, (size,))


def seeds_of_rows(seeds: Int[Array, " B"], length: int) -> DropoutSeeds:
    """For rows of one example each, or of several examples that drop the same."""
    return DropoutSeeds(seeds, jnp.arange(length)[None])


def seeds_of_segments(seeds: Int[Array, " R"], segments: Int[Array, "B S"]) -> DropoutSeeds:
    """For rows of inputs; if R is G B, up to G examples share a row (``data.batches.Batch``)."""
    rows, length = segments.shape
    if len(seeds) == rows:
        return seeds_of_rows(seeds, length)
    examples = jnp.arange(rows)[:, None] * (len(seeds) // rows) + jnp.maximum(segments - 1, 0)
    return DropoutSeeds(seeds, positions_in_segments(segments), examples)
