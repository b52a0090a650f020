"""The schema of a tuning run: every setting with its type, its default and what it does.

The descriptions are the one source of ``jaxprompt settings``, of the JSON schema for editors and of
``configs/README.md`` (see ``config/reference.py``).
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.fields import Count, PathText, Positive, Rate, Schema, Seed, Size, Weight
from jaxprompt.config.limits import MOST_PROMPTS
from jaxprompt.config.methods import (
    OWN_RATE,
    PROMPTS,
    SEARCHES,
    SECTIONS,
    SECTIONS_OF,
    SETTINGS_OF,
    AdapterConfig,
    BitfitConfig,
    IA3Config,
    LoraConfig,
    PrefixConfig,
    PTuningConfig,
    SearchConfig,
    SoftVerbalizerConfig,
    parts_of,
    with_recipe,
)
from jaxprompt.config.paths import expanded
from jaxprompt.config.users import UsersConfig, with_users_recipe
from jaxprompt.config.validation import parse
from jaxprompt.config.values import Value, Values


class JinjaConfig(Schema):
    """A Jinja template that makes the input and the target of a row, as PromptSource's do."""

    text: str = Field(
        description=(
            "Jinja that makes the columns `rendered_input` and `rendered_target`, with ||| between "
            "them. A row for which it makes no ||| is left out."
        )
    )
    answer_choices: str | None = Field(
        default=None,
        description=(
            "Jinja of the answers, with ||| between them, which `text` has as a list "
            "`answer_choices`. If all rows have the same, they are the default of `task.labels`."
        ),
    )


class FewShotConfig(Schema):
    """Few rows of a task: as many of each class, for training and, others, for validation."""

    per_class: Size = Field(description="Rows of each class.")
    seed: int = Field(default=0, ge=0, description="Draws the rows.")


