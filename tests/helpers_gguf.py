"""A tiny Llama in a GGUF file, with a byte-level tokenizer, as llama.cpp's converter writes it."""

from pathlib import Path

import gguf
import jax
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from jaxprompt.models.decoder import decoder
from jaxprompt.models.decoder.config import DecoderConfig

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = (
    "question: what is it? is the answer yes or no, red or blue, 12 or 34? Answer: yes no red blue"
)


def make_bpe() -> tokenizers.Tokenizer:
    """SmolLM2's kind of tokenizer: digits alone, GPT-2's cut, byte-level merges."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT] * 3, trainer)
    return inner


def config_of(vocabulary: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocabulary, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=64,
        num_layers=2, tied=True, rope_theta=10_000.0, pad_id=2, eos_id=2,
    )  # fmt: skip


def make_gguf(path: Path, *, seed: int = 0, quantised: bool = False, bos: bool = False, **fields):
    """Write the file; returns the parameters it was made from and the tokenizer.

    ``fields`` replaces values of the metadata, such as pre="qwen2" or model="llama".
    """
    import json

    bpe = make_bpe()
    saved = json.loads(bpe.to_str())["model"]
    words = sorted(saved["vocab"], key=saved["vocab"].get)
    config = config_of(len(words))
    rng = np.random.default_rng(seed)  # running the initialisers would take ten times as long

    def values(path, leaf):
        return rng.normal(float(path[-1].key == "scale"), 0.3, leaf.shape).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(values, decoder.abstract_params(config))

    writer = gguf.GGUFWriter(path, fields.get("arch", "llama"))
    _add_config(writer, config)
    writer.add_tokenizer_model(fields.get("model", "gpt2"))
    writer.add_tokenizer_pre(fields.get("pre", "smollm"))
    writer.add_token_list(words)
    writer.add_token_types([3 if word in SPECIAL else 1 for word in words])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in saved["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(bos)
    for name, matrix in _tensors(config, params):
        matrix = np.ascontiguousarray(matrix, np.float32)
        if quantised and matrix.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(matrix, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return params, bpe


def _add_config(writer: gguf.GGUFWriter, config) -> None:
    writer.add_block_count(config.num_layers)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)


def _interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp wants them: neighbours instead of halves."""
    halves = matrix.reshape(heads, 2, -1, matrix.shape[1])
    return halves.swapaxes(1, 2).reshape(matrix.shape)


def _tensors(config, params):
    """The parameters by the names and in the layout of a GGUF file."""
    yield "token_embd.weight", params["token_embedder"]["embedding"]
    yield "output_norm.weight", params["final_norm"]["scale"]
    stack = params["layers"]
    for i in range(config.num_layers):
        attention = {k: v[i] for k, v in stack["attention"].items()}
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            rows = attention[ours].reshape(config.d_model, -1).T
            if ours != "value":
                rows = _interleaved(rows, attention[ours].shape[1])
            yield f"blk.{i}.attn_{theirs}.weight", rows
        yield f"blk.{i}.attn_output.weight", attention["out"].reshape(-1, config.d_model).T
        yield f"blk.{i}.attn_norm.weight", stack["attention_norm"]["scale"][i]
        yield f"blk.{i}.ffn_norm.weight", stack["mlp_norm"]["scale"][i]
        for ours, theirs in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
            yield f"blk.{i}.ffn_{theirs}.weight", stack["mlp"][ours][i].T
