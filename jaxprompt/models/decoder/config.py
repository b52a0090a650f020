"""Shape and numerics of a decoder-only model."""

import dataclasses
from typing import ClassVar

from jaxprompt.models.precision import Precision


@dataclasses.dataclass(frozen=True)
class LlamaConfig(Precision):
    """Shape and numerics of one Llama, Mistral or Qwen2. Frozen and hashable: a static argument."""

    family: ClassVar[str] = "decoder-only"
    gated: ClassVar[bool] = True
    dropout: ClassVar[float] = 0.0  # these models were trained without any

    vocab_size: int  # V, rows of the embedding table
    d_model: int
    num_heads: int
    num_kv_heads: int  # G: each is read by num_heads / num_kv_heads query heads
    head_dim: int
    d_ff: int
    num_layers: int
    model_type: str = "llama"  # llama | mistral | qwen2, as transformers names the layout
    activation: str = "silu"
    tied: bool = False  # the head is the embedding table transposed
    qkv_bias: bool = False  # Qwen2
    rope_theta: float = 10_000.0
    # (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings) of Llama 3.1, or
    # (factor,) of linear scaling
    rope_scaling: tuple[float, ...] = ()
    window: int | None = None  # a token sees so many tokens, itself included
    norm_eps: float = 1e-5
    # who sees whom: causal; prompt: a prompt's vectors see each other; prefix: all of the input
    # sees itself (prefix LM), as in an encoder
    attention: str = "causal"
    # every row starts with the vectors of one prompt in order, so many of them: their keys and
    # values are then computed once for all rows. Set by ``family.specialise``; 0 promises nothing
    leading: int = 0
    dtype: str = "float32"  # see Precision
    unroll: bool = False
    remat: bool = False
    pad_id: int = 0
    eos_id: int = 2
