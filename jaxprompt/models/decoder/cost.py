"""What a step costs on a decoder-only model; see ``jaxprompt.models.cost.FamilyCost``."""

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
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.decoder.decoder import DecoderModel
from jaxprompt.models.injection import Injection
from jaxprompt.models.work import Work


def _sublayers(config: DecoderConfig, positions: int, shards: int = 1) -> list[Sublayer]:
    """Attention and MLP, for so many positions. Heads of keys and values are not divided."""
    c, depth = config, config.num_layers
    wide, narrow = c.num_heads * c.head_dim // shards, c.num_kv_heads * c.head_dim
    attention = (
        Product("query", "input", c.d_model, wide, positions),
        Product("key", "input", c.d_model, narrow, positions),
        Product("value", "input", c.d_model, narrow, positions),
        Product("out", "heads", wide, c.d_model, positions),
    )
    names = ("wi_0", "wi_1") if c.gated else ("wi",)
    inner = [Product(name, "input", c.d_model, c.d_ff // shards, positions) for name in names]
    inner.append(Product("wo", "hidden", c.d_ff // shards, c.d_model, positions))
    return [
        Sublayer(("layers", "attention"), depth, attention, wide, c.num_heads // shards),
        Sublayer(("layers", "mlp"), depth, tuple(inner)),
    ]


def _saved(
    model: DecoderModel, rows: int, length: int, keys: int, shards: int, injection: Injection
) -> int:
    """Bytes that a pass keeps in all layers.

    Per position a layer keeps its two inputs of norms, the queries of N heads, the keys and values
    of G heads (Ainslie et al. 2023, arXiv 2305.13245) and what the gate reads (Shazeer 2020), and
    for each query and head the logits and weights of all keys. Rematerialised, it keeps its input
    alone.

    Args:
        length: positions of a row.
        keys: that each of them attends to, with those of a shared prefix.
    """
    c, runtime, positions = model.config, model.runtime, rows * length
    size = 2 if runtime.dtype == "bfloat16" else 4
    of_gate = 2 if runtime.mixed and c.gated else size
    heads = (c.num_heads // shards + 2 * c.num_kv_heads) * c.head_dim
    mlp = (2 if c.gated else 1) * c.d_ff // shards
    layer = positions * ((2 * c.d_model + heads) * size + mlp * of_gate)
    layer += (4 + size) * positions * keys * (c.num_heads // shards)
    for sublayer in _sublayers(c, positions, shards):
        layer += saved_by_layer(sublayer, injection, size, runtime.mixed)
    if runtime.remat:
        return c.num_layers * positions * c.d_model * size + layer
    return c.num_layers * layer


def activations(
    model: DecoderModel, work: Work, num_shards: int, injection: Injection = A_PROMPT
) -> dict[str, int]:
    """Bytes that a step holds on a device beside weights and state, see ``FamilyCost``.

    A prompt that leads every row (``layout.shared_prefix_length``) is computed once for each
    member. Rows of several members gather its keys and values.
    """
    c, runtime, prefix = model.config, model.runtime, model.layout.shared_prefix_length
    size = 2 if runtime.dtype == "bfloat16" else 4
    length, members = work.inputs - prefix + work.targets, injection.num_members
    saved = _saved(model, work.rows, length, prefix + length, num_shards, injection)
    if prefix:
        saved += _saved(model, members, prefix, prefix, num_shards, injection)
        rows = members + (work.rows if members > 1 else 0)
        saved += 2 * c.num_layers * rows * prefix * c.num_kv_heads * c.head_dim * size
    saved += gathered_by_layers(injection, work.rows)
    positions, heads = work.rows * length, c.num_heads // num_shards
    mlp = (2 if c.gated else 1) * c.d_ff // num_shards
    workspace = positions * max(2 * mlp, 4 * heads * c.head_dim) * size
    workspace += 2 * positions * c.d_model * 4
    workspace += 2 * positions * heads * (prefix + length) * 4
    head = 3 * work.rows * work.targets * (c.vocab_size // num_shards) * 4
    return {"saved_activations": saved, "workspace": max(workspace, head)}


def depth(config: DecoderConfig) -> int:
    """The number of layers."""
    return config.num_layers


def shared(model: DecoderModel, work: Work, num_shards: int) -> int:
    """Bytes that a device receives for a micro-batch where ``num_shards`` share heads and MLP.

    What is looked up and what each of an attention and an MLP puts out is summed around a ring,
    again where that is rematerialised; backward, the gradient of what each of its products reads.
    """
    config, runtime = model.config, model.runtime
    size = 2 if runtime.dtype == "bfloat16" else 4
    again, mlp = 2 if runtime.remat else 1, 2 if config.gated else 1
    sums = config.num_layers * (2 * again + 3 + mlp) + 1
    prefix = model.layout.shared_prefix_length
    positions = work.rows * (work.inputs - prefix + work.targets) + prefix
    return sums * positions * config.d_model * size * 2 * (num_shards - 1) // num_shards


def flops(
    config: DecoderConfig,
    rows: int,
    inputs: int,
    targets: int,
    injection: Injection = A_PROMPT,
    shared_prefix: int = 0,
) -> dict[str, float]:
    """Floating-point operations of a step by part, forward and backward, see ``FamilyCost``."""
    c, length = config, inputs - shared_prefix + targets
    learnt, of_weights = learns(injection), int(injection.params is not None)
    passes = 1 + learnt + of_weights
    each = (1 + 2 * learnt) * 4 * c.num_layers * c.num_heads * c.head_dim
    layers = _sublayers(c, rows * length)
    counted: dict[str, float] = {
        "products with weights": passes * sum(one.operations for one in layers),
        "attention": each * rows * length * (shared_prefix + length),
        "head": passes * 2 * rows * targets * c.d_model * c.vocab_size,
        "trained parts": operations_of_parts(layers, injection),
    }
    if shared_prefix:
        positions = injection.num_members * shared_prefix
        leading = _sublayers(c, positions)
        counted["prompts, once for all rows"] = (
            passes * sum(one.operations for one in leading)
            + each * positions * shared_prefix
            + operations_of_parts(leading, injection)
        )
    return counted


def recomputed(
    config: DecoderConfig,
    rows: int,
    inputs: int,
    targets: int,
    injection: Injection = A_PROMPT,
    shared_prefix: int = 0,
) -> float:
    """Floating-point operations that rematerialised layers repeat, see ``FamilyCost``."""
    c, length = config, inputs - shared_prefix + targets
    total = 0.0
    for positions, keys in (
        (rows * length, shared_prefix + length),
        (injection.num_members * shared_prefix, shared_prefix),
    ):
        layers = _sublayers(c, positions)
        total += sum(one.operations for one in layers) - last_products(layers)
        total += 4 * c.num_layers * c.num_heads * c.head_dim * positions * keys
        total += operations_of_parts(layers, injection) / 3
    return total
