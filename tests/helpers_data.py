"""A tiny tokenizer with T5's special ids, and examples of random lengths."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
import transformers

from jaxprompt.data.batches import Example

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


def make_masked_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> Path:
    """Save a WordPiece tokenizer as of an uncased BERT: [PAD] 0 to [MASK] 4, words, ##s."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *(word.lower() for word in words), ".", "##s"]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name.lower().strip('[]')}_token": name for name in special}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


def random_examples(count: int, seed: int = 0) -> list[Example]:
    """Examples with inputs of 2 to 40 ids and targets of 2 to 6, EOS last, all inputs distinct."""
    rng = np.random.default_rng(seed)

    def ids(first: int, longest: int) -> np.ndarray:
        middle = rng.integers(10, 60, rng.integers(0, longest - 1))
        return np.array([first, *middle, 1], np.int32)

    return [Example(ids(1000 + i, 40), ids(7, 6)) for i in range(count)]


def sentencepiece_model(folder: Path, **settings) -> Path:
    """Train a tiny SentencePiece model of T5's kind (pad 0, eos 1, unk 2); returns its file.

    ``settings`` replaces those of the trainer.
    """
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    text, prefix = folder / "text.txt", folder / "spiece"
    lines = " ".join(WORDS) + "\nthe bread is fresh: is it good? the roof leaks, a b c/s, 12\n"
    text.write_text(lines * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(prefix), hard_vocab_limit=False, minloglevel=2,
        **{"vocab_size": 120, "model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2,
           "bos_id": -1} | settings,
    )  # fmt: skip
    return prefix.with_suffix(".model")


def t5_tokenizer(folder: Path) -> Path:
    """A directory with such a model that AutoTokenizer reads as a T5's, with 100 sentinels."""
    sentencepiece_model(folder)
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "eos_token": "</s>", '
        '"unk_token": "<unk>", "pad_token": "<pad>"}'
    )
    return folder


def llama_tokenizer(folder: Path) -> Path:
    """The same of Llama's kind: byte-pair merges, <s> in front, a blank before each text."""
    model = sentencepiece_model(
        folder, model_type="bpe", byte_fallback=True, vocab_size=340, pad_id=-1, unk_id=0,
        bos_id=1, eos_id=2, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    model.rename(folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", '
        '"unk_token": "<unk>", "add_bos_token": true}'
    )
    return folder
