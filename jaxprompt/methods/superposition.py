"""Prompts as superpositions of word embeddings, after SadraeiJavaheri et al. 2024.

In arXiv 2406.05279 vectors are superpositions of embeddings of sampled words. Here one basis serves
all vectors and is trained along. It holds the usual start vectors, so this method starts where
prompt tuning does. An artefact holds the vectors that the superpositions give.

The mixture starts with a variance of its number of columns and is divided by the square root of it
where it is used, so that one learning rate suits both leaves.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.schema import PromptConfig
from jaxprompt.methods.base import Method
from jaxprompt.models.injection import Injection, Params


def num_start_vectors(config: PromptConfig) -> int:
    """Rows of the basis."""
    return max(config.basis, config.length)


def init(
    params: Params, start: Float[np.ndarray, "K R D"], config: PromptConfig, seed: int
) -> dict[str, Array]:
    """A mixture that picks the first P of the R start vectors."""
    count, words, _ = start.shape
    mixture = np.eye(config.length, words, dtype=np.float32) * words**0.5
    return {
        "mixture": jnp.tile(jnp.asarray(mixture), (count, 1, 1)),
        "basis": jnp.asarray(start, jnp.float32),
    }


def inject(trainables: dict[str, jax.Array], params: Params) -> Injection:
    """Each vector is a weighted sum of the rows of the basis."""
    mixture, basis = trainables["mixture"], trainables["basis"]
    return Injection(jnp.einsum("kpm,kmd->kpd", mixture, basis) / mixture.shape[-1] ** 0.5)


SUPERPOSITION_PROMPT_TUNING = Method(init, inject, num_start_vectors=num_start_vectors)
