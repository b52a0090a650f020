"""The schema of a run."""

import math
import re
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.paths import PathText, expanded
from jaxprompt.config.validation import parse

# steps are int32 on the device and seeds 32 bits of a random key; a size beyond memory is a typo
Positive = Annotated[int, Field(gt=0, lt=2**31, strict=True)]
Count = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
MOST_ROWS = 2**16
MOST_PROMPTS = 1024  # of a population, all trained in one step
Size = Annotated[int, Field(gt=0, le=MOST_ROWS, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]
Rate = Annotated[float, Field(ge=0)]
Weight = Annotated[float, Field(gt=0)]


class Schema(BaseModel):
    """Unknown keys are refused, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TaskConfig(Schema):
    """What a task is: where rows come from, how a row becomes text, how answers are judged."""

    name: str
    source: str | None = None  # builtin:NAME, hf:DATASET[/CONFIG], tfds:NAME[/CONFIG]; None: files
    train: PathText | None = None  # a file, or the name of a split where there is a source
    validation: PathText | None = None
    test: PathText | None = None
    # "question: {text}"; [prompt] or [prompt:n] places virtual tokens, default in front
    template: str
    target: str = "{label}"
    labels: list[str] | None = None  # allowed targets: rank classification; None: free generation
    label_map: dict[str, str] | None = None  # value in the data -> label word
    # words that prompt.init=class_labels starts from where the task has no labels, or other ones
    class_labels: list[str] | None = None
    # greedy and beam write freely although there are labels; without any, rank means greedy
    decoding: Literal["rank", "greedy", "beam"] = "rank"
    beams: Size = 4
    # of a beam's hypotheses, alpha of Wu et al. (2016): log p / ((5 + length) / 6)^alpha
    length_penalty: Annotated[float, Field(ge=0)] = 0.6
    rule: str | None = None  # how rows of the source become rows, by name: see data/tasks/rules.py
    answers: str | None = None  # column of all accepted answers (a list), for metrics of texts
    group: str | None = None  # column that says which rows are judged together
    metrics: list[str] = Field(default=["accuracy"], min_length=1)  # the first selects checkpoints
    # between input and target where both are one sequence; an encoder's input ends with EOS
    separator: str = "\nAnswer:"
    max_input_length: Size = 512  # text tokens with what ends them; the prompt comes on top
    # column, or columns in order, that rows which are longer lose first; null: rows lose their end
    truncate: str | list[str] | None = None
    max_target_length: Size = 64

    @model_validator(mode="after")
    def _can_be_answered(self):
        labels = self.labels
        if labels is not None and (not labels or len(set(labels)) < len(labels)):
            raise ValueError(
                f"labels are {shown(labels)}, and some different ones are needed; leave the key "
                "out for free generation"
            )
        if labels is not None and not all(label.strip() for label in labels):
            raise ValueError(
                f"labels are {shown(labels)}, and one of them is blank; give it a word"
            )
        words = self.class_labels
        if words is not None and (not words or not all(word.strip() for word in words)):
            raise ValueError(
                f"class_labels are {shown(words)}; give words that are not blank, or leave it out"
            )
        if not re.search(r"\{[^{}]+\}", re.sub(r"\{\{|\}\}", "", self.template)):
            raise ValueError(
                f"template {shown(self.template)} names no column; write one in braces, as in "
                "'question: {text}'"
            )
        return self


class ModelConfig(Schema):
    """Numerics of the frozen backbone."""

    # mixed: float32, but matrix products have bfloat16 operands with float32 results, which
    # processors with matrix units do several times faster
    # null: mixed on accelerators, float32 on CPUs (models/precision.py)
    dtype: Literal["float32", "bfloat16", "mixed"] | None = None
    # frozen weights of products in 8 or 4 bits (models/ops/quantization.py); null: as dtype says
    weights: Literal["int8", "int4", "nf4"] | None = None
    # The authors' code trains with dropout 0.1 in the frozen net, the paper does not mention any;
    # off is the default because it is faster and reported to be better (arXiv 2406.05279).
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # decoder-only: causal; prompt: the prompt's vectors see each other in both directions; prefix:
    # all of the input does (prefix LM)
    attention: Literal["causal", "prompt", "prefix"] = "causal"
    remat: bool = False
    # attention of an encoder by cuDNN's flash kernel on GPUs, by Pallas's on TPUs
    flash: bool = False
    # layers one by one instead of in a loop, which takes longer to compile
    unroll: bool | None = None


class PromptConfig(Schema):
    """Length and start of the soft prompt (Lester et al. 2021, section 3.2)."""

    length: Size = 100
    init: Literal["class_labels", "sampled_vocabulary", "uniform", "text", "file"] = "class_labels"
    # uniform: "paper" draws from [-0.5, 0.5], "code" (the authors' gin file) from [0, 0.5)
    uniform: Literal["paper", "code"] = "paper"
    # sampled_vocabulary: the first n ids of the vocabulary; None: all that the tokenizer has and,
    # with special_ids "code", all rows of the table, as the authors' code draws them
    vocabulary: Positive | None = 5000
    # "code": pad, eos and unk may be drawn, as in the authors' code; "exclude": they may not
    special_ids: Literal["exclude", "code"] = "exclude"
    text: str | None = None
    file: PathText | None = None
    resize: bool = False  # cut or repeat the rows of `file` where its length differs
    # a prompt for each combination, all trained in one step, each as if alone: lists of seeds,
    # learning rates, lengths, tasks and ways to start, as {seed: [0, 1], learning_rate: [0.1, 0.3]}
    population: dict[
        Literal["seed", "learning_rate", "length", "task", "init", "text", "file"], list[Any]
    ] = {}
    bottleneck: Size = 128  # of the network of residual-prompt-tuning
    basis: Size = 128  # embeddings that superposition-prompt-tuning mixes, at least `length`

    @field_validator("population")
    @classmethod
    def _paths_are_expanded(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        files = [expanded(x) if isinstance(x, str) else x for x in grid.get("file", [])]
        return grid | ({"file": files} if "file" in grid else {})

    @model_validator(mode="after")
    def _start_is_named(self):
        if self.init in ("text", "file") and not getattr(self, self.init):
            raise ValueError(f"init={self.init} needs prompt.{self.init}; give it")
        return self


class Optimization(Schema):
    """How any run descends, and what it keeps. Defaults are those of prompt tuning in the paper."""

    steps: Positive = 30_000
    batch_size: Size = 32
    learning_rate: Annotated[float, Field(gt=0)] = 0.3
    # adafactor-t5x: the original's, whose second-moment decay counts from step 1,100,000, the last
    # step of the LM-adapted checkpoint; adafactor: from step 0; adamw
    optimizer: Literal["adafactor-t5x", "adafactor", "adamw"] = "adafactor-t5x"
    schedule: Literal["constant", "linear", "cosine", "rsqrt"] = "constant"
    warmup_steps: Count = 0
    cooldown_steps: Count = 0  # at the end of any schedule: linearly down to 0
    weight_decay: Rate = 1e-5
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0  # Adafactor: of the update, 0: none
    parameter_scale: bool = False  # Adafactor: multiply the rate by the RMS of the parameters
    clip: Rate = 1.0  # Adafactor: RMS of an update; AdamW: global norm of a gradient; 0: off
    z_loss: Rate = 1e-4  # times log(Z)^2, as in the original
    seed: Seed = 0
    evaluate_every: Positive = 1000
    checkpoint_every: Positive = 1000
    keep: Positive = 2  # checkpoints
    tensorboard: bool = True


class TrainConfig(Optimization):
    """Tuning. Defaults are the paper's, except where a comment says otherwise."""

    eval_batch_size: Size = 64
    # at most so many validation rows in each evaluation, whole groups where there is task.group; a
    # test split is used in full
    eval_rows: Positive | None = None
    # stop after so many evaluations without a better metric, of any task where there are several
    patience: Positive | None = None
    # of a population, the worse half stops after so many steps, and again after as many
    halve_every: Positive | None = None
    # of a loss that is no number: stop, or go back to the last checkpoint with half the rate
    on_divergence: Literal["stop", "go_back"] = "stop"
    # rows of a part of a batch, see data/batches.py; null: as suits the data and the device
    micro_batch: Size | None = None
    # rows of similar length share a batch, within windows of so many batches; 0: plain random ones
    length_window: Count = 0

    @model_validator(mode="after")
    def _parts_are_full(self):
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(
                f"train.micro_batch is {self.micro_batch}, which does not divide "
                f"train.batch_size, {self.batch_size}; use a divisor of it"
            )
        return self


class MeshConfig(Schema):
    """Devices along each axis; -1 takes what is left."""

    data: int = -1  # take rows of their own
    fsdp: int = 1  # take rows of their own, and hold a part of each weight, frozen or trained
    tensor: int = 1  # share heads, MLP and vocabulary


class RunConfig(Schema):
    """Everything about a run; written to its directory as ``config.yaml``."""

    backbone: PathText = "builtin"
    tokenizer: PathText | None = None  # hub id or directory; None: the one beside the weights
    task: str | dict[str, Any]
    method: Literal[
        "prompt-tuning", "residual-prompt-tuning", "superposition-prompt-tuning", "model-tuning"
    ] = "prompt-tuning"
    model: ModelConfig = ModelConfig()
    prompt: PromptConfig = PromptConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    output: PathText = Field(min_length=1)

    @model_validator(mode="after")
    def _start_has_enough_rows(self):
        inits = [self.prompt.init, *self.prompt.population.get("init", [])]
        if self.method == "superposition-prompt-tuning" and "file" in inits:
            raise ValueError("a superposition starts from words; choose another prompt.init")
        return self

    @model_validator(mode="after")
    def _population_can_be(self):
        every = self.train.halve_every
        if every and every % self.train.evaluate_every:
            raise ValueError(
                f"train.halve_every is {every}, and who stops is seen at evaluations; make it a "
                f"multiple of train.evaluate_every, {self.train.evaluate_every}"
            )
        grid = self.prompt.population
        if every and not grid:
            raise ValueError(
                "train.halve_every is for prompt.population, and there is none; leave it out"
            )
        if grid and self.method == "model-tuning":
            raise ValueError("prompt.population is for prompts, and model-tuning has none")
        if "task" in grid and isinstance(self.task, dict):
            raise ValueError(
                f"task has keys of its own ({listed(self.task)}), and prompt.population.task "
                "says what is learnt; move them there, into a mapping with the task's name"
            )
        for key, choices in grid.items():
            if not choices or len({repr(x) for x in choices}) < len(choices):
                raise ValueError(
                    f"prompt.population.{key} is {shown(choices)}; give one or more different "
                    "values"
                )
        count = math.prod(map(len, grid.values()))
        if count > MOST_PROMPTS:
            raise ValueError(
                f"prompt.population has {count:,} combinations, and at most {MOST_PROMPTS:,} are "
                "trained together; give fewer values"
            )
        for member in self.members() if grid else ():
            try:
                parse(type(self), member.model_dump(warnings=False))
            except UserError as error:
                raise ValueError(f"prompt.population: {str(error).rstrip('.')}") from None
        return self

    def choices(self) -> list[dict[str, Any]]:
        """What tells the prompts of a population apart; of a lone prompt nothing does."""
        grid = self.prompt.population
        return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]

    def members(self) -> list["RunConfig"]:
        """The run of each prompt of a population, as if it were alone; of a lone prompt this."""
        return [self._member(choice) for choice in self.choices()]

    def _member(self, choice: dict[str, Any]) -> "RunConfig":
        optimization = {k: v for k, v in choice.items() if k in ("seed", "learning_rate")}
        start = {k: v for k, v in choice.items() if k not in ("task", *optimization)}
        return self.model_copy(
            update={
                "task": choice.get("task", self.task),
                "prompt": self.prompt.model_copy(update={**start, "population": {}}),
                "train": self.train.model_copy(update={**optimization, "halve_every": None}),
            }
        )
