"""Attention to one example after another, its own or of what answers it: what CPUs are fast at.

An example's logits stay in the core's cache, none are computed between two examples of a row, and
for the gradient they are computed again. Every product of the backward pass is put so that XLA's
CPU runtime (jax 0.10, 0.11) has a fast form for it, which one with a transposed left operand is
not. Letters as in ``jaxprompt.data.virtual_tokens``.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from jaxprompt.models.precision import from_bits, to_bits

_LOW = -1e30
# so many logits of whole rows stay in a core's cache, and are faster at once
LOGITS_AT_ONCE = 2**19


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["starts", "lengths", "bounds", "asked_by"], meta_fields=["widths"],
)  # fmt: skip
@dataclass(frozen=True)
class Segments:
    """Where the segments of a batch are, in its rows one after another; found once for all layers.

    Those from ``bounds[k]`` to ``bounds[k + 1]`` are computed at ``widths[k]`` positions.
    """

    starts: Int[Array, " n"]
    lengths: Int[Array, " n"]
    bounds: Int[Array, " W+1"]
    asked_by: Int[Array, " n"] | None  # rows of queries; None: by their own positions
    widths: tuple[int, ...]


def find(segments: Int[Array, "B S"], widths: tuple[int, ...] = (), *, each: int = 0) -> Segments:
    """The segments of all rows; segment 0 is padding and no segment.

    widths: what lengths are rounded up to, in order; each is compiled for itself. No segment may
    be longer than the last of them, or than S.
    each: those of row b are attended to by rows b each, b each + 1, ... of queries, if not 0.
    """
    longest = min((segments.shape[1], *widths[-1:]))
    widths = *(width for width in widths if width < longest), longest
    before, after = (jnp.pad(segments, ((0, 0), pad)) for pad in ((1, 0), (0, 1)))
    size = segments.size
    first = (segments > 0) & (segments != before[:, :-1])
    last = (segments > 0) & (segments != after[:, 1:])
    number = jnp.arange(size, dtype=jnp.int32)
    places = lambda x: jnp.sort(jnp.where(x.reshape(-1), number, size))
    starts, lengths = places(first), places(last) + 1 - places(first)
    # no segment, if the start is beyond the rows; those come last
    at = jnp.searchsorted(jnp.array(widths), lengths, method="compare_all")
    at = jnp.where(starts < size, at, len(widths) + 1)
    order = jnp.argsort(at, stable=True)
    starts, lengths, at = starts[order], lengths[order], at[order]
    bounds = (at[:, None] < jnp.arange(len(widths) + 1)).sum(0, dtype=jnp.int32)
    number = segments.reshape(-1).at[starts].get(mode="clip")
    asked_by = starts // segments.shape[1] * each + number - 1 if each else None
    return Segments(starts, lengths, bounds, asked_by, widths)


def best_widths(lengths: Sequence[int], count: int = 4) -> tuple[int, ...]:
    """At most ``count`` multiples of 32 that are the least work for segments of these lengths.

    That is the square of the width that each is computed at, the least that holds it. Every width
    is compiled for itself.
    """
    needed = Counter(-(-length // 32) * 32 for length in lengths)
    every, found = sorted(needed), []
    up_to = {0: 0} | dict(
        zip(every, itertools.accumulate(needed[width] for width in every), strict=True)
    )
    # the least work of all up to a width, and the widths that are it
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for _ in range(min(count, len(every))):
        best = {
            width: min(
                (work + width**2 * (up_to[width] - up_to[below]), (*widths, width))
                for below, (work, widths) in best.items() if below < width
            )
            for width in every if min(best) < width
        }  # fmt: skip
        found.append(best[every[-1]])
    return min(found)[1]


def attention(
    query: Float[Array, "R T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    bias: Float[Array, "1 N W W"] | None,
    segments: Segments,
    keep: Float[Array, "B S M"] | None = None,
    *,
    mixed: bool = False,
) -> Float[Array, "R T N H"]:
    """``layers.attention`` within each segment, or to it by the row that asks it; else 0.

    bias: for offsets up to W, the last width of the segments. One that is longer makes all of the
    result NaN.
    keep: what weights are multiplied with, by key. M is N, or M / N queries after each other are
    heads of one position, where they share keys.
    mixed: as in ``layers.product``, and the result is bfloat16.
    """
    shape = query.shape
    flat = [x.reshape(-1, *shape[2:]) for x in (query, key, value)]
    mixed = mixed or query.dtype == jnp.bfloat16
    bias = None if bias is None else bias[0]
    keep = None if keep is None else keep.reshape(-1, keep.shape[-1])
    found: Any = _attend(mixed, shape[1], *flat, bias, keep, segments)
    return found.reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(mixed, asking, query, key, value, bias, keep, segments):
    return _forward(mixed, asking, query, key, value, bias, keep, segments)[0]


def _stored(x, mixed):
    """[n, N, H] as [n, N H]; bfloat16 as its bits."""
    x = x.reshape(len(x), -1)
    return to_bits(x) if mixed else x


def _usable(x):
    return from_bits(x) if x.dtype == jnp.uint16 else x


def _product(spec, a, b):
    return jnp.einsum(spec, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


class _Span(NamedTuple):
    """A head of ``width`` positions in the rows."""

    start: Any
    own: Any  # [width], which positions are meant
    head: Any

    def read(self, x, size):
        """[width, size] of x [n, N size]."""
        return jax.lax.dynamic_slice(x, (self.start, self.head * size), (len(self.own), size))

    def read_turned(self, x, size):
        """[size, width] of x [N size, n]."""
        return jax.lax.dynamic_slice(x, (self.head * size, self.start), (size, len(self.own)))

    def write(self, x, new):
        """``x`` with what is ``new`` [width, size] at the segment's own positions."""
        new = _stored(new, x.dtype == jnp.uint16)
        new = jnp.where(self.own[:, None], new, self.read(x, new.shape[1]))
        return jax.lax.dynamic_update_slice(x, new, (self.start, self.head * new.shape[1]))


