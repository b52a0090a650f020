"""What a step costs on an encoder with a mask; see ``jaxprompt.models.cost.FamilyCost``.

Labels are taken to have one token, so that each row is one pass. Each further token of a label is
another pass, which the backward pass keeps as well.
"""

from jaxprompt.models.cost import (
    A_PROMPT,
    Product,
    Sublayer,
    gathered_by_layers,
    last_products,
    learns,
    operations_of_parts,
    saved_by_layer,
)
from jaxprompt.models.encoder.config import EncoderConfig
from jaxprompt.models.encoder.encoder import EncoderModel
from jaxprompt.models.injection import Injection
from jaxprompt.models.work import Work


def _sublayers(config: EncoderConfig, positions: int, shards: int = 1) -> list[Sublayer]:
    """Attention and MLP, for so many positions."""
    c, depth, width = config, config.num_layers, config.d_model // shards
    attention = [
        Product(name, "input", c.d_model, width, positions) for name in ("query", "key", "value")
    ]
    attention.append(Product("out", "heads", width, c.d_model, positions))
    inner = (
        Product("wi", "input", c.d_model, c.d_ff // shards, positions),
        Product("wo", "hidden", c.d_ff // shards, c.d_model, positions),
    )
    heads = max(c.num_heads // shards, 1)
    return [
        Sublayer(("encoder", "layers", "attention"), depth, tuple(attention), width, heads),
        Sublayer(("encoder", "layers", "mlp"), depth, inner),
    ]


def activations(
    model: EncoderModel, work: Work, num_shards: int, injection: Injection = A_PROMPT
) -> dict[str, int]:
    """Bytes that a step holds on a device beside weights and state, see ``FamilyCost``.

    Per position a layer keeps the two inputs of norms, queries, keys and values, and what the
    activation reads, and for each query and head the logits and weights of all keys.
    Rematerialised, it keeps its input alone.
    """
    c, runtime, positions = model.config, model.runtime, work.rows * work.inputs
    size = 2 if runtime.dtype == "bfloat16" else 4
    heads, inner = max(c.num_heads // num_shards, 1), c.d_ff // num_shards
    layer = positions * (2 * c.d_model + 3 * c.d_model // num_shards + inner) * size
    layer += (4 + size) * positions * work.inputs * heads
    for sublayer in _sublayers(c, positions, num_shards):
        layer += saved_by_layer(sublayer, injection, size, runtime.mixed)
    saved = c.num_layers * layer
    if runtime.remat:
        saved = c.num_layers * positions * c.d_model * size + layer
    saved += gathered_by_layers(injection, work.rows)
    workspace = positions * max(2 * inner, 4 * c.d_model // num_shards) * size
    workspace += 2 * positions * c.d_model * 4
    workspace += 2 * positions * heads * work.inputs * 4
    head = 3 * work.rows * (c.vocab_size // num_shards) * 4
    return {"saved_activations": saved, "workspace": max(workspace, head)}


def depth(config: EncoderConfig) -> int:
    """The number of layers."""
    return config.num_layers


def shared(model: EncoderModel, work: Work, num_shards: int) -> int:
    """Bytes that a device receives for a micro-batch where ``num_shards`` share heads and MLP.

    What is looked up and what each of an attention and an MLP puts out is summed around a ring,
    again where that is rematerialised; backward, the gradient of what each of its products reads.
    """
    config, runtime = model.config, model.runtime
    size = 2 if runtime.dtype == "bfloat16" else 4
    sums = config.num_layers * (2 * (2 if runtime.remat else 1) + 4) + 1
    positions = work.rows * work.inputs
    return sums * positions * config.d_model * size * 2 * (num_shards - 1) // num_shards


def flops(
    config: EncoderConfig,
    rows: int,
    inputs: int,
    targets: int,
    injection: Injection = A_PROMPT,
    shared_prefix: int = 0,
) -> dict[str, float]:
    """Floating-point operations of a step by part, forward and backward, see ``FamilyCost``."""
    c, positions = config, rows * inputs
    learnt, of_weights = learns(injection), int(injection.params is not None)
    passes = 1 + learnt + of_weights
    layers = _sublayers(c, positions)
    return {
        "products with weights": passes * sum(one.operations for one in layers),
        "attention": (1 + 2 * learnt) * 4 * c.num_layers * c.d_model * positions * inputs,
        "head": passes * 2 * rows * c.d_model * (c.d_model + c.vocab_size),
        "trained parts": operations_of_parts(layers, injection),
    }


def recomputed(
    config: EncoderConfig,
    rows: int,
    inputs: int,
    targets: int,
    injection: Injection = A_PROMPT,
    shared_prefix: int = 0,
) -> float:
    """Floating-point operations that rematerialised layers repeat, see ``FamilyCost``."""
    layers = _sublayers(config, rows * inputs)
    total = sum(one.operations for one in layers) - last_products(layers)
    total += 4 * config.num_layers * config.d_model * rows * inputs * inputs
    return total + operations_of_parts(layers, injection) / 3
