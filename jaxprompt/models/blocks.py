"""Linen modules that every family is built from, and the spelling of scan and rematerialisation.

This is the one file that knows that spelling. A ``config`` here is any family's: frozen, hashable,
with the fields that the module reads.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprompt.data.virtual_tokens import embed
from jaxprompt.models.ops import layers
from jaxprompt.models.ops.dropout import Noise
from jaxprompt.runtime import parallel


class Norm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return layers.rms_norm(x, scale, self.eps)


class Dropout(nn.Module):
    """Drops elements of the last axis, the same at all positions of an example, as T5X does."""

    rate: float

    @nn.compact
    def __call__(self, x, noise: Noise | None):
        if noise is None or not self.rate:
            return x
        keep = noise.of_examples(self.make_rng("dropout"), 1.0 - self.rate, x.shape[-1])
        return jnp.where(keep, x / (1.0 - self.rate), 0.0)


class DropKeys(nn.Module):
    """What weights of attention are multiplied with: one draw a key, for all queries, as in T5X."""

    rate: float
    heads: int

    @nn.compact
    def __call__(self, noise: Noise | None, dtype):
        if noise is None or not self.rate:
            return None
        keep = noise.of_positions(self.make_rng("dropout"), 1.0 - self.rate, self.heads)
        return jnp.where(keep, 1.0 / (1.0 - self.rate), 0.0).astype(dtype)


class Mlp(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x, noise):
        c = self.config
        width = c.d_model // parallel.fsdp_size()
        wide = nn.initializers.normal(c.d_model**-0.5), (width, c.d_ff)
        project = functools.partial(layers.dense, "bsd,df->bsf", mixed=c.mixed)
        if c.gated:
            wi_0, wi_1 = self.param("wi_0", *wide), self.param("wi_1", *wide)
            hidden = layers.gate(project(x, wi_0), project(x, wi_1), c.activation, c.mixed)
        else:
            hidden = layers.ACTIVATIONS[c.activation](project(x, self.param("wi", *wide)))
        hidden = parallel.shard_activation(Dropout(c.dropout)(hidden, noise), None, "mlp")
        wo = self.param("wo", nn.initializers.normal(c.d_ff**-0.5), (c.d_ff, width))
        return layers.dense("bsf,fd->bsd", hidden, wo, c.mixed)


class TokenEmbedder(nn.Module):
    config: Any

    def setup(self):
        c = self.config
        normal = nn.initializers.normal(1.0)
        self.embedding = self.param("embedding", normal, (c.vocab_size, c.d_model))

    def __call__(self, ids, bank):
        table = self.embedding.astype(self.config.activations)
        return parallel.shard_activation(embed(ids, table, bank))


def abstract(init: Callable[[Any, jax.Array], Any], config: Any, dtype: str) -> Any:
    """Shapes and dtypes of the parameters that ``init`` would make, without allocating any."""
    shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)


def named_axes(names: dict[str, tuple[str, ...]], shapes: Any) -> Any:
    """Axes of every parameter by the last part of its path; stacked leaves start with "layers"."""

    def name(path, leaf):
        axes = names[path[-1].key]
        return ("layers", *axes) if len(leaf.shape) > len(axes) else axes

    return jax.tree_util.tree_map_with_path(name, shapes)


def stacked(layer: type[nn.Module], config: Any, depth: int, in_axes: Any) -> Any:
    """The class of ``depth`` layers scanned over axis 0 of their parameters.

    ``in_axes`` says of each argument after the first whether it is stacked too (0) or the same for
    all layers (``nn.broadcast``). Unrolled, it is the same scan: one parameter tree for both.
    """
    # in a loop nothing can be merged; unrolled, the compiler would undo the rematerialisation
    layer = nn.remat(layer, prevent_cse=bool(config.unroll)) if config.remat else layer
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=depth,
        unroll=depth if config.unroll else 1,
    )
