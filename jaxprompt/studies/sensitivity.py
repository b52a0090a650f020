"""How much a score depends on each choice: length, start, rate, seed, template and label words.

Each choice has three levels. 27 of the 729 combinations are trained, in one population: those of an
orthogonal array, in which each pair of levels of two choices is there three times. The components
of variance say which choice moves the score how much.
"""

import itertools
import shutil
import statistics
import string
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxprompt.api import open_session
from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.config.values import Values
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.evaluation.statistics_components import (
    REST,
    Component,
    components,
    orthogonal_array,
)
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.studies.baselines import TEMPLATES, Record
from jaxprompt.studies.continual_parts import rows_to_test, scores
from jaxprompt.studies.runs import PassWarnings, Run, Settings, Suite, of_method, run_config
from jaxprompt.studies.study import Records, StudyPlan, Table, Variant, score
from jaxprompt.studies.tables import NOTHING, mean_and_spread
from jaxprompt.studies.tasks import relabelled
from jaxprompt.training.loop import train

METHOD = "sensitivity"
LEVELS = 3
LETTERS = string.ascii_uppercase
# in the order of the keys of the population; template and words make one task
AXES = ("template", "label words", "length", "start", "learning rate", "seed")
INITS = ("uniform", "sampled_vocabulary", "class_labels")
SHORT: Settings = {"train.steps": 150, "train.batch_size": 8, "train.max_eval_examples": 150}
SYNONYMS = {
    "supersense": ("thing", "human", "creature", "flora", "meal", "location"),
    "spam": ("good", "junk"),
    "sentiment": ("bad", "good"),
}


class Combination(NamedTuple):
    """A level of each axis, by number from 0."""

    template: int
    words: int
    length: int
    start: int
    rate: int
    seed: int

    @property
    def number(self) -> int:
        """Its place in the full population."""
        return int(np.ravel_multi_index(self, (LEVELS,) * len(AXES)))

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


def design() -> list[Combination]:
    """The combinations that are trained, in the order of the population."""
    return sorted(Combination(*map(int, row)) for row in orthogonal_array(len(AXES)))


