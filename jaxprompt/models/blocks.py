"""Linen modules that every family is built from.

This is the only file that calls ``nn.scan`` and ``nn.remat``.
"""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxprompt.data.virtual_tokens import embed
from jaxprompt.models.base import Model, ModelConfig, Params, Runtime
from jaxprompt.models.injection import Injection, Projection
from jaxprompt.models.ops.activations import ACTIVATIONS, gate
from jaxprompt.models.ops.changes import Member, of_rows, project, scaled
from jaxprompt.models.ops.dropout import DropoutSeeds
from jaxprompt.models.ops.norm import rms_norm
from jaxprompt.runtime import parallel


def variables(params: Params, injection: Injection) -> dict[str, PyTree]:
    """The collections of Linen's variables: the parameters, and what changes the layers."""
    if injection.layers is None:
        return {"params": params}
    return {"params": params, "tuned": injection.layers}


def tuned(module: nn.Module, name: str) -> PyTree | None:
    """What the injection has for ``name`` of a module, with leaves [K, ...]; None for nothing."""
    return module.get_variable("tuned", name) if module.has_variable("tuned", name) else None


def drops(change: Projection | None, seeds: DropoutSeeds | None) -> bool:
    """Whether a change of a projection has dropout."""
    return seeds is not None and change is not None and change.dropout is not None


def dropped(
    module: nn.Module,
    change: Projection | None,
    x: Float[Array, "R T ..."],
    member: Member,
    seeds: DropoutSeeds | None,
) -> Float[Array, "R T ..."] | None:
    """What a low-rank change of a projection reads in training; None for ``x`` as it is.

    Like ``Dropout`` it drops the same at all positions of an example, and each member has its rate.
    """
    if seeds is None or change is None or change.dropout is None:
        return None
    rates = of_rows(change.dropout, member, len(x)).reshape(-1, *[1] * (x.ndim - 1))
    drawn = seeds.uniform_per_example(module.make_rng("dropout"), math.prod(x.shape[2:]))
    keep = drawn.reshape(*drawn.shape[:2], *x.shape[2:]) >= rates
    return jnp.where(keep, x / (1.0 - rates).astype(x.dtype), 0.0)


def keep_residual(module: nn.Module, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The residual stream behind a layer, which is recorded for those that ask for it."""
    module.sow("residual", "stream", x)
    return x


def recorded_residual(recorded: PyTree, path: tuple[str, ...]) -> Float[Array, "B L T D"]:
    """The residual stream behind each of the layers at a path, rows first."""
    for name in ("residual", *path):
        recorded = recorded[name]
    [stream] = recorded["stream"]
    return stream.swapaxes(0, 1)


class Norm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], member: Member = None) -> Float[Array, "B S D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        added = tuned(self, "scale")  # [K, D]
        if added is not None:
            scale = scale + of_rows(added, member, len(x))[:, None]
        return rms_norm(x, scale, self.eps)


class Dropout(nn.Module):
    """Drops elements of the last axis, the same at all positions of an example, as T5X does."""

    rate: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "R T D"], seeds: DropoutSeeds | None
    ) -> Float[Array, "R T D"]:
        if seeds is None or not self.rate:
            return x
        keep = seeds.keep_per_example(self.make_rng("dropout"), 1.0 - self.rate, x.shape[-1])
        return jnp.where(keep, x / (1.0 - self.rate), 0.0)


class DropKeys(nn.Module):
    """The factors of attention's weights: one draw for each key, for all queries, as in T5X."""

    rate: float
    heads: int

    @nn.compact
    def __call__(
        self, seeds: DropoutSeeds | None, dtype: jnp.dtype
    ) -> Float[Array, "B S N"] | None:
        if seeds is None or not self.rate:
            return None
        keep = seeds.keep_per_position(self.make_rng("dropout"), 1.0 - self.rate, self.heads)
        return jnp.where(keep, 1.0 / (1.0 - self.rate), 0.0).astype(dtype)


class Mlp(nn.Module):
    model: Model

    @nn.compact
    def __call__(
        self, x: Float[Array, "R T D"], dropout: DropoutSeeds | None, member: Member = None
    ) -> Float[Array, "R T D"]:
        c, runtime = self.model.config, self.model.runtime
        width = c.d_model // runtime.place.fsdp
        wide = nn.initializers.normal(c.d_model**-0.5), (width, c.d_ff)

        def into(name):
            change, weight = tuned(self, name), self.param(name, *wide)
            read = dropped(self, change, x, member, dropout)
            return project("bsd,df->bsf", x, weight, change, member, runtime, read)

        if c.gated:
            hidden = gate(into("wi_0"), into("wi_1"), c.activation, runtime.mixed)
        else:
            hidden = ACTIVATIONS[c.activation](into("wi"))
        scale = tuned(self, "hidden")  # [K, F]
        if scale is not None:
            hidden = scaled(hidden, scale, member)
        hidden = Dropout(runtime.dropout)(hidden, dropout)
        hidden = parallel.shard_activation(hidden, runtime.place, None, "mlp")
        wo = self.param("wo", nn.initializers.normal(c.d_ff**-0.5), (c.d_ff, width))
        change = tuned(self, "wo")
        read = dropped(self, change, hidden, member, dropout)
        return project("bsf,fd->bsd", hidden, wo, change, member, runtime, read)


class TokenEmbedder(nn.Module):
    model: Model

    def setup(self):
        c = self.model.config
        normal = nn.initializers.normal(1.0)
        self.embedding = self.param("embedding", normal, (c.vocab_size, c.d_model))

    def __call__(
        self, ids: Int[Array, "B S"], bank: Float[Array, "K P D"] | None
    ) -> Float[Array, "B S D"]:
        table = self.embedding.astype(self.model.runtime.activations)
        return parallel.shard_activation(embed(ids, table, bank), self.model.runtime.place)


C = TypeVar("C", bound=ModelConfig)


def abstract(init: Callable[[C, jax.Array], Params], config: C, dtype: str) -> Params:
    """Shapes and dtypes of the parameters that ``init`` would make, without allocating any."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), _shapes(init, config))


@functools.lru_cache(maxsize=64)
def _shapes(init, config):
    # the whole model is traced for its shapes, and they are asked for many times in a run
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def named_axes(names: dict[str, tuple[str, ...]], shapes: Params) -> Params:
    """Axes of every parameter by the last part of its path; stacked leaves start with "layers"."""

    def name(path, leaf):
        axes = names[path[-1].key]
        return ("layers", *axes) if len(leaf.shape) > len(axes) else axes

    return jax.tree_util.tree_map_with_path(name, shapes)


def stacked(
    layer: type[nn.Module], runtime: Runtime, depth: int, in_axes: PyTree
) -> Callable[[Model], nn.Module]:
    """The class of ``depth`` layers scanned over axis 0 of their parameters.

    What an injection has for them is scanned over axis 1, behind that of its members.

    ``in_axes`` says of each argument after the first whether it is stacked too (0) or the same for
    all layers (``nn.broadcast``). Unrolled, it is the same scan: one parameter tree for both.
    """
    # unrolled, the compiler would merge both computations and so undo the rematerialisation
    layer = nn.remat(layer, prevent_cse=runtime.unroll) if runtime.remat else layer
    return nn.scan(
        layer,
        variable_axes={"params": 0, "tuned": 1, "keys_values": 0, "residual": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=depth,
        unroll=depth if runtime.unroll else 1,
    )
