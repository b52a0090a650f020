"""Attention of one example after another, which CPUs are fast at.

The logits of one example stay in the core's cache, and none are computed between two examples of a
row. The backward pass computes them again. XLA's CPU runtime (jax 0.10, 0.11) has no fast form of a
product with a transposed left operand, so the backward pass has none. Letters: see
``jaxprompt.data.virtual_tokens``.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from jaxprompt.models.ops.attention.prefix import Part
from jaxprompt.models.precision import from_bits, to_bits

_LOW = -1e30
# up to so many logits, attention over whole rows stays in a core's cache and is faster
LOGITS_AT_ONCE = 2**19


@no_type_check  # JAX also builds it from objects that are not arrays
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["starts", "lengths", "bounds", "query_rows"], meta_fields=["widths"],
)  # fmt: skip
@dataclass(frozen=True)
class PerExampleMask:
    """Each segment is attended to by its own positions, or by one row of queries.

    The positions of a batch are counted through all of its rows. The segments from ``bounds[k]`` to
    ``bounds[k + 1]`` are computed at ``widths[k]`` positions.
    """

    starts: Int[Array, " n"]
    lengths: Int[Array, " n"]
    bounds: Int[Array, " edges"]
    query_rows: Int[Array, " n"] | None  # None: a segment attends to itself
    widths: tuple[int, ...]

    def attend(
        self,
        query: Float[Array, "R T N H"],
        key: Float[Array, "B S N H"],
        value: Float[Array, "B S N H"],
        bias: Float[Array, "1 N W W"] | None = None,
        *,
        mixed: bool = False,
    ) -> Float[Array, "R T N H"]:
        """Attention to each segment, see ``AttentionMask``; 0 at positions of no segment.

        The result is NaN where a segment is longer than W, the last of the widths. With ``mixed``
        it is rounded to bfloat16.
        """
        return self._attend(query, key, value, bias, None, mixed)

    def attend_part(
        self,
        query: Float[Array, "R T N H"],
        key: Float[Array, "B S N H"],
        value: Float[Array, "B S N H"],
        bias: Float[Array, "1 N W W"] | None = None,
        *,
        mixed: bool = False,
    ) -> Part:
        """``attend``, to which attention to other keys can be added."""
        y, log_total = self._results(query, key, value, bias, None, mixed, True)
        return Part(y, log_total.reshape(query.shape[:3]))

    def attend_to_vectors(
        self,
        query: Float[Array, "R T N D"],
        vectors: Float[Array, "B S D"],
        keep: Float[Array, "B S N"] | None = None,
        *,
        mixed: bool = False,
    ) -> Float[Array, "R T N D"]:
        """Attention to vectors that are both keys and values, see ``CrossAttentionMask``."""
        queries, one_head = _as_one_head(query, vectors)
        return self._attend(queries, one_head, one_head, None, keep, mixed).reshape(query.shape)

    def attend_part_to_vectors(
        self,
        query: Float[Array, "R T N D"],
        vectors: Float[Array, "B S D"],
        keep: Float[Array, "B S N"] | None = None,
        *,
        mixed: bool = False,
    ) -> Part:
        """``attend_to_vectors``, to which attention to other keys can be added."""
        queries, one_head = _as_one_head(query, vectors)
        y, log_total = self._results(queries, one_head, one_head, None, keep, mixed, True)
        return Part(y.reshape(query.shape), log_total.reshape(query.shape[:3]))

    def _attend(self, query, key, value, bias, keep, mixed: bool) -> jax.Array:
        return self._results(query, key, value, bias, keep, mixed, False)[0]

    def _results(
        self, query, key, value, bias, keep, mixed: bool, with_log_total: bool
    ) -> tuple[jax.Array, jax.Array]:
        """keep [B, S, M] multiplies weights by key. M is N, or M / N queries in turn are heads.

        Returns:
            The result, and log totals [R T, N], or nothing of them where they are not asked for.
        """
        flat = [x.reshape(-1, *query.shape[2:]) for x in (query, key, value)]
        mixed = mixed or query.dtype == jnp.bfloat16
        bias = None if bias is None else bias[0]
        keep = None if keep is None else keep.reshape(-1, keep.shape[-1])
        form = _Form(mixed, query.shape[1], with_log_total)
        y, log_total = _attend(form, *flat, bias, keep, self)
        return y.reshape(query.shape), log_total


def _as_one_head(query: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Heads that share their keys, as queries of one head."""
    rows, length, heads, width = query.shape
    return query.reshape(rows, length * heads, width)[:, :, None], vectors[:, :, None]