class TaskConfig(Schema):
    """What a task is: where rows come from, how a row becomes text, how answers are judged."""

    name: str = Field(description="Name of the task, for logs and folders.")
    source: str | None = Field(
        default=None,
        description=(
            "Where rows come from: builtin:NAME, hf:DATASET[/CONFIG], tfds:NAME[/CONFIG] or "
            "folder:PATH. null: `train`, `validation` and `test` are files."
        ),
    )
    train: PathText | None = Field(
        default=None,
        description=(
            "Training rows: a .jsonl, .csv, .tsv or .parquet file, or the name of a split where "
            "`source` is set."
        ),
    )
    validation: PathText | None = Field(
        default=None, description="Validation rows, which choose the best checkpoint; as `train`."
    )
    test: PathText | None = Field(
        default=None, description="Test rows, which are used once, at the end; as `train`."
    )
    few_shot: FewShotConfig | None = Field(
        default=None,
        description=(
            "Trains on few rows, as many of each class, and chooses the checkpoint by as many of "
            "`validation`. null: all rows."
        ),
    )
    template: str = Field(
        description=(
            'Input text with columns in braces, such as "question: {text}". [prompt] or [prompt:n] '
            "places virtual tokens; without it they stand in front. [soft:It was] places as many "
            "as the words have tokens, which start from these. Or a template of others: "
            "promptsource:PATH#super_glue/rte/GPT-3 style, or openprompt:FILE#0."
        )
    )
    jinja: JinjaConfig | None = Field(
        default=None,
        description=(
            "Jinja that makes the columns `rendered_input` and `rendered_target` of each row, "
            "which are the defaults of `template` and `target`; or promptsource:PATH#DATASET/NAME."
        ),
    )
    templates: list[str] = Field(
        default=[],
        description=(
            "Templates of which training draws one for each example. Rows are answered and judged "
            "with `template`. Empty: `template` alone."
        ),
    )
    target: str = Field(default="{label}", description="Target text, with columns in braces.")
    labels: list[str] | None = Field(
        default=None,
        description=(
            "Allowed targets; the answer is the most likely of them. null: the answer is "
            "generated freely."
        ),
    )
    verbalizer: dict[str, list[str]] | None = Field(
        default=None,
        description=(
            "Words that stand for each label, such as {positive: [good, great], negative: [bad]}; "
            "training writes the first one. Labels without any are words themselves. Or "
            "openprompt:FILE#0."
        ),
    )
    pooling: Literal["sum", "mean", "max"] = Field(
        default="sum",
        description=(
            "Score of a label of several words: the log of the sum of their likelihoods, of their "
            "mean, or of the highest."
        ),
    )
    calibration: Literal["content_free", "batch"] | None = Field(
        default=None,
        description=(
            "Divides a label's probability by its mean probability. content_free: over rows that "
            "say nothing (Zhao et al. 2021). batch: over the rows that are asked together, 8 or "
            "more (arXiv 2309.17249). null: not calibrated."
        ),
    )
    content_free: list[str] = Field(
        default=["N/A", "[MASK]", ""],
        min_length=1,
        description="Texts that stand in all columns of the rows of `calibration: content_free`.",
    )
    label_prior: dict[str, Weight] | None = Field(
        default=None,
        description=(
            "The mean probability of each label that its probability is divided by, such as "
            "{yes: 0.7, no: 0.3}. null: as `calibration` finds it."
        ),
    )
    label_map: dict[str, str] | None = Field(
        default=None,
        description='Value in the data -> label word, such as {"0": bad, "1": good}.',
    )
    class_labels: list[str] | None = Field(
        default=None,
        description=("Words that `prompt.init: class_labels` starts from, instead of `labels`."),
    )
    decoding: Literal["rank", "greedy", "beam"] = Field(
        default="rank",
        description=(
            "rank: choose the most likely label (greedy where there are no labels). greedy and "
            "beam: generate text, also where there are labels."
        ),
    )
    length_normalized: bool = Field(
        default=False,
        description=(
            "rank: the most likely label is that of the highest mean log-likelihood of a token, as "
            "in T-Few, instead of the highest sum."
        ),
    )
    beams: Size = Field(default=4, description="Hypotheses of a beam search.")
    length_penalty: Annotated[float, Field(ge=0)] = Field(
        default=0.6,
        description=(
            "Beam search: alpha of Wu et al. (2016), score = log p / ((5 + length) / 6)^alpha."
        ),
    )
    rule: str | None = Field(
        default=None,
        description=(
            "Name of a function that turns rows of the source into rows "
            "(jaxprompt/data/tasks/rules.py)."
        ),
    )
    answers: str | None = Field(
        default=None, description="Column with the list of all accepted answers, for text metrics."
    )
    group: str | None = Field(
        default=None, description="Column that says which rows are judged together."
    )
    metrics: list[str] = Field(
        default=["accuracy"],
        min_length=1,
        description="Metrics; the first one selects the checkpoint.",
    )
    separator: str = Field(
        default="\nAnswer:",
        description=(
            "Text between input and target of decoder-only models. An encoder's input ends with "
            "EOS instead."
        ),
    )
    max_input_length: Size = Field(
        default=512,
        description="Tokens of an input, with EOS or separator. The prompt is not counted.",
    )
    truncate: str | list[str] | None = Field(
        default=None,
        description=(
            "Column, or columns in order, that lose tokens first where an input is too long. "
            "null: the input loses its end."
        ),
    )
    max_target_length: Size = Field(default=64, description="Tokens of a target, with EOS.")

    @model_validator(mode="after")
    def _can_be_answered(self) -> "TaskConfig":
        labels = self.labels
        if labels is not None and (not labels or len({x.strip() for x in labels}) < len(labels)):
            raise ValueError(
                f"labels are {shown(labels)}, and some different ones are needed; leave the key "
                "out for free generation"
            )
        if labels is not None and not all(label.strip() for label in labels):
            raise ValueError(
                f"labels are {shown(labels)}, and one of them is blank; give it a word"
            )
        _check_verbalizer(self)
        if self.few_shot is not None and (labels is None or self.group is not None):
            raise ValueError(
                "few_shot is for tasks with labels whose rows are judged one by one; leave it out"
            )
        words = self.class_labels
        if words is not None and (not words or not all(word.strip() for word in words)):
            raise ValueError(
                f"class_labels are {shown(words)}; give words that are not blank, or leave it out"
            )
        for template in (self.template, *self.templates):
            if not re.search(r"\{[^{}]+\}", re.sub(r"\{\{|\}\}", "", template)):
                raise ValueError(
                    f"template {shown(template)} names no column; write one in braces, as in "
                    "'question: {text}'"
                )
        return self


