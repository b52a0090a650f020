"""Hard prompts: virtual tokens that are rows of the embedding table, so they can be read as words.

``gcg`` (Zou et al. 2023, arXiv 2307.15043, algorithm 1) changes one word at a time. Its trainables
are the ids alone. ``pez`` (Wen et al. 2023, arXiv 2302.03668, algorithm 1) descends with vectors
beside the ids, which are those of the nearest words. Their steps are in ``training/search.py``.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import PromptConfig
from jaxprompt.data.templates import place_prompt, with_counts
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.methods.base import Method
from jaxprompt.models.injection import Injection, Params

IDS, VECTORS = "ids", "vectors"
_FEWEST = 2  # words, so that there is one to change to
_ANY = "a"  # a text that any word may follow


def table_of(params: Params) -> Float[Array, "V D"]:
    """The embedding table."""
    return params["token_embedder"]["embedding"]


def rows_of(params: Params, ids: Int[Array, "*K P"]) -> Float[Array, "*K P D"]:
    """The float32 embeddings of ids."""
    return table_of(params)[ids].astype(jnp.float32)


def nearest(
    vectors: Float[Array, "*K P D"],
    table: Float[Array, "V D"],
    allowed: Bool[Array | np.ndarray, " V"] | None = None,
) -> Int[Array, "*K P"]:
    """The ids of the rows of the table that are nearest to vectors, by Euclidean distance.

    allowed: the rows to choose from; None: all.
    """
    rows = table.astype(jnp.float32)
    # the square of the vector is the same for all rows
    distance = jnp.sum(rows**2, axis=-1) - 2 * jnp.einsum("...pd,vd->...pv", vectors, rows)
    if allowed is not None:
        distance = jnp.where(jnp.asarray(allowed), distance, jnp.inf)
    return jnp.argmin(distance, axis=-1).astype(jnp.int32)


def _init_ids(
    params: Params, start: Float[np.ndarray, "K P D"], config: PromptConfig, seed: int
) -> dict[str, Array]:
    """The words nearest to the start vectors."""
    return {IDS: nearest(jnp.asarray(start), table_of(params))}


def _init_both(
    params: Params, start: Float[np.ndarray, "K P D"], config: PromptConfig, seed: int
) -> dict[str, Array]:
    """These words, and vectors that start at their embeddings."""
    words = _init_ids(params, start, config, seed)
    return words | {VECTORS: rows_of(params, words[IDS])}


def _inject(trainables: dict[str, Array], params: Params) -> Injection:
    """The embeddings of the words."""
    return Injection(rows_of(params, trainables[IDS]))


GCG = Method(_init_ids, _inject)
PEZ = Method(_init_both, _inject)


# ---- words that a search may use, and what it has found


@functools.lru_cache(maxsize=8)
def allowed_words(
    tokenizer: Tokenizer, rows: int, kind: str, excluded: tuple[str, ...] = ()
) -> Bool[np.ndarray, " V"]:
    """The rows of a table of ``rows`` whose text, behind a blank, is read as that row alone.

    Args:
        kind: words: of letters alone. all: of any letters but brackets, which templates need.
        excluded: texts, such as labels, whose words a search must not use.

    Raises:
        UserError: there are too few.
    """
    special = {*tokenizer.special_ids, *tokenizer.sentinel_ids}
    texts = {
        id: tokenizer.token_text(id).strip()
        for id in range(min(rows, tokenizer.size))
        if id not in special
    }
    banned = {word.casefold() for text in excluded for word in text.split()}
    fitting = str.isalpha if kind == "words" else _can_be_written
    texts = {i: t for i, t in texts.items() if fitting(t) and t.casefold() not in banned}
    [alone, *read] = tokenizer.encode_all([_ANY, *(f"{_ANY} {text}" for text in texts.values())])
    allowed = np.zeros(rows, bool)
    for id, ids in zip(texts, read, strict=True):
        allowed[id] = ids == [*alone, id]
    if allowed.sum() < _FEWEST:
        raise UserError(
            f"search.allowed is {kind} and the tokenizer has {allowed.sum()} such pieces; use "
            "search.allowed=all, or another tokenizer."
        )
    return allowed


def _can_be_written(text: str) -> bool:
    return bool(text) and text.isprintable() and not {*text} & {*"{}[]"}


class Words(NamedTuple):
    """A hard prompt as text.

    text: the words.
    survives: whether reading the text gives the ids again.
    """

    text: str
    ids: list[int]
    survives: bool


def words_of(
    vectors: Float[np.ndarray, "P D"], table: Float[Array, "V D"], tokenizer: Tokenizer
) -> Words:
    """The words whose embeddings the vectors are."""
    ids = np.asarray(nearest(jnp.asarray(vectors), table))
    survives = bool(surviving(ids[None], tokenizer)[0])
    return Words(_text(ids, tokenizer), ids.tolist(), survives)


def _text(ids: Sequence[int] | Int[np.ndarray, " P"], tokenizer: Tokenizer) -> str:
    return " ".join(tokenizer.token_text(int(id)).strip() for id in ids)


def _front(tokenizer: Tokenizer) -> str:
    """What stands before a first word, so that it is read as any other one."""
    for front in ("", " "):
        ids = tokenizer.encode(f"{front}{_ANY} {_ANY}")
        if ids[: len(ids) // 2] == ids[len(ids) // 2 :]:
            return front
    return ""


def surviving(ids: Int[np.ndarray, "N P"], tokenizer: Tokenizer) -> Bool[np.ndarray, " N"]:
    """Which rows of ids are the same after they were written and read."""
    front = _front(tokenizer)
    read = tokenizer.encode_all([front + _text(each, tokenizer) for each in ids])
    return np.array([a == b for a, b in zip(ids.tolist(), read, strict=True)], bool)


def as_template(template: str, ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The template with the words of ``ids`` in place of its virtual tokens."""
    left, written = list(ids), ""
    for piece in place_prompt(with_counts(template, tokenizer.encode), len(ids)):
        words, left = left[: piece.virtual], left[piece.virtual :]
        part = piece.text or _text(words, tokenizer).replace("{", "{{").replace("}", "}}")
        if not written:
            written = part if piece.text else _front(tokenizer) + part
            continue
        apart = not written[-1].isspace() and not part[0].isspace()
        written += f" {part}" if apart else part
    return written
