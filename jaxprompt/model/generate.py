"""Decoding and scoring: everything sees ids only, and each is one compiled function."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprompt.model import t5
from jaxprompt.model.layers import shift_right


@functools.partial(jax.jit, static_argnames=("config", "length"))
def greedy(
    params: t5.Params,
    bank: Float[Array, "K P D"] | None,
    config: t5.T5Config,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    length: int,
) -> Int[Array, "B T"]:
    """Greedy generation of at most ``length`` ids a row; what follows EOS is padding.

    One compiled loop with a key/value cache that stops as soon as every row has ended.
    """
    encoded = t5.encode(params, bank, config, inputs, segments)
    batch = inputs.shape[0]

    def unfinished(state):
        index, _, _, ended, _ = state
        return (index < length) & ~jnp.all(ended)

    def step(state):
        index, ids, output, ended, cache = state
        logits, cache = t5.decode_step(params, bank, config, cache, segments, ids, index)
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        best = jnp.where(ended, config.pad_id, best)
        output = jax.lax.dynamic_update_index_in_dim(output, best, index, axis=1)
        return index + 1, best, output, ended | (best == config.eos_id), cache

    state = (
        jnp.int32(0),
        jnp.full((batch,), config.decoder_start_id, jnp.int32),
        jnp.full((batch, length), config.pad_id, jnp.int32),
        ~jnp.any(segments > 0, axis=1),  # empty rows have nothing to say
        t5.init_cache(params, config, encoded, length),
    )
    return jax.lax.while_loop(unfinished, step, state)[2]


@functools.partial(jax.jit, static_argnames=("config",))
def log_likelihood(
    params: t5.Params,
    bank: Float[Array, "K P D"] | None,
    config: t5.T5Config,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    targets: Int[Array, "B T"],
    target_segments: Int[Array, "B T"],
) -> Float[Array, " B"]:
    """log p(target | input) of each row: the sum over its target ids, EOS included."""
    encoded = t5.encode(params, bank, config, inputs, segments)
    return _score(params, bank, config, encoded, segments, targets, target_segments)


@functools.partial(jax.jit, static_argnames=("config",))
def label_log_likelihoods(
    params: t5.Params,
    bank: Float[Array, "K P D"] | None,
    config: t5.T5Config,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    labels: Int[Array, "C T"],
) -> Float[Array, "B C"]:
    """log p(label | input) of C candidate targets (EOS-terminated, zero-padded) for each row.

    The input is encoded once; only the short decoder pass is repeated for each label.
    """
    encoded = t5.encode(params, bank, config, inputs, segments)

    def score(label):
        targets = jnp.broadcast_to(label, (inputs.shape[0], label.shape[0]))
        label_segments = (targets != config.pad_id).astype(jnp.int32)
        return _score(params, bank, config, encoded, segments, targets, label_segments)

    return jax.lax.map(score, labels, batch_size=8).T


def _score(params, bank, config, encoded, segments, targets, target_segments):
    decoder_inputs = shift_right(targets, target_segments, config.decoder_start_id)
    logits = t5.decode(params, bank, config, encoded, segments, decoder_inputs, target_segments)
    tokens = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return jnp.sum(tokens * (target_segments > 0), axis=-1)
