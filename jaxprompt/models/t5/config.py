"""Shape and numerics of a T5."""

import dataclasses
import re
from typing import ClassVar

from jaxprompt.models.precision import Precision


@dataclasses.dataclass(frozen=True)
class T5Config(Precision):
    """Shape and numerics of one T5. Frozen and hashable, so that it can be a static argument."""

    family: ClassVar[str] = "encoder-decoder"

    vocab_size: int  # V, rows of the embedding table
    d_model: int
    num_heads: int
    head_dim: int
    d_ff: int
    num_encoder_layers: int
    num_decoder_layers: int
    gated: bool = True  # wi_0 (activated) times wi_1, else a single wi
    activation: str = "gelu"  # relu | gelu (tanh form) | silu
    tied: bool = False  # the head is the embedding table transposed
    scale_output: bool = False  # decoder output times d_model ** -0.5 before the head
    per_layer_bias: bool = False  # umT5: every layer has its own relative bias
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    dropout: float = 0.0  # applied only where a dropout key is given
    dtype: str = "float32"  # see Precision
    unroll: bool = False  # unroll the scan over layers; the parameter tree stays the same
    remat: bool = False  # recompute each layer in the backward pass
    rows_in_turn: bool = False  # see models/ops/attention/per_example.py: for CPUs
    flash: str = ""  # the kernel of the encoder's attention, of flash_attention.py; "": none
    # positions that examples which share rows are computed at, each at the least that holds it;
    # none is longer than the last. Empty: none share rows
    packed: tuple[int, ...] = ()
    shared: int = 1  # so many examples at most are in a row, and answered in rows of their own
    decoder_start_id: int = 0
    pad_id: int = 0
    eos_id: int = 1

    @property
    def num_layers(self) -> int:
        """Depth of the stack that carries the prompt."""
        return self.num_encoder_layers


# logical axes of each parameter (parallel.RULES), by its name
AXES = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "query": ("embed", "heads", "kv"),
    "key": ("embed", "heads", "kv"),
    "value": ("embed", "heads", "kv"),
    "out": ("heads", "kv", "embed"),
    "wi": ("embed", "mlp"),
    "wi_0": ("embed", "mlp"),
    "wi_1": ("embed", "mlp"),
    "wo": ("mlp", "embed"),
    "relative_bias": ("buckets", "heads"),
    "scale": ("norm",),
}

# num_layers of both stacks, num_heads, d_model, d_ff of T5 1.1; 64 numbers a head, 32,128 rows
_RELEASED = {
    "small": (8, 6, 512, 1024),
    "base": (12, 12, 768, 2048),
    "large": (24, 16, 1024, 2816),
    "xl": (24, 32, 2048, 5120),
    "xxl": (24, 64, 4096, 10240),
}


def released(name: str) -> T5Config | None:
    """The shape of a released T5 1.1 by its hub id, LM-adapted or not; None for other names."""
    found = re.fullmatch(r"google/t5-(?:v1_1-)?(small|base|large|xl|xxl)(-lm-adapt)?", name)
    if found is None or ("v1_1" in name) == bool(found[2]):
        return None
    depth, heads, width, inner = _RELEASED[found[1]]
    return T5Config(
        vocab_size=32_128, d_model=width, num_heads=heads, head_dim=64, d_ff=inner,
        num_encoder_layers=depth, num_decoder_layers=depth,
    )  # fmt: skip
