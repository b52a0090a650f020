"""GGUF files of llama.cpp, through the ``gguf`` package: config and tensors.

Quantised tensors are dequantised as they are read, rows at a time. Their names become those of
Hugging Face's files, so that one map (``hf_decoder.py``) serves both formats. llama.cpp rotates
neighbouring dimensions of a head, and Hugging Face rotates the halves. So llama.cpp's converter
reorders the rows of query and key of llama models. Here they get their old order back.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxprompt.config.errors import UserError, shown
from jaxprompt.data.gguf_tokenizer import open_gguf, value
from jaxprompt.models.checkpoints.hf_decoder import head_dim
from jaxprompt.models.checkpoints.leaf import DTYPES, Index, Tensor
from jaxprompt.models.checkpoints.metadata import (
    MOST_LAYERS,
    read_choice,
    read_epsilon,
    read_id,
    read_number,
    read_size,
)
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.runtime.json_file import JsonObject

if TYPE_CHECKING:
    from gguf import GGUFReader
    from gguf.gguf_reader import ReaderTensor

_ARCHITECTURES = ("llama", "qwen2")
_IDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.padding_token_id")
_QUANTISATION = "general.quantization_version"
_EPSILON = "attention.layer_norm_rms_epsilon"
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_FLOATS = ("F32", "F16", "BF16", "F64")
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: Path) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """Config and unread tensors, under their Hugging Face names.

    Keys, also those of older versions, and absent keys mean what they mean to llama.cpp
    (llama-model.cpp).

    Raises:
        UserError: the file is damaged, or a key asks for something that this model cannot do.
    """
    reader = open_gguf(path)
    kind = value(reader, "general.architecture")
    if kind not in _ARCHITECTURES:
        raise UserError(
            f"{path} holds a model of architecture {shown(kind)}; supported are "
            f"{', '.join(_ARCHITECTURES)} (SmolLM2 and Mistral are llama)"
        )
    own = [key for key in reader.fields if key.startswith(f"{kind}.")]
    facts: JsonObject = {key: _uniform(value(reader, key)) for key in (*own, *_IDS, _QUANTISATION)}
    heads = read_size(path, facts, f"{kind}.attention.head_count")
    groups = read_size(path, facts, f"{kind}.attention.head_count_kv", heads)
    width = read_size(path, facts, f"{kind}.embedding_length")
    size = head_dim(path, facts, f"{kind}.attention.key_length", width, heads, groups)
    tensors = _tensors(path, reader, facts, {"attn_q": heads, "attn_k": groups}, kind)
    rows = tensors["model.embed_tokens.weight"].shape[0]
    _refuse(path, facts, kind, {"head_dim": size, "rows": rows})
    eos = read_id(path, facts, _IDS[0], 2, rows=rows)
    config = DecoderConfig(
        vocab_size=rows,
        d_model=width,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=size,
        d_ff=read_size(path, facts, f"{kind}.feed_forward_length"),
        num_layers=read_size(path, facts, f"{kind}.block_count", max_value=MOST_LAYERS),
        model_type=kind,
        tied="lm_head.weight" not in tensors,
        qkv_bias=kind == "qwen2",
        rope_theta=read_number(path, facts, f"{kind}.rope.freq_base", 10_000.0, min_value=1.0),
        rope_scaling=_scaling(path, facts, kind),
        norm_eps=float(np.float32(read_epsilon(path, facts, f"{kind}.{_EPSILON}", None))),
        pad_id=read_id(path, facts, _IDS[1], eos, rows=rows),
        eos_id=eos,
    )
    return config, tensors


def _uniform(value: object) -> object:
    """A list with one value for each layer as that value, if all of them are the same."""
    if isinstance(value, list) and value and all(each == value[0] for each in value):
        return value[0]
    return value


def _scaling(path: Path, facts: JsonObject, kind: str) -> tuple[float, ...]:
    """(factor,) by which rotary positions are divided, or () for none.

    A factor without a type is linear. The first files had it under another name.
    """
    scaling = read_choice(path, facts, f"{kind}.rope.scaling.type", ("none", "linear"), "linear")
    first, old = f"{kind}.rope.scaling.factor", f"{kind}.rope.scale_linear"
    factor = read_number(path, facts, old if facts.get(first) is None else first, 0.0)
    return (factor,) if scaling == "linear" and factor not in (0, 1) else ()


def _refuse(path: Path, facts: JsonObject, kind: str, sizes: dict[str, int]) -> None:
    """Raise UserError for keys which say that the model differs from the one that we compute."""
    width = read_number(path, facts, f"{kind}.context_length", 0.0)
    window = read_number(path, facts, f"{kind}.attention.sliding_window", 0.0)
    allowed: dict[str, tuple[object, ...]] = {
        "rope.dimension_count": (sizes["head_dim"],),
        "attention.value_length": (sizes["head_dim"],),
        "vocab_size": (sizes["rows"],),
        "rope.scaling.attn_factor": (1,),
        "attention.causal": (True,),
        "attention.sliding_window": (window,) if window >= width else (0,),
        "use_parallel_residual": (False,),
        "logit_scale": (0, 1),
        "residual_scale": (0, 1),
        "embedding_scale": (0, 1),
        **{f"attention.{key}": (0,) for key in ("clamp_kqv", "max_alibi_bias")},
        **{key: (0,) for key in ("expert_count", *_SOFTCAPS)},
    }
    for name, values in allowed.items():
        value = facts.get(f"{kind}.{name}")
        if value is not None and value not in values:
            raise UserError(
                f"{path}: {kind}.{name} is {shown(value)}; only {values[-1]} is supported"
            )
    scale = read_number(path, facts, f"{kind}.attention.scale", 0.0)
    usual = sizes["head_dim"] ** -0.5
    if scale and not np.isclose(scale, usual, rtol=1e-3):
        raise UserError(
            f"{path}: {kind}.attention.scale is {shown(scale)}; only {usual:g} is supported"
        )


def _tensors(
    path: Path, reader: "GGUFReader", facts: JsonObject, turned: dict[str, int], kind: str
) -> dict[str, Tensor]:
    """All tensors under their Hugging Face names.

    Args:
        turned: name of a matrix whose rows llama.cpp reorders -> its number of heads.
    """
    tensors: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        name = _name(tensor.name)
        if tensor.name == "rope_freqs.weight":
            raise UserError(
                f"{path} has rotary frequencies of its own (Llama 3.1); load that model from its "
                "Hugging Face files"
            )
        if name in tensors:
            raise UserError(f"{path} holds {shown(name)} twice; download it again")
        if facts[_QUANTISATION] not in (None, 2) and tensor.tensor_type.name not in _FLOATS:
            raise UserError(
                f"{path}: {_QUANTISATION} is {shown(facts[_QUANTISATION])}, an older layout of "
                "quantised values; only 2 can be read"
            )
        heads = turned.get(tensor.name.split(".")[-2]) if name != tensor.name else None
        tensors[name] = _tensor(path, name, tensor, heads if kind == "llama" else None)
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{path} holds no matrix token_embd.weight; it is no whole model")
    return tensors


def _name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in _BLOCK:
        return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.{parts[3]}"
    if parts[0] in _TOP:
        return ".".join([_TOP[parts[0]], *parts[1:]])
    return name  # it has no place in the model, and the loader will say so


def _tensor(path: Path, name: str, tensor: "ReaderTensor", heads: int | None) -> Tensor:
    """One unread tensor.

    Args:
        heads: of a matrix whose rows are pairs of neighbours, and shall be two halves of a head.
    """
    import gguf

    shape = tuple(int(n) for n in reversed(tensor.shape))
    kind = tensor.tensor_type
    try:
        with np.errstate(all="ignore"):
            gguf.quants.dequantize(tensor.data[:1], kind)
    except NotImplementedError:
        raise UserError(
            f"{path}: tensor {tensor.name} is stored as {kind.name}, which the gguf package cannot "
            "dequantise; use a file of another quantisation, such as Q8_0"
        ) from None

    def read(index: Index) -> np.ndarray:
        rows, *rest = index
        with np.errstate(all="ignore"):  # the loader refuses values that are not finite
            values = gguf.quants.dequantize(tensor.data[rows], kind)
        if heads is not None:  # a slice of whole heads: the loader cuts between them
            width = shape[0] // heads
            pairs = values.reshape(-1, width // 2, 2, *shape[1:])
            values = pairs.swapaxes(1, 2).reshape(-1, *shape[1:])
        return values[(slice(None), *rest)]

    return Tensor(name, str(path), shape, DTYPES["float32"], read)
