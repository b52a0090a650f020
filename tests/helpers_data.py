"""A tiny tokenizer with T5's special ids, and examples of random lengths."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
import transformers

from jaxprompt.data.pipeline import Example

WORDS = "question : passage subject text it was good bad yes no True False one two three".split()
SPECIAL = ["<pad>", "</s>", "<unk>"]


def make_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> Path:
    """Save a word tokenizer (pad 0, eos 1, unk 2, one sentinel) that AutoTokenizer can read."""
    vocabulary = {word: id for id, word in enumerate([*SPECIAL, "<extra_id_0>", *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<extra_id_0>"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def random_examples(count: int, seed: int = 0) -> list[Example]:
    """Examples with inputs of 2 to 40 ids and targets of 2 to 6, EOS last, all inputs distinct."""
    rng = np.random.default_rng(seed)

    def ids(first: int, longest: int) -> np.ndarray:
        middle = rng.integers(10, 60, rng.integers(0, longest - 1))
        return np.array([first, *middle, 1], np.int32)

    return [Example(ids(1000 + i, 40), ids(7, 6)) for i in range(count)]
