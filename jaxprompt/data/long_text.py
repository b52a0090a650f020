"""The start of a very long text that has the same first ids as the whole text.

If only 512 tokens of a line of ten million characters are kept, the line need not be tokenized to
its end. It may be cut only where that provably changes no id that is kept:

- between two words, if the tokenizer first cuts words apart, or if no piece of its vocabulary
  reaches from one word into the next;
- within a word of a unigram model, whose pieces are its most probable path (Viterbi). Each path
  goes through one of the last n positions of a start of the word, where n is the longest piece. The
  common beginning of the best paths to all of these positions is part of the best path of the word.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxprompt.config.values import Values
from jaxprompt.data.gguf_tokenizer import EXPRESSIONS

LONG = 20_000  # characters; a shorter text is tokenized whole
_WORDS = re.compile(r"[^\W_](?= [^\W_])")  # the end of a word or number, a blank and another one
_TRIES = 3  # within a word: each tokenizes a start some twenty times
# characters that normalisation leaves as they are, and that do not join with others
_PLAIN = r"[!-~\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff]"
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Lowercase", "Strip",
                "StripAccents", "Prepend", "BertNormalizer"}  # fmt: skip
_CUTTING = {"WhitespaceSplit", "Whitespace", "BertPreTokenizer"}
_HARMLESS = {"Digits", "Punctuation"}  # they look at one character at a time


Encode = Callable[[list[str]], list[list[int]]]  # texts -> ids
Spec = Values  # a part of a tokenizer's JSON form


class Cuts(NamedTuple):
    """Where a tokenizer lets a text be cut."""

    words: bool  # between words
    longest: int  # piece of a unigram model; 0: not within words


def cuts_of(spec: Spec, own: Sequence[str]) -> Cuts:
    """Where a tokenizer, given in its JSON form, lets a text be cut.

    Args:
        own: added tokens that are part of no piece.
    """
    parts = lambda key, name: _steps(spec.get(key), name)
    added = [t["content"] for t in spec["added_tokens"] if t["content"] not in own]
    plain = all(map(_is_local, parts("normalizer", "normalizers")))
    if not plain or any(re.search(r"\S\s+\S", content) for content in added):
        return Cuts(False, 0)
    steps, model = parts("pre_tokenizer", "pretokenizers"), spec["model"]
    known = all(_cuts_words(step) or step["type"] in _HARMLESS or _keeps(step) for step in steps)
    pieces = model["vocab"] if isinstance(model["vocab"], dict) else [p for p, _ in model["vocab"]]
    apart = any(map(_cuts_words, steps))
    if not apart and model["type"] == "BPE":
        apart = not any(re.search("[^\u2581 ][\u2581 ]", piece) for piece in pieces)
    within = model["type"] == "Unigram" and not added and all(map(_only_blanks, steps))
    return Cuts(known and apart, max(map(len, pieces)) if within and known else 0)


def start_of(text: str, count: int, cuts: Cuts, encode: Encode) -> str:
    """A start of ``text`` with the same first ``count`` ids; the text if it cannot be cut.

    The start has more than ``count`` ids if the text does.

    Args:
        encode: texts -> ids.
    """
    size, tries = max(LONG, 16 * count), _TRIES
    while size < len(text):
        gap = _WORDS.search(text, size) if cuts.words else None
        at = len(text) if gap is None else gap.end()
        if cuts.longest and at > 2 * size and tries:
            tries -= 1
            start = _within_word(text, size, count, cuts.longest, encode)
            if start is not None:
                return start
        if at < len(text) and len(encode([text[:at]])[0]) > count:
            return text[:at]
        size = max(4 * size, at)
    return text


def _within_word(text: str, size: int, count: int, longest: int, encode: Encode) -> str | None:
    """A start of the text that ends within a run of plain letters; None if there is no such run."""
    run = re.compile(f"{_PLAIN}{{{longest + 2}}}").search(text, size, 2 * size)
    if run is None:
        return None
    last = run.end() - 1
    paths = encode([text[: last - i] for i in range(longest + 1)])
    common = os.path.commonprefix(paths)  # works for any sequences
    return text[:last] if len(common) > count else None


def _steps(step: Spec | None, name: str) -> list[Spec]:
    if step is None:
        return []
    return step[name] if step["type"] == "Sequence" else [step]


def _is_local(step: Spec) -> bool:
    """Whether a normalizer looks no further than from a letter to the blank beside it."""
    if step["type"] == "Replace":
        pattern = step["pattern"]
        return len(pattern.get("String", "--")) == 1 or pattern.get("Regex") in (" {2,}", r"\s+")
    return step["type"] in _NORMALIZERS


def _cuts_words(step: Spec) -> bool:
    """Whether a pre-tokenizer cuts between a letter and a blank, whatever stands elsewhere."""
    match step["type"]:
        case "CharDelimiterSplit":
            return step["delimiter"] == " "
        case "Metaspace":
            return step.get("split", True)
        case "ByteLevel":
            return step.get("use_regex", True)
        case "Split":
            return step["pattern"].get("Regex") in EXPRESSIONS and step["behavior"] == "Isolated"
        case kind:
            return kind in _CUTTING


def _keeps(step: Spec) -> bool:
    return step["type"] in ("Metaspace", "ByteLevel")  # without cuts of their own


def _only_blanks(step: Spec) -> bool:
    return step["type"] in ("WhitespaceSplit", "CharDelimiterSplit", "Metaspace")
