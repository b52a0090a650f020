"""What a soft prompt looks like: nearest words, norms, similarities (Lester et al. 2021, 7)."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprompt.config.errors import UserError
from jaxprompt.runtime.files import write_output


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
) -> dict[str, Any]:
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


def figure_format(path: Path) -> str:
    """The format that a figure's file name asks for. Raises UserError where none can be drawn."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    asked = path.suffix[1:].lower() or "png"
    if asked not in known:
        raise UserError(
            f"A figure cannot be drawn as {str(path)!r}; let it end in .png, .svg, .pdf or another "
            f"of {', '.join(sorted(known))}."
        )
    return asked


def _save(figure: Any, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format=figure_format(path))
    write_output(path, lambda file: file.write(drawn.getvalue()))


def draw_prompt(report: dict[str, Any], vectors: Float[np.ndarray, "P D"], path: Path) -> None:
    """A figure: norms beside the vocabulary's, and the similarity of every pair of vectors."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    norms = [vector["norm"] for vector in report["vectors"]]
    left.bar(range(len(norms)), norms, color="tab:blue", label="prompt vectors")
    mean = report["vocabulary_norm"]["mean"]
    left.axhline(mean, color="tab:orange", label="mean of the vocabulary")
    left.set(xlabel="position in the prompt", ylabel="Euclidean norm", title="Norms")
    left.legend()
    image = right.imshow(similarities(vectors), vmin=-1, vmax=1, cmap="RdBu_r")
    right.set(xlabel="position", ylabel="position", title="Cosine similarity of the vectors")
    for axis in (left.xaxis, right.xaxis, right.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=right)
    _save(figure, path)
