"""Methods that train the whole model: full fine-tuning, the paper's baseline, and pre-training."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from jaxprompt.config.schema import PromptConfig
from jaxprompt.methods import prompt
from jaxprompt.methods.base import Method
from jaxprompt.models.injection import Injection, Params

Model = dict[str, PyTree]  # parameters with axis K of one member


def init_model(
    params: Params, start: Float[np.ndarray, "K R D"], config: PromptConfig, seed: int
) -> Model:
    """A float32 copy: frozen parameters may be bfloat16, and a step donates what it trains."""
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True)[None], params)


def _single_member(model: Model) -> Params:
    return jax.tree.map(lambda x: x[0], model)


def inject_model(trainables: Model, params: Params) -> Injection:
    """The trained model instead of the frozen one."""
    return Injection(params=_single_member(trainables))


def _init_with_prompts(
    params: Params, start: Float[np.ndarray, "K P D"], config: PromptConfig, seed: int
) -> dict[str, PyTree]:
    vectors = prompt.init(params, start, config, seed) if start.size else {}
    return {"model": init_model(params, start, config, seed), **vectors}


def _inject_both(trainables: dict[str, PyTree], params: Params) -> Injection:
    return Injection(trainables.get("prompt"), params=_single_member(trainables["model"]))


MODEL_TUNING = Method(
    init_model,
    inject_model,
    num_start_vectors=lambda config: 0,
    uses_prompt=False,
    frozen=False,
)

# the backbone and, where the mixture has them, virtual tokens. It is in no registry: its result is
# a backbone, not something tuned on one
PRETRAINING = Method(
    _init_with_prompts,
    _inject_both,
    frozen=False,
)
