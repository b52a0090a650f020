"""Losses: pure functions of logits and a batch, summed for each member of a run.

Sums, not means: those of micro-batches and of devices add up, and each member's mean is taken over
its own target tokens, whatever else shares its batches.
"""

import functools
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprompt.data.batches import Batch


class Losses(NamedTuple):
    """Means of each member over its target tokens."""

    loss: Float[Array, " K"]  # negative log-likelihood of a target token, in nats
    accuracy: Float[Array, " K"]  # share of target tokens that are the argmax


class LossSums(NamedTuple):
    """Weighted sums of each member over its target tokens."""

    loss: Float[Array, " K"]  # negative log-likelihood, in nats
    correct: Float[Array, " K"]  # of tokens that are the argmax
    num_tokens: Float[Array, " K"]  # the weights

    def means(self) -> Losses:
        """What is reported; zeros for a member without a token."""
        num_tokens = jnp.maximum(self.num_tokens, 1.0)
        return Losses(self.loss / num_tokens, self.correct / num_tokens)


@runtime_checkable
class Loss(Protocol):
    """What a step minimises, for a batch with examples of ``num_members`` members."""

    def __call__(
        self, logits: Float[Array, "R T V"], batch: Batch, num_members: int
    ) -> tuple[Float[Array, " K"], LossSums]:
        """The objective of each member, as a sum over its tokens, and what is reported."""
        ...


def target_members(batch: Batch) -> Int[Array, "R T"]:
    """The member that owns each target position."""
    member = jnp.asarray(batch.member)
    if member.ndim == 1:
        return jnp.broadcast_to(member[:, None], batch.targets.shape)
    # padding, whose weight is 0, counts as the first segment of its row
    segments = jnp.maximum(jnp.asarray(batch.target_segments), 1) - 1
    return jnp.take_along_axis(member, segments, axis=1)


def sum_by_member(
    values: Float[Array, "R T"], members: Int[Array, "R T"], num_members: int
) -> Float[Array, " K"]:
    """The sum of the values that belong to each member."""
    return jax.ops.segment_sum(values.reshape(-1), members.reshape(-1), num_segments=num_members)


def cross_entropy(z_loss: float = 0.0) -> Loss:
    """The negative log-likelihood of the targets plus ``z_loss`` times log(Z)^2.

    The second term (Mesh TensorFlow, T5) keeps the logits near 0. It is in the objective, not in
    the loss that is reported.
    """
    return functools.partial(_cross_entropy, z_loss=z_loss)


def _cross_entropy(
    logits: Float[Array, "R T V"], batch: Batch, num_members: int, *, z_loss: float
) -> tuple[Float[Array, " K"], LossSums]:
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    correct = (picked >= jnp.max(logits, axis=-1)).astype(jnp.float32)
    members = target_members(batch)

    def total(values):
        return sum_by_member(values * batch.weights, members, num_members)

    sums = LossSums(total(log_z - picked), total(correct), total(jnp.ones_like(log_z)))
    return sums.loss + z_loss * total(jnp.square(log_z)), sums
