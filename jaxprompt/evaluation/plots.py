"""Figures of runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxprompt.evaluation.analysis import _save


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
