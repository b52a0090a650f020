"""The studies of Lester et al. (2021), and how small models can be helped.

Findings and numbers are the paper's (tables 1 to 4, figures 1 and 3, sections 3 to 7); where only a
figure shows a value, the direction alone is given.
"""

import itertools
from functools import partial

from jaxprompt.studies import (
    continual,
    dept,
    few_shot,
    few_shot_report,
    method_tables,
    methods,
    sensitivity,
    summaries,
    users,
)
from jaxprompt.studies.baselines import Record
from jaxprompt.studies.runs import Run, Settings
from jaxprompt.studies.study import (
    FULL,
    Hypothesis,
    Study,
    StudyPlan,
    Variant,
    fine_tuning,
    illegal,
    score,
)

LENGTHS = (1, 5, 20, 100, 150)


def _lengths(plan: StudyPlan) -> list[Variant]:
    return [
        variant
        for task in plan.tasks
        for variant in (
            *(Variant(f"P = {n}", task, plan.prompts(task, length=n), x=n) for n in LENGTHS),
            fine_tuning(plan, task),
        )
    ]


INITS: dict[str, Settings] = {
    "uniform": {"prompt__init": "uniform", "prompt__uniform": "paper"},
    "sampled vocabulary": {"prompt__init": "sampled_vocabulary"},
    "class labels": {"prompt__init": "class_labels"},
}


def _init_runs(plan: StudyPlan, task: str, init: str) -> list[Run]:
    usual = "class labels" if plan.length >= 20 else "sampled vocabulary"  # of any other study
    if init == usual:
        return plan.prompts(task)
    return plan.prompts(task, variant=init.replace(" ", "-"), **INITS[init])


def _inits(plan: StudyPlan) -> list[Variant]:
    return [
        variant
        for task in plan.tasks
        for variant in (
            *(Variant(init, task, _init_runs(plan, task, init)) for init in INITS),
            fine_tuning(plan, task),
        )
    ]


SPAN, SENTINEL, ADAPTED = (
    "span corruption", "span corruption, sentinel in the target", "LM-adapted"
)  # fmt: skip


def _objectives(plan: StudyPlan) -> list[Variant]:
    variants = []
    for task in (t for t in plan.tasks if not t.endswith("+sentinel")):
        on_span: Settings = {"backbone": "span"}
        runs = {
            SPAN: plan.prompts(task, **on_span),
            SENTINEL: plan.prompts(f"{task}+sentinel", **on_span),
            ADAPTED: plan.prompts(task),
        }
        variants += [Variant(label, task, seeds) for label, seeds in runs.items()]
        variants += [
            Variant(label, f"{task}: share of illegal outputs", seeds, read=illegal, judged=False)
            for label, seeds in runs.items()
        ]
    return variants


def _adaptation(plan: StudyPlan) -> list[Variant]:
    variants = []
    for task in plan.tasks:
        for name, steps in sorted(plan.adapted.items(), key=lambda item: item[1]):
            runs = plan.prompts(task, backbone=name)
            variants.append(Variant(f"{steps:,} steps", task, runs, x=steps))
            group = f"{task}: share of illegal outputs"
            variants.append(Variant(f"{steps:,} steps", group, runs, x=steps, read=illegal))
    return variants


PAPERS = "the paper's recipe: constant rate, no dropout"
CONSTANT, LINEAR = {"train__schedule": "constant"}, {"train__schedule": "linear"}
LOWER = {"train__learning_rate": 0.1}
RESIDUAL = {"method": "residual-prompt-tuning"}
SUPERPOSED = {"method": "superposition-prompt-tuning"}
# one change of the paper's recipe, then the two reparameterisations with the schedule
LEVERS: dict[str, Settings] = {
    PAPERS: CONSTANT,
    "dropout 0.1 in the frozen model, as in the authors' code": CONSTANT | {"model__dropout": 0.1},
    "optimizer from step 0": CONSTANT | {"train__optimizer": "adafactor"},
    "rate 0.1": CONSTANT | LOWER,
    "rate 1": CONSTANT | {"train__learning_rate": 1.0},
    "rate 1, linear decay": LINEAR | {"train__learning_rate": 1.0},
    "linear decay": LINEAR,
    "residual": CONSTANT | RESIDUAL,
    "superposition": CONSTANT | SUPERPOSED,
    "residual, linear decay": LINEAR | RESIDUAL,
    "superposition, linear decay": LINEAR | SUPERPOSED,
    "residual, linear decay, rate 0.1": LINEAR | RESIDUAL | LOWER,
    "superposition, linear decay, rate 0.1": LINEAR | SUPERPOSED | LOWER,
}


