"""Log-likelihoods of given targets."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprompt.data.batches import Example
from jaxprompt.inference.engine import Engine, Program, Progress, ignore_progress
from jaxprompt.models import registry


def log_likelihoods(
    engine: Engine,
    examples: Sequence[Example],
    *,
    batch_size: int,
    progress: Progress = ignore_progress,
) -> Float[np.ndarray, " n"]:
    """log p(target | input) of each example, in nats, EOS included."""
    if not examples:
        return np.empty(0, np.float32)
    program = Program(log_likelihood, teacher_forced=True)
    return engine.run(program, examples, batch_size=batch_size, progress=progress)


@functools.partial(jax.jit, static_argnames=("config",))
def log_likelihood(
    params: registry.Params,
    prompts: registry.Prompts,
    config: registry.Config,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    targets: Int[Array, "R T"],
    target_segments: Int[Array, "R T"],
) -> Float[Array, " R"]:
    """log p(target | input) of each row: the sum over its target ids, EOS included."""
    model = registry.model_for(config)
    logits = model.logits(params, prompts, config, inputs, segments, targets, target_segments)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    each = picked - jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum(each * (target_segments > 0), axis=-1)