def _check_verbalizer(task: TaskConfig) -> None:
    """Raise ValueError unless words and priors are those of the labels."""
    labels = task.labels or []
    given = task.verbalizer or {}
    words = [word for words in given.values() for word in words]
    for key, value in {"verbalizer": task.verbalizer, "label_prior": task.label_prior}.items():
        unknown = [label for label in value or () if label not in labels]
        if unknown:
            raise ValueError(
                f"{key} has the label {shown(unknown[0])}, and labels are "
                f"{listed(map(repr, labels)) or 'not given'}; name these"
            )
    lone = [label for label, own in given.items() if not own or not all(map(str.strip, own))]
    if lone:
        raise ValueError(
            f"verbalizer has {shown(given[lone[0]])} for {shown(lone[0])}; give one word or more, "
            "none of them blank"
        )
    every = words + [label for label in labels if label not in given]
    twice = next((word for word in every if every.count(word) > 1), None)
    if twice is not None:
        raise ValueError(f"verbalizer has the word {shown(twice)} twice; leave one of them out")
    if task.label_prior is not None and len(task.label_prior) < len(labels):
        lacking = next(label for label in labels if label not in task.label_prior)
        raise ValueError(f"label_prior lacks {shown(lacking)}; give a number for each label")
    if task.calibration is not None and (not labels or task.decoding != "rank"):
        raise ValueError(
            f"calibration is {task.calibration}, and it is for labels that are ranked; give "
            "labels, and leave decoding out"
        )


class ModelConfig(Schema):
    """Numerics of the backbone."""

    section = "model"

    dtype: Literal["float32", "bfloat16", "mixed"] | None = Field(
        default=None,
        description=(
            "Precision. mixed: float32, but matrix products multiply bfloat16 and add up float32, "
            "which is several times faster on processors with matrix units. null: mixed on "
            "accelerators, float32 on CPUs."
        ),
    )
    quantization: Literal["int8", "int4", "nf4"] | None = Field(
        default=None,
        description=(
            "Keeps the frozen weights of matrix products in 8 or 4 bits. null: as `model.dtype` "
            "says. Needs pip install 'jaxprompt[small]'."
        ),
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description=(
            "Dropout rate of the frozen T5 while a prompt is tuned. The authors' code has 0.1, the "
            "paper does not mention any; 0 is faster and reported to be better (arXiv 2406.05279)."
        ),
    )
    attention: Literal["causal", "prompt", "prefix"] = Field(
        default="causal",
        description=(
            "Decoder-only models. prompt: the vectors of the prompt see each other in both "
            "directions. prefix: all of the input does (prefix LM)."
        ),
    )
    remat: bool = Field(
        default=False,
        description="Recomputes activations in the backward pass: less memory, more time.",
    )
    flash: bool = Field(
        default=False,
        description="T5's encoder attends by cuDNN's flash kernel on GPUs, by Pallas's on TPUs.",
    )
    unroll: bool | None = Field(
        default=None,
        description="Compiles layers one by one instead of as a loop, which takes longer.",
    )


# keys of a population that are not of a method's own section
POPULATION_KEYS = (
    "seed", "learning_rate", "length", "rank", "task", "template", "init", "text", "file",
)  # fmt: skip


PromptStart = Literal["class_labels", "sampled_vocabulary", "uniform", "text", "file", "nearest"]


