"""Hugging Face checkpoints of decoder-only models: config.json and tensor names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jaxprompt.config.errors import UserError, shown
from jaxprompt.models.checkpoints.int8 import dequantised
from jaxprompt.models.checkpoints.leaf import Leaf, Piece, Tensor, each_layer, map_leaves, same
from jaxprompt.models.checkpoints.metadata import (
    MOST_LAYERS,
    read_choice,
    read_epsilon,
    read_id,
    read_number,
    read_size,
)
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.ops.activations import HUGGING_FACE_NAMES
from jaxprompt.runtime.json_file import JsonObject, read_json

MODEL_TYPES = ("llama", "mistral", "qwen2")  # SmolLM2 is a llama
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BUFFER = re.compile(r".*\.rotary_emb\.inv_freq")  # that older versions saved
_ACTIVATIONS = ("silu", "swish", "gelu_pytorch_tanh", "gelu_new")


def config_from_json(path: Path, *, tied: bool) -> DecoderConfig:
    """The config in a config.json of transformers 4 or 5.

    Args:
        tied: whether the checkpoint has no head of its own.

    Raises:
        UserError: a value is missing or out of range, or this model cannot follow it, such as a
            kind of rotary scaling.
    """
    raw = read_json(path)
    kind = read_choice(path, raw, "model_type", MODEL_TYPES)
    refused = {"mlp_bias": False, "use_sliding_window": False, "pretraining_tp": 1}
    if kind == "llama":
        refused["attention_bias"] = False
    for key, allowed in refused.items():
        if raw.get(key, allowed) not in (allowed, None):
            raise UserError(f"{path}: {key} is {shown(raw[key])}; only {allowed!r} is supported")
    activation = read_choice(path, raw, "hidden_act", _ACTIVATIONS, "silu")
    heads, width = read_size(path, raw, "num_attention_heads"), read_size(path, raw, "hidden_size")
    groups = read_size(path, raw, "num_key_value_heads", heads)
    theta, scaling = _rope(path, raw)
    window = raw.get("sliding_window") if kind == "mistral" else None
    rows = read_size(path, raw, "vocab_size")
    eos = read_id(path, raw, "eos_token_id", 2, rows=rows)
    # the first Llamas wrote -1 for no padding token
    no_padding = {"pad_token_id": None} if raw.get("pad_token_id") == -1 else {}
    return DecoderConfig(
        vocab_size=rows,
        d_model=width,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=head_dim(path, raw, "head_dim", width, heads, groups),
        d_ff=read_size(path, raw, "intermediate_size"),
        num_layers=read_size(path, raw, "num_hidden_layers", max_value=MOST_LAYERS),
        model_type=kind,
        activation=HUGGING_FACE_NAMES[activation],
        tied=tied,
        qkv_bias=kind == "qwen2",
        rope_theta=theta,
        rope_scaling=scaling,
        window=None if window is None else read_size(path, raw, "sliding_window"),
        norm_eps=read_epsilon(path, raw, "rms_norm_eps", 1e-6),
        pad_id=read_id(path, {**raw, **no_padding}, "pad_token_id", eos, rows=rows),
        eos_id=eos,
    )


def head_dim(
    path: Path, raw: Mapping[str, object], key: str, width: int, heads: int, groups: int
) -> int:
    """H, by default ``width / heads``; UserError if heads and groups do not fit."""
    if heads % groups:
        raise UserError(
            f"{path}: {heads} query heads cannot share {groups} heads of keys and values evenly"
        )
    if raw.get(key) is None and width % heads:
        raise UserError(f"{path}: {heads} heads cannot share a width of {width} evenly")
    size = read_size(path, raw, key, width // heads)
    if size % 2:
        raise UserError(f"{path}: a head has {size} numbers; rotary positions need an even number")
    return size


def _rope(path: Path, raw: Mapping[str, object]) -> tuple[float, tuple[float, ...]]:
    """Base and scaling. Version 5 of transformers keeps both under ``rope_parameters``."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"{path}: rope_parameters or rope_scaling is {shown(rope)}, expected one object for "
            "all layers"
        )
    where = rope if rope.get("rope_theta") is not None else raw
    theta = read_number(path, where, "rope_theta", 10_000.0, min_value=1.0)
    share = read_number(path, {**raw, **rope}, "partial_rotary_factor", 1.0)
    if share != 1:
        raise UserError(f"{path}: partial_rotary_factor is {share:g}; only 1 is supported")
    kind = rope.get("rope_type", rope.get("type"))
    kind = "default" if kind is None else kind
    keys = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            *("factor", "low_freq_factor", "high_freq_factor"),
            "original_max_position_embeddings",
        ),
    }
    if not isinstance(kind, str) or kind not in keys:
        raise UserError(
            f"{path}: rotary positions of type {shown(kind)} are not supported, "
            f"use {', '.join(keys)}"
        )
    lacking = [key for key in keys[kind] if rope.get(key) is None]
    if lacking:
        raise UserError(f"{path}: rotary positions of type {kind!r} need {lacking[0]}")
    scaling = tuple(read_number(path, rope, key, min_value=1e-6) for key in keys[kind])
    if kind == "llama3" and scaling[1] >= scaling[2]:
        raise UserError(
            f"{path}: low_freq_factor is {scaling[1]:g} and high_freq_factor {scaling[2]:g}; the "
            "second must be larger"
        )
    return theta, scaling


