"""Few rows: which way to learn wins with 4, 8, 16, 32 and 64 rows of each class.

The target is the first of the tasks, or of the parts with two labels each that a task of many
labels is split into. The others are the sources of what is tuned beforehand. As many rows again
choose templates and checkpoints: who has few rows has few of those, too (Perez et al. 2021, arXiv
2105.11447).
"""

from collections import Counter

from jaxprompt.api import open_session
from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.schema import FewShotConfig, TaskConfig
from jaxprompt.data.tasks.splits import load_rows
from jaxprompt.data.templates import to_text
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.studies import method_runs, methods
from jaxprompt.studies.baselines import Record, Shots, hard_prompt, quality, with_shots
from jaxprompt.studies.continual_parts import number_of_parts, tasks_in
from jaxprompt.studies.few_shot_starts import PPT, REPTILE, SPOT, start_of
from jaxprompt.studies.methods import MODEL_TUNING
from jaxprompt.studies.runs import Run, Settings, Suite, of_method
from jaxprompt.studies.study import FULL, StudyPlan, Variant

PER_CLASS = (4, 8, 16, 32, 64)
HARD, CONTEXT, PROMPT, MPT, LORA = "hard", "in-context", "prompt-tuning", "mpt", "lora"
LABELS = {
    HARD: "hand-written prompt", CONTEXT: "examples in context",
    PROMPT: "prompt, from class labels", SPOT: "prompt, from other tasks (SPoT)",
    MPT: "prompt, from other tasks (MPT)", PPT: "prompt, from halves of texts (PPT)",
    REPTILE: "prompt, from Reptile", LORA: "LoRA", MODEL_TUNING: FULL,
}  # fmt: skip
# what each of the ways that train trains; and what some of them start from
TRAINED = {
    PROMPT: PROMPT, SPOT: PROMPT, MPT: "multitask-prompt-tuning", PPT: PROMPT, REPTILE: PROMPT,
    LORA: LORA, MODEL_TUNING: MODEL_TUNING,
}  # fmt: skip
STARTS = {SPOT: SPOT, MPT: SPOT, PPT: PPT, REPTILE: REPTILE}
FROM_OTHERS = (SPOT, MPT, REPTILE)
MOST_SHOTS = 16  # in context; the input grows with each
# of what is tuned beforehand
START: dict[str, Settings] = {
    "paper": {"train.steps": 2000, "train.batch_size": 32},
    "miniature": {
        "train.steps": 150, "train.batch_size": 16, "train.max_eval_examples": 100,
        "train.length_bucketing_window": 16,
    },
}  # fmt: skip
# ten times the usual one, the best of runs of this length (jaxprompt/methods/RESULTS.md)
RATE_OF_LORA = 4e-3


def chosen(plan: StudyPlan) -> list[str]:
    """The ways that are compared, in the order of the tables."""
    return [method for method in LABELS if not plan.methods or method in plan.methods]


def check(plan: StudyPlan) -> None:
    """Raise a UserError for a way that there is not, or where there is no task to learn from."""
    unknown = [method for method in plan.methods if method not in LABELS]
    if unknown:
        raise UserError(f"--method is {shown(unknown[0])}; 'few-shot' compares {listed(LABELS)}.")
    for name, task in plan.tasks.items():
        if not task.labels or task.group is not None:
            raise UserError(
                f"Task {name!r} has no labels, or rows that are judged in groups; 'few-shot' draws "
                "rows of each class."
            )
    needed = [method for method in chosen(plan) if method in FROM_OTHERS]
    if needed and sum(map(number_of_parts, plan.tasks.values())) < 2:
        raise UserError(
            f"{needed[0]!r} learns from other tasks; give a second --task, one with four labels or "
            "more, or other ways with --method."
        )


def runs_of(plan: StudyPlan, method: str, per_class: int) -> list[Run]:
    """A run for each seed, which draws the rows."""
    backbone, task = next(iter(plan.backbones)), next(iter(plan.tasks))
    settings: Settings = {"per_class": per_class}
    if method in TRAINED:
        settings |= _settings(plan, backbone, method, per_class)
    else:
        settings |= {k: v for k, v in of_method(plan.settings, "").items() if k in NUMERICS}
    variant = f"{method}-{per_class}"
    return [
        Run(backbone, task, method, plan.length, seed, variant, settings)
        for seed in range(plan.seeds)
    ]


NUMERICS = ("model.dtype", "model.quantization")


def _settings(plan: StudyPlan, backbone: str, method: str, per_class: int) -> Settings:
    """Those of few rows in the study of methods, at one learning rate."""
    # there are two classes or more; a smaller batch would repeat rows
    settings = methods.settings_of(plan, backbone, TRAINED[method], 2 * per_class)
    del settings["rows"]
    settings |= {"factors": [1.0], "extensions": 0}
    if method == LORA and plan.recipe == "miniature":
        settings = {"train.learning_rate": RATE_OF_LORA} | settings
    if method == PROMPT:
        settings |= {"prompt.init": "class_labels"}
    if method in STARTS:
        settings["start"] = START[plan.recipe] | of_method(plan.settings, "prompt")
    return settings


def variants(plan: StudyPlan) -> list[Variant]:
    """A line for each way and number of rows."""
    return [
        Variant(
            f"{LABELS[method]}, {count} of a class", next(iter(plan.tasks)),
            runs_of(plan, method, count), x=count, series=LABELS[method],
        )
        for method in chosen(plan)
        for count in plan.rows
    ]  # fmt: skip


def measure(run: Run, suite: Suite, backbone: Backbone) -> Record:
    """The record of one way, number of rows and seed."""
    tasks = tasks_in(suite, "few-shot-tasks")
    few = FewShotConfig(per_class=run.settings["per_class"], seed=run.seed or 0)
    target = tasks[0].model_copy(update={"few_shot": few})
    if run.method not in TRAINED:
        return _without_training(run, target, backbone)
    settings = {k: v for k, v in run.settings.items() if k not in ("per_class", "start")}
    if run.method in STARTS:
        start = run._replace(method="prompt", seed=0, settings=run.settings["start"])
        where = start_of(STARTS[run.method], start, suite, tasks)
        settings |= {"prompt.init": "file", "prompt.file": str(where)}
    own = run._replace(method=TRAINED[run.method], settings=settings)
    return method_runs.measure(own, suite._replace(tasks={run.task: target}), backbone)


def _without_training(run: Run, target: TaskConfig, backbone: Backbone) -> Record:
    """The best hand-written prompt, or the rows in front of it."""
    session = open_session(None, backbone)
    # templates are known by the name of the whole task
    task = target.model_copy(update={"name": run.task})
    few = load_rows(task, "validation")
    chosen, best = hard_prompt(session, task, {}, few)
    record: Record = {"template": chosen["template"], "steps": 0, "test": None}
    if run.method == CONTEXT:
        training = load_rows(task, "train")
        # in turn from each class, so as many as the rarest has that differ
        counts = Counter(answer for _, answer in {to_text(task, row) for row in training})
        shots = Shots(min(MOST_SHOTS, len(counts) * min(counts.values())))
        best = with_shots(best, training, shots, session.tokenizer)
        record["shots"] = shots.num_shots
    record["validation"] = quality(session, best, few)
    if task.test:
        record["test"] = quality(session, best, load_rows(task, "test"))
    return record
