"""The schema of a run: YAML plus ``key=value`` overrides. Configuration errors are born here."""

import difflib
import itertools
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from jaxprompt import yaml12


class UserError(ValueError):
    """A mistake that the user can mend: one sentence with the value, what is allowed and the fix.

    The command line prints it without a traceback and exits with code 2. Of a sentence that some
    value has made endless, the middle is left out.
    """

    def __init__(self, message: str = ""):
        if len(message) > 2500:
            message = f"{message[:2000]} ... {message[-400:]}"
        super().__init__(message)


class _Bounded(reprlib.Repr):
    """``repr`` of a few items on a few levels, however large a value is; keys in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong, self.maxother = 4, 160, 60, 160
        self.maxtuple = self.maxlist = self.maxdict = self.maxset = 20

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        if level <= 0 and x:
            return "{...}"
        items = [
            f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}"
            for key, value in itertools.islice(x.items(), self.maxdict)
        ]
        return "{" + ", ".join(items + ["..."] * (len(x) > self.maxdict)) + "}"


_BOUNDED = _Bounded()


def shown(value: Any) -> str:
    """``repr(value)`` for an error message, cut to some hundreds of characters.

    The work is bounded too: of a value that would print a billion words only a few are visited.

    >>> shown({"b": [1, 2], "a": "x"})
    "{'b': [1, 2], 'a': 'x'}"
    """
    try:
        text = _BOUNDED.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-40:]}"


def listed(names: Iterable[Any], most: int = 30) -> str:
    """Names for an error message, separated by commas; of many the first ones and their number.

    >>> listed(["a", "b"]), listed("abcd", most=2)
    ('a, b', 'a, b, ... (4 in all)')
    """
    every = [str(name) for name in names]
    some = [name if len(name) <= 80 else f"{name[:60]}..." for name in every[:most]]
    return ", ".join(some) + (f", ... ({len(every)} in all)" if len(every) > most else "")


def is_count(text: str) -> bool:
    """Whether a text from outside is a whole number that ``int`` reads, in plain digits.

    >>> [is_count(text) for text in ("12", "²", "١٢", "-1", "")]
    [True, False, False, False, False]
    """
    return re.fullmatch("[0-9]{1,9}", text) is not None


def as_folder(name: str, what: str) -> str:
    """``name``, which is to be that of a folder: of one, inside the folder that it is made in.

    Raises UserError for any other; ``what`` it names is for the message ("task", "backbone").
    """
    if not re.fullmatch(r"\w[\w.+-]{0,99}", name):
        raise UserError(
            f"The {what} name {shown(name)} is to be that of a directory; use letters, digits, "
            "'_', '.', '+' and '-', at most 100, and begin with a letter, a digit or '_'."
        )
    return name


def expanded(path: str | Path) -> str:
    """A path of a user with ``~`` and ``~name`` written out, as a shell would do it.

    Every path that a config, an option or a variable of the environment names goes through here.

    Raises:
        UserError: there is no such user, or no file can have this name.
    """
    text = str(path)
    try:
        if "\0" in text:
            raise ValueError
        os.fsencode(text)
    except ValueError:
        raise UserError(f"{shown(text)} cannot be the name of a file; name another one") from None
    first = text.split("/", 1)[0]
    if not first.startswith("~"):
        return text
    home = os.path.expanduser(first)
    if home == first:
        raise UserError(
            f"{shown(text)} begins with the home directory {shown(first)}, and there is none; "
            "write it out, or begin with ./ if that is the name of a file"
        )
    return home + text[len(first) :]


# a file, a directory, or a name that cannot begin with ~
PathText = Annotated[str, AfterValidator(expanded)]

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
    rule: str | None = None  # how rows of the source become rows, by name: see data/rules.py
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
    # null: mixed on accelerators, float32 on CPUs (model/precision.py)
    dtype: Literal["float32", "bfloat16", "mixed"] | None = None
    # frozen weights of products in 8 or 4 bits (model/small_weights.py); null: as dtype says
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
    # rows of a part of a batch, see data/pipeline.py; null: as suits the data and the device
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


def read_yaml(text: str, where: str) -> Any:
    """Parse YAML (1.2 scalars) without executing anything; ``where`` names the text in errors."""
    try:
        return yaml12.load(text)
    except (yaml12.Error, ValueError, RecursionError) as error:
        problem = " ".join(str(error)[:1000].split())[:300]
        raise UserError(f"{where} is not valid YAML: {problem}.") from None


def override_value(text: str, key: str) -> Any:
    """What stands behind ``key=`` on a command line: a number, a list, else the text as typed.

    Lists and mappings are written as in YAML, ``[yes, no]`` and ``{name: boolq}``; in quotes of
    their own, numbers are text and escapes are understood. Nothing is ``null``. Everything else is
    text to the last character: it holds no comments and no further keys.
    """
    kept = text.strip()
    if kept[:1] in ("[", "{", "'", '"'):
        try:
            value = yaml12.load_flow(kept)
            return text if value == kept else value
        except (yaml12.Error, ValueError, RecursionError) as error:
            # "[prompt:10] {text}" is a template, "[1, 2" is no list
            if kept[0] in "[{" and any(kept.count(a) != kept.count(b) for a, b in ("[]", "{}")):
                problem = " ".join(str(error)[:1000].split())[:300]
                raise UserError(f"The value of {key!r} is not valid YAML: {problem}.") from None
            return text
    try:
        return yaml12.scalar(text)
    except yaml12.Error as error:
        raise UserError(f"The value of {key!r} is not usable: {str(error).strip()}.") from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run from a YAML file and apply ``key=value`` overrides such as ``train.steps=100``."""
    return parse(RunConfig, read_config(path, overrides))


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a YAML file with ``key=value`` overrides applied, not yet validated."""
    path = Path(expanded(path))
    if not path.is_file():
        raise UserError(
            f"No config file at {shown(str(path))}{looked_in(path)}; give the path of a YAML file."
        )
    if path.stat().st_size > 4 * yaml12.LONGEST:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, more than any config; name a YAML file such "
            "as those in configs/."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}.") from None
    values = read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of keys, such as 'task: supersense'.")
    for override in overrides:
        set_value(values, override)
    return values


def looked_in(path: Path) -> str:
    """For a message about a path that is not there: where it was looked for."""
    if path.is_absolute():
        return ""
    return f" in {Path.cwd()} (paths start from the directory that the command runs in)"


def set_value(values: dict[str, Any], override: str) -> None:
    """Apply ``key=value``; a key is a path such as ``train.steps`` or ``text.0.train``."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(
            f"Override {shown(override)} must have the form key=value, e.g. train.steps=100."
        )
    *parents, last = key.split(".")
    inside: Any = values
    for depth, parent in enumerate(parents):
        place = _place(inside, parent, key)
        inner = inside[place] if isinstance(place, int) else inside.get(place)
        if isinstance(inner, str) and depth == 0 and parent == "task":
            inner = {"name": inner}  # `task: supersense` with `task.max_input_length=64`
        inside[place] = inner = {} if inner is None else inner
        if not isinstance(inner, dict | list):
            raise UserError(
                f"Override {shown(key)}: {parent!r} is {shown(inner)}, which has no keys inside."
            )
        inside = inner
    inside[_place(inside, last, key)] = override_value(text, key)


