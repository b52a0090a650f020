"""Trees of changes: which weights of a model a method changes, and how changes are put together."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.values import Values
from jaxprompt.data.batches import AnyArray
from jaxprompt.models.injection import (
    VERBALIZER,
    Adapter,
    Injection,
    LabelRows,
    Layers,
    LowRank,
    Params,
    Prefix,
    Projection,
)

Path = tuple[str, ...]  # of modules and a name, as in the parameter tree

# of the modules that have attention or an MLP: the stack of ``lora.stacks`` and the like
SUBLAYERS: Mapping[Path, str] = {
    ("encoder", "layers", "attention"): "encoder",
    ("encoder", "layers", "mlp"): "encoder",
    ("decoder", "layers", "self_attention"): "decoder",
    ("decoder", "layers", "cross_attention"): "cross",
    ("decoder", "layers", "mlp"): "decoder",
    ("layers", "attention"): "decoder",  # of a decoder-only model
    ("layers", "mlp"): "decoder",
}


class Kernel(NamedTuple):
    """A weight of the stacked layers, [L, *inputs, *outputs]."""

    path: Path
    layers: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.path[-1]


def kernels(params: Params, stacks: Sequence[str]) -> Iterator[Kernel]:
    """The weights of all projections in some of the stacks, in the order of their paths."""
    for module, stack in SUBLAYERS.items():
        inner = at(params, module)
        if inner is None or stack not in stacks:
            continue
        for name in sorted(inner):
            shape = cast(Array, inner[name]).shape
            if name.endswith("_bias") or len(shape) < 3:
                continue
            summed = 2 if name == "out" else 1
            yield Kernel((*module, name), shape[0], shape[1 : 1 + summed], shape[1 + summed :])


def at(tree: Mapping[str, PyTree], path: Path) -> PyTree | None:
    """What is at a path; None where nothing is."""
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def chosen_kernels(
    params: Params, targets: Sequence[str] | str, stacks: Sequence[str], setting: str
) -> list[Kernel]:
    """The weights with one of these names.

    Args:
        targets: names, or "all".
        setting: how the config calls ``targets``, for errors.

    Raises:
        UserError: the model has no weight of one of the names.
    """
    every = list(kernels(params, stacks))
    names = sorted({kernel.name for kernel in every})
    if targets == "all":
        return every
    for target in targets:
        if target not in names:
            raise UserError(
                f"{setting} names {target!r}, and this backbone has no such weight in "
                f"{listed(stacks)}; it has {listed(names)}."
            )
    return [kernel for kernel in every if kernel.name in targets]


def uniform(shape: Sequence[int], bound: float, rng: np.random.Generator) -> Float[Array, "..."]:
    """Float32 numbers within the bound."""
    return jnp.asarray(rng.uniform(-bound, bound, shape), jnp.float32)


def size(shape: Sequence[int]) -> int:
    """The product of the sizes."""
    return math.prod(shape)


def nested(leaves: Mapping[str, PyTree]) -> Layers:
    """The tree of leaves that are named by their paths, joined by /."""
    tree: Layers = {}
    for name, leaf in leaves.items():
        *modules, last = name.split("/")
        inner = tree
        for module in modules:
            inner = inner.setdefault(module, {})
        inner[last] = leaf
    return tree


def combined(first: Layers | None, second: Layers | None) -> Layers | None:
    """The changes of two parts of a method.

    Raises:
        UserError: both change the same thing in the same way.
    """
    if first is None or second is None:
        return second if first is None else first
    result = dict(first)
    for name, value in second.items():
        result[name] = _both(result[name], value) if name in result else value
    return result


def _both(first: PyTree, second: PyTree) -> PyTree:
    if isinstance(first, dict) and isinstance(second, dict):
        return combined(first, second)
    if isinstance(first, Projection) and isinstance(second, Projection):
        pairs = list(zip(first, second, strict=True))
        if all(one is None or other is None for one, other in pairs):
            merged: list[PyTree] = [other if one is None else one for one, other in pairs]
            return Projection(*merged)
    raise UserError("Two parts of the method change the same weights in the same way; drop one.")


def joined(injections: Sequence[Injection]) -> Injection:
    """One injection of the members of all, in their order.

    Shorter prompts end with zeros, which no id addresses. Where a member has not what another
    has, zeros stand, which change nothing; lower ranks are filled up with zeros, and shorter
    prefixes are masked.

    Raises:
        UserError: adapters of other kinds than those of other members.
    """
    if len(injections) == 1:
        return injections[0]
    counts = [each.num_members for each in injections]
    banks = [each.embeddings for each in injections]
    layers = [each.layers for each in injections]
    return Injection(_joined_banks(banks, counts), _joined_layers(layers, counts))


def _joined_banks(
    banks: Sequence[Float[Array, "_ _ D"] | None], counts: Sequence[int]
) -> Float[Array, "K P D"] | None:
    known = [bank for bank in banks if bank is not None]
    if not known:
        return None
    empty = lambda count: jnp.zeros((count, 0, known[0].shape[2]), known[0].dtype)
    full = [empty(n) if bank is None else bank for bank, n in zip(banks, counts, strict=True)]
    longest = max(bank.shape[1] for bank in full)
    return jnp.concatenate(
        [jnp.pad(bank, ((0, 0), (0, longest - bank.shape[1]), (0, 0))) for bank in full]
    )


def _joined_layers(trees: Sequence[Layers | None], counts: Sequence[int]) -> Layers | None:
    if all(tree is None for tree in trees):
        return None
    return _joined(trees, counts)


def _joined(nodes: Sequence[PyTree | None], counts: Sequence[int]) -> PyTree:
    """The nodes of the same path of all trees, as one."""
    known = next(node for node in nodes if node is not None)
    if isinstance(known, dict):
        names = dict.fromkeys(name for node in nodes for name in node or ())
        return {name: _joined([(n or {}).get(name) for n in nodes], counts) for name in names}
    if isinstance(known, Prefix):
        return _joined_prefixes(nodes, counts)
    if isinstance(known, LabelRows):
        return _joined_label_rows(nodes)
    if isinstance(known, LowRank):
        a = _stacked([None if n is None else n.a for n in nodes], counts, {-1})
        # the rank is behind the members and, in stacked layers, the layers
        axis = 2 if any(n is not None and n.b.ndim > 2 for n in nodes) else 1
        return LowRank(a, _stacked([None if n is None else n.b for n in nodes], counts, {axis}))
    if isinstance(known, Projection):
        parts = [[None if node is None else node[i] for node in nodes] for i in range(len(known))]
        return Projection(
            *(None if all(x is None for x in some) else _joined(some, counts) for some in parts)
        )
    if isinstance(known, Adapter):
        return _joined_adapters(nodes, counts)
    return _stacked(nodes, counts, set())


def _joined_label_rows(nodes: Sequence[LabelRows | None]) -> LabelRows:
    known = [node for node in nodes if node is not None]
    if len(known) < len(nodes) or len({node.rows.shape[1] for node in known}) > 1:
        raise UserError(
            "Soft verbalizers go together only with others of as many labels; use such prompts "
            "together, or each alone."
        )
    return LabelRows(*map(jnp.concatenate, zip(*known, strict=True)))


def _joined_adapters(nodes: Sequence[Adapter | None], counts: Sequence[int]) -> Adapter:
    known = [node for node in nodes if node is not None]
    first = known[0]
    kinds = {(node.activation, node.reads, node.scale) for node in known}
    if len(kinds) > 1:
        raise UserError(
            "Adapters of one batch have several activations, scales or places "
            f"({'; '.join(map(str, sorted(kinds)))}); use those of one kind together."
        )
    leaf = lambda name: [None if node is None else getattr(node, name) for node in nodes]
    return Adapter(
        _stacked(leaf("down"), counts, {-1}),
        _stacked(leaf("down_bias"), counts, {-1}),
        _stacked(leaf("up"), counts, {-2}),
        _stacked(leaf("up_bias"), counts, set()),
        *(first.activation, first.reads, first.scale),
    )


def _joined_prefixes(nodes: Sequence[Prefix | None], counts: Sequence[int]) -> Prefix:
    known = [node for node in nodes if node is not None]
    longest = max(node.key.shape[2] for node in known)
    depth = known[0].key.shape[1]
    keys, values, used = [], [], []
    for node, count in zip(nodes, counts, strict=True):
        if node is None:
            shape = (count, depth, longest, *known[0].key.shape[3:])
            keys.append(jnp.zeros(shape, known[0].key.dtype))
            values.append(keys[-1])
            used.append(jnp.zeros((count, depth, longest), bool))
            continue
        missing = longest - node.key.shape[2]
        pad = lambda x, missing=missing: jnp.pad(
            x, [(0, 0), (0, 0), (missing, 0), *[(0, 0)] * (x.ndim - 3)]
        )
        keys.append(pad(node.key))
        values.append(pad(node.value))
        mine = jnp.ones(node.key.shape[:3], bool) if node.used is None else node.used
        used.append(pad(mine))
    every = (
        all(node is not None and node.used is None for node in nodes)
        and len({node.key.shape[2] for node in known}) == 1
    )
    marks = None if every else jnp.concatenate(used)
    return Prefix(jnp.concatenate(keys), jnp.concatenate(values), marks)


def _stacked(leaves: Sequence[Array | None], counts: Sequence[int], padded: set[int]) -> Array:
    """Leaves along K, with zeros for members that have none; ``padded`` axes are made equal."""
    known = [leaf for leaf in leaves if leaf is not None]
    shape = list(known[0].shape)
    for axis in padded:
        shape[axis] = max(leaf.shape[axis] for leaf in known)
    full = []
    for leaf, count in zip(leaves, counts, strict=True):
        if leaf is None:
            full.append(jnp.zeros((count, *shape[1:]), known[0].dtype))
            continue
        missing = [
            (0, large - small) for large, small in zip(shape[1:], leaf.shape[1:], strict=True)
        ]
        full.append(jnp.pad(leaf, [(0, 0), *missing]))
    return jnp.concatenate(full)


PROJECTIONS = ("query", "key", "value", "out", "wi", "wi_0", "wi_1", "wo")


def to_tensors(layers: Layers) -> tuple[dict[str, AnyArray], dict[str, Values]]:
    """Changes as flat tensors, named by their paths and fields, and what is no array in them.

    "encoder/layers/attention/query/low_rank/a" is the first factor at query. The settings of an
    adapter are under its path.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(layers)
    step = lambda key: str(getattr(key, "key", getattr(key, "name", key)))
    tensors = {"/".join(map(step, path)): leaf for path, leaf in leaves}
    is_adapter = lambda node: isinstance(node, Adapter)
    nodes, _ = jax.tree_util.tree_flatten_with_path(layers, is_leaf=is_adapter)
    settings: dict[str, Values] = {
        "/".join(map(step, path)): {name: getattr(node, name) for name in _SETTINGS}
        for path, node in nodes
        if isinstance(node, Adapter)
    }
    return tensors, settings


