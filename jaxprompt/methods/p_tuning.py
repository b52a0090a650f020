"""P-tuning (Liu et al. 2021, arXiv 2103.10385): a network makes the vectors of a prompt.

The network is that of PEFT's ``PromptEncoder`` and of NeMo, which recommend the MLP. In the paper a
bidirectional LSTM reads the vectors, so that each depends on the others. The network is thrown away
in the end: an artefact holds the vectors that it makes, and nothing that uses a prompt can tell.
The vectors may stand anywhere in the text, as in ``[prompt:3] {text} [prompt:3]``.

Weights start with unit variance and are divided by the square root of their fan-in where they are
used, so that one learning rate suits all leaves. Biases start at 0.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.methods import PTuningConfig
from jaxprompt.config.schema import PromptConfig
from jaxprompt.methods.base import Method, members_of, seeded
from jaxprompt.models.injection import Injection, Params

LSTM_LAYERS = 2
DIRECTIONS = "forward", "backward"


def p_tuning(config: PTuningConfig) -> Method:
    """The method of these settings.

    Its leaves are "prompt" [K, P, D], what the network reads; of each matrix of the MLP
    "mlp/N/kernel" [K, in, out] and "mlp/N/bias" [K, out]; of each direction of a layer of the LSTM
    "lstm/N/DIRECTION/input" [K, in, 4h], ".../hidden" [K, h, 4h] and ".../bias" [K, 4h], with the
    gates in the order of torch: input, forget, cell, output.
    """

    def init(
        params: Params, start: Float[np.ndarray, "K P D"], prompt: PromptConfig, seed: int
    ) -> dict[str, Array]:
        """The start vectors, and a network whose random weights are the same for all members.

        A prompt does not start at the start vectors. It starts at what the random network makes of
        them: with the MLP, vectors of about half their length in other directions.
        """
        width = start.shape[-1]
        hidden, rng = config.width or width, seeded(seed, "p-tuning")
        sizes, leaves = [width, hidden, hidden, width], {}
        if config.encoder == "lstm":
            sizes = [2 * hidden, 2 * hidden, width]
            for layer in range(LSTM_LAYERS):
                inputs = 2 * hidden if layer else width
                for direction in DIRECTIONS:
                    name = f"lstm/{layer}/{direction}"
                    leaves[f"{name}/input"] = rng.standard_normal((inputs, 4 * hidden))
                    leaves[f"{name}/hidden"] = rng.standard_normal((hidden, 4 * hidden))
                    leaves[f"{name}/bias"] = np.zeros(4 * hidden)
        for number, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
            leaves[f"mlp/{number}/kernel"] = rng.standard_normal((inputs, outputs))
            leaves[f"mlp/{number}/bias"] = np.zeros(outputs)
        return {"prompt": jnp.asarray(start, jnp.float32), **members_of(leaves, start)}

    return Method(init, inject)


def inject(trainables: dict[str, Array], params: Params) -> Injection:
    """The vectors that the network makes."""
    return Injection(jax.vmap(_encoded)(trainables))


def _encoded(leaves: Mapping[str, Array]) -> Float[Array, "P D"]:
    """The vectors of one member, whose leaves have no axis K."""
    x = leaves["prompt"]
    if "lstm/0/forward/input" in leaves:
        for layer in range(LSTM_LAYERS):
            both = [_lstm(leaves, f"lstm/{layer}/{name}", x) for name in DIRECTIONS]
            x = jnp.concatenate(both, axis=-1)
    last = sum(name.startswith("mlp/") for name in leaves) // 2 - 1
    for number in range(last + 1):
        kernel = leaves[f"mlp/{number}/kernel"]
        x = x @ kernel / len(kernel) ** 0.5 + leaves[f"mlp/{number}/bias"]
        x = jax.nn.relu(x) if number < last else x
    return x


def _lstm(leaves: Mapping[str, Array], name: str, x: Float[Array, "P in"]) -> Float[Array, "P h"]:
    """What one direction of an LSTM's layer has at each position, from states of 0."""
    read, kernel = leaves[f"{name}/input"], leaves[f"{name}/hidden"]
    size = len(kernel)
    gates = x @ read / len(read) ** 0.5 + leaves[f"{name}/bias"]

    def step(state: tuple[Array, Array], gates: Array) -> tuple[tuple[Array, Array], Array]:
        hidden, cell = state
        parts = jnp.split(gates + hidden @ kernel / size**0.5, 4)
        enter, forget, leave = (jax.nn.sigmoid(parts[place]) for place in (0, 1, 3))
        cell = forget * cell + enter * jnp.tanh(parts[2])
        hidden = leave * jnp.tanh(cell)
        return (hidden, cell), hidden

    nothing = jnp.zeros(size, x.dtype)
    return jax.lax.scan(step, (nothing, nothing), gates, reverse=name.endswith("backward"))[1]
