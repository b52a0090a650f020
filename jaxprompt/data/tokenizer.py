"""Tokenizers of transformers, reduced to what the package needs."""

import copy
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxprompt.config.errors import UserError
from jaxprompt.config.paths import expanded
from jaxprompt.data.gguf_tokenizer import load_gguf_tokenizer
from jaxprompt.data.long_text import LONG, Cuts, start_of
from jaxprompt.data.plain_text import encode_slowly, make_encoder, make_marks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTENCEPIECE = ("spiece.model", "sentencepiece.model", "sentencepiece.bpe.model")
_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *_SENTENCEPIECE,
)
_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
          "chat_template.jinja", *_VOCABULARIES)  # fmt: skip
_CONFIGS = ("config.json", "tokenizer_config.json")
_PUT = "put tokenizer.json or spiece.model beside the weights"
_BLANK = "\u2581"  # how SentencePiece writes a blank
MASK = "[mask]"  # how a template writes the mask


class Tokenizer:
    """Text to ids and back. No text can spell a special token; see ``plain_text``.

    For a model with an encoder, input and target each end with EOS, and each begins with the tokens
    that the tokenizer puts in front of a text. In ``one_sequence`` only the input begins so, only
    the target ends with EOS, and the task's separator stands between them. If ``masked``, an input
    has a mask and ends with SEP, and a target is what stands in place of the mask, a word after a
    blank.
    """

    rows: int | None = None  # of the embedding table; text with ids that it lacks is refused

    def __init__(
        self, inner: "PreTrainedTokenizerBase", one_sequence: bool = False, masked: bool = False
    ):
        self._inner = inner
        self.one_sequence, self.masked = one_sequence, masked
        self.size: int = len(inner)
        eos_name, mask_name = ("sep_token_id", "mask_token_id") if masked else ("eos_token_id", "")
        named = (eos_name, "pad_token_id", "unk_token_id", mask_name)
        found = (getattr(inner, name) if name else None for name in named)
        eos, pad, unk, mask = (id if isinstance(id, int) else None for id in found)
        self.eos_id: int = 1 if eos is None else eos
        self.pad_id: int = 0 if pad is None else pad
        self.unk_id: int | None = unk
        self.mask_id: int | None = mask
        self.sentinel_ids: list[int] = _sentinels(inner)  # <extra_id_0>, <extra_id_1>, ...
        # pad, eos, unk, the marks of a chat's turns and the like. Of a model with an encoder,
        # sentinels belong to the vocabulary, as in the original.
        special = {id for id, token in inner.added_tokens_decoder.items() if token.special}
        if not one_sequence:
            special -= set(self.sentinel_ids)
        special |= {
            id for id in (self.pad_id, self.eos_id, self.unk_id, self.mask_id) if id is not None
        }
        self.special_ids: list[int] = sorted(special)
        self._make_encoder()
        self.start_ids: list[int] = self._in_front()

    def _make_encoder(self) -> None:
        inner = self._inner
        vocabulary = inner.get_vocab()
        self.ids: int = max(vocabulary.values(), default=-1) + 1  # more than size if ids have gaps
        names = {id: name for name, id in vocabulary.items()}
        special = [names[id] for id in self.special_ids if id in names]
        sentinels = [names[id] for id in self.sentinel_ids if names[id] not in special]
        ids = {name: vocabulary[name] for name in (*special, *sentinels)}
        self._marks = make_marks(list(vocabulary), list(ids))
        # a row that spells a mark of a chat's turns gets a space in it, as people read such texts
        control = special if self.one_sequence else []
        self._control = re.compile("|".join(map(re.escape, control)) or "(?!)")
        self._sentinels = re.compile("|".join(map(re.escape, sentinels)) or "(?!)")
        fast = getattr(inner, "backend_tokenizer", None)
        made, self._decoder = None, None
        if fast is not None:
            decoder = json.dumps(json.loads(fast.to_str())["decoder"], ensure_ascii=False)
            # pieces of SentencePiece are decoded as SentencePiece does
            self._decoder = fast.decoder if _BLANK in decoder else None
            made = make_encoder(fast, self._marks, ids, sentinels, self.one_sequence)
        slowly = functools.partial(encode_slowly, inner, self._marks, ids, self.unk_id)
        self._encode = made.encode if made else slowly
        self._cuts = made.cuts if made else Cuts(False, 0)

    def _in_front(self) -> list[int]:
        """The ids that the tokenizer itself puts in front of a text, such as BOS."""
        try:
            whole, text = self._inner("a")["input_ids"], self.encode("a")
        except Exception:  # a vocabulary without "a" and without an unknown piece
            return []
        starts = [i for i in range(len(whole)) if whole[i : i + len(text)] == text]
        return whole[: starts[0]] if text and starts else []

    def for_table(self, rows: int) -> "Tokenizer":
        """This tokenizer for a backbone whose embedding table has ``rows`` rows.

        Ids beyond the table belong to virtual tokens. A special token may have such an id if no
        text can spell it.

        Raises:
            UserError: some text has such an id.
        """
        bound = copy.copy(self)
        reserved = {*self.special_ids} - {self.eos_id, *self.start_ids}
        above = sorted(
            (id, piece)
            for piece, id in self._inner.get_vocab().items()
            if id >= rows and id not in reserved
        )
        for id, piece in above:
            if id in (self.eos_id, *self.start_ids) or self._can_write(id, piece):
                raise UserError(
                    f"The tokenizer has {self.ids} pieces and the backbone {rows} rows; use the "
                    f"tokenizer that belongs to it. The text {self._surface(id, piece)[:60]!r} "
                    f"has the id {id}, which is that of a virtual token."
                )
        bound.rows = rows
        return bound

    def _surface(self, id: int, piece: str) -> str:
        return str(self._inner.decode([id])) or piece

    def _can_write(self, id: int, piece: str) -> bool:
        """Whether some text with this piece has its id."""
        text = self._surface(id, piece)
        texts = [text, piece, f" {text}", f"a{text}", f"{text}a", f"a {text} a"]
        try:
            return any(id in ids for ids in self.encode_all(texts))
        except UserError:  # half of a character
            return False

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` without EOS."""
        return self.encode_all([text])[0]

    def plain(self, text: str) -> str:
        """The text as trusted text in which nothing is a special token."""
        text = self._marks.remove(text)
        return self._control.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)

    def marked(self, text: str) -> str:
        """The text as trusted text, with a mark for each special token that it names.

        [mask] is the mask, whatever the vocabulary calls it, if it has one.
        """
        if self.mask_id is not None:
            text = text.replace(MASK, self.piece(self.mask_id))
        return self._marks.put(self._marks.remove(text))

    def continued(self, text: str) -> str:
        """A ``marked`` or ``plain`` text as one that continues another text.

        SentencePiece puts a blank in front of a text, but not in front of this one.
        """
        return self._marks.continued(text)

    def encode_rest(self, begun: str, text: str) -> list[int]:
        """Ids of ``text`` if it directly follows the text ``begun``."""
        if not begun:
            return self.encode(text)
        return self.encode_all([self.continued(self.plain(text))], trusted=True)[0]

    def encode_all(self, texts: Sequence[str], *, trusted: bool = False) -> list[list[int]]:
        """Ids of many texts, faster than one by one.

        Args:
            texts: any text.
            trusted: whether the texts come from ``plain`` and ``marked``. Their marks then become
                special tokens.

        Raises:
            UserError: a text is not Unicode, or has ids that the embedding table lacks.
        """
        if not texts:
            return []
        plain = texts if trusted else [self.plain(text) for text in texts]
        plain = [self._sentinels.sub(lambda m: self._marks.of[m[0]], text) for text in plain]
        try:
            encoded = self._encode(plain)
        except (TypeError, UnicodeError):  # half of a surrogate pair, which UTF-8 cannot spell
            bad = next((t for t in texts if any("\ud800" <= c <= "\udfff" for c in t)), "")
            raise UserError(
                f"The text {self._marks.shown(bad)[:60]!r} is not Unicode; mend that character."
            ) from None
        except Exception as error:  # the library raises bare ones
            if len(texts) > 1:
                return [self.encode_all([text], trusted=trusted)[0] for text in texts]
            raise UserError(
                f"The tokenizer cannot read the text {self._marks.shown(texts[0])[:60]!r} "
                f"({' '.join(str(error).split())[:200]}); a vocabulary without an unknown piece "
                "has no ids for it."
            ) from None
        if self.rows is not None:
            for text, ids in zip(texts, encoded, strict=True):
                self.check(ids, self.rows, text)
        return encoded

    def check(self, ids: Sequence[int] | np.ndarray, rows: int, text: str) -> None:
        """Raise UserError if a text has ids beyond an embedding table of ``rows``."""
        if len(ids) and max(ids) >= rows:
            raise UserError(
                f"The text {self._marks.shown(text)[:60]!r} has the id {int(max(ids))} and the "
                f"backbone {rows} rows; use the tokenizer that belongs to it."
            )

    def encode_start(self, text: str, count: int) -> list[int]:
        """At least the first ``count`` ids of ``text``, or all if it has fewer."""
        start = self.start_of(self.plain(text), count)
        return self.encode_all([start], trusted=True)[0]

    def start_of(self, text: str, count: int) -> str:
        """A marked text, or if it is very long a start of it with the same first ``count`` ids.

        The start has more than ``count`` ids if the text does.
        """
        if len(text) <= LONG:
            return text
        encode = lambda texts: self.encode_all(texts, trusted=True)
        return start_of(text, count, self._cuts, encode)

    def encode_targets(self, texts: Sequence[str], separator: str = "") -> list[list[int]]:
        """Ids of targets with EOS last.

        In one sequence a target continues the input. A space stands between them, unless there is
        white space already. In place of a mask it has no EOS, and is a word after a blank.
        """
        if self.masked:
            return self.encode_all([t if t[:1].isspace() else f" {t}" for t in texts])
        if not self.one_sequence:
            return [[*self.start_ids, *ids, self.eos_id] for ids in self.encode_all(texts)]
        space = "" if separator[-1:].isspace() else " "
        begun = [text if text[:1].isspace() else space + text for text in texts]
        going_on = [self.continued(self.plain(text)) for text in begun]
        return [[*ids, self.eos_id] for ids in self.encode_all(going_on, trusted=True)]

    def encode_words(self, texts: Sequence[str], separator: str = "") -> list[list[int]]:
        """Ids of targets without what begins and ends each."""
        encoded = self.encode_targets(texts, separator)
        if self.masked:
            return encoded
        front = 0 if self.one_sequence else len(self.start_ids)
        return [ids[front:-1] for ids in encoded]

    def num_masks(self, template: str) -> int:
        """How many masks a template names."""
        if self.mask_id is None:
            return 0
        return self.marked(template).count(self._marks.of[self.piece(self.mask_id)])

    def input_end(self, separator: str) -> list[int]:
        """The ids that end every input; the separator may name special tokens."""
        if not self.one_sequence:
            return [self.eos_id]
        return self.encode_all([self.continued(self.marked(separator))], trusted=True)[0]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text up to the first EOS, without special tokens but with sentinels.

        Pieces of SentencePiece are decoded as T5 does: an id that is unknown, or beyond the
        vocabulary, becomes the text " \u2047 ".
        """
        return self.decode_all(ids).strip()

    def decode_all(self, ids: Sequence[int] | np.ndarray) -> str:
        """As ``decode``, with the blanks at both ends."""
        until = itertools.takewhile(lambda id: id != self.eos_id, map(int, ids))
        if self._decoder is None:
            skip = not hasattr(self._inner, "backend_tokenizer")  # bytes have no sentinels
            special = {*self.special_ids}
            kept = [id for id in until if id < self.ids and id not in special]
            return str(self._inner.decode(kept, skip_special_tokens=skip))
        dropped = {*self.special_ids} - {self.unk_id}
        pieces = [piece for id in until if id not in dropped for piece in self._pieces(id)]
        return self._decoder.decode(pieces)

    def token_text(self, id: int) -> str:
        """The text of one token within a text, with the blank before it; also a special one's."""
        if self._decoder is not None:
            return self.piece(id).replace(_BLANK, " ")
        return str(self._inner.decode([id], skip_special_tokens=False))

    def special_names(self) -> dict[str, str | None]:
        """The special tokens by what they are for, as transformers names them."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        found = {name: getattr(self._inner, name, None) for name in names}
        return {name: None if token is None else str(token) for name, token in found.items()}

    def _pieces(self, id: int) -> list[str]:
        if not 0 <= id < self.ids or id == self.unk_id:
            return [_BLANK, "\u2047", _BLANK]
        return [_BLANK, self.piece(id)] if id in self.sentinel_ids else [self.piece(id)]

    def written(self, text: str, separator: str = "") -> str | None:
        """A target after encoding and decoding; None if it has unknown pieces."""
        [ids] = self.encode_targets([text], separator)
        return None if self.unk_id in ids else self.decode(ids)

    def fingerprint(self) -> str:
        """Hex digits that change with the vocabulary and with the ids of a sample text."""
        names = self._inner.convert_ids_to_tokens(list(range(self.size)))
        sample = self.encode("The quick brown fox -- 12.5% of it -- jumps, doesn't it?")
        return hashlib.sha256(json.dumps([names, sample]).encode()).hexdigest()

    def identity(self) -> str:
        """Hex digits that change with everything that ids are known to depend on."""
        import transformers

        fast = getattr(self._inner, "backend_tokenizer", None)
        rules = "" if fast is None else fast.to_str()
        facts = [type(self._inner).__name__, transformers.__version__, self.fingerprint(), rules]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def show(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, with special tokens, for people to read."""
        kept = [int(id) for id in ids if id != self.pad_id and id < self.size]
        return str(self._inner.decode(kept, skip_special_tokens=False)).strip()

    def save(self, folder: Path) -> None:
        """Write the files that ``load_tokenizer`` reads."""
        self._inner.save_pretrained(folder)

    def piece(self, id: int) -> str:
        """The piece with this id."""
        return str(self._inner.convert_ids_to_tokens(id))


def _sentinels(inner: "PreTrainedTokenizerBase") -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1>, ..."""
    vocabulary, ids = inner.get_vocab(), []
    while (name := f"<extra_id_{len(ids)}>") in vocabulary:
        ids.append(vocabulary[name])
    return ids


def load_tokenizer(
    path: str | Path, *, one_sequence: bool = False, masked: bool = False
) -> Tokenizer:
    """The tokenizer in a directory, in a GGUF file or of a hub id."""
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # it warns that torch is missing
    import transformers

    transformers.logging.set_verbosity_error()
    path = expanded(path)
    if Path(path).is_file() and str(path).endswith(".gguf"):
        return Tokenizer(load_gguf_tokenizer(Path(path)), one_sequence)
    if Path(path).is_dir() and not _has_tokenizer(Path(path)):
        # transformers would make up an empty vocabulary for a T5
        raise _unreadable(path, _PUT)
    try:
        # code in a folder is never run, and nobody is asked for permission to run it
        inner = transformers.AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # transformers raises many unrelated types for missing files
        problem = " ".join(str(error).split())[:200]
        if "custom code" in problem or "trust_remote_code" in problem:
            raise _unreadable(
                path, "it needs code of its own, which is not run; name another with --tokenizer"
            ) from None
        nameless = Path(path).is_dir() and not any((Path(path) / n).is_file() for n in _CONFIGS)
        kind = "put the model's config.json or tokenizer_config.json beside its vocabulary"
        raise _unreadable(path, kind if nameless else _PUT, problem) from None
    return Tokenizer(inner, one_sequence, masked)


def _unreadable(path: str | Path, fix: str, problem: str = "") -> UserError:
    reason = f" ({problem})" if problem else ""
    return UserError(f"There is no tokenizer that can be read at {str(path)!r}{reason}; {fix}.")


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
    config = folder / "tokenizer_config.json"  # a tokenizer of bytes has no vocabulary
    return config.is_file() and b"ByT5" in config.read_bytes()