_SETTINGS = ("activation", "reads", "scale")
_WHOLE: Mapping[str, type[Prefix | LabelRows]] = {"prefix": Prefix, VERBALIZER: LabelRows}


def from_tensors(
    tensors: Mapping[str, AnyArray], settings: Mapping[str, Values] | None = None
) -> Layers:
    """The inverse of ``to_tensors``.

    Raises:
        UserError: a name is of no change that there is, or a change lacks a tensor.
    """
    groups: dict[str, dict[str, AnyArray]] = {}
    leaves: dict[str, PyTree] = {}
    for name, tensor in tensors.items():
        *modules, last = name.split("/")
        kind = modules[-1] if modules else ""
        if last in ("a", "b") and kind == "low_rank":
            groups.setdefault("/".join(modules[:-1]), {})[last] = tensor
        elif kind in PROJECTIONS or kind in _WHOLE or kind.endswith("_adapter"):
            groups.setdefault("/".join(modules), {})[last] = tensor
        elif last in ("hidden", "scale"):
            leaves[name] = tensor
        else:
            raise UserError(f"The tensor {shown(name)} is of no change that this version knows.")
    for path, fields in groups.items():
        leaves[path] = _change(path, fields, (settings or {}).get(path, {}))
    return nested(leaves)


def _change(path: str, fields: dict[str, PyTree], settings: Values) -> PyTree:
    kind = path.rpartition("/")[2]
    try:
        if kind in _WHOLE:
            return _WHOLE[kind](**fields)
        if kind in PROJECTIONS:
            low_rank = LowRank(fields.pop("a"), fields.pop("b")) if "a" in fields else None
            return Projection(low_rank, **fields)
        return Adapter(**fields, **settings)
    except (TypeError, KeyError) as error:
        raise UserError(f"The tensors of {path!r} do not belong together: {error}.") from None


