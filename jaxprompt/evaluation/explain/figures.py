"""Figures of what explains a prompt, for people."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxprompt.evaluation.explain.importance import Curve, Importance
from jaxprompt.evaluation.explain.kinship import Kinship
from jaxprompt.evaluation.explain.layers import Lens
from jaxprompt.evaluation.explain.probes import Probe
from jaxprompt.evaluation.explain.tokens import RowTokens, TokenAttributions
from jaxprompt.evaluation.explain.words import SOFT, Projected
from jaxprompt.evaluation.plots import new_figure, plain_text, save_figure, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"prompt": "tab:blue", "bare": "tab:orange", "random": "tab:gray"}
NAMES = {"prompt": "with the prompt", "bare": "without it", "random": "random prompt"}
MOST_TOKENS = 28  # of a row in the figure
MOST_NAMES = 12  # prompts whose similarities are written into the cells


def draw_importance(found: Importance, path: Path) -> None:
    """Three measures of each vector, and what is left when vectors are deleted."""
    figure = new_figure(14, 7.5)
    grid = figure.add_gridspec(3, 2, width_ratios=[1.5, 1])
    measures = (
        ("left_out", "left out: fall of log p"),
        ("gate", "gate: |gradient|"),
        ("integrated", "integrated gradients"),
    )
    first = None
    for number, (name, title) in enumerate(measures):
        axis = figure.add_subplot(grid[number, 0], sharex=first)
        first = first or axis
        tuned, random = getattr(found.tuned, name), getattr(found.random, name)
        positions = np.arange(len(tuned))
        axis.bar(positions, tuned, color=COLOURS["prompt"], label="the prompt's vectors")
        axis.plot(
            positions, random, ".", color="black", markersize=4, label="random vectors as long"
        )
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set(ylabel="nats")
        axis.set_title(title, fontsize="medium", loc="left")
        whole_numbers(axis.xaxis)
        if number == 0:
            axis.legend(
                loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize="small", frameon=False
            )
        if number == 2:
            axis.set_xlabel("position in the prompt")
    _draw_deletion(figure.add_subplot(grid[:, 1]), found)
    save_figure(figure, path)


def _draw_deletion(axis: "Axes", found: Importance) -> None:
    curve = found.random_orders
    middle = curve.accuracy.mean(axis=0)
    low, high = curve.accuracy.min(axis=0), curve.accuracy.max(axis=0)
    axis.fill_between(curve.kept, low, high, color="lightgray", label="range of random orders")
    axis.plot(curve.kept, middle, color=COLOURS["random"], label="mean of random orders")
    lines: Sequence[tuple[Curve, str, str]] = (
        (found.highest_first, "tab:red", "most important first"),
        (found.lowest_first, "tab:green", "least important first"),
    )
    for one, colour, label in lines:
        axis.plot(one.kept, one.accuracy[0], marker="o", markersize=4, color=colour, label=label)
    axis.invert_xaxis()
    axis.set(xlabel="vectors that are left", ylabel="accuracy", ylim=(0, 1.02))
    axis.set_title(f"Vectors deleted, on {found.rows[1]} other rows", fontsize="medium")
    axis.legend(loc="lower left", fontsize="small")


def draw_tokens(found: TokenAttributions, path: Path) -> None:
    """A heat map for each row: its words against the three forms."""
    figure = new_figure(14, 1.45 * len(found.rows) + 0.6)
    axes = np.atleast_1d(figure.subplots(len(found.rows), 1))
    widest = min(max(len(row.tokens) for row in found.rows), MOST_TOKENS)
    images = [_draw_row(axis, row, widest) for axis, row in zip(axes, found.rows, strict=True)]
    bar = figure.colorbar(images[0], ax=list(axes), shrink=0.5, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["against", "0", "for the label"])
    save_figure(figure, path)


def _draw_row(axis: "Axes", row: RowTokens, widest: int):
    """The attributions of each form over the largest of its own, so that forms can be compared."""
    values = np.stack([row.prompt, row.bare, row.random])[:, :MOST_TOKENS]
    largest = np.abs(values).max(axis=1, keepdims=True)
    image = axis.imshow(
        values / np.maximum(largest, 1e-12), vmin=-1, vmax=1, cmap="RdBu", aspect="auto"
    )
    names = zip(NAMES.values(), largest[:, 0], strict=True)
    axis.set_yticks(range(3), [f"{name} ({size:.2g})" for name, size in names], fontsize="small")
    tokens = [plain_text(token.strip() or "·") for token in row.tokens[:MOST_TOKENS]]
    axis.set_xticks(range(len(tokens)), tokens, rotation=25, ha="right", fontsize="small")
    axis.set_xlim(-0.5, widest - 0.5)
    axis.set_frame_on(False)
    axis.set_title(plain_text(f"row {row.row + 1}: {row.label}"), fontsize="small", loc="left")
    return image


def draw_lens(found: Mapping[str, Lens], path: Path) -> None:
    """Accuracy and rank of the right label's first token behind each layer."""
    figure = new_figure(12, 4.5)
    left, right = figure.subplots(1, 2, sharex=True)
    for form, lens in found.items():
        layers = range(1, len(lens.rank) + 1)
        style = {"color": COLOURS[form], "marker": "o", "label": NAMES[form]}
        left.plot(layers, lens.accuracy, **style)
        right.plot(layers, np.array(lens.rank) + 1, **style)
    left.set(xlabel="layer", ylabel="accuracy among labels", ylim=(0, 1.02))
    left.set_title("Label that the logit lens finds at the answer", fontsize="medium")
    right.set(xlabel="layer", ylabel="median rank in the vocabulary", yscale="log")
    right.invert_yaxis()
    right.set_title("Rank of the right label's first token (1 is best)", fontsize="medium")
    left.legend(loc="best")
    whole_numbers(left.xaxis, right.xaxis)
    save_figure(figure, path)


