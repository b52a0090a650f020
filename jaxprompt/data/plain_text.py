"""An encoding in which no text can spell a special token.

A vocabulary has its special tokens as pieces, so text can spell one in many ways: literally, in
other characters (normalisation turns "\uff1c/s\uff1e" into "</s>"), or in halves that a template
joins. Here a copy of the tokenizer gives each reserved token another name, its mark: one character
of a private-use plane of Unicode. In text that may name special tokens, the names become marks
(``Marks.put``). From all other text, marks are removed (``Marks.remove``).
"""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxprompt.data.long_text import Cuts, Spec, cuts_of

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

_FIRST, _LAST = 0xF0000, 0x10FFFB  # planes 15 and 16, without these three characters:
_INSIDE = "\U0010fffc"  # in front of a text that continues another
_GLUE = "\U0010fffd"  # see _glued
_ANY = "\U0010ffff"  # in place of a mark that was removed
_BLANK = "\u2581"  # how SentencePiece writes a blank


class Marks(NamedTuple):
    """The mark of each reserved token by its name."""

    of: dict[str, str]
    names: re.Pattern[str]
    used: re.Pattern[str]

    def put(self, text: str) -> str:
        """The text with marks where it names reserved tokens."""
        return self.names.sub(lambda name: self.of[name[0]], text)

    def remove(self, text: str) -> str:
        """The text with ``_ANY`` in place of marks; no vocabulary has that character."""
        return self.used.sub(_ANY, text)

    def continued(self, text: str) -> str:
        """A marked text that continues another: SentencePiece puts no blank in front of it."""
        return _INSIDE + text

    def shown(self, text: str) -> str:
        """A marked text as a person would write it."""
        names = {mark: name for name, mark in self.of.items()}
        return self.used.sub(lambda mark: names.get(mark[0], ""), text)


def make_marks(vocabulary: Sequence[str], reserved: Sequence[str]) -> Marks:
    """Marks for ``reserved`` that no piece of the vocabulary contains."""
    taken = [ord(c) for c in set("".join(vocabulary)) if _FIRST <= ord(c) <= _LAST]
    first = max(taken, default=_FIRST - 1) + 1
    names = sorted(reserved, key=len, reverse=True)
    of = {name: chr(first + i) for i, name in enumerate(names)}
    last = chr(first + max(len(names) - 1, 0))
    used = re.compile(f"[{chr(first)}-{last}{_INSIDE}{_GLUE}]")
    return Marks(of, re.compile("|".join(map(re.escape, names)) or "(?!)"), used)


class Encoder(NamedTuple):
    """Turns marked text into ids."""

    start: "tokenizers.Tokenizer"  # for text that begins a sequence
    inside: "tokenizers.Tokenizer"  # for text that continues a sequence
    glue: int | None  # the id of _GLUE; see _glued
    glued: re.Pattern[str]  # marks after which there is glue
    cuts: Cuts  # where a long text may be cut

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of marked texts."""
        if self.glue is not None:
            texts = [self.glued.sub(lambda mark: mark[0] + _GLUE, text) for text in texts]
        within = [text.startswith(_INSIDE) for text in texts]
        begun = iter(_ids(self.start, [t for t in texts if not t.startswith(_INSIDE)]))
        going = iter(_ids(self.inside, [t[1:] for t in texts if t.startswith(_INSIDE)]))
        ids = [next(going if inside else begun) for inside in within]
        if self.glue is None:
            return ids
        return [
            [id for id in row if id != self.glue] if _GLUE in text else row
            for text, row in zip(texts, ids, strict=True)
        ]


def _ids(inner: "tokenizers.Tokenizer", texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in inner.encode_batch_fast(texts, add_special_tokens=False)]


def make_encoder(
    fast: "tokenizers.Tokenizer",
    marks: Marks,
    ids: dict[str, int],
    sentinels: Sequence[str],
    one_sequence: bool,
) -> Encoder | None:
    """A copy of ``fast`` that knows reserved tokens by their marks.

    None if the copy has other ids than the original, which may happen for an unknown kind.
    """
    spec = json.loads(fast.to_str())
    spec |= {"post_processor": None, "truncation": None, "padding": None}
    _rename(spec, marks.of, ids)
    _as_sentencepiece(spec)
    glue = _glued(spec) if sentinels else None
    cuts = cuts_of(spec, list(marks.of.values()))
    glued = re.compile("|".join(re.escape(marks.of[name]) for name in sentinels) or "(?!)")
    start = _built(spec)
    if start is None or any(start.token_to_id(marks.of[name]) != ids[name] for name in marks.of):
        return None
    inside = _built(spec) if one_sequence and _without_dummy_blank(spec) else start
    if inside is None:
        return None
    return Encoder(start, inside, glue, glued, cuts)


def _built(spec: Spec) -> "tokenizers.Tokenizer | None":
    """The tokenizer of this JSON form; None if the library cannot make one."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception:  # the library raises bare exceptions
        return None


