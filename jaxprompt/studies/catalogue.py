"""The studies of Lester et al. (2021), and how small models can be helped.

Findings and numbers are the paper's (tables 1 to 4, figures 1 and 3, sections 3 to 7); where only a
figure shows a value, the direction alone is given.
"""

import itertools
from functools import partial
from typing import Any

from jaxprompt.studies import summaries
from jaxprompt.studies.baselines import Record
from jaxprompt.studies.plan import FULL, Arm, Claim, Plan, Study, full_arm, illegal, score

LENGTHS = (1, 5, 20, 100, 150)


def _lengths(plan: Plan) -> list[Arm]:
    return [
        arm
        for task in plan.tasks
        for arm in (
            *(Arm(f"P = {n}", task, plan.prompts(task, length=n), x=n) for n in LENGTHS),
            full_arm(plan, task),
        )
    ]


INITS: dict[str, dict[str, Any]] = {
    "uniform": {"prompt__init": "uniform", "prompt__uniform": "paper"},
    "sampled vocabulary": {"prompt__init": "sampled_vocabulary"},
    "class labels": {"prompt__init": "class_labels"},
}


def _init_cells(plan: Plan, task: str, init: str):
    usual = "class labels" if plan.length >= 20 else "sampled vocabulary"  # of any other study
    if init == usual:
        return plan.prompts(task)
    return plan.prompts(task, variant=init.replace(" ", "-"), **INITS[init])


def _inits(plan: Plan) -> list[Arm]:
    return [
        arm
        for task in plan.tasks
        for arm in (
            *(Arm(init, task, _init_cells(plan, task, init)) for init in INITS),
            full_arm(plan, task),
        )
    ]


SPAN, SENTINEL, ADAPTED = (
    "span corruption", "span corruption, sentinel in the target", "LM-adapted"
)  # fmt: skip


def _objectives(plan: Plan) -> list[Arm]:
    arms = []
    for task in (t for t in plan.tasks if not t.endswith("+sentinel")):
        on_span: dict[str, Any] = {"backbone": "span"}
        cells = {
            SPAN: plan.prompts(task, **on_span),
            SENTINEL: plan.prompts(f"{task}+sentinel", **on_span),
            ADAPTED: plan.prompts(task),
        }
        arms += [Arm(label, task, found) for label, found in cells.items()]
        arms += [
            Arm(label, f"{task}: share of illegal outputs", found, read=illegal, judged=False)
            for label, found in cells.items()
        ]
    return arms


def _adaptation(plan: Plan) -> list[Arm]:
    arms = []
    for task in plan.tasks:
        for name, steps in sorted(plan.adapted.items(), key=lambda item: item[1]):
            cells = plan.prompts(task, backbone=name)
            arms.append(Arm(f"{steps:,} steps", task, cells, x=steps))
            group = f"{task}: share of illegal outputs"
            arms.append(Arm(f"{steps:,} steps", group, cells, x=steps, read=illegal))
    return arms


