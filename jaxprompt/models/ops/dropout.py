"""Dropout that is drawn for an example, not for its place in a batch.

What is dropped of an example is a pure function of the number that it brings along
(``Example.dropout_seed``), however a batch is cut, sorted or shared, on however many devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxprompt.models.ops import layers


class Noise(NamedTuple):
    """What dropout is drawn from in the rows of a stack."""

    numbers: Int[Array, " R"]
    offsets: Int[Array, "#B S"]  # of each position in its example
    owners: Int[Array, "B S"] | None = None  # which of the R a position is of; None: row b of b

    def of_examples(self, key: jax.Array, share: float, size: int) -> Bool[Array, "B _ D"]:
        """True for a ``share`` of the ``size`` places, the same at all positions of an example."""
        keep = jax.vmap(lambda n: _draw(jax.random.fold_in(key, n), share, size))(self.numbers)
        return keep[:, None] if self.owners is None else keep[self.owners]

    def of_positions(self, key: jax.Array, share: float, size: int) -> Bool[Array, "B S N"]:
        """The same, drawn anew at each position."""
        numbers = self.numbers[:, None] if self.owners is None else self.numbers[self.owners]
        numbers, offsets = jnp.broadcast_arrays(numbers, self.offsets)

        def draw(number, offset):
            return _draw(jax.random.fold_in(jax.random.fold_in(key, number), offset), share, size)

        return jax.vmap(jax.vmap(draw))(numbers, offsets)


def _draw(key, share, size):
    return jax.random.bernoulli(key, share, (size,))


def of_rows(numbers: Int[Array, " B"], width: int) -> Noise:
    """For rows of one example each, or of several that drop the same."""
    return Noise(numbers, jnp.arange(width)[None])


def of_inputs(numbers: Int[Array, " R"], segments: Int[Array, "B S"]) -> Noise:
    """For rows of inputs, of which several examples share one if R is G B (``pipeline.Batch``)."""
    rows, width = segments.shape
    if len(numbers) == rows:
        return of_rows(numbers, width)
    owners = jnp.arange(rows)[:, None] * (len(numbers) // rows) + jnp.maximum(segments - 1, 0)
    return Noise(numbers, layers.ranks(segments), owners)
