"""Optimizers by name, built from optax; each is vmapped over the prompts that share a step."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxprompt.config.schema import Optimization
from jaxprompt.methods.base import join_groups, length_groups, num_members, split_by_group

# Step of the LM-adapted checkpoints. The authors' code restores it, so that the decay of the second
# moment starts almost at 1 and RMS clipping stays active for the whole run; see the README.
T5X_FIRST_STEP = 1_100_000


Scalar = float | Float[Array, ""]


def schedule(config: Optimization, peak: Scalar | None = None) -> optax.Schedule:
    """Learning rate over steps: linear warm-up, the decay by its name, linear cool-down to 0.

    ``peak`` takes the place of the config's learning rate.
    """
    peak = config.learning_rate if peak is None else peak
    rate, last = _warm_and_decay(config, peak), config.cooldown_steps
    if last == 0:
        return rate
    return lambda step: rate(step) * jnp.clip((config.steps - step) / last, 0.0, 1.0)


def schedule_warnings(config: Optimization) -> list[str]:
    """A sentence where the run ends before its learning rate has been what the config says."""
    warmup, cooldown = config.warmup_steps, config.cooldown_steps
    risen, falls = max(warmup - 1, 0), config.steps - max(cooldown, 1)
    if risen <= falls:
        return []
    return [
        f"train.warmup_steps is {warmup} and train.cooldown_steps {cooldown}, too many for "
        f"train.steps, {config.steps}: the learning rate never reaches {config.learning_rate:g}; "
        "lower them or raise the steps"
    ]


def _warm_and_decay(config: Optimization, peak: Any) -> optax.Schedule:
    warmup = config.warmup_steps
    rest = max(config.steps - warmup, 1)
    match config.schedule:
        case "constant":
            after = optax.constant_schedule(peak)
        case "linear":
            after = optax.linear_schedule(peak, 0.0, rest)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest)
        case "rsqrt":
            start = max(warmup, 1)
            after = lambda step: peak * (start / (start + jnp.maximum(step, 0))) ** 0.5
    if warmup == 0:
        return after
    # step 0 takes 1/warmup of the rate, so that no step is lost
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    config: Optimization, peak: Scalar | None = None
) -> optax.GradientTransformation:
    """The optimizer of one prompt (or one model), with float32 state; ``peak`` as in `schedule`."""
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


def per_prompt(
    config: Optimization, peaks: Sequence[float] | None = None
) -> optax.GradientTransformation:
    """An optimizer of K prompts at once: clipping and factoring see one prompt at a time.

    peaks: the learning rate of each; None: the config's for all.
    """

    def init(params):
        each = jax.vmap(make_optimizer(config).init)
        return join_groups([each(group) for group in length_groups(params)])

    def update(updates, state, params=None):
        total = num_members(updates)
        rates = jnp.full(total, config.learning_rate) if peaks is None else jnp.asarray(peaks)
        each = jax.vmap(lambda rate, *args: make_optimizer(config, rate).update(*args))
        groups = zip(
            split_by_group(rates, updates),
            length_groups(updates),
            length_groups(state, like=updates),
            length_groups(params),
            strict=True,
        )
        results = [each(*group) for group in groups]
        return join_groups([new for new, _ in results]), join_groups([s for _, s in results])

    return optax.GradientTransformation(init, update)