def lengths(plan: StudyPlan) -> list[int]:
    """A quarter of the plan's length, the length, and twice as many."""
    return [max(1, plan.length // 4), max(2, plan.length), max(3, 2 * plan.length)]


RATES = (0.1, 0.3, 1.0)  # 0.3 is the paper's


def templates_of(task: TaskConfig) -> list[str]:
    """The task's own template and two paraphrases: hand-written ones, else with words around it."""
    known = [t for t in TEMPLATES.get(task.name, "").split(" | ") if t and "<>" not in t]
    around = [f"text: {task.template}", f"{task.template} answer:"]
    return list(dict.fromkeys([task.template, *known, *around]))[:LEVELS]


def words_of(task: TaskConfig) -> list[list[str]]:
    """The task's own label words, other words for them, and letters."""
    labels = task.labels or []
    others = list(SYNONYMS.get(task.name, ()))
    if len(others) != len(labels):
        others = [f"class {label}" for label in labels]
    return [labels, others, [*LETTERS[: len(labels)]]]


def formulations(task: TaskConfig) -> list[TaskConfig]:
    """The task with each template and all label words, in the order of the axes."""
    found = []
    pairs = itertools.product(enumerate(templates_of(task)), enumerate(words_of(task)))
    for (template, text), (number, words) in pairs:
        named = relabelled(task, task.model_copy(update={"labels": words}))
        changed: Values = {"name": f"{task.name}-t{template}-w{number}", "template": text}
        if number:  # these name the task's own label words
            changed |= {"class_labels": None, "verbalizer": None, "label_prior": None}
        found.append(resolve_task(named.model_copy(update=changed).model_dump()))
    return found


def check(plan: StudyPlan) -> None:
    """Refuse a plan whose tasks have no label words to change, or another number of seeds."""
    if plan.seeds != LEVELS:
        raise UserError(
            f"The study 'sensitivity' has {LEVELS} levels of each choice, seeds too; leave --seeds "
            f"{plan.seeds} out."
        )
    for name, task in plan.tasks.items():
        if not 2 <= len(task.labels or []) <= len(LETTERS):
            raise UserError(
                f"Task {name!r} has {len(task.labels or [])} labels; the study 'sensitivity' needs "
                f"tasks with 2 to {len(LETTERS)}."
            )


def level_names(plan: StudyPlan, task: TaskConfig) -> dict[str, list[str]]:
    """The levels of each axis as text."""
    return {
        "template": templates_of(task),
        "label words": [", ".join(words) for words in words_of(task)],
        "length": [f"{n} vectors" for n in lengths(plan)],
        "start": [init.replace("_", " ") for init in INITS],
        "learning rate": [f"rate {rate:g}" for rate in RATES],
        "seed": [f"seed {seed}" for seed in range(LEVELS)],
    }


def runs_of(plan: StudyPlan, task: str) -> list[Run]:
    """A run for each combination, which are all trained together."""
    settings = dict(SHORT) if plan.recipe == "miniature" else {}
    settings |= of_method(plan.settings, "prompt") | {"lengths": lengths(plan)}
    name = next(iter(plan.backbones))
    return [
        Run(name, task, METHOD, lengths(plan)[one.length], one.seed, one.name, settings)
        for one in design()
    ]


def variants(plan: StudyPlan) -> list[Variant]:
    """A group for each task and axis, with a line for each level."""
    found = []
    for task, config in plan.tasks.items():
        runs = runs_of(plan, task)
        for axis, (name, levels) in enumerate(level_names(plan, config).items()):
            for level, label in enumerate(levels):
                own = [run for run, one in zip(runs, design(), strict=True) if one[axis] == level]
                found.append(Variant(label, f"{task}: {name}", own, judged=False))
    return found


# ---- measuring


def population_config(run: Run, suite: Suite) -> RunConfig:
    """The config of the one run that trains all combinations."""
    lengths: list[int] = run.settings["lengths"]
    folder = suite.folder(run).parent / f"{METHOD}-P{'-'.join(map(str, lengths))}"
    settings = {key: value for key, value in run.settings.items() if "." in key}
    # one config, whichever combination asks for it
    base = run._replace(method="prompt", seed=0, length=lengths[1], settings=settings)
    task = suite.tasks[run.task]
    config = run_config(base, suite.recipe, task, suite.backbones[run.backbone], folder)
    values: Values = config.model_dump()
    # test rows are answered at the end
    tasks = [one.model_dump() | {"test": None} for one in formulations(task)]
    values["task"] = tasks[0]["name"]
    values["prompt"]["population"] = {
        "task": tasks,
        "length": lengths,
        "init": [*INITS],
        "learning_rate": [*RATES],
        "seed": [*range(LEVELS)],
    }
    values["prompt"]["population_members"] = [one.number for one in design()]
    return parse(RunConfig, values)


def measure(run: Run, suite: Suite, backbone: Backbone) -> Record:
    """The record of a combination: the first one that is measured trains all."""
    config = population_config(run, suite)
    result = train(config, PassWarnings(suite.say))
    names = [one.name for one in design()]
    number = names.index(run.variant or "")
    folder = Path(config.output) / "population" / str(number) / "prompt"
    one = design()[number]
    task = formulations(suite.tasks[run.task])[one.template * LEVELS + one.words]
    [accuracy] = scores(open_session(load_prompt(folder), backbone), [task])
    shutil.rmtree(Path(config.output) / "checkpoints", ignore_errors=True)
    return {
        "validation": result["population"][number]["value"],
        "test": accuracy,
        "test_rows": len(rows_to_test(task)),
        "steps": result["steps"],
        "levels": dict(zip(AXES, one, strict=True)),
    }


# ---- the report


def found_components(
    plan: StudyPlan, records: Records, task: str
) -> tuple[np.ndarray, dict[str, Component]] | None:
    """The scores in the order of the design and their components; None before all are there."""
    values = [score(records[run.key]) for run in runs_of(plan, task) if run.key in records]
    known = [value for value in values if value is not None]
    if len(known) < len(design()):
        return None
    levels = {axis: np.array([one[place] for one in design()]) for place, axis in enumerate(AXES)}
    return np.array(known), components(np.array(known), levels)


def of_level(values: np.ndarray, place: int, level: int) -> list[float]:
    """The scores of one level of one axis."""
    return [float(v) for v, one in zip(values, design(), strict=True) if one[place] == level]


def tables(plan: StudyPlan, records: Records) -> list[tuple[str, Table]]:
    """The components of each task, and the mean of each level."""
    found = []
    for task, config in plan.tasks.items():
        known = found_components(plan, records, task)
        if known is None:
            continue
        values, parts = known
        lines = [["", "standard deviation", "95%", "share of variance", "p"]]
        for name, one in sorted(parts.items(), key=lambda item: -item[1].variance):
            ends = " to ".join(f"{end**0.5:.3f}" for end in one.interval)
            p = NOTHING if one.p is None else f"{one.p:.2g}"
            lines.append([name, f"{one.variance**0.5:.3f}", ends, f"{one.share:.0%}", p])
        found.append((f"{task}: components", lines))
        levels = [["axis", "level", "score, mean ± spread"]]
        for place, (axis, names) in enumerate(level_names(plan, config).items()):
            for level, name in enumerate(names):
                levels.append([axis, name, mean_and_spread(of_level(values, place, level))])
        found.append((f"{task}: scores by level", levels))
    return found


def summary(plan: StudyPlan, records: Records) -> list[str]:
    """What moves the score most."""
    sentences = []
    for task in plan.tasks:
        known = found_components(plan, records, task)
        if known is not None:
            values, parts = known
            clear = [n for n, one in parts.items() if one.p is not None and one.p < 0.05]
            axes = {n: one for n, one in parts.items() if n != REST}
            most = max(axes, key=lambda name: axes[name].variance)
            spread = statistics.stdev(values.tolist())
            sentences.append(
                f"{task}: scores are from {values.min():.3f} to {values.max():.3f} (standard "
                f"deviation {spread:.3f}). The largest component is {most} "
                f"({axes[most].share:.0%} of the variance). Above the rest with p < 0.05: "
                f"{', '.join(clear) or 'none'}."
            )
    return sentences


def notes(plan: StudyPlan) -> list[str]:
    """How the figures are to be read."""
    return [
        f"{len(design())} of {LEVELS ** len(AXES)} combinations are trained in one population, an "
        "orthogonal array: each two levels of two axes meet three times. A component is (mean "
        "square of the axis - mean square of the rest) / 9, a variance of effects; the rest is "
        "noise and interactions. Interactions of two axes may also be taken for an effect of a "
        "third one. Three levels make intervals wide: they speak of other levels than these. p is "
        "of the F test, with Holm's correction. Scores are the accuracy on up to 300 test rows.",
    ]


def draw(plan: StudyPlan, records: Records, path: Path) -> Path | None:
    """Components as bars, and each score by the levels of each axis."""
    from matplotlib.figure import Figure

    found = {task: found_components(plan, records, task) for task in plan.tasks}
    complete = {task: known for task, known in found.items() if known is not None}
    if not complete:
        return None
    figure = Figure(figsize=(13, 4.8 * len(complete)), layout="constrained")
    panels = figure.subplots(len(complete), 2, squeeze=False, width_ratios=(1, 2.2))
    for (bars, strips), (task, (values, parts)) in zip(panels, complete.items(), strict=True):
        _bars(bars, task, parts)
        _strips(strips, level_names(plan, plan.tasks[task]), values)
    figure.savefig(path, dpi=120)
    return path


def _bars(axis, task: str, parts: dict[str, Component]) -> None:  # noqa: ANN001
    names = sorted(parts, key=lambda name: -parts[name].variance)
    deviations = np.array([parts[name].variance ** 0.5 for name in names])
    ends = np.array([parts[name].interval for name in names]).T ** 0.5
    reach = np.maximum(np.stack([deviations - ends[0], ends[1] - deviations]), 0.0)
    colours = ["gray" if name == REST else "C0" for name in names]
    axis.barh(range(len(names)), deviations, xerr=reach, color=colours, capsize=3)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    # with three levels an interval has no useful upper end
    axis.set_xlim(0, 3 * max(deviations.max(), 1e-6))
    axis.set(title=f"{task}: components", xlabel="standard deviation of effects, with 95% interval")


def _strips(axis, names: dict[str, list[str]], values: np.ndarray) -> None:  # noqa: ANN001
    ticks: list[tuple[float, str]] = []
    for place, (name, levels) in enumerate(names.items()):
        for level, label in enumerate(levels):
            own = of_level(values, place, level)
            x = place * (LEVELS + 1) + level
            axis.plot(_spread(x, own), own, "o", color=f"C{place}", alpha=0.6, markersize=4)
            axis.hlines(statistics.mean(own), x - 0.35, x + 0.35, color="black")
            ticks.append((x, label if len(label) < 26 else f"{label[:23]}..."))
        axis.text(place * (LEVELS + 1) + 1, 1.01, name, ha="center",
                  transform=axis.get_xaxis_transform())  # fmt: skip
    axis.set_xticks([x for x, _ in ticks], [text for _, text in ticks], rotation=90, fontsize=7)
    axis.set(ylabel="accuracy")


def _spread(x: float, own: Sequence[float]) -> list[float]:
    return [x + 0.3 * (number / max(len(own) - 1, 1) - 0.5) for number in range(len(own))]
