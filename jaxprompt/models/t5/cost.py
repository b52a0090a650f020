"""What a step of prompt tuning costs on T5, counted from its shape."""

from jaxprompt.models.t5.config import T5Config
from jaxprompt.models.t5.t5 import T5Model
from jaxprompt.models.work import Work


def activations(model: T5Model, work: Work, num_shards: int) -> dict[str, int]:
    """Bytes that a step holds on a device beside weights and state.

    Per position an encoder layer keeps its two inputs of norms, q, k and v, and the two inputs of
    the gate (Shazeer 2020). Without per-example attention and without a flash kernel it also keeps
    logits and weights of attention. Rematerialised, it keeps its input alone. With mixed precision
    the gate's inputs are kept in bfloat16, and with per-example attention q, k and v too.

    Args:
        model: a T5.
        work: the shape of a micro-batch.
        num_shards: devices that share heads, MLP and vocabulary.

    Returns:
        ``kept`` for the backward pass, and ``in_work``, the most that the gradients of one layer's
        MLP or attention, or the logits, take meanwhile.
    """
    config, runtime = model.config, model.runtime
    size = 2 if runtime.dtype == "bfloat16" else 4
    mlp_width = (2 if config.gated else 1) * config.d_ff // num_shards
    attention_width = config.num_heads * config.head_dim // num_shards
    heads, positions = max(config.num_heads // num_shards, 1), work.rows * work.inputs
    logits = positions * heads * work.inputs
    if runtime.per_example_attention or runtime.flash:
        logits = 0
    stored = lambda halved: 2 if runtime.mixed and halved else size
    layer_bytes = positions * (
        2 * config.d_model * size
        + 3 * attention_width * stored(runtime.per_example_attention)
        + mlp_width * stored(config.gated)
    )  # fmt: skip
    layer_bytes += logits * 8
    layers = config.num_encoder_layers
    if runtime.remat:
        saved_activations = layers * positions * config.d_model * size + layer_bytes
    else:
        saved_activations = layers * layer_bytes
    workspace = positions * max(2 * mlp_width, 4 * attention_width) * size
    workspace += 2 * positions * config.d_model * 4
    workspace += 2 * logits * 4
    if runtime.flash == "pallas":  # the bias's gradient of each row
        workspace += positions * heads * work.inputs * 4
    head = 3 * work.rows * work.targets * (config.vocab_size // num_shards) * 4
    bias = heads * work.inputs**2 * 4
    return {"kept": saved_activations + bias, "in_work": max(workspace, head)}


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


def flops(config: T5Config, rows: int, inputs: int, targets: int) -> dict[str, float]:
    """Floating-point operations of a step of prompt tuning by part, forward and backward.

    rows of all prompts and devices; positions include the prompt.
    """
    c = config
    attention_width, depth = c.num_heads * c.head_dim, c.num_encoder_layers
    read, written = rows * inputs, rows * targets
    projections, mlp = 8 * c.d_model * attention_width, (6 if c.gated else 4) * c.d_model * c.d_ff
    return {
        "encoder, products with weights": 2 * depth * read * (projections + mlp),
        "encoder, attention": 3 * depth * read * 4 * inputs * attention_width,
        "decoder": c.num_decoder_layers
        * written
        * (
            # queries go through the kernels of keys and values, instead of what is encoded
            2 * (2 * projections + mlp)
            + 3 * 4 * targets * attention_width
            + 3 * 4 * c.num_heads * c.d_model * inputs
        ),
        "head": 2 * written * 2 * c.d_model * c.vocab_size,
    }
