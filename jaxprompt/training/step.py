"""The train step: pure, jitted once, over a mesh; gradients for the method's trainables alone."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxprompt.config.schema import PromptConfig
from jaxprompt.data.batches import Batch
from jaxprompt.losses import LabelLoss, Loss, Losses, LossSums, cross_entropy, sums_of
from jaxprompt.methods.base import (
    Method,
    Trainables,
    join_groups,
    member_groups,
    num_members,
    split_by_group,
)
from jaxprompt.models import registry
from jaxprompt.models.injection import Injection
from jaxprompt.models.label_scores import token_scores
from jaxprompt.models.ops import quantization
from jaxprompt.runtime import parallel, processes


class TrainState(NamedTuple):
    """All that training changes: kilobytes for a prompt."""

    step: Int[Array, ""]
    trainables: Trainables
    optimizer: optax.OptState


class StepSums(NamedTuple):
    """What adds up over the micro-batches of a step; the gradient is that of the summed loss."""

    gradient: Trainables
    losses: LossSums

    def mean_gradient(self) -> Trainables:
        """The gradient of each member's mean over all of its target tokens."""
        num_tokens = jnp.maximum(self.losses.num_tokens, 1.0)
        share = lambda x, by: x / by.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
        groups = member_groups(self.gradient)
        mean = [
            jax.tree.map(functools.partial(share, by=tokens), group)
            for group, tokens in zip(groups, split_by_group(num_tokens, self.gradient), strict=True)
        ]
        return join_groups(mean)


def batch_losses(
    params: registry.Params,
    injection: Injection,
    model: registry.Model,
    batch: Batch,
    *,
    num_members: int,
    z_loss: float = 0.0,
    loss: Loss | LabelLoss | None = None,
) -> tuple[Float[Array, ""], Losses]:
    """The objective (the sum over members of each member's own mean) and what it is made of.

    A member's mean is over its own target tokens, so its gradient does not depend on what else
    shares the batch. ``z_loss`` times log(Z)^2 is in the objective, not in the reported loss.
    There is dropout if the batch has dropout seeds. ``loss``: see ``make_train_step``.
    """
    loss = cross_entropy(z_loss) if loss is None else loss
    objective, sums = summed_losses(params, injection, model, batch, num_members, loss)
    return jnp.sum(objective / jnp.maximum(sums.num_tokens, 1.0)), sums.means()


def summed_losses(
    params: registry.Params, injection: Injection, model: registry.Model, batch: Batch,
    num_members: int, loss: Loss | LabelLoss,
) -> tuple[Float[Array, " K"], LossSums]:  # fmt: skip
    """The objective of each member and what is reported, as sums over target tokens."""
    arrays: PyTree = jax.tree.map(jnp.asarray, batch)
    params = params if injection.params is None else injection.params
    prepared = model.prepare(params, injection).for_rows(len(arrays.inputs), arrays.member)
    inputs, seeds = (arrays.inputs, arrays.segments), arrays.dropout_seed
    if isinstance(loss, LabelLoss):
        scores = token_scores(params, prepared, model, *inputs, loss.labels, seeds)
        return loss(scores, arrays, num_members)
    targets = arrays.targets, arrays.target_segments
    logits = model.logits(params, prepared, *inputs, *targets, seeds)
    return loss(logits, arrays, num_members)


Step = Callable[[TrainState, registry.Params, Sequence[Batch]], tuple[TrainState, Losses]]


class TrainStep:
    """A compiled ``(state, params, micro-batches) -> (state, losses)``, see ``make_train_step``."""

    def __init__(self, functions: "StepFunctions"):
        self._frozen = functions.method.frozen
        self._single_step = jax.jit(functions.single_step, donate_argnums=0)
        self._accumulate = jax.jit(functions.accumulate, donate_argnums=0)
        self._apply_gradients = jax.jit(functions.apply_gradients, donate_argnums=0)
        spread = functions.zeros_sharding()
        self._zero_grads = jax.jit(functions.zero_grads, out_shardings=spread)
        self._params: registry.Params | None = None  # of the last call
        self._frozen_params: registry.Params = {}  # these, in the form that the step takes

    def __call__(
        self, state: TrainState, params: registry.Params, batches: Sequence[Batch]
    ) -> tuple[TrainState, Losses]:
        if self._frozen:
            params = self._as_bits(params)
        if len(batches) == 1:
            return self._single_step(state, params, batches[0])
        sums = self._zero_grads(state.trainables)
        for batch in batches:
            sums = self._accumulate(sums, state.trainables, params, batch)
        return self._apply_gradients(state, sums)

    def lower(
        self, state: TrainState, params: registry.Params, batches: Sequence[Batch]
    ) -> jax.stages.Lowered:
        """The program that holds most in a step: the whole, or the gradient of a micro-batch."""
        if self._frozen:
            params = self._as_bits(params)
        if len(batches) == 1:
            return self._single_step.lower(state, params, batches[0])
        sums = self._zero_grads(state.trainables)
        return self._accumulate.lower(sums, state.trainables, params, batches[0])

    def _as_bits(self, params: registry.Params) -> registry.Params:
        if self._params is not params:
            self._params, self._frozen_params = params, quantization.view_as_uint16(params)
        return self._frozen_params


