"""Decoding and scoring: everything sees ids only, and each is one compiled function.

``prompts`` is what the family's ``prepare`` has made of a bank.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprompt.models import registry
from jaxprompt.models.label_tree import LabelTrees


@functools.partial(jax.jit, static_argnames=("config", "length"))
def greedy(
    params: registry.Params,
    prompts: registry.Prompts,
    config: registry.Config,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    length: int,
) -> Int[Array, "B T"]:
    """Greedy generation of at most ``length`` ids a row; what follows EOS is padding.

    A row of which a logit is no finite number is -1 throughout.
    One compiled loop with a key/value cache that stops as soon as every row has ended.
    """
    model, batch = registry.model_for(config), inputs.shape[0]
    reading = model.read(params, prompts, config, inputs, segments)
    first, cache = model.start(params, config, reading, length)

    def unfinished(state):
        index, _, _, ended, _, _ = state
        return (index < length) & ~jnp.all(ended)

    def step(state):
        index, ids, output, ended, lost, cache = state
        logits, cache = model.step(params, prompts, config, cache, ids, index)
        lost |= ~ended & ~_finite(logits)
        best = _most_likely(logits)
        best = jnp.where(ended, config.pad_id, best)
        output = jax.lax.dynamic_update_index_in_dim(output, best, index, axis=1)
        return index + 1, best, output, ended | lost | (best == config.eos_id), lost, cache

    state = (
        jnp.int32(0),
        first,
        jnp.full((batch, length), config.pad_id, jnp.int32),
        ~jnp.any(segments > 0, axis=1),  # empty rows have nothing to say
        jnp.zeros(batch, bool),
        cache,
    )
    _, _, output, _, lost, _ = jax.lax.while_loop(unfinished, step, state)
    return jnp.where(lost[:, None], -1, output)


def _finite(logits: Float[Array, "B V"]) -> Bool[Array, " B"]:
    """Whether a row's logits are finite: the largest is NaN where any of them is."""
    return jnp.isfinite(jnp.max(logits, axis=-1))


def _most_likely(logits):
    """The argmax, in an eighth of what XLA's CPU runtime (jax 0.10) takes for ``jnp.argmax``."""
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    largest = logits >= jnp.max(logits, axis=-1, keepdims=True)
    # none is where all are NaN: then the last word, never an id beyond the vocabulary
    return jnp.min(jnp.where(largest, ids, logits.shape[-1] - 1), axis=-1)


class _Beams(NamedTuple):
    """The hypotheses of every row: K that go on, and the best that has ended."""

    index: Int[Array, ""]
    live: Int[Array, "B K T"]
    live_scores: Float[Array, "B K"]  # log p
    ended: Int[Array, "B T"]
    ended_score: Float[Array, " B"]  # log p by length; the lowest number where there is none
    ids: Int[Array, " rows"]  # B x K of them
    lost: Bool[Array, " B"]  # a logit was no finite number
    cache: registry.Cache


_NEVER = -1e30


