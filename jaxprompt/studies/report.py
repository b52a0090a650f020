"""The report of studies: tables, figures, and whether the paper's findings hold; Markdown and HTML.

Everything in it comes from OUT/cells.jsonl and OUT/plans; nothing is run.
"""

import base64
import html
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxprompt.config.errors import UserError
from jaxprompt.config.validation import parse
from jaxprompt.models.checkpoints.hf_t5 import read_json
from jaxprompt.runtime.files import write_atomically
from jaxprompt.runtime.markdown import plain
from jaxprompt.studies.catalogue import STUDIES
from jaxprompt.studies.cells import Key, read_records
from jaxprompt.studies.plan import FULL, Arm, Plan, Study, score

Table = list[list[str]]


class Section(NamedTuple):
    """A study in the report."""

    title: str
    paragraphs: list[str]
    tables: list[tuple[str, Table]]  # with captions
    findings: list[str]
    figure: Path | None


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds as text."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def write_report(out: Path) -> Path:
    """Write OUT/report.md, OUT/report.html and OUT/figures; the path of the HTML page."""
    files = [out / "plans" / f"{name}.json" for name in STUDIES]
    plans = [parse(Plan, read_json(file)) for file in files if file.is_file()]
    if not plans:
        raise UserError(f"No study was begun in {str(out)!r}; run `jaxprompt reproduce STUDY`.")
    found = read_records(out)
    (out / "figures").mkdir(exist_ok=True)
    sections = [section(plan, found, out / "figures") for plan in plans]
    missing = [name for name in STUDIES if name not in {plan.study for plan in plans}]
    write_atomically(out / "report.md", to_markdown(sections, missing))
    write_atomically(out / "report.html", to_html(sections, missing))
    return out / "report.html"


def section(plan: Plan, found: dict[Key, dict[str, Any]], figures: Path) -> Section:
    """What a study came to so far."""
    study = STUDIES[plan.study]
    arms = study.arms(plan)
    cells = {cell.key for arm in arms for cell in arm.cells}
    done = len(cells & set(found))
    settings = ", ".join(f"{key}={value}" for key, value in plan.settings.items())
    told = [
        f"Paper: {study.paper}",
        f"Here: {', '.join(f'{n} ({p})' for n, p in plan.backbones.items())}; recipe {plan.recipe}"
        f"{f' with {settings}' if settings else ''}; prompts of {plan.length} vectors unless said "
        f"otherwise; {plan.seeds} seeds; test rows where a task has any.",
    ]
    if done < len(cells):
        told.append(f"Not complete: {done} of {len(cells)} runs are there.")
    groups = list(dict.fromkeys(arm.group for arm in arms))
    by_group = {group: [arm for arm in arms if arm.group == group] for group in groups}
    tables = [(group, table(inside, found)) for group, inside in by_group.items()]
    figure = draw(study, by_group, found, figures / f"{plan.study}.png")
    claims = findings(study, by_group, found)
    claims += study.summary(plan, found)
    return Section(study.title, told, tables, claims, figure)


def findings(study: Study, by_group: dict[str, list[Arm]], found) -> list[str]:
    """Each of the paper's findings, and what the runs of each group say of it."""
    told = []
    for group, arms in by_group.items():
        values = {arm.label: arm.values(found) for arm in arms if arm.judged}
        for claim in study.claims:
            if claim.left in values and claim.right in values:
                verdict = claim.verdict(values[claim.left], values[claim.right])
                told.append(f"{group}: {claim.finding}: {verdict}.")
    return told


def table(arms: list[Arm], found) -> Table:
    """A line for each arm: seeds, mean and spread, recovery where it can be told, the paper's."""
    full = next((arm.values(found) for arm in arms if arm.label == FULL), [])
    floor = next((r["majority_test"] if r.get("test") is not None else r["majority"]
                  for arm in arms for r in arm.records(found) if r.get("majority") is not None),
                 None)  # fmt: skip
    room = statistics.mean(full) - floor if full and floor is not None else 0.0
    papers = any(arm.paper is not None for arm in arms)
    trained = any(r.get("trainable_parameters") for arm in arms for r in arm.records(found))
    head = ["", "seeds", "score"] + ["trained parameters"] * trained
    head += ["recovery"] * (room > 0.01) + ["paper", "difference"] * papers
    lines = [head]
    for arm in arms:
        values, records = arm.values(found), arm.records(found)
        line = [arm.label, str(len(values)), mean_and_spread(values)]
        if trained:
            count = next((r.get("trainable_parameters") for r in records), None)
            line.append(f"{count:,}" if count else "0" if records else "–")
        if room > 0.01 and floor is not None:
            share = (statistics.mean(values) - floor) / room if values else math.nan
            line.append("–" if math.isnan(share) else f"{share:.0%}")
        if papers:
            line.append("–" if arm.paper is None else f"{arm.paper:.3f}")
            known = arm.paper is not None and values
            line.append(f"{statistics.mean(values) - arm.paper:+.3f}" if known else "–")  # type: ignore[operator]
        lines.append(line)
    if room > 0.01 and floor is not None:
        lines.append(["majority class", "", f"{floor:.3f}"] + [""] * (len(head) - 3))
    return lines


