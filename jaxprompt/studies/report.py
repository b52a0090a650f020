"""The report of studies: tables, figures, and whether the paper's findings hold; Markdown and HTML.

Everything in it comes from OUT/cells.jsonl and OUT/plans; nothing is run.
"""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxprompt.config.errors import UserError
from jaxprompt.config.validation import parse
from jaxprompt.runtime.files import write_atomically
from jaxprompt.runtime.json_file import read_json
from jaxprompt.runtime.markdown import markdown_table, plain
from jaxprompt.studies.catalogue import STUDIES
from jaxprompt.studies.figures import draw
from jaxprompt.studies.runs import read_records
from jaxprompt.studies.study import Records, Study, StudyPlan, Table, Variant, seeds_text
from jaxprompt.studies.tables import RECOVERY, RECOVERY_MEANS, table


class Section(NamedTuple):
    """A study in the report."""

    title: str
    paragraphs: list[str]
    tables: list[tuple[str, Table]]  # with captions
    findings: list[str]
    figure: Path | None


def write_report(out: Path) -> Path:
    """Write OUT/report.md, .html and .json, and OUT/figures; the path of the HTML page."""
    files = [out / "plans" / f"{name}.json" for name in STUDIES]
    plans = [parse(StudyPlan, read_json(file)) for file in files if file.is_file()]
    if not plans:
        raise UserError(f"No study was begun in {str(out)!r}; run `jaxprompt reproduce STUDY`.")
    records = read_records(out)
    (out / "figures").mkdir(exist_ok=True)
    sections = [section(plan, records, out / "figures") for plan in plans]
    missing = [name for name in STUDIES if name not in {plan.study for plan in plans}]
    write_atomically(out / "report.md", to_markdown(sections, missing))
    write_atomically(out / "report.html", to_html(sections, missing))
    write_atomically(out / "report.json", to_json(sections))
    return out / "report.html"


def section(plan: StudyPlan, records: Records, figures: Path) -> Section:
    """The results of a study so far. Draws its figure into ``figures``."""
    study = STUDIES[plan.study]
    variants = study.variants(plan)
    runs = {run.key for variant in variants for run in variant.runs}
    paragraphs = [f"{study.source}: {study.paper}", describe(plan), *study.notes(plan)]
    complete = len(runs & set(records))
    if complete < len(runs):
        paragraphs.append(f"Not complete: {complete} of {len(runs)} runs are there.")
    groups: dict[str, list[Variant]] = {}
    for variant in variants:
        groups.setdefault(variant.group, []).append(variant)
    if study.tables is None:
        tables = [(group, table(inside, records)) for group, inside in groups.items()]
    else:
        tables = study.tables(plan, records)
    if any(RECOVERY in lines[0] for _, lines in tables):
        paragraphs.append(RECOVERY_MEANS)
    path = figures / f"{plan.study}.png"
    own = study.draw
    if own:
        figure = own(plan, records, path)
    else:
        figure = draw(study, groups, records, path, study.panels(plan, records))
    results = findings(study, groups, records) + study.summary(plan, records)
    return Section(study.title, paragraphs, tables, results, figure)


def describe(plan: StudyPlan) -> str:
    """What was run: backbones, recipe, settings, prompt length, seeds."""
    paths = plan.backbones.items()
    backbones = ", ".join(name if name == path else f"{name} ({path})" for name, path in paths)
    settings = ", ".join(f"{key}={value}" for key, value in plan.settings.items())
    return (
        f"Here: {backbones}; recipe {plan.recipe}{f' with {settings}' if settings else ''}; "
        f"prompts of {plan.length} vectors unless said otherwise; {seeds_text(plan.seeds)}; "
        "test rows where a task has any."
    )


def findings(study: Study, groups: dict[str, list[Variant]], records: Records) -> list[str]:
    """Each of the paper's findings, and whether it holds in the runs of each group."""
    sentences = []
    for group, variants in groups.items():
        values = {variant.label: variant.values(records) for variant in variants if variant.judged}
        for hypothesis in study.hypotheses:
            if hypothesis.is_of(group, values):
                verdict = hypothesis.verdict(values[hypothesis.left], values[hypothesis.right])
                sentences.append(f"{group}: {hypothesis.finding}: {verdict}.")
    return sentences


TITLE = "The Power of Scale for Parameter-Efficient Prompt Tuning, reproduced"


def to_markdown(sections: Sequence[Section], missing: Sequence[str], title: str = TITLE) -> str:
    """The report as Markdown; figures are beside it."""
    parts = [f"# {title}\n"]
    for part in sections:
        parts.append(f"## {plain(part.title)}\n")
        parts += [f"{plain(text)}\n" for text in part.paragraphs]
        for caption, lines in part.tables:
            parts.append(f"**{plain(caption)}**\n")
            parts.append(markdown_table([list(map(plain, line)) for line in lines]) + "\n")
        if part.findings:
            parts.append("\n".join(f"- {plain(text)}" for text in part.findings) + "\n")
        if part.figure is not None:
            parts.append(f"![{plain(part.title)}](figures/{part.figure.name})\n")
    if missing:
        parts.append(f"Not run: {', '.join(missing)}.\n")
    return "\n".join(parts)


def to_json(sections: Sequence[Section]) -> str:
    """The tables and findings as JSON; ``cells.jsonl`` has all figures of all runs."""
    values = [
        {
            "title": part.title,
            "tables": {caption: lines for caption, lines in part.tables},
            "findings": part.findings,
        }
        for part in sections
    ]
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:#222}table{border-collapse:collapse;margin:.5rem 0 1rem}td,th{padding:.2rem .7rem;
border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}
caption{text-align:left;font-weight:600}img{max-width:100%}"""


def to_html(sections: Sequence[Section], missing: Sequence[str], title: str = TITLE) -> str:
    """The report as one page that holds its figures."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for part in sections:
        parts.append(f"<h2>{html.escape(part.title)}</h2>")
        parts += [f"<p>{html.escape(text)}</p>" for text in part.paragraphs]
        for caption, lines in part.tables:
            rows = [
                "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in line) + "</tr>"
                for number, line in enumerate(lines)
                for tag in ("td" if number else "th",)
            ]
            parts.append(f"<table><caption>{html.escape(caption)}</caption>{''.join(rows)}</table>")
        if part.findings:
            items = "".join(f"<li>{html.escape(text)}</li>" for text in part.findings)
            parts.append(f"<ul>{items}</ul>")
        if part.figure is not None:
            data = base64.b64encode(part.figure.read_bytes()).decode()
            name = html.escape(part.title)
            parts.append(f'<img alt="{name}" src="data:image/png;base64,{data}">')
    if missing:
        parts.append(f"<p>Not run: {html.escape(', '.join(missing))}.</p>")
    return "\n".join(parts) + "</html>\n"


def save_plan(out: Path, plan: StudyPlan) -> None:
    """Write the plan beside the results, for the report."""
    (out / "plans").mkdir(parents=True, exist_ok=True)
    values = json.dumps(plan.model_dump(), indent=2, ensure_ascii=False)
    write_atomically(out / "plans" / f"{plan.study}.json", values + "\n")