def _place(inside: dict[str, Any] | list[Any], part: str, key: str) -> str | int:
    """A key of a mapping, or the number of a list's item."""
    if isinstance(inside, dict):
        return part
    if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(inside):
        raise UserError(
            f"Override {shown(key)}: {shown(part)} names no item of a list of {len(inside)}; items "
            "are numbered from 0."
        )
    return int(part)


T = TypeVar("T", bound=BaseModel)


def parse(schema: type[T], values: Any, prefix: str = "") -> T:
    """Validate ``values`` against ``schema``; a UserError names each key, its value and the fix."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UserError(_sentence(schema, error.errors(include_url=False), prefix)) from None


def _sentence(schema: type[BaseModel], errors: Sequence[Any], prefix: str) -> str:
    """All problems in one sentence, as many as a person reads."""
    first: dict[str, tuple[str, Any]] = {}
    others: Counter[str] = Counter()
    seen: set[str] = set()
    for problem in errors:
        loc, kind = problem["loc"], problem["type"]
        if loc and loc[-1] in _TEXTS and isinstance(problem["input"], dict):
            continue  # a mapping is meant, and its own problems are told
        key = prefix + ".".join(_short(str(part)) for part in loc if part not in _UNION)
        if key in seen:  # a union reports each of its types: the first is enough for a key
            continue
        seen.add(key)
        item = kind in _TEXT_WANTED and loc and (isinstance(loc[-1], int) or loc[-1] == "[key]")
        group = key.rpartition(".")[0] + ".*" if item else key
        others[group] += group in first
        first.setdefault(group, (key, problem))
    told = []
    for group, (key, problem) in itertools.islice(first.items(), MOST_PROBLEMS):
        rest = f" (and {others[group]} more in {group[:-2]!r})" if others[group] else ""
        told.append(_problem(schema, key, problem) + rest)
    if len(first) > MOST_PROBLEMS:
        told.append(f"and {len(first) - MOST_PROBLEMS} more problems")
    return "; ".join(told) + "."


def _short(part: str) -> str:
    return part if len(part) <= 80 else f"{part[:80]}..."


MOST_PROBLEMS = 10
_TEXT_WANTED = ("string_type", "invalid_key")
# what pydantic adds to the path of a key
_TEXTS = ("str", "function-after[expanded(), str]")
_UNION = (*_TEXTS, "dict[str,any]", "TokenizerConfig", "[key]")


def _problem(schema: type[BaseModel], key: str, problem: Any) -> str:
    value, kind = problem["input"], problem["type"]
    if kind == "extra_forbidden":
        allowed = _fields(schema, problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1])[:80], allowed, n=1)
        hint = f"did you mean {close[0]!r}" if close else f"allowed are {', '.join(allowed)}"
        return f"Unknown config key {key!r}; {hint}"
    if kind == "missing":
        return f"The config lacks {key!r}; add it"
    if kind == "value_error":
        return f"Config of {key.rstrip('.') or 'the run'!r}: {problem['ctx']['error']}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    if kind in _TEXT_WANTED:
        message = "input should be text; put it in quotes"
        if isinstance(value, list | dict):
            form = "a list" if isinstance(value, list) else "a mapping"
            message = f"input should be text, and YAML reads it as {form}; put it in quotes"
        elif value is None:
            message = "input should be text; write '' where it is to be empty"
        elif "labels" in problem["loc"] and type(value) in (int, float):
            message += (
                ", or give words, and say in label_map which number of the data is which word"
            )
    elif kind == "list_type":
        message += ", as in [yes, no]"
    return f"Config key {key!r} is {shown(value)}: {message}"


def _fields(schema: Any, path: Sequence[Any]) -> list[str]:
    for part in path:
        if part in schema.model_fields:  # else a place in a list, or a type of a union
            annotation = schema.model_fields[part].annotation
            types = (annotation, *get_args(annotation))
            schema = next(t for t in types if hasattr(t, "model_fields"))
    return list(schema.model_fields)


def dump_yaml(config: BaseModel) -> str:
    """The config as YAML text that ``load_config`` reads back to an equal object."""
    return yaml12.dump(config.model_dump())