def draw_probes(
    text: Mapping[str, Probe], answer: Mapping[str, Probe], kind: str, path: Path
) -> None:
    """Accuracy of probes over layers, with that of the control task dashed."""
    figure = new_figure(12, 4.8)
    pairs = zip(
        figure.subplots(1, 2, sharey=True),
        (("Mean over the words of a row", text), ("Where the answer begins", answer)),
        strict=True,
    )
    for axis, (title, probes) in pairs:
        for form, probe in probes.items():
            layers = range(1, len(probe.task) + 1)
            axis.plot(layers, probe.task, color=COLOURS[form], marker="o", label=NAMES[form])
            axis.plot(layers, probe.control, "--", color=COLOURS[form], marker="x")
        any_form = next(iter(probes.values()))
        axis.axhline(any_form.majority, color="black", linestyle=":", label="majority label")
        axis.set(xlabel="layer", ylim=(0, 1.02))
        axis.set_title(title, fontsize="medium")
        whole_numbers(axis.xaxis)
        axis.legend(loc="best", fontsize="small")
        axis.set_ylabel("accuracy of a linear probe")
    figure.suptitle(
        plain_text(f"Solid: the task. Dashed: a random label for {kind}"), fontsize="medium"
    )
    save_figure(figure, path)


def draw_words(found: Sequence[Projected], path: Path) -> None:
    """A bar for what stands in place of the vectors, with its words."""
    figure = new_figure(13, 1 + 0.55 * len(found))
    axis = figure.subplots()
    for number, one in enumerate(found):
        colour = COLOURS["prompt"] if one.name == SOFT else "lightsteelblue"
        axis.barh(number, one.accuracy, color=colour)
        text = "" if one.text is None else f"   {textwrap.shorten(one.text, 80)}"
        axis.text(
            one.accuracy + 0.01, number, plain_text(f"{one.accuracy:.3f}{text}"), va="center",
            fontsize="small",
        )  # fmt: skip
    axis.set_yticks(range(len(found)), [one.name for one in found])
    axis.set(xlabel="accuracy", xlim=(0, 1.8), ylim=(len(found) - 0.5, -0.5))
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axis.set_title("What stands in place of the vectors", fontsize="medium")
    save_figure(figure, path)


def draw_kinship(found: Kinship, path: Path) -> None:
    """Heat maps of cosine and CKA, like prompts beside each other."""
    size = 4.2 + 0.35 * len(found.names)
    figure = new_figure(2 * size + 1, size)
    parts = (
        ("Cosine of mean vectors", found.cosine, found.random_cosine, (-1, 1), "RdBu_r"),
        ("Linear CKA", found.cka, found.random_cka, (0, 1), "viridis"),
    )
    for axis, (title, values, random, (low, high), colours) in zip(
        figure.subplots(1, 2), parts, strict=True
    ):
        image = axis.imshow(values, vmin=low, vmax=high, cmap=colours)
        names = [plain_text(name) for name in found.names]
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(names)), names)
        axis.set_title(f"{title} (random prompts: {random:.2f})", fontsize="medium")
        if len(names) <= MOST_NAMES:
            for (i, j), value in np.ndenumerate(values):
                dark = abs(value) > 0.6 if low < 0 else value < 0.6
                axis.text(
                    j, i, f"{value:.2f}", ha="center", va="center", fontsize="small",
                    color="white" if dark else "black",
                )  # fmt: skip
        figure.colorbar(image, ax=axis, shrink=0.8)
    save_figure(figure, path)
