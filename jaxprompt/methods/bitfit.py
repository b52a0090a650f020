"""BitFit: biases are trained (Ben Zaken et al. 2021, arXiv 2106.10199).

T5 and most decoder-only models have none. As in T-Few's code, biases of zeros are added to the
results of all projections, and the norms may be trained along.
"""

import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.methods import STACKS, BitfitConfig
from jaxprompt.config.schema import PromptConfig
from jaxprompt.methods.base import Method, members_of, no_start_vectors
from jaxprompt.methods.layers import kernels, nested
from jaxprompt.methods.norm_tuning import norm_starts
from jaxprompt.models.injection import Injection, Params, Projection


def bitfit(config: BitfitConfig) -> Method:
    """The method of these settings.

    Its leaves are named by the weight whose results they are added to, [K, L, *outputs], or by the
    scale of a norm.
    """

    def init(
        params: Params, start: Float[np.ndarray, "K R D"], prompt: PromptConfig, seed: int
    ) -> dict[str, Array]:
        leaves = norm_starts(params) if config.norms else {}
        for kernel in kernels(params, STACKS):
            shape = (kernel.layers, *kernel.outputs)
            leaves["/".join(kernel.path)] = np.zeros(shape, np.float32)
        return members_of(leaves, start)

    def inject(trainables: dict[str, Array], params: Params) -> Injection:
        changes = {
            name: leaf if name.endswith("/scale") else Projection(bias=leaf)
            for name, leaf in trainables.items()
        }
        return Injection(layers=nested(changes))

    return Method(init, inject, num_start_vectors=no_start_vectors, uses_prompt=False)
