"""One model of a frozen model and what a tuning method changes in its weights.

Low-rank terms, scales and changes of norms become part of the weights, so the merged model takes no
longer than the frozen one. What acts on activations cannot: adapters, prefixes, virtual tokens, and
biases where the model has none.
"""

import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxprompt.config.errors import UserError, listed
from jaxprompt.models.injection import (
    Adapter,
    Injection,
    LabelRows,
    Layers,
    LowRank,
    Params,
    Prefix,
    Projection,
    leaf_at,
)
from jaxprompt.models.ops.quantization import QuantizedArray
from jaxprompt.models.precision import from_bits

Path = tuple[str, ...]  # of modules and a name, as in the parameter tree


def merge(params: Params, injection: Injection) -> Params:
    """The parameters of a model that answers alone as the frozen one does with the injection.

    Sums are in float32, and cast once to the dtype of the weight.

    Args:
        params: of the frozen model; they stay as they are.
        injection: of one member, see ``jaxprompt.models.injection.some_members``.

    Raises:
        UserError: no weight can hold a part of the injection, or a weight is quantized.
    """
    if injection.num_members != 1:
        raise ValueError(f"{injection.num_members} members cannot be merged; choose one.")
    changes = dict(_changes(injection.layers or {}, ()))
    _check(params, injection, changes)
    merged = dict(params)
    for path, leaf in changes.items():
        if isinstance(leaf, Projection):
            hidden = changes.get((*path[:-1], "hidden")) if path[-1] == "wo" else None
            _merge_projection(merged, path, leaf, hidden)
        elif path[-1] != "hidden":  # a norm
            _put(merged, path, _float32(merged, path) + _alone(leaf))
        elif (wo := _weight_of(path)) not in changes:
            _merge_projection(merged, wo, Projection(), leaf)
    return merged


def _changes(layers: Layers, path: Path) -> Iterator[tuple[Path, PyTree]]:
    for name, value in layers.items():
        if isinstance(value, dict):
            yield from _changes(value, (*path, name))
        elif value is not None:
            yield (*path, name), value


def _check(params: Params, injection: Injection, changes: dict[Path, PyTree]) -> None:
    """Refuse what no weight can hold."""
    if injection.params is not None:
        raise UserError("The method trained the whole model; it is one model already, save that.")
    if injection.embeddings is not None:
        raise UserError(
            "The method has virtual tokens, which no weight can hold; merge a method without a "
            "prompt."
        )
    for kind, plural in ((Adapter, "adapters"), (Prefix, "prefixes of keys and values")):
        _refuse(
            [path for path, leaf in changes.items() if isinstance(leaf, kind)],
            f"The method has {plural}",
            "which no weight can hold; merge LoRA or IA3 instead.",
        )
    _refuse(
        [path for path, leaf in changes.items() if isinstance(leaf, LabelRows)],
        "The method has a soft verbalizer",
        "which takes the place of the head; merge a method without it.",
    )
    weights = {path: leaf_at(params, _weight_of(path)) for path in changes}
    _refuse(
        [path for path, weight in weights.items() if weight is None],
        "The method changes",
        "which this backbone does not have; use the backbone that it was tuned on.",
    )
    _refuse(
        [path for path, weight in weights.items() if isinstance(weight, QuantizedArray)],
        "The backbone is quantized",
        "and rounding a merged weight would lose a part of the change; load the backbone without "
        "model.quantization.",
    )
    _refuse(
        [
            path
            for path, leaf in changes.items()
            if isinstance(leaf, Projection)
            and leaf.bias is not None
            and leaf_at(params, _bias_of(path)) is None
        ],
        "The method has biases",
        "where this backbone has none to add them to; merge LoRA or IA3 instead.",
    )


def _refuse(paths: Sequence[Path], what: str, why: str) -> None:
    if paths:
        raise UserError(f"{what} ({listed(['/'.join(path) for path in paths], 3)}), {why}")


def _weight_of(path: Path) -> Path:
    """The weight that a change is merged into."""
    return (*path[:-1], "wo") if path[-1] == "hidden" else path


def _bias_of(path: Path) -> Path:
    return (*path[:-1], f"{path[-1]}_bias")


def _merge_projection(
    params: Params, path: Path, change: Projection, hidden: Float[Array, "1 L F"] | None
) -> None:
    """(1 + hidden) (W + a b) (1 + scale), and (b + bias) (1 + scale) for a bias b of the model."""
    weight, bias_path, bias = _float32(params, path), _bias_of(path), change.bias
    if change.low_rank is not None:
        weight = weight + _product(change.low_rank).reshape(weight.shape)
    if hidden is not None:
        weight = weight * (1 + _alone(hidden))[..., None]
    factor = None
    if change.scale is not None:
        factor = 1 + _alone(change.scale)  # [L, *out]
        depth, *out = factor.shape
        weight = weight * factor.reshape(depth, *[1] * (weight.ndim - factor.ndim), *out)
    _put(params, path, weight)
    if leaf_at(params, bias_path) is not None and (bias is not None or factor is not None):
        summed = _float32(params, bias_path) + (0 if bias is None else _alone(bias))
        _put(params, bias_path, summed if factor is None else summed * factor)


def _product(factors: LowRank) -> Float[Array, "L i o"]:
    a, b = _alone(factors.a), _alone(factors.b)
    depth, rank = b.shape[:2]
    a, b = a.reshape(depth, -1, rank), b.reshape(depth, rank, math.prod(b.shape[2:]))
    return jnp.einsum("lir,lro->lio", a, b, precision="highest")


def _alone(leaf: Float[Array, "1 ..."]) -> Float[Array, "..."]:
    return jnp.asarray(leaf, jnp.float32)[0]


def _float32(params: Params, path: Path) -> Float[Array, "..."]:
    leaf = leaf_at(params, path)
    assert leaf is not None
    return jnp.asarray(from_bits(leaf) if _is_bits(leaf) else leaf, jnp.float32)


def _put(params: Params, path: Path, value: Float[Array, "..."]) -> None:
    """Replace a leaf, in its dtype. The dicts on its path are copied, so no other tree changes."""
    inner = params
    for name in path[:-1]:
        inner[name] = dict(inner[name])
        inner = inner[name]
    old = inner[path[-1]]
    inner[path[-1]] = value.astype(jnp.bfloat16 if _is_bits(old) else old.dtype)


def _is_bits(leaf: jax.Array) -> bool:
    """Whether a leaf is the bits of bfloat16 numbers."""
    return leaf.dtype == jnp.uint16