class StepFunctions:
    """The pure functions that a step is made of; ``TrainStep`` compiles them.

    Sums are stacked: each device has those of its own rows, along a new first axis.
    """

    def __init__(
        self,
        model: registry.Model,
        method: Method,
        optimizer: optax.GradientTransformation,
        loss: Loss | LabelLoss,
        mesh: Mesh | None,
    ):
        self.method = method
        self._model, self._optimizer, self._loss, self._mesh = model, optimizer, loss, mesh
        # the mesh, if its devices share the trained weights
        shares = not method.frozen and parallel.divides_weights(mesh)
        self._shared_by = mesh if shares else None
        divided = method.frozen or shares
        self._axes = model.logical_axes() if divided else None
        self._place = parallel.place_in(mesh, divided=divided, trained=shares)
        self._placed = model.on(self._place)  # for what each device computes of its own rows

    def single_step(
        self, state: TrainState, params: registry.Params, batch: Batch
    ) -> tuple[TrainState, Losses]:
        """A step on a batch that is not cut into micro-batches."""
        return self.apply_gradients(state, self._stacked_sums(params, state.trainables, batch))

    def accumulate(
        self, sums: StepSums, trainables: Trainables, params: registry.Params, batch: Batch
    ) -> StepSums:
        """The sums with those of one more micro-batch."""
        return jax.tree.map(jnp.add, sums, self._stacked_sums(params, trainables, batch))

    def apply_gradients(self, state: TrainState, sums: StepSums) -> tuple[TrainState, Losses]:
        """The state after the step that has these sums."""
        sums = parallel.psum_over_batch(sums, self._mesh, self._specs(state.trainables))
        gradient = sums.mean_gradient()
        updates, opt_state = self._optimizer.update(gradient, state.optimizer, state.trainables)
        trainables = optax.apply_updates(state.trainables, updates)
        state = TrainState(state.step + 1, trainables, opt_state)
        if self._shared_by is not None:
            spread = shardings(state, self.method, self._model, self._shared_by)
            state = jax.lax.with_sharding_constraint(state, spread)
        return state, sums.losses.means()

    def _sums_of_rows(self, params, trainables: Trainables, batch: Batch) -> StepSums:
        """The sums of the rows that one device has."""
        if self._model.runtime.dropout > 0 and batch.dropout_seed is None:
            raise ValueError(
                "A batch without dropout seeds has no dropout; give its examples some."
            )

        def objective(trainables):
            injection = self.method.inject(trainables, params)
            if self._shared_by is not None:
                whole = parallel.gather_params(injection.params, self._axes, self._place)
                injection = injection._replace(params=whole)
            each, sums = summed_losses(
                params, injection, self._placed, batch, num_members(trainables), self._loss
            )
            return jnp.sum(each), sums

        gradient, sums = jax.grad(objective, has_aux=True)(trainables)
        return StepSums(gradient, sums)

    def _stacked_sums(self, params, trainables, batch):
        """The sums of each device's own rows, along a new first axis."""
        if self._shared_by is None:
            work = parallel.shard_over_batch(
                self._sums_of_rows, self._mesh, self._axes, stacked=True
            )
            return work(params, trainables, batch)
        # each device passes its part of the trained weights in place of the parameters
        work = parallel.shard_over_batch(
            lambda trainables, _, batch: self._sums_of_rows({}, trainables, batch),
            self._shared_by,
            lambda trainables: self._specs(trainables).gradient,
            stacked=True,
            results=self._specs_of_sums,
        )
        specs = parallel.stacked_specs(self._specs(trainables))
        place = parallel.named_shardings(self._shared_by, specs)
        return jax.lax.with_sharding_constraint(work(trainables, {}, batch), place)

    def zero_grads(self, trainables: Trainables) -> StepSums:
        """The sums of no rows."""
        if self._shared_by is not None:
            each = jnp.zeros(num_members(trainables))
            sums = StepSums(trainables, sums_of(self._loss, each))
            return parallel.stacked_zeros(sums, self._shared_by, self._specs(trainables))
        shards = parallel.num_batch_shards(self._mesh)
        gradient = jax.tree.map(lambda x: jnp.zeros((shards, *x.shape), x.dtype), trainables)
        each = jnp.zeros((shards, num_members(trainables)))
        return StepSums(gradient, sums_of(self._loss, each))

    def zeros_sharding(self) -> NamedSharding | None:
        """Where ``zero_grads`` are, if they do not say so themselves."""
        return None if self._shared_by else parallel.batch_sharding(self._mesh)

    def _specs(self, trainables: Trainables) -> PyTree:
        """How the sums are spread, where devices share what is trained; else None."""
        if self._shared_by is None:
            return None
        return self._specs_of_sums(_specs(trainables, self._model, self._shared_by))

    def _specs_of_sums(self, specs: PyTree) -> StepSums:
        """The partition specs of ``StepSums``, by those of the gradient."""
        return StepSums(specs, sums_of(self._loss, PartitionSpec()))