class PromptConfig(Schema):
    """Length and start of the soft prompt (Lester et al. 2021, section 3.2)."""

    section = "prompt"

    length: Size = Field(default=100, description="Virtual tokens, that is, vectors of the prompt.")
    init: PromptStart = Field(
        default="class_labels",
        description=(
            "What the vectors start from. class_labels: embeddings of the label words, then of "
            "sampled ids. text and file: `prompt.text` and `prompt.file`. nearest: the prompt of "
            "`prompt.library` that is most similar to `prompt.file`, which was tuned on the task "
            "for a few steps (SPoT, arXiv 2110.07904)."
        ),
    )
    uniform: Literal["paper", "code"] = Field(
        default="paper",
        description=(
            "Range of `init: uniform`. paper: [-0.5, 0.5]. code: [0, 0.5), as in the authors' gin "
            "file."
        ),
    )
    vocabulary: Positive | None = Field(
        default=5000,
        description=(
            "Sampled ids are drawn from the first n of the vocabulary. null: from all that the "
            "tokenizer has; with `special_ids: code` from all rows of the embedding table."
        ),
    )
    special_ids: Literal["exclude", "code"] = Field(
        default="exclude",
        description="code: pad, EOS and unk may be drawn, as in the authors' code.",
    )
    text: str | None = Field(default=None, description="Text that `init: text` starts from.")
    file: PathText | None = Field(
        default=None,
        description="Prompt that `init: file` starts from: an artefact, a PEFT adapter or .npy.",
    )
    library: PathText | None = Field(
        default=None,
        description=(
            "Folder of prompts, at any depth, that `init: nearest` chooses from. `jaxprompt "
            "similar` shows how similar they are."
        ),
    )
    resize: bool = Field(
        default=False,
        description="Cuts or repeats the vectors of a stored prompt where its length differs.",
    )
    learning_rate: Weight | None = Field(default=None, description=OWN_RATE)
    population: dict[str, list[Value]] = Field(
        default={},
        description=(
            "Lists of values; a member for each combination is trained in one step, each as if it "
            "were alone. Keys: seed, learning_rate, length, rank, task, template, init, text, "
            "file, or a setting of the method, such as lora.rank. Example: {seed: [0, 1], "
            "learning_rate: [0.1, 0.3]}."
        ),
    )
    population_members: list[int] | None = Field(
        default=None,
        description=(
            "Trains these combinations of the population alone, by number from 0; the values of "
            "the last key change first. null: all."
        ),
    )
    bottleneck: Size = Field(
        default=128, description="Width of the network of residual-prompt-tuning."
    )
    basis: Size = Field(
        default=128,
        description=(
            "Embeddings that superposition-prompt-tuning mixes; at least `prompt.length`."
        ),
    )
    rank: Size = Field(
        default=10,
        description="Rank of the vectors of low-rank-prompt-tuning; at most `prompt.length`.",
    )

    @field_validator("population")
    @classmethod
    def _paths_are_expanded(cls, grid: dict[str, list[Value]]) -> dict[str, list[Value]]:
        for key in grid:
            section, _, name = key.partition(".")
            known = SECTIONS[section].model_fields if section in SECTIONS else ()
            if key not in POPULATION_KEYS and name not in known:
                raise ValueError(
                    f"{shown(key)} cannot vary in a population; vary {listed(POPULATION_KEYS)}, or "
                    f"a setting of {listed(SECTIONS)}, such as lora.rank"
                )
        files = [expanded(x) if isinstance(x, str) else x for x in grid.get("file", [])]
        return {**grid, "file": files} if "file" in grid else grid

    @model_validator(mode="after")
    def _start_is_named(self) -> "PromptConfig":
        needed = {"text": ["text"], "file": ["file"], "nearest": ["file", "library"]}
        for name in needed.get(self.init, ()):
            if not getattr(self, name):
                raise ValueError(f"init={self.init} needs prompt.{name}; give it")
        return self


