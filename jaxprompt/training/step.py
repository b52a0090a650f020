"""The train step: pure, jitted once, over a mesh; gradients for the method's tree alone."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxprompt.config.schema import PromptConfig
from jaxprompt.data.batches import Batch
from jaxprompt.losses import Loss, Losses, LossSums, cross_entropy
from jaxprompt.methods.base import (
    Method,
    inject,
    join_groups,
    length_groups,
    num_members,
    split_by_group,
)
from jaxprompt.models import registry
from jaxprompt.models.injection import Injection
from jaxprompt.models.ops import quantization
from jaxprompt.runtime import parallel, processes


class TrainState(NamedTuple):
    """All that training changes: kilobytes for a prompt."""

    step: Int[Array, ""]
    tree: Any
    optimizer: Any


class StepSums(NamedTuple):
    """What adds up over the micro-batches of a step; the gradient is that of the summed loss."""

    gradient: Any
    losses: LossSums

    def mean_gradient(self) -> Any:
        """The gradient of each member's mean over all of its target tokens."""
        num_tokens = jnp.maximum(self.losses.num_tokens, 1.0)
        share = lambda x, by: x / by.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
        groups = length_groups(self.gradient)
        mean = [
            jax.tree.map(functools.partial(share, by=own), group)
            for group, own in zip(groups, split_by_group(num_tokens, self.gradient), strict=True)
        ]
        return join_groups(mean)


def batch_losses(
    params: registry.Params,
    injection: Injection,
    config: registry.Config,
    batch: Batch,
    *,
    num_members: int,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Losses]:
    """The objective (the sum over members of each member's own mean) and what it is made of.

    A member's mean is over its own target tokens, so its gradient does not depend on what else
    shares the batch. ``z_loss`` times log(Z)^2 is in the objective, not in the reported loss.
    There is dropout if the batch has dropout seeds.
    """
    loss = cross_entropy(z_loss)
    objective, sums = _summed_losses(params, injection, config, batch, num_members, loss)
    return jnp.sum(objective / jnp.maximum(sums.num_tokens, 1.0)), sums.means()


def _summed_losses(
    params: registry.Params, injection: Injection, config: registry.Config, batch: Batch,
    num_members: int, loss: Loss,
) -> tuple[Float[Array, " K"], LossSums]:  # fmt: skip
    """The objective of each member and what is reported, as sums over target tokens."""
    batch = jax.tree.map(jnp.asarray, batch)
    model = registry.model_for(config)
    params = params if injection.params is None else injection.params
    prepared = model.prepare(params, injection.embeddings, config)
    logits = model.logits(
        params, prepared, config, batch.inputs, batch.segments, batch.targets,
        batch.target_segments, batch.dropout_seed,
    )  # fmt: skip
    return loss(logits, batch, num_members)


Step = Callable[[TrainState, registry.Params, Sequence[Batch]], tuple[TrainState, Losses]]


def make_train_step(
    config: registry.Config,
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    z_loss: float = 0.0,
) -> Step:
    """A compiled ``(state, params, micro-batches) -> (state, losses)``; it donates the state.

    However a batch is cut into micro-batches, the step is the same to float32's error: gradients
    add up, and each prompt's mean is taken over the whole batch. Every shape of a micro-batch is
    compiled once. With a ``mesh``, each device of its ``data`` and ``fsdp`` axes takes rows of its
    own, and they add up nothing but these sums, once a step. Dropout is drawn from the noise that
    each example of a batch brings along: it is the same however the batch is cut, and a resumed run
    needs no random state. Raises ValueError for a batch without it, where the config has dropout.
    """

    loss = cross_entropy(z_loss)
    # the devices that share the weights that are trained, if they do
    shared_by = None if method.frozen or not parallel.divides_weights(mesh) else mesh
    frozen_or_shared = method.frozen or shared_by is not None
    axes = registry.model_for(config).logical_axes(config) if frozen_or_shared else None

    def sums_of_rows(params, tree, batch):
        if config.dropout > 0 and batch.dropout_seed is None:
            raise ValueError("A batch without noise has no dropout; give its examples some.")

        def objective(tree):
            injection = inject(method, tree, params)
            if shared_by is not None:
                tuned = parallel.gather_params(injection.params, axes)
                injection = injection._replace(params=tuned)
            each, sums = _summed_losses(params, injection, config, batch, num_members(tree), loss)
            return jnp.sum(each), sums

        gradient, sums = jax.grad(objective, has_aux=True)(tree)
        return StepSums(gradient, sums)

    everywhere = parallel.shard_over_batch(sums_of_rows, mesh, axes, stacked=True)
    specs: Any = lambda tree: None
    if shared_by is not None:
        everywhere, specs = _over_parts(sums_of_rows, config, shared_by)

    def finish(state, sums):
        sums = parallel.psum_over_batch(sums, mesh, specs(state.tree))
        updates, opt_state = optimizer.update(sums.mean_gradient(), state.optimizer, state.tree)
        tree = optax.apply_updates(state.tree, updates)
        state = TrainState(state.step + 1, tree, opt_state)
        if shared_by is not None:
            place = shardings(state, method, config, shared_by)
            state = jax.lax.with_sharding_constraint(state, place)
        return state, sums.losses.means()

    @functools.partial(jax.jit, donate_argnums=0)
    def at_once(state, params, batch):
        return finish(state, everywhere(params, state.tree, batch))

    @functools.partial(jax.jit, out_shardings=None if shared_by else parallel.batch_sharding(mesh))
    def nothing(tree):
        if shared_by is not None:
            each = jnp.zeros(num_members(tree))
            sums = StepSums(tree, LossSums(each, each, each))
            return parallel.stacked_zeros(sums, shared_by, specs(tree))
        ways = parallel.num_batch_shards(mesh)
        gradient = jax.tree.map(lambda x: jnp.zeros((ways, *x.shape), x.dtype), tree)
        each = jnp.zeros((ways, num_members(tree)))
        return StepSums(gradient, LossSums(each, each, each))

    @functools.partial(jax.jit, donate_argnums=0)
    def add(sums, tree, params, batch):
        return jax.tree.map(jnp.add, sums, everywhere(params, tree, batch))

    last = jax.jit(finish, donate_argnums=0)

    held: list[Any] = [None, None]

    def train_step(state, params, batches):
        if method.frozen and held[0] is not params:
            held[:] = params, quantization.view_as_uint16(params)
        params = held[1] if method.frozen else params
        if len(batches) == 1:
            return at_once(state, params, batches[0])
        sums = nothing(state.tree)
        for batch in batches:
            sums = add(sums, state.tree, params, batch)
        return last(state, sums)

    return train_step


