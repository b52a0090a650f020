"""What requests hold. ``openapi.py`` makes the published schema of these classes."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from jaxprompt.inference.wording import MOST_CHARACTERS, MOST_LABEL_CHARACTERS, MOST_LABELS
from jaxprompt.serving.work import TOP

Name = Annotated[str, Field(min_length=1, max_length=300)]
TimeoutMs = Annotated[float, Field(gt=0, le=3_600_000, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, strict=True)]
Column = StrictStr | StrictBool | int | float | list[StrictStr] | None
Texts = StrictStr | list[StrictStr] | list[TokenId] | list[list[TokenId]]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OtherWords(_Request):
    """Words that take the place of those of a prompt's task, for one request."""

    template: Annotated[StrictStr, Field(max_length=MOST_CHARACTERS)] | None = Field(
        default=None,
        description="Text with columns in braces; [prompt] and [soft:words] place the vectors.",
    )
    labels: (
        Annotated[
            list[Annotated[StrictStr, Field(max_length=MOST_LABEL_CHARACTERS)]],
            Field(min_length=2, max_length=MOST_LABELS),
        ]
        | None
    ) = Field(default=None, description="As many as the task has take the places of the old ones.")


class ConfigRequest(_Request):
    """A config is wanted that tunes a prompt with these words."""

    wording: OtherWords = OtherWords()


class PredictRequest(_Request):
    """Rows to be answered."""

    prompt: Name | list[Name] | None = Field(
        default=None,
        description=(
            "A prompt, or one for each input: NAME, NAME@NUMBER, or the backbone's id. Left out: "
            "the router chooses, or the user decides."
        ),
    )
    user: Name | list[Name] | None = Field(
        default=None,
        description=(
            "Id of a user, or one for each input: the prompt of the user answers, or the shared "
            "one where they have none."
        ),
    )
    inputs: list[StrictStr | dict[str, Column]] = Field(
        min_length=1,
        description="Rows with the columns of the task's template; a string is its only column.",
    )
    bare: StrictBool = Field(
        default=False, description="The backbone answers the prompt's task without the prompt."
    )
    wording: OtherWords | None = Field(
        default=None, description="Other words around the vectors of the one prompt that is named."
    )
    top_k: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Only so many labels, the most likely first."
    )
    candidates: list[Name] | None = Field(
        default=None, min_length=1, description="Prompts among which the router chooses."
    )
    timeout_ms: TimeoutMs | None = Field(default=None, description="A 504 comes after it.")


class Pair(_Request):
    """A filled template and what may follow."""

    input: StrictStr
    target: StrictStr


class ScoreRequest(_Request):
    """Targets whose likelihoods are wanted."""

    prompt: Name | list[Name] = Field(description="A prompt or the backbone's id; or one a row.")
    inputs: list[Pair] = Field(min_length=1)
    raw: StrictBool = Field(
        default=False, description="Decoder-only: no separator and no space before the target."
    )
    max_input_length: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Text tokens with EOS; default: the task's, or 512."
    )
    timeout_ms: TimeoutMs | None = None


class StreamOptions(BaseModel):
    """What else a stream holds."""

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """OpenAI's request of a completion. Fields that are not here are ignored, and named so."""

    model_config = ConfigDict(extra="allow")

    model: Name = Field(description="A prompt or the backbone's id.")
    prompt: Texts = Field(description="Text or ids, or a list of either; taken as it is.")
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        default=1.0, description="0: always the likeliest token."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    seed: int | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = Field(
        default=None, description="Likelihoods of tokens, and so many of the likeliest."
    )
    ignore_eos: bool | None = False
    timeout_ms: TimeoutMs | None = None
    user: str | None = None


class SourceRequest(_Request):
    """A prompt that lies where the server may read."""

    source: Name


class PinRequest(_Request):
    """Whether a prompt stays on the device."""

    pinned: StrictBool = True


class LoadAdapterRequest(BaseModel):
    """vLLM's request to load an adapter."""

    lora_name: Name
    lora_path: Name
    load_inplace: bool = False


class UnloadAdapterRequest(BaseModel):
    """vLLM's request to unload an adapter."""

    lora_name: Name
    lora_int_id: int | None = None


class TokenizeRequest(BaseModel):
    """Text that becomes ids."""

    prompt: StrictStr
    add_special_tokens: bool = True
    model: str | None = None


class DetokenizeRequest(BaseModel):
    """Ids that become text."""

    tokens: list[TokenId]
    model: str | None = None


class ErrorBody(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """The body of every error."""

    error: ErrorBody


class LabelScore(BaseModel):
    """How likely a label is."""

    label: str
    log_likelihood: float
    probability: float


class RoutedTo(BaseModel):
    """What the router found."""

    prompt: str | None
    score: float
    margin: float | None
    candidates: list[dict[str, str | float]]


class Prediction(BaseModel):
    """The answer of a row."""

    prediction: str
    label_index: int | None
    scores: list[LabelScore] | None
    prompt: str
    version: int | None
    digest: str | None
    routed: RoutedTo | None


class Usage(BaseModel):
    """How many tokens there were."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    virtual_tokens: int


class Timing(BaseModel):
    """Where the time went."""

    queue_ms: float
    device_ms: float
    total_ms: float


class PredictAnswer(BaseModel):
    """The answers in the order of the inputs."""

    predictions: list[Prediction]
    usage: Usage
    timing: Timing
    warnings: list[str] = []


class Score(BaseModel):
    """How likely a target is."""

    log_likelihood: float
    tokens: int
    prompt: str
    version: int | None
    digest: str | None


class ScoreAnswer(BaseModel):
    """The scores in the order of the inputs."""

    scores: list[Score]
    usage: Usage
    timing: Timing
    warnings: list[str] = []


class LogProbs(BaseModel):
    """Likelihoods of the tokens of a choice."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    """One completion."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: LogProbs | None


class CompletionAnswer(BaseModel):
    """OpenAI's answer of a completion, with the version that answered."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    version: int | None
    digest: str | None
    choices: list[Choice]
    usage: Usage | None
