"""Virtual tokens: soft-prompt vectors are extra vocabulary.

With V rows in the embedding table, id ``V + k * P + p`` is vector p of prompt k in a bank [K, P,
D]. Where a prompt stands, which prompt a row uses, how many prompts share a batch: all of it is a
choice of ids, and the model needs to know nothing about any of it.

Letters used everywhere in the package: B batch, S input length, T target length, D d_model, N
heads, H head dim, F mlp dim, V vocabulary rows (of the embedding table, not of the tokenizer), L
layers, K members (prompts), P prompt length.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class VirtualTokens(NamedTuple):
    """Which virtual tokens stand in a row: those of one prompt in a bank [K, P, D]."""

    vocab_rows: int  # V, rows of the embedding table
    length: int  # P
    prompt: int = 0  # k


def virtual_ids(vocab_rows: int, length: int, prompt: int = 0) -> Int[np.ndarray, " P"]:
    """Ids of the ``length`` vectors of prompt number ``prompt``, above a table of ``vocab_rows``.

    >>> virtual_ids(32128, 3, prompt=1)
    array([32131, 32132, 32133], dtype=int32)
    """
    return np.arange(length, dtype=np.int32) + np.int32(vocab_rows + prompt * length)


def embed(
    ids: Int[Array, "B S"], table: Float[Array, "V D"], bank: Float[Array, "K P D"] | None
) -> Float[Array, "B S D"]:
    """Look up words in ``table`` and virtual tokens in ``bank``; the result has the table's dtype.

    The two are gathered apart and selected, never concatenated: a concatenation would copy V x D
    numbers each step. The bank stays float32 and is cast here, so its optimizer sees full
    precision.
    """
    rows = table.shape[0]
    words = jnp.take(table, jnp.minimum(ids, rows - 1), axis=0)
    if bank is None:
        return words
    flat = bank.reshape(-1, bank.shape[-1]).astype(table.dtype)
    vectors = jnp.take(flat, jnp.clip(ids - rows, 0, flat.shape[0] - 1), axis=0)
    return jnp.where((ids >= rows)[..., None], vectors, words)
