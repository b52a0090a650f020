"""Paths and axes of a parameter tree: sizes of the letters, and the leaf at a path."""

from jaxtyping import PyTree

from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.encoder.config import EncoderConfig
from jaxprompt.models.registry import Config, Params


def axis_sizes(config: Config) -> dict[str, int]:
    """Size of each letter that names an axis; numbers of layers under the names of their stacks."""
    if isinstance(config, DecoderConfig):
        return {
            "V": config.vocab_size,
            "D": config.d_model,
            "N": config.num_heads,
            "G": config.num_kv_heads,
            "H": config.head_dim,
            "F": config.d_ff,
            "layers": config.num_layers,
        }
    if isinstance(config, EncoderConfig):
        return {
            "V": config.vocab_size,
            "D": config.d_model,
            "O": config.d_model,
            "N": config.num_heads,
            "H": config.head_dim,
            "F": config.d_ff,
            "M": config.max_positions,
            "U": config.num_types,
            "encoder": config.num_layers,
        }
    return {
        "V": config.vocab_size,
        "D": config.d_model,
        "N": config.num_heads,
        "H": config.head_dim,
        "F": config.d_ff,
        "R": config.buckets,
        "encoder": config.num_encoder_layers,
        "decoder": config.num_decoder_layers,
    }


def leaf_at(tree: Params, path: tuple[str, ...]) -> PyTree:
    """What a tree holds at ``path``."""
    node: PyTree = tree
    for key in path:
        node = node[key]
    return node