def per_example_mask(
    segments: Int[Array, "B S"], widths: tuple[int, ...] = (), *, queries_per_row: int = 0
) -> PerExampleMask:
    """The mask of the segments of all rows; segment 0 is padding.

    Args:
        segments: of the keys.
        widths: lengths are rounded up to one of these, in increasing order; there is a loop for
            each. No segment may be longer than the last of them, or than S.
        queries_per_row: G, if each segment is attended to by one row of queries: segment 1 of row b
            by row b G of the queries, segment 2 by row b G + 1. 0: segments attend to themselves.
    """
    longest = min((segments.shape[1], *widths[-1:]))
    widths = *(width for width in widths if width < longest), longest
    before, after = (jnp.pad(segments, ((0, 0), pad)) for pad in ((1, 0), (0, 1)))
    size = segments.size
    first = (segments > 0) & (segments != before[:, :-1])
    last = (segments > 0) & (segments != after[:, 1:])
    number = jnp.arange(size, dtype=jnp.int32)
    positions = lambda x: jnp.sort(jnp.where(x.reshape(-1), number, size))
    starts, lengths = positions(first), positions(last) + 1 - positions(first)
    # where the start is beyond the rows there is no segment; those come last
    at = jnp.searchsorted(jnp.array(widths), lengths, method="compare_all")
    at = jnp.where(starts < size, at, len(widths) + 1)
    order = jnp.argsort(at, stable=True)
    starts, lengths, at = starts[order], lengths[order], at[order]
    bounds = (at[:, None] < jnp.arange(len(widths) + 1)).sum(0, dtype=jnp.int32)
    number = segments.reshape(-1).at[starts].get(mode="clip")
    query_rows = None
    if queries_per_row:
        query_rows = starts // segments.shape[1] * queries_per_row + number - 1
    return PerExampleMask(starts, lengths, bounds, query_rows, widths)


