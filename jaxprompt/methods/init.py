"""How a soft prompt starts (Lester et al. 2021, 3.2; the authors' code where it differs)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import PromptConfig
from jaxprompt.runtime import processes

Rows = Float[np.ndarray, "P D"]

UNIFORM = {"paper": (-0.5, 0.5), "code": (0.0, 0.5)}


class Vocabulary(NamedTuple):
    """The embeddings and ids that a prompt may start from."""

    table: Float[Array, "V D"]  # of token embeddings
    encode: Callable[[str], list[int]]  # text to ids, without EOS
    special_ids: Sequence[int]  # pad, EOS, unk
    pieces: int  # of the tokenizer
    labels: Sequence[Sequence[int]]  # ids of each class label, without EOS


def initial_prompt(
    config: PromptConfig, vocabulary: Vocabulary, seed: int, from_file: Callable[[str], Rows]
) -> Float[np.ndarray, "P D"]:
    """The float32 start of a prompt of ``config.length`` vectors.

    Args:
        config: Length and kind of the start.
        vocabulary: Embeddings and the ids that label words and text have.
        seed: Of sampled ids and uniform numbers.
        from_file: Reads the prompt of ``config.file``.

    Raises:
        UserError: nothing may be sampled, or the prompt of a file does not fit.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    table = vocabulary.table
    length, width = config.length, table.shape[1]
    if config.init == "uniform":
        low, high = UNIFORM[config.uniform]
        return rng.uniform(low, high, (length, width)).astype(np.float32)
    if config.init == "file":
        return resized(from_file(config.file or ""), length, width, config)
    rows: Sequence[np.ndarray] = []
    if config.init == "class_labels":
        # label i starts position i; the pieces of a label of several are averaged
        rows = [lookup(table, ids).mean(axis=0) for ids in vocabulary.labels]
    elif config.init == "text":
        rows = list(lookup(table, vocabulary.encode(config.text or "")))
    # cut to the length; the positions after them are sampled from the vocabulary
    head = np.asarray(rows[:length], np.float32).reshape(-1, width)
    drawn = _sampled_ids(config, vocabulary, rng, length - len(head))
    return np.concatenate([head, lookup(table, drawn)])


def _sampled_ids(
    config: PromptConfig, vocabulary: Vocabulary, rng: np.random.Generator, count: int
) -> np.ndarray:
    """``count`` distinct ids drawn from the start of the vocabulary."""
    code = config.special_ids == "code"
    every = vocabulary.table.shape[0] if code and config.vocabulary is None else vocabulary.pieces
    size = min(config.vocabulary or every, every)
    excluded = () if code else vocabulary.special_ids
    candidates = np.setdiff1d(np.arange(size), np.asarray(excluded, int))
    if count and not len(candidates):
        raise UserError(
            f"prompt.vocabulary is {size}, all of them special ids; raise it, or set "
            "prompt.special_ids=code."
        )
    return rng.choice(candidates, count, replace=count > len(candidates))


def lookup(table: Float[Array, "V D"], ids: Sequence[int] | np.ndarray) -> Rows:
    """Rows of the table as float32 on the host, without copying the table."""
    return np.asarray(processes.fetch(table[np.asarray(ids, np.int32)])).astype(np.float32)


def resized(
    rows: Rows, length: int, width: int, config: PromptConfig
) -> Float[np.ndarray, "{length} D"]:
    """Rows of a stored prompt for a new length: cut, or repeated from the start (opt-in)."""
    if rows.shape[1] != width:
        raise UserError(
            f"The prompt {config.file!r} has vectors of {rows.shape[1]} numbers and the backbone "
            f"needs {width}; use a prompt that was tuned on a backbone of this size."
        )
    if len(rows) != length and not config.resize:
        raise UserError(
            f"The prompt {config.file!r} has {len(rows)} vectors and prompt.length is {length}; "
            f"set prompt.length={len(rows)}, or prompt.resize=true to cut or repeat it."
        )
    return np.resize(rows, (length, width)).astype(np.float32)
