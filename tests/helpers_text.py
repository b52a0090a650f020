"""Texts whose every word tells where it came from, and a tokenizer of whole words."""

from pathlib import Path

import tokenizers
import transformers

from jaxprompt.config.pretrain import PretrainConfig
from jaxprompt.config.validation import parse

SPECIAL = ["<pad>", "</s>", "<unk>"]


def word_tokenizer(folder: Path, words: list[str], sentinels: int = 20) -> Path:
    """Save a tokenizer with pad 0, eos 1, unk 2, the words from 3 on and ``<extra_id_0>`` last."""
    extra = [f"<extra_id_{i}>" for i in range(sentinels)]
    vocabulary = {word: id for id, word in enumerate([*SPECIAL, *words, *extra[::-1]])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=extra,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def pretrain_config(values: dict, **changes) -> PretrainConfig:
    """``values`` with ``changes``; a mapping changes what is inside, but for the objectives."""
    values = dict(values)
    for key, value in changes.items():
        inside = isinstance(value, dict) and isinstance(values.get(key), dict)
        inside = inside and key != "objectives"
        values[key] = values[key] | value if inside else value
    return parse(PretrainConfig, values)


def sentences(folder: Path, **changes) -> PretrainConfig:
    """A run of 8 steps on text that a tokenizer of 150 rows can be trained on."""
    lines = [f"{chr(97 + i % 26) * (i % 5 + 2)} runs to {i}" for i in range(400)]
    (folder / "text.txt").write_text("\n".join(lines))
    values = {
        "shape": {"d_model": 16, "num_heads": 2, "head_dim": 4, "d_ff": 24,
                  "num_encoder_layers": 2, "num_decoder_layers": 2},
        "text": [{"name": "book", "train": str(folder / "text.txt")}],
        "objectives": {"prefix_lm": 1},
        "input_length": 16,
        "target_length": 16,
        "validation": 0.1,
        "model": {"unroll": False},
        "train": {"steps": 8, "batch_size": 4, "evaluate_every": 4, "checkpoint_every": 4,
                  "optimizer": "adamw", "learning_rate": 0.01, "evaluate_batches": 1,
                  "tensorboard": False},
        "output": str(folder / "run"),
    }  # fmt: skip
    return pretrain_config(values, **changes)