def _over_parts(sums_of_rows, config: registry.Config, mesh: Mesh):
    """``sums_of_rows`` of a tree whose weights the devices share, and how its sums are spread."""

    def specs(tree):
        return _specs_of_sums(_specs(tree, config, mesh))

    work = parallel.shard_over_batch(
        lambda tree, _, batch: sums_of_rows({}, tree, batch), mesh,
        lambda tree: specs(tree).gradient, stacked=True,
        results=_specs_of_sums,
    )  # fmt: skip

    def everywhere(params, tree, batch):
        place = parallel.named_shardings(mesh, parallel.stacked_specs(specs(tree)))
        return jax.lax.with_sharding_constraint(work(tree, {}, batch), place)

    return everywhere, specs


def _specs_of_sums(specs: Any) -> Any:
    everywhere: Any = PartitionSpec()
    return StepSums(specs, LossSums(everywhere, everywhere, everywhere))


def _specs(tree: Any, config: registry.Config, mesh: Mesh) -> Any:
    model = registry.model_for(config)
    known = model.abstract_params(config), model.logical_axes(config)
    return parallel.specs_of(mesh, tree, parallel.trained_axes(tree, *known))


def shardings(state: Any, method: Method, config: registry.Config, mesh: Mesh) -> Any:
    """Where each array of a state is: prompts on every device, a whole model as ``RULES`` say."""
    if method.frozen or not parallel.divides_weights(mesh):
        return jax.tree.map(lambda x: parallel.replicated(mesh), state)
    return parallel.named_shardings(mesh, _specs(state, config, mesh))


def first_state(
    tree: Any, method: Method, optimizer: optax.GradientTransformation,
    config: registry.Config, mesh: Mesh,
) -> TrainState:  # fmt: skip
    """The state before step 0 of a tree, on the devices of ``mesh``."""
    if method.frozen:
        state = TrainState(jnp.int32(0), tree, optimizer.init(tree))
        return jax.device_put(state, parallel.replicated(mesh))
    place = lambda some: shardings(some, method, config, mesh)
    tree = jax.tree.map(parallel.moved, tree, place(tree))
    moments = jax.eval_shape(optimizer.init, tree)
    # no device ever has more than its part
    moments = jax.jit(optimizer.init, out_shardings=place(moments))(tree)
    return TrainState(
        parallel.device_put_global(np.zeros((), np.int32), parallel.replicated(mesh)), tree, moments
    )


def sound(tree: Any) -> Bool[np.ndarray, " K"]:
    """Whether all numbers of a prompt are finite."""

    return np.concatenate(processes.fetch(_sound(length_groups(tree))))


@jax.jit
def _sound(trees):
    fine = lambda x: jnp.isfinite(x).reshape(len(x), -1).all(axis=1)
    return [jnp.all(jnp.stack([*map(fine, jax.tree.leaves(own))]), axis=0) for own in trees]


def init_state(
    method: Method,
    optimizer: optax.GradientTransformation,
    params: registry.Params,
    start: Float[Any, "K R D"],
    config: PromptConfig | None = None,
    *,
    seed: int = 0,
) -> TrainState:
    """The state before step 0.

    start: R vectors of each member, as ``method.num_start_vectors(config)`` asks.
    """
    tree = method.init(params, start, config or PromptConfig(), seed)
    return TrainState(jnp.int32(0), tree, optimizer.init(tree))
