"""The study of the tuning methods: the same rows, steps and sweep of learning rates for each."""

from collections.abc import Mapping, Sequence

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.methods import METHOD_NAMES, PROMPTS, parts_of
from jaxprompt.studies.baselines import Record
from jaxprompt.studies.method_costs import COSTS, measure_costs
from jaxprompt.studies.method_runs import MODEL_TUNING, measure
from jaxprompt.studies.runs import Backbone, Run, Settings, Suite, of_method
from jaxprompt.studies.study import FULL, Hypothesis, StudyPlan, Variant

# in the order of the tables
METHODS = (
    "prompt-tuning", "p-tuning", "prefix-tuning", "p-tuning-v2", "lora", "ia3", "houlsby",
    "pfeiffer", "parallel", "bitfit", "norm-tuning", "mam", "prompt+lora", MODEL_TUNING,
)  # fmt: skip
FEW_ROWS = (16, 64, 256)
MEMBERS = 8  # of a mixed batch of answers
ROUNDS = 7  # of measured times

# what all methods have in common, by recipe; the rest is the usual recipe of each method
COMMON: Mapping[str, Settings] = {
    "paper": {"train.steps": 30_000, "train.batch_size": 32, "train.schedule": "linear"},
    "miniature": {
        "train.steps": 300, "train.batch_size": 16, "train.schedule": "linear",
        "train.length_bucketing_window": 16, "train.max_eval_examples": 300,
    },
}  # fmt: skip
# of few rows: 1,000 steps of 8 rows (Liu et al. 2022, arXiv 2205.05638, section 3.6)
FEW: Mapping[str, Settings] = {
    "paper": {"train.steps": 1000, "train.batch_size": 8},
    "miniature": {"train.steps": 100, "train.batch_size": 8},
}
# full fine-tuning by AdamW; the higher rate suits the built-in backbones, as in the paper's studies
RATE_OF_MODELS, RATE_OF_BUILTIN_MODELS = 1e-4, 1e-3
# learning rates that are tried, times the usual one of the method. Runs of hundreds of steps need
# higher rates than the usual ones, which are for thousands
FACTORS: Mapping[str, Sequence[float]] = {
    "paper": (1 / 3, 1.0, 3.0), "miniature": (1.0, 3.0, 10.0)
}  # fmt: skip
FACTORS_OF_PROMPTS = (1 / 3, 1.0, 3.0)
EXTENSIONS = 2  # how often two more are tried beyond a best one at an edge


def settings_of(plan: StudyPlan, backbone: str, method: str, rows: int | None = None) -> Settings:
    """The settings of a method's runs; those of the user come last.

    rows: training rows; None: all.
    """
    settings: Settings = {**COMMON[plan.recipe], **(FEW[plan.recipe] if rows else {})}
    if rows:
        settings |= {"rows": rows, "train.batch_size": min(rows, settings["train.batch_size"])}
    parts = {*parts_of(method)}
    if parts & {*PROMPTS}:
        # class labels where there is room for them and more
        init = "class_labels" if plan.length >= 20 else "sampled_vocabulary"
        settings |= {"prompt.length": plan.length, "prompt.init": init}
    if method == MODEL_TUNING:
        builtin = plan.backbones[backbone].startswith("builtin")
        rate = RATE_OF_BUILTIN_MODELS if builtin else RATE_OF_MODELS
        settings |= {"train.optimizer": "adamw", "train.weight_decay": 0.0}
        settings |= {"train.learning_rate": rate}
    steady = parts <= {*PROMPTS, "model"}
    factors = FACTORS_OF_PROMPTS if steady else FACTORS[plan.recipe]
    own = of_method(plan.settings, method)
    if rows and "train.steps" in own:  # as many times fewer as in the recipe
        share = FEW[plan.recipe]["train.steps"] / COMMON[plan.recipe]["train.steps"]
        own = own | {"train.steps": max(1, round(own["train.steps"] * share))}
    if rows and "train.batch_size" in own:
        own = own | {"train.batch_size": min(rows, own["train.batch_size"])}
    sweep = {"seeds": plan.seeds, "factors": list(factors), "extensions": EXTENSIONS}
    return settings | sweep | own


def chosen_methods(plan: StudyPlan) -> list[str]:
    """The methods that are compared, in the order of the tables."""
    return plan.methods or list(METHODS)


def check(plan: StudyPlan) -> None:
    """Raise a UserError for a name that is no method."""
    methods = plan.methods
    for method in methods:
        parts_of(method)
    folders = [method for method in methods if method == COSTS]
    if folders:
        raise UserError(f"--method is {shown(folders[0])}; use one of {listed(METHOD_NAMES)}.")


def runs_of(
    plan: StudyPlan, backbone: str, task: str, method: str, rows: int | None = None
) -> list[Run]:
    """A run for each seed of a method."""
    settings = settings_of(plan, backbone, method, rows)
    variant = f"rows{rows}" if rows else "all"
    return [
        Run(backbone, task, method, None, seed, variant, settings) for seed in range(plan.seeds)
    ]


def costs_run(plan: StudyPlan, backbone: str, task: str) -> Run:
    """The run that measures what steps and answers cost."""
    each = {method: settings_of(plan, backbone, method) for method in chosen_methods(plan)}
    numerics = {k: v for k, v in of_method(plan.settings, "").items() if k.startswith("model.")}
    batch = each[next(iter(each))]["train.batch_size"]
    own = {"methods": each, "rounds": ROUNDS, "members": MEMBERS, "batch_size": batch}
    return Run(backbone, task, COSTS, None, None, None, numerics | own)


def label_of(method: str) -> str:
    return FULL if method == MODEL_TUNING else method


def variants(plan: StudyPlan) -> list[Variant]:
    """All rows and few rows of each task and backbone, and what the methods cost there."""
    found: list[Variant] = []
    for backbone in plan.backbones:
        for task in plan.tasks:
            group = f"{task}, {backbone}"
            for method in chosen_methods(plan):
                name, runs = label_of(method), runs_of(plan, backbone, task, method)
                found.append(Variant(name, group, runs, x="trainable_parameters", series=name))
            for method in chosen_methods(plan):
                for rows in plan.rows:
                    name, few = label_of(method), runs_of(plan, backbone, task, method, rows)
                    label = f"{name}, {rows} rows"
                    found.append(Variant(label, f"{group}: few rows", few, x=rows, series=name))
            costs = [costs_run(plan, backbone, task)]
            found.append(Variant("costs", f"{group}: costs", costs, read=lambda record: None))
    return found


def measure_run(run: Run, suite: Suite, backbone: Backbone) -> Record:
    """The record of any run of the study."""
    return (measure_costs if run.method == COSTS else measure)(run, suite, backbone)


# what introductions to the subject say
HYPOTHESES = (
    Hypothesis("lora", ">", "prompt-tuning", "LoRA is better than a prompt"),
    Hypothesis("houlsby", ">", "prompt-tuning", "adapters are better than a prompt"),
    Hypothesis("prefix-tuning", ">", "prompt-tuning", "a prefix is better than a prompt"),
    Hypothesis("p-tuning", ">", "prompt-tuning", "a network that makes the prompt helps"),
    Hypothesis("prompt+lora", ">", "lora", "a prompt beside LoRA helps"),
    Hypothesis("mam", ">", "parallel", "a prefix beside parallel adapters helps"),
    Hypothesis("lora", "~", FULL, "LoRA is as good as full fine-tuning"),
    Hypothesis("houlsby", "~", FULL, "adapters are as good as full fine-tuning"),
    Hypothesis("prompt-tuning", "~", FULL, "a prompt is as good as full fine-tuning"),
)