class Optimization(Schema):
    """How any run descends, and what it keeps. Defaults are those of prompt tuning in the paper."""

    section = "train"

    steps: Positive = Field(default=30_000, description="Optimizer steps.")
    batch_size: Size = Field(default=32, description="Rows of a step, over all devices.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=0.3, description="Peak learning rate."
    )
    optimizer: Literal["adafactor-t5x", "adafactor", "adamw"] = Field(
        default="adafactor-t5x",
        description=(
            "adafactor-t5x: the original's, whose second-moment decay counts from step 1,100,000, "
            "the last step of the LM-adapted checkpoint. adafactor: the same from step 0."
        ),
    )
    schedule: Literal["constant", "linear", "cosine", "rsqrt"] = Field(
        default="constant",
        description=(
            "Learning rate after the warm-up. linear and cosine: down to 0 at `train.steps`. "
            "rsqrt: inverse square root of the step."
        ),
    )
    warmup_steps: Count = Field(
        default=0, description="Steps in which the learning rate rises linearly to its peak."
    )
    cooldown_steps: Count = Field(
        default=0, description="Last steps, in which the rate of any schedule falls linearly to 0."
    )
    weight_decay: Rate = Field(default=1e-5, description="Weight decay of what is trained.")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Adafactor: momentum of the update. 0: none."
    )
    parameter_scale: bool = Field(
        default=False, description="Adafactor: multiplies the rate by the RMS of the parameters."
    )
    clip: Rate = Field(
        default=1.0,
        description="Adafactor: RMS of an update. AdamW: global norm of a gradient. 0: off.",
    )
    z_loss: Rate = Field(
        default=1e-4, description="Factor of log(Z)^2 in the loss, as in the original."
    )
    seed: Seed = Field(default=0, description="Seed of the start, of batches and of dropout.")
    evaluate_every: Positive = Field(default=1000, description="Steps between evaluations.")
    checkpoint_every: Positive = Field(default=1000, description="Steps between checkpoints.")
    keep: Positive = Field(default=2, description="Checkpoints that are kept.")
    tensorboard: bool = Field(default=True, description="Writes curves for TensorBoard.")
    trackers: list[Literal["wandb", "mlflow"]] = Field(
        default=[],
        description=(
            "Services that get the metrics too. Weights & Biases and MLflow take servers and "
            "projects from variables of their own (WANDB_PROJECT, MLFLOW_TRACKING_URI, ...)."
        ),
    )


class TrainConfig(Optimization):
    """Tuning. Defaults are the paper's, except where a description says otherwise."""

    unlikelihood_loss: Rate = Field(
        default=0.0,
        description=(
            "Factor of T-Few's unlikelihood loss: the mean of -log(1 - p) over the tokens of all "
            "wrong labels, added to cross-entropy. Tasks with labels only; T-Few has 1."
        ),
    )
    length_normalized_loss: Rate = Field(
        default=0.0,
        description=(
            "Factor of T-Few's length-normalized loss: cross-entropy of the right label among all, "
            "by a softmax over the mean log p of their tokens. Tasks with labels only; T-Few has 1 "
            "and judges with `task.length_normalized`."
        ),
    )
    eval_batch_size: Size = Field(default=64, description="Rows of an evaluation batch.")
    max_eval_examples: Positive | None = Field(
        default=None,
        description=(
            "Validation rows of an evaluation, at most; whole groups where there is `task.group`. "
            "A test split is used in full. null: all."
        ),
    )
    patience: Positive | None = Field(
        default=None,
        description=(
            "Stops after so many evaluations without a better metric of any task. null: never."
        ),
    )
    successive_halving_every: Positive | None = Field(
        default=None,
        description=(
            "The worse half of a population (of each task) stops after so many steps, and again "
            "after as many; a multiple of `train.evaluate_every`. null: all go on."
        ),
    )
    successive_halving_of: Literal["prompts", "tasks"] = Field(
        default="prompts",
        description=(
            "prompts: of each task the worse half stops. tasks: the worse half of the tasks stops, "
            "by the mean metric of its prompts, until two are left; for tasks that are forms of "
            "one, as in `compare` and `population.template`."
        ),
    )
    on_divergence: Literal["stop", "go_back"] = Field(
        default="stop",
        description=(
            "Where the loss is not a number. stop: ends the run. go_back: goes back to the last "
            "checkpoint and halves the rate."
        ),
    )
    micro_batch_size: Size | None = Field(
        default=None,
        description=(
            "Rows that are computed at once; gradients of the micro-batches of a step are added "
            "up. A divisor of `train.batch_size`. null: as suits the data and the device."
        ),
    )
    length_bucketing_window: Count = Field(
        default=0,
        description=(
            "Rows of similar length share a batch, within windows of so many batches, which is "
            "faster and another distribution of batches. 0: random batches, as in the paper."
        ),
    )

    @model_validator(mode="after")
    def _micro_batches_are_full(self) -> "TrainConfig":
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"train.micro_batch_size is {self.micro_batch_size}, which does not divide "
                f"train.batch_size, {self.batch_size}; use a divisor of it"
            )
        return self