def make_train_step(
    model: registry.Model,
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    z_loss: float = 0.0,
    loss: Loss | LabelLoss | None = None,
) -> TrainStep:
    """A compiled ``(state, params, micro-batches) -> (state, losses)``; it donates the state.

    However a batch is cut into micro-batches, the step is the same to float32's error: gradients
    add up, and each member's mean is taken over the whole batch. Every shape of a micro-batch is
    compiled once. With a ``mesh``, each device of its ``data`` and ``fsdp`` axes takes rows of its
    own, and once a step the devices exchange nothing but these sums. Dropout is drawn from the seed
    that each example of a batch has: it is the same however the batch is cut, and a resumed run
    needs no random state.

    Args:
        loss: what is minimised. None: cross-entropy of the targets, with ``z_loss``.

    Raises:
        ValueError: for a batch without dropout seeds, where the model has dropout.
    """
    loss = cross_entropy(z_loss) if loss is None else loss
    return TrainStep(StepFunctions(model, method, optimizer, loss, mesh))


def _specs(tree: PyTree, model: registry.Model, mesh: Mesh) -> PyTree:
    known = model.abstract_params(), model.logical_axes()
    return parallel.specs_of(mesh, tree, parallel.trained_axes(tree, *known))


def shardings(state: PyTree, method: Method, model: registry.Model, mesh: Mesh) -> PyTree:
    """Where each array of a state is: prompts on every device, a whole model as ``RULES`` say."""
    if method.frozen or not parallel.divides_weights(mesh):
        return jax.tree.map(lambda x: parallel.replicated(mesh), state)
    return parallel.named_shardings(mesh, _specs(state, model, mesh))


def first_state(
    trainables: Trainables, method: Method, optimizer: optax.GradientTransformation,
    model: registry.Model, mesh: Mesh,
) -> TrainState:  # fmt: skip
    """The state before step 0 of these trainables, on the devices of ``mesh``."""
    if method.frozen:
        state = TrainState(jnp.int32(0), trainables, optimizer.init(trainables))
        return jax.device_put(state, parallel.replicated(mesh))
    place = lambda some: shardings(some, method, model, mesh)
    trainables = jax.tree.map(parallel.reshard, trainables, place(trainables))
    moments = jax.eval_shape(optimizer.init, trainables)
    # no device ever has more than its part
    moments = jax.jit(optimizer.init, out_shardings=place(moments))(trainables)
    step = parallel.device_put_global(np.zeros((), np.int32), parallel.replicated(mesh))
    return TrainState(step, trainables, moments)


def all_finite(trainables: Trainables) -> Bool[np.ndarray, " K"]:
    """Whether all numbers of a member are finite."""
    return np.concatenate(processes.fetch(_all_finite(member_groups(trainables))))


@jax.jit
def _all_finite(groups):
    finite = lambda x: jnp.isfinite(x).reshape(len(x), -1).all(axis=1)
    return [jnp.all(jnp.stack([*map(finite, jax.tree.leaves(g))]), axis=0) for g in groups]


def init_state(
    method: Method,
    optimizer: optax.GradientTransformation,
    params: registry.Params,
    start: Float[np.ndarray, "K R D"],
    config: PromptConfig | None = None,
    *,
    seed: int = 0,
) -> TrainState:
    """The state before step 0.

    start: R vectors of each member, as ``method.num_start_vectors(config)`` asks.
    """
    trainables = method.init(params, start, config or PromptConfig(), seed)
    return TrainState(jnp.int32(0), trainables, optimizer.init(trainables))
