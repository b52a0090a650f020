"""DoRA: the lengths of a weight's columns, trained apart (Liu et al. 2024, arXiv 2402.09353).

x W becomes x (W + a b) m / ||W + a b||, with a length m for each output and the norm of each column
(equation 5). The norm is no part of the gradient (section 4.3). So it is a low-rank change, then a
scale of each result. No array of the size of W is made for each member: with C = a^T W, the square
of column o's norm is that of W's plus 2 b_o C_o + b_o^T (a^T a) b_o.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.errors import UserError
from jaxprompt.data.batches import AnyArray
from jaxprompt.methods.layers import Path, at, size
from jaxprompt.models.injection import LowRank, Params, Projection
from jaxprompt.models.ops.quantization import Weight, dequantize


def norms_of(weight: Weight, change: LowRank) -> Float[Array, "2 K L ..."]:
    """The norms of the columns of a weight [L, *in, *out], and of it with changes [K, L, ...].

    One layer is dequantized at a time.
    """
    outputs = change.b.shape[3:]

    def of_layer(layer):
        weight, a, b = layer
        inputs = size(a.shape[1:-1])
        weight = dequantize(weight, jnp.float32).astype(jnp.float32).reshape(inputs, -1)
        a = a.reshape(len(a), inputs, -1)
        b = b.reshape(*b.shape[:2], -1)
        squares = jnp.sum(jnp.square(weight), axis=0)
        crossed = jnp.einsum("kir,io->kro", a, weight, precision="highest")
        inner = jnp.einsum("kir,kiq->krq", a, a, precision="highest")
        added = jnp.einsum("kro,kro->ko", b, 2 * crossed + jnp.einsum("krq,kqo->kro", inner, b))
        both = jnp.sqrt(jnp.maximum(squares + added, 0))
        return jnp.stack([jnp.broadcast_to(jnp.sqrt(squares), both.shape), both])

    first = lambda x: jnp.moveaxis(jnp.asarray(x, jnp.float32), 1, 0)
    norms = jax.lax.map(of_layer, (weight, first(change.a), first(change.b)))  # [L, 2, K, out]
    return jnp.moveaxis(norms, 0, 2).reshape(2, *change.b.shape[:2], *outputs)


def with_length(
    change: Projection, relative: Float[Array, "K L ..."], params: Params, path: Path
) -> Projection:
    """A low-rank change of a weight whose columns have a length of their own.

    Args:
        change: leaves [K, L, ...]; what it has besides its factors stays.
        relative: the length of each column is the frozen one's times 1 plus this.
        params: of the frozen model.
        path: of the weight.
    """
    assert change.low_rank is not None
    frozen, both = jax.lax.stop_gradient(norms_of(_weight(params, path), change.low_rank))
    return _scaled_by(change, (1 + relative) * frozen / _positive(both), params, path)


def of_lengths(
    change: Projection, lengths: Mapping[int | None, AnyArray], params: Params, path: Path
) -> Projection:
    """A low-rank change of one member [L, ...] whose columns have these lengths.

    Args:
        lengths: [*out] by layer; the columns of others keep the length that they come to.
    """
    alone = _with_members(change)
    assert alone.low_rank is not None
    both = _positive(jax.lax.stop_gradient(norms_of(_weight(params, path), alone.low_rank)[1, 0]))
    factors = [
        jnp.asarray(lengths[layer]) / norm if layer in lengths else jnp.ones_like(norm)
        for layer, norm in enumerate(both)
    ]
    whole = _scaled_by(alone, jnp.stack(factors)[None], params, path)
    return jax.tree.map(lambda leaf: leaf[0], whole)


def lengths_in(change: Projection, params: Params, path: Path) -> Float[np.ndarray, "L ..."]:
    """The lengths of columns that the scales of a change [L, ...] amount to.

    Raises:
        UserError: it has biases, too.
    """
    alone = _with_members(change)
    assert alone.low_rank is not None and alone.scale is not None
    factor = 1 + alone.scale
    if alone.bias is not None:
        own = _scaled_by(alone, factor, params, path).bias
        if own is None or not jnp.allclose(own, alone.bias, rtol=1e-4, atol=1e-6):
            raise UserError(
                f"The prompt changes the bias beside {'/'.join(path)!r}, and DoRA of PEFT leaves "
                "it as it is; keep it as an artefact of jaxprompt (save_prompt)."
            )
    return np.asarray((factor * norms_of(_weight(params, path), alone.low_rank)[1])[0])


def _weight(params: Params, path: Path) -> Weight:
    weight = at(params, path)
    assert weight is not None
    return weight


def _with_members(change: Projection) -> Projection:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32)[None], change)


def _scaled_by(
    change: Projection, factor: Float[Array, "K L ..."], params: Params, path: Path
) -> Projection:
    """The change with each result times a factor, but for the bias that the model has there."""
    own = at(params, (*path[:-1], f"{path[-1]}_bias"))
    bias = None if own is None else jnp.asarray(own, jnp.float32)[None] * (1 / factor - 1)
    return change._replace(scale=factor - 1, bias=bias)


def _positive(norms: Float[Array, "..."]) -> Float[Array, "..."]:
    """Norms to divide by: where a column is 0, its scale matters to nothing."""
    return jnp.maximum(norms, np.finfo(np.float32).tiny)
