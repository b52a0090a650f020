"""GGUF files of llama.cpp, through the ``gguf`` package: config and tensors.

Quantised tensors are dequantised as they are read, rows at a time. The names become those of
Hugging Face's files, so that one map (``llama_hf.py``) serves both. llama.cpp rotates neighbouring
dimensions of a head where Hugging Face rotates the halves, and for that its converter has reordered
the rows of query and key of llama models; they are put back here.
"""

from pathlib import Path
from typing import Any

import numpy as np

from jaxprompt.config import UserError
from jaxprompt.data.gguf_tokenizer import open_gguf, value
from jaxprompt.model.llama_config import LlamaConfig
from jaxprompt.model.tensors import DTYPES, Index, Tensor

_ARCHITECTURES = ("llama", "qwen2")
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


def read_gguf(path: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Config and unread tensors, under their Hugging Face names."""
    reader = open_gguf(path)
    kind = value(reader, "general.architecture")
    if kind not in _ARCHITECTURES:
        raise UserError(
            f"{path} holds a model of architecture {kind!r}; supported are "
            f"{', '.join(_ARCHITECTURES)} (SmolLM2 and Mistral are llama)"
        )
    files = {tensor.name: tensor for tensor in reader.tensors}
    if "rope_freqs.weight" in files:
        raise UserError(
            f"{path} has rotary frequencies of its own (Llama 3.1); load that model from its "
            "Hugging Face files"
        )
    heads = _count(path, reader, f"{kind}.attention.head_count")
    groups = _count(path, reader, f"{kind}.attention.head_count_kv", heads)
    tensors = {}
    for tensor in files.values():
        name = _name(tensor.name)
        turned = {"attn_q": heads, "attn_k": groups} if kind == "llama" else {}
        tensors[name] = _tensor(path, name, tensor, turned.get(tensor.name.split(".")[-2]))
    width = _count(path, reader, f"{kind}.embedding_length")
    if "model.embed_tokens.weight" not in tensors:
        raise UserError(f"{path} holds no token_embd.weight; it is no whole model")
    scaling = value(reader, f"{kind}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise UserError(f"{path}: rotary scaling {scaling!r} is not supported, use none or linear")
    factor = (float(value(reader, f"{kind}.rope.scaling.factor", 1)),) * (scaling == "linear")
    eos = value(reader, "tokenizer.ggml.eos_token_id", 2)
    config = LlamaConfig(
        vocab_size=tensors["model.embed_tokens.weight"].shape[0],
        d_model=width,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=_count(path, reader, f"{kind}.attention.key_length", width // heads),
        d_ff=_count(path, reader, f"{kind}.feed_forward_length"),
        num_layers=_count(path, reader, f"{kind}.block_count"),
        model_type=kind,
        tied="lm_head.weight" not in tensors,
        qkv_bias=kind == "qwen2",
        rope_theta=float(value(reader, f"{kind}.rope.freq_base", 10_000.0)),
        rope_scaling=factor,
        norm_eps=float(np.float32(value(reader, f"{kind}.attention.layer_norm_rms_epsilon", 1e-5))),
        pad_id=value(reader, "tokenizer.ggml.padding_token_id", eos),
        eos_id=eos,
    )
    return config, tensors


def _count(path: Path, reader: Any, key: str, default: int | None = None) -> int:
    found = value(reader, key, default)
    if type(found) is not int or found < 1:
        raise UserError(f"{path}: {key} is {found!r}, expected a whole number above 0")
    return found


def _name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in _BLOCK:
        return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.{parts[3]}"
    if parts[0] in _TOP:
        return ".".join([_TOP[parts[0]], *parts[1:]])
    return name  # one that has no place in the model, which the loader will say


def _tensor(path: Path, name: str, tensor: Any, heads: int | None) -> Tensor:
    """``heads``: of a matrix whose rows are pairs of neighbours and shall be two halves."""
    import gguf

    shape = tuple(int(n) for n in reversed(tensor.shape))
    kind = tensor.tensor_type
    try:
        gguf.quants.dequantize(tensor.data[:1], kind)
    except NotImplementedError:
        raise UserError(
            f"{path}: tensor {tensor.name} is stored as {kind.name}, which the gguf package cannot "
            "dequantise; use a file of another quantisation, such as Q8_0"
        ) from None

    def read(index: Index) -> np.ndarray:
        rows, *rest = index
        values = gguf.quants.dequantize(tensor.data[rows], kind)
        if heads is not None:  # a slice of whole heads: the loader cuts between them
            width = shape[0] // heads
            pairs = values.reshape(-1, width // 2, 2, *shape[1:])
            values = pairs.swapaxes(1, 2).reshape(-1, *shape[1:])
        return values[(slice(None), *rest)]

    return Tensor(name, str(path), shape, DTYPES["float32"], read)
