"""What a soft prompt looks like: nearest words, norms, similarities (Lester et al. 2021, 7)."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprompt.config import UserError
from jaxprompt.files import write_output


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


def draw_curves(rows: Sequence[dict[str, Any]], metric: str, majority: float, path: Path) -> None:
    """A figure of a run: training loss and validation metric against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    if losses:
        left.plot(*zip(*losses, strict=True), color="tab:blue", linewidth=1)
    left.set(xlabel="step", ylabel="nats a target token", title="Training loss")
    key = f"validation/{metric}"
    scores = [(row["step"], row[key]) for row in rows if key in row]
    if scores:
        right.plot(*zip(*scores, strict=True), marker="o", color="tab:green", label=metric)
    right.axhline(majority, color="tab:gray", linestyle="--", label="majority class")
    right.set(xlabel="step", ylabel=metric, ylim=(0, 1), title=f"Validation {metric}")
    right.legend(loc="lower right")
    _save(figure, path)


def draw_losses(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A figure of a pre-training run: losses on training and held-out text against tokens read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axis = figure.subplots()
    losses = [(row["tokens"], row["loss"]) for row in rows if "loss" in row]
    if losses:
        axis.plot(*zip(*losses, strict=True), color="lightgray", linewidth=1, label="training")
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("held_out/"):
                short = name.removeprefix("held_out/").removesuffix("/loss")
                curves.setdefault(short, []).append((row["tokens"], value))
    for number, (name, points) in enumerate(curves.items()):
        style = ("-", "--", ":")[number // 10 % 3]
        axis.plot(*zip(*points, strict=True), style, color=f"C{number % 10}", label=name)
    axis.set(xlabel="tokens read (inputs and targets)", ylabel="nats a target token")
    axis.set_title("Loss on training batches and on held-out text by source")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)