def _levers(plan: StudyPlan) -> list[Variant]:
    variants = []
    usual = {"miniature": "linear decay", "paper": PAPERS}[plan.recipe]
    for task in plan.tasks:
        for label, settings in LEVERS.items():
            # the recipe's own schedule is what the other studies run
            variant = label.split(":")[0].replace(" ", "-").replace(",", "").replace("'", "")
            changed = {} if label == usual else {"variant": variant, **settings}
            variants.append(Variant(label, task, plan.prompts(task, **changed)))
        variants.append(fine_tuning(plan, task))
    return variants


def _calibrated(record: Record) -> float | None:
    return score(record.get("calibrated", {}))


def _on_other_task(task: str, record: Record) -> float | None:
    """The first metric of another task."""
    return next(iter(record.get("also", {}).get(task, {}).values()), None)


def _scale(plan: StudyPlan) -> list[Variant]:
    variants = []
    tasks = [task for task in plan.tasks if task != "multitask"]
    for task in tasks:
        for name in plan.backbones:
            here: Settings = {"backbone": name}
            hard, few = plan.run("hard", task, **here), plan.run("few", task, seed=0, **here)
            methods = {
                "prompt design, zero-shot": ([hard], score),
                "prompt design, zero-shot, calibrated": ([hard], _calibrated),
                "prompt design, few-shot": ([few], score),
                "prompt tuning": (plan.prompts(task, **here), score),
                FULL: (plan.full(task, **here), score),
            }
            if "multitask" in plan.tasks:
                steps = plan.settings.get("train.steps")
                more = {"train__steps": steps * len(tasks)} if steps else {}
                runs = plan.full("multitask", **here, **more)
                methods["multi-task fine-tuning"] = (runs, partial(_on_other_task, task))
            variants += [
                Variant(f"{name}: {method}", task, runs, series=method, read=read, x="parameters")
                for method, (runs, read) in methods.items()
            ]
    return variants


COMPARED_LENGTHS = (1, 20, 100)


def _backbones(plan: StudyPlan) -> list[Variant]:
    """For each task and backbone: hard prompts, soft prompts of three lengths, fine-tuning."""
    variants = []
    for task, name in itertools.product(plan.tasks, plan.backbones):
        here: Settings = {"backbone": name}
        methods = {"best hand-written prompt": [plan.run("hard", task, **here)]}
        for length in sorted({*COMPARED_LENGTHS, plan.length}):
            methods[f"P = {length}"] = plan.prompts(task, length=length, **here)
        methods[FULL] = plan.full(task, **here)
        variants += [Variant(label, f"{task}, {name}", runs) for label, runs in methods.items()]
        variants += [
            Variant(label, f"{task}, {name}: share of illegal outputs", runs, read=illegal)
            for label, runs in methods.items()
        ]
    return variants


# Table 1 (F1; its model column from a secondary source) and table 2 (accuracy)
SHIFT = {
    ("squad", "mrqa_textbook_qa"): (0.668, 0.543), ("squad", "mrqa_bio_asq"): (0.791, 0.779),
    ("squad", "mrqa_race"): (0.607, 0.598), ("squad", "mrqa_relation_extraction"): (0.888, 0.884),
    ("squad", "mrqa_duo_rc"): (0.677, 0.689), ("squad", "mrqa_drop"): (0.671, 0.689),
    ("qqp", "mrpc"): (0.763, 0.731), ("mrpc", "qqp"): (0.754, 0.749),
}  # fmt: skip


