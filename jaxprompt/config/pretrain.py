"""The schema of a pre-training run: text, pairs, shape, tokenizer, objectives."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from jaxprompt.config.paths import PathText
from jaxprompt.config.schema import (
    Count,
    MeshConfig,
    ModelConfig,
    Optimization,
    Positive,
    Rate,
    Schema,
    Size,
    Weight,
)


class TextSource(Schema):
    """Running text: a .txt file with a document a line, or a text column of any task source."""

    name: str
    source: str | None = None  # hf:DATASET[/CONFIG], tfds:NAME[/CONFIG]; None: a file
    train: PathText  # a file, or the name of a split where there is a source
    column: str = "text"  # where the rows have columns
    weight: Weight = 1.0  # examples are drawn from the sources in proportion to it


class PairSource(Schema):
    """Supervised text: rows with `input`, `target` and, if they have virtual tokens, `prompt`."""

    name: str
    source: str | None = None
    train: PathText
    weight: Weight = 1.0


class ShapeConfig(Schema):
    """Size of a new T5 1.1."""

    d_model: Size = 512
    num_heads: Size = 6
    head_dim: Size = 64
    d_ff: Size = 1024
    num_encoder_layers: Size = 8
    num_decoder_layers: Size = 8


class TokenizerConfig(Schema):
    """A unigram tokenizer to be trained on the run's own text, laid out as T5's."""

    vocabulary: Size = 32_000  # rows with pad, eos, unk and the sentinels
    sentinels: Size = 100
    characters: Positive = 50_000_000  # of text to learn from, in equal shares of the sources


class VirtualConfig(Schema):
    """Virtual tokens that are trained along with the backbone and thrown away with the run."""

    count: Size  # prompts, numbered from 0 in the column `prompt` of the pairs
    lengths: list[Size] = Field(default=[20], min_length=1)  # one is drawn for each use


class PretrainOptimization(Optimization):
    """T5's: Adafactor, relative to the parameters' scale, inverse square root decay."""

    steps: Positive = 100_000
    batch_size: Size = 128  # packed rows
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    optimizer: Literal["adafactor", "adamw"] = "adafactor"
    schedule: Literal["constant", "linear", "cosine", "rsqrt"] = "rsqrt"
    warmup_steps: Count = 1000
    weight_decay: Rate = 0.0
    parameter_scale: bool = True
    evaluate_batches: Positive = 4  # of each held-out set


class PretrainConfig(Schema):
    """Everything about a pre-training or adaptation run."""

    start: PathText | None = None  # a backbone to go on from; None: random weights of `shape`
    shape: ShapeConfig = ShapeConfig()
    # hub id or directory, or how to train one; None: the one beside the weights of `start`
    tokenizer: PathText | TokenizerConfig | None = None
    text: list[TextSource] = []
    pairs: list[PairSource] = []
    # share of the examples of each; spans as in Raffel et al. 2020, section 3.1.4, prefix-LM as in
    # Lester et al. 2021, section 3.1
    objectives: dict[Literal["span_corruption", "prefix_lm", "pairs"], Weight] = Field(
        default={"span_corruption": 1.0}, min_length=1
    )
    noise_density: Annotated[float, Field(gt=0, lt=1)] = 0.15
    mean_span: Annotated[float, Field(ge=1)] = 3.0
    input_length: Size = 512  # of a packed row
    target_length: Size = 128
    # tokens of running text in an example, drawn evenly between the two; None: a full row
    text_length: tuple[Size, Size] | None = None
    # a target of n tokens counts as n^(1 - balance) tokens: 0 weighs tokens alike, 1 examples
    balance: Annotated[float, Field(ge=0, le=1)] = 0.0
    validation: Annotated[float, Field(gt=0, lt=0.25)] = 0.01  # held-out share of each source
    virtual: VirtualConfig | None = None
    model: ModelConfig = ModelConfig()
    train: PretrainOptimization = PretrainOptimization()
    mesh: MeshConfig = MeshConfig()
    output: PathText = Field(min_length=1)

    @model_validator(mode="after")
    def _has_what_it_reads(self):
        for objective in self.objectives:
            kind = "pairs" if objective == "pairs" else "text"
            if not getattr(self, kind):
                raise ValueError(f"objective {objective!r} reads {kind}, and none is given; add it")
        if self.model.weights is not None:
            raise ValueError(
                f"model.weights is {self.model.weights!r}, and pre-training trains the weights; "
                "leave it out"
            )
        names = [s.name for s in (*self.text, *self.pairs)]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two sources are named {twice[0]!r}; give each its own name")
        if self.start is None and self.tokenizer is None:
            raise ValueError(
                "a new backbone needs a tokenizer; name one, or give tokenizer.vocabulary to train "
                "one on the text"
            )
        if self.start is not None and isinstance(self.tokenizer, TokenizerConfig):
            raise ValueError("the weights of start have a tokenizer; leave tokenizer out")
        if isinstance(self.tokenizer, TokenizerConfig) and not self.text:
            raise ValueError("a tokenizer is trained on text, and none is given; add it")
        longest = max(self.virtual.lengths) if self.virtual else 0
        if longest > self.input_length - 2:
            raise ValueError(
                f"{longest} virtual tokens leave no room for text in an input_length of "
                f"{self.input_length}; lower virtual.lengths or raise input_length"
            )
        if self.text_length is not None and not 4 <= self.text_length[0] <= self.text_length[1]:
            raise ValueError(
                f"text_length is {list(self.text_length)}; give [shortest, longest] from 4 on"
            )
        return self
