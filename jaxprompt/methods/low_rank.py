"""Prompts of low rank: decomposed prompt tuning (Xiao et al. 2023, arXiv 2310.10094).

The vectors are the product of two matrices, P = A B / sqrt(r) with A [P, r] and B [r, D]: r (P + D)
parameters instead of P D. An artefact holds the product.

A starts with unit variance and is divided by the square root of its number of columns where it is
used, so that one learning rate suits both leaves.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.schema import PromptConfig
from jaxprompt.methods.base import Method
from jaxprompt.models.injection import Injection, Params


def init(
    params: Params, start: Float[np.ndarray, "K P D"], config: PromptConfig, seed: int
) -> dict[str, Array]:
    """Factors whose product is nearest to the start vectors: their truncated SVD.

    A prompt starts at the start vectors only where they have no higher rank. Those of 100 words
    lose most of what tells them apart. The authors' code starts from factors that are uniform in
    [-0.5, 0.5].
    """
    _, length, _ = start.shape
    u, values, v = np.linalg.svd(np.asarray(start, np.float64), full_matrices=False)
    left = u[:, :, : config.rank] * length**0.5
    right = (values[:, :, None] * v)[:, : config.rank] / length**0.5
    rank = left.shape[-1]
    return {"a": jnp.asarray(left, jnp.float32), "b": jnp.asarray(right * rank**0.5, jnp.float32)}


def inject(trainables: dict[str, Array], params: Params) -> Injection:
    """The product of the factors."""
    a, b = trainables["a"], trainables["b"]
    return Injection(jnp.einsum("kpr,krd->kpd", a, b) / a.shape[-1] ** 0.5)


LOW_RANK_PROMPT_TUNING = Method(init, inject)
