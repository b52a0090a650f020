"""Tables and figures of what scripts/compare_backbones.py has measured (its --report)."""

import argparse
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from jaxprompt.config.errors import UserError
from jaxprompt.studies.cells import read_records

Record = dict[str, Any]
Table = dict[tuple[str, str], dict[str, list[Record]]]  # task, backbone -> method -> seeds


def spread(records: list[Record], field: str = "score") -> tuple[float, float, int]:
    """Mean of a field over seeds, its standard deviation, and how many values there are."""
    values = [record[field] for record in records if record.get(field) is not None]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values) if values else math.nan, deviation, len(values)


def shown(records: list[Record], field: str = "score") -> str:
    """The same as text."""
    mean, deviation, count = spread(records, field)
    return "–" if not count else f"{mean:.3f}" + f" ± {deviation:.3f}" * (count > 1)


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(options: argparse.Namespace) -> None:
    """Tables and figures of the cells that are complete."""
    table: Table = {}
    found = [r for r in read_records(options.out).values() if r["variant"] is None]
    for record in sorted(found, key=lambda r: (r["task"], r["parameters"], r["length"] or 0)):
        test = options.split == "test" and record["test"] is not None
        record["score"] = record["test" if test else "validation"]
        record["floor"] = record["majority_test" if test else "majority"]
        name = f"P = {record['length']}" if record["method"] == "prompt" else record["method"]
        row = table.setdefault((record["task"], record["backbone"]), {})
        row.setdefault(name, []).append(record)
    if not table:
        raise UserError(f"No cell in {str(options.out)!r} is complete yet.")
    names = {name: None for row in table.values() for name in row}
    prompts = sorted((name for name in names if name.startswith("P")), key=lambda n: int(n[4:]))
    columns = [name for name in ("hard", "few", *prompts, "full") if name in names]
    first = ["task", "backbone", "parameters"]
    scores = [[*first, "majority", "untuned", *columns]]
    recovery = [[*first, *columns, "steps"]]
    illegal = [[*first, *columns]]
    for (task, backbone), row in table.items():
        every = [record for records in row.values() for record in records]
        here, floor = [task, backbone, f"{every[0]['parameters']:,}"], every[0]["floor"]
        cells = [row.get(name, []) for name in columns]
        bare = shown(every, "untuned").split(" ")[0]
        scores.append([*here, f"{floor:.3f}", bare, *map(shown, cells)])
        room = spread(row.get("full", []))[0] - floor
        gains = [(spread(cell)[0] - floor) / room if room > 0.01 else math.nan for cell in cells]
        steps = sorted({record["steps"] for record in every if record["steps"]})
        recovery.append([*here, *("–" if math.isnan(g) else f"{g:.0%}" for g in gains)])
        recovery[-1].append("/".join(map(str, steps)))
        illegal.append([*here, *(shown(cell, "illegal") for cell in cells)])
    counts = "/".join(sorted({str(r["templates"]) for r in found if r["method"] == "hard"}))
    metrics = ", ".join(sorted({record["metric"] for record in found}))
    text = f"""Scores ({metrics}) on {options.split} rows, or validation rows where a task has no
test rows: mean and standard deviation over seeds.
untuned: the task's own template, on validation rows.
hard: the best of {counts or "some"} hand-written templates, chosen on validation rows.
P = n: soft prompts of n vectors. full: full fine-tuning.

{markdown(scores)}

Recovery: (score - majority) / (full - majority), where full is above majority by a point or more.

{markdown(recovery)}

Share of greedy outputs, without a choice of labels, that are none of the labels.

{markdown(illegal)}
"""
    (options.out / "report.md").write_text(text, encoding="utf-8")
    adaptation = options.adaptation
    if prompts and "full" in names:
        draw_gap(table, prompts, adaptation, options.out / "gap.png")
    if prompts and adaptation:
        draw_adaptation(table, prompts, adaptation, options.out / "adaptation.png")
    print(text)


def draw_gap(table: Table, prompts: list[str], adaptation: dict[str, int], path: Path) -> None:
    """Full fine-tuning minus prompt tuning against parameters, a panel for each length."""
    # backbones that differ in adaptation alone have the same size: the longest stands for them
    left_out = set(adaptation) - {max(adaptation, key=lambda name: adaptation[name], default="")}
    panels: dict[str, dict[str, list[tuple]]] = {}
    colours = sorted({task for task, _ in table})
    for name, ((task, backbone), row) in itertools.product(prompts, table.items()):
        if backbone not in left_out and {"full", name} <= set(row):
            full, tuned = spread(row["full"]), spread(row[name])
            bar, seeds = math.hypot(full[1], tuned[1]), min(full[2], tuned[2])
            point = row["full"][0]["parameters"], full[0] - tuned[0], bar, seeds
            panels.setdefault(name, {}).setdefault(task, []).append(point)
    if not panels:
        return
    figure = Figure(figsize=(2 + 4 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, tasks) in zip(axes, panels.items(), strict=True):
        for task, points in tasks.items():
            line(axis, points, colours.index(task), label=task)
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.set(xscale="log", xlabel="parameters of the backbone", title=f"prompt, {name}")
        sizes = sorted({point[0] for points in tasks.values() for point in points})
        axis.set_xticks(sizes, [f"{size / 1e6:.3g}M" for size in sizes])
        axis.xaxis.set_minor_locator(NullLocator())
    axes[0].set_ylabel(f"{metric_of(table)}: full fine-tuning - prompt tuning")
    axes[0].legend()
    figure.savefig(path, dpi=150)


def draw_adaptation(table: Table, prompts: list[str], adaptation: dict[str, int], path: Path):
    """Prompt tuning and the share of illegal outputs against steps of adaptation.

    A line for each task and prompt length that was measured on all of the backbones.
    """
    names = sorted(adaptation, key=lambda name: adaptation[name])
    tasks = sorted({task for task, backbone in table if backbone in adaptation})
    lines = [
        (task, prompt)
        for task, prompt in itertools.product(tasks, prompts)
        if all(prompt in table.get((task, name), {}) for name in names)
    ]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = ("score", "prompt tuning"), ("illegal", "share of illegal outputs")
    for axis, (field, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for number, (task, prompt) in enumerate(lines):
            points = [(adaptation[n], *spread(table[task, n][prompt], field)) for n in names]
            line(axis, points, number, label=f"{task}, {prompt}")
        shortest = min((s for s in adaptation.values() if s), default=1)
        axis.set_xscale("symlog", linthresh=shortest)  # 0 has a place, and equal ratios beyond
        ticks = sorted(set(adaptation.values()))
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set(xlabel="steps of LM adaptation (0: span corruption only)", title=title)
    figure.axes[0].set_ylabel(metric_of(table))
    figure.axes[1].set(ylabel="share", ylim=(-0.03, 1.03))
    figure.axes[0].legend()
    figure.savefig(path, dpi=150)


def metric_of(table: Table) -> str:
    """The metric, if there is one for all tasks."""
    names = {r["metric"] for row in table.values() for records in row.values() for r in records}
    return names.pop() if len(names) == 1 else "score"


def line(axis: Any, points: list[tuple], number: int, **style: Any) -> None:
    """Points (x, mean, deviation, seeds), with bars where there are three seeds or more."""
    style |= {"color": f"C{number}", "marker": "o", "capsize": 3}
    bars = [deviation if seeds >= 3 else math.nan for _, _, deviation, seeds in points]
    axis.errorbar([p[0] for p in points], [p[1] for p in points], bars or None, **style)
