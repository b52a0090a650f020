"""Hugging Face checkpoints of the T5 family: config.json and tensor names.

One table of names serves safetensors, torch and flax files. It is also the map for writing.
"""

from pathlib import Path

from jaxprompt.config.errors import UserError, shown
from jaxprompt.models.checkpoints.int8 import dequantised
from jaxprompt.models.checkpoints.leaf import Leaf, Piece, Tensor, each_layer, map_leaves, same
from jaxprompt.models.checkpoints.metadata import (
    MOST_LAYERS,
    read_epsilon,
    read_flag,
    read_id,
    read_size,
)
from jaxprompt.models.checkpoints.t5_tree import SUBLAYERS, depths, tree_axes
from jaxprompt.models.ops.activations import HUGGING_FACE_NAMES
from jaxprompt.models.t5.config import T5Config
from jaxprompt.runtime.json_file import JsonObject, read_json

# A plain "gelu" outside "gated-gelu" is the exact form. No T5 uses it, so it is not here.
_ACTIVATIONS = {name: ours for name, ours in HUGGING_FACE_NAMES.items() if name != "gelu"}
_DEFAULT_PROJECTION = {"t5": "relu", "mt5": "gated-gelu", "umt5": "gated-gelu"}
_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_HEAD = "lm_head.weight"
_IGNORED = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}


def config_from_json(path: Path, *, tied: bool) -> T5Config:
    """The config in a Hugging Face config.json.

    Args:
        tied: whether the checkpoint has no head of its own. The weights decide that, because
            transformers 5 writes ``tie_word_embeddings: true`` for every T5. In older versions this
            flag also says whether the decoder output is scaled; version 5 says so in
            ``scale_decoder_outputs``. The output of an mT5 is never scaled.

    Raises:
        UserError: a value is missing or out of range, or the model is of another kind.
    """
    raw = read_json(path)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in _DEFAULT_PROJECTION:
        raise UserError(
            f"{path}: model_type {shown(family)} is not supported, only "
            f"{', '.join(_DEFAULT_PROJECTION)} (T5 1.0, 1.1, LM-adapted, Flan and ByT5 are t5), "
            "llama (SmolLM2 is one), mistral, qwen2, bert, roberta and distilbert"
        )
    gated, activation = _projection(
        path, raw.get("feed_forward_proj") or _DEFAULT_PROJECTION[family]
    )
    scaled = family != "mt5" and read_flag(path, raw, "tie_word_embeddings", True)
    layers = read_size(path, raw, "num_layers", max_value=MOST_LAYERS)
    rows = read_size(path, raw, "vocab_size")
    buckets = read_size(path, raw, "relative_attention_num_buckets", 32)
    farthest = read_size(path, raw, "relative_attention_max_distance", 128)
    if buckets < 4 or farthest <= buckets // 2:
        raise UserError(
            f"{path}: relative_attention_num_buckets is {buckets} and "
            f"relative_attention_max_distance is {farthest}; there must be at least 4 buckets, and "
            "the distance must be more than half of them"
        )
    return T5Config(
        vocab_size=rows,
        d_model=read_size(path, raw, "d_model"),
        num_heads=read_size(path, raw, "num_heads"),
        head_dim=read_size(path, raw, "d_kv"),
        d_ff=read_size(path, raw, "d_ff"),
        num_encoder_layers=layers,
        num_decoder_layers=read_size(
            path, raw, "num_decoder_layers", layers, max_value=MOST_LAYERS
        ),
        gated=gated,
        activation=activation,
        tied=tied,
        scale_output=read_flag(path, raw, "scale_decoder_outputs", scaled),
        per_layer_bias=family == "umt5",
        buckets=buckets,
        max_distance=farthest,
        norm_eps=read_epsilon(path, raw, "layer_norm_epsilon", 1e-6),
        decoder_start_id=read_id(path, raw, "decoder_start_token_id", 0, rows=rows),
        pad_id=read_id(path, raw, "pad_token_id", 0, rows=rows),
        eos_id=read_id(path, raw, "eos_token_id", 1, rows=rows),
    )


# tie_word_embeddings of transformers if config.json does not have the key
_TIED_BY_DEFAULT = {"t5": True, "umt5": True}


def check_head(path: Path, *, tied: bool, head: str = _HEAD) -> None:
    """Raise UserError if the config promises a head of its own and the checkpoint has none.

    The other way round is no error: a head in the checkpoint counts whatever the config says.

    Args:
        tied: whether the checkpoint has no head.
        head: the name of the head's tensor in this format.
    """
    raw = read_json(path)
    default = _TIED_BY_DEFAULT.get(str(raw.get("model_type")), False)
    if tied and not read_flag(path, raw, "tie_word_embeddings", default):
        state = "is false" if "tie_word_embeddings" in raw else "is absent, which means false"
        raise UserError(
            f"{path}: tie_word_embeddings {state}, and 1 tensor is missing ({head}): the "
            "checkpoint has lost its head; download it again, or set tie_word_embeddings to true "
            "if the embedding is the head too"
        )


def _projection(path: Path, name: object) -> tuple[bool, str]:
    """(gated, activation) of feed_forward_proj; "gated-gelu" has always meant the tanh form."""
    gated = isinstance(name, str) and name.startswith("gated-")
    function = "gelu_new" if name == "gated-gelu" else str(name)[:100].removeprefix("gated-")
    if not isinstance(name, str) or function not in _ACTIVATIONS:
        raise UserError(
            f"{path}: feed_forward_proj {shown(name)} is not supported, use gated-gelu or one of "
            f"{', '.join(_ACTIVATIONS)}, each with or without gated- in front"
        )
    return gated, _ACTIVATIONS[function]


