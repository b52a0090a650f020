"""The train step: pure, jitted once, over a mesh; gradients for the method's tree alone."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxprompt.config import PromptConfig
from jaxprompt.data.pipeline import Batch
from jaxprompt.model import family
from jaxprompt.prompts.methods import Method


class TrainState(NamedTuple):
    """All that training changes: kilobytes for a prompt."""

    step: Int[Array, ""]
    tree: Any
    optimizer: Any


class Losses(NamedTuple):
    """Per-prompt results of a step, each [K]."""

    loss: Float[Array, " K"]  # mean negative log-likelihood of a target token, in nats
    accuracy: Float[Array, " K"]  # share of target tokens that are the argmax


def batch_losses(
    params: family.Params,
    bank: Float[Array, "K P D"] | None,
    config: family.Config,
    batch: Batch,
    *,
    prompts: int,
    z_loss: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> tuple[Float[Array, ""], Losses]:
    """The objective (the sum over prompts of each prompt's own mean) and what it is made of.

    A prompt's mean is over its own target tokens, so its gradient does not depend on what else
    shares the batch. ``z_loss`` times log(Z)^2 is in the objective, not in the reported loss.
    """
    inputs, segments, targets, target_segments, owners, weights = map(jnp.asarray, batch)
    model = family.of(config)
    prepared = model.prepare(params, bank, config)
    logits = model.logits(
        params, prepared, config, inputs, segments, targets, target_segments, dropout_key
    )
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = log_z - picked
    right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)

    def mean(values):
        owner = owners.reshape(-1)
        add = functools.partial(jax.ops.segment_sum, segment_ids=owner, num_segments=prompts)
        total = add((values * weights).reshape(-1))
        return total / jnp.maximum(add(weights.reshape(-1)), 1.0)

    losses = Losses(mean(nll), mean(right))
    return jnp.sum(losses.loss + z_loss * mean(jnp.square(log_z))), losses


def make_train_step(
    config: family.Config,
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
    z_loss: float = 0.0,
) -> Callable[[TrainState, family.Params, Batch], tuple[TrainState, Losses]]:
    """A jitted ``(state, params, batch) -> (state, losses)``; the state's buffers are donated.

    Dropout keys are a pure function of seed and step, so a resumed run needs no random state.
    """

    def objective(tree, params, batch, key):
        params, bank = method.apply(tree, params)
        prompts = jax.tree.leaves(tree)[0].shape[0]
        return batch_losses(
            params, bank, config, batch, prompts=prompts, z_loss=z_loss, dropout_key=key
        )

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, params, batch):
        key = None
        if config.dropout > 0:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, losses = jax.grad(objective, has_aux=True)(state.tree, params, batch, key)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.tree)
        tree = optax.apply_updates(state.tree, updates)
        return TrainState(state.step + 1, tree, opt_state), losses

    return train_step


def init_state(
    method: Method,
    optimizer: optax.GradientTransformation,
    params: family.Params,
    start: Float[Any, "K R D"],
    config: PromptConfig | None = None,
    *,
    seed: int = 0,
) -> TrainState:
    """The state before step 0, from ``method.rows(config)`` start vectors for each prompt."""
    tree = method.init(params, start, config or PromptConfig(), seed)
    return TrainState(jnp.int32(0), tree, optimizer.init(tree))
