"""Figures: a prompt, the curves of a run, the losses of pre-training, a confusion matrix."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from jaxprompt.config.errors import UserError
from jaxprompt.evaluation.analysis import PromptReport, similarities
from jaxprompt.evaluation.classes import OTHER, Confusion
from jaxprompt.runtime.files import write_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, float]  # a line of metrics.jsonl
_MOST_CELLS = 20  # of more classes the counts are not written into the cells
_MOST_VECTORS = 100  # of more vectors the words are not written beside them


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


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure in the format that its name asks for."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format=figure_format(path))
    write_output(path, lambda file: file.write(drawn.getvalue()))


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plain_text(text: str) -> str:
    """Text as it is: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def draw_prompt(report: PromptReport, vectors: Float[np.ndarray, "P D"], path: Path) -> None:
    """A figure of a prompt: each vector's norm and nearest words, and all similarities."""
    vertical = max(4.0, 1.2 + 0.2 * min(len(vectors), _MOST_VECTORS))
    figure = new_figure(13, vertical)
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
    _draw_norms(left, report)
    image = right.imshow(similarities(vectors), vmin=-1, vmax=1, cmap="RdBu_r")
    right.set(xlabel="position in the prompt", ylabel="position in the prompt")
    right.set_title("Cosine similarity of the vectors")
    whole_numbers(left.yaxis, right.xaxis, right.yaxis)
    figure.colorbar(image, ax=right, shrink=min(1.0, 4 / vertical))
    save_figure(figure, path)


def _draw_norms(axis: "Axes", report: PromptReport) -> None:
    """A bar for each vector, its nearest words beside it; the legend stands above the bars."""
    norms = [vector["norm"] for vector in report["vectors"]]
    mean = report["vocabulary_norm"]["mean"]
    longest = max([*norms, mean])
    axis.barh(range(len(norms)), norms, color="tab:blue", label="vector of the prompt")
    axis.axvline(mean, color="tab:orange", label="mean of the vocabulary")
    if len(norms) <= _MOST_VECTORS:
        for position, vector in enumerate(report["vectors"]):
            words = "  ".join(near["word"] for near in vector["nearest"][:4])
            axis.text(longest * 1.03, position, plain_text(words), va="center", fontsize="small")
        axis.set_xlim(0, longest * 1.8)  # room for the words
    axis.set(xlabel="Euclidean norm", ylabel="position in the prompt")
    axis.set_ylim(len(norms) - 0.5, -0.5)  # the first vector on top
    axis.set_title("Norms and nearest words", pad=28)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)


def draw_curves(rows: Sequence[Row], metric: str, majority: float, path: Path) -> None:
    """A figure of a run: training loss and validation metric against steps.

    Args:
        rows: the lines of the run's metrics; the first has the metric of the untuned backbone.
        metric: the one to draw.
        majority: what the most frequent answer scores.
        path: of the figure.
    """
    figure = new_figure(11, 4.5)
    left, right = figure.subplots(1, 2, sharex=True)
    losses = _points(rows, "loss")
    if losses:
        left.plot(*zip(*losses, strict=True), color="tab:blue", linewidth=1)
    left.set(xlabel="step", ylabel="nats a target token", title="Training loss")
    scores = _points(rows, f"validation/{metric}")
    untuned = [(0.0, value) for _, value in _points(rows, f"untuned/{metric}")]
    if untuned and scores:
        right.plot(*zip(untuned[0], scores[0], strict=True), ":", color="tab:green")
    if scores:
        right.plot(*zip(*scores, strict=True), marker="o", color="tab:green", label=metric)
    if untuned:
        right.plot(*zip(*untuned, strict=True), "D", color="tab:red", label="untuned backbone")
    right.axhline(majority, color="tab:gray", linestyle="--", label="majority class")
    lowest = min([0.0, *(value for _, value in [*scores, *untuned])])
    right.set(xlabel="step", ylabel=metric, ylim=(lowest, 1.02), title=f"Validation {metric}")
    right.legend(loc="best")
    save_figure(figure, path)


def _points(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if key in row]


def draw_losses(rows: Sequence[Row], path: Path) -> None:
    """A figure of a pre-training run: losses on training and held-out text against tokens read."""
    figure = new_figure(11, 5.5)
    axis = figure.subplots()
    losses = [(row["tokens"], row["loss"]) for row in rows if "loss" in row]
    if losses:
        axis.plot(*zip(*losses, strict=True), color="lightgray", linewidth=1, label="training")
    curves: dict[str, list[tuple[float, float]]] = {}
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
    save_figure(figure, path)


def draw_confusion(confusion: Confusion, path: Path) -> None:
    """A figure of a confusion matrix: references down, predictions across, counts in the cells.

    A cell's colour is its share of the row. Predictions that are no label have a column of their
    own where there are any.
    """
    counts, columns = confusion.counts, [*confusion.labels, OTHER]
    if not counts[:, -1].any():
        counts, columns = counts[:, :-1], columns[:-1]
    size = len(confusion.labels)
    edge = 3.0 + 0.4 * min(size, 40)
    figure = new_figure(edge + 1.5, edge)
    axis = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    if size <= _MOST_CELLS:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(count), ha="center", va="center", color=colour)
    names = [plain_text(name[:30]) for name in columns]
    axis.set_xticks(range(len(columns)), names, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(size), names[:size])
    axis.set(xlabel="predicted", ylabel="reference", title=f"{int(counts.sum())} rows")
    figure.colorbar(image, ax=axis, label="share of the reference's rows", shrink=0.8)
    save_figure(figure, path)


def whole_numbers(*axes) -> None:
    """Let axes have ticks at whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True))
