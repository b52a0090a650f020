"""What a checkpoint says of a T5."""

import dataclasses
import re
from typing import ClassVar

from jaxprompt.models.base import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(ModelConfig):
    """The shape and the constants of one T5."""

    family: ClassVar[str] = "encoder-decoder"

    num_encoder_layers: int
    num_decoder_layers: int
    scale_output: bool = False  # decoder output times d_model ** -0.5 before the head
    per_layer_bias: bool = False  # umT5: every layer has its own relative bias
    buckets: int = 32
    max_distance: int = 128
    decoder_start_id: int = 0

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
    match = re.fullmatch(r"google/t5-(?:v1_1-)?(small|base|large|xl|xxl)(-lm-adapt)?", name)
    if match is None or ("v1_1" in name) == bool(match[2]):
        return None
    depth, heads, width, inner = _RELEASED[match[1]]
    return T5Config(
        vocab_size=32_128, d_model=width, num_heads=heads, head_dim=64, d_ff=inner,
        num_encoder_layers=depth, num_decoder_layers=depth,
    )  # fmt: skip
