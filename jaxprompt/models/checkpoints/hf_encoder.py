"""Hugging Face checkpoints of encoders with a mask: config.json and tensor names.

Three layouts: BERT, RoBERTa, DistilBERT. Each is a table of names, which is also the map for
writing.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jaxprompt.config.errors import UserError, shown
from jaxprompt.models.checkpoints.leaf import Leaf, Piece, Tensor, each_layer, map_leaves, same
from jaxprompt.models.checkpoints.metadata import (
    MOST_LAYERS,
    read_choice,
    read_epsilon,
    read_id,
    read_size,
)
from jaxprompt.models.encoder.config import EncoderConfig
from jaxprompt.models.ops.activations import HUGGING_FACE_NAMES
from jaxprompt.runtime.json_file import JsonObject, read_json

MASKS = ("[MASK]", "<mask>")  # what the three call the token


class _Layout(NamedTuple):
    """Names of modules of one layout: in the model, in each layer and of the head."""

    architecture: str
    stem: str  # of the encoder
    layer: str  # of layer {}
    attention: tuple[str, str, str, str]  # query, key, value, out
    attention_norm: str
    mlp: tuple[str, str]
    mlp_norm: str
    head: tuple[str, str]  # dense and norm
    head_bias: str
    keys: Mapping[str, str]  # of sizes in config.json

    @property
    def table(self) -> str:
        """The embedding of words."""
        return f"{self.stem}.embeddings.word_embeddings.weight"


_BERT_KEYS = {
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "inner": "intermediate_size",
    "activation": "hidden_act",
}
_BERT = _Layout(
    architecture="BertForMaskedLM",
    stem="bert",
    layer="bert.encoder.layer.{}",
    attention=(
        *("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output.dense",
    ),
    attention_norm="attention.output.LayerNorm",
    mlp=("intermediate.dense", "output.dense"),
    mlp_norm="output.LayerNorm",
    head=("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
    head_bias="cls.predictions.bias",
    keys=_BERT_KEYS,
)
LAYOUTS: dict[str, _Layout] = {
    "bert": _BERT,
    "roberta": _BERT._replace(
        architecture="RobertaForMaskedLM",
        stem="roberta",
        layer="roberta.encoder.layer.{}",
        head=("lm_head.dense", "lm_head.layer_norm"),
        head_bias="lm_head.bias",
    ),
    "distilbert": _Layout(
        architecture="DistilBertForMaskedLM",
        stem="distilbert",
        layer="distilbert.transformer.layer.{}",
        attention=(
            *("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            "attention.out_lin",
        ),
        attention_norm="sa_layer_norm",
        mlp=("ffn.lin1", "ffn.lin2"),
        mlp_norm="output_layer_norm",
        head=("vocab_transform", "vocab_layer_norm"),
        head_bias="vocab_projector.bias",
        keys={
            "width": "dim",
            "heads": "n_heads",
            "layers": "n_layers",
            "inner": "hidden_dim",
            "activation": "activation",
        },
    ),
}
MODEL_TYPES = tuple(LAYOUTS)


def config_from_json(path: Path, mask_id: int | None = None) -> EncoderConfig:
    """The config in a config.json of transformers 4 or 5.

    Args:
        mask_id: what the tokenizer beside it says; ``mask_token_id`` of the config goes first.

    Raises:
        UserError: a value is missing or out of range, or this model cannot follow it.
    """
    raw = read_json(path)
    kind = read_choice(path, raw, "model_type", MODEL_TYPES)
    keys, refused = LAYOUTS[kind].keys, {"is_decoder": False, "add_cross_attention": False}
    refused |= {"position_embedding_type": "absolute", "tie_word_embeddings": True}
    for key, allowed in refused.items():
        if raw.get(key, allowed) not in (allowed, None):
            raise UserError(f"{path}: {key} is {shown(raw[key])}; only {allowed!r} is supported")
    rows = read_size(path, raw, "vocab_size")
    heads, width = read_size(path, raw, keys["heads"]), read_size(path, raw, keys["width"])
    if width % heads:
        raise UserError(f"{path}: {heads} heads cannot share a width of {width} evenly")
    if mask_id is None and raw.get("mask_token_id") is None:
        raise UserError(
            f"{path}: no tokenizer beside it has {' or '.join(MASKS)}; put tokenizer.json or "
            "vocab.txt there, or give the token's id as mask_token_id"
        )
    activation = HUGGING_FACE_NAMES[
        read_choice(path, raw, keys["activation"], HUGGING_FACE_NAMES, "gelu")
    ]
    roberta = kind == "roberta"
    pad = read_id(path, raw, "pad_token_id", int(roberta), rows=rows)
    first = pad + 1 if roberta else 0
    positions = read_size(path, raw, "max_position_embeddings", 512)
    if positions <= first:
        raise UserError(
            f"{path}: max_position_embeddings is {positions}, and the first position is {first}; "
            "give more"
        )
    types = 0 if kind == "distilbert" else read_size(path, raw, "type_vocab_size", 2)
    # a DistilBERT has no key for it
    eps = 1e-12 if kind == "distilbert" else read_epsilon(path, raw, "layer_norm_eps", 1e-12)
    return EncoderConfig(
        vocab_size=rows,
        d_model=width,
        num_heads=heads,
        head_dim=width // heads,
        d_ff=read_size(path, raw, keys["inner"]),
        num_layers=read_size(path, raw, keys["layers"], max_value=MOST_LAYERS),
        mask_id=read_id(path, raw, "mask_token_id", mask_id or 0, rows=rows),
        max_positions=positions,
        model_type=kind,
        first_position=first,
        num_types=types,
        activation=activation,
        head_activation="gelu_exact" if roberta else activation,
        norm_eps=eps,
        pad_id=pad,
        eos_id=read_id(path, raw, "eos_token_id", 0, rows=rows),
    )


def read_mask_id(directory: Path) -> int | None:
    """The id of the mask in the tokenizer of a directory; None where none is known there."""
    whole, lines, pieces = (
        directory / name for name in ("tokenizer.json", "vocab.txt", "vocab.json")
    )
    found: Mapping[str, object] = {}
    if whole.is_file():
        added = read_json(whole).get("added_tokens")
        rows = [token for token in added if isinstance(token, dict)] if added else []  # pyright: ignore
        found = {str(token.get("content")): token.get("id") for token in rows}
    elif lines.is_file():
        words = lines.read_text(encoding="utf-8", errors="replace").split("\n")
        found = {word.rstrip("\r"): number for number, word in enumerate(words)}
    elif pieces.is_file():
        found = read_json(pieces)
    ids = [found[name] for name in MASKS if name in found]
    return ids[0] if ids and type(ids[0]) is int else None


def config_to_json(config: EncoderConfig, dtype: str) -> JsonObject:
    """A config.json that transformers 4 and 5 read, and that ``config_from_json`` reads back."""
    layout = LAYOUTS[config.model_type]
    names = {ours: theirs for theirs, ours in reversed(HUGGING_FACE_NAMES.items())}
    sizes: JsonObject = {
        layout.keys["width"]: config.d_model,
        layout.keys["heads"]: config.num_heads,
        layout.keys["layers"]: config.num_layers,
        layout.keys["inner"]: config.d_ff,
        layout.keys["activation"]: names[config.activation],
    }
    if config.model_type != "distilbert":
        sizes |= {"type_vocab_size": config.num_types, "layer_norm_eps": config.norm_eps}
    return {
        "architectures": [layout.architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        **sizes,
        "max_position_embeddings": config.max_positions,
        "pad_token_id": config.pad_id,
        "eos_token_id": config.eos_id,
        "mask_token_id": config.mask_id,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
    }


def _top(layout: _Layout, num_types: int) -> dict[str, tuple[str, Piece]]:
    """Axes and tensor of each leaf that is in no layer."""
    embeddings = f"{layout.stem}.embeddings"
    dense, norm = layout.head
    table = {
        "token_embedder/embedding": ("VD", Piece(layout.table, "V D")),
        "position_embedding": ("MD", Piece(f"{embeddings}.position_embeddings.weight", "M D")),
        "type_embedding": ("UD", Piece(f"{embeddings}.token_type_embeddings.weight", "U D")),
        "embedding_norm/scale": ("D", Piece(f"{embeddings}.LayerNorm.weight", "D")),
        "embedding_norm/bias": ("D", Piece(f"{embeddings}.LayerNorm.bias", "D")),
        # both axes of the head's matrix have the size D; O is the second one's
        "transform": ("DO", Piece(f"{dense}.weight", "O D")),
        "transform_bias": ("D", Piece(f"{dense}.bias", "D")),
        "head_norm/scale": ("D", Piece(f"{norm}.weight", "D")),
        "head_norm/bias": ("D", Piece(f"{norm}.bias", "D")),
        "head_bias": ("V", Piece(layout.head_bias, "V")),
    }
    if not num_types:
        del table["type_embedding"]
    return table


def _in_layers(layout: _Layout) -> dict[str, tuple[str, Piece]]:
    """Axes and tensor of each leaf of the layers, with {} for the number of the layer."""
    axes = {
        "attention/query": ("DNH", "NH D", "NH"),
        "attention/key": ("DNH", "NH D", "NH"),
        "attention/value": ("DNH", "NH D", "NH"),
        "attention/out": ("NHD", "D NH", "D"),
        "mlp/wi": ("DF", "F D", "F"),
        "mlp/wo": ("FD", "D F", "D"),
    }
    modules = dict(zip(axes, (*layout.attention, *layout.mlp), strict=True))
    leaves: dict[str, tuple[str, Piece]] = {}
    for path, (ours, theirs, bias) in axes.items():
        name = f"{layout.layer}.{modules[path]}"
        leaves[f"encoder/layers/{path}"] = f"L{ours}", Piece(f"{name}.weight", theirs)
        leaves[f"encoder/layers/{path}_bias"] = f"L{bias}", Piece(f"{name}.bias", bias)
    for path, module in (
        ("attention_norm", layout.attention_norm),
        ("mlp_norm", layout.mlp_norm),
    ):
        name = f"{layout.layer}.{module}"
        leaves[f"encoder/layers/{path}/scale"] = "LD", Piece(f"{name}.weight", "D")
        leaves[f"encoder/layers/{path}/bias"] = "LD", Piece(f"{name}.bias", "D")
    return leaves


def leaves(config: EncoderConfig) -> list[Leaf]:
    """Every leaf of the parameter tree with the torch names that fill it."""
    layout = LAYOUTS[config.model_type]
    top, layers = _top(layout, config.num_types), _in_layers(layout)

    def pieces(path: str) -> list[Piece]:
        if path in top:
            return [top[path][1]]
        return each_layer(config.num_layers, *layers[path][1])

    return map_leaves({path: axes for path, (axes, _) in (top | layers).items()}, pieces)


# what a masked language model has no use for: a classifier on the first token, the prediction of
# the next sentence, and buffers that older versions saved
_UNUSED = re.compile(r"(\w+\.)?pooler\..*|cls\.seq_relationship\..*|.*\.position_ids")
_OLD_NORMS = {"gamma": "weight", "beta": "bias"}  # of the first BERTs


def tidy(tensors: dict[str, Tensor], kind: str, where: Path) -> dict[str, Tensor]:
    """The tensors that the model has a place for, by their names of today.

    Args:
        kind: the model's type.
        where: the directory, for errors.

    Raises:
        UserError: the checkpoint has no head of a masked language model, or one of its own.
    """
    layout, kept = LAYOUTS[kind], {}
    for name, tensor in tensors.items():
        module, _, field = name.rpartition(".")
        if not _UNUSED.fullmatch(name):
            kept[f"{module}.{_OLD_NORMS[field]}" if field in _OLD_NORMS else name] = tensor
    last = layout.head_bias.removesuffix("bias")
    copies = {f"{last}weight", f"{last}decoder.weight"}
    for name in copies & kept.keys():
        if layout.table in kept and not same(kept[layout.table], kept[name]):
            raise UserError(
                f"{where}: {name} is not {layout.table}; only heads that are the embedding are "
                "supported"
            )
        del kept[name]
    bias = kept.pop(f"{last}decoder.bias", None)
    if bias is not None:  # a copy, of which transformers writes either or both
        kept.setdefault(layout.head_bias, bias)
    if f"{layout.head[0]}.weight" not in kept or layout.head_bias not in kept:
        raise UserError(
            f"{where} has no head that predicts a mask (a {layout.architecture} has "
            f"{layout.head[0]}); name a checkpoint with one"
        )
    return kept
