"""The page of a comparison: verdicts, tables, rows of disagreement, accuracy against tokens."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxprompt.config.errors import UserError
from jaxprompt.evaluation.statistics import POWER
from jaxprompt.runtime.files import write_atomically
from jaxprompt.runtime.json_file import read_json
from jaxprompt.studies.compare import (
    Arm,
    Compared,
    Pair,
    disagreements,
    frontier,
    interval_text,
    p_text,
)
from jaxprompt.studies.report import Section, to_html, to_markdown
from jaxprompt.studies.study import Table, seeds_text
from jaxprompt.studies.tables import NOTHING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "A comparison of prompts"
SHOWN_ROWS = 10  # of those on which arms disagree
MOST_PAIRS = 15  # in the figure
WIDEST = 100  # characters of a text in a table


def check_folder(out: Path) -> None:
    """Refuse a directory for the report that holds something else, before any work is done."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{str(out)!r} is a file; name a directory with --output.")
    if (out / "report.md").exists():
        try:
            ours = "pairs" in read_json(out / "report.json")
        except UserError:
            ours = False
        if not ours:
            raise UserError(
                f"{str(out)!r} holds another report, which would be lost; choose another --output."
            )


def write_comparison(out: Path, compared: Compared) -> Path:
    """Write report.md, .html and .json, and figures/compare.png; the path of the HTML page."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    figure = out / "figures" / "compare.png"
    draw(compared, figure)
    sections = _sections(compared, figure)
    write_atomically(out / "report.md", to_markdown(sections, (), TITLE))
    write_atomically(out / "report.html", to_html(sections, (), TITLE))
    text = json.dumps(compared.to_json(), indent=1, ensure_ascii=False) + "\n"
    write_atomically(out / "report.json", text)
    return out / "report.html"


def _sections(compared: Compared, figure: Path) -> list[Section]:
    facts = "; ".join(f"{key}: {value}" for key, value in compared.facts.items())
    tables = [("Scores", arms_table(compared)), ("Pairs: a less b", pairs_table(compared.pairs))]
    rows = disagreements(compared.arms, SHOWN_ROWS)
    if rows:
        tables.append(
            (f"The first {len(rows)} rows on which they disagree", rows_table(compared, rows))
        )
    sentences = [pair.sentence() for pair in compared.pairs]
    return [
        Section("Verdicts", [f"{facts[:1].upper()}{facts[1:]}."], [], sentences, None),
        Section("Scores", methods(compared), tables, [], figure),
    ]


def methods(compared: Compared) -> list[str]:
    """How figures were found, in words."""
    rules, seeds = compared.rules, compared.arms[0].scores.shape[0]
    error = f"{1 - rules.level:.3g}"
    if rules.sequential:
        tests = (
            "Rows were answered in a random order until each pair was decided or no row was left. "
            "p and the intervals hold at every look together (a confidence sequence by betting)."
        )
    elif seeds == 1:
        tests = (
            "p is that of McNemar's exact test (of random sign flips where a row's score is not 0 "
            "or 1). Intervals are of a paired bootstrap over rows. They say nothing of other seeds."
        )
    else:
        tests = (
            f"{seeds_text(seeds)} each. p and the intervals are of a two-level bootstrap: rows are "
            "drawn again, and seeds vary as Student's t."
        )
        if seeds < 5:
            tests += " With so few seeds intervals are wide."
    found = [
        tests,
        f"p is corrected by Holm for {len(compared.pairs)} pairs: the chance of any false finding "
        f"is at most {error}. Intervals are of one pair alone, at {rules.level:.0%}.",
    ]
    powers = [pair.detectable for pair in compared.pairs if pair.detectable is not None]
    if powers:
        found.append(
            f"Power: with these rows a true difference of {min(powers):.3f} to {max(powers):.3f}, "
            f"by pair, is found with a probability of {POWER:.0%}. A smaller one is likely missed, "
            'so "cannot be told apart" does not mean equal.'
        )
    return found


def arms_table(compared: Compared) -> Table:
    """A line for each arm, the best first."""
    arms = sorted(compared.arms, key=lambda arm: -arm.score)
    best = arms[0]
    table = [["", "score", "interval", "range of seeds", "less the best", "p (Holm)", "wins",
              "losses", "tokens a row", "rows", "note"]]  # fmt: skip
    for arm in arms:
        interval, by_seed = arm.interval(compared.rules.level), arm.scores.mean(axis=1)
        several = len(by_seed) > 1
        line = [arm.name, f"{arm.score:.4f}", f"{interval.low:.3f} to {interval.high:.3f}",
                f"{by_seed.min():.3f} to {by_seed.max():.3f}" if several else NOTHING]  # fmt: skip
        line += _against(arm, best, compared.pairs)
        table.append([*line, f"{arm.tokens:.1f}", str(arm.scores.shape[1]), arm.note])
    empty = [i for i, cells in enumerate(zip(*table[1:], strict=True)) if {*cells} <= {NOTHING, ""}]
    return [[cell for i, cell in enumerate(line) if i not in empty] for line in table]


def _against(arm: Arm, best: Arm, pairs: Sequence[Pair]) -> list[str]:
    """Difference, p, wins and losses of an arm against the best one."""
    for pair in pairs:
        if {pair.a, pair.b} == {arm.name, best.name}:
            sign = 1 if pair.a == arm.name else -1
            counts = (pair.wins, pair.losses)[::sign]
            return [f"{sign * pair.difference:+.4f}", p_text(pair.p), *map(str, counts)]
    return [NOTHING] * 4


def pairs_table(pairs: Sequence[Pair]) -> Table:
    """A line for each pair."""
    table = [["a", "b", "difference", "interval", "p", "p (Holm)", "found with 80%", "verdict"]]
    for pair in pairs:
        power = NOTHING if pair.detectable is None else f"{pair.detectable:.3f}"
        table.append([pair.a, pair.b, f"{pair.difference:+.4f}", interval_text(pair.interval),
                      p_text(pair.raw_p), p_text(pair.p), power, pair.verdict()])  # fmt: skip
    return table


def rows_table(compared: Compared, rows: Sequence[int]) -> Table:
    """What each arm answered to these rows."""
    table = [["row", "text", "right answer", *(arm.name for arm in compared.arms)]]
    for row in rows:
        text = textwrap.shorten(compared.texts[row], WIDEST, placeholder=" ...")
        answers = [textwrap.shorten(arm.answers[row], WIDEST) for arm in compared.arms]
        table.append([str(compared.rows[row] + 1), text, compared.references[row], *answers])
    return table


# ---- figure


def draw(compared: Compared, path: Path) -> None:
    """Score against tokens with Pareto's front, and the differences of pairs with intervals."""
    from matplotlib.figure import Figure

    shown = compared.pairs[:MOST_PAIRS]
    figure = Figure(figsize=(13, max(4.0, 1.5 + 0.42 * len(shown))), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_front(left, compared)
    _draw_differences(right, shown, compared.rules.margin)
    figure.savefig(path, dpi=120)


def _draw_front(axis: "Axes", compared: Compared) -> None:
    for number, arm in enumerate(compared.arms):
        low, high = arm.interval(compared.rules.level)
        error = [[max(arm.score - low, 0)], [max(high - arm.score, 0)]]
        axis.errorbar(
            [arm.tokens], [arm.score], error, fmt="os^Dvp"[number % 6], capsize=3, alpha=0.8,
            color=f"C{number % 10}", label=_label(arm.name, 40),
        )  # fmt: skip
    front = frontier(compared.arms)
    if len(front) > 1:
        axis.plot(
            [arm.tokens for arm in front], [arm.score for arm in front], ":", color="gray",
            zorder=0, label="none is better with as few tokens",
        )  # fmt: skip
    axis.set(
        xlabel="tokens of an input, with virtual tokens (mean)", ylabel=compared.facts["metric"]
    )
    axis.set_title(f"Score and cost; bars: {compared.rules.level:.0%} intervals", fontsize="medium")
    axis.margins(0.15)
    axis.legend(fontsize="small")


def _draw_differences(axis: "Axes", pairs: Sequence[Pair], margin: float | None) -> None:
    for number, pair in enumerate(pairs):
        decided = bool(pair.better)
        error = [[max(pair.difference - pair.interval.low, 0)],
                 [max(pair.interval.high - pair.difference, 0)]]  # fmt: skip
        axis.errorbar(
            [pair.difference], [number], xerr=error, fmt="o", capsize=3,
            color="C0" if decided else "gray",
        )  # fmt: skip
    axis.axvline(0, color="black", linewidth=1)
    for edge in (-margin, margin) if margin is not None else ():
        axis.axvline(edge, color="gray", linestyle="--", linewidth=1)
    names = [f"{_label(pair.a, 24)}\nless {_label(pair.b, 24)}" for pair in pairs]
    axis.set_yticks(range(len(pairs)), names, fontsize="small")
    axis.set_ylim(len(pairs) - 0.5, -0.5)
    axis.set_xlabel("difference of scores")
    axis.set_title("Pairs; gray: cannot be told apart", fontsize="medium")


def _label(name: str, width: int) -> str:
    """A name in a figure: of a long one the end, where paths differ; no formula."""
    short = name if len(name) <= width else f"...{name[3 - width :]}"
    return short.replace("$", r"\$")
