"""The modules of the torch models that have our weights: where each is in the parameter tree.

It is the table that checkpoints are read with. Adapters of other libraries name these modules, too.
"""

from collections.abc import Iterator
from typing import NamedTuple

from jaxprompt.config.errors import UserError
from jaxprompt.models.checkpoints import hf_decoder, hf_encoder, hf_t5
from jaxprompt.models.checkpoints.axes import axis_sizes
from jaxprompt.models.checkpoints.leaf import Leaf, layer_sizes
from jaxprompt.models.checkpoints.t5_tree import SUBLAYERS, depths
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.encoder.config import EncoderConfig
from jaxprompt.models.registry import Config
from jaxprompt.models.t5.config import T5Config

Path = tuple[str, ...]  # of modules and a name, as in the parameter tree


class Place(NamedTuple):
    """Where a module's weight is in the parameter tree."""

    path: Path
    layer: int | None  # None: of no layer
    outputs: tuple[int, ...]  # axes of ours that are the first of the torch weight
    inputs: tuple[int, ...]  # and those that are its second; () where it has but one


class Sublayer(NamedTuple):
    """Attention or the MLP of one layer, as the torch model has it."""

    stack: str  # encoder, decoder, or layers of a decoder-only model
    layer: int
    kind: str  # attention, cross_attention or mlp
    module: str


def leaves(config: Config) -> list[Leaf]:
    """Every leaf of the parameter tree with the torch names that fill it."""
    if isinstance(config, DecoderConfig):
        return hf_decoder.leaves(config)
    if isinstance(config, EncoderConfig):
        return hf_encoder.leaves(config)
    return hf_t5.leaves(config)


def places(config: Config) -> dict[str, Place]:
    """Name of a torch module with a weight -> its place."""
    by_module = {}
    for leaf in leaves(config):
        sizes = layer_sizes(leaf, axis_sizes(config))
        for number, piece in enumerate(leaf.pieces):
            outputs, inputs = (*piece.axes.split(), "")[:2]
            by_module[piece.name.removesuffix(".weight")] = Place(
                leaf.path,
                number if "layers" in leaf.path else None,
                tuple(sizes[letter] for letter in outputs),
                tuple(sizes[letter] for letter in inputs),
            )
    return by_module


def module_of(path: Path) -> str:
    """The torch module of a leaf of the layers or their norms, with {} for the layer's number."""
    decoder_only = path[0] in ("layers", "final_norm")
    piece = (hf_decoder if decoder_only else hf_t5).piece_of("/".join(path))
    return piece.name.removesuffix(".weight")


def paths_like(path: Path) -> Iterator[Path]:
    """The weights and norms of a T5's layers, if the leaf at ``path`` is of one; else none.

    In a T5 modules of several kinds have the same name, such as q. In a layer of a decoder-only
    model each name is there once.
    """
    if path[0] in ("layers", "final_norm"):
        return
    for stack, parts in SUBLAYERS.items():
        yield stack, "final_norm", "scale"
        for part in parts:
            yield stack, "layers", f"{part}_norm", "scale"
            names = ("wi", "wi_0", "wi_1", "wo")
            for name in names if part == "mlp" else ("query", "key", "value", "out"):
                yield stack, "layers", part, name


def depths_of(config: Config) -> dict[str, int]:
    """The layers of each stack, or those of "layers" of a decoder-only model."""
    if isinstance(config, DecoderConfig):
        return {"layers": config.num_layers}
    return depths(_with_decoder(config))


def _with_decoder(config: T5Config | EncoderConfig) -> T5Config:
    """The config of a T5; adapters of other libraries are not read for encoders with a mask."""
    if isinstance(config, EncoderConfig):
        raise UserError(
            "The backbone is an encoder with a mask, for which no adapters of other libraries are "
            "read or written; use a T5 or a decoder-only model."
        )
    return config


def sublayers(depths: dict[str, int]) -> Iterator[Sublayer]:
    """All of them, encoder first.

    Args:
        depths: see ``depths_of``.
    """
    for layer in range(depths.get("layers", 0)):
        for kind, module in (("attention", "self_attn"), ("mlp", "mlp")):
            yield Sublayer("layers", layer, kind, f"model.layers.{layer}.{module}")
    for stack, parts in SUBLAYERS.items():
        for layer in range(depths.get(stack, 0)):
            for number, part in enumerate(parts):
                kind = part.removeprefix("self_")
                yield Sublayer(stack, layer, kind, f"{stack}.block.{layer}.layer.{number}")


def decoder_attention(config: Config) -> tuple[int, int, Path]:
    """Layers, heads of keys, and path of the attention in which a decoder reads its own text."""
    if isinstance(config, DecoderConfig):
        return config.num_layers, config.num_kv_heads, ("layers", "attention")
    layers, heads = _with_decoder(config).num_decoder_layers, config.num_heads
    return layers, heads, ("decoder", "layers", "self_attention")
