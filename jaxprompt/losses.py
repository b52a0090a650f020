"""Losses: pure functions of logits, or of scores of labels, and a batch, summed for each member.

Sums, not means: those of micro-batches and of devices add up, and each member's mean is taken over
its own target tokens, whatever else shares its batches.
"""

import functools
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxprompt.data.batches import Batch
from jaxprompt.models.label_scores import TokenScores
from jaxprompt.models.label_tree import LabelTrees

# added to 1 - p of a wrong token, so that its logarithm is finite where float32 has p = 1. The code
# of T-Few adds 1e-2, beyond which a wrong label that is almost certain has no gradient
_LEAST_REST = 1e-6


class Losses(NamedTuple):
    """Means of each member over its target tokens."""

    loss: Float[Array, " K"]  # negative log-likelihood of a target token, in nats
    accuracy: Float[Array, " K"]  # share of target tokens that are the argmax
    # of ``LabelLoss``, without their factors; None where the objective has none
    unlikelihood: Float[Array, " K"] | None = None
    length_normalized: Float[Array, " K"] | None = None


class LossSums(NamedTuple):
    """Weighted sums of each member over its target tokens."""

    loss: Float[Array, " K"]  # negative log-likelihood, in nats
    correct: Float[Array, " K"]  # of tokens that are the argmax
    num_tokens: Float[Array, " K"]  # the weights
    # see ``Losses``; their weights make them means when they are divided by ``num_tokens``
    unlikelihood: Float[Array, " K"] | None = None
    length_normalized: Float[Array, " K"] | None = None

    def means(self) -> Losses:
        """What is reported; zeros for a member without a token."""
        num_tokens = jnp.maximum(self.num_tokens, 1.0)
        mean = lambda part: None if part is None else part / num_tokens
        parts = mean(self.unlikelihood), mean(self.length_normalized)
        return Losses(self.loss / num_tokens, self.correct / num_tokens, *parts)


@runtime_checkable
class Loss(Protocol):
    """What a step minimises, for a batch with examples of ``num_members`` members."""

    def __call__(
        self, logits: Float[Array, "R T V"], batch: Batch, num_members: int
    ) -> tuple[Float[Array, " K"], LossSums]:
        """The objective of each member, as a sum over its tokens, and what is reported."""
        ...


class LabelLoss(NamedTuple):
    """What a step minimises where labels are compared: the three losses of T-Few.

    Cross-entropy of the right label, plus factors times the losses of ``unlikelihood`` and
    ``length_normalized`` (Liu et al. 2022, arXiv 2205.05638, section 3.2). Each is a mean of each
    member: over its target tokens, over the tokens of its examples' wrong labels, and over its
    examples. It reads ``Batch.choices`` and the scores of all labels instead of logits of targets.
    """

    labels: LabelTrees
    unlikelihood: float = 0.0
    length_normalized: float = 0.0
    z_loss: float = 0.0

    def __call__(
        self, scores: TokenScores, batch: Batch, num_members: int
    ) -> tuple[Float[Array, " K"], LossSums]:
        """The objective of each member, as a sum over its tokens, and what is reported."""
        choices = batch.choices
        if choices is None:
            raise ValueError("A batch without choices has no labels to compare.")
        is_token = jnp.asarray(self.labels.tokens) >= 0
        right, wrong = jnp.asarray(choices.right), jnp.asarray(choices.wrong)
        # rows without an example have no weights
        weights = is_token[right] * batch.weights[:, :1]
        of_right = TokenScores(*(x[jnp.arange(len(right)), right] for x in scores))
        of_rows = jnp.asarray(batch.member)
        of_tokens = jnp.broadcast_to(of_rows[:, None], weights.shape)

        def total(values):
            return sum_by_member(values * weights, of_tokens, num_members)

        def total_of_rows(values):
            return sum_by_member(values, of_rows, num_members)

        sums = LossSums(
            total(-of_right.log_p),
            total(of_right.is_argmax.astype(jnp.float32)),
            total(jnp.ones_like(weights)),
        )
        objective = sums.loss + self.z_loss * total(jnp.square(of_right.log_z))
        if self.unlikelihood:
            each = unlikelihood(scores.log_p, wrong[..., None] & is_token)
            part = total_of_rows(each * choices.token_weight)
            objective += self.unlikelihood * part
            sums = sums._replace(unlikelihood=part)
        if self.length_normalized:
            each = length_normalized(scores.log_p, is_token, right, wrong)
            part = total_of_rows(each * choices.example_weight)
            objective += self.length_normalized * part
            sums = sums._replace(length_normalized=part)
        return objective, sums


def sums_of(loss: Loss | LabelLoss, each: PyTree) -> LossSums:
    """Sums whose every part, of those that the loss has, is ``each``."""
    sums = LossSums(each, each, each)
    if isinstance(loss, LabelLoss):
        names = ("unlikelihood", "length_normalized")
        sums = sums._replace(**{name: each for name in names if getattr(loss, name)})
    return sums


def unlikelihood(log_p: Float[Array, "R C T"], wrong: Bool[Array, "R C T"]) -> Float[Array, " R"]:
    """The sum of -log(1 - p) over the tokens that are ``wrong``."""
    rest = -jnp.expm1(jnp.where(wrong, log_p, -1.0))  # 1 - p without the rounding of p
    return jnp.sum(-jnp.log(rest + _LEAST_REST) * wrong, axis=(1, 2))


def length_normalized(
    log_p: Float[Array, "R C T"],
    is_token: Bool[Array, "C T"],
    right: Int[Array, " R"],
    wrong: Bool[Array, "R C"],
) -> Float[Array, " R"]:
    """The negative log of the right label's share of a softmax over mean log p of a token."""
    means = jnp.sum(log_p * is_token, axis=-1) / jnp.sum(is_token, axis=-1)
    is_right = jnp.arange(wrong.shape[1]) == right[:, None]
    means = jnp.where(is_right | wrong, means, -jnp.inf)
    picked = jnp.take_along_axis(means, right[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(means, axis=-1) - picked


def target_members(batch: Batch) -> Int[Array, "R T"]:
    """The member that owns each target position."""
    member = jnp.asarray(batch.member)
    if member.ndim == 1:
        return jnp.broadcast_to(member[:, None], batch.targets.shape)
    # padding, whose weight is 0, counts as the first segment of its row
    segments = jnp.maximum(jnp.asarray(batch.target_segments), 1) - 1
    return jnp.take_along_axis(member, segments, axis=1)


def sum_by_member(
    values: Float[Array, " R *T"], members: Int[Array, " R *T"], num_members: int
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