def _logits(query, key, bias, keys):
    found = _product("th,sh->ts", query, key) + jnp.where(keys.own, 0.0, _LOW)
    if bias is None:
        return found
    return found + jax.lax.dynamic_slice(bias, (keys.head, 0, 0), (1, *found.shape))[0]


def _kept(weights, keep, keys, heads):
    """``weights`` [T, S] times what ``keep`` [n, M] is for these keys, for any number of heads."""
    if keep is None:
        return weights
    size = keep.shape[1] // heads
    factor = keys.read(keep, size).T
    return (weights.reshape(-1, *factor.shape) * factor).reshape(weights.shape)


def _each(segments, asking, shape, work, carry):
    """``carry = work(queries, keys, carry)`` for every head of every segment of keys [n, N].

    asking: queries of a row, where they are not the segment itself.
    """
    total, heads = shape

    def of_segment(width, i, carry):
        start = segments.starts[i]
        begin = jnp.minimum(start, total - width)
        places = begin + jnp.arange(width)
        own = (places >= start) & (places < start + segments.lengths[i])

        def of_head(head, carry):
            keys = queries = _Span(begin, own, head)
            if segments.asked_by is not None:
                first = segments.asked_by[i] * asking
                queries = _Span(first, jnp.ones(asking, bool), head)
            return work(queries, keys, carry)

        return jax.lax.fori_loop(0, heads, of_head, carry)

    for k, width in enumerate(segments.widths):  # a switch in one loop would copy what is carried
        some = segments.bounds[k], segments.bounds[k + 1]
        carry = jax.lax.fori_loop(*some, functools.partial(of_segment, width), carry)
    return carry


def _read(given, queries, keys, size):
    """What there is of query, key and value, and of what else is as the query."""
    spans = queries, keys, keys, queries
    return [span.read(x, size) for span, x in zip(spans, given, strict=False)]