def _transfer(plan: StudyPlan, sources: slice) -> list[Variant]:
    variants = []
    tasks = list(plan.tasks)
    for source in tasks[sources]:
        runs = {"prompt tuning": plan.prompts(source), FULL: plan.full(source)}
        variants += [
            Variant(label, f"{source} (in domain)", seeds, series=label, judged=False)
            for label, seeds in runs.items()
        ]
        for target in (task for task in tasks if task != source):
            paper = dict(zip(runs, SHIFT.get((source, target), (None, None)), strict=True))
            variants += [
                Variant(
                    label, f"{source} -> {target}", seeds, series=label,
                    read=partial(_on_other_task, target), paper=paper[label],
                )
                for label, seeds in runs.items()
            ]  # fmt: skip
    return variants


def _field(name: str, record: Record) -> float | None:
    return record.get(name)


def _ensemble(plan: StudyPlan) -> list[Variant]:
    variants = []
    for task in plan.tasks:
        members = plan.prompts(task)
        seeds = [run.seed for run in members]
        joint = [plan.run("ensemble", task, length=plan.length, seeds=seeds)]
        variants.append(Variant("prompts, one by one", task, members))
        variants += [
            Variant(label, task, joint, read=partial(_field, field))
            for label, field in {
                "mean of the prompts": "mean",
                "best of the prompts": "best",
                "majority vote": "vote",
                "highest mean likelihood": "likelihood",
            }.items()
        ]
    return variants


def _clusters(field: str, record: Record) -> float | None:
    """How close the words near a vector are to each other, or those near a random direction."""
    return record.get("inspection", {}).get("clusters", {}).get(field)


def _labels_near(record: Record, drawn: bool) -> float | None:
    """Share of positions with a piece of some label near; ``drawn``: of random directions."""
    labels = record.get("inspection", {}).get("labels")
    if not labels or not record.get("length"):
        return None
    if drawn:
        return max(label["random"] for label in labels.values())
    return max(label["positions"] for label in labels.values()) / record["length"]


def _interpretability(plan: StudyPlan) -> list[Variant]:
    variants = []
    for task in plan.tasks:
        inits = {init: _init_runs(plan, task, init) for init in INITS}
        close, labels = f"{task}: cosine of near words", f"{task}: positions near one label"
        for init, runs in inits.items():
            variants.append(Variant(init, close, runs, read=partial(_clusters, "tightness")))
            variants.append(Variant(init, labels, runs, read=partial(_labels_near, drawn=False)))
        every = [run for runs in inits.values() for run in runs]
        drawn = "random directions"
        variants.append(Variant(drawn, close, every, read=partial(_clusters, "random")))
        variants.append(Variant(drawn, labels, every, read=partial(_labels_near, drawn=True)))
    return variants


# Table 3, T5-XXL with prompts of 100: averages over five runs; two metrics are averaged
SUPERGLUE = {
    "boolq": 0.911, "cb": 0.9915, "copa": 0.988, "multirc": 0.772, "record": 0.9305, "rte": 0.926,
    "wic": 0.762, "wsc": 0.958,
}  # fmt: skip


def _all_metrics(record: Record) -> float | None:
    figures = list(record.get("metrics", {}).values())
    return sum(figures) / len(figures) if figures else None


def _superglue(plan: StudyPlan) -> list[Variant]:
    return [
        Variant(task, "SuperGLUE", plan.prompts(task), read=_all_metrics, paper=SUPERGLUE.get(task))
        for task in plan.tasks
    ]


