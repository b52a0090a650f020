"""The families of backbones: from a configuration to its model, and the layout of its batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
from jaxtyping import Int

from jaxprompt.config.errors import UserError
from jaxprompt.data.layout import BatchBudget
from jaxprompt.data.microbatches import micro_rows
from jaxprompt.data.tokenizer import Tokenizer, load_tokenizer
from jaxprompt.models.base import Cache as Cache
from jaxprompt.models.base import Model as Model
from jaxprompt.models.base import ModelConfig as ModelConfig
from jaxprompt.models.base import Params as Params
from jaxprompt.models.base import Runtime as Runtime
from jaxprompt.models.cost import FamilyCost
from jaxprompt.models.decoder import cost as decoder_cost
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.decoder.decoder import DecoderModel
from jaxprompt.models.encoder import cost as encoder_cost
from jaxprompt.models.encoder.config import EncoderConfig
from jaxprompt.models.encoder.encoder import EncoderModel
from jaxprompt.models.ops.attention import per_example
from jaxprompt.models.t5 import cost as t5_cost
from jaxprompt.models.t5.config import T5Config
from jaxprompt.models.t5.t5 import T5Model
from jaxprompt.runtime import parallel

Config = T5Config | DecoderConfig | EncoderConfig
FamilyModel = T5Model | DecoderModel | EncoderModel
AnyModel = TypeVar("AnyModel", bound=Model)


def model_for(config: Config, runtime: Runtime = Runtime()) -> FamilyModel:
    """The model of a configuration, each example of its batches in a row of its own."""
    if isinstance(config, T5Config):
        return T5Model(config, runtime)
    if isinstance(config, EncoderConfig):
        return EncoderModel(config, runtime)
    return DecoderModel(config, runtime)


def cost(config: Config) -> FamilyCost:
    """What a step on this family costs."""
    # each takes models of its own family alone
    if isinstance(config, EncoderConfig):
        return cast(FamilyCost, encoder_cost)
    return cast(FamilyCost, t5_cost if isinstance(config, T5Config) else decoder_cost)


def one_sequence(config: ModelConfig) -> bool:
    """Whether input and target are one sequence, without an EOS between them."""
    return isinstance(config, DecoderConfig)


def masked(config: ModelConfig) -> bool:
    """Whether an answer takes the place of a mask in the input."""
    return isinstance(config, EncoderConfig)


def tokenizer_for(config: ModelConfig, source: str | Path) -> Tokenizer:
    """The tokenizer in a directory, in a GGUF file or of a hub id, for a backbone.

    Raises:
        UserError: there is none, or it does not belong to the backbone.
    """
    if not isinstance(config, EncoderConfig):
        words = load_tokenizer(source, one_sequence=one_sequence(config))
        return words.for_table(config.vocab_size)
    words = load_tokenizer(source, masked=True).for_table(config.vocab_size)
    if words.mask_id != config.mask_id:
        raise UserError(
            f"The mask is token {words.mask_id} of the tokenizer at {str(source)!r} and token "
            f"{config.mask_id} of the backbone; use the tokenizer that belongs to it."
        )
    return words


def check_positions(config: ModelConfig, longest: int, answer: int, prefix: int) -> None:
    """Raise UserError if a row needs more positions than an encoder with a mask has.

    Args:
        longest: tokens of the longest input, with the prompt.
        answer: tokens of the longest answer, which takes the place of one.
        prefix: keys and values of a method's prefix, which takes positions too.
    """
    if not isinstance(config, EncoderConfig):
        return
    needed = longest + answer - 1 + prefix
    if needed > config.longest:
        parts = f" with a prefix of {prefix}" if prefix else ""
        raise UserError(
            f"A row has {needed} tokens with its prompt and answer{parts}, and the backbone has "
            f"{config.longest} positions; lower task.max_input_length or the length of the prompt."
        )


def with_attention(model: AnyModel, attention: str) -> AnyModel:
    """The model with the attention that a prompt was tuned with; an encoder knows only one."""
    return model.with_runtime(attention=attention) if one_sequence(model.config) else model


def _starts_with_prompt(ids: Int[np.ndarray, " s"], length: int, vocab_size: int) -> bool:
    """Whether ids are the ``length`` vectors of one prompt in order, and then only words."""
    if len(ids) <= length:
        return False
    first = ids[0] - vocab_size
    whole = first >= 0 and first % length == 0
    in_order = np.array_equal(ids[:length] - ids[0], np.arange(length))
    return bool(whole and in_order and np.all(ids[length:] < vocab_size))


def by_shared_prefix(
    model: AnyModel, inputs: Sequence[Int[np.ndarray, " _"]], length: int
) -> list[tuple[AnyModel, Int[np.ndarray, " n"]]]:
    """Models for inputs of prompts of ``length`` vectors, and the numbers of the inputs of each.

    A model that reads from left to right can compute a prompt once for all rows that start with it
    and go on with text. The task's template says where the prompt stands, so nearly always there is
    one model for all. The ids of each input are checked: an input without text, say, gets the model
    without a shared prefix. Which model an input gets does not depend on the others.
    """
    numbers = np.arange(len(inputs))
    if not one_sequence(model.config) or model.runtime.attention == "prefix" or not length:
        return [(model, numbers)]
    vocab_size = model.config.vocab_size
    starts = np.array([_starts_with_prompt(ids, length, vocab_size) for ids in inputs], bool)
    pairs = [
        (model.with_layout(shared_prefix_length=length), numbers[starts]),
        (model.with_layout(shared_prefix_length=0), numbers[~starts]),
    ]
    return [(each, chosen) for each, chosen in pairs if len(chosen)]


def with_shared_prefix(
    model: AnyModel, inputs: Sequence[Int[np.ndarray, " _"]], length: int
) -> AnyModel:
    """The one model for all of the inputs of a run, see ``by_shared_prefix``."""
    models = [each for each, _ in by_shared_prefix(model, inputs, length)]
    return models[0] if len(models) == 1 else model.with_layout(shared_prefix_length=0)


# Shorter examples are padded to much the same lengths anyway, and cost more one after another.
_MIN_MEAN_LENGTH, _MIN_EXAMPLES_PER_ROW = 96, 4


def _sharing_rows(
    model: AnyModel, lengths: Sequence[int], rows: int, max_widths: int, target_length: int
) -> AnyModel:
    """The model for batches whose rows several examples of ``lengths`` share.

    It is the model as it is where the device does not attend to one example after another (CPUs
    do), or where such rows are not faster.

    Args:
        model: for examples in rows of their own.
        lengths: of the inputs.
        rows: padded rows that one shared row takes the place of.
        max_widths: see ``plan_microbatches``.
        target_length: tokens of the longest target.
    """
    if not isinstance(model, T5Model) or not model.runtime.per_example_attention:
        return model
    if rows < _MIN_EXAMPLES_PER_ROW or np.mean(lengths) < _MIN_MEAN_LENGTH:
        return model
    if rows * target_length * model.config.vocab_size > parallel.max_logits():
        return model
    widths = per_example.best_widths(lengths, max_widths)
    return model.with_layout(packed_widths=widths, examples_per_row=rows)


def plan_microbatches(
    model: AnyModel,
    lengths: Sequence[int],
    *,
    batch_size: int,
    devices: int,
    rows: int | None = None,
    max_widths: int = 4,
    target_length: int = 1,
) -> tuple[AnyModel, int]:
    """The model for batches of examples of ``lengths``, and the rows of their micro-batches.

    Examples share rows where that is faster.

    Args:
        model: for examples in rows of their own.
        lengths: of the inputs.
        batch_size: examples of a batch.
        devices: that its rows go over.
        rows: None for as many as suit the data and the device.
        max_widths: for how many widths attention is compiled where examples share rows; 0: no
            examples share rows.
        target_length: tokens of the longest target.
    """

    def fitting(positions: int) -> int:
        return rows or micro_rows(
            np.array(lengths), batch_size=batch_size, positions=positions * devices,
            multiple=devices,
        )  # fmt: skip

    if max_widths:
        rows_shared = fitting(parallel.max_positions(shared=True))
        shared = _sharing_rows(model, lengths, rows_shared // devices, max_widths, target_length)
        if shared is not model:
            return shared, rows_shared
    return model, fitting(parallel.max_positions())


def budget(config: ModelConfig, devices: int, *, training: bool) -> BatchBudget:
    """What a batch or a micro-batch may hold on so many devices.

    In training, the rows of a micro-batch suit the mean length (``plan_microbatches``), so this
    bounds only batches that are far longer. In inference a row takes the same time in any batch
    up to this bound.
    """
    times = 8 if training else 2
    targets = parallel.max_logits() * devices // config.vocab_size
    return BatchBudget(times * parallel.max_positions() * devices, targets)
