"""What a tuning method adds to a frozen model: its only input besides weights and a batch.

It is defined with the models, which read it. The methods, which make it, are a layer above.
Letters: see ``jaxprompt.data.virtual_tokens``; r is a rank, m the width of an adapter.
"""

import dataclasses
import functools
from typing import NamedTuple, TypeAlias, no_type_check

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxprompt.config.errors import UserError

Params = dict[str, PyTree]

# A tree like that of the parameters, with dicts for modules. Its leaves are named like parameters
# or modules: "query" of an attention is the ``Projection`` that changes it. In stacked layers each
# array is [K, L, ...], elsewhere [K, ...].
Layers: TypeAlias = dict[str, PyTree]


class KeyValues(NamedTuple):
    """Keys and values of an attention with G heads; a leading L where layers are stacked."""

    key: Float[Array, "*L B S G H"]
    value: Float[Array, "*L B S G H"]


class LowRank(NamedTuple):
    """A product a b that is added to a frozen weight (LoRA, Hu et al. 2021, arXiv 2106.09685).

    The scale, alpha / r, is in ``b``.
    """

    a: Float[Array, "*K in r"]  # ``in`` and ``out`` are the axes of the weight: d, n h or f
    b: Float[Array, "*K r out"]


class Projection(NamedTuple):
    """A change of a projection: x W becomes (x W + x a b + bias) (1 + scale).

    scale: of each result, 0 for none (IA3, Liu et al. 2022, arXiv 2205.05638, section 3.3).
    bias: added to each result (BitFit, Ben Zaken et al. 2021, arXiv 2106.10199).
    dropout: the share of x that a b does not see, where a batch has dropout seeds; see
        ``without_dropout``.
    """

    low_rank: LowRank | None = None
    scale: Float[Array, "*K out"] | None = None
    bias: Float[Array, "*K out"] | None = None
    dropout: Float[Array, "*K"] | None = None


class Prefix(NamedTuple):
    """Keys and values that every query of an attention sees before those of the text.

    They are not projected (Li and Liang 2021, arXiv 2101.00190, section 4.2). In the text they have
    the positions just before the first token.

    used: which of the P there are; a shorter prefix than others ends the P places. None: all.
    """

    key: Float[Array, "*K P G H"]
    value: Float[Array, "*K P G H"]
    used: Bool[Array, "*K P"] | None = None


@no_type_check  # JAX also builds it of what is no array
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["down", "down_bias", "up", "up_bias"],
    meta_fields=["activation", "reads", "scale"],
)
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A bottleneck: scale (activation(h down + down_bias) up + up_bias), added to the residual.

    With x the residual stream before a sublayer and f what the sublayer gives:

    reads: h is "output", f (Houlsby et al. 2019, arXiv 1902.00751); "sum", x + f (Pfeiffer et al.
        2020, arXiv 2005.00247); "input", x, or "normed", x behind the sublayer's norm (parallel, He
        et al. 2021, arXiv 2110.04366).
    """

    down: Float[Array, "*K D m"]
    down_bias: Float[Array, "*K m"]
    up: Float[Array, "*K m D"]
    up_bias: Float[Array, "*K D"]
    activation: str = "relu"
    reads: str = "output"
    scale: float = 1.0


class LabelRows(NamedTuple):
    """What answers instead of the head: a row for each of the C labels of a task.

    A label's logit is the product of its row and what the head would read at the first token of an
    answer, plus its bias (WARP, Hambardzumyan et al. 2021, arXiv 2101.00121, section 3.1).
    """

    rows: Float[Array, "*K C D"]
    bias: Float[Array, "*K C"]


# the place of ``LabelRows`` in the tree of changes
VERBALIZER = "verbalizer"


class Injection(NamedTuple):
    """A pytree with K members on the first axis of every leaf of ``embeddings`` and ``layers``.

    What is None costs nothing: it is decided while tracing. A method yields one; ``Model.prepare``
    fills in what the model computes of it once for all batches, and ``for_rows`` whose rows a batch
    has.
    """

    # the bank of virtual tokens, see data/virtual_tokens.py
    embeddings: Float[Array, "K P D"] | None = None
    # changes of the layers, see ``Layers``
    layers: Layers | None = None
    # a whole model instead of the frozen one: full fine-tuning and pre-training, of one member
    params: Params | None = None
    # keys and values [L, K, P, G, H] of embeddings that lead every row; ``Model.prepare`` alone
    # makes them
    shared_prefix: KeyValues | None = None
    # whose ``layers`` each row of inputs reads; None where K is 1. ``for_rows`` alone sets it
    member: Int[Array, " B"] | None = None

    @property
    def num_members(self) -> int:
        """K; 1 for an injection without leaves of its own."""
        leaves = jax.tree.leaves((self.embeddings, self.layers))
        return len(leaves[0]) if leaves else 1

    def for_rows(self, rows: int, member: Int[Array, " R *G"]) -> "Injection":
        """The injection for a batch of ``rows`` rows of inputs.

        Virtual tokens carry their member in their ids. The changes of layers need it by row, so
        examples of several members may not share one.

        Args:
            member: ``Batch.member``, of each row of targets.

        Raises:
            ValueError: rows of targets have several members.
        """
        if self.layers is None or self.num_members == 1:
            return self
        if member.ndim > 1:
            raise ValueError("Examples of several members share a row; changed layers allow none.")
        # where each row of inputs is answered in several rows of targets, the first is never empty
        return self._replace(member=member.reshape(rows, -1)[:, 0])


def label_rows(injection: Injection) -> LabelRows | None:
    """The rows of a soft verbalizer, with K first; None where the head answers."""
    return (injection.layers or {}).get(VERBALIZER)


def refuse_label_rows(injection: Injection) -> None:
    """Raise a UserError where an answer is to be written, which label rows cannot."""
    if label_rows(injection) is not None:
        raise UserError(
            "The prompt has a soft verbalizer, which chooses among the labels of its task and "
            "writes no text; use eval or predict with that task and task.decoding=rank."
        )


def some_members(
    injection: Injection, numbers: Int[np.ndarray, " k"], length: int | None = None
) -> Injection:
    """The injection of some of the members.

    Args:
        numbers: of the members.
        length: virtual tokens of each of them; None: as many as the bank has.
    """
    take = lambda leaf: leaf[numbers]
    bank = injection.embeddings
    bank = None if bank is None else bank[numbers, :length]
    return injection._replace(embeddings=bank, layers=jax.tree.map(take, injection.layers))


def without_dropout(injection: Injection) -> Injection:
    """What is left of an injection when training is over: it is what an artefact holds."""
    drop = lambda node: node._replace(dropout=None) if _is_projection(node) else node
    layers = jax.tree.map(drop, injection.layers, is_leaf=_is_projection)
    return injection._replace(layers=layers)


def has_dropout(injection: Injection) -> bool:
    """Whether a change of a projection has dropout."""
    changes = jax.tree.leaves(injection.layers, is_leaf=_is_projection)
    return any(_is_projection(node) and node.dropout is not None for node in changes)


def _is_projection(node: PyTree) -> bool:
    return isinstance(node, Projection)


def prefix_length(injection: Injection) -> int:
    """Keys and values of the longest prefix; 0 without any."""
    nodes = jax.tree.leaves(injection.layers, is_leaf=lambda node: isinstance(node, Prefix))
    return max((node.key.shape[-3] for node in nodes if isinstance(node, Prefix)), default=0)


def leaf_at(tree: Params | Layers | None, path: tuple[str, ...]) -> PyTree | None:
    """What is at a path of modules and a name; None where nothing is."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree
