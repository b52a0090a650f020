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
from jaxprompt.methods.base import Method, applied, by_length, count, joined, trees_of
from jaxprompt.models import registry
from jaxprompt.models.ops import quantization
from jaxprompt.runtime import parallel, processes


class TrainState(NamedTuple):
    """All that training changes: kilobytes for a prompt."""

    step: Int[Array, ""]
    tree: Any
    optimizer: Any


class Losses(NamedTuple):
    """Per-prompt results of a step, each [K]."""

    loss: Float[Array, " K"]  # mean negative log-likelihood of a target token, in nats
    accuracy: Float[Array, " K"]  # share of target tokens that are the argmax


class Sums(NamedTuple):
    """What adds up over the micro-batches of a step; the gradient is that of the summed loss."""

    gradient: Any
    loss: Float[Array, " K"]
    right: Float[Array, " K"]
    weight: Float[Array, " K"]

    def losses(self) -> Losses:
        """Each prompt's means over all of its target tokens."""
        weight = jnp.maximum(self.weight, 1.0)
        return Losses(self.loss / weight, self.right / weight)

    def mean_gradient(self) -> Any:
        """That of each prompt's mean over all of its target tokens."""
        weight = jnp.maximum(self.weight, 1.0)
        share = lambda x, by: x / by.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
        mean = [
            jax.tree.map(functools.partial(share, by=own), tree)
            for tree, own in zip(*by_length(self.gradient, weight), strict=True)
        ]
        return joined(mean)


def batch_losses(
    params: registry.Params,
    bank: Float[Array, "K P D"] | None,
    config: registry.Config,
    batch: Batch,
    *,
    prompts: int,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Losses]:
    """The objective (the sum over prompts of each prompt's own mean) and what it is made of.

    A prompt's mean is over its own target tokens, so its gradient does not depend on what else
    shares the batch. ``z_loss`` times log(Z)^2 is in the objective, not in the reported loss.
    There is dropout if the batch brings noise.
    """
    objective, sums = _summed(params, bank, config, batch, prompts, z_loss)
    return jnp.sum(objective / jnp.maximum(sums.weight, 1.0)), sums.losses()


def _summed(params, bank, config, batch, prompts, z_loss):
    """The objective of each prompt and what is reported, as sums over target tokens."""
    inputs, segments, targets, target_segments, owners, weights, noise = jax.tree.map(
        jnp.asarray, batch
    )
    model = registry.model_for(config)
    prepared = model.prepare(params, bank, config)
    logits = model.logits(
        params, prepared, config, inputs, segments, targets, target_segments, noise
    )
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    right = (picked >= jnp.max(logits, axis=-1)).astype(jnp.float32)

    def total(values):
        flat = (values * weights).reshape(-1)
        return jax.ops.segment_sum(flat, owners.reshape(-1), num_segments=prompts)

    loss = total(log_z - picked)
    sums = Sums(None, loss, total(right), total(jnp.ones_like(weights)))
    return loss + z_loss * total(jnp.square(log_z)), sums


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

    # the devices that share the weights that are trained, if they do
    shared_by = None if method.frozen or not parallel.divides_weights(mesh) else mesh
    frozen_or_shared = method.frozen or shared_by is not None
    axes = registry.model_for(config).logical_axes(config) if frozen_or_shared else None

    def sums_of_rows(params, tree, batch):
        if config.dropout > 0 and batch.dropout_seed is None:
            raise ValueError("A batch without noise has no dropout; give its examples some.")

        def objective(tree):
            tuned, bank = applied(method, tree, params)
            if shared_by is not None:
                tuned = parallel.gather_params(tuned, axes)
            each, sums = _summed(tuned, bank, config, batch, count(tree), z_loss)
            return jnp.sum(each), sums

        gradient, sums = jax.grad(objective, has_aux=True)(tree)
        return sums._replace(gradient=gradient)

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
        return state, sums.losses()

    @functools.partial(jax.jit, donate_argnums=0)
    def at_once(state, params, batch):
        return finish(state, everywhere(params, state.tree, batch))

    @functools.partial(jax.jit, out_shardings=None if shared_by else parallel.batch_sharding(mesh))
    def nothing(tree):
        if shared_by is not None:
            each = jnp.zeros(count(tree))
            return parallel.stacked_zeros(Sums(tree, each, each, each), shared_by, specs(tree))
        ways = parallel.num_batch_shards(mesh)
        gradient = jax.tree.map(lambda x: jnp.zeros((ways, *x.shape), x.dtype), tree)
        each = jnp.zeros((ways, count(tree)))
        return Sums(gradient, each, each, each)

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
    return Sums(specs, everywhere, everywhere, everywhere)


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

    return np.concatenate(processes.fetch(_sound(trees_of(tree))))


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
    """The state before step 0, from ``method.rows(config)`` start vectors for each prompt."""
    tree = method.init(params, start, config or PromptConfig(), seed)
    return TrainState(jnp.int32(0), tree, optimizer.init(tree))
