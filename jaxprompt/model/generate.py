"""Decoding and scoring: everything sees ids only, and each is one compiled function.

``prompts`` is what the family's ``prepare`` has made of a bank.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprompt.model import family


@functools.partial(jax.jit, static_argnames=("config", "length"))
def greedy(
    params: family.Params,
    prompts: family.Prompts,
    config: family.Config,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    length: int,
) -> Int[Array, "B T"]:
    """Greedy generation of at most ``length`` ids a row; what follows EOS is padding.

    One compiled loop with a key/value cache that stops as soon as every row has ended.
    """
    model, batch = family.of(config), inputs.shape[0]
    reading = model.read(params, prompts, config, inputs, segments)
    first, cache = model.start(params, config, reading, length)

    def unfinished(state):
        index, _, _, ended, _ = state
        return (index < length) & ~jnp.all(ended)

    def step(state):
        index, ids, output, ended, cache = state
        logits, cache = model.step(params, prompts, config, cache, ids, index)
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        best = jnp.where(ended, config.pad_id, best)
        output = jax.lax.dynamic_update_index_in_dim(output, best, index, axis=1)
        return index + 1, best, output, ended | (best == config.eos_id), cache

    state = (
        jnp.int32(0),
        first,
        jnp.full((batch, length), config.pad_id, jnp.int32),
        ~jnp.any(segments > 0, axis=1),  # empty rows have nothing to say
        cache,
    )
    return jax.lax.while_loop(unfinished, step, state)[2]


@functools.partial(jax.jit, static_argnames=("config",))
def log_likelihood(
    params: family.Params,
    prompts: family.Prompts,
    config: family.Config,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    targets: Int[Array, "B T"],
    target_segments: Int[Array, "B T"],
) -> Float[Array, " B"]:
    """log p(target | input) of each row: the sum over its target ids, EOS included."""
    model = family.of(config)
    logits = model.logits(params, prompts, config, inputs, segments, targets, target_segments)
    return _sum(logits, targets, target_segments)


@functools.partial(jax.jit, static_argnames=("config",))
def label_log_likelihoods(
    params: family.Params,
    prompts: family.Prompts,
    config: family.Config,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    labels: Int[Array, "C T"],
) -> Float[Array, "B C"]:
    """log p(label | input) of C candidate targets (EOS-terminated, padded with -1) for each row.

    The input is read once; only the short pass over the answer is repeated for each label.
    """
    model = family.of(config)
    reading = model.read(params, prompts, config, inputs, segments)

    def score(label):
        targets = jnp.broadcast_to(label, (inputs.shape[0], label.shape[0]))
        label_segments = (targets >= 0).astype(jnp.int32)
        targets = jnp.maximum(targets, 0)
        logits = model.answer_logits(params, prompts, config, reading, targets, label_segments)
        return _sum(logits, targets, label_segments)

    return jax.lax.map(score, labels, batch_size=8).T


def _sum(logits, targets, segments):
    tokens = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return jnp.sum(tokens * (segments > 0), axis=-1)