PAPERS = "the paper's recipe: constant rate, no dropout"
CONSTANT, LINEAR = {"train__schedule": "constant"}, {"train__schedule": "linear"}
LOWER = {"train__learning_rate": 0.1}
RESIDUAL = {"method": "residual-prompt-tuning"}
SUPERPOSED = {"method": "superposition-prompt-tuning"}
# one change of the paper's recipe, then the two reparameterisations with the schedule
LEVERS: dict[str, dict[str, Any]] = {
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


def _levers(plan: Plan) -> list[Arm]:
    arms = []
    usual = {"miniature": "linear decay", "paper": PAPERS}[plan.recipe]
    for task in plan.tasks:
        for label, settings in LEVERS.items():
            # the recipe's own schedule is what the other studies run
            variant = label.split(":")[0].replace(" ", "-").replace(",", "").replace("'", "")
            changed = {} if label == usual else {"variant": variant, **settings}
            arms.append(Arm(label, task, plan.prompts(task, **changed)))
        arms.append(full_arm(plan, task))
    return arms


def _calibrated(record: Record) -> float | None:
    found = record.get("calibrated", {})
    return found["test"] if found.get("test") is not None else found.get("validation")


def _also(task: str, record: Record) -> float | None:
    """The first metric of another task."""
    return next(iter(record.get("also", {}).get(task, {}).values()), None)


def _scale(plan: Plan) -> list[Arm]:
    arms = []
    tasks = [task for task in plan.tasks if task != "multitask"]
    for task in tasks:
        for name in plan.backbones:
            here: dict[str, Any] = {"backbone": name}
            hard, few = plan.cell("hard", task, **here), plan.cell("few", task, seed=0, **here)
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
                cells = plan.full("multitask", **here, **more)
                methods["multi-task fine-tuning"] = (cells, partial(_also, task))
            arms += [
                Arm(f"{name}: {method}", task, cells, series=method, read=read, x="parameters")
                for method, (cells, read) in methods.items()
            ]
    return arms


COMPARED_LENGTHS = (1, 20, 100)


def _backbones(plan: Plan) -> list[Arm]:
    """For each task and backbone: hard prompts, soft prompts of three lengths, fine-tuning."""
    arms = []
    for task, name in itertools.product(plan.tasks, plan.backbones):
        here: dict[str, Any] = {"backbone": name}
        methods = {"best hand-written prompt": [plan.cell("hard", task, **here)]}
        for length in sorted({*COMPARED_LENGTHS, plan.length}):
            methods[f"P = {length}"] = plan.prompts(task, length=length, **here)
        methods[FULL] = plan.full(task, **here)
        arms += [Arm(label, f"{task}, {name}", cells) for label, cells in methods.items()]
        arms += [
            Arm(label, f"{task}, {name}: share of illegal outputs", cells, read=illegal)
            for label, cells in methods.items()
        ]
    return arms


# Table 1 (F1; its model column from a secondary source) and table 2 (accuracy)
SHIFT = {
    ("squad", "mrqa_textbook_qa"): (0.668, 0.543), ("squad", "mrqa_bio_asq"): (0.791, 0.779),
    ("squad", "mrqa_race"): (0.607, 0.598), ("squad", "mrqa_relation_extraction"): (0.888, 0.884),
    ("squad", "mrqa_duo_rc"): (0.677, 0.689), ("squad", "mrqa_drop"): (0.671, 0.689),
    ("qqp", "mrpc"): (0.763, 0.731), ("mrpc", "qqp"): (0.754, 0.749),
}  # fmt: skip


def _transfer(plan: Plan, sources: slice) -> list[Arm]:
    arms = []
    tasks = list(plan.tasks)
    for source in tasks[sources]:
        cells = {"prompt tuning": plan.prompts(source), FULL: plan.full(source)}
        arms += [
            Arm(label, f"{source} (in domain)", found, series=label, judged=False)
            for label, found in cells.items()
        ]
        for target in (task for task in tasks if task != source):
            paper = dict(zip(cells, SHIFT.get((source, target), (None, None)), strict=True))
            arms += [
                Arm(
                    label, f"{source} -> {target}", found, series=label,
                    read=partial(_also, target), paper=paper[label],
                )
                for label, found in cells.items()
            ]  # fmt: skip
    return arms


def _field(name: str, record: Record) -> float | None:
    return record.get(name)


def _ensemble(plan: Plan) -> list[Arm]:
    arms = []
    for task in plan.tasks:
        members = plan.prompts(task)
        seeds = [cell.seed for cell in members]
        joint = [plan.cell("ensemble", task, length=plan.length, seeds=seeds)]
        arms.append(Arm("prompts, one by one", task, members))
        arms += [
            Arm(label, task, joint, read=partial(_field, field))
            for label, field in {
                "mean of the prompts": "mean",
                "best of the prompts": "best",
                "majority vote": "vote",
                "highest mean likelihood": "likelihood",
            }.items()
        ]
    return arms


def _inspected(record: Record, *path: str) -> Any:
    found: Any = record.get("inspection")
    for key in path:
        found = None if found is None else found.get(key)
    return found


def _labels_near(record: Record, drawn: bool) -> float | None:
    """Share of positions with a piece of some label near; ``drawn``: of random directions."""
    found = _inspected(record, "labels")
    if not found or not record.get("length"):
        return None
    if drawn:
        return max(facts["random"] for facts in found.values())
    return max(facts["positions"] for facts in found.values()) / record["length"]


def _interpretability(plan: Plan) -> list[Arm]:
    arms = []
    for task in plan.tasks:
        inits = {init: _init_cells(plan, task, init) for init in INITS}
        close, labels = f"{task}: cosine of near words", f"{task}: positions near one label"
        for init, cells in inits.items():
            arms.append(
                Arm(init, close, cells, read=lambda r: _inspected(r, "clusters", "tightness"))
            )
            arms.append(Arm(init, labels, cells, read=partial(_labels_near, drawn=False)))
        every = [cell for cells in inits.values() for cell in cells]
        drawn = "random directions"
        arms.append(Arm(drawn, close, every, read=lambda r: _inspected(r, "clusters", "random")))
        arms.append(Arm(drawn, labels, every, read=partial(_labels_near, drawn=True)))
    return arms


# Table 3, T5-XXL with prompts of 100: averages over five runs; two metrics are averaged
SUPERGLUE = {
    "boolq": 0.911, "cb": 0.9915, "copa": 0.988, "multirc": 0.772, "record": 0.9305, "rte": 0.926,
    "wic": 0.762, "wsc": 0.958,
}  # fmt: skip


def _all_metrics(record: Record) -> float | None:
    figures = list(record.get("metrics", {}).values())
    return sum(figures) / len(figures) if figures else None


def _superglue(plan: Plan) -> list[Arm]:
    return [
        Arm(task, "SuperGLUE", plan.prompts(task), read=_all_metrics, paper=SUPERGLUE.get(task))
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
            Claim("P = 20", ">", "P = 1", "more than one vector matters"),
            Claim("P = 100", "~", "P = 20", "beyond 20 little is gained"),
            Claim("P = 150", "~", "P = 100", "beyond 100 nothing is gained"),
        ),
        axis="vectors",
    ),
    "init": Study(
        "How a prompt starts (figure 3b)",
        "Class labels are best for small models and a uniform start is worst; at 11 billion"
        " parameters it makes no difference.",
        _inits,
        (
            Claim("class labels", ">", "uniform", "class labels beat a uniform start"),
            Claim("sampled vocabulary", ">", "uniform", "sampled words beat a uniform start"),
            Claim("class labels", ">", "sampled vocabulary", "class labels beat sampled words"),
        ),
    ),
    "objective": Study(
        "What the backbone was trained on (figure 3c)",
        "LM adaptation beats span corruption, often by far; a sentinel in the target helps little."
        " After span corruption alone outputs are often no label at all.",
        _objectives,
        (
            Claim(ADAPTED, ">", SPAN, "LM adaptation beats span corruption"),
            Claim(SENTINEL, "~", SPAN, "a sentinel in the target helps little"),
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
            Claim("linear decay", ">", PAPERS, "decay helps"),
            Claim("rate 1, linear decay", ">", "linear decay", "a higher rate helps too"),
            Claim("residual, linear decay", ">", "linear decay", "a residual network helps"),
            Claim("superposition, linear decay", ">", "linear decay", "superposition helps"),
            Claim(
                "superposition, linear decay, rate 0.1",
                ">",
                "linear decay",
                "superposition at a lower rate helps",
            ),
            Claim(
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
        (Claim("prompt tuning", ">", FULL, "prompts transfer better"),),
        needs="two --task with as many labels",
    ),
    "shift": Study(
        "Domain shift: trained on the first task, judged on the others (table 1)",
        "Trained on SQuAD, prompts are better than the fine-tuned model on four of six sets of"
        " other domains (TextbookQA by 12.5 F1), and a little worse on DuoRC and DROP.",
        partial(_transfer, sources=slice(1)),
        (Claim("prompt tuning", ">", FULL, "prompts stand a shift better"),),
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
            Claim(init, ">", "random directions", f"more than chance, from {init}")
            for init in INITS
        ),
    ),
}