def check_fit(layers: Layers, params: Params, source: str) -> None:
    """Raise a UserError unless changes of one member [L, ...] fit the weights of a backbone."""
    tensors = to_tensors(layers)[0]
    for name, tensor in tensors.items():
        path = tuple(name.split("/"))
        if not _fits(path, np.shape(tensor), params):
            raise UserError(
                f"The changes at {name!r} have shape {list(np.shape(tensor))}, and {source} has no "
                "weights of that place and size; use the backbone that they were tuned on."
            )
    _check_sizes({name: np.shape(tensor) for name, tensor in tensors.items()})


# the axes in which two tensors of one change have the same rank, width or length
_SHARED_SIZES = (
    ("low_rank/a", -1, "low_rank/b", 1),
    ("_adapter/down", -1, "_adapter/up", -2),
    ("_adapter/down", -1, "_adapter/down_bias", -1),
    ("prefix/key", 1, "prefix/value", 1),
    ("prefix/key", 1, "prefix/used", 1),
    (f"{VERBALIZER}/rows", 0, f"{VERBALIZER}/bias", 0),
)


def _check_sizes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a UserError unless tensors of one change have the same rank, width or length."""
    for end, axis, other_end, other_axis in _SHARED_SIZES:
        for name, shape in shapes.items():
            other = name.removesuffix(end) + other_end
            if name.endswith(end) and other in shapes:
                if shape[axis:][:1] != shapes[other][other_axis:][:1]:
                    raise UserError(
                        f"The tensor {name!r} has shape {list(shape)} and {other!r} "
                        f"{list(shapes[other])}; the two do not belong together."
                    )


def _fits(path: Path, shape: tuple[int, ...], params: Params) -> bool:
    """Whether a tensor of a change fits what the parameters have at its place."""
    *outer, field = path
    if outer == [VERBALIZER]:
        width = params["token_embedder"]["embedding"].shape[1]
        return len(shape) == 1 if field == "bias" else len(shape) == 2 and shape[1] == width
    if outer and outer[-1] == "low_rank":
        return _fits_kernel((*outer[:-1],), field, shape, params)
    if outer and outer[-1] in PROJECTIONS:
        return _fits_kernel((*outer,), field, shape, params)
    if field == "hidden":
        kernel = at(params, (*outer, "wo"))
        return kernel is not None and shape == kernel.shape[:2]
    if field == "scale":
        scale = at(params, path)
        return scale is not None and shape == scale.shape
    if outer and outer[-1] == "prefix":
        key = at(params, (*outer[:-1], "key"))
        if key is None or shape[:1] != key.shape[:1]:
            return False
        return field == "used" or shape[2:] == key.shape[2:]
    module = at(params, (*outer[:-1],))
    if module is None or "mlp" not in module:
        return False
    wo = module["mlp"]["wo"]
    depth, width = wo.shape[0], wo.shape[2]
    return shape[0] == depth and (field == "down_bias" or width in shape[1:])


def _fits_kernel(path: Path, field: str, shape: tuple[int, ...], params: Params) -> bool:
    kernel = at(params, path)
    if kernel is None:
        return False
    depth, *rest = kernel.shape
    summed = 2 if path[-1] == "out" else 1
    inputs, outputs = tuple(rest[:summed]), tuple(rest[summed:])
    if field == "a":
        return shape[:-1] == (depth, *inputs)
    if field == "b":
        return shape[:1] == (depth,) and shape[2:] == outputs
    return shape == (depth, *outputs)
