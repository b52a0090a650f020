"""Prompt tuning (Lester et al. 2021): the virtual tokens are the only trainable thing."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.schema import PromptConfig
from jaxprompt.methods.base import Method
from jaxprompt.models.injection import Injection, Params


def init(
    params: Params, start: Float[np.ndarray, "K P D"], config: PromptConfig, seed: int
) -> dict[str, Array]:
    """The start vectors, in float32."""
    return {"prompt": jnp.asarray(start, jnp.float32)}


def inject(trainables: dict[str, jax.Array], params: Params) -> Injection:
    """The vectors themselves."""
    return Injection(trainables["prompt"])


PROMPT_TUNING = Method(init, inject)