STUDIES = {
    "scale": Study(
        "Prompt tuning, prompt design and fine-tuning against size (figure 1)",
        "Prompt tuning comes closer to fine-tuning as models grow, and equals multi-task"
        " fine-tuning at 11 billion parameters; prompt design stays far below both.",
        _scale,
        axis="parameters of the backbone",
        summary=summaries.closer_with_size,
    ),
    "superglue": Study(
        "SuperGLUE (table 3)",
        "T5-XXL with prompts of 100 reaches 90.5 on average over five runs.",
        _superglue,
        summary=summaries.superglue_average,
    ),
    "length": Study(
        "Prompt length (figure 3a)",
        "More than one vector matters, except to the largest model; beyond 20 little is gained, and"
        " beyond 100 larger models lose a little.",
        _lengths,
        (
            Hypothesis("P = 20", ">", "P = 1", "more than one vector matters"),
            Hypothesis("P = 100", "~", "P = 20", "beyond 20 little is gained"),
            Hypothesis("P = 150", "~", "P = 100", "beyond 100 nothing is gained"),
        ),
        axis="vectors",
    ),
    "init": Study(
        "How a prompt starts (figure 3b)",
        "Class labels are best for small models and a uniform start is worst; at 11 billion"
        " parameters it makes no difference.",
        _inits,
        (
            Hypothesis("class labels", ">", "uniform", "class labels beat a uniform start"),
            Hypothesis("sampled vocabulary", ">", "uniform", "sampled words beat a uniform start"),
            Hypothesis(
                "class labels", ">", "sampled vocabulary", "class labels beat sampled words"
            ),
        ),
    ),
    "objective": Study(
        "What the backbone was trained on (figure 3c)",
        "LM adaptation beats span corruption, often by far; a sentinel in the target helps little."
        " After span corruption alone outputs are often no label at all.",
        _objectives,
        (
            Hypothesis(ADAPTED, ">", SPAN, "LM adaptation beats span corruption"),
            Hypothesis(SENTINEL, "~", SPAN, "a sentinel in the target helps little"),
        ),
    ),
    "adaptation": Study(
        "Steps of LM adaptation (figure 3d)",
        "Longer adaptation is better, up to 100,000 steps; the largest model hardly needs it.",
        _adaptation,
        axis="steps of LM adaptation",
        summary=summaries.longer_adaptation,
        needs="--adapted NAME=STEPS for some of the --backbone NAME=PATH",
    ),
    "levers": Study(
        "What brings prompts of small models closer to fine-tuning",
        "Not in the paper, whose small models stay below fine-tuning. Residual Prompt Tuning"
        " (Razdaibiedina et al. 2023), superposition of embeddings and no dropout"
        " (SadraeiJavaheri et al. 2024) are published means; decay and step 0 are the optimizer's.",
        _levers,
        (
            Hypothesis("linear decay", ">", PAPERS, "decay helps"),
            Hypothesis("rate 1, linear decay", ">", "linear decay", "a higher rate helps too"),
            Hypothesis("residual, linear decay", ">", "linear decay", "a residual network helps"),
            Hypothesis("superposition, linear decay", ">", "linear decay", "superposition helps"),
            Hypothesis(
                "superposition, linear decay, rate 0.1",
                ">",
                "linear decay",
                "superposition at a lower rate helps",
            ),
            Hypothesis(
                PAPERS,
                ">",
                "dropout 0.1 in the frozen model, as in the authors' code",
                "leaving dropout out helps",
            ),
        ),
    ),  # fmt: skip
    "backbones": Study(
        "Backbones and prompt lengths side by side",
        "Not in the paper: its studies vary one thing at a time. Here every backbone has"
        " hand-written prompts, soft prompts of three lengths and fine-tuning on every task.",
        _backbones,
    ),
    "transfer": Study(
        "Transfer between tasks without training on the second (table 2)",
        "From QQP to MRPC prompts lose less than fine-tuned models do (76.3 against 73.1 accuracy);"
        " from MRPC to QQP they are about equal (75.4 and 74.9).",
        partial(_transfer, sources=slice(None)),
        (Hypothesis("prompt tuning", ">", FULL, "prompts transfer better"),),
        needs="two --task with as many labels",
    ),
    "shift": Study(
        "Domain shift: trained on the first task, judged on the others (table 1)",
        "Trained on SQuAD, prompts are better than the fine-tuned model on four of six sets of"
        " other domains (TextbookQA by 12.5 F1), and a little worse on DuoRC and DROP.",
        partial(_transfer, sources=slice(1)),
        (Hypothesis("prompt tuning", ">", FULL, "prompts stand a shift better"),),
        needs="two --task with as many labels",
    ),
    "ensemble": Study(
        "Ensembles of prompts (table 3)",
        "The majority vote of five prompts on one frozen model beats their mean and mostly the best"
        " of them.",
        _ensemble,
        summary=summaries.joint_answers,
    ),
    "interpretability": Study(
        "What prompts look like (section 7)",
        "The words near a vector form tight clusters, which those near random vectors do not; class"
        " labels persist from a class-label start, and appear with other starts too.",
        _interpretability,
        tuple(
            Hypothesis(init, ">", "random directions", f"more than chance, from {init}")
            for init in INITS
        ),
    ),
    "methods": Study(
        "Tuning methods side by side",
        "Prompts train, store and forget the least, and are behind full fine-tuning on small"
        " models; LoRA and adapters come close to it, and combinations come closer still.",
        methods.variants,
        methods.HYPOTHESES,
        axis="trained parameters, or training rows",
        summary=method_tables.summary,
        tables=method_tables.tables,
        notes=method_tables.notes,
        check=methods.check,
        measure=methods.measure_run,
        source="What is usually said",
    ),
    "dept": Study(
        "GLUE and SuperGLUE on T5-base (the table of DePT)",
        "With 77,000 parameters DePT has 85.9 on GLUE and 76.5 on SuperGLUE, prompt tuning 84.8"
        " and 60.0, LoRA 85.3 and 76.5, full fine-tuning 84.9 and 73.9 (arXiv 2309.05173).",
        dept.variants,
        tables=dept.tables,
        notes=dept.notes,
        check=methods.check,
        measure=methods.measure_run,
        needs="--backbone with a T5 of the hub, such as google-t5/t5-base",
    ),
    "continual": Study(
        "Continual learning: a prompt for each task, and a router",
        "A frozen model with a prompt for each task forgets nothing; the question is which prompt "
        "a text needs. One prompt or model that learns task after task forgets.",
        continual.variants,
        continual.HYPOTHESES,
        summary=continual.summary,
        tables=continual.tables,
        notes=continual.notes,
        measure=continual.measure,
        source="What is usually said",
    ),
    "few-shot": Study(
        "Few rows: which way to learn wins where",
        "With few rows a prompt is hard to train: hand-written prompts and examples in context are "
        "better, and so are prompts that were trained on something else before. With more rows "
        "LoRA and full fine-tuning win.",
        few_shot.variants,
        summary=few_shot_report.summary,
        tables=few_shot_report.tables,
        notes=few_shot_report.notes,
        draw=few_shot_report.draw,
        check=few_shot.check,
        measure=few_shot.measure,
        source="What is usually said",
    ),
    "sensitivity": Study(
        "Sensitivity: which choice moves the score how much",
        "Prompts are said to depend on their words, on their start and on luck.",
        sensitivity.variants,
        summary=sensitivity.summary,
        tables=sensitivity.tables,
        notes=sensitivity.notes,
        draw=sensitivity.draw,
        check=sensitivity.check,
        measure=sensitivity.measure,
        source="What is usually said",
    ),
    "users": Study(
        "Users: a prompt for each",
        "A prompt of his own serves a user better than one that all share, and better than anyone "
        "else's; who has few rows gains less.",
        users.variants,
        users.HYPOTHESES,
        axis="training rows of a user",
        summary=users.summary,
        tables=users.tables,
        notes=users.notes,
        panels=users.panels,
        measure=users.measure,
        source="What is usually said",
    ),
}
