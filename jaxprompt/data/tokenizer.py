"""Tokenizers of transformers, reduced to what the package needs."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxprompt.config import UserError, expanded
from jaxprompt.data.gguf_tokenizer import load_gguf_tokenizer

_SENTENCEPIECE = ("spiece.model", "sentencepiece.model", "sentencepiece.bpe.model")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", *_SENTENCEPIECE)
_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
          "chat_template.jinja", *_VOCABULARIES)  # fmt: skip


class Tokenizer:
    """Text to ids and back. Ids of special tokens come only from what is called trusted.

    With an encoder, input and target each end with EOS. In ``one_sequence`` only the target does:
    the input begins with BOS where the tokenizer has one, and ends with the task's separator.
    """

    def __init__(self, inner: Any, one_sequence: bool = False):
        self._inner = inner
        self.one_sequence = one_sequence
        self.size: int = len(inner)
        self.eos_id: int = inner.eos_token_id if inner.eos_token_id is not None else 1
        self.pad_id: int = inner.pad_token_id if inner.pad_token_id is not None else 0
        # pad, eos, unk; sentinels count as vocabulary, as they did in the original
        named = [self.pad_id, self.eos_id, inner.unk_token_id]
        if one_sequence:  # and what marks the turns of a chat and the like
            named += [id for id, token in inner.added_tokens_decoder.items() if token.special]
        self.special_ids: list[int] = sorted({id for id in named if id is not None})
        self.sentinel_ids: list[int] = _sentinels(inner)  # <extra_id_0>, <extra_id_1>, ...
        # "</s>" in somebody's mail is not EOS; a space inside keeps it text ("< /s>"). Splitting
        # of special tokens is no help: they are pieces of the vocabulary as well
        names = filter(None, inner.convert_ids_to_tokens(self.special_ids))
        self._control = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self.start_ids: list[int] = []
        if one_sequence:
            whole = inner("a")["input_ids"]
            self.start_ids = [id for id in whole[:1] if id == inner.bos_token_id]
        # most decoder-only vocabularies tell "yes" from " yes"; some add the space themselves
        marked = str(inner.convert_ids_to_tokens(self.encode("a")[:1] or [0])[0])
        self._before_target = " " if one_sequence and not marked.startswith("\u2581") else ""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` without EOS."""
        return self.encode_all([text])[0]

    def plain(self, text: str) -> str:
        """The text with a space in whatever looks like a special token, so that it stays text."""
        return self._control.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)

    def encode_all(self, texts: Sequence[str], *, trusted: bool = False) -> list[list[int]]:
        """Ids of many texts, faster than one by one; trusted ones may name special tokens."""
        if not texts:
            return []
        plain = texts if trusted else [self.plain(text) for text in texts]
        try:
            return self._inner(list(plain), add_special_tokens=False, verbose=False)["input_ids"]
        except TypeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
            bad = next((t for t in plain if any("\ud800" <= c <= "\udfff" for c in t)), "")
            raise UserError(f"The text {bad[:60]!r} is not Unicode; mend that character.") from None

    def encode_targets(self, texts: Sequence[str], separator: str = "") -> list[list[int]]:
        """Ids of targets with EOS last; after a separator that ends in no space they get one."""
        space = "" if separator[-1:].isspace() else self._before_target
        begun = [text if text[:1].isspace() else space + text for text in texts]
        return [[*ids, self.eos_id] for ids in self.encode_all(begun)]

    def input_end(self, separator: str) -> list[int]:
        """The ids that end every input; the separator may name special tokens."""
        if not self.one_sequence:
            return [self.eos_id]
        return self.encode_all([separator], trusted=True)[0]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text up to the first EOS, without special tokens or ids that the tokenizer lacks."""
        kept = []
        for id in map(int, ids):
            if id == self.eos_id:
                break
            if id != self.pad_id and id < self.size:
                kept.append(id)
        return self._inner.decode(kept, skip_special_tokens=True).strip()

    def fingerprint(self) -> str:
        """Hex digits that change with the vocabulary and with how a sample of text is cut."""
        names = self._inner.convert_ids_to_tokens(list(range(self.size)))
        sample = self.encode("The quick brown fox -- 12.5% of it -- jumps, doesn't it?")
        return hashlib.sha256(json.dumps([names, sample]).encode()).hexdigest()

    def identity(self) -> str:
        """Hex digits that change with anything that ids follow from, as far as can be told."""
        import transformers

        fast = getattr(self._inner, "backend_tokenizer", None)
        rules = "" if fast is None else fast.to_str()
        facts = [type(self._inner).__name__, transformers.__version__, self.fingerprint(), rules]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def show(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text with its special tokens, for people to read."""
        kept = [int(id) for id in ids if id != self.pad_id and id < self.size]
        return self._inner.decode(kept, skip_special_tokens=False).strip()

    def save(self, folder: Path) -> None:
        """Write the files that ``load_tokenizer`` reads."""
        self._inner.save_pretrained(folder)

    def piece(self, id: int) -> str:
        """The piece with this id, as a person would read it."""
        return str(self._inner.convert_ids_to_tokens(id))


def _sentinels(inner: Any) -> list[int]:
    vocabulary, ids = inner.get_vocab(), []
    while (name := f"<extra_id_{len(ids)}>") in vocabulary:
        ids.append(vocabulary[name])
    return ids


def load_tokenizer(path: str | Path, *, one_sequence: bool = False) -> Tokenizer:
    """The tokenizer in a directory, in a GGUF file or of a hub id."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it misses torch; we do not
    import transformers

    transformers.logging.set_verbosity_error()
    path = expanded(path)
    if Path(path).is_file() and str(path).endswith(".gguf"):
        return Tokenizer(load_gguf_tokenizer(Path(path)), one_sequence)
    if Path(path).is_dir() and not _has_tokenizer(Path(path)):
        # transformers would make up an empty vocabulary for a T5
        raise UserError(
            f"There is no tokenizer that can be read at {str(path)!r}; put tokenizer.json or "
            "spiece.model beside the weights."
        )
    try:
        inner = transformers.AutoTokenizer.from_pretrained(str(path))
    except Exception as error:  # transformers raises many unrelated types for missing files
        problem = " ".join(str(error).split())[:200]
        raise UserError(
            f"There is no tokenizer that can be read at {str(path)!r} ({problem}); put "
            "tokenizer.json or spiece.model beside the weights."
        ) from None
    return Tokenizer(inner, one_sequence)


def copy_tokenizer(source: str | Path, to: Path) -> None:
    """Put the tokenizer of a directory or a GGUF file beside weights written at ``to``."""
    if Path(source).is_file():
        load_tokenizer(source).save(to)
    for name in _FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, to / name)


def _has_tokenizer(folder: Path) -> bool:
    if any((folder / name).is_file() for name in _VOCABULARIES):
        return True
    config = folder / "tokenizer_config.json"  # bytes need no vocabulary
    return config.is_file() and b"ByT5" in config.read_bytes()
