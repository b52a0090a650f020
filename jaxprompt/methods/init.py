"""How a soft prompt starts (Lester et al. 2021, 3.2; the authors' code where it differs)."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import PromptConfig
from jaxprompt.runtime import processes

Rows = Float[np.ndarray, "P D"]

UNIFORM = {"paper": (-0.5, 0.5), "code": (0.0, 0.5)}


def initial_prompt(
    config: PromptConfig,
    table: Float[Array, "V D"],
    *,
    encode: Callable[[str], list[int]],
    special_ids: Sequence[int],
    pieces: int,
    labels: Sequence[Sequence[int]],
    seed: int,
    from_file: Callable[[str], Rows],
) -> Float[np.ndarray, "P D"]:
    """The float32 start of a prompt of ``config.length`` vectors.

    ``encode`` turns text into ids without EOS, ``pieces`` is the tokenizer's size, ``labels`` are
    the ids of the task's class labels without EOS and ``from_file`` reads the prompt of
    ``config.file``.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    length, width = config.length, table.shape[1]

    def sampled(count: int) -> Rows:
        """Embeddings of distinct ids drawn from the start of the vocabulary."""
        code = config.special_ids == "code"
        every = table.shape[0] if code and config.vocabulary is None else pieces
        size = min(config.vocabulary or every, every)
        excluded = () if code else special_ids
        candidates = np.setdiff1d(np.arange(size), np.asarray(excluded, int))
        if count and not len(candidates):
            raise UserError(
                f"prompt.vocabulary is {size}, all of them special ids; raise it, or set "
                "prompt.special_ids=code."
            )
        drawn = rng.choice(candidates, count, replace=count > len(candidates))
        return lookup(table, drawn)

    def completed(rows: Sequence[np.ndarray]) -> Rows:
        """``rows`` cut to the length, the positions after them sampled from the vocabulary."""
        head = np.asarray(rows[:length], np.float32).reshape(-1, width)
        return np.concatenate([head, sampled(length - len(head))])

    match config.init:
        case "uniform":
            low, high = UNIFORM[config.uniform]
            return rng.uniform(low, high, (length, width)).astype(np.float32)
        case "sampled_vocabulary":
            return sampled(length)
        case "class_labels":
            # label i starts position i; the pieces of a label of several are averaged
            return completed([lookup(table, ids).mean(axis=0) for ids in labels])
        case "text":
            return completed(list(lookup(table, encode(config.text or ""))))
        case "file":
            return resized(from_file(config.file or ""), length, width, config)


def lookup(table: Float[Array, "V D"], ids: Sequence[int] | np.ndarray) -> Rows:
    """Rows of the table as float32 on the host, without copying the table."""
    return np.asarray(processes.fetch(table[np.asarray(ids, np.int32)])).astype(np.float32)


def resized(rows: Rows, length: int, width: int, config: PromptConfig) -> Rows:
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