def draw(study: Study, by_group: dict[str, list[Arm]], found, path: Path) -> Path | None:
    """A panel for each group: lines where arms have a place on an axis, bars otherwise."""
    from matplotlib.figure import Figure

    by_group = {
        group: kept
        for group, arms in by_group.items()
        if (kept := [arm for arm in arms if arm.values(found)])
    }
    if not by_group:
        return None
    figure = Figure(figsize=(2 + 4.5 * len(by_group), 4.5), layout="constrained")
    for axis, (group, arms) in zip(
        figure.subplots(1, len(by_group), squeeze=False)[0], by_group.items(), strict=True
    ):
        placed = [arm for arm in arms if arm.x is not None]
        if placed:
            _lines(axis, placed, found)
            for arm in (arm for arm in arms if arm.x is None):
                level = statistics.mean(arm.values(found))
                axis.axhline(level, color="gray", linestyle="--", label=arm.label)
            axis.set(xlabel=study.axis, ylabel=_metric(placed, found))
            axis.legend(fontsize="small")
        else:
            _bars(axis, arms, found)
            axis.set(xlabel=_metric(arms, found))
        axis.set_title(group, fontsize="medium")
    figure.savefig(path, dpi=120)
    return path


def _metric(arms: list[Arm], found) -> str:
    """What the values are: the tasks' metric, or nothing where they are something else."""
    names = {record["metric"] for arm in arms for record in arm.records(found)}
    return names.pop() if len(names) == 1 and all(arm.read is score for arm in arms) else ""


def _lines(axis: Any, arms: list[Arm], found) -> None:
    from matplotlib.ticker import NullLocator

    def place(arm: Arm) -> float:
        return arm.records(found)[0][arm.x] if isinstance(arm.x, str) else float(arm.x or 0.0)

    for number, series in enumerate(dict.fromkeys(arm.series for arm in arms)):
        points = sorted((place(arm), arm.values(found)) for arm in arms if arm.series == series)
        bars = [statistics.stdev(v) if len(v) > 1 else math.nan for _, v in points]
        axis.errorbar(
            [x for x, _ in points], [statistics.mean(v) for _, v in points], bars,
            color=f"C{number}", marker="o", capsize=3, label=series,
        )  # fmt: skip
    ticks = sorted({place(arm) for arm in arms})
    axis.set_xscale("symlog", linthresh=min((t for t in ticks if t > 0), default=1))
    names = [f"{t / 1e6:.3g}M" if t >= 1e6 else f"{t:,.0f}" for t in ticks]
    axis.set_xticks(ticks, names)
    axis.xaxis.set_minor_locator(NullLocator())


def _bars(axis: Any, arms: list[Arm], found) -> None:
    values = [arm.values(found) for arm in arms]
    spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    colours = ["gray" if arm.label == FULL else "C0" for arm in arms]
    middle = [statistics.mean(v) for v in values]
    axis.barh(range(len(arms)), middle, xerr=spread, color=colours, capsize=3)
    axis.set_yticks(range(len(arms)), [_wrapped(arm.label) for arm in arms], fontsize="small")
    axis.invert_yaxis()


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 30))


def to_markdown(sections: Sequence[Section], missing: Sequence[str]) -> str:
    """The report as Markdown; figures are beside it."""
    parts = ["# The Power of Scale for Parameter-Efficient Prompt Tuning, again\n"]
    for part in sections:
        parts.append(f"## {plain(part.title)}\n")
        parts += [f"{plain(text)}\n" for text in part.paragraphs]
        for caption, lines in part.tables:
            parts.append(f"**{plain(caption)}**\n")
            head, *rows = ["| " + " | ".join(map(plain, line)) + " |" for line in lines]
            rule = "| " + " | ".join(["---"] * len(lines[0])) + " |"
            parts.append("\n".join([head, rule, *rows]) + "\n")
        told = [f"- {plain(text)}" for text in part.findings]
        parts += ["\n".join(told) + "\n"] * bool(told)
        if part.figure is not None:
            parts.append(f"![{plain(part.title)}](figures/{part.figure.name})\n")
    if missing:
        parts.append(f"Not run: {', '.join(missing)}.\n")
    return "\n".join(parts)


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:#222}table{border-collapse:collapse;margin:.5rem 0 1rem}td,th{padding:.2rem .7rem;
border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}
caption{text-align:left;font-weight:600}img{max-width:100%}"""


def to_html(sections: Sequence[Section], missing: Sequence[str]) -> str:
    """The report as one page that holds its figures."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Prompt tuning, reproduced</title>",
        f"<style>{STYLE}</style>",
        "<h1>The Power of Scale for Parameter-Efficient Prompt Tuning, again</h1>",
    ]
    for part in sections:
        parts.append(f"<h2>{html.escape(part.title)}</h2>")
        parts += [f"<p>{html.escape(text)}</p>" for text in part.paragraphs]
        for caption, lines in part.tables:
            rows = [
                "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"
                for number, line in enumerate(lines)
                for tag in ("td" if number else "th",)
            ]
            parts.append(f"<table><caption>{html.escape(caption)}</caption>{''.join(rows)}</table>")
        if part.findings:
            told = "".join(f"<li>{html.escape(text)}</li>" for text in part.findings)
            parts.append(f"<ul>{told}</ul>")
        if part.figure is not None:
            data = base64.b64encode(part.figure.read_bytes()).decode()
            name = html.escape(part.title)
            parts.append(f'<img alt="{name}" src="data:image/png;base64,{data}">')
    if missing:
        parts.append(f"<p>Not run: {html.escape(', '.join(missing))}.</p>")
    return "\n".join(parts) + "</html>\n"


def save_plan(out: Path, plan: Plan) -> None:
    """Leave the plan for the report."""
    (out / "plans").mkdir(parents=True, exist_ok=True)
    values = json.dumps(plan.model_dump(), indent=2, ensure_ascii=False)
    write_atomically(out / "plans" / f"{plan.study}.json", values + "\n")
