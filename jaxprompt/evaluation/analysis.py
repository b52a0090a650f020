"""What a soft prompt looks like: nearest words, norms, similarities (Lester et al. 2021, 7)."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Spread(TypedDict):
    """The mean and the standard deviation of some numbers."""

    mean: float
    std: float


class Near(TypedDict):
    """A word of the vocabulary and its cosine with a vector."""

    word: str
    cosine: float


class VectorReport(TypedDict):
    """One vector of a prompt: its Euclidean norm and nearest words, best first."""

    norm: float
    nearest: list[Near]


class LabelReport(TypedDict):
    """Vectors near a label's pieces, and the share of random directions that are."""

    positions: list[int]
    random: float


class PromptReport(TypedDict):
    """What ``summarize`` says of a prompt; JSON-ready."""

    length: int
    norm: Spread
    vocabulary_norm: Spread
    similarity: dict[str, float]
    clusters: dict[str, float]
    labels: dict[str, LabelReport]
    vectors: list[VectorReport]


class Neighbours(NamedTuple):
    """The vocabulary rows nearest to each vector by cosine, best first."""

    ids: Int[np.ndarray, "P n"]
    cosines: Float[np.ndarray, "P n"]


def nearest_words(
    vectors: Float[np.ndarray, "P D"], table: Float[Array, "V D"], *, pieces: int, count: int = 5
) -> Neighbours:
    """The ``count`` nearest of the first ``pieces`` rows of the table, by cosine."""
    words = jnp.asarray(table[:pieces], jnp.float32)
    cosines = _unit(jnp.asarray(vectors)) @ _unit(words).T
    best, ids = jax.lax.top_k(cosines, min(count, pieces))
    return Neighbours(np.asarray(ids), np.asarray(best))


def tightness(ids: Int[np.ndarray, "P n"], table: Float[Array, "V D"]) -> Float[np.ndarray, " P"]:
    """How alike the ``n`` words near each vector are: the mean cosine of two different ones.

    Near words of a tuned vector form tight clusters, as Technology and technology do; those of a
    random vector do not (Lester et al. 2021, section 7).
    """
    n = ids.shape[1]
    if n < 2:
        return np.ones(len(ids), np.float32)
    words = _unit(jnp.asarray(table[ids], jnp.float32))
    together = jnp.sum(jnp.square(words.sum(axis=1)), axis=-1)  # sum of all n * n cosines
    return np.asarray((together - n) / (n * (n - 1)))


def similarities(vectors: Float[np.ndarray, "P D"]) -> Float[np.ndarray, "P P"]:
    """Cosine similarity of every pair of prompt vectors."""
    unit = np.asarray(_unit(jnp.asarray(vectors)))
    return unit @ unit.T


def _unit(rows):
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def summarize(
    vectors: Float[np.ndarray, "P D"],
    table: Float[Array, "V D"],
    *,
    pieces: int,
    word: Callable[[int], str],
    count: int = 5,
    labels: Mapping[str, Sequence[int]] | None = None,
) -> PromptReport:
    """A JSON-ready report: each vector's norm and nearest words, and summaries over all.

    ``clusters`` has the mean tightness of the nearest words, and what 100 random directions have.
    ``labels`` are label words with their ids; the report says which vectors have one of a label's
    pieces among their nearest words, and how often that is so for a random direction.
    """
    draws = np.random.default_rng(0).normal(size=(100, vectors.shape[1])).astype(np.float32)
    random = nearest_words(draws, table, pieces=pieces, count=count)
    near = nearest_words(vectors, table, pieces=pieces, count=count)
    norms = np.linalg.norm(vectors, axis=-1)
    words = np.asarray(jnp.linalg.norm(jnp.asarray(table[:pieces], jnp.float32), axis=-1))
    pairs = similarities(vectors)
    off_diagonal = pairs[~np.eye(len(pairs), dtype=bool)]
    return {
        "length": len(vectors),
        "norm": {"mean": float(norms.mean()), "std": float(norms.std())},
        "vocabulary_norm": {"mean": float(words.mean()), "std": float(words.std())},
        "similarity": {
            "mean": float(off_diagonal.mean()) if off_diagonal.size else 1.0,
            "max": float(off_diagonal.max()) if off_diagonal.size else 1.0,
        },
        "clusters": {
            "tightness": float(tightness(near.ids, table).mean()),
            "random": float(tightness(random.ids, table).mean()),
        },
        "labels": {
            label: {
                "positions": np.flatnonzero(np.isin(near.ids, ids).any(axis=1)).tolist(),
                "random": float(np.isin(random.ids, ids).any(axis=1).mean()),
            }
            for label, ids in (labels or {}).items()
        },
        "vectors": [
            {
                "norm": float(norm),
                "nearest": [
                    {"word": word(int(i)), "cosine": float(c)}
                    for i, c in zip(ids, cosines, strict=True)
                ],
            }
            for norm, ids, cosines in zip(norms, near.ids, near.cosines, strict=True)
        ],
    }
