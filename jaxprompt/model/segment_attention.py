"""Attention of each example to itself, one after another: what CPUs are fast at.

An example's logits stay in the core's cache, none are computed between two examples of a row, and
for the gradient they are computed again. Every product of the backward pass is put so that XLA's
CPU runtime (jax 0.10, 0.11) has a fast form for it, which one with a transposed left operand is
not. Letters as in ``jaxprompt.bank``.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from jaxprompt.model.precision import from_bits, to_bits

_LOW = -1e30
# so many logits of whole rows stay in a core's cache, and are faster at once
LOGITS_AT_ONCE = 2**19


class Segments(NamedTuple):
    """Where the segments of a batch are, in its rows one after another; found once for all layers.

    Those after the first ``count`` are none.
    """

    count: Int[Array, ""]
    starts: Int[Array, " n"]
    lengths: Int[Array, " n"]


def find(segments: Int[Array, "B S"]) -> Segments:
    """The segments of all rows; segment 0 is padding and no segment."""
    before, after = (jnp.pad(segments, ((0, 0), pad)) for pad in ((1, 0), (0, 1)))
    size = segments.size
    first = (segments > 0) & (segments != before[:, :-1])
    last = (segments > 0) & (segments != after[:, 1:])
    places = lambda x: jnp.nonzero(x.reshape(-1), size=size, fill_value=size)[0].astype(jnp.int32)
    starts, ends = places(first), places(last) + 1
    return Segments(first.sum(dtype=jnp.int32), starts, ends - starts)


def rows_of_their_own(
    encoded: Float[Array, "B S D"], segments: Int[Array, "B S"], each: int, width: int
) -> tuple[Float[Array, "R W D"], Int[Array, "R W"]]:
    """Segments 1 to ``each`` of every row as rows, of which segment 1 is what they hold.

    Beyond that a row has what came after. Segments start with the row, and none is longer than
    ``width``.
    """
    lengths = (segments[:, None] == jnp.arange(1, each + 1)[:, None]).sum(-1)
    starts = jnp.cumsum(lengths, axis=1) - lengths
    padded = jnp.pad(encoded, ((0, 0), (0, width), (0, 0)))
    take = lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, width)
    found = jax.vmap(jax.vmap(take, in_axes=(None, 0)))(padded, starts)
    own = jnp.arange(width) < lengths.reshape(-1, 1)
    return found.reshape(-1, width, encoded.shape[-1]), own.astype(segments.dtype)


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
    query: Float[Array, "B S N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    bias: Float[Array, "1 N W W"],
    segments: Segments,
    widths: tuple[int, ...] = (),
    *,
    mixed: bool = False,
) -> Float[Array, "B S N H"]:
    """``layers.attention`` within each segment; 0 at positions of none.

    bias: for offsets up to W, beyond which no segment may be; one that is makes all of the result
    NaN. widths: what lengths below W are rounded up to, in order; each is compiled for itself.
    mixed: as in ``layers.product``, and the result is bfloat16.
    """
    shape, longest = query.shape, bias.shape[-1]
    widths = *(width for width in widths if width < longest), longest
    flat = [x.reshape(-1, *shape[2:]) for x in (query, key, value)]
    mixed = mixed or query.dtype == jnp.bfloat16
    found: Any = _attend(widths, mixed, *flat, bias[0], segments)
    return found.reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(widths, mixed, query, key, value, bias, segments):
    return _forward(widths, mixed, query, key, value, bias, segments)[0]


def _stored(x, mixed):
    """[n, N, H] as [n, N H]; bfloat16 as its bits."""
    x = x.reshape(len(x), -1)
    return to_bits(x) if mixed else x


def _usable(x):
    return from_bits(x) if x.dtype == jnp.uint16 else x


def _product(spec, a, b):
    return jnp.einsum(spec, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


class _Block(NamedTuple):
    """A head of a segment, within ``width`` positions of the rows."""

    start: Any
    own: Any  # [width], which positions are its own
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

    def logits(self, query, key, bias):
        bias = jax.lax.dynamic_slice(bias, (self.head, 0, 0), (1, *2 * (len(self.own),)))[0]
        return _product("th,sh->ts", query, key) + bias + jnp.where(self.own, 0.0, _LOW)


def _each(widths, segments, shape, work, carry):
    """``carry = work(block, carry)`` for every head of every segment of rows of ``shape`` [n, N].

    A segment is computed at the least of ``widths`` that holds it.
    """
    total, heads = shape

    def one(i, carry):
        start, length = segments.starts[i], segments.lengths[i]

        def at(width):
            def run(carry):
                begin = jnp.minimum(start, total - width)
                places = begin + jnp.arange(width)
                own = (places >= start) & (places < start + length)
                of_head = lambda head, carry: work(_Block(begin, own, head), carry)
                return jax.lax.fori_loop(0, heads, of_head, carry)

            return run

        fits = jnp.searchsorted(jnp.array(widths), length, method="compare_all")
        return jax.lax.switch(fits, [at(width) for width in widths], carry)

    return jax.lax.fori_loop(0, segments.count, one, carry)


def _forward(widths, mixed, query, key, value, bias, segments):
    given = [_stored(x, mixed) for x in (query, key, value)]
    *shape, size = query.shape

    def work(block, carry):
        query, key, value = (_usable(block.read(x, size)) for x in given)
        logits = block.logits(query, key, bias)
        most = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - most)
        mass = jnp.sum(weights, axis=-1, keepdims=True)
        y = _product("ts,sh->th", (weights / mass).astype(value.dtype), value)
        return block.write(carry[0], y), block.write(carry[1], most + jnp.log(mass))

    carry = jnp.zeros_like(given[0]), jnp.zeros(shape)
    y, log_mass = _each(widths, segments, shape, work, carry)
    y = jnp.where(jnp.max(segments.lengths) > widths[-1], jnp.nan, _usable(y))
    return y.reshape(query.shape), (*given, log_mass)


def _attend_forward(widths, mixed, query, key, value, bias, segments):
    learned = jnp.zeros(()) if bias.perturbed else None
    query, key, value, bias = (x.value for x in (query, key, value, bias))
    segments = jax.tree.map(lambda x: x.value, segments)
    y, kept = _forward(widths, mixed, query, key, value, bias, segments)
    like = jnp.zeros((0, *query.shape[1:]), query.dtype)
    return y, (kept, bias, segments, like, learned)


def _attend_backward(widths, mixed, kept, cotangent):
    (*given, log_mass), bias, segments, like, learned = kept
    if isinstance(cotangent, SymbolicZero):
        return None, None, None, None, None
    cotangent = _stored(cotangent, mixed)
    size = like.shape[-1]
    # here and not in the loop, where XLA would make one of a transposition and a product
    turned = given[0].T, cotangent.T

    def work(block, carry):
        parts = [block.read(x, size) for x in (*given, cotangent)]
        # what belongs to others has weight 0 and gives nothing
        parts[3] = jnp.where(block.own[:, None], parts[3], 0)
        query, key, value, grad = map(_usable, parts)
        query_turned, grad_turned = (_usable(block.read_turned(x, size)) for x in turned)
        own = lambda x: jnp.where(block.own, x, 0)
        mass = jnp.where(block.own[:, None], block.read(log_mass, 1), -_LOW)
        weights = jnp.exp(block.logits(query, key, bias) - mass)
        of_weights = _product("th,sh->ts", grad, value)
        mean = jnp.sum(weights * of_weights, axis=-1, keepdims=True)
        of_logits = weights * (of_weights - mean)
        narrow, weights = of_logits.astype(query.dtype), weights.astype(query.dtype)
        found = (
            _product("ts,sh->th", narrow, key),
            own(_product("ht,ts->hs", query_turned, narrow)).T,
            own(_product("ht,ts->hs", jnp.where(block.own, grad_turned, 0), weights)).T,
        )
        of_bias = carry[3:]
        if learned is not None:
            at = (block.head, 0, 0)
            old = jax.lax.dynamic_slice(of_bias[0], at, (1, *of_logits.shape))
            of_bias = (jax.lax.dynamic_update_slice(of_bias[0], old + of_logits, at),)
        return *map(block.write, carry[:3], found), *of_bias

    carry = [jnp.zeros_like(x) for x in given]
    carry += [] if learned is None else [jnp.zeros(bias.shape)]
    found = _each(widths, segments, log_mass.shape, work, tuple(carry))
    three = [_usable(x).reshape(-1, *like.shape[1:]).astype(like.dtype) for x in found[:3]]
    return *three, None if learned is None else found[3].astype(bias.dtype), None


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
