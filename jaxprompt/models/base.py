"""What a model is: a configuration, a way to compute it, and a layout of its batches.

The three parts know nothing of each other. ``Model`` holds them together, and is the interface
through which the rest of the package uses every family of backbones. Batches are the same for all
families: inputs (which carry the virtual tokens) and the targets that answer them. A family decides
by itself whether an encoder reads the inputs, or they are the beginning of one sequence.
"""

import dataclasses
from typing import ClassVar, NamedTuple, TypeVar

import jax
from jaxtyping import Array, Float, Int, PyTree

from jaxprompt.data.batches import AnyArray
from jaxprompt.data.layout import BatchLayout
from jaxprompt.models.injection import Injection, Layers, Params
from jaxprompt.models.label_tree import AnyTree
from jaxprompt.runtime.parallel import SINGLE, Place

Prefill = PyTree  # what ``Model.prefill`` returns: each family has its own type
Cache = PyTree  # what ``Model.init_decode`` returns: each family has its own type


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a checkpoint says of its model; each family adds its own fields. Hashable."""

    family: ClassVar[str]

    vocab_size: int  # V, rows of the embedding table
    d_model: int
    num_heads: int
    head_dim: int
    d_ff: int
    gated: bool = True  # the MLP has wi_0 (activated) times wi_1, else a single wi
    activation: str = "gelu"  # relu | gelu (tanh form) | silu
    tied: bool = False  # the head is the embedding table transposed
    norm_eps: float = 1e-6
    pad_id: int = 0
    eos_id: int = 1


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How a model is computed. Frozen and hashable.

    dtype is float32; bfloat16 (activations and products; parameters are cast at use); or mixed:
    float32, but the operands of matrix products are rounded to bfloat16, with float32 sums and
    results (in decoder-only models not those of attention).
    """

    dtype: str = "float32"
    dropout: float = 0.0  # applied only where a batch has dropout seeds
    unroll: bool = False  # unroll the scan over layers; the parameter tree stays the same
    remat: bool = False  # recompute each layer in the backward pass
    per_example_attention: bool = False  # one example after another: fast on CPUs
    flash: str = ""  # the kernel of an encoder's attention, of flash_attention.py; "": none
    # which tokens a decoder-only model attends to. causal: the earlier ones; prompt: the vectors of
    # a prompt also attend to each other; prefix: all of the input attends to itself (prefix LM)
    attention: str = "causal"
    place: Place = SINGLE  # the part of a mesh that this computation is in

    @property
    def mixed(self) -> bool:
        """Whether products with weights have bfloat16 operands and float32 results."""
        return self.dtype == "mixed"

    @property
    def activations(self) -> str:
        """The dtype of the arrays between the products."""
        return "float32" if self.mixed else self.dtype


class LayerStates(NamedTuple):
    """What the layers make of each row: those that read the text, and those that answer.

    In models of one stack they are the same layers.
    """

    text: Float[Array, "B L S D"]
    answer: Float[Array, "B M D"]  # where the first token of the answer is predicted


M = TypeVar("M", bound="Model")


