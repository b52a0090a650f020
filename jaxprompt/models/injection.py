"""What a tuning method adds to a frozen model: the one thing that a model is given beside weights.

It lies with the models, which read it, and below the methods, which make it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Float

Params = dict[str, Any]


class Injection(NamedTuple):
    """A pytree with K members on the first axis of every leaf but those of ``params``.

    What is None costs nothing: it is decided while tracing.
    """

    # the bank of virtual tokens, see data/virtual_tokens.py
    embeddings: Float[Array, "K P D"] | None = None
    # leaves [K, L, ...] that the layers read, scanned with them along axis 1; no method has any yet
    layers: Mapping[str, Array] | None = None
    # a whole model instead of the frozen one: full fine-tuning and pre-training, of one member
    params: Params | None = None
