"""The shapes of what a run trains: parameters, bytes of the state and of what is stored.

Nothing is computed but the random start of a member, whose shapes are taken.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxprompt.config.schema import RunConfig
from jaxprompt.methods.base import Method, Trainables, grouped, join_groups
from jaxprompt.methods.registry import method_of
from jaxprompt.models import registry
from jaxprompt.models.cost import operations_of_network
from jaxprompt.models.injection import Injection, without_dropout
from jaxprompt.runtime import parallel
from jaxprompt.training.optimizer import per_member
from jaxprompt.training.search import of_vectors
from jaxprompt.training.step import TrainState
from jaxprompt.training.trial import structure_of


@runtime_checkable
class MeshSizes(Protocol):
    """The devices along each axis of a mesh."""

    @property
    def data(self) -> int: ...
    @property
    def fsdp(self) -> int: ...
    @property
    def tensor(self) -> int: ...


class MemberShapes(NamedTuple):
    """What one member of a run has.

    parameters: that are trained.
    stored_bytes: of the arrays of its artefact. Networks that only make them are not stored.
    """

    parameters: int
    stored_bytes: int


class TrainedShapes(NamedTuple):
    """What the members of a run train.

    injection: of all members, with shapes instead of arrays.
    states: of the members of each structure.
    network_flops: of a step, for what makes the injection.
    """

    members: tuple[MemberShapes, ...]
    injection: Injection
    states: tuple[TrainState, ...]
    network_flops: float

    @property
    def whole(self) -> bool:
        """Whether the whole model is trained."""
        return self.injection.params is not None

    def state_bytes(
        self, model: registry.FamilyModel, sizes: MeshSizes, micro_batches: int = 1
    ) -> int:
        """Bytes that a device has of trainables, gradient and moments.

        The weights of a whole model are not among them, and its gradient and moments are divided as
        these are. Of several micro-batches, the sum of the gradients is there beside the gradient
        of one.
        """
        held = sum(self._on_device(state, model, sizes) for state in self.states)
        copies = 1 + (micro_batches > 1) - self.whole
        return held + copies * self.gradient_bytes(model, sizes)

    def gradient_bytes(self, model: registry.FamilyModel, sizes: MeshSizes) -> int:
        """Bytes that a device has of a gradient."""
        return sum(self._on_device(state.trainables, model, sizes) for state in self.states)

    def _on_device(self, tree: PyTree, model: registry.FamilyModel, sizes: MeshSizes) -> int:
        return _size_on_device(tree, model, sizes) if self.whole else _size(tree)

    def gradient_traffic(self, model: registry.FamilyModel, sizes: MeshSizes) -> int:
        """Bytes that a device receives in a step where gradients are added up around a ring.

        Devices of ``fsdp`` that share a whole model exchange its gradient in the layers.
        """
        ways = sizes.data if self.whole else sizes.data * sizes.fsdp
        return 2 * self.gradient_bytes(model, sizes) * (ways - 1) // ways


def trained_shapes(config: RunConfig, shape: registry.Config) -> TrainedShapes:
    """The shapes of what a run trains on a model.

    Raises:
        UserError: the settings of the method do not fit the model.
    """
    params = registry.model_for(shape).abstract_params()
    groups: dict[object, list[RunConfig]] = {}
    for member in config.members():
        groups.setdefault(structure_of(member, member.prompt_length), []).append(member)
    methods = [method_of(members[0]) for members in groups.values()]
    states = [
        _state(members, method, params, shape.d_model)
        for members, method in zip(groups.values(), methods, strict=True)
    ]
    injections = [
        without_dropout(jax.eval_shape(method.inject, state.trainables, params))
        for method, state in zip(methods, states, strict=True)
    ]
    of_group = {
        key: MemberShapes(
            _count(state.trainables) // len(members), _size(injection) // len(members)
        )
        for (key, members), state, injection in zip(groups.items(), states, injections, strict=True)
    }
    whole = grouped(methods)
    trainables = join_groups([state.trainables for state in states])
    program = jax.make_jaxpr(whole.inject)(trainables, params)
    return TrainedShapes(
        tuple(of_group[structure_of(one, one.prompt_length)] for one in config.members()),
        jax.eval_shape(whole.inject, trainables, params),
        tuple(states),
        3 * operations_of_network(program.jaxpr),
    )


def optimizer_of(members: Sequence[RunConfig]) -> optax.GradientTransformation:
    """The optimizer of members of one method, each with the learning rates of its parts."""
    rates = [member.learning_rates() for member in members]
    lone = len(members[0].parts) == 1
    peaks = [next(iter(each.values())) for each in rates] if lone else rates
    optimizer = per_member(members[0].train, peaks)
    return of_vectors(optimizer) if members[0].searches else optimizer


def _state(
    members: Sequence[RunConfig], method: Method, params: registry.Params, d_model: int
) -> TrainState:
    """The state of members of one structure."""
    first, optimizer = members[0], optimizer_of(members)
    start = np.zeros((1, method.num_start_vectors(first.prompt), d_model), np.float32)

    def begin(params: registry.Params) -> TrainState:
        trainables: Trainables = method.init(params, start, first.prompt, first.train.seed)
        each = jax.tree.map(lambda x: jnp.repeat(x, len(members), axis=0), trainables)
        return TrainState(jnp.int32(0), each, optimizer.init(each))

    return jax.eval_shape(begin, params)


def _count(tree: PyTree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _size(tree: PyTree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _size_on_device(tree: PyTree, model: registry.FamilyModel, sizes: MeshSizes) -> int:
    """Bytes of a device of what belongs to the weights of a model, see ``step.shardings``."""
    known = model.abstract_params(), model.logical_axes()

    def one(x: jax.ShapeDtypeStruct, names: tuple[str | None, ...]) -> int:
        parts = 1
        for size, name in zip(x.shape, names, strict=True):
            devices = getattr(sizes, parallel.RULES.get(str(name), ""), 1)
            parts *= devices if size % devices == 0 else 1
        return math.prod(x.shape) * x.dtype.itemsize // parts

    return sum(jax.tree.leaves(jax.tree.map(one, tree, parallel.trained_axes(tree, *known))))
