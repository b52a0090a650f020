"""What a checkpoint says of a decoder-only model."""

import dataclasses
from typing import ClassVar

from jaxprompt.models.base import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """The shape and the constants of one Llama, Mistral or Qwen2."""

    family: ClassVar[str] = "decoder-only"

    num_kv_heads: int  # G: each is read by num_heads / num_kv_heads query heads
    num_layers: int
    model_type: str = "llama"  # llama | mistral | qwen2, as transformers names the layout
    activation: str = "silu"
    qkv_bias: bool = False  # Qwen2
    rope_theta: float = 10_000.0
    # (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings) of Llama 3.1, or
    # (factor,) of linear scaling
    rope_scaling: tuple[float, ...] = ()
    window: int | None = None  # a token sees so many tokens, itself included
    norm_eps: float = 1e-5
    eos_id: int = 2