def config_to_json(config: DecoderConfig, dtype: str) -> JsonObject:
    """A config.json that transformers 4 and 5 read, and that ``config_from_json`` reads back."""
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[config.model_type]
    kinds = {0: "default", 1: "linear", 4: "llama3"}
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling: dict[str, float] = dict(zip(keys, config.rope_scaling, strict=False))
    if keys[-1] in scaling:
        scaling[keys[-1]] = int(scaling[keys[-1]])
    rope: JsonObject = {"rope_type": kinds[len(config.rope_scaling)], **scaling}
    activation = {"gelu": "gelu_pytorch_tanh"}.get(config.activation, config.activation)
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        **({"rope_scaling": rope} if config.rope_scaling else {}),
        **({"sliding_window": config.window} if config.model_type == "mistral" else {}),
        "tie_word_embeddings": config.tied,
        "pad_token_id": config.pad_id,
        "eos_token_id": config.eos_id,
        "use_cache": True,
        "torch_dtype": dtype,
    }


class _Weight(NamedTuple):
    """One weight of each layer."""

    axes: str  # in the parameter tree, without the layers'
    name: str  # in the file, below the layer
    file_axes: str


def _attention_weights(qkv_bias: bool) -> dict[str, _Weight]:
    weights = {}
    for name, letter in (("query", "N"), ("key", "G"), ("value", "G")):
        module = f"self_attn.{name[0]}_proj"
        weights[name] = _Weight(f"D{letter}H", f"{module}.weight", f"{letter}H D")
        if qkv_bias:
            weights[f"{name}_bias"] = _Weight(f"{letter}H", f"{module}.bias", f"{letter}H")
    return {**weights, "out": _Weight("NHD", "self_attn.o_proj.weight", "D NH")}


_MLP_WEIGHTS = {
    "wi_0": _Weight("DF", "mlp.gate_proj.weight", "F D"),
    "wi_1": _Weight("DF", "mlp.up_proj.weight", "F D"),
    "wo": _Weight("FD", "mlp.down_proj.weight", "D F"),
}


_TOP = {
    "token_embedder/embedding": ("VD", Piece(_EMBEDDING, "V D")),
    "final_norm/scale": ("D", Piece("model.norm.weight", "D")),
}


def _layer_weights(qkv_bias: bool) -> dict[str, _Weight]:
    attention = _attention_weights(qkv_bias)
    return {
        "attention_norm/scale": _Weight("D", "input_layernorm.weight", "D"),
        **{f"attention/{name}": weight for name, weight in attention.items()},
        "mlp_norm/scale": _Weight("D", "post_attention_layernorm.weight", "D"),
        **{f"mlp/{name}": weight for name, weight in _MLP_WEIGHTS.items()},
    }


def leaves(config: DecoderConfig) -> list[Leaf]:
    """Every leaf of the parameter tree with the torch names that fill it."""
    axes = {path: letters for path, (letters, _) in _TOP.items()}
    weights = _layer_weights(config.qkv_bias)
    axes |= {f"layers/{path}": f"L{weight.axes}" for path, weight in weights.items()}
    if not config.tied:
        axes["head"] = "DV"

    def pieces(path: str) -> list[Piece]:
        if path == "head":
            return [Piece(_HEAD, "V D")]
        if path in _TOP:
            return [piece_of(path)]
        return each_layer(config.num_layers, *piece_of(path))

    return map_leaves(axes, pieces)


def piece_of(path: str) -> Piece:
    """The tensor of a leaf but the head, with {} for the number of its layer."""
    if path in _TOP:
        return _TOP[path][1]
    weight = _layer_weights(qkv_bias=True)[path.removeprefix("layers/")]
    return Piece(f"model.layers.{{}}.{weight.name}", weight.file_axes)


def tidy(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The tensors without buffers and copies of the embedding, and whether the head is tied."""
    kept = {n: t for n, t in dequantised(tensors).items() if not _BUFFER.fullmatch(n)}
    if _EMBEDDING in kept and _HEAD in kept and same(kept[_EMBEDDING], kept[_HEAD]):
        del kept[_HEAD]
    return kept, _HEAD not in kept
