"""Training of tokenizers: unigram with the layout of T5's, WordPiece with that of BERT's."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxprompt.config.errors import UserError
from jaxprompt.config.pretrain import TokenizerConfig

if TYPE_CHECKING:
    import tokenizers

PIECE_LENGTH = 16  # characters of the longest piece
FEWEST = 128  # pieces; pieces of one character need most of them


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, out: Path) -> None:
    """Write ``tokenizer.json`` and its configuration into ``out``.

    Ids are in T5's order: pad 0, eos 1, unk 2, pieces, and at the end ``<extra_id_99>`` to
    ``<extra_id_0>`` (the last id). Case is kept. The post-processor puts EOS after every text.

    Args:
        out: a directory that exists.

    Raises:
        UserError: there is too little text for so many pieces, or it is not Unicode.
    """
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    pieces = config.vocabulary - config.sentinels
    if pieces < FEWEST:
        raise UserError(
            f"tokenizer.vocabulary is {config.vocabulary}, of which {config.sentinels} are "
            f"sentinels; leave at least {FEWEST} rows for pieces."
        )
    tokenizer = _train_unigram(texts, pieces, config.vocabulary)
    count = tokenizer.get_vocab_size()
    if count != pieces:
        fix = f"set it to {count + config.sentinels} or give more text"
        raise UserError(
            f"The text yields {count} pieces, and tokenizer.vocabulary asks for {pieces} beside "
            f"{config.sentinels} sentinels; {fix if count >= FEWEST else 'give more text'}."
        )
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(config.sentinels))]
    tokenizer.add_special_tokens(
        [AddedToken(s, special=True, normalized=False, lstrip=True) for s in sentinels]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    _write_configuration(out, sentinels)


WORDPIECE_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_wordpiece(texts: Iterable[str], config: TokenizerConfig, out: Path) -> None:
    """Write ``tokenizer.json`` and its configuration into ``out``.

    Ids are in the order of ``WORDPIECE_SPECIAL``, then pieces. Text is lower-cased and loses its
    accents, as in an uncased BERT. The post-processor puts CLS in front and SEP behind.

    Args:
        out: a directory that exists.

    Raises:
        UserError: there is too little text for so many pieces, or it is not Unicode.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing

    if config.vocabulary < FEWEST:
        raise UserError(
            f"tokenizer.vocabulary is {config.vocabulary}; ask for at least {FEWEST} pieces."
        )
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # pyright: ignore
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)  # pyright: ignore
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
    tokenizer.decoder = decoders.WordPiece()  # pyright: ignore
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocabulary,
        special_tokens=list(WORDPIECE_SPECIAL),
        initial_alphabet=[chr(c) for c in range(33, 127) if not chr(c).isupper()],
        show_progress=False,
    )
    try:
        tokenizer.train_from_iterator(texts, trainer)
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        bad = error.object[max(error.start - 30, 0) : error.start + 30]
        raise UserError(f"The text {bad!r} is not Unicode; mend that character.") from None
    count = tokenizer.get_vocab_size()
    if count != config.vocabulary:
        raise UserError(
            f"The text yields {count} pieces, and tokenizer.vocabulary asks for "
            f"{config.vocabulary}; set it to {count} or give more text."
        )
    ends = [(name, WORDPIECE_SPECIAL.index(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )  # pyright: ignore
    tokenizer.save(str(out / "tokenizer.json"))
    words = ("pad", "unk", "cls", "sep", "mask")
    names = {f"{w}_token": n for w, n in zip(words, WORDPIECE_SPECIAL, strict=True)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    (out / "special_tokens_map.json").write_text(json.dumps(names, indent=1) + "\n")


def _train_unigram(texts: Iterable[str], pieces: int, vocabulary: int) -> "tokenizers.Tokenizer":
    """A tokenizer of at most ``pieces`` pieces; errors name the setting ``vocabulary``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("\n", " "), normalizers.Replace("\t", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=pieces,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        max_piece_length=PIECE_LENGTH,
        initial_alphabet=[chr(c) for c in range(33, 127)],
        show_progress=False,
    )
    try:
        tokenizer.train_from_iterator(texts, trainer)
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        bad = error.object[max(error.start - 30, 0) : error.start + 30]
        raise UserError(f"The text {bad!r} is not Unicode; mend that character.") from None
    except Exception as error:
        if type(error) is not Exception:  # from the reader of the texts
            raise
        raise UserError(  # from the library, without a type: more characters than rows
            f"No tokenizer can be trained with tokenizer.vocabulary {vocabulary} "
            f"({' '.join(str(error).split())[:200]}); raise it."
        ) from None
    return tokenizer


def _write_configuration(out: Path, sentinels: list[str]) -> None:
    """The files beside ``tokenizer.json`` that transformers reads; ``sentinels`` in id order."""
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    extra = {"additional_special_tokens": sentinels[::-1]}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "extra_ids": len(sentinels),
        **names,
        **extra,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    (out / "special_tokens_map.json").write_text(json.dumps(names | extra, indent=1) + "\n")
