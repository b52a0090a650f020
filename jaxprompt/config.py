"""The schema of a run: YAML plus ``key=value`` overrides. Every configuration error is born here."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class UserError(ValueError):
    """A mistake that the user can mend: one sentence with the value, what is allowed and the fix.

    The command line prints it without a traceback and exits with code 2.
    """


Positive = Annotated[int, Field(gt=0, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Rate = Annotated[float, Field(ge=0)]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskConfig(_Schema):
    """What a task is: where rows come from, how a row becomes text, how answers are judged."""

    name: str
    source: str | None = None  # builtin:NAME, hf:DATASET[/CONFIG], tfds:NAME[/CONFIG]; None: files
    train: str | None = None  # a file, or the name of a split where there is a source
    validation: str | None = None
    test: str | None = None
    template: (
        str  # "question: {text}"; [prompt] or [prompt:n] places virtual tokens, default in front
    )
    target: str = "{label}"
    labels: list[str] | None = None  # allowed targets: rank classification; None: free generation
    label_map: dict[str, str] | None = None  # value in the data -> label word
    metrics: list[str] = Field(default=["accuracy"], min_length=1)  # the first selects checkpoints
    max_input_length: Positive = 512  # text tokens with EOS; the prompt comes on top
    max_target_length: Positive = 64


class ModelConfig(_Schema):
    """Numerics of the frozen backbone."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    # The authors' code trains with dropout 0.1 in the frozen net, the paper does not mention any;
    # off is the default because it is faster and reported to be better (arXiv 2406.05279).
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    remat: bool = False
    unroll: bool = True  # faster steps, slower compilation; same parameters


class PromptConfig(_Schema):
    """Length and start of the soft prompt (Lester et al. 2021, section 3.2)."""

    length: Positive = 100
    init: Literal["class_labels", "sampled_vocabulary", "uniform", "text", "file"] = "class_labels"
    # uniform: "paper" draws from [-0.5, 0.5], "code" (the authors' gin file) from [0, 0.5)
    uniform: Literal["paper", "code"] = "paper"
    # sampled_vocabulary: the first n ids of the vocabulary; None: all rows of the table
    vocabulary: Positive | None = 5000
    # "code": pad, eos and unk may be drawn, as in the authors' code; "exclude": they may not
    special_ids: Literal["exclude", "code"] = "exclude"
    text: str | None = None
    file: str | None = None
    resize: bool = False  # cut or repeat the rows of `file` where its length differs


class TrainConfig(_Schema):
    """Optimization. Defaults are the paper's, except where a comment says otherwise."""

    steps: Positive = 30_000
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 0.3
    # adafactor-t5x: the original's, whose second-moment decay counts from step 1,100,000, the last
    # step of the LM-adapted checkpoint; adafactor: from step 0; adamw
    optimizer: Literal["adafactor-t5x", "adafactor", "adamw"] = "adafactor-t5x"
    schedule: Literal["constant", "linear", "cosine", "rsqrt"] = "constant"
    warmup_steps: Count = 0
    weight_decay: Rate = 1e-5
    parameter_scale: bool = False  # Adafactor: multiply the rate by the RMS of the parameters
    clip: Rate = 1.0  # Adafactor: RMS of an update; AdamW: global norm of a gradient; 0: off
    z_loss: Rate = 1e-4  # times log(Z)^2, as in the original
    seed: int = 0
    evaluate_every: Positive = 1000
    eval_batch_size: Positive = 64
    eval_rows: Positive | None = None  # at most so many validation rows in each evaluation
    patience: Positive | None = None  # stop after so many evaluations without a better metric
    checkpoint_every: Positive = 1000
    keep: Positive = 2
    # rows of similar length share a batch, within windows of so many batches; 0: plain random ones
    length_window: Count = 16
    tensorboard: bool = True


class MeshConfig(_Schema):
    """Devices along each axis; -1 takes what is left."""

    data: int = -1
    model: int = 1


class RunConfig(_Schema):
    """Everything about a run; written to its directory as ``config.yaml``."""

    backbone: str = "builtin"
    task: str | dict[str, Any]
    method: Literal["prompt-tuning", "model-tuning"] = "prompt-tuning"
    model: ModelConfig = ModelConfig()
    prompt: PromptConfig = PromptConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    output: str


class _Yaml12(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars: ``yes`` and ``no`` are words and ``3e-4`` is a number."""


_Yaml12.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if not pair[0].endswith((":bool", ":float"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.Inf|\.nan|\.NaN)$"
    ),
    list("-+.0123456789"),
)


def read_yaml(text: str, where: str) -> Any:
    """Parse YAML (1.2 scalars) without executing anything; ``where`` names the text in errors."""
    try:
        return yaml.load(text, Loader=_Yaml12)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{where} is not valid YAML: {problem}.") from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run from a YAML file and apply ``key=value`` overrides such as ``train.steps=100``."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No config file at {str(path)!r}; give the path of a YAML file.")
    values = read_yaml(path.read_text(), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of keys, such as 'task: supersense'.")
    for override in overrides:
        _set(values, override)
    return parse(RunConfig, values)


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(
            f"Override {override!r} must have the form key=value, e.g. train.steps=100."
        )
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        if isinstance(inner, str) and parent == "task":
            inner = {"name": inner}  # `task: supersense` with `task.max_input_length=64`
        values[parent] = inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            raise UserError(f"Override {key!r}: {parent!r} is {inner!r}, which has no keys inside.")
        values = inner
    values[last] = read_yaml(text, f"The value of {key!r}")


T = TypeVar("T", bound=BaseModel)


def parse(schema: type[T], values: Any, prefix: str = "") -> T:
    """Validate ``values`` against ``schema``; a UserError names the key, the value and what is allowed."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = [_sentence(schema, prefix, problem) for problem in error.errors()]
        raise UserError(" ".join(problems)) from None


def _sentence(schema: type[BaseModel], prefix: str, problem: Any) -> str:
    path = [part for part in problem["loc"] if part not in ("str", "dict[str,any]")]
    key = prefix + ".".join(str(part) for part in path)
    value, kind = problem["input"], problem["type"]
    if kind == "extra_forbidden":
        allowed = _fields(schema, path[:-1])
        close = difflib.get_close_matches(str(path[-1]), allowed, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed are {', '.join(allowed)}."
        return f"Unknown config key {key!r}; {hint}"
    if kind == "missing":
        return f"The config lacks {key!r}; add it."
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"Config key {key!r} is {value!r}: {message}."


def _fields(schema: Any, path: list[Any]) -> list[str]:
    for part in path:
        schema = schema.model_fields[part].annotation
    return list(schema.model_fields)


def dump_yaml(config: BaseModel) -> str:
    """The config as YAML text that ``load_config`` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
