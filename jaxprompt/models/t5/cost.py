"""What a step costs on T5, counted from shapes; see ``jaxprompt.models.cost.FamilyCost``."""

from jaxprompt.models.cost import (
    A_PROMPT,
    ENCODED,
    NOTHING,
    Product,
    Sublayer,
    gathered_by_layers,
    last_products,
    learns,
    operations_of_parts,
    saved_by_layer,
)
from jaxprompt.models.injection import Injection, leaf_at
from jaxprompt.models.t5.config import T5Config
from jaxprompt.models.t5.t5 import T5Model
from jaxprompt.models.work import Work

_CROSS = ("decoder", "layers", "cross_attention")


def _attention(
    config: T5Config, path: tuple[str, ...], depth: int, positions: int, shards: int
) -> Sublayer:
    heads, width = config.num_heads // shards, config.num_heads * config.head_dim // shards
    products = [
        Product(name, "input", config.d_model, width, positions)
        for name in ("query", "key", "value")
    ]
    products.append(Product("out", "heads", width, config.d_model, positions))
    return Sublayer(path, depth, tuple(products), width, heads)


def _unprojected(config: T5Config, depth: int, positions: int, shards: int) -> Sublayer:
    """Attention in which the kernels of keys and values multiply queries, see ``mask.py``."""
    c, heads = config, config.num_heads // shards
    width = heads * c.head_dim
    products = (
        Product("query", "input", c.d_model, width, positions),
        Product("key", "queries", c.head_dim, c.d_model, positions, heads),
        Product("value", "attended", c.d_model, c.head_dim, positions, heads),
        Product("out", "heads", width, c.d_model, positions),
    )
    return Sublayer(_CROSS, depth, products, width, heads)


def _projected(config: T5Config, depth: int, read: int, written: int, shards: int) -> Sublayer:
    """Cross-attention with keys and values of the encoder's positions."""
    plain = _attention(config, _CROSS, depth, written, shards)
    products = [
        product._replace(reads=ENCODED, positions=read)
        if product.weight in ("key", "value")
        else product
        for product in plain.products
    ]
    return plain._replace(products=tuple(products))


def _projects(config: T5Config, targets: int, injection: Injection) -> bool:
    """Whether cross-attention has keys and values, see ``Attention.cross_attend``."""
    changes = [leaf_at(injection.layers, (*_CROSS, name)) for name in ("key", "value")]
    with_bias = any(change is not None and change.bias is not None for change in changes)
    return with_bias or targets >= config.head_dim // 2


def _mlp(config: T5Config, stack: str, depth: int, positions: int, shards: int) -> Sublayer:
    width, names = config.d_ff // shards, ("wi_0", "wi_1") if config.gated else ("wi",)
    products = [Product(name, "input", config.d_model, width, positions) for name in names]
    products.append(Product("wo", "hidden", width, config.d_model, positions))
    return Sublayer((stack, "layers", "mlp"), depth, tuple(products))


def _stacks(
    config: T5Config, read: int, written: int, projects: bool, shards: int = 1
) -> tuple[list[Sublayer], list[Sublayer]]:
    """The sublayers of the encoder and of the decoder, for so many positions."""
    depth = config.num_encoder_layers
    encoder = [
        _attention(config, ("encoder", "layers", "attention"), depth, read, shards),
        _mlp(config, "encoder", depth, read, shards),
    ]
    depth = config.num_decoder_layers
    decoder = [
        _attention(config, ("decoder", "layers", "self_attention"), depth, written, shards),
        _projected(config, depth, read, written, shards)
        if projects
        else _unprojected(config, depth, written, shards),
        _mlp(config, "decoder", depth, written, shards),
    ]
    return encoder, decoder


