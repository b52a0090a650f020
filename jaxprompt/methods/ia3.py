"""IA3: learned scales of keys, values and the MLP (Liu et al. 2022, arXiv 2205.05638, section 3.3).

They are stored as differences to 1. So zeros change nothing, and weight decay pulls there.
"""

import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.methods import IA3Config
from jaxprompt.config.schema import PromptConfig
from jaxprompt.methods.base import Method, members_of, no_start_vectors
from jaxprompt.methods.layers import chosen_kernels, nested
from jaxprompt.models.injection import Injection, Params, Projection


def ia3(config: IA3Config) -> Method:
    """The method of these settings; its leaves are named by what they scale."""
    targets = ["wo" if target == "hidden" else target for target in config.targets]

    def init(
        params: Params, start: Float[np.ndarray, "K R D"], prompt: PromptConfig, seed: int
    ) -> dict[str, Array]:
        leaves = {}
        for kernel in chosen_kernels(params, targets, config.stacks, "ia3.targets"):
            if kernel.name == "wo":  # its inputs are scaled
                name, shape = (*kernel.path[:-1], "hidden"), kernel.inputs
            else:
                name, shape = kernel.path, kernel.outputs
            leaves["/".join(name)] = np.zeros((kernel.layers, *shape))
        return members_of(leaves, start)

    def inject(trainables: dict[str, Array], params: Params) -> Injection:
        changes = {
            name: leaf if name.endswith("/hidden") else Projection(scale=leaf)
            for name, leaf in trainables.items()
        }
        return Injection(layers=nested(changes))

    return Method(init, inject, num_start_vectors=no_start_vectors, uses_prompt=False)
