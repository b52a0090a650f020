"""Optimizers and learning rates by name, built from optax, vmapped over the members of a run."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxprompt.config.schema import Optimization
from jaxprompt.methods.base import join_groups, member_groups, num_members, split_by_group

# Step of the LM-adapted checkpoints. The authors' code restores it, so the decay of the second
# moment starts almost at 1, and RMS clipping stays active for the whole run.
T5X_FIRST_STEP = 1_100_000

Scalar = float | Float[Array, ""]
Peak: TypeAlias = Any  # a Scalar: optax takes a traced one too, and annotates float


def schedule(config: Optimization, peak: Scalar | None = None) -> optax.Schedule:
    """The learning rate of each step: linear warm-up, decay, and linear cool-down to 0.

    The parts are optax's. ``optax.warmup_cosine_decay_schedule`` is not used: its first step has
    the rate 0, and this warm-up gives the first step 1/warmup_steps of the peak. Optax has no
    inverse square root and no cool-down that multiplies another schedule.

    Args:
        peak: the highest rate, instead of the config's ``learning_rate``.
    """
    peak = config.learning_rate if peak is None else peak
    rate, cooldown = _warmup_and_decay(config, peak), config.cooldown_steps
    if cooldown == 0:
        return rate
    return lambda step: rate(step) * jnp.clip((config.steps - step) / cooldown, 0.0, 1.0)


def schedule_warnings(config: Optimization) -> list[str]:
    """A warning where warm-up and cool-down leave no step with the config's learning rate."""
    warmup, cooldown = config.warmup_steps, config.cooldown_steps
    first_at_peak, last_at_peak = max(warmup - 1, 0), config.steps - max(cooldown, 1)
    if first_at_peak <= last_at_peak:
        return []
    return [
        f"train.warmup_steps is {warmup} and train.cooldown_steps {cooldown}, too many for "
        f"train.steps, {config.steps}: the learning rate never reaches {config.learning_rate:g}; "
        "lower them or raise the steps"
    ]


def _warmup_and_decay(config: Optimization, peak: Peak) -> optax.Schedule:
    warmup = config.warmup_steps
    decay = _decay(config, peak, max(config.steps - warmup, 1))
    if warmup == 0:
        return decay
    # step 0 takes 1/warmup of the rate, so that no step is lost
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])


def _decay(config: Optimization, peak: Peak, steps: int) -> optax.Schedule:
    """The decay by its name, over so many steps after the warm-up."""
    match config.schedule:
        case "constant":
            return optax.constant_schedule(peak)
        case "linear":
            return optax.linear_schedule(peak, 0.0, steps)
        case "cosine":
            return optax.cosine_decay_schedule(peak, steps)
        case "rsqrt":
            start = max(config.warmup_steps, 1)
            return lambda step: peak * (start / (start + jnp.maximum(step, 0))) ** 0.5


def make_optimizer(
    config: Optimization, peak: Scalar | None = None
) -> optax.GradientTransformation:
    """The optimizer of one member, with float32 state; ``peak`` as in ``schedule``."""
    rate = schedule(config, peak)
    if config.optimizer == "adamw":
        clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
        return optax.chain(clip, optax.adamw(rate, weight_decay=config.weight_decay))
    offset = -T5X_FIRST_STEP if config.optimizer == "adafactor-t5x" else 0
    return optax.adafactor(
        rate,
        decay_rate=0.8,
        decay_offset=offset,
        multiply_by_parameter_scale=config.parameter_scale,
        clipping_threshold=config.clip or None,
        momentum=config.momentum or None,
        weight_decay_rate=config.weight_decay or None,  # not multiplied by the rate, as in T5X
    )


Rates = float | Mapping[str, float]  # of a member, or of each part of its method


def per_member(
    config: Optimization, peaks: Sequence[Rates] | None = None
) -> optax.GradientTransformation:
    """An optimizer of K members at once: clipping and factoring see one member at a time.

    Args:
        peaks: the learning rate of each member, in their order; None: the config's for all. Where
            trainables have several parts, each part has a rate, and an optimizer of its own.
    """

    def optimizer(rates: PyTree) -> optax.GradientTransformation:
        if not isinstance(rates, dict):
            return make_optimizer(config, rates)
        parts = {part: make_optimizer(config, rate) for part, rate in rates.items()}
        return optax.partition(parts, lambda params: {part: part for part in params})

    def init(params):
        like = config.learning_rate if peaks is None else peaks[0]
        each = jax.vmap(optimizer(like).init)
        return join_groups([each(group) for group in member_groups(params)])

    def update(updates, state, params=None):
        rates = [config.learning_rate] * num_members(updates) if peaks is None else peaks
        stacked = jax.tree.map(lambda *rate: jnp.asarray(rate), *rates)
        each = jax.vmap(lambda rate, *args: optimizer(rate).update(*args))
        groups = zip(
            split_by_group(stacked, updates),
            member_groups(updates),
            member_groups(state, like=updates),
            member_groups(params),
            strict=True,
        )
        results = [each(*group) for group in groups]
        return join_groups([new for new, _ in results]), join_groups([s for _, s in results])

    return optax.GradientTransformation(init, update)
