"""Figures of studies: a panel for each group of variants."""

import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxprompt.studies.study import FULL, Records, Study, Variant, majority_of, score

if TYPE_CHECKING:
    from matplotlib.axes import Axes


MARKERS = "os^D"  # of ten series each, which have ten colours
MOST_TICKS = 8


def draw(
    study: Study,
    groups: Mapping[str, Sequence[Variant]],
    records: Records,
    path: Path,
    more: Mapping[str, Callable[["Axes"], None]] = {},
) -> Path | None:
    """Draw the variants that have values: lines where they have a place on an axis, else bars.

    Args:
        more: panels behind those of the groups, by title.

    Returns:
        The path, or None where there is nothing to draw.
    """
    from matplotlib.figure import Figure

    panels = {
        group: with_values
        for group, variants in groups.items()
        if (with_values := [variant for variant in variants if variant.values(records)])
    }
    if not panels and not more:
        return None
    count = len(panels) + len(more)
    figure = Figure(figsize=(2 + 4.5 * count, 4.5), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis, (title, fill) in zip(axes[len(panels) :], more.items(), strict=True):
        fill(axis)
        axis.set_title(title, fontsize="medium")
    for axis, (group, variants) in zip(axes[: len(panels)], panels.items(), strict=True):
        if any(variant.x is not None for variant in variants):
            _line_panel(axis, study.axis, variants, records)
        else:
            _bars(axis, variants, records)
            axis.set(xlabel=_metric(variants, records))
        axis.set_title(group, fontsize="medium")
    figure.savefig(path, dpi=120)
    return path


def _line_panel(axis: "Axes", label: str, variants: Sequence[Variant], records: Records) -> None:
    """Lines over the axis, and level lines for variants without a place on it."""
    placed = [variant for variant in variants if variant.x is not None]
    _lines(axis, placed, records)
    for variant in (variant for variant in variants if variant.x is None):
        level = statistics.mean(variant.values(records))
        axis.axhline(level, color="gray", linestyle="--", label=variant.label)
    majority = _drawn_majority(variants, records)
    if majority is not None:
        axis.axhline(majority, color="gray", linestyle=":", label="majority class")
    axis.set(xlabel=label, ylabel=_metric(placed, records))
    if len(axis.get_lines()) > 8:  # it would hide points
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    else:
        axis.legend(fontsize="small")


def _metric(variants: Sequence[Variant], records: Records) -> str:
    """The name of the tasks' metric; empty where the values are something else."""
    names = {record["metric"] for variant in variants for record in variant.complete(records)}
    only_scores = all(variant.read is score for variant in variants)
    return names.pop() if len(names) == 1 and only_scores else ""


def _drawn_majority(variants: Sequence[Variant], records: Records) -> float | None:
    """The majority class's score; None where the values are no scores."""
    only_scores = all(variant.read is score for variant in variants)
    return majority_of(variants, records) if only_scores else None


def _place(variant: Variant, records: Records) -> float:
    """Where a variant stands on the axis."""
    if isinstance(variant.x, str):
        return variant.complete(records)[0][variant.x]
    return float(variant.x or 0.0)


def _lines(axis: "Axes", variants: Sequence[Variant], records: Records) -> None:
    from matplotlib.ticker import NullLocator

    for number, series in enumerate(dict.fromkeys(variant.series for variant in variants)):
        points = sorted(
            (_place(variant, records), variant.values(records))
            for variant in variants
            if variant.series == series
        )
        bars = [statistics.stdev(v) if len(v) > 1 else math.nan for _, v in points]
        axis.errorbar(
            [x for x, _ in points], [statistics.mean(v) for _, v in points], bars,
            color=f"C{number}", marker=MARKERS[number // 10 % len(MARKERS)], capsize=3,
            label=series,
        )  # fmt: skip
    ticks = sorted({_place(variant, records) for variant in variants})
    if len(ticks) > MOST_TICKS:
        axis.set_xscale("log")
        return
    axis.set_xscale("symlog", linthresh=min((t for t in ticks if t > 0), default=1))
    names = [f"{t / 1e6:.3g}M" if t >= 1e6 else f"{t:,.0f}" for t in ticks]
    axis.set_xticks(ticks, names)
    axis.xaxis.set_minor_locator(NullLocator())


def _bars(axis: "Axes", variants: Sequence[Variant], records: Records) -> None:
    values = [variant.values(records) for variant in variants]
    spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    colours = ["gray" if variant.label == FULL else "C0" for variant in variants]
    middle = [statistics.mean(v) for v in values]
    axis.barh(range(len(variants)), middle, xerr=spread, color=colours, capsize=3)
    labels = [textwrap.fill(variant.label, 30) for variant in variants]
    axis.set_yticks(range(len(variants)), labels, fontsize="small")
    axis.invert_yaxis()
    majority = _drawn_majority(variants, records)
    if majority is not None:
        axis.axvline(majority, color="gray", linestyle=":", label="majority class")
        axis.legend(fontsize="small")
