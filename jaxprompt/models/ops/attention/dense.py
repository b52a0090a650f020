"""Attention over whole rows: logits of all pairs of queries and keys, and a mask that is added.

Letters: see ``jaxprompt.data.virtual_tokens``. T5 does not divide logits by sqrt(H).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxprompt.models.ops.attention.prefix import Part
from jaxprompt.models.ops.matmul import float32_product, matmul


class DenseMask(NamedTuple):
    """What is added to the logits: 0 where a query attends to a key, else -1e30.

    It is made once for all layers: comparing segments in each layer would cost as much as a matrix
    product. A query that may attend to nothing gets a uniform average: it is finite, and unused.
    """

    added: Float[Array, "#B 1 #T S"]

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S N H"],
        value: Float[Array, "B S N H"],
        bias: Float[Array, "#B N T S"] | None = None,
        *,
        mixed: bool = False,
    ) -> Float[Array, "B T N H"]:
        """Multi-head attention with unscaled logits and float32 softmax, see ``AttentionMask``."""
        logits = self._logits(query, key, bias, mixed)
        return _weighted_sum(logits, value, mixed)

    def attend_part(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S N H"],
        value: Float[Array, "B S N H"],
        bias: Float[Array, "#B N T S"] | None = None,
        *,
        mixed: bool = False,
    ) -> Part:
        """``attend``, to which attention to other keys can be added."""
        logits = self._logits(query, key, bias, mixed)
        log_total = jax.nn.logsumexp(logits, axis=-1).swapaxes(1, 2)
        return Part(_weighted_sum(logits, value, mixed), log_total)

    def _logits(self, query, key, bias, mixed: bool) -> Float[Array, "B N T S"]:
        logits = float32_product("btnh,bsnh->bnts", query, key, mixed) + self.added
        return logits if bias is None else logits + bias

    def attend_to_vectors(
        self,
        query: Float[Array, "B T N D"],
        vectors: Float[Array, "B S D"],
        keep: Float[Array, "B S N"] | None = None,
        *,
        mixed: bool = False,
    ) -> Float[Array, "B T N D"]:
        """Attention to vectors that are both keys and values, see ``CrossAttentionMask``."""
        logits = self._logits_of_vectors(query, vectors, mixed)
        return _weighted_sum_of_vectors(logits, vectors, keep, mixed)

    def attend_part_to_vectors(
        self,
        query: Float[Array, "B T N D"],
        vectors: Float[Array, "B S D"],
        keep: Float[Array, "B S N"] | None = None,
        *,
        mixed: bool = False,
    ) -> Part:
        """``attend_to_vectors``, to which attention to other keys can be added."""
        logits = self._logits_of_vectors(query, vectors, mixed)
        y = _weighted_sum_of_vectors(logits, vectors, keep, mixed)
        return Part(y, jax.nn.logsumexp(logits, axis=-1))

    def _logits_of_vectors(self, query, vectors, mixed: bool) -> Float[Array, "B T N S"]:
        rows, length, heads, width = query.shape
        flat = query.reshape(rows, length * heads, width)
        logits = float32_product("bqd,bsd->bqs", flat, vectors, mixed)
        return logits.reshape(rows, length, heads, -1) + self.added.swapaxes(1, 2)


def _weighted_sum(logits, value, mixed: bool) -> Float[Array, "B T N H"]:
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return matmul("bnts,bsnh->btnh", weights, value, mixed)


def _weighted_sum_of_vectors(logits, vectors, keep, mixed: bool) -> Float[Array, "B T N D"]:
    rows, length, heads, _ = logits.shape
    weights = jax.nn.softmax(logits, axis=-1).astype(vectors.dtype)
    weights = weights if keep is None else weights * keep.swapaxes(1, 2)[:, None]
    weights = weights.reshape(rows, length * heads, -1)
    y = matmul("bqs,bsd->bqd", weights, vectors, mixed)
    return y.reshape(rows, length, heads, -1)


def dense_mask(allowed: Bool[Array, "#B 1 #T S"]) -> DenseMask:
    """The mask of an array that is True where a query may attend to a key."""
    return DenseMask(jnp.where(allowed, 0.0, -1e30))