def activations(
    model: T5Model, work: Work, num_shards: int, injection: Injection = A_PROMPT
) -> dict[str, int]:
    """Bytes that a step holds on a device beside weights and state, see ``FamilyCost``.

    Rematerialised, a layer keeps its input alone, and one at a time keeps what all kept otherwise.
    """
    config, runtime = model.config, model.runtime
    size = 2 if runtime.dtype == "bfloat16" else 4
    read, written = work.rows * work.inputs, work.rows * work.targets
    saved = gathered_by_layers(injection, work.rows)
    layers = (
        (config.num_encoder_layers, read, _saved_by_encoder_layer),
        (config.num_decoder_layers, written, _saved_by_decoder_layer),
    )
    for depth, positions, saved_by in layers:
        each = saved_by(model, work, num_shards, injection)
        if runtime.remat and each and depth:
            saved += depth * positions * config.d_model * size + each
        else:
            saved += depth * each
    mlp_width = (2 if config.gated else 1) * config.d_ff // num_shards
    attention_width = config.num_heads * config.head_dim // num_shards
    workspace = read * max(2 * mlp_width, 4 * attention_width) * size
    workspace += 2 * read * config.d_model * 4
    workspace += 2 * _logits(model, work, num_shards) * 4
    heads = max(config.num_heads // num_shards, 1)
    if runtime.flash == "pallas":  # the bias's gradient of each row
        workspace += read * heads * work.inputs * 4
    head = 3 * written * (config.vocab_size // num_shards) * 4
    bias = heads * work.inputs**2 * 4  # of all layers
    if learns(injection, "encoder"):
        saved += bias
    else:
        workspace += bias
    return {"saved_activations": saved, "workspace": max(workspace, head)}


def _logits(model: T5Model, work: Work, num_shards: int) -> int:
    """The logits of the encoder's attention in a layer, where they are computed all at once."""
    if model.runtime.per_example_attention or model.runtime.flash:
        return 0
    return work.rows * work.inputs**2 * max(model.config.num_heads // num_shards, 1)


def _saved_by_encoder_layer(
    model: T5Model, work: Work, num_shards: int, injection: Injection
) -> int:
    """Bytes that a layer of the encoder keeps; 0 where nothing has a gradient there.

    Per position these are its two inputs of norms, q, k and v, and the two inputs of the gate
    (Shazeer 2020). Without per-example attention and without a flash kernel it also keeps logits
    and weights of attention. With mixed precision the gate's inputs and operands of products are
    kept in bfloat16.
    """
    if not learns(injection, "encoder"):
        return 0
    config, runtime, read = model.config, model.runtime, work.rows * work.inputs
    size = 2 if model.runtime.dtype == "bfloat16" else 4
    mlp_width = (2 if config.gated else 1) * config.d_ff // num_shards
    attention_width = config.num_heads * config.head_dim // num_shards
    logits = _logits(model, work, num_shards)
    stored = lambda halved: 2 if runtime.mixed and halved else size
    total = read * (
        2 * config.d_model * size
        + 3 * attention_width * stored(not runtime.flash)
        + mlp_width * stored(config.gated)
    )  # fmt: skip
    total += logits * (4 + stored(True))  # weights have the dtype of the values
    if leaf_at(injection.layers, ("encoder", "layers", "attention", "prefix")) is not None:
        # attention to the text alone, and its total
        total += read * attention_width * size + logits * 4
    encoder, _ = _stacks(config, read, 0, False, num_shards)
    return total + sum(
        saved_by_layer(sublayer, injection, size, runtime.mixed) for sublayer in encoder
    )


def _saved_by_decoder_layer(
    model: T5Model, work: Work, num_shards: int, injection: Injection
) -> int:
    """Bytes that a layer of the decoder keeps.

    Self-attention and the MLP keep what those of the encoder do. Cross-attention keeps its input
    and the logits and weights of all inputs and, where the encoder has gradients, queries that are
    as wide as the model for each head; or, with keys and values, these.
    """
    config, runtime = model.config, model.runtime
    read, written = work.rows * work.inputs, work.rows * work.targets
    size = 2 if runtime.dtype == "bfloat16" else 4
    heads, mlp = max(config.num_heads // num_shards, 1), (2 if config.gated else 1) * config.d_ff
    width, reads = heads * config.head_dim, learns(injection, "encoder")
    projects = _projects(config, work.targets, injection)
    halved = 2 if runtime.mixed else size
    of_gate = halved if config.gated else size
    total = written * (3 * config.d_model * size + 3 * width * halved + mlp // num_shards * of_gate)
    total += written * heads * work.targets * (4 + halved)
    if projects:
        total += (written + 2 * read) * width * halved
    elif reads:
        total += written * heads * config.d_model * halved
    total += written * heads * work.inputs * (4 + (halved if reads or projects else 0))
    _, decoder = _stacks(config, read, written, projects, num_shards)
    return total + sum(
        saved_by_layer(sublayer, injection, size, runtime.mixed) for sublayer in decoder
    )


def depth(config: T5Config) -> int:
    """The number of layers of both stacks."""
    return config.num_encoder_layers + config.num_decoder_layers


def shared(model: T5Model, work: Work, num_shards: int) -> int:
    """Bytes that a device receives for a part of a batch where ``num_shards`` share heads and MLP.

    What is looked up and what each of an attention and an MLP puts out is summed around a ring,
    again where that is rematerialised; backward, the gradient of what each of its products reads.
    """
    config, runtime = model.config, model.runtime
    size = 2 if runtime.dtype == "bfloat16" else 4
    again, mlp = 2 if runtime.remat else 1, 2 if config.gated else 1
    encoder = config.num_encoder_layers * work.inputs * (2 * again + 3 + mlp)
    # of the inputs, cross-attention's queries alone
    decoder = config.num_decoder_layers * work.targets * (3 * again + 4 + mlp)
    lookup = work.inputs + work.targets
    summed = (encoder + decoder + lookup) * work.rows * config.d_model * size
    return summed * 2 * (num_shards - 1) // num_shards


def flops(
    config: T5Config,
    rows: int,
    inputs: int,
    targets: int,
    injection: Injection = A_PROMPT,
    shared_prefix: int = 0,
) -> dict[str, float]:
    """Floating-point operations of a step by part, forward and backward, see ``FamilyCost``.

    An encoder shares no prefix: each of its activations depends on the text.
    """
    c, attention_width = config, config.num_heads * config.head_dim
    read, written = rows * inputs, rows * targets
    projects = _projects(config, targets, injection)
    encoder, decoder = _stacks(config, read, written, projects)
    reads, writes = learns(injection, "encoder"), learns(injection)
    # a forward pass, the gradient of what is read, and that of the weights
    of_weights = int(injection.params is not None)
    passes = 1 + reads + of_weights, 1 + writes + of_weights
    # with keys and values of their own, or with the kernels as in ``_unprojected``
    cross_width = attention_width if projects else c.num_heads * c.d_model
    attention = 4 * c.num_decoder_layers * written
    return {
        "encoder, products with weights": passes[0] * sum(each.operations for each in encoder),
        "encoder, attention": (1 + 2 * reads)
        * 4 * c.num_encoder_layers * read * inputs * attention_width,
        "decoder": passes[1] * sum(each.operations for each in decoder)
        + (1 + 2 * writes) * attention * targets * attention_width
        # without gradients of the encoder, those of its keys and values are not computed
        + (1 + writes + reads) * attention * inputs * cross_width,
        "head": passes[1] * 2 * written * c.d_model * c.vocab_size,
        "trained parts": operations_of_parts([*encoder, *decoder], injection),
    }  # fmt: skip


def recomputed(
    config: T5Config,
    rows: int,
    inputs: int,
    targets: int,
    injection: Injection = A_PROMPT,
    shared_prefix: int = 0,
) -> float:
    """Floating-point operations that rematerialised layers repeat, see ``FamilyCost``."""
    read, written = rows * inputs, rows * targets
    forward = flops(config, rows, inputs, targets, NOTHING)
    encoder, decoder = _stacks(config, read, written, _projects(config, targets, injection))
    total = forward["decoder"] - last_products(decoder)
    if learns(injection, "encoder"):
        total += forward["encoder, products with weights"] + forward["encoder, attention"]
        total -= last_products(encoder)
    return total + operations_of_parts([*encoder, *decoder], injection) / 3
