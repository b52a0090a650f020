"""Multitask prompt tuning (Wang et al. 2023, arXiv 2303.02861), the stage on the target task.

The prompt of a task is a shared prompt, multiplied in each place by a matrix of rank 1:
P_k = P * (u v^T). Each member has a shared prompt of its own, so that it is trained as if it were
alone. It starts from ``prompt.init``: usually from a file with the prompt of the source tasks.

The source stage is not here: one shared prompt trained on several tasks at once, and distilled from
prompts that were tuned on each of them. A mixture of tasks gives such a prompt, without distilling.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.schema import PromptConfig
from jaxprompt.methods.base import Method, members_of
from jaxprompt.models.injection import Injection, Params

# The paper's two rates: 0.3 for the shared prompt, 0.4 for u and v. An update of Adam or Adafactor
# has the size of the rate alone, so a leaf that is stored divided by c learns c times as fast
RATIO = 0.4 / 0.3


def init(
    params: Params, start: Float[np.ndarray, "K P D"], config: PromptConfig, seed: int
) -> dict[str, Array]:
    """The start vectors as the shared prompt, and u = v = 1: a prompt starts where they are."""
    _, length, width = start.shape
    ones = {"u": np.full(length, 1 / RATIO), "v": np.full(width, 1 / RATIO)}
    return {"prompt": jnp.asarray(start, jnp.float32), **members_of(ones, start)}


def inject(trainables: dict[str, Array], params: Params) -> Injection:
    """The shared prompt times u along the positions and v along the width."""
    u, v = RATIO * trainables["u"], RATIO * trainables["v"]
    return Injection(trainables["prompt"] * u[:, :, None] * v[:, None, :])


MULTITASK_PROMPT_TUNING = Method(init, inject)
