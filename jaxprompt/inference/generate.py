"""Generation: greedy and with beams, each one compiled loop over ids.

The injection is what ``Model.prepare`` returned.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprompt.config.schema import TaskConfig
from jaxprompt.inference.engine import Program
from jaxprompt.models import registry
from jaxprompt.models.injection import Injection


class BeamSearch(NamedTuple):
    """How beams are searched: ids at most, hypotheses a row, and the power of the length."""

    length: int
    beams: int = 4
    alpha: float = 0.6

    def length_penalized_score(self, scores: jax.Array, count: jax.Array | int) -> jax.Array:
        """log p / ((5 + n) / 6)^alpha of hypotheses of n ids (Wu et al. 2016, equation 14)."""
        return scores / ((5.0 + count) / 6.0) ** self.alpha


def generation_program(task: TaskConfig) -> Program:
    """Generated ids for each row: [task.max_target_length].

    A row with logits that are not finite has -1 throughout.
    """
    if task.decoding == "beam":
        search = BeamSearch(task.max_target_length, task.beams, task.length_penalty)
        return Program(beam, settings=(("search", search),), logits=task.beams)
    return Program(greedy, settings=(("length", task.max_target_length),))


@functools.partial(jax.jit, static_argnames=("model", "length"))
def greedy(
    params: registry.Params,
    injection: Injection,
    model: registry.Model,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    length: int,
) -> Int[Array, "B T"]:
    """Greedy generation of at most ``length`` ids a row; what follows EOS is padding.

    A row of which a logit is no finite number is -1 throughout.
    One compiled loop with a key/value cache that stops as soon as every row has ended.
    """
    config, batch = model.config, inputs.shape[0]
    prefill = model.prefill(params, injection, inputs, segments)
    first, cache = model.init_decode(params, injection, prefill, length)

    def unfinished(state):
        index, _, _, ended, _, _ = state
        return (index < length) & ~jnp.all(ended)

    def step(state):
        index, ids, output, ended, non_finite, cache = state
        logits, cache = model.decode_step(params, injection, cache, ids, index)
        non_finite |= ~ended & ~_finite(logits)
        best = _most_likely(logits)
        best = jnp.where(ended, config.pad_id, best)
        output = jax.lax.dynamic_update_index_in_dim(output, best, index, axis=1)
        return (
            index + 1,
            best,
            output,
            ended | non_finite | (best == config.eos_id),
            non_finite,
            cache,
        )

    state = (
        jnp.int32(0),
        first,
        jnp.full((batch, length), config.pad_id, jnp.int32),
        ~jnp.any(segments > 0, axis=1),  # empty rows have nothing to say
        jnp.zeros(batch, bool),
        cache,
    )
    _, _, output, _, non_finite, _ = jax.lax.while_loop(unfinished, step, state)
    return jnp.where(non_finite[:, None], -1, output)


def _finite(logits: Float[Array, "B V"]) -> Bool[Array, " B"]:
    """Whether a row's logits are finite: the largest is NaN where any of them is."""
    return jnp.isfinite(jnp.max(logits, axis=-1))


def _most_likely(logits):
    """The argmax, in an eighth of what XLA's CPU runtime (jax 0.10) takes for ``jnp.argmax``."""
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    largest = logits >= jnp.max(logits, axis=-1, keepdims=True)
    # no logit matches where all are NaN: then the last word, never an id beyond the vocabulary
    return jnp.min(jnp.where(largest, ids, logits.shape[-1] - 1), axis=-1)


class _Beams(NamedTuple):
    """The hypotheses of every row: K that go on, and the best that has ended."""

    position: Int[Array, ""]
    live: Int[Array, "B K T"]
    live_scores: Float[Array, "B K"]  # log p
    ended: Int[Array, "B T"]
    ended_score: Float[Array, " B"]  # log p by length; the lowest number where there is none
    ids: Int[Array, " rows"]  # B x K of them
    non_finite: Bool[Array, " B"]  # a logit was no finite number
    cache: registry.Cache


class _Candidates(NamedTuple):
    """The best 2K continuations of a row's live hypotheses, best first."""

    scores: Float[Array, "B C"]  # log p
    texts: Int[Array, "B C T"]
    origin: Int[Array, "B C"]  # the live hypothesis that each continues
    ids: Int[Array, "B C"]  # the id that is new


_NEVER = -1e30