def _forward(mixed, asking, query, key, value, bias, keep, segments):
    given = [_stored(x, mixed) for x in (query, key, value)]
    heads, size = query.shape[1:]

    def work(queries, keys, carry):
        query, key, value = map(_usable, _read(given, queries, keys, size))
        logits = _logits(query, key, bias, keys) + alarm
        most = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - most)
        mass = jnp.sum(weights, axis=-1, keepdims=True)
        weights = _kept(weights / mass, keep, keys, heads)
        y = _product("ts,sh->th", weights.astype(value.dtype), value)
        return queries.write(carry[0], y), queries.write(carry[1], most + jnp.log(mass))

    # NaN for all where a segment is too long, told without another pass over the result
    alarm = jnp.where(jnp.max(segments.lengths) > segments.widths[-1], jnp.nan, 0.0)
    nothing = _stored(jnp.broadcast_to(alarm.astype(query.dtype), query.shape), mixed)
    y, log_mass = _each(
        segments, asking, key.shape[:2], work, (nothing, jnp.zeros(query.shape[:2]))
    )
    return _usable(y).reshape(query.shape), (*given, log_mass)


def _attend_forward(mixed, asking, query, key, value, bias, keep, segments):
    learned = None if bias is None or not bias.perturbed else jnp.zeros(())
    every = query, key, value, bias, keep, segments
    query, key, value, bias, keep, segments = jax.tree.map(lambda x: x.value, every)
    y, kept = _forward(mixed, asking, query, key, value, bias, keep, segments)
    like = jnp.zeros((0, *query.shape[1:]), query.dtype)
    return y, (kept, bias, keep, segments, like, learned)


def _attend_backward(mixed, asking, kept, cotangent):
    (*given, log_mass), bias, keep, segments, like, learned = kept
    if isinstance(cotangent, SymbolicZero):
        return None, None, None, None, None, None
    cotangent = _stored(cotangent, mixed)
    heads, size = like.shape[1:]
    # here and not in the loop, where XLA would make one of a transposition and a product
    turned = given[0].T, cotangent.T

    def work(queries, keys, carry):
        parts = _read((*given, cotangent), queries, keys, size)
        # what belongs to others has weight 0 and gives nothing
        parts[3] = jnp.where(queries.own[:, None], parts[3], 0)
        query, key, value, grad = map(_usable, parts)
        query_turned, grad_turned = (_usable(queries.read_turned(x, size)) for x in turned)
        own = lambda x: jnp.where(keys.own, x, 0)
        mass = jnp.where(queries.own[:, None], queries.read(log_mass, 1), -_LOW)
        weights = jnp.exp(_logits(query, key, bias, keys) - mass)
        of_weights = _kept(_product("th,sh->ts", grad, value), keep, keys, heads)
        mean = jnp.sum(weights * of_weights, axis=-1, keepdims=True)
        of_logits = weights * (of_weights - mean)
        narrow = of_logits.astype(query.dtype)
        weights = _kept(weights, keep, keys, heads).astype(query.dtype)
        found = (
            _product("ts,sh->th", narrow, key),
            own(_product("ht,ts->hs", query_turned, narrow)).T,
            own(_product("ht,ts->hs", jnp.where(queries.own, grad_turned, 0), weights)).T,
        )
        of_bias = carry[3:]
        if learned is not None:
            at = (keys.head, 0, 0)
            old = jax.lax.dynamic_slice(of_bias[0], at, (1, *of_logits.shape))
            of_bias = (jax.lax.dynamic_update_slice(of_bias[0], old + of_logits, at),)
        spans = queries, keys, keys
        written = (span.write(x, y) for span, x, y in zip(spans, carry, found, strict=False))
        return *written, *of_bias

    carry = [jnp.zeros_like(x) for x in given]
    carry += [] if learned is None else [jnp.zeros(bias.shape)]
    shape = len(given[1]), heads
    found = _each(segments, asking, shape, work, tuple(carry))
    three = [_usable(x).reshape(-1, *like.shape[1:]).astype(like.dtype) for x in found[:3]]
    return *three, None if learned is None else found[3].astype(bias.dtype), None, None


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