def _rename(spec: Spec, of: dict[str, str], ids: dict[str, int]) -> None:
    """Write marks for names in the vocabulary, the merges and the added tokens."""
    model = spec["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {of.get(piece, piece): id for piece, id in vocabulary.items()}
    else:
        model["vocab"] = [[of.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") is not None:
        model["unk_token"] = of.get(model["unk_token"], model["unk_token"])
    if model.get("merges"):
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [p for p in pairs if not {*p, "".join(p)} & of.keys()]
    added = {token["content"]: token for token in spec["added_tokens"]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for name, mark in of.items():
        token = added.setdefault(name, {"id": ids[name], "special": True, **plain})
        token |= {"content": mark, "normalized": False}
    spec["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])


def _parts(spec: Spec, key: str) -> list[Spec]:
    """The steps of the normalizer or pre-tokenizer, in order."""
    step = spec.get(key)
    if step is None:
        return []
    if step["type"] == "Sequence":
        return step["normalizers" if key == "normalizer" else "pretokenizers"]
    return [step]


def _as_sentencepiece(spec: Spec) -> None:
    """Cut converted SentencePiece models at blanks only: a next line (U+0085) is a character."""
    if any(part["type"] == "Precompiled" for part in _parts(spec, "normalizer")):
        for part in _parts(spec, "pre_tokenizer"):
            if part["type"] == "WhitespaceSplit":
                part.clear()
                part.update(type="CharDelimiterSplit", delimiter=" ")


def _glued(spec: Spec) -> int | None:
    """The id of a new piece, to stand between a sentinel and the text that is glued to it.

    The library puts a blank after an added token, as it does in front of the whole text.
    SentencePiece does not: "<extra_id_0>." has no blank. The new piece takes the blank, and its id
    is left out of the result. None if the tokenizer is of another kind.
    """
    model, cuts = spec["model"], _parts(spec, "pre_tokenizer")
    count = len(model["vocab"])
    blank = any(p["type"] == "Metaspace" and p["prepend_scheme"] == "always" for p in cuts)
    # tokens that were added after the vocabulary would get other ids
    if not blank or model["type"] != "Unigram" or spec["added_tokens"][-1]["id"] >= count:
        return None
    model["vocab"].append([_BLANK + _GLUE, 0.0])
    return count


def _without_dummy_blank(spec: Spec) -> bool:
    """Take out the blank that SentencePiece puts in front of a text; False if it puts none."""
    changed = False
    for part in _parts(spec, "pre_tokenizer"):
        if part["type"] == "Metaspace" and part["prepend_scheme"] != "never":
            part["prepend_scheme"], changed = "never", True
    steps = _parts(spec, "normalizer")
    kept = [step for step in steps if step["type"] != "Prepend"]
    if len(kept) < len(steps):
        spec["normalizer"], changed = {"type": "Sequence", "normalizers": kept}, True
    return changed


def encode_slowly(
    inner: "PreTrainedTokenizerBase",
    marks: Marks,
    ids: dict[str, int],
    unknown: int | None,
    texts: Sequence[str],
) -> list[list[int]]:
    """``Encoder.encode`` for a tokenizer that is written in Python.

    The texts between marks are encoded one by one.

    Args:
        ids: name of each reserved token -> its id.
        unknown: the id of the unknown piece.
        texts: marked texts.
    """
    at = {mark: ids[name] for name, mark in marks.of.items()}
    names = {id: name for name, id in ids.items() if name in marks.of and id != unknown}
    cut = lambda text: inner(
        text, add_special_tokens=False, split_special_tokens=True, verbose=False
    )["input_ids"]

    def encoded(text: str) -> list[int]:
        ids_of_text: list[int] = []
        for part in re.split(f"({marks.used.pattern})", text):
            if part in at:
                ids_of_text.append(at[part])
            elif part not in ("", _INSIDE):
                for id in cut(part):
                    spelled = names.get(id)
                    ids_of_text += [id] if spelled is None else cut(f"{spelled[0]} {spelled[1:]}")
        return ids_of_text

    return [encoded(text) for text in texts]
