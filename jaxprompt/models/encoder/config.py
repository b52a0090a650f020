"""What a checkpoint says of an encoder with a mask."""

import dataclasses
from typing import ClassVar

from jaxprompt.models.base import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(ModelConfig):
    """The shape and the constants of one BERT, RoBERTa or DistilBERT."""

    family: ClassVar[str] = "encoder"

    num_layers: int
    mask_id: int  # the token that an answer takes the place of
    max_positions: int  # M, rows of the table of positions
    model_type: str = "bert"  # bert | roberta | distilbert, as transformers names the layout
    first_position: int = 0  # the row of the first token; RoBERTa's is that after padding's, 2
    num_types: int = 2  # U, rows of the table of token types, of which the first is used; 0: none
    gated: bool = False
    activation: str = "gelu_exact"
    head_activation: str = "gelu_exact"
    tied: bool = True
    norm_eps: float = 1e-12

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, with prompt, prefix and answer."""
        return self.max_positions - self.first_position


# logical axes of each parameter (parallel.RULES), by its name
AXES = {
    "embedding": ("vocab", "embed"),
    "position_embedding": ("positions", "embed"),
    "type_embedding": ("types", "embed"),
    "query": ("embed", "heads", "kv"),
    "key": ("embed", "heads", "kv"),
    "value": ("embed", "heads", "kv"),
    "out": ("heads", "kv", "embed"),
    "query_bias": ("heads", "kv"),
    "key_bias": ("heads", "kv"),
    "value_bias": ("heads", "kv"),
    "out_bias": ("norm",),
    "wi": ("embed", "mlp"),
    "wi_bias": ("mlp",),
    "wo": ("mlp", "embed"),
    "wo_bias": ("norm",),
    "scale": ("norm",),
    "bias": ("norm",),
    "transform": ("embed", "norm"),
    "transform_bias": ("norm",),
    "head_bias": ("vocab",),
}