class MeshConfig(Schema):
    """Devices along each axis; -1 takes what is left."""

    section = "mesh"

    data: int = Field(
        default=-1, description="Devices that take rows of their own. -1: what is left."
    )
    fsdp: int = Field(
        default=1,
        description=(
            "Devices that take rows of their own and hold a part of each weight, frozen or trained."
        ),
    )
    tensor: int = Field(default=1, description="Devices that share heads, MLP and vocabulary.")


class RunConfig(Schema):
    """Everything about a run; written to its directory as ``config.yaml``."""

    backbone: PathText = Field(
        default="builtin",
        description=(
            "Frozen model: builtin, builtin-small, smollm2, a hub id, a directory, a T5X "
            "checkpoint (also gs://) or a GGUF file."
        ),
    )
    tokenizer: PathText | None = Field(
        default=None, description="Hub id or directory. null: the one beside the weights."
    )
    task: str | Values = Field(
        description=(
            "Name of a task (`jaxprompt tasks`), or a mapping: a registered `name` with keys to "
            "change, a task of your own with `name` and `template`, or a `mixture` of tasks."
        )
    )
    method: str = Field(
        default="prompt-tuning",
        description=(
            "What is trained: prompt-tuning, residual-prompt-tuning, superposition-prompt-tuning, "
            "multitask-prompt-tuning, low-rank-prompt-tuning, p-tuning, prefix-tuning, "
            "p-tuning-v2, lora, ia3, adapter, houlsby, pfeiffer, parallel, bitfit, norm-tuning, "
            "mam, soft-verbalizer (rows for labels in place of words), warp (a prompt and such "
            "rows), parts joined by +, as in prompt+lora, gcg or pez (which look for a prompt of "
            "words), or model-tuning (all weights, the paper's baseline). It also chooses the "
            "defaults of `train` that are usual for it."
        ),
    )
    model: ModelConfig = Field(default=ModelConfig(), description="Numerics of the backbone.")
    prompt: PromptConfig = Field(
        default=PromptConfig(), description="Length and start of the prompt."
    )
    p_tuning: PTuningConfig = Field(default=PTuningConfig(), description="The network of p-tuning.")
    prefix: PrefixConfig = Field(
        default=PrefixConfig(), description="Keys and values of prefix tuning."
    )
    lora: LoraConfig = Field(default=LoraConfig(), description="Low-rank changes of weights.")
    ia3: IA3Config = Field(default=IA3Config(), description="Scales of activations.")
    adapter: AdapterConfig = Field(default=AdapterConfig(), description="Bottleneck adapters.")
    bitfit: BitfitConfig = Field(default=BitfitConfig(), description="Biases.")
    soft_verbalizer: SoftVerbalizerConfig = Field(
        default=SoftVerbalizerConfig(), description="Label rows in place of label words."
    )
    search: SearchConfig = Field(
        default=SearchConfig(), description="Words that gcg and pez may find, and how gcg looks."
    )
    train: TrainConfig = Field(
        default=TrainConfig(), description="Optimizer, evaluations, checkpoints."
    )
    mesh: MeshConfig = Field(default=MeshConfig(), description="Devices along each axis.")
    users: UsersConfig | None = Field(
        default=None, description="A prompt for each user. null: one prompt for all rows."
    )
    output: PathText = Field(
        min_length=1, description="Directory of the run; a run in it is resumed."
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_suit_the_method(cls, values: object) -> object:
        """What nobody set has the value that is usual for the method (``config/methods.py``)."""
        return with_recipe(with_users_recipe(values)) if isinstance(values, Mapping) else values

    @field_validator("method")
    @classmethod
    def _method_is_known(cls, method: str) -> str:
        parts_of(method)
        return method

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the method, such as prompt and lora."""
        return parts_of(self.method)

    @property
    def prompt_length(self) -> int:
        """The virtual tokens of a row; 0 for a method without any."""
        return self.prompt.length if {*self.parts} & {*PROMPTS} else 0

    @property
    def changes_layers(self) -> bool:
        """Whether a part acts within the layers, and not by virtual tokens alone."""
        return bool({*self.parts} - {*PROMPTS, "model"})

    @property
    def searches(self) -> bool:
        """Whether the run looks for a prompt of words."""
        return self.parts[0] in SEARCHES

    @property
    def drops_inputs(self) -> bool:
        """Whether a part has dropout of its own, beside the backbone's."""
        return "lora" in self.parts and self.lora.dropout > 0

    def learning_rates(self) -> dict[str, float]:
        """The peak learning rate of each part."""
        own = {part: getattr(self, SECTIONS_OF[part]).learning_rate for part in self.parts}
        return {part: rate or self.train.learning_rate for part, rate in own.items()}

    @model_validator(mode="after")
    def _start_has_enough_rows(self) -> "RunConfig":
        inits = [self.prompt.init, *self.prompt.population.get("init", [])]
        if "superposition-prompt" in self.parts and {"file", "nearest"} & {*inits}:
            raise ValueError("a superposition starts from words; choose another prompt.init")
        return self

    @model_validator(mode="after")
    def _search_can_be(self) -> "RunConfig":
        if self.method == "pez" and self.search.fluency:
            raise ValueError(
                f"search.fluency is {self.search.fluency:g}, and method=pez compares no texts; set "
                "it to 0, or use method=gcg"
            )
        return self

    @model_validator(mode="after")
    def _label_rows_can_be(self) -> "RunConfig":
        if "soft-verbalizer" not in self.parts:
            return self
        if self.train.unlikelihood_loss or self.train.length_normalized_loss:
            raise ValueError(
                "train.unlikelihood_loss and train.length_normalized_loss compare the words of "
                "labels, which method=soft-verbalizer replaces; leave them out"
            )
        return self

    @model_validator(mode="after")
    def _rank_fits(self) -> "RunConfig":
        rank, length = self.prompt.rank, self.prompt.length
        varied = {*self.prompt.population} & {"rank", "length"}  # then each member is checked
        if "low-rank-prompt" in self.parts and rank > length and not varied:
            raise ValueError(
                f"prompt.rank is {rank}, and a prompt of {length} vectors (prompt.length) has at "
                f"most rank {length}; lower the rank"
            )
        return self

    @model_validator(mode="after")
    def _users_can_be(self) -> "RunConfig":
        users, train = self.users, self.train
        if users is None:
            return self
        if self.method != "prompt-tuning":
            raise ValueError(
                f"users is for method=prompt-tuning, and the method is {self.method}; change it"
            )
        if self.prompt.population:
            raise ValueError("users and prompt.population exclude each other; leave one out")
        if isinstance(self.task, dict) and "mixture" in self.task:
            raise ValueError("users is for one task, and task.mixture names several; name one")
        if train.batch_size % users.rows:
            raise ValueError(
                f"users.rows is {users.rows}, which does not divide train.batch_size, "
                f"{train.batch_size}; use a divisor of it"
            )
        if train.patience or train.length_bucketing_window or train.max_eval_examples:
            raise ValueError(
                "users takes the prompts of the last step and all validation rows, and rows of a "
                "step belong to its users; leave out train.patience, train.max_eval_examples and "
                "train.length_bucketing_window"
            )
        return self

    @model_validator(mode="after")
    def _halving_can_be(self) -> "RunConfig":
        every = self.train.successive_halving_every
        if not every:
            return self
        if every % self.train.evaluate_every:
            raise ValueError(
                f"train.successive_halving_every is {every}, and evaluations decide who stops; "
                f"make it a multiple of train.evaluate_every, {self.train.evaluate_every}"
            )
        if not self.prompt.population:
            raise ValueError(
                "train.successive_halving_every is for prompt.population, and there is none; "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _population_can_be(self) -> "RunConfig":
        grid, chosen = self.prompt.population, self.prompt.population_members
        if not grid and chosen is not None:
            raise ValueError("prompt.population_members is for prompt.population; give that too")
        if not grid:
            return self
        if self.method == "model-tuning":
            raise ValueError("prompt.population is for prompts, and model-tuning has none")
        for key in grid:
            section = key.partition(".")[0]
            own = section in SECTIONS and section not in map(SETTINGS_OF.get, self.parts)
            if own or (key == "rank" and "low-rank-prompt" not in self.parts):
                raise ValueError(
                    f"prompt.population varies {key}, and method={self.method} has no {section}; "
                    "leave it out, or choose another method"
                )
        rates = [getattr(self, SECTIONS_OF[part]).learning_rate for part in self.parts]
        if "learning_rate" in grid and None not in rates:
            raise ValueError(
                "prompt.population varies learning_rate, and every part of the method has its own; "
                f"vary {SECTIONS_OF[self.parts[0]]}.learning_rate"
            )
        if "template" in grid and isinstance(self.task, dict) and "mixture" in self.task:
            raise ValueError(
                "prompt.population varies template, and task.mixture names several tasks; name one"
            )
        if "task" in grid and isinstance(self.task, dict):
            raise ValueError(
                f"task has keys of its own ({listed(self.task)}), and prompt.population.task "
                "says what is learnt; move them there, into a mapping with the task's name"
            )
        shared = [key for key in grid if key == "length" or key.startswith("search.")]
        if self.searches and shared:
            raise ValueError(
                f"prompt.population varies {shared[0]}, and with method={self.method} all members "
                "have the same; leave it out"
            )
        _check_grid(grid)
        _check_chosen(chosen, math.prod(map(len, grid.values())))
        for member in self.members():
            try:
                parse(type(self), member.model_dump(warnings=False))
            except UserError as error:
                raise ValueError(f"prompt.population: {str(error).rstrip('.')}") from None
        return self

    def choices(self) -> list[Values]:
        """What tells the prompts of a population apart; of a lone prompt nothing does."""
        grid = self.prompt.population
        every = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
        chosen = self.prompt.population_members
        return every if chosen is None else [every[number] for number in chosen]

    def members(self) -> list["RunConfig"]:
        """The run of each prompt of a population, as if it were alone; of a lone prompt this."""
        return [self._member(choice) for choice in self.choices()]

    def _member(self, choice: Mapping[str, Value]) -> "RunConfig":
        changes: dict[str, Values] = {
            "prompt": {"population": {}, "population_members": None},
            "train": {"successive_halving_every": None},
        }
        for key, value in choice.items():
            section, _, name = key.rpartition(".")
            if not section:
                section = "train" if key in ("seed", "learning_rate") else "prompt"
            if key not in ("task", "template"):
                changes.setdefault(section, {})[name] = value
        sections = {
            section: getattr(self, section).model_copy(update=values)
            for section, values in changes.items()
        }
        task = choice.get("task", self.task)
        if "template" in choice:
            named = {"name": task} if isinstance(task, str) else task
            task = {**named, "template": choice["template"]}
        return self.model_copy(update={"task": task, **sections})


def _check_chosen(chosen: Sequence[int] | None, count: int) -> None:
    """Refuse numbers of combinations that there are not, that repeat, or none."""
    if chosen is None:
        return
    if not chosen or len({*chosen}) < len(chosen) or not all(0 <= n < count for n in chosen):
        raise ValueError(
            f"prompt.population_members is {shown(chosen)}; give one or more different numbers "
            f"from 0 to {count - 1}"
        )


def _check_grid(grid: Mapping[str, Sequence[object]]) -> None:
    """Refuse a population with a repeated value, with no value, or with too many combinations."""
    for key, choices in grid.items():
        if not choices or len({repr(x) for x in choices}) < len(choices):
            raise ValueError(
                f"prompt.population.{key} is {shown(choices)}; give one or more different values"
            )
    count = math.prod(map(len, grid.values()))
    if count > MOST_PROMPTS:
        raise ValueError(
            f"prompt.population has {count:,} combinations, and at most {MOST_PROMPTS:,} are "
            "trained together; give fewer values"
        )