@dataclasses.dataclass(frozen=True)
class Model:
    """A configuration with its runtime and layout: the static argument of compiled functions.

    All methods are pure functions of their arguments.
    """

    config: ModelConfig
    runtime: Runtime = Runtime()
    layout: BatchLayout = BatchLayout()

    def with_config(self: M, **changes: object) -> M:
        """The model with these fields of its configuration changed."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))

    def with_runtime(self: M, **changes: object) -> M:
        """The model with these fields of its runtime changed."""
        return dataclasses.replace(self, runtime=dataclasses.replace(self.runtime, **changes))

    def with_layout(self: M, **changes: object) -> M:
        """The model with these fields of its batch layout changed."""
        return dataclasses.replace(self, layout=dataclasses.replace(self.layout, **changes))

    def on(self: M, place: Place) -> M:
        """The model within ``place``, for a function given to ``parallel.shard_over_batch``."""
        return self.with_runtime(place=place)

    def init_params(self, key: jax.Array) -> Params:
        """Random float32 parameters."""
        raise NotImplementedError

    def abstract_params(self, dtype: str = "float32") -> Params:
        """Shapes and dtypes of all parameters; nothing is allocated."""
        raise NotImplementedError

    def logical_axes(self) -> Params:
        """The names of the axes of every parameter; those of stacked layers start with "layers"."""
        raise NotImplementedError

    def prepare(self, params: Params, injection: Injection) -> Injection:
        """The injection with what batches need of it, computed once however many rows use it."""
        raise NotImplementedError

    def prefix_of_words(self, params: Params, ids: Int[AnyArray, " P"]) -> Layers:
        """The prefixes that real words are: each attention's keys and values of them.

        An encoder reads the words alone. A decoder reads them behind an encoder that has read them
        too, and that encoder's keys and values are those of cross-attention. In a decoder-only
        model the text that follows is answered as if the words were in front of it.

        Args:
            params: the frozen weights.
            ids: of the words, as they are in a row.

        Returns:
            A ``Prefix`` of one member for every attention, at its place in ``Injection.layers``.
        """
        raise NotImplementedError

    def hidden(
        self, params: Params, inputs: Int[AnyArray, "B S"], segments: Int[AnyArray, "B S"]
    ) -> Float[Array, "B S D"]:
        """What the frozen model makes of each token, for a description of the whole text.

        An encoder's output; in a decoder-only model the residual stream behind the layer in the
        middle, which is divided by its root mean square at each token. (At the first token of a
        sequence it is a thousand times longer than at others: Sun et al. 2024, arXiv 2402.17762.)
        """
        raise NotImplementedError

    def states(
        self,
        params: Params,
        injection: Injection,
        inputs: Int[AnyArray, "B S"],
        segments: Int[AnyArray, "B S"],
    ) -> LayerStates:
        """The residual stream behind each layer, of the inputs and where the answer begins.

        The layout has neither shared rows nor a shared prefix.
        """
        raise NotImplementedError

    def read_out(
        self, params: Params, injection: Injection, states: Float[Array, "B n D"]
    ) -> Float[Array, "B n V"]:
        """Float32 logits of states through the final norm and the output matrix.

        Those of the last of ``LayerStates.answer`` are the logits of an answer's first token; those
        of earlier ones are the logit lens (nostalgebraist 2020).
        """
        raise NotImplementedError

    def logits(
        self,
        params: Params,
        injection: Injection,
        inputs: Int[AnyArray, "B S"],
        segments: Int[AnyArray, "B S"],
        targets: Int[AnyArray, "R T"],
        target_segments: Int[AnyArray, "R T"],
        dropout_seed: Int[AnyArray, " R"] | None = None,
    ) -> Float[Array, "R T V"]:
        """Float32 logits of every target token given the input and the target tokens before it.

        There are V columns, so no virtual token can ever be predicted. R is B or, where examples
        share rows, ``layout.examples_per_row`` times B.

        Args:
            params: the frozen weights, or those of a whole model that is trained.
            injection: what ``prepare`` returned; ``Injection()`` for the model as it is.
            inputs: ids, which may be virtual.
            segments: of the inputs; 0 is padding.
            targets: ids.
            target_segments: a segment answers the input segment of the same number.
            dropout_seed: of each example; None for no dropout.
        """
        raise NotImplementedError

    def prefill(
        self,
        params: Params,
        injection: Injection,
        inputs: Int[AnyArray, "B S"],
        segments: Int[AnyArray, "B S"],
        dropout_seed: Int[AnyArray, " R"] | None = None,
    ) -> Prefill:
        """Read the inputs once, so that they can be answered any number of times.

        dropout_seed: of each example; None for no dropout.
        """
        raise NotImplementedError

    def score_tree(
        self,
        params: Params,
        injection: Injection,
        prefill: Prefill,
        tree: AnyTree,
        dropout_seed: Int[AnyArray, " R"] | None = None,
    ) -> Float[Array, "R n V"]:
        """Float32 logits after each of the n beginnings of an answer in ``tree``.

        R is B or, where examples share rows, ``layout.examples_per_row`` times B.

        tree: of all rows, with leaves [n, ...]; or one for each row, with leaves [R, n, ...].
        dropout_seed: that ``prefill`` got; None for no dropout.
        """
        raise NotImplementedError

    def init_decode(
        self, params: Params, injection: Injection, prefill: Prefill, length: int
    ) -> tuple[Int[Array, " B"], Cache]:
        """The ids that generation begins with, and an empty cache for ``length`` tokens."""
        raise NotImplementedError

    def decode_step(
        self,
        params: Params,
        injection: Injection,
        cache: Cache,
        ids: Int[Array, " B"],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits after ``ids`` at position ``index`` of the answer, and the cache filled there."""
        raise NotImplementedError

    def tile_cache(self, cache: Cache, times: int) -> Cache:
        """A cache in which each row is repeated ``times`` times, one after another."""
        raise NotImplementedError

    def gather_beams(self, cache: Cache, rows: Int[Array, " B"]) -> Cache:
        """A cache in which the answer of row i is that of row ``rows[i]``.

        The inputs stay where they are: beams of one row share them.
        """
        raise NotImplementedError
