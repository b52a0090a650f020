"""What is trained in a step, and what that adds to its operations and to what it keeps.

Everything is counted from shapes: of a model's products with weights, and of the arrays of an
injection (``models/injection.py``), whose leaves are ``jax.ShapeDtypeStruct`` here. No method has a
case of its own. Letters: see ``jaxprompt.data.virtual_tokens``; r is a rank, m the width of an
adapter.

A product of a positions' ``inputs`` numbers with a weight takes 2 inputs outputs operations
(Kaplan et al. 2020, arXiv 2001.08361, section 2.1). The gradient of each of its operands takes as
many again, where it is needed; and for the gradient of one operand the other is kept.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, cast, runtime_checkable

import jax
from jax.extend.core import Jaxpr, jaxprs_in_params
from jaxtyping import Array

from jaxprompt.models.base import Model, ModelConfig
from jaxprompt.models.injection import Adapter, Injection, Layers, Prefix, Projection, leaf_at
from jaxprompt.models.ops.activations import ACTIVATIONS
from jaxprompt.models.work import Work

FLOAT32, BFLOAT16 = 4, 2  # bytes

# a prompt of one member, of whichever length
A_PROMPT = Injection(cast(Array, jax.ShapeDtypeStruct((1, 1, 1), "float32")))
# the frozen model: what a forward pass alone takes
NOTHING = Injection()


class Product(NamedTuple):
    """A product with a weight, in each layer of a stack.

    reads: what it reads, by name: what several products read is kept once.
    inputs, outputs: numbers that it reads and gives; ``times`` as many where each head has some.
    positions: of all rows.
    """

    weight: str
    reads: str
    inputs: int
    outputs: int
    positions: int
    times: int = 1

    @property
    def operations(self) -> int:
        """Floating-point operations of a forward pass in one layer."""
        return 2 * self.inputs * self.outputs * self.times * self.positions


class Sublayer(NamedTuple):
    """An attention or an MLP in each of ``depth`` layers.

    path: of its module in the tree of parameters.
    queries: numbers of one position that attend to keys, N H; 0 for an MLP.
    heads: N; 0 for an MLP.
    """

    path: tuple[str, ...]
    depth: int
    products: tuple[Product, ...]
    queries: int = 0
    heads: int = 0

    @property
    def positions(self) -> int:
        """Positions whose residual stream it reads."""
        return self.products[0].positions

    @property
    def operations(self) -> int:
        """Floating-point operations of a forward pass, in all layers, with weights."""
        return self.depth * sum(product.operations for product in self.products)


@runtime_checkable
class FamilyCost(Protocol):
    """What a step on a family of models costs; each is a module, ``cost`` of its package.

    Args of all: ``injection`` has shapes of what is trained, ``A_PROMPT`` if left out.
    """

    def activations(
        self, model: Model, work: Work, num_shards: int, injection: Injection = A_PROMPT
    ) -> dict[str, int]:
        """Bytes on a device: ``saved_activations`` and ``workspace``.

        The first is what is kept for the backward pass, the second the most that the gradients of
        one layer's MLP or attention, or the logits, take meanwhile.

        Args:
            num_shards: devices that share heads, MLP and vocabulary.
        """
        ...

    def shared(self, model: Model, work: Work, num_shards: int) -> int:
        """Bytes that a device receives for a micro-batch from those that share heads and MLP."""
        ...

    def flops(
        self,
        config: ModelConfig,
        rows: int,
        inputs: int,
        targets: int,
        injection: Injection = A_PROMPT,
        shared_prefix: int = 0,
    ) -> dict[str, float]:
        """Floating-point operations of a step by part, forward and backward.

        Args:
            rows: of all members and devices.
            inputs: positions of a row, with its prompt.
            shared_prefix: those of them that are computed once for all rows of a member.
        """
        ...

    def recomputed(
        self,
        config: ModelConfig,
        rows: int,
        inputs: int,
        targets: int,
        injection: Injection = A_PROMPT,
        shared_prefix: int = 0,
    ) -> float:
        """Floating-point operations that rematerialised layers repeat, with the args of ``flops``.

        It is a forward pass of the layers that have gradients, without the last product of each: no
        gradient needs its result.
        """
        ...

    def depth(self, config: ModelConfig) -> int:
        """The number of layers of all stacks."""
        ...


def learns(injection: Injection, stack: str | None = None) -> bool:
    """Whether anything is trained in a stack, or in what it reads.

    Args:
        stack: a module of the tree; None: any.
    """
    if injection.params is not None or injection.embeddings is not None:
        return True
    layers = injection.layers or {}
    return bool(layers) if stack is None else stack in layers


def _changes(injection: Injection, sublayer: Sublayer) -> Layers:
    return leaf_at(injection.layers, sublayer.path) or {}


_ADAPTERS = {
    "attention": "attention_adapter",
    "self_attention": "attention_adapter",
    "cross_attention": "cross_attention_adapter",
    "mlp": "mlp_adapter",
}


def _adapter(injection: Injection, sublayer: Sublayer) -> Adapter | None:
    *modules, name = sublayer.path
    return leaf_at(injection.layers, (*modules, _ADAPTERS[name]))


def _low_ranks(changes: Layers, sublayer: Sublayer) -> Iterator[tuple[Product, int]]:
    """The products that have a low-rank change, and its rank."""
    for product in sublayer.products:
        change: Projection | None = changes.get(product.weight)
        if change is not None and change.low_rank is not None:
            yield product, change.low_rank.a.shape[-1]


def operations_of_parts(sublayers: Sequence[Sublayer], injection: Injection) -> int:
    """Floating-point operations, forward and backward, of what is beside the weights.

    Low-rank products (Hu et al. 2021, arXiv 2106.09685, section 4.1), adapters (Houlsby et al.
    2019, arXiv 1902.00751, section 2.1), and attention to a prefix (Li and Liang 2021, arXiv
    2101.00190, section 4.2). Both operands have gradients. Scales and biases have no product.
    """
    total = 0
    for sublayer in sublayers:
        changes, adapter = _changes(injection, sublayer), _adapter(injection, sublayer)
        for product, rank in _low_ranks(changes, sublayer):
            numbers = rank * (product.inputs + product.outputs) * product.times
            total += 6 * sublayer.depth * product.positions * numbers
        if adapter is not None:
            d_model, width = adapter.down.shape[-2:]
            total += 6 * sublayer.depth * sublayer.positions * 2 * d_model * width
        prefix: Prefix | None = changes.get("prefix")
        if prefix is not None:
            length = prefix.key.shape[-3]
            total += 6 * sublayer.depth * sublayer.positions * 2 * length * sublayer.queries
    return total


def last_products(sublayers: Sequence[Sublayer]) -> int:
    """Floating-point operations, forward, of what ends the layers of a stack."""
    return sublayers[-1].depth * sublayers[-1].products[-1].operations


ENCODED = "encoded"  # what all layers of a decoder read: it is kept once anyway


def saved_by_layer(sublayer: Sublayer, injection: Injection, size: int, mixed: bool = False) -> int:
    """Bytes that the gradients of what is trained keep in a layer, beside those of a frozen layer.

    What a product reads is kept where its weight or a low-rank change of it is trained, so for
    LoRA the inputs behind the norm and the r numbers between the factors. A scale keeps what it
    scales. An adapter keeps what it reads, unless that is kept anyway, and what its activation and
    its second matrix need. A prefix keeps the logits and the weights of its keys.

    Args:
        size: bytes of a number between the products.
        mixed: products of trained weights keep what they have rounded to bfloat16, each for itself.
    """
    changes, adapter = _changes(injection, sublayer), _adapter(injection, sublayer)
    reads: dict[str, int] = {ENCODED: 0}
    numbers = 0
    for product in sublayer.products:
        change: Projection | None = changes.get(product.weight)
        if injection.params is not None and mixed:
            numbers += product.inputs * product.times * product.positions * BFLOAT16 // size
        elif injection.params is not None:
            reads.setdefault(product.reads, product.inputs * product.times * product.positions)
        if change is not None and change.scale is not None:
            # also where each head reads vectors of its own, it scales H numbers of each head
            numbers += math.prod(change.scale.shape[2:]) * product.positions
    for product, rank in _low_ranks(changes, sublayer):
        dropped = changes[product.weight].dropout is not None  # what each reads is its own
        read = product.weight if dropped else product.reads
        reads.setdefault(read, product.inputs * product.times * product.positions)
        numbers += rank * product.times * product.positions
    if "hidden" in changes:
        numbers += math.prod(changes["hidden"].shape[2:]) * sublayer.positions
    if adapter is not None:
        d_model, width = adapter.down.shape[-2:]
        numbers += (1 + _saved_by_activation(adapter.activation)) * width * sublayer.positions
        if adapter.reads == "normed":
            reads.setdefault("input", d_model * sublayer.positions)
        elif adapter.reads != "input":
            numbers += d_model * sublayer.positions
    total = (numbers + sum(reads.values())) * size
    prefix: Prefix | None = changes.get("prefix")
    if prefix is not None:
        total += 2 * FLOAT32 * sublayer.positions * sublayer.heads * prefix.key.shape[-3]
    return total


@functools.lru_cache
def _saved_by_activation(name: str) -> int:
    """Numbers that an activation keeps of each number that it reads."""
    back = lambda x: jax.vjp(ACTIVATIONS[name], x)[1]
    kept = jax.eval_shape(back, jax.ShapeDtypeStruct((2,), "float32"))
    return sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(kept)) // (2 * FLOAT32)


def gathered_by_layers(injection: Injection, rows: int) -> int:
    """Bytes of what each row gathers of its own member, in all layers; 0 for one member."""
    leaves = jax.tree.leaves(injection.layers)
    members = injection.num_members
    if members == 1:
        return 0
    return sum(rows * math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in leaves)


def operations_of_network(program: Jaxpr) -> int:
    """Floating-point operations of all matrix products of a program, as often as loops repeat them.

    It is for the networks that make an injection, such as the MLP of prefix tuning.
    """
    total = 0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            first, result = (cast(Array, x.aval) for x in (equation.invars[0], equation.outvars[0]))
            total += 2 * math.prod(result.shape) * math.prod(first.shape[i] for i in contracted)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(map(operations_of_network, jaxprs_in_params(equation.params)))
    return total
