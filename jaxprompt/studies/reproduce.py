"""Run or resume a study and write the report."""

from collections.abc import Callable, Sequence
from pathlib import Path

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.paths import as_folder
from jaxprompt.config.schema import TaskConfig
from jaxprompt.evaluation.metrics import SUPERGLUE
from jaxprompt.runtime.lock import LOCK
from jaxprompt.studies import dept, few_shot, users
from jaxprompt.studies.catalogue import STUDIES
from jaxprompt.studies.methods import FEW_ROWS
from jaxprompt.studies.options import StudyOptions, check_recipe, read_task
from jaxprompt.studies.report import save_plan, write_report
from jaxprompt.studies.runs import Suite, run_suite
from jaxprompt.studies.study import StudyPlan
from jaxprompt.studies.tasks import mixture, relabelled, with_sentinel

# what a backbone was before its LM adaptation, where we know
SPANS = {"builtin": "builtin-span", "builtin-small": "builtin-small-span"}
# the paper's tasks; on built-in backbones, which know little, a built-in one
TASKS = {
    "transfer": ("qqp", "mrpc"),
    "methods": ("supersense", "spam"),
    "continual": ("supersense", "spam"),
    "sensitivity": ("boolq", "rte"),
    "few-shot": ("rte", "boolq", "mrpc", "qqp"),
    "dept": tuple(dept.TASKS),
    "shift": ("squad", *(f"mrqa_{name}" for name in (
        "textbook_qa", "bio_asq", "race", "relation_extraction", "duo_rc", "drop"))),
}  # fmt: skip


COMPARING = ("methods", "dept", "few-shot")
# rows of studies of few rows; a number is of each class in few-shot
FEW = {"methods": FEW_ROWS, "few-shot": few_shot.PER_CLASS}
SEEDS = {"ensemble": 5, "few-shot": 5}  # of others 3
MOST_SEEDS = 1000  # runs of each variant of a study


def make_plan(study: str, options: StudyOptions) -> StudyPlan:
    """A study's plan with defaults: the miniature recipe for built-in backbones, else the paper's.

    Raises:
        UserError: something that the study needs is missing, or an option is wrong.
    """
    if study not in STUDIES:
        raise UserError(f"There is no study {study!r}; there are {', '.join(STUDIES)} and all.")
    if options.seeds is not None and not 0 < options.seeds <= MOST_SEEDS:
        raise UserError(f"--seeds is {options.seeds}; give a number from 1 to {MOST_SEEDS}.")
    paths = options.backbones.values()
    small = all(path.startswith("builtin") for path in paths)
    recipe = options.recipe or ("miniature" if small else "paper")
    check_recipe(recipe)
    first = next(iter(paths))
    tasks = options.tasks or (
        ("supersense",) if small and study != "continual" else TASKS.get(study, SUPERGLUE)
    )
    if study == "dept" and small:
        raise UserError(f"The study 'dept' needs {STUDIES[study].needs}.")
    plan = StudyPlan(
        study=study,
        backbones=options.backbones,
        tasks={task.name: task for task in map(read_task, tasks)},
        seeds=options.seeds or SEEDS.get(study, 3),
        length=options.length or (20 if recipe == "miniature" else 100),
        recipe=recipe,
        settings=dict(options.settings),
        span=options.span or SPANS.get(first),
        adapted=options.adapted,
        methods=list(options.methods),
        rows=list(FEW[study] if options.rows is None else options.rows) if study in FEW else [],
    )
    if study == "users":
        if options.tasks:
            raise UserError("The study 'users' has rows of its own; leave out --task.")
        plan.tasks = users.tasks()
    if study == "dept":
        plan.tasks = {name: dept.in_table(task) for name, task in plan.tasks.items()}
    _check_plan(plan)
    if study == "objective":
        if plan.span is None:
            raise UserError(f"The study 'objective' needs --span: {first} before LM adaptation.")
        plan.backbones["span"] = plan.span
        plan.tasks |= {f"{name}+sentinel": with_sentinel(t) for name, t in plan.tasks.items()}
    return plan


def _check_plan(plan: StudyPlan) -> None:
    """Refuse a plan that lacks something that its study needs, before anything runs."""
    for what, names in {"backbone": plan.backbones, "task": plan.tasks}.items():
        for name in names:  # each has a folder in the output
            as_folder(name, what)
    needs = STUDIES[plan.study].needs
    if needs and "--adapted" in needs and not plan.adapted:
        raise UserError(f"The study {plan.study!r} needs {needs}.")
    if needs and "two --task" in needs and len(plan.tasks) < 2:
        raise UserError(f"The study {plan.study!r} needs {needs}; it has {', '.join(plan.tasks)}.")
    unknown = sorted(set(plan.adapted) - set(plan.backbones))
    if unknown:
        names = ", ".join(plan.backbones)
        raise UserError(f"--adapted names {unknown[0]!r}; among --backbone are {names}.")
    if plan.study in ("transfer", "shift"):
        other_tasks(plan)
    if plan.methods and plan.study not in COMPARING:
        raise UserError(
            f"The study {plan.study!r} compares no methods of choice; leave out --method."
        )
    twice = [method for method in plan.methods if plan.methods.count(method) > 1]
    if twice:
        raise UserError(f"--method names {shown(twice[0])} twice; name each method once.")
    STUDIES[plan.study].check(plan)
    few = [rows for rows in plan.rows if rows < 1]
    if few:
        raise UserError(f"--rows is {few[0]}; give a number of training rows, 1 or more.")


def other_tasks(plan: StudyPlan) -> dict[str, Sequence[TaskConfig]]:
    """For each task, the other tasks in its label words.

    Raises:
        UserError: two tasks differ in the number of their labels.
    """
    return {
        name: [relabelled(t, source) for n, t in plan.tasks.items() if n != name]
        for name, source in plan.tasks.items()
    }


def check_folder(out: Path) -> None:
    """Refuse a folder that is no study's: its ``report.md`` or ``figures`` would be replaced."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{shown(str(out))} is a file; name a directory with --output.")
    names = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if names - {LOCK} and not names & {"plans", "cells.jsonl"}:
        raise UserError(
            f"{shown(str(out))} holds other things ({shown(sorted(names)[:3])}) and no study; name "
            "a new directory with --output."
        )


def reproduce(plan: StudyPlan, out: Path, say: Callable[[str], None]) -> tuple[Path, int]:
    """Run what is missing of a study, and write the report.

    Args:
        plan: what to run.
        out: the directory of the studies.
        say: prints a line of progress.

    Returns:
        The path of report.html and the number of runs that failed.

    Raises:
        UserError: ``out`` holds other things than studies.
    """
    check_folder(out)
    also_eval_on: dict[str, Sequence[TaskConfig]] = {}
    if plan.study in ("transfer", "shift"):
        also_eval_on = other_tasks(plan)
    if plan.study == "scale" and len(plan.tasks) > 1 and "multitask" not in plan.tasks:
        folder = (out / "mixtures" / "-".join(plan.tasks)).absolute()
        everything, parts = mixture(list(plan.tasks.values()), folder)
        plan.tasks["multitask"], also_eval_on["multitask"] = everything, parts
    variants = STUDIES[plan.study].variants(plan)
    runs = list({run.key: run for variant in variants for run in variant.runs}.values())
    # seed by seed, so that an interrupted study has a table of fewer seeds; ensembles come last
    runs.sort(key=lambda run: (run.method == "ensemble", run.seed or 0))
    needs_prompts = plan.study in ("interpretability", "ensemble")
    keep = frozenset(run.key for run in runs if run.method == "prompt" and needs_prompts)
    suite = Suite(
        out, plan.backbones, plan.tasks, plan.recipe, also_eval_on=also_eval_on, keep=keep, say=say,
        measure=STUDIES[plan.study].measure,
        illegal_rows=min(300, plan.settings.get("train.max_eval_examples") or 300),
    )  # fmt: skip
    save_plan(out, plan)
    failed = run_suite(runs, suite)
    return write_report(out), failed
