"""LoRA: low-rank changes of frozen weights (Hu et al. 2021, arXiv 2106.09685).

x W becomes x W + s x A B with s = alpha / r. Recipes and defaults: ``config/methods.py``. DoRA is
in ``methods/dora.py``.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.errors import UserError
from jaxprompt.config.methods import LoraConfig
from jaxprompt.config.schema import PromptConfig
from jaxprompt.methods.base import Method, members_of, no_start_vectors, seeded
from jaxprompt.methods.dora import with_length
from jaxprompt.methods.layers import chosen_kernels, nested, size
from jaxprompt.models.injection import Injection, LowRank, Params, Projection


def lora_scale(config: LoraConfig) -> float:
    """What the product of the factors is multiplied by: alpha / r, or alpha / sqrt(r)."""
    return config.alpha / (config.rank**0.5 if config.rank_stabilized else config.rank)


def lora(config: LoraConfig) -> Method:
    """The method of these settings; its leaves are "PATH/a" [K, L, in, r] and "PATH/b".

    With DoRA there is "PATH/length" [K, L, out], too: what the length of a column differs by from
    the frozen one, as a share of it.
    """

    # with Adam, a leaf that is stored divided by c learns c times as fast
    ratio = config.ratio

    def init(
        params: Params, start: Float[np.ndarray, "K R D"], prompt: PromptConfig, seed: int
    ) -> dict[str, Array]:
        rng, leaves = seeded(seed, "lora"), {}
        for kernel in chosen_kernels(params, config.targets, config.stacks, "lora.targets"):
            inputs, outputs, rank = size(kernel.inputs), size(kernel.outputs), config.rank
            if rank > min(inputs, outputs):
                raise UserError(
                    f"lora.rank is {rank}, and {kernel.name!r} of this backbone has {inputs} "
                    f"inputs and {outputs} outputs; use a rank of at most {min(inputs, outputs)}."
                )
            shape = (kernel.layers, *kernel.inputs, rank)
            if config.init == "uniform":
                first = rng.uniform(-1, 1, shape) / inputs**0.5
            else:
                first = rng.standard_normal(shape) / rank
            second = np.zeros((kernel.layers, rank, *kernel.outputs))
            name = "/".join(kernel.path)
            leaves[f"{name}/a"], leaves[f"{name}/b"] = first, second
            if config.dora:
                leaves[f"{name}/length"] = np.zeros((kernel.layers, *kernel.outputs))
        return members_of(leaves, start)

    def inject(trainables: dict[str, Array], params: Params) -> Injection:
        scale, names = lora_scale(config) * ratio, [x[:-2] for x in trainables if x.endswith("/a")]
        changes = {}
        for name in names:
            a, b = trainables[f"{name}/a"], scale * trainables[f"{name}/b"]
            change = Projection(LowRank(a, b))
            if config.dora:
                path = tuple(name.split("/"))
                change = with_length(change, trainables[f"{name}/length"], params, path)
            if config.dropout:
                change = change._replace(dropout=jnp.full(a.shape[:2], config.dropout))
            changes[name] = change
        return Injection(layers=nested(changes))

    return Method(init, inject, num_start_vectors=no_start_vectors, uses_prompt=False)
