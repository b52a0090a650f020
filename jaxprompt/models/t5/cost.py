"""What a step of prompt tuning costs on T5, counted from its shape."""

from jaxprompt.models.t5.config import T5Config
from jaxprompt.models.t5.t5 import T5Model
from jaxprompt.models.work import Work


def activations(model: T5Model, work: Work, ways: int) -> dict[str, int]:
    """Bytes of a device that a step holds beside weights and state: kept, and in work at most.

    ways: devices that share heads, MLP and vocabulary.

    Per position an encoder layer keeps its two inputs of norms, q, k and v, the two inputs of the
    gate (Shazeer 2020), and, where rows are attended to neither in turn nor by a flash kernel,
    logits and weights of attention; rematerialised, its input alone. In work are the gradients of
    one layer's MLP or attention. With mixed precision the gate's inputs are kept in bfloat16, and
    q, k and v where rows are attended to in turn.
    """
    shape, runtime = model.config, model.runtime
    size = 2 if runtime.dtype == "bfloat16" else 4
    wide = (2 if shape.gated else 1) * shape.d_ff // ways
    inner = shape.num_heads * shape.head_dim // ways
    heads, positions = max(shape.num_heads // ways, 1), work.rows * work.inputs
    looked_at = positions * heads * work.inputs
    if runtime.per_example_attention or runtime.flash:
        looked_at = 0
    half = lambda does: 2 if runtime.mixed and does else size
    of_a_layer = positions * (
        2 * shape.d_model * size
        + 3 * inner * half(runtime.per_example_attention)
        + wide * half(shape.gated)
    )  # fmt: skip
    of_a_layer += looked_at * 8
    layers = shape.num_encoder_layers
    if runtime.remat:
        kept = layers * positions * shape.d_model * size + of_a_layer
    else:
        kept = layers * of_a_layer
    in_work = positions * max(2 * wide, 4 * inner) * size + 2 * positions * shape.d_model * 4
    in_work += 2 * looked_at * 4
    if runtime.flash == "pallas":  # the bias's gradient of each row
        in_work += positions * heads * work.inputs * 4
    head = 3 * work.rows * work.targets * (shape.vocab_size // ways) * 4
    bias = heads * work.inputs**2 * 4
    return {"kept": kept + bias, "in_work": max(in_work, head)}


def depth(shape: T5Config) -> int:
    """Layers in all."""
    return shape.num_encoder_layers + shape.num_decoder_layers


def shared(model: T5Model, work: Work, ways: int) -> int:
    """Bytes that a device receives for a part of a batch where ``ways`` share heads and MLP.

    What is looked up and what each of an attention and an MLP puts out is summed around a ring,
    again where that is rematerialised; backward, the gradient of what each of its products reads.
    """
    shape, runtime = model.config, model.runtime
    size = 2 if runtime.dtype == "bfloat16" else 4
    again, mlp = 2 if runtime.remat else 1, 2 if shape.gated else 1
    encoder = shape.num_encoder_layers * work.inputs * (2 * again + 3 + mlp)
    # of the inputs, cross-attention's queries alone
    decoder = shape.num_decoder_layers * work.targets * (3 * again + 4 + mlp)
    lookup = work.inputs + work.targets
    summed = (encoder + decoder + lookup) * work.rows * shape.d_model * size
    return summed * 2 * (ways - 1) // ways


def flops(config: T5Config, rows: int, inputs: int, targets: int) -> dict[str, float]:
    """Floating-point operations of a step of prompt tuning by part, forward and backward.

    rows of all prompts and devices; positions include the prompt.
    """
    c = config
    inner, depth = c.num_heads * c.head_dim, c.num_encoder_layers
    read, written = rows * inputs, rows * targets
    projections, mlp = 8 * c.d_model * inner, (6 if c.gated else 4) * c.d_model * c.d_ff
    return {
        "encoder, products with weights": 2 * depth * read * (projections + mlp),
        "encoder, attention": 3 * depth * read * 4 * inputs * inner,
        "decoder": c.num_decoder_layers
        * written
        * (
            # queries go through the kernels of keys and values, instead of what is encoded
            2 * (2 * projections + mlp)
            + 3 * 4 * targets * inner
            + 3 * 4 * c.num_heads * c.d_model * inputs
        ),
        "head": 2 * written * 2 * c.d_model * c.vocab_size,
    }