@functools.partial(jax.jit, static_argnames=("model", "search"))
def beam(
    params: registry.Params,
    injection: Injection,
    model: registry.Model,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    search: BeamSearch,
) -> Int[Array, "B T"]:
    """The best of ``search.beams`` hypotheses of at most ``search.length`` ids a row.

    What follows EOS is padding. A row with a logit that is not finite is -1 throughout.
    T5 used 4 beams and alpha 0.6 for long targets (arXiv 1609.08144 has the length penalty). A
    hypothesis that has not ended counts only where none has. Inputs are read once, and the loop
    stops as soon as no hypothesis of any row can still become its best.
    """
    config = model.config
    prefill = model.prefill(params, injection, inputs, segments)
    first, cache = model.init_decode(params, injection, prefill, search.length)
    empty = ~jnp.any(segments > 0, axis=1)  # such rows generate nothing

    def unfinished(state: _Beams):
        # an upper bound: log p only falls, and the length penalty is largest at full length
        hope = search.length_penalized_score(jnp.max(state.live_scores, axis=1), search.length)
        going = (hope > state.ended_score) & ~state.non_finite
        return (state.position < search.length) & jnp.any(going)

    def step(state: _Beams):
        logits, cache = model.decode_step(params, injection, state.cache, state.ids, state.position)
        finite = jnp.all(_finite(logits).reshape(-1, search.beams), axis=1)
        candidates = _continue(state, logits, search.beams)
        ends = candidates.ids == config.eos_id
        ended, ended_score = _best_ended(state, candidates, ends, search)
        live, live_scores, ids, rows = _keep_live(candidates, ends, search.beams)
        non_finite = state.non_finite | (~finite & ~empty)
        cache = model.gather_beams(cache, rows)
        return _Beams(
            state.position + 1, live, live_scores, ended, ended_score, ids, non_finite, cache
        )

    cache = model.tile_cache(cache, search.beams)
    state = jax.lax.while_loop(unfinished, step, _start(first, cache, empty, search, config.pad_id))
    ids = jnp.where((state.ended_score > _NEVER)[:, None], state.ended, state.live[:, 0])
    ids = jnp.where(state.non_finite[:, None], -1, ids)
    return jnp.where(empty[:, None], config.pad_id, ids)


def _start(
    first: Int[Array, " B"],
    cache: registry.Cache,
    empty: Bool[Array, " B"],
    search: BeamSearch,
    pad_id: int,
) -> _Beams:
    """K equal hypotheses without ids, of which only the first may be continued."""
    batch = len(first)
    nothing = jnp.full((batch, search.beams, search.length), pad_id, jnp.int32)
    scores = jnp.where(jnp.arange(search.beams) == 0, 0.0, _NEVER)
    return _Beams(
        jnp.int32(0),
        nothing,
        jnp.where(empty[:, None], _NEVER, scores),
        nothing[:, 0],
        jnp.where(empty, 0.0, _NEVER),
        jnp.repeat(first, search.beams),
        jnp.zeros(batch, bool),
        cache,
    )


def _continue(state: _Beams, logits: Float[Array, "rows V"], beams: int) -> _Candidates:
    """The best 2K continuations: at most K of them can end, so that K are left to go on."""
    batch, vocabulary = len(state.live), logits.shape[-1]
    logp = jax.nn.log_softmax(logits).reshape(batch, beams, vocabulary)
    scores = (state.live_scores[:, :, None] + logp).reshape(batch, -1)
    scores, chosen = jax.lax.top_k(scores, 2 * beams)
    origin, ids = chosen // vocabulary, (chosen % vocabulary).astype(jnp.int32)
    texts = jnp.take_along_axis(state.live, origin[:, :, None], axis=1)
    texts = jax.lax.dynamic_update_index_in_dim(texts, ids, state.position, axis=2)
    return _Candidates(scores, texts, origin, ids)


def _best_ended(
    state: _Beams, candidates: _Candidates, ends: Bool[Array, "B C"], search: BeamSearch
) -> tuple[Int[Array, "B T"], Float[Array, " B"]]:
    """The best hypothesis of each row that has ended by now, and its score."""
    # a hypothesis that ends must be among the best K, or it would not have been continued either
    ending = ends & (jnp.arange(2 * search.beams) < search.beams)
    ending &= candidates.scores > _NEVER / 2
    values = jnp.where(
        ending, search.length_penalized_score(candidates.scores, state.position + 1), _NEVER
    )
    best = jnp.argmax(values, axis=1)[:, None]
    score = jnp.take_along_axis(values, best, axis=1)[:, 0]
    text = jnp.take_along_axis(candidates.texts, best[:, :, None], axis=1)[:, 0]
    better = score > state.ended_score
    return jnp.where(better[:, None], text, state.ended), jnp.where(
        better, score, state.ended_score
    )


def _keep_live(
    candidates: _Candidates, ends: Bool[Array, "B C"], beams: int
) -> tuple[Int[Array, "B K T"], Float[Array, "B K"], Int[Array, " rows"], Int[Array, " rows"]]:
    """The K best that go on, their scores, their newest ids, and the cache rows they continue."""
    scores, best = jax.lax.top_k(jnp.where(ends, _NEVER, candidates.scores), beams)
    live = jnp.take_along_axis(candidates.texts, best[:, :, None], axis=1)
    origin = jnp.take_along_axis(candidates.origin, best, axis=1)
    rows = jnp.arange(len(scores))[:, None] * beams + origin
    ids = jnp.take_along_axis(candidates.ids, best, axis=1)
    return live, scores, ids.reshape(-1), rows.reshape(-1)
