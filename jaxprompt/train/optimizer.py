"""Optimizers by name, built from optax; each is vmapped over the prompts that share a step."""

import jax
import jax.numpy as jnp
import optax

from jaxprompt.config import Optimization

# Step of the LM-adapted checkpoints. The authors' code restores it, so that the decay of the second
# moment starts almost at 1 and RMS clipping stays active for the whole run; see the README.
T5X_FIRST_STEP = 1_100_000


def schedule(config: Optimization) -> optax.Schedule:
    """Learning rate over steps: linear warm-up, the decay by its name, linear cool-down to 0."""
    rate, last = _warm_and_decay(config), config.cooldown_steps
    if last == 0:
        return rate
    return lambda step: rate(step) * jnp.clip((config.steps - step) / last, 0.0, 1.0)


def _warm_and_decay(config: Optimization) -> optax.Schedule:
    peak, warmup = config.learning_rate, config.warmup_steps
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


def make_optimizer(config: Optimization) -> optax.GradientTransformation:
    """The optimizer of one prompt (or one model), with float32 state."""
    rate = schedule(config)
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


def per_prompt(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer for K prompts at once: clipping and factoring see one prompt at a time."""
    return optax.GradientTransformation(
        jax.vmap(optimizer.init),
        lambda updates, state, params=None: jax.vmap(optimizer.update)(updates, state, params),
    )
