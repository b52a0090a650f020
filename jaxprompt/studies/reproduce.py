"""Run or resume a study and write the report."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.paths import as_folder
from jaxprompt.config.schema import TaskConfig
from jaxprompt.evaluation.metrics import SUPERGLUE
from jaxprompt.runtime.lock import LOCK
from jaxprompt.studies.baselines import with_sentinel
from jaxprompt.studies.catalogue import STUDIES
from jaxprompt.studies.cells import Bench, run_cells
from jaxprompt.studies.plan import Plan, check_recipe, mixture, read_task, relabelled
from jaxprompt.studies.report import save_plan, write_report

# what a backbone was before its LM adaptation, where we know
SPANS = {"builtin": "builtin-span", "builtin-small": "builtin-small-span"}
# the paper's tasks; on built-in backbones, which know little, a built-in one
TASKS = {
    "transfer": ("qqp", "mrpc"),
    "shift": ("squad", *(f"mrqa_{name}" for name in (
        "textbook_qa", "bio_asq", "race", "relation_extraction", "duo_rc", "drop"))),
}  # fmt: skip


MOST_SEEDS = 1000  # runs of each arm of a study


def make_plan(
    study: str,
    *,
    backbones: dict[str, str],
    tasks: Sequence[str] = (),
    seeds: int | None = None,
    length: int | None = None,
    recipe: str | None = None,
    settings: dict[str, Any] | None = None,
    span: str | None = None,
    adapted: dict[str, int] | None = None,
) -> Plan:
    """A study's plan with defaults: the miniature recipe for built-in backbones, else the paper's.

    Raises a UserError for what the study cannot do without.
    """
    if study not in STUDIES:
        raise UserError(f"There is no study {study!r}; there are {', '.join(STUDIES)} and all.")
    if seeds is not None and not 0 < seeds <= MOST_SEEDS:
        raise UserError(f"--seeds is {seeds}; give a number from 1 to {MOST_SEEDS}.")
    small = all(path.startswith("builtin") for path in backbones.values())
    recipe = recipe or ("miniature" if small else "paper")
    check_recipe(recipe)
    first = next(iter(backbones.values()))
    if not tasks:
        tasks = ("supersense",) if small else TASKS.get(study, SUPERGLUE)
    plan = Plan(
        study=study,
        backbones=backbones,
        tasks={task.name: task for task in map(read_task, tasks)},
        seeds=seeds or (5 if study == "ensemble" else 3),
        length=length or (20 if recipe == "miniature" else 100),
        recipe=recipe,
        settings=settings or {},
        span=span or SPANS.get(first),
        adapted=adapted or {},
    )
    for what, names in {"backbone": plan.backbones, "task": plan.tasks}.items():
        for name in names:  # each has a folder in the output
            as_folder(name, what)
    needs = STUDIES[study].needs
    if needs and "--adapted" in needs and not plan.adapted:
        raise UserError(f"The study {study!r} needs {needs}.")
    if needs and "two --task" in needs and len(plan.tasks) < 2:
        raise UserError(f"The study {study!r} needs {needs}; it has {', '.join(plan.tasks)}.")
    unknown = sorted(set(plan.adapted) - set(backbones))
    if unknown:
        raise UserError(
            f"--adapted names {unknown[0]!r}; among --backbone are {', '.join(backbones)}."
        )
    if study in ("transfer", "shift"):  # refused before anything runs
        also_judged_on(plan)
    if study == "objective":
        if plan.span is None:
            raise UserError(f"The study 'objective' needs --span: {first} before LM adaptation.")
        plan.backbones["span"] = plan.span
        with_them = {f"{name}+sentinel": with_sentinel(task) for name, task in plan.tasks.items()}
        plan.tasks |= with_them
    return plan


def also_judged_on(plan: Plan) -> dict[str, Sequence[TaskConfig]]:
    """For each task the others, in its label words."""
    return {
        name: [relabelled(t, source) for n, t in plan.tasks.items() if n != name]
        for name, source in plan.tasks.items()
    }


def check_folder(out: Path) -> None:
    """Refuse a folder of other things, whose ``report.md`` or ``figures`` would be replaced."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{shown(str(out))} is a file; name a directory with --output.")
    names = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if names - {LOCK} and not names & {"plans", "cells.jsonl"}:
        raise UserError(
            f"{shown(str(out))} holds other things ({shown(sorted(names)[:3])}) and no study; name "
            "a new directory with --output."
        )


def reproduce(plan: Plan, out: Path, say: Callable[[str], None]) -> tuple[Path, int]:
    """Run what is missing of a study; the report's page and the number of runs that failed.

    Raises a UserError where ``out`` holds other things than studies.
    """
    check_folder(out)
    also: dict[str, Sequence[TaskConfig]] = {}
    if plan.study in ("transfer", "shift"):
        also = also_judged_on(plan)
    if plan.study == "scale" and len(plan.tasks) > 1 and "multitask" not in plan.tasks:
        folder = (out / "mixtures" / "-".join(plan.tasks)).absolute()
        plan.tasks["multitask"], also["multitask"] = mixture(list(plan.tasks.values()), folder)
    arms = STUDIES[plan.study].arms(plan)
    cells = list({cell.key: cell for arm in arms for cell in arm.cells}.values())
    # what is complete at any time is a table of fewer seeds; ensembles come last
    cells.sort(key=lambda cell: (cell.method == "ensemble", cell.seed or 0))
    inspected = plan.study == "interpretability"
    ensembled = plan.study == "ensemble"
    kept = {c.key for c in cells if c.method == "prompt"} if inspected or ensembled else set()
    bench = Bench(
        out, plan.backbones, plan.tasks, plan.recipe, also=also, keep=frozenset(kept), say=say,
        illegal_rows=min(300, plan.settings.get("train.max_eval_examples") or 300),
    )  # fmt: skip
    save_plan(out, plan)
    failed = run_cells(cells, bench)
    return write_report(out), failed