@functools.partial(jax.jit, static_argnames=("config", "length", "beams", "alpha"))
def beam(
    params: registry.Params,
    prompts: registry.Prompts,
    config: registry.Config,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    length: int,
    beams: int = 4,
    alpha: float = 0.6,
) -> Int[Array, "B T"]:
    """The best of ``beams`` hypotheses of at most ``length`` ids a row; after EOS is padding.

    A row of which a logit is no finite number is -1 throughout.
    A hypothesis of n ids, EOS included, is worth log p / ((5 + n) / 6)^alpha (Wu et al. 2016,
    arXiv 1609.08144, equation 14; T5 used 4 beams and alpha 0.6 for long targets). One that has not
    ended counts only where none has. Inputs are read once, and the loop stops as soon as no
    hypothesis of any row can still become its best.
    """
    model, batch = registry.model_for(config), inputs.shape[0]
    first, cache = model.start(
        params, config, model.read(params, prompts, config, inputs, segments), length
    )
    cache = model.repeat(cache, beams)
    empty = ~jnp.any(segments > 0, axis=1)  # such rows have nothing to say
    worth = lambda scores, count: scores / ((5.0 + count) / 6.0) ** alpha

    def unfinished(state: _Beams):
        # log p only falls, and the longest hypotheses are divided by most
        hope = worth(jnp.max(state.live_scores, axis=1), length)
        return (state.index < length) & jnp.any((hope > state.ended_score) & ~state.lost)

    def step(state: _Beams):
        logits, cache = model.step(params, prompts, config, state.cache, state.ids, state.index)
        vocabulary = logits.shape[-1]
        lost = state.lost | (~jnp.all(_finite(logits).reshape(batch, beams), axis=1) & ~empty)
        logp = jax.nn.log_softmax(logits).reshape(batch, beams, vocabulary)
        scores = (state.live_scores[:, :, None] + logp).reshape(batch, -1)
        # at most K of the best 2K can end here, so that K are left to go on
        scores, chosen = jax.lax.top_k(scores, 2 * beams)
        origin, ids = chosen // vocabulary, (chosen % vocabulary).astype(jnp.int32)
        candidates = jnp.take_along_axis(state.live, origin[:, :, None], axis=1)
        candidates = jax.lax.dynamic_update_index_in_dim(candidates, ids, state.index, axis=2)
        ends = ids == config.eos_id

        # one that ends must be among the best K, or it would not have been gone on with either
        ending = ends & (jnp.arange(2 * beams) < beams) & (scores > _NEVER / 2)
        values = jnp.where(ending, worth(scores, state.index + 1), _NEVER)
        best = jnp.argmax(values, axis=1)[:, None]
        score = jnp.take_along_axis(values, best, axis=1)[:, 0]
        found = jnp.take_along_axis(candidates, best[:, :, None], axis=1)[:, 0]
        better = score > state.ended_score
        ended = jnp.where(better[:, None], found, state.ended)
        ended_score = jnp.where(better, score, state.ended_score)

        live_scores, best = jax.lax.top_k(jnp.where(ends, _NEVER, scores), beams)
        live = jnp.take_along_axis(candidates, best[:, :, None], axis=1)
        rows = jnp.arange(batch)[:, None] * beams + jnp.take_along_axis(origin, best, axis=1)
        ids = jnp.take_along_axis(ids, best, axis=1)
        cache = model.reorder(cache, rows.reshape(-1))
        ids = ids.reshape(-1)
        return _Beams(state.index + 1, live, live_scores, ended, ended_score, ids, lost, cache)

    nothing = jnp.full((batch, beams, length), config.pad_id, jnp.int32)
    # all beams of a row begin alike: only the first may be followed
    start = jnp.where(jnp.arange(beams) == 0, 0.0, _NEVER)
    state = jax.lax.while_loop(
        unfinished,
        step,
        _Beams(
            jnp.int32(0),
            nothing,
            jnp.where(empty[:, None], _NEVER, start),
            nothing[:, 0],
            jnp.where(empty, 0.0, _NEVER),
            jnp.repeat(first, beams),
            jnp.zeros(batch, bool),
            cache,
        ),
    )
    found = jnp.where((state.ended_score > _NEVER)[:, None], state.ended, state.live[:, 0])
    found = jnp.where(state.lost[:, None], -1, found)
    return jnp.where(empty[:, None], config.pad_id, found)


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


@functools.partial(jax.jit, static_argnames=("config",))
def label_log_likelihoods(
    params: registry.Params,
    prompts: registry.Prompts,
    config: registry.Config,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    labels: LabelTrees,
) -> Float[Array, "R C"]:
    """log p(label | input) of C candidate targets, each ending in EOS, for each row.

    The input is read once, and what labels begin with is read once for all that do. Where examples
    share rows, there are ``widths(config).shared`` times B results.
    """
    model = registry.model_for(config)
    reading = model.read(params, prompts, config, inputs, segments)
    (count, _), groups = labels.tokens.shape, len(labels.trees.ids)
    size = -(-count // groups)

    def in_groups(x):
        x = jnp.pad(x, ((0, groups * size - count), (0, 0)), constant_values=-1)
        return x.reshape(groups, size, -1)

    def score(given):
        tree, nodes, tokens = given
        logits = model.answer_logits(params, prompts, config, reading, tree)
        found = logits[:, nodes, jnp.maximum(tokens, 0)]
        found -= jax.nn.logsumexp(logits, axis=-1)[:, nodes]
        return jnp.sum(found * (tokens >= 0), axis=-1)

    found = jax.lax.map(score, (labels.trees, in_groups(labels.nodes), in_groups(labels.tokens)))
    return found.swapaxes(0, 1).reshape(-1, groups * size)[:, :count]
