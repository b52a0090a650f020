"""What a tuning method adds to a frozen model: its only input besides weights and a batch.

It is defined with the models, which read it. The methods, which make it, are a layer above.
"""

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Array, Float, PyTree

Params = dict[str, PyTree]


class KeyValues(NamedTuple):
    """Keys and values of an attention with G heads; a leading L where layers are stacked."""

    key: Float[Array, "*L B S G H"]
    value: Float[Array, "*L B S G H"]


class Injection(NamedTuple):
    """A pytree with K members on the first axis of every leaf of ``embeddings`` and ``layers``.

    What is None costs nothing: it is decided while tracing. A method yields one; ``Model.prepare``
    fills in what the model computes of it once for all batches.
    """

    # the bank of virtual tokens, see data/virtual_tokens.py
    embeddings: Float[Array, "K P D"] | None = None
    # leaves [K, L, ...] that the layers read, scanned with them along axis 1; no method has any yet
    layers: Mapping[str, Array] | None = None
    # a whole model instead of the frozen one: full fine-tuning and pre-training, of one member
    params: Params | None = None
    # keys and values [L, K, P, G, H] of embeddings that lead every row; ``Model.prepare`` alone
    # makes them
    shared_prefix: KeyValues | None = None
