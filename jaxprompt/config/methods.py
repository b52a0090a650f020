"""The methods: their parts, the settings of each part, and the recipes that are usual for them."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.fields import Schema, Size, Weight
from jaxprompt.config.values import Values

OWN_RATE = "Peak learning rate of this part alone. null: `train.learning_rate`."
Stack = Literal["encoder", "decoder", "cross"]
STACKS: tuple[Stack, ...] = ("encoder", "decoder", "cross")


class LoraConfig(Schema):
    """Low-rank changes of frozen weights (Hu et al. 2021, arXiv 2106.09685)."""

    section = "lora"

    rank: Size = Field(default=8, description="Columns of the low-rank factors.")
    alpha: Weight = Field(default=8.0, description="The change is multiplied by alpha / rank.")
    rank_stabilized: bool = Field(
        default=False,
        description="Multiplies by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).",
    )
    targets: (
        list[Literal["query", "key", "value", "out", "wi", "wi_0", "wi_1", "wo"]] | Literal["all"]
    ) = Field(
        default=["query", "value"],
        description="Weights that change, by their names in the parameter tree. all: all of them.",
    )
    stacks: list[Stack] = Field(
        default=[*STACKS],
        description=(
            "Where they change: in the encoder, the decoder, its cross-attention. A decoder-only "
            "model has a decoder alone."
        ),
    )
    init: Literal["uniform", "gaussian"] = Field(
        default="uniform",
        description=(
            "The first factor. uniform: within 1 / sqrt(inputs), as in PEFT. gaussian: of standard "
            "deviation 1 / rank. The second starts at 0."
        ),
    )
    ratio: Weight = Field(
        default=1.0,
        description=(
            "The second factor learns so many times as fast (LoRA+, arXiv 2402.12354); for AdamW."
        ),
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description=(
            "Share of its inputs that a change does not see in training; the frozen weight sees "
            "all. It is the same at all positions of an example."
        ),
    )
    dora: bool = Field(
        default=False,
        description=(
            "Trains the length of each column of a changed weight apart from its direction (DoRA, "
            "arXiv 2402.09353)."
        ),
    )
    learning_rate: Weight | None = Field(default=None, description=OWN_RATE)


class IA3Config(Schema):
    """Scales of keys, values and the MLP (Liu et al. 2022, arXiv 2205.05638)."""

    section = "ia3"

    targets: list[Literal["key", "value", "hidden"]] = Field(
        default=["key", "value", "hidden"],
        description="What is scaled; hidden: what the last product of the MLP reads.",
    )
    stacks: list[Stack] = Field(default=[*STACKS], description="As in `lora.stacks`.")
    learning_rate: Weight | None = Field(default=None, description=OWN_RATE)


class PrefixConfig(Schema):
    """Keys and values in front of those of the text (Li and Liang 2021, arXiv 2101.00190)."""

    section = "prefix"

    length: Size = Field(default=30, description="Keys and values of each attention.")
    places: list[Stack] = Field(
        default=[*STACKS],
        description=(
            "Which attention has them: the encoder's, the decoder's, the one from decoder to "
            "encoder. A decoder-only model has a decoder alone: all three mean that."
        ),
    )
    mlp: Size | None = Field(
        default=512,
        description=(
            "Width of the network that makes them in training (an embedding, tanh between two "
            "matrices); it is not stored with the prompt. null: they are trained themselves."
        ),
    )
    init: Literal["text", "normal", "zeros"] = Field(
        default="normal",
        description=(
            "text: the keys and values that the frozen model has for `prefix.text`. normal: random "
            "matrices, or, without a network, numbers of standard deviation 0.02. zeros: keys and "
            "values of 0."
        ),
    )
    text: str | None = Field(
        default=None,
        description="Text that `init: text` starts from, cut to the length or repeated up to it.",
    )
    learning_rate: Weight | None = Field(default=None, description=OWN_RATE)

    @model_validator(mode="after")
    def _start_is_named(self) -> "PrefixConfig":
        if self.init == "text" and not self.text:
            raise ValueError("init=text needs prefix.text; give it")
        return self


class PTuningConfig(Schema):
    """The network that makes the vectors of p-tuning (Liu et al. 2021, arXiv 2103.10385)."""

    section = "p_tuning"

    encoder: Literal["mlp", "lstm"] = Field(
        default="mlp",
        description=(
            "mlp: three matrices with ReLU between them. lstm: two layers of a bidirectional LSTM "
            "and two matrices, as in the paper."
        ),
    )
    width: Size | None = Field(
        default=None,
        description=(
            "Width of its layers; of each direction where it is an LSTM. null: d_model, as in PEFT."
        ),
    )


class AdapterConfig(Schema):
    """Bottleneck networks between the layers (Houlsby et al. 2019, arXiv 1902.00751)."""

    section = "adapter"

    after: list[Literal["attention", "cross", "mlp"]] = Field(
        default=["attention", "mlp"],
        description="Sublayers that have one; cross: the decoder's cross-attention.",
    )
    reduction: Weight = Field(default=32.0, description="The width is d_model divided by this.")
    width: Size | None = Field(default=None, description="Width. null: as `reduction` says.")
    activation: Literal["relu", "gelu", "gelu_exact", "silu"] = Field(
        default="gelu", description="Between the two matrices; gelu is its tanh form."
    )
    reads: Literal["output", "sum", "input", "normed"] = Field(
        default="output",
        description=(
            "What it reads. output: what the sublayer gives (Houlsby). sum: that and the residual "
            "stream (Pfeiffer, arXiv 2005.00247). normed: what the sublayer reads, the residual "
            "stream behind its norm (parallel, He et al., arXiv 2110.04366). input: the residual "
            "stream before the norm, as AdapterHub's par_bn does on T5."
        ),
    )
    init: Literal["normal", "zeros"] = Field(
        default="normal",
        description=(
            "normal: both matrices of standard deviation 0.02, so the start is near the frozen "
            "model. zeros: the second is 0, so it is the frozen model; the first is within "
            "1 / sqrt(d_model). Biases start at 0."
        ),
    )
    scale: Weight = Field(default=1.0, description="Multiplies what it gives.")
    learning_rate: Weight | None = Field(default=None, description=OWN_RATE)


class BitfitConfig(Schema):
    """Biases of all projections (Ben Zaken et al. 2021, arXiv 2106.10199)."""

    section = "bitfit"

    norms: bool = Field(default=False, description="Trains the scales of all norms, too.")
    learning_rate: Weight | None = Field(default=None, description=OWN_RATE)


class SoftVerbalizerConfig(Schema):
    """Label rows in place of label words (WARP, Hambardzumyan et al. 2021, arXiv 2101.00121)."""

    section = "soft_verbalizer"

    init: Literal["words", "prototypes"] = Field(
        default="words",
        description=(
            "words: the mean row of the head over the pieces of a label's words. prototypes: the "
            "mean over the label's training rows of what the head would read, so that the nearest "
            "mean wins (prototypical networks, arXiv 1703.05175)."
        ),
    )
    rows: Size = Field(
        default=512,
        description="init=prototypes: training rows of each label that a mean is taken over.",
    )
    learning_rate: Weight | None = Field(default=None, description=OWN_RATE)


class SearchConfig(Schema):
    """The search for a prompt of words, which replaces descent on vectors."""

    section = "search"

    allowed: Literal["words", "all"] = Field(
        default="words",
        description=(
            "Pieces of the vocabulary that a prompt may have. words: whole words of letters, but "
            "not those of the task's labels. all: any piece that begins a word."
        ),
    )
    candidates: Size = Field(
        default=256,
        description="gcg: at each place, the words that the gradient promises most of.",
    )
    swaps: Size = Field(
        default=64,
        description="gcg: changes of one word that a step tries on its rows; it keeps the best.",
    )
    fluency: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description=(
            "gcg, on a decoder-only model: so many times the mean negative log-likelihood of the "
            "prompt's own words is added to the loss."
        ),
    )


SECTIONS: Mapping[str, type[Schema]] = {
    kind.section: kind
    for kind in (
        PTuningConfig, PrefixConfig, LoraConfig, IA3Config, AdapterConfig, BitfitConfig,
        SoftVerbalizerConfig, SearchConfig,
    )
}  # fmt: skip

# methods that look for words
SEARCHES = ("gcg", "pez")
# parts that no other goes with
_ALONE = frozenset({"model", *SEARCHES})

# methods with virtual tokens, of which one can be a part
PROMPTS = (
    "prompt",
    "residual-prompt",
    "superposition-prompt",
    "multitask-prompt",
    "low-rank-prompt",
    "p-tuning",
    *SEARCHES,
)
# the section that has the learning rate of each part
SECTIONS_OF: Mapping[str, str] = {
    **dict.fromkeys(PROMPTS, "prompt"),
    "prefix": "prefix",
    "lora": "lora",
    "ia3": "ia3",
    "adapter": "adapter",
    "bitfit": "bitfit",
    "norm": "bitfit",
    "soft-verbalizer": "soft_verbalizer",
    "model": "train",
}
# the section that has the other settings of each part
SETTINGS_OF: Mapping[str, str] = {
    **SECTIONS_OF, "p-tuning": "p_tuning", **dict.fromkeys(SEARCHES, "search"),
}  # fmt: skip
# what `method` may be, beside parts joined by +
METHOD_NAMES: Mapping[str, tuple[str, ...]] = {
    "prompt-tuning": ("prompt",),
    "residual-prompt-tuning": ("residual-prompt",),
    "superposition-prompt-tuning": ("superposition-prompt",),
    "multitask-prompt-tuning": ("multitask-prompt",),
    "low-rank-prompt-tuning": ("low-rank-prompt",),
    "p-tuning": ("p-tuning",),
    "prefix-tuning": ("prefix",),
    "p-tuning-v2": ("prefix",),
    "lora": ("lora",),
    "ia3": ("ia3",),
    "adapter": ("adapter",),
    "houlsby": ("adapter",),
    "pfeiffer": ("adapter",),
    "parallel": ("adapter",),
    "bitfit": ("bitfit",),
    "norm-tuning": ("norm",),
    "mam": ("prefix", "adapter"),
    "soft-verbalizer": ("soft-verbalizer",),
    "warp": ("prompt", "soft-verbalizer"),
    "gcg": ("gcg",),
    "pez": ("pez",),
    "model-tuning": ("model",),
}


def parts_of(method: str) -> tuple[str, ...]:
    """The parts of a method: those of its name, or those that + joins.

    Raises:
        UserError: a part is unknown, is there twice, or goes with no other.
    """
    if method in METHOD_NAMES:
        return METHOD_NAMES[method]
    parts = tuple(METHOD_NAMES.get(part, (part,)) for part in method.split("+"))
    flat = tuple(part for some in parts for part in some)
    unknown = [part for part in flat if part not in SECTIONS_OF]
    if unknown:
        raise UserError(
            f"method is {shown(method)} and {shown(unknown[0])} is no method; use one of "
            f"{listed(METHOD_NAMES)}, or join parts by +, as in prompt+lora"
        )
    if len({*flat}) < len(flat) or len({*flat} & {*PROMPTS}) > 1 or {*flat} & _ALONE:
        raise UserError(
            f"method is {shown(method)}: a part is there twice, or two parts have virtual tokens, "
            "or one is the whole model or a search for words; join others"
        )
    return flat


# The usual recipe of each part: method.md of the papers' codes, see methods/README.md
_ADAMW: Values = {"optimizer": "adamw", "schedule": "linear", "weight_decay": 0.0}
# He et al. 2021, arXiv 2110.04366
_PARALLEL: Values = {
    "after": ["mlp"],
    "reads": "normed",
    "reduction": 2.0,
    "activation": "relu",
    "scale": 4.0,
    "init": "zeros",
}
_ADAPTERS: Values = {**_ADAMW, "learning_rate": 3e-4}
_WORDS: Values = {"length": 10, "init": "sampled_vocabulary"}
RECIPES: Mapping[str, Values] = {
    # arXiv 2307.15043: 500 steps; the losses that it compares need no optimizer
    "gcg": {
        "prompt": _WORDS,
        "train": {"steps": 300, "evaluate_every": 25, "checkpoint_every": 25},
    },
    # arXiv 2302.03668: AdamW, weight decay 0.1, 1,000 steps
    "pez": {
        "prompt": _WORDS,
        "train": {
            "optimizer": "adamw",
            "learning_rate": 0.3,
            "schedule": "constant",
            "weight_decay": 0.1,
            "steps": 1000,
            "evaluate_every": 50,
            "checkpoint_every": 50,
        },
    },
    # PEFT's guide: AdamW 1e-3 with matrices that are stored divided by the root of their fan-in,
    # 768 or so, which is a rate of 0.03 for those that are not
    "p-tuning": {"train": {**_ADAMW, "learning_rate": 0.03}},
    # arXiv 2303.02861; u and v learn at 0.4, see methods/multitask.py
    "multitask-prompt-tuning": {
        "train": {**_ADAMW, "learning_rate": 0.3, "weight_decay": 1e-5},
    },
    # options.py of github.com/XYaoooo/DPT
    "low-rank-prompt-tuning": {
        "train": {**_ADAMW, "learning_rate": 0.3, "weight_decay": 1e-5},
    },
    # Lester et al. 2021, appendix A: T5's fine-tuning (Raffel et al. 2020, section 3.1.2)
    "model-tuning": {"train": {"learning_rate": 1e-3, "parameter_scale": True}},
    "lora": {"train": {**_ADAMW, "learning_rate": 4e-4}},
    "ia3": {
        "train": {"optimizer": "adafactor", "learning_rate": 3e-3, "schedule": "linear"},
    },
    # for matrices that are stored with unit variance (methods/prefix.py): 5e-4 of the papers' codes
    # times the root of the fan-in
    "prefix-tuning": {"train": {**_ADAMW, "learning_rate": 1e-2}},
    "p-tuning-v2": {
        "prefix": {"places": ["encoder"], "mlp": None},
        "train": {**_ADAMW, "learning_rate": 7e-3},
    },
    "adapter": {"train": _ADAPTERS},
    "houlsby": {"adapter": {"reduction": 16.0, "activation": "silu"}, "train": _ADAPTERS},
    "pfeiffer": {
        "adapter": {"after": ["mlp"], "reads": "sum", "reduction": 16.0, "activation": "relu"},
        "train": _ADAPTERS,
    },
    "parallel": {"adapter": _PARALLEL, "train": _ADAPTERS},
    "bitfit": {"train": {**_ADAMW, "learning_rate": 3e-4}},
    "norm-tuning": {"train": {**_ADAMW, "learning_rate": 3e-4}},
    # arXiv 2101.00121, section 4.2, has one rate for rows and prompt, 3e-3 at most
    "soft-verbalizer": {"train": {**_ADAMW, "learning_rate": 3e-3}},
    "warp": {
        "soft_verbalizer": {"learning_rate": 3e-3},
        "train": {**_ADAMW, "learning_rate": 0.3},
    },
    "mam": {
        "adapter": _PARALLEL,
        "prefix": {"mlp": 800, "learning_rate": 1e-2},
        "train": {**_ADAMW, "learning_rate": 3e-4},
    },
}
# for AdamW, where several parts are trained together
_RATES = {
    **dict.fromkeys(PROMPTS, 0.3),
    "p-tuning": 0.03,
    "prefix": 1e-2,
    "lora": 4e-4,
    "ia3": 3e-3,
    "adapter": 3e-4,
    "bitfit": 3e-4,
    "norm": 3e-4,
    "soft-verbalizer": 3e-3,
}
# share of the steps in which the rate rises, where the schedule is linear (LoRA, appendix D)
WARMUP = 0.06


# a rate that is so many times as high or low as the usual one is likely a mistake
_FAR = 30.0


def rate_warnings(optimizer: str, rates: Mapping[str, float]) -> list[str]:
    """A sentence for each part whose learning rate is far from the usual one.

    Args:
        optimizer: of the run; rates of Adafactor and AdamW are compared with those of AdamW.
        rates: the peak rate of each part.
    """
    warnings = []
    for part, rate in rates.items():
        usual = _RATES.get(part)
        if part in PROMPTS or usual is None or usual / _FAR < rate < usual * _FAR:
            continue
        warnings.append(
            f"the learning rate of {part} is {rate:g} with {optimizer}, and {usual:g} is usual; a "
            f"config for another method may have set it, so set train.learning_rate={usual:g}"
        )
    return warnings


def recipe_of(method: str) -> dict[str, Values]:
    """The settings, by section, that are usual for a method; empty where there are none."""
    if "+" not in method:
        name = method if method in METHOD_NAMES else f"{method}-tuning"  # of a part
        return {**RECIPES.get(name, {})}
    recipe: dict[str, Values] = {"train": _ADAMW}
    for name in method.split("+"):
        own = RECIPES.get(name, {})
        recipe |= {section: own[section] for section in own if section != "train"}
        for part in METHOD_NAMES.get(name, (name,)):
            if part in _RATES:
                section = SECTIONS_OF[part]
                recipe[section] = {"learning_rate": _RATES[part], **recipe.get(section, {})}
    return recipe


def with_recipe(values: Mapping[str, object]) -> dict[str, object]:
    """The settings of a run with the recipe of its method for all that is not set."""
    recipe = recipe_of(str(values.get("method")))
    full = dict(values)
    for section, settings in recipe.items():
        given = full.get(section, {})
        if isinstance(given, Mapping):
            full[section] = {**settings, **given}
    train = full.get("train")
    if recipe and isinstance(train, Mapping) and train.get("schedule") == "linear":
        steps = train.get("steps", 30_000)
        if isinstance(steps, int) and "warmup_steps" not in train:
            full["train"] = {**train, "warmup_steps": round(WARMUP * steps)}
    return full
