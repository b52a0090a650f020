"""The tokenizer that a GGUF file carries, and access to such files through the ``gguf`` package."""

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from jaxprompt.config.errors import UserError, shown
from jaxprompt.data.gguf_header import check_header

if TYPE_CHECKING:
    import gguf
    import tokenizers
    import transformers

_Item = TypeVar("_Item", int, str)

# How text is cut before merges apply, by the name that llama.cpp gives it (llama-vocab.cpp): the
# regular expression, or None for GPT-2's, and whether every digit stands alone
_GROUPS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS: dict[str, tuple[str | None, bool]] = {
    "gpt-2": (None, False),
    "default": (None, False),
    "smollm": (None, True),
    "llama-bpe": (_GROUPS % "{1,3}", False),
    "qwen2": (_GROUPS % "", False),
}
EXPRESSIONS = [expression for expression, _ in _CUTS.values() if expression is not None]
_CONTROL = 3  # token type of llama.cpp


def open_gguf(path: Path) -> "gguf.GGUFReader":
    """A reader of the file; UserError if the package is absent or the file is damaged."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            f"{path} is a GGUF file, and reading those needs the package gguf; install it with "
            "pip install gguf"
        ) from None
    check_header(path)
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # damage raises whatever NumPy comes across
        problem = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is truncated or not a GGUF file: {problem}; download it again"
        ) from None


def value(reader: "gguf.GGUFReader", key: str, default: object = None) -> object:
    """A field of the file's metadata; ``default`` if the file does not have it.

    Raises:
        UserError: the field is not what its type says.
    """
    field = reader.fields.get(key)
    try:
        return default if field is None else field.contents()
    except Exception as error:  # text that is not UTF-8, missing parts
        problem = " ".join(str(error).split())[:200]
        raise UserError(
            f"The metadata {shown(key)} of the GGUF file cannot be read: {problem}; download it "
            "again"
        ) from None


def load_gguf_tokenizer(path: Path) -> "transformers.PreTrainedTokenizerFast":
    """A tokenizer of transformers with the file's vocabulary, merges and special tokens.

    Raises:
        UserError: The file is damaged, or has another kind than byte-level BPE (GPT-2, Llama 3,
            Qwen2, SmolLM2).
    """
    import transformers

    reader = open_gguf(path)
    kind = value(reader, "tokenizer.ggml.model")
    cut = value(reader, "tokenizer.ggml.pre", "default")
    if kind != "gpt2" or not isinstance(cut, str) or cut not in _CUTS:
        raise UserError(
            f"{path} has a tokenizer of kind {shown(kind)} ({shown(cut)}), and only byte-level BPE "
            f"is read from GGUF ({', '.join(_CUTS)}); name one with tokenizer: in the YAML or "
            "--tokenizer"
        )
    words, merges = (_list(path, reader, key, str) for key in ("tokens", "merges"))
    types = _list(path, reader, "token_type", int)
    if not words or value(reader, "tokenizer.ggml.merges") is None:
        raise UserError(
            f"{path} has no vocabulary with merges; name a tokenizer with tokenizer: in the YAML "
            "or --tokenizer"
        )
    control = [word for word, kind in zip(words, types, strict=False) if kind == _CONTROL]
    inner = _byte_level_bpe(path, words, merges, control, cut)
    named = _named_tokens(path, reader, words)
    if value(reader, "tokenizer.ggml.add_bos_token", False) and "bos_token" in named:
        from tokenizers.processors import TemplateProcessing

        bos = named["bos_token"]
        last = len(words) - 1 - words[::-1].index(bos)  # of equal words the vocabulary has the last
        inner.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, last)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **named)


def _byte_level_bpe(
    path: Path, words: list[str], merges: list[str], control: list[str], cut: str
) -> "tokenizers.Tokenizer":
    """The tokenizer itself. The id of a word is its place in ``words``.

    Args:
        control: words that are special tokens.
        cut: the name of the way in which text is cut before merges apply.

    Raises:
        UserError: a merge makes a piece that is not in the vocabulary.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {word: id for id, word in enumerate(words)}
    # Llama 3 takes a word of the vocabulary whole, whatever its merges would make of it
    whole = cut == "llama-bpe"
    try:
        pairs = [tuple(merge.split(" ")) for merge in merges]
        bpe = models.BPE(vocabulary, pairs, ignore_merges=whole)  # pyright: ignore[reportArgumentType]
        inner = tokenizers.Tokenizer(bpe)
    except Exception as error:  # the library raises bare ones
        problem = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} has merges that do not fit its vocabulary: {problem}; download it again"
        ) from None
    expression, digits = _CUTS[cut]
    steps: list[pre_tokenizers.PreTokenizer] = []
    if digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if expression is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(expression), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(
        [tokenizers.AddedToken(word, special=True, normalized=False) for word in control]
    )
    return inner


def _named_tokens(path: Path, reader: "gguf.GGUFReader", words: list[str]) -> dict[str, str]:
    """The special tokens that the file names, as transformers calls them."""
    named = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        id = value(reader, f"tokenizer.ggml.{key}_token_id")
        if id is not None:
            named[f"{name}_token"] = words[_id(path, f"{key}_token_id", id, len(words))]
    return named


def _list(path: Path, reader: "gguf.GGUFReader", key: str, kind: type[_Item]) -> list[_Item]:
    """A list of texts or of whole numbers from the metadata; [] if the file does not have it."""
    items = value(reader, f"tokenizer.ggml.{key}")
    if items is None:
        return []
    if not isinstance(items, list) or not all(type(item) is kind for item in items):
        name = "numbers" if kind is int else "texts"
        raise UserError(
            f"{path}: tokenizer.ggml.{key} is {shown(items)}, expected a list of {name}"
        )
    return items


def _id(path: Path, key: str, id: object, size: int) -> int:
    if type(id) is not int or not 0 <= id < size:
        raise UserError(
            f"{path}: tokenizer.ggml.{key} is {shown(id)}, expected a whole number from 0 to "
            f"{size - 1}"
        )
    return id
