"""The schema of a pre-training run: text, pairs, shape, tokenizer, objectives."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from jaxprompt.config.schema import (
    Count,
    MeshConfig,
    ModelConfig,
    Optimization,
    PathText,
    Positive,
    Rate,
    Schema,
    Size,
    Weight,
)


class TextSource(Schema):
    """Running text: a .txt file with a document a line, or a text column of any task source."""

    name: str = Field(description="Name of the source, for logs.")
    source: str | None = Field(
        default=None,
        description="hf:DATASET[/CONFIG] or tfds:NAME[/CONFIG]. null: `train` is a file.",
    )
    train: PathText = Field(
        description=(
            "A file (.txt: a document a line; .jsonl, .csv, .tsv, .parquet: a column), or the name "
            "of a split where `source` is set."
        )
    )
    column: str = Field(default="text", description="Column of the text, where rows have columns.")
    weight: Weight = Field(
        default=1.0, description="Examples are drawn from the sources in proportion to it."
    )


class PairSource(Schema):
    """Supervised text: rows with `input`, `target` and, if they have virtual tokens, `prompt`."""

    name: str = Field(description="Name of the source, for logs.")
    source: str | None = Field(
        default=None,
        description="hf:DATASET[/CONFIG] or tfds:NAME[/CONFIG]. null: `train` is a file.",
    )
    train: PathText = Field(
        description="A file of rows, or the name of a split where `source` is set."
    )
    weight: Weight = Field(
        default=1.0, description="Examples are drawn from the sources in proportion to it."
    )


class ShapeConfig(Schema):
    """Size of a new T5 1.1, or of a new BERT where the objective is `masked_lm`."""

    d_model: Size = Field(default=512, description="Width of the residual stream.")
    num_heads: Size = Field(default=6, description="Attention heads.")
    head_dim: Size = Field(
        default=64, description="Width of a head. A BERT's is d_model / num_heads."
    )
    d_ff: Size = Field(default=1024, description="Width of the MLP.")
    num_encoder_layers: Size = Field(default=8, description="Layers of the encoder.")
    num_decoder_layers: Size = Field(
        default=8, description="Layers of the decoder, which a BERT has not."
    )
    max_positions: Size = Field(
        default=512,
        description="Positions of a BERT; it learns those that `text_length` reaches.",
    )


class TokenizerConfig(Schema):
    """A tokenizer to be trained on the run's own text.

    It is a unigram one laid out as T5's, or for `masked_lm` WordPiece as of an uncased BERT.
    """

    vocabulary: Size = Field(
        default=32_000, description="Size of the vocabulary, with pad, EOS, unk and the sentinels."
    )
    sentinels: Size = Field(
        default=100, description="Sentinels for span corruption; a BERT has none."
    )
    characters: Positive = Field(
        default=50_000_000,
        description="Characters of text to learn from, in equal shares of the sources.",
    )


class VirtualConfig(Schema):
    """Virtual tokens that are trained along with the backbone and thrown away with the run."""

    count: Size = Field(description="Prompts, numbered from 0 in the column `prompt` of the pairs.")
    lengths: list[Size] = Field(
        default=[20],
        min_length=1,
        description="Lengths in virtual tokens; one is drawn for each use.",
    )


class PretrainOptimization(Optimization):
    """T5's: Adafactor, relative to the parameters' scale, inverse square root decay."""

    steps: Positive = Field(default=100_000, description="Optimizer steps.")
    batch_size: Size = Field(default=128, description="Packed rows of a step, over all devices.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=0.01, description="Peak learning rate."
    )
    optimizer: Literal["adafactor", "adamw"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="adafactor", description="The optimizer."
    )
    schedule: Literal["constant", "linear", "cosine", "rsqrt"] = Field(
        default="rsqrt",
        description=(
            "Learning rate after the warm-up. linear and cosine: down to 0 at `train.steps`. "
            "rsqrt: inverse square root of the step."
        ),
    )
    warmup_steps: Count = Field(default=1000, description="Steps of the warm-up.")
    weight_decay: Rate = Field(default=0.0, description="Weight decay of what is trained.")
    parameter_scale: bool = Field(
        default=True, description="Adafactor: multiplies the rate by the RMS of the parameters."
    )
    evaluate_batches: Positive = Field(
        default=4, description="Batches of each held-out set in an evaluation."
    )


class PretrainConfig(Schema):
    """Everything about a pre-training or adaptation run."""

    start: PathText | None = Field(
        default=None, description="A backbone to go on from. null: random weights of `shape`."
    )
    shape: ShapeConfig = Field(
        default=ShapeConfig(),
        description="Size of a new T5 1.1, or of a new BERT where the objective is masked_lm.",
    )
    tokenizer: PathText | TokenizerConfig | None = Field(
        default=None,
        description=(
            "Hub id or directory, or a mapping that says how to train one. null: the one beside "
            "the weights of `start`."
        ),
    )
    text: list[TextSource] = Field(default=[], description="Sources of running text.")
    pairs: list[PairSource] = Field(default=[], description="Sources of supervised text.")
    objectives: dict[Literal["span_corruption", "prefix_lm", "pairs", "masked_lm"], Weight] = Field(
        default={"span_corruption": 1.0},
        min_length=1,
        description=(
            "Share of the examples of each objective. Spans are those of Raffel et al. (2020), "
            "section 3.1.4, the prefix LM that of Lester et al. (2021), section 3.1. masked_lm, "
            "which is alone, trains an encoder with a mask (Devlin et al. 2019, section 3.1)."
        ),
    )
    noise_density: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.15,
        description="Span corruption and masked LM: share of the tokens that is replaced.",
    )
    mean_span: Annotated[float, Field(ge=1)] = Field(
        default=3.0, description="Span corruption: mean length of a span in tokens."
    )
    input_length: Size = Field(default=512, description="Tokens of the input of a packed row.")
    target_length: Size = Field(default=128, description="Tokens of the target of a packed row.")
    text_length: tuple[Size, Size] | None = Field(
        default=None,
        description=(
            "[shortest, longest] tokens of running text in an example, drawn uniformly, from 4 on. "
            "null: a full row."
        ),
    )
    balance: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description=(
            "A target of n tokens counts as n^(1 - balance) tokens. 0: all tokens weigh the same, "
            "1: all examples do."
        ),
    )
    validation: Annotated[float, Field(gt=0, lt=0.25)] = Field(
        default=0.01, description="Share of each source that is held out."
    )
    virtual: VirtualConfig | None = Field(
        default=None,
        description="Virtual tokens that are trained with the backbone and then thrown away.",
    )
    model: ModelConfig = Field(default=ModelConfig(), description="Numerics of the backbone.")
    train: PretrainOptimization = Field(
        default=PretrainOptimization(), description="Optimizer, evaluations, checkpoints."
    )
    mesh: MeshConfig = Field(default=MeshConfig(), description="Devices along each axis.")
    output: PathText = Field(
        min_length=1, description="Directory of the run; a run in it is resumed."
    )

    @model_validator(mode="after")
    def _has_what_it_reads(self) -> "PretrainConfig":
        for objective in self.objectives:
            kind = "pairs" if objective == "pairs" else "text"
            if not getattr(self, kind):
                raise ValueError(f"objective {objective!r} reads {kind}, and none is given; add it")
        names = [s.name for s in (*self.text, *self.pairs)]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two sources are named {twice[0]!r}; give each its own name")
        if self.model.quantization is not None:
            raise ValueError(
                f"model.quantization is {self.model.quantization!r}, and pre-training trains the "
                "weights; leave it out"
            )
        return self

    @property
    def masked(self) -> bool:
        """Whether an encoder with a mask is trained, and not a T5."""
        return "masked_lm" in self.objectives

    @model_validator(mode="after")
    def _encoder_can_be(self) -> "PretrainConfig":
        if not self.masked:
            return self
        if len(self.objectives) > 1 or self.virtual is not None:
            raise ValueError(
                "objective 'masked_lm' trains an encoder, and the others and virtual tokens are "
                "a T5's; leave them out"
            )
        if self.model.dropout or self.model.flash:
            raise ValueError(
                "objective 'masked_lm' trains an encoder, which has neither model.dropout nor "
                "model.flash here; leave them out"
            )
        if self.target_length > self.input_length:
            raise ValueError(
                f"target_length is {self.target_length}, and a row of input_length, "
                f"{self.input_length}, has no more masks; lower it"
            )
        if self.start is not None:
            return self
        if self.shape.d_model % self.shape.num_heads:
            raise ValueError(
                f"shape.num_heads is {self.shape.num_heads}, which does not divide d_model, "
                f"{self.shape.d_model}; use a divisor"
            )
        if self.input_length > self.shape.max_positions:
            raise ValueError(
                f"input_length is {self.input_length}, and shape.max_positions "
                f"{self.shape.max_positions}; raise it"
            )
        return self

    @model_validator(mode="after")
    def _has_one_tokenizer(self) -> "PretrainConfig":
        if self.start is None and self.tokenizer is None:
            raise ValueError(
                "a new backbone needs a tokenizer; name one, or give tokenizer.vocabulary to train "
                "one on the text"
            )
        if self.start is not None and isinstance(self.tokenizer, TokenizerConfig):
            raise ValueError("the weights of start have a tokenizer; leave tokenizer out")
        if isinstance(self.tokenizer, TokenizerConfig) and not self.text:
            raise ValueError("a tokenizer is trained on text, and none is given; add it")
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> "PretrainConfig":
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
