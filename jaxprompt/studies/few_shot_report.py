"""Which way to learn from few rows wins where: the table, the verdicts and the figure."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxprompt.evaluation.statistics import LEVEL, Interval, holm
from jaxprompt.studies.few_shot import LABELS, chosen, runs_of
from jaxprompt.studies.study import Records, StudyPlan, Table, score, seeds_text
from jaxprompt.studies.tables import NOTHING

Scores = dict[int, float]  # by seed
ALPHA = 1 - LEVEL


def scores_of(plan: StudyPlan, records: Records, method: str, count: int) -> Scores:
    """The score of each seed that is complete."""
    runs = [run for run in runs_of(plan, method, count) if run.key in records]
    found = {run.seed or 0: score(records[run.key]) for run in runs}
    return {seed: value for seed, value in found.items() if value is not None}


def interval_of_mean(values: Sequence[float]) -> Interval:
    """Of the mean over seeds, by Student's t; of a score, so within 0 and 1.

    >>> interval_of_mean([0.5, 0.6, 0.7])
    Interval(low=0.3515862288484681, high=0.8484137711515318)
    """
    from scipy.special import stdtrit

    if len(values) < 2:
        return Interval(math.nan, math.nan)
    reach = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * _error(np.array(values))
    mean = statistics.mean(values)
    return Interval(max(mean - reach, 0.0), min(mean + reach, 1.0))


def paired_t(differences: Float[np.ndarray, " S"]) -> float:
    """The two-sided p of Student's paired t test; 1 where nothing differs.

    Ways with the same seed have learnt from the same rows, so they are compared seed by seed.
    """
    from scipy.special import stdtr

    if len(differences) < 2 or not differences.any():
        return 1.0
    error = _error(differences)
    if not error:
        return 0.0
    return 2 * float(stdtr(len(differences) - 1, -abs(differences.mean()) / error))


def _error(values: Float[np.ndarray, " S"]) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def tables(plan: StudyPlan, records: Records) -> list[tuple[str, Table]]:
    """A line for each way, a column for each number of rows: the mean and its interval."""
    lines = [["", *(f"{count} of a class" for count in plan.rows)]]
    for method in chosen(plan):
        cells = []
        for count in plan.rows:
            values = [*scores_of(plan, records, method, count).values()]
            low, high = interval_of_mean(values)
            reach = f" ({low:.3f} to {high:.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{reach}" if values else NOTHING)
        lines.append([LABELS[method], *cells])
    return [("Score on test rows, with the 95% interval over seeds", lines)]


def summary(plan: StudyPlan, records: Records) -> list[str]:
    """The best way at each number of rows, those that are worse, and those that may be as good."""
    sentences = []
    for count in plan.rows:
        found = {m: scores_of(plan, records, m, count) for m in chosen(plan)}
        known = {method: scores for method, scores in found.items() if scores}
        if len(known) < 2:
            continue
        best = max(known, key=lambda method: statistics.mean(known[method].values()))
        others = [method for method in known if method != best]
        p_values = holm([_p_between(known[best], known[method]) for method in others])
        pairs = [*zip(others, p_values, strict=True)]
        worse = [LABELS[method] for method, p in pairs if p < ALPHA]
        equal = [LABELS[method] for method, p in pairs if p >= ALPHA]
        sentences.append(
            f"{count} of a class: the best mean is that of: {LABELS[best]}, "
            f"{statistics.mean(known[best].values()):.3f}. Worse than it: "
            f"{'; '.join(worse) or 'none'}. Not told from it: {'; '.join(equal) or 'none'}."
        )
    return sentences + _left_out(plan, records)


def _p_between(one: Scores, other: Scores) -> float:
    both = sorted(one.keys() & other.keys())
    return paired_t(np.array([one[seed] - other[seed] for seed in both]))


def _left_out(plan: StudyPlan, records: Records) -> list[str]:
    reasons = {}
    for method in chosen(plan):
        for run in (run for count in plan.rows for run in runs_of(plan, method, count)):
            reason = records.get(run.key, {}).get("skipped")
            if reason:
                reasons[method] = reason
    return [f"{LABELS[method]} is left out: {reason}" for method, reason in reasons.items()]


def notes(plan: StudyPlan) -> list[str]:
    """How the figures are to be read."""
    return [
        "The target is the first task; one of four labels or more is split into tasks of two "
        "labels each, and the others are the sources. Each seed draws rows of its own, as many of "
        "each class, for training, and as many again to choose templates and checkpoints. All ways "
        "have the same rows. Each has one learning rate. Prompts that start from other tasks or "
        "from texts without answers were tuned on those once, with one seed. MPT starts from the "
        "prompt of SPoT, without distillation. PPT tells whether two halves belong to one text of "
        "the target. Verdicts: paired t tests over "
        f"{seeds_text(plan.seeds)}, with Holm's correction. They and the bands speak of other "
        "training rows and seeds, and of these test rows alone.",
    ]


def draw(plan: StudyPlan, records: Records, path: Path) -> Path | None:
    """A panel for each way: its mean with its band, over the means of all others in gray."""
    from matplotlib.figure import Figure

    curves = {
        method: {
            count: [*values.values()]
            for count in plan.rows
            if (values := scores_of(plan, records, method, count))
        }
        for method in chosen(plan)
    }
    curves = {method: curve for method, curve in curves.items() if curve}
    if not curves:
        return None
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(3.8 * columns, 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    for number, (axis, method) in enumerate(zip(panels, curves, strict=False)):
        for other, curve in curves.items():
            if other != method:
                means = [statistics.mean(values) for values in curve.values()]
                axis.plot([*curve], means, color="0.8", linewidth=1)
        own = curves[method]
        ends = np.array([interval_of_mean(values) for values in own.values()]).T
        axis.fill_between([*own], *ends, color=f"C{number}", alpha=0.2, linewidth=0)
        means = [statistics.mean(values) for values in own.values()]
        axis.plot([*own], means, "o-", color=f"C{number}")
        for count, values in own.items():
            axis.plot([count] * len(values), values, ".", color=f"C{number}", alpha=0.5)
        axis.set_xscale("log", base=2)
        axis.set_xticks(plan.rows, [str(count) for count in plan.rows])
        axis.set_title(LABELS[method], fontsize="medium")
    for axis in [*panels]:
        axis.set_visible(False)
    figure.supxlabel("training rows of each class")
    figure.supylabel(f"{plan.tasks[next(iter(plan.tasks))].metrics[0]}, 95% band over seeds")
    figure.savefig(path, dpi=120)
    return path