def config_to_json(config: T5Config, dtype: str, dropout: float = 0.0) -> JsonObject:
    """A config.json that transformers 4 and 5 read, and that ``config_from_json`` reads back.

    tie_word_embeddings is true if the head is the embedding, and if the output is scaled, because
    version 4 has no other key for that. A head in the checkpoint counts in any case.
    """
    projection = {"gelu": "gelu_new"}.get(config.activation, config.activation)
    if config.gated:
        projection = "gated-" + {"gelu_new": "gelu"}.get(projection, projection)
    family = "umt5" if config.per_layer_bias else "t5"
    return {
        "architectures": [f"{'UMT5' if family == 'umt5' else 'T5'}ForConditionalGeneration"],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.head_dim,
        "d_ff": config.d_ff,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "feed_forward_proj": projection,
        "layer_norm_epsilon": config.norm_eps,
        "dropout_rate": dropout,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "use_cache": True,
        "tie_word_embeddings": config.tied or config.scale_output,
        "scale_decoder_outputs": config.scale_output,
        "decoder_start_token_id": config.decoder_start_id,
        "pad_token_id": config.pad_id,
        "eos_token_id": config.eos_id,
        "torch_dtype": dtype,
    }


_MODULES = {
    "attention": "SelfAttention",
    "self_attention": "SelfAttention",
    "cross_attention": "EncDecAttention",
    "mlp": "DenseReluDense",
}
# our name of a matrix -> its name in the module and its axes in the file
_MATRICES = {
    **{name: (name[0], "NH D") for name in ("query", "key", "value")},
    "out": ("o", "D NH"),
    **{name: (name, "F D") for name in ("wi", "wi_0", "wi_1")},
    "wo": ("wo", "D F"),
}


def leaves(config: T5Config) -> list[Leaf]:
    """Every leaf of the parameter tree with the torch names that fill it."""
    return map_leaves(tree_axes(config), lambda path: _pieces(path, config))


def _pieces(path: str, config: T5Config) -> list[Piece]:
    """The tensors of the leaf at ``path``."""
    if path == "token_embedder/embedding":
        return [Piece("shared.weight", "V D")]
    if path == "head":
        return [Piece(_HEAD, "V D")]
    piece, (stack, *inside) = piece_of(path), path.split("/")
    if inside[0] == "final_norm":
        return [piece]
    # a relative bias that the layers share lies in the first one
    return each_layer(depths(config)[stack] if inside[0] == "layers" else 1, *piece)


def piece_of(path: str) -> Piece:
    """The tensor of a leaf of the encoder or the decoder, with {} for the number of its layer."""
    stack, *inside = path.split("/")
    if inside[0] == "final_norm":
        return Piece(f"{stack}.final_layer_norm.weight", "D")
    name, axes = _in_layer(stack, *(inside[1:] if inside[0] == "layers" else inside))
    return Piece(f"{stack}.block.{{}}.layer.{name}.weight", axes)


def _in_layer(stack: str, part: str, matrix: str = "") -> tuple[str, str]:
    """Name below the layer, and axes, of one weight; the layer's parts are numbered."""
    if part == "relative_bias":
        return "0.SelfAttention.relative_attention_bias", "R N"
    number = SUBLAYERS[stack].index(part.removesuffix("_norm"))
    if part.endswith("_norm"):
        return f"{number}.layer_norm", "D"
    name, axes = _MATRICES[matrix]
    return f"{number}.{_MODULES[part]}.{name}", axes


def flax_leaf(leaf: Leaf) -> Leaf:
    """The same leaf in the names and axes of transformers' former Flax models."""
    return leaf._replace(pieces=tuple(_flax_piece(piece) for piece in leaf.pieces))


def _flax_piece(piece: Piece) -> Piece:
    *module, _ = piece.name.split(".")
    if module[-1] in ("shared", "relative_attention_bias"):
        return Piece("/".join([*module, "embedding"]), piece.axes)
    if module[-1].endswith("layer_norm"):
        return Piece("/".join([*module, "weight"]), piece.axes)
    return Piece("/".join([*module, "kernel"]), " ".join(reversed(piece.axes.split())))


def tidy(tensors: dict[str, Tensor], flax: bool) -> tuple[dict[str, Tensor], bool]:
    """Drop the copies of the embedding that other programs write.

    The embedding may have the stacks' names too, and a tied model may have it as lm_head. All
    copies must be equal.

    Returns:
        The other tensors, and whether the head is tied.

    Raises:
        UserError: the file has two different embeddings.
    """
    tensors = {n: t for n, t in dequantised(tensors).items() if n not in _IGNORED}
    embeddings, head = _EMBEDDINGS, _HEAD
    if flax:
        embeddings = tuple(
            n.replace(".", "/").replace("/weight", "/embedding") for n in _EMBEDDINGS
        )
        head = "lm_head/kernel"
    copies = [tensors.pop(name) for name in embeddings if name in tensors]
    for copy in copies[1:]:
        if not same(copies[0], copy):
            raise UserError(
                f"{copy.file}: {copies[0].name} and {copy.name} are two embeddings, and encoder "
                "and decoder of a T5 share one; the checkpoint is damaged or of another model"
            )
    if copies:
        tensors[embeddings[0]] = copies[0]
    if not flax and copies and head in tensors and same(copies[0], tensors[head]):
        del tensors[head]
    return tensors, head not in tensors
