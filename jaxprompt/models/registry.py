"""What every family of backbones can do; the rest of the package knows no other way in.

A family is a module with the functions of ``Family``. Batches are the same for all of them: inputs
(which carry the virtual tokens) and the targets that answer them. Whether an encoder reads the
inputs, or they are the beginning of one sequence, is the family's own matter.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, cast

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprompt.data.batches import Room, Widths, micro_rows
from jaxprompt.models.decoder import decoder
from jaxprompt.models.decoder.config import LlamaConfig
from jaxprompt.models.label_tree import Tree
from jaxprompt.models.ops.attention import per_example
from jaxprompt.models.t5 import cost as t5_cost
from jaxprompt.models.t5 import t5
from jaxprompt.models.t5.config import T5Config
from jaxprompt.runtime import parallel

Config = T5Config | LlamaConfig
AnyConfig = TypeVar("AnyConfig", bound=Config)
Params = dict[str, Any]
Prompts = Any  # what ``prepare`` makes
Reading = Any  # what ``read`` makes
Cache = Any  # what ``start`` makes


class Family(Protocol):
    """The functions of a family's module; all are pure."""

    def prepare(self, params: Params, bank: Float[Array, "K P D"] | None, config: Any) -> Prompts:
        """What batches need of the prompts, computed once however many rows use them."""
        ...

    def logits(
        self,
        params: Params,
        prompts: Prompts,
        config: Any,
        inputs: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        targets: Int[Array, "B T"],
        target_segments: Int[Array, "B T"],
        noise: Int[Array, " R"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits of every target token given the input and the target tokens before it.

        A target segment answers the input segment of the same number. There are V columns, so no
        virtual token can ever be predicted. noise: what dropout is drawn from; None: none is.
        """
        ...

    def read(
        self,
        params: Params,
        prompts: Prompts,
        config: Any,
        inputs: Int[Array, "B S"],
        segments: Int[Array, "B S"],
    ) -> Reading:
        """The inputs, read once, to be answered any number of times."""
        ...

    def answer_logits(
        self,
        params: Params,
        prompts: Prompts,
        config: Any,
        reading: Reading,
        tree: Tree,
    ) -> Float[Array, "R n V"]:
        """Float32 logits after each of n beginnings of an answer, for inputs that have been read.

        R is B, or ``widths(config).shared`` times that where examples share rows.
        """
        ...

    def start(
        self, params: Params, config: Any, reading: Reading, length: int
    ) -> tuple[Int[Array, " B"], Cache]:
        """Ids that generation begins with, and a cache for ``length`` of them."""
        ...

    def step(
        self,
        params: Params,
        prompts: Prompts,
        config: Any,
        cache: Cache,
        ids: Int[Array, " B"],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits after ``ids`` at position ``index`` of the answer."""
        ...

    def repeat(self, cache: Cache, times: int) -> Cache:
        """A cache in which each row stands so many times, one after another."""
        ...

    def reorder(self, cache: Cache, rows: Int[Array, " B"]) -> Cache:
        """What was written for these rows in the places of all; the inputs of each stay."""
        ...

    def init_params(self, config: Any, key: jax.Array) -> Params:
        """Random float32 parameters."""
        ...

    def abstract_params(self, config: Any, dtype: str = "float32") -> Params:
        """Shapes and dtypes of all parameters."""
        ...

    def logical_axes(self, config: Any) -> dict[str, Any]:
        """Names of every parameter's axes."""
        ...


_FAMILIES: dict[type, Any] = {T5Config: t5, LlamaConfig: decoder}


def model_for(config: Config) -> Family:
    """The family of a config."""
    return cast(Family, _FAMILIES[type(config)])


def cost(config: Config) -> Any:
    """What a step on this family costs (``activations``, ``flops``); None if it is not counted."""
    return t5_cost if isinstance(config, T5Config) else None


def one_sequence(config: Config) -> bool:
    """Whether input and target are one sequence: their texts then meet without an end between."""
    return isinstance(config, LlamaConfig)


def with_attention(config: AnyConfig, attention: str) -> AnyConfig:
    """The config with the attention that a prompt was tuned with; an encoder knows only one."""
    return replace(config, attention=attention) if isinstance(config, LlamaConfig) else config


def with_shared_prefix(
    config: AnyConfig, inputs: Sequence[Int[np.ndarray, " s"]], length: int
) -> AnyConfig:
    """The config for inputs of which each may start with the ``length`` vectors of one prompt.

    Where all of them do, and have text after it, a model that reads from left to right can compute
    the prompt's share once for all rows. It is looked up in the ids, never taken on trust.
    """
    if not isinstance(config, LlamaConfig) or config.attention == "prefix" or not length:
        return config
    offsets = np.arange(length)

    def leads(ids: np.ndarray) -> bool:
        if len(ids) <= length:
            return False
        first = ids[0] - config.vocab_size
        return first >= 0 and first % length == 0 and np.array_equal(ids[:length] - ids[0], offsets)

    whole = all(leads(ids) and np.all(ids[length:] < config.vocab_size) for ids in inputs)
    return replace(config, leading=length if whole and len(inputs) else 0)


# shorter ones are padded to much the same lengths anyway, and cost more one by one
_SHORTEST_SHARED, _FEWEST_SHARED = 96, 4


def _sharing_rows(
    config: AnyConfig, lengths: Sequence[int], rows: int, most_widths: int, depth: int
) -> AnyConfig:
    """The config for batches whose rows several examples of ``lengths`` share.

    Where the device attends to one example after another (CPUs), and a row that holds what else
    would be ``rows`` of padded ones is worth it; else the config as it is. ``depth``: of targets.
    """
    if not isinstance(config, T5Config) or not config.rows_in_turn:
        return config
    if rows < _FEWEST_SHARED or np.mean(lengths) < _SHORTEST_SHARED:
        return config
    if rows * depth * config.vocab_size > parallel.logits():
        return config
    widths = per_example.best_widths(lengths, most_widths)
    return replace(config, packed=widths, shared=rows)


def plan_microbatches(
    config: AnyConfig,
    lengths: Sequence[int],
    *,
    batch_size: int,
    devices: int,
    rows: int | None = None,
    share: bool = True,
    most_widths: int = 4,
    depth: int = 1,
) -> tuple[AnyConfig, int]:
    """The config for batches of examples of ``lengths``, and the rows of their micro-batches.

    Examples share rows where that is faster and ``share`` allows it. rows: None for as many as
    suit the data and the device. most_widths: that attention is compiled for, each for itself.
    depth: tokens of the longest target.
    """

    def fitting(positions: int) -> int:
        return rows or micro_rows(
            np.array(lengths), batch_size=batch_size, positions=positions * devices,
            multiple=devices,
        )  # fmt: skip

    many, few = fitting(parallel.positions(shared=True)), fitting(parallel.positions())
    shared = config
    if share:
        shared = _sharing_rows(config, lengths, many // devices, most_widths, depth)
    return (config, few) if shared is config else (shared, many)


def room(config: Config, devices: int, *, training: bool) -> Room:
    """What a batch or a micro-batch may hold on so many devices.

    Rows of a micro-batch suit the mean length (``cut``), so in training this stops only what is far
    beyond it. Of answers, rows of any number up to it take as long each.
    """
    times = 8 if training else 2
    targets = parallel.logits() * devices // config.vocab_size
    return Room(times * parallel.positions() * devices, targets)


def widths(config: Config) -> Widths:
    """How wide batches for this config become: a prompt computed once takes no columns."""
    if isinstance(config, LlamaConfig):
        return Widths(config.leading, fine=True)
    return Widths(packed=max(config.packed, default=0), shared=config.shared)