def best_widths(lengths: Sequence[int], count: int = 4) -> tuple[int, ...]:
    """At most ``count`` multiples of 32 that are the least work for segments of these lengths.

    A segment is computed at the smallest width that holds it, and its work is that width squared.
    There is a compiled loop for every width.
    """
    needed = Counter(-(-length // 32) * 32 for length in lengths)
    every, choices = sorted(needed), []
    up_to = {0: 0} | dict(
        zip(every, itertools.accumulate(needed[width] for width in every), strict=True)
    )
    # for the lengths up to a width: the least work, and the widths that reach it
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for _ in range(min(count, len(every))):
        best = {
            width: min(
                (work + width**2 * (up_to[width] - up_to[below]), (*widths, width))
                for below, (work, widths) in best.items() if below < width
            )
            for width in every if min(best) < width
        }  # fmt: skip
        choices.append(best[every[-1]])
    return min(choices)[1]


@dataclass(frozen=True)
class _Form:
    """What the compiled kernel depends on beside shapes."""

    mixed: bool
    row_length: int  # of queries
    with_log_total: bool = False  # the log of the sum of exp(logits) is a result too


def _attend_each(form, query, key, value, bias, keep, mask):
    y, (*_, log_total) = _forward(form, query, key, value, bias, keep, mask)
    return y, log_total if form.with_log_total else None


_attend = jax.custom_vjp(_attend_each, nondiff_argnums=(0,))


def _stored(x: jax.Array, mixed: bool) -> jax.Array:
    """[n, N, H] as [n, N H]; bfloat16 as its bits."""
    x = x.reshape(len(x), -1)
    return to_bits(x) if mixed else x


def _dequantized(x: jax.Array) -> jax.Array:
    return from_bits(x) if x.dtype == jnp.uint16 else x


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


class _Span(NamedTuple):
    """One head of ``width`` positions in the rows."""

    start: jax.Array
    inside: Bool[Array, " width"]  # whether a position is of the segment
    head: jax.Array

    def read(self, x, size):
        """[width, size] of x [n, N size]."""
        return jax.lax.dynamic_slice(x, (self.start, self.head * size), (len(self.inside), size))

    def read_transposed(self, x, size):
        """[size, width] of x [N size, n]."""
        return jax.lax.dynamic_slice(x, (self.head * size, self.start), (size, len(self.inside)))

    def write(self, x, new):
        """``x`` with ``new`` [width, size] at the positions of the segment."""
        new = _stored(new, x.dtype == jnp.uint16)
        new = jnp.where(self.inside[:, None], new, self.read(x, new.shape[1]))
        return jax.lax.dynamic_update_slice(x, new, (self.start, self.head * new.shape[1]))


def _logits(query, key, bias, keys):
    logits = _product("th,sh->ts", query, key) + jnp.where(keys.inside, 0.0, _LOW)
    if bias is None:
        return logits
    return logits + jax.lax.dynamic_slice(bias, (keys.head, 0, 0), (1, *logits.shape))[0]


def _dropped(weights, keep, keys, heads):
    """``weights`` [T, S] times ``keep`` [n, M] of these keys, for any number of heads."""
    if keep is None:
        return weights
    size = keep.shape[1] // heads
    factor = keys.read(keep, size).T
    return (weights.reshape(-1, *factor.shape) * factor).reshape(weights.shape)


def _for_each_head(mask, row_length, shape, work, carry):
    """``carry = work(queries, keys, carry)`` for every head of every segment of keys [n, N].

    row_length: of a row of queries, where a segment does not attend to itself.
    """
    total, heads = shape

    def of_segment(width, i, carry):
        start = mask.starts[i]
        begin = jnp.minimum(start, total - width)
        positions = begin + jnp.arange(width)
        inside = (positions >= start) & (positions < start + mask.lengths[i])

        def of_head(head, carry):
            keys = queries = _Span(begin, inside, head)
            if mask.query_rows is not None:
                first = mask.query_rows[i] * row_length
                queries = _Span(first, jnp.ones(row_length, bool), head)
            return work(queries, keys, carry)

        return jax.lax.fori_loop(0, heads, of_head, carry)

    for k, width in enumerate(mask.widths):  # a switch in one loop would copy what is carried
        first, last = mask.bounds[k], mask.bounds[k + 1]
        carry = jax.lax.fori_loop(first, last, functools.partial(of_segment, width), carry)
    return carry


def _read(arrays, queries, keys, size):
    """The spans of query, key, value and, if there is one, of another array of the query's form."""
    spans = queries, keys, keys, queries
    return [span.read(x, size) for span, x in zip(spans, arrays, strict=False)]


def _forward(form, query, key, value, bias, keep, mask):
    stored = [_stored(x, form.mixed) for x in (query, key, value)]
    heads, size = query.shape[1:]

    def work(queries, keys, carry):
        query, key, value = map(_dequantized, _read(stored, queries, keys, size))
        logits = _logits(query, key, bias, keys) + alarm
        largest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = _dropped(weights / total, keep, keys, heads)
        y = _product("ts,sh->th", weights.astype(value.dtype), value)
        return queries.write(carry[0], y), queries.write(carry[1], largest + jnp.log(total))

    # Where a segment is too long, all is NaN; this way it takes no other pass over the result.
    alarm = jnp.where(jnp.max(mask.lengths) > mask.widths[-1], jnp.nan, 0.0)
    nothing = _stored(jnp.broadcast_to(alarm.astype(query.dtype), query.shape), form.mixed)
    y, log_total = _for_each_head(
        mask, form.row_length, key.shape[:2], work, (nothing, jnp.zeros(query.shape[:2]))
    )
    return _dequantized(y).reshape(query.shape), (*stored, log_total)


def _attend_forward(form, query, key, value, bias, keep, mask):
    learned = None if bias is None or not bias.perturbed else jnp.zeros(())
    primals = query, key, value, bias, keep, mask
    query, key, value, bias, keep, mask = jax.tree.map(lambda x: x.value, primals)
    y, residuals = _forward(form, query, key, value, bias, keep, mask)
    like = jnp.zeros((0, *query.shape[1:]), query.dtype)
    log_total = residuals[-1] if form.with_log_total else None
    return (y, log_total), (residuals, bias, keep, mask, like, learned)


def _attend_backward(form, residuals, cotangents):
    (*stored, log_total), bias, keep, mask, like, learned = residuals
    cotangent, of_log_total = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    if cotangent is None and of_log_total is None:
        return None, None, None, None, None, None
    if cotangent is None:
        cotangent = jnp.zeros((len(stored[0]), *like.shape[1:]), like.dtype)
    cotangent = _stored(cotangent, form.mixed)
    heads, size = like.shape[1:]
    # in the loop, XLA would fuse a transposition with its product
    transposed = stored[0].T, cotangent.T

    def work(queries, keys, carry):
        parts = _read((*stored, cotangent), queries, keys, size)
        # positions of other segments have weight 0 and add nothing
        parts[3] = jnp.where(queries.inside[:, None], parts[3], 0)
        query, key, value, grad = map(_dequantized, parts)
        query_transposed, grad_transposed = (
            _dequantized(queries.read_transposed(x, size)) for x in transposed
        )
        at_keys = lambda x: jnp.where(keys.inside, x, 0)
        total = jnp.where(queries.inside[:, None], queries.read(log_total, 1), -_LOW)
        weights = jnp.exp(_logits(query, key, bias, keys) - total)
        of_weights = _dropped(_product("th,sh->ts", grad, value), keep, keys, heads)
        mean = jnp.sum(weights * of_weights, axis=-1, keepdims=True)
        of_logits = weights * (of_weights - mean)
        if of_log_total is not None:  # its gradient by the logits is the weights
            of_total = queries.read(of_log_total, 1)
            of_logits += weights * jnp.where(queries.inside[:, None], of_total, 0)
        narrow = of_logits.astype(query.dtype)
        weights = _dropped(weights, keep, keys, heads).astype(query.dtype)
        of_query = _product("ts,sh->th", narrow, key)
        of_key = at_keys(_product("ht,ts->hs", query_transposed, narrow)).T
        grad_transposed = jnp.where(queries.inside, grad_transposed, 0)
        of_value = at_keys(_product("ht,ts->hs", grad_transposed, weights)).T
        gradients = of_query, of_key, of_value
        of_bias = carry[3:]
        if learned is not None:
            at = (keys.head, 0, 0)
            old = jax.lax.dynamic_slice(of_bias[0], at, (1, *of_logits.shape))
            of_bias = (jax.lax.dynamic_update_slice(of_bias[0], old + of_logits, at),)
        spans = queries, keys, keys
        updated = (span.write(x, y) for span, x, y in zip(spans, carry, gradients, strict=False))
        return *updated, *of_bias

    carry = [jnp.zeros_like(x) for x in stored]
    carry += [] if learned is None else [jnp.zeros(bias.shape)]
    shape = len(stored[1]), heads
    results = _for_each_head(mask, form.row_length, shape, work, tuple(carry))
    three = [_dequantized(x).reshape(-1, *like.shape[1:]).astype(like.dtype) for x in results[:3]]
    return *three, None if learned is None else results[3].astype(bias.dtype), None, None


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
