"""Meshes, shardings and processes: one device is a mesh of one, a pod slice a larger one."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import PyTree

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import MeshConfig
from jaxprompt.runtime.devices import Device, available

# logical axis of a parameter -> mesh axis; what is not named is replicated
RULES = {"vocab": "tensor", "heads": "tensor", "mlp": "tensor", "embed": "fsdp"}
# axes that rows of a batch go over
ROWS = ("data", "fsdp")

T = TypeVar("T")  # arrays in any nesting, or what describes them


class Place(NamedTuple):
    """Where in a mesh a computation is. Layers need it to gather weights and shard activations."""

    tensor: int = 1  # devices that share heads, MLP and vocabulary
    fsdp: int = 1  # devices of which each holds a part of every weight, along the model dimension
    trained: bool = False  # whether the weights have gradients


SINGLE = Place()  # one device has everything, or the compiler alone divides it


def make_mesh(config: MeshConfig = MeshConfig(), devices: list[Device] | None = None) -> Mesh:
    """A mesh with axes ``data``, ``fsdp`` and ``tensor``; a size of -1 takes what is left.

    Rows of a batch go over ``data`` and ``fsdp``. Devices of ``fsdp`` hold a part of each weight
    and put a layer together when they need it; those of ``tensor`` share heads, MLP and vocabulary.
    """
    devices = available() if devices is None else devices
    sizes = config.model_dump()
    fixed = int(np.prod([size for size in sizes.values() if size > 0]))
    free = [axis for axis, size in sizes.items() if size == -1]
    if any(size < 1 and size != -1 for size in sizes.values()) or len(free) > 1:
        raise UserError(f"Mesh {sizes} is not possible; sizes are positive, and one may be -1.")
    for axis in free:
        sizes[axis] = len(devices) // fixed
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise UserError(
            f"Mesh {sizes} does not cover {len(devices)} device(s); "
            "mesh.data, mesh.fsdp and mesh.tensor must multiply to the number of devices."
        )
    # Auto, not Explicit: with explicit axes the embedding gather raises a sharding error
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


_WORDS = {"vocab": "words", "heads": "heads", "mlp": "dimensions of its MLP", "embed": "dimensions"}


def check_divides(
    mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], source: str
) -> None:
    """Refuse a mesh that does not divide a parameter of the model from ``source``."""
    for axis, size in zip(axes, shape, strict=True):
        over = RULES.get(str(axis))
        if over and size % mesh.shape[over]:
            raise UserError(
                f"mesh.{over} is {mesh.shape[over]}, which does not divide the {size} "
                f"{_WORDS[str(axis)]} of {source}; use a divisor."
            )


def parameter_sharding(mesh: Mesh) -> Callable[[tuple[str | None, ...]], NamedSharding]:
    """A function from the logical axes of a parameter to its sharding on ``mesh``."""
    return lambda axes: NamedSharding(mesh, PartitionSpec(*(RULES.get(str(a)) for a in axes)))


def map_with_axes(
    function: Callable[[PyTree, PyTree], PyTree], params: PyTree, axes: PyTree
) -> PyTree:
    """``function`` of each array of ``params`` and the logical axes of its parameter."""
    return jax.tree.map(lambda x, of: jax.tree.map(lambda y: function(y, of), x), params, axes,
                        is_leaf=lambda x: not isinstance(x, dict))  # fmt: skip


def part_sharding(mesh: Mesh, shape: Sequence[int], axes: Sequence[str | None]) -> NamedSharding:
    """The sharding of what belongs to a parameter: as that, where its own axes can be divided."""
    return NamedSharding(mesh, _spec(shape, axes, dict(mesh.shape)))


def _spec(
    shape: Sequence[int], axes: Sequence[str | None], sizes: Mapping[str, int]
) -> PartitionSpec:
    along = (RULES.get(str(axis)) for axis in axes)
    return PartitionSpec(
        *(
            to if to is not None and to in sizes and size % sizes[to] == 0 else None
            for size, to in zip(shape, along, strict=True)
        )
    )


_is_spec = lambda x: isinstance(x, PartitionSpec)


def trained_axes(tree: PyTree, shapes: PyTree, axes: PyTree) -> PyTree:
    """The logical axes of each array that a whole model is trained with: weights and moments.

    An array belongs to the parameter that its path ends with. It has axis K before that one's axes,
    of which it may lack one (a factored moment of Adafactor). What belongs to none has no axes.
    shapes, axes: of the model's parameters.
    """
    is_axes = lambda x: isinstance(x, tuple)
    names = jax.tree_util.tree_flatten_with_path(axes, is_axes)[0]
    parameters = {
        tuple(key.key for key in path): (x.shape, own)
        for (path, own), x in zip(names, jax.tree.leaves(shapes), strict=True)
    }

    def of_array(path, x):
        keys = tuple(getattr(key, "key", None) for key in path)
        ends = (keys[start:] for start in range(len(keys)))
        shape, own = next((parameters[end] for end in ends if end in parameters), ((), ()))
        without = lambda some, i: (*some[:i], *some[i + 1 :])
        lacking = {without(own, i) for i in range(len(own)) if without(shape, i) == x.shape[1:]}
        if x.shape[1:] == tuple(shape):
            return (None, *own)[: x.ndim]
        return (None, *lacking.pop()) if len(lacking) == 1 else (None,) * x.ndim

    return jax.tree_util.tree_map_with_path(of_array, tree)


def specs_of(mesh: Mesh, tree: PyTree, axes: PyTree) -> PyTree:
    """How each array of these logical axes is spread over the devices, where it can be divided."""
    sizes = {name: size for name, size in mesh.shape.items() if size > 1}

    def spec(x, of):
        along = [*_spec(x.shape, of, sizes)]
        while along and along[-1] is None:  # as the compiler spells it
            along.pop()
        return PartitionSpec(*along)

    return jax.tree.map(spec, tree, axes)


def named_shardings(mesh: Mesh, specs: PyTree) -> PyTree:
    """Partition specs as shardings on ``mesh``."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def divides_weights(mesh: Mesh | None) -> bool:
    """Whether a device has no more than a part of each large weight."""
    return mesh is not None and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of prompt, optimizer state and metrics."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: T, mesh: Mesh) -> T:
    """Rows of a NumPy batch over the devices; each process places only the rows it holds.

    Every process computes the same global batch (a pure function of seed and step), so no host
    needs to hear from another.
    """
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))
    return jax.tree.map(lambda x: device_put_global(x, sharding), batch)


def num_batch_shards(mesh: Mesh | None) -> int:
    """Over how many devices the rows of a batch go."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def place_in(mesh: Mesh | None, *, divided: bool = True, trained: bool = False) -> Place:
    """The place of a function that ``shard_over_batch`` runs on ``mesh``.

    divided: whether the function's parameters have logical axes, by which ``fsdp`` divides them.
    """
    if mesh is None or mesh.size == 1:
        return SINGLE
    return Place(mesh.shape["tensor"], mesh.shape["fsdp"] if divided else 1, trained)


def shard_over_batch(
    work: Callable[[PyTree, PyTree, PyTree], T],
    mesh: Mesh | None,
    axes: PyTree | None = None,
    *,
    stacked: bool = False,
    results: Callable[[PyTree], PyTree] | None = None,
) -> Callable[[PyTree, PyTree, PyTree], T]:
    """``work(params, shared, rows)`` of each device's own rows, by itself; results together.

    axes: the logical axes of ``params``, of which each device of ``fsdp`` holds its part. A layer
    is put together where it is used (``layers.project``), what is in no layer at once. None: every
    device holds all of ``params``.
    stacked: each device's result along a new first axis, for ``summed``, which is all that the
    devices of ``data`` ever send each other; else one after another, as the rows were. What
    ``tensor`` shares is the compiler's, along ``constrained``.
    results: where ``params`` are trained: the specs of what ``work`` returns by those of
    ``params``, which ``axes`` then makes of them. Their parts are put together by ``work`` itself,
    and the gradient of a part is a sum over the devices of ``fsdp``.
    """
    own = lambda result: jax.tree.map(lambda x: x[None], result) if stacked else result
    if mesh is None or mesh.size == 1:
        return lambda params, shared, rows: own(work(params, shared, rows))
    place = place_in(mesh, divided=axes is not None, trained=results is not None)

    def mine(params, shared, rows):
        params = params if results else gather_params(params, axes, place)
        return own(work(params, shared, rows))

    def everywhere(params, shared, rows):
        specs, out = PartitionSpec(), PartitionSpec(ROWS)
        if results:
            specs = _along(axes(params), ROWS)  # pyright: ignore[reportOptionalCall]
            out = stacked_specs(results(specs))
        elif place.fsdp > 1:
            sizes = {"fsdp": place.fsdp}
            specs = map_with_axes(lambda x, of: _spec(x.shape, of, sizes), params, axes)
        return jax.shard_map(
            mine, mesh=mesh, in_specs=(specs, PartitionSpec(), PartitionSpec(ROWS)),
            out_specs=out,
            axis_names=_own_axes(mesh), check_vma=False,
        )(params, shared, rows)  # fmt: skip

    return everywhere


def gather_params(params: T, axes: PyTree, place: Place) -> T:
    """Parameters of which this device has parts, those that are in no layer whole."""

    def one(x, of):
        return x if of[0] == "layers" or "embed" not in of else all_gather_fsdp(x, of, place)

    return map_with_axes(one, params, axes) if place.fsdp > 1 else params


def _along(specs: PyTree, names: Sequence[str]) -> PyTree:
    """Partition specs with these axes of the mesh alone."""
    only = lambda spec: PartitionSpec(*(name if name in names else None for name in spec))
    return jax.tree.map(only, specs, is_leaf=_is_spec)


def _adding(spec: PartitionSpec) -> tuple[str, ...]:
    """The axes of the mesh whose devices have sums of their own of what is spread like this."""
    return tuple(name for name in ROWS if name not in spec)


def stacked_specs(specs: PyTree) -> PyTree:
    """Those of what ``shard_over_batch`` stacks, by those of the results."""
    stack = lambda spec: PartitionSpec(_adding(spec), *spec)
    return jax.tree.map(stack, specs, is_leaf=_is_spec)


def _own_axes(mesh: Mesh) -> set[str]:
    """Axes along which a device computes by itself: all, where none of them is the compiler's.

    A kernel of Pallas can be in no program that has another.
    """
    return set(mesh.axis_names) if mesh.shape["tensor"] == 1 else set(ROWS)


def batch_sharding(mesh: Mesh | None) -> NamedSharding | None:
    """The sharding of what ``shard_over_batch`` has stacked."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(ROWS))


def psum_over_batch(results: T, mesh: Mesh | None, specs: PyTree | None = None) -> T:
    """The sum of what ``shard_over_batch`` stacks, on every device or spread as ``specs`` say."""
    own = lambda found: jax.tree.map(lambda x: x[0], found)
    if mesh is None or mesh.size == 1:
        return own(results)
    if specs is not None:
        specs = _along(specs, ROWS)
        add = lambda x, spec: jax.lax.psum(x[0], _adding(spec))
        return jax.shard_map(
            lambda found: jax.tree.map(add, found, specs), mesh=mesh,
            in_specs=(stacked_specs(specs),), out_specs=specs, axis_names=set(ROWS),
            check_vma=False,
        )(results)  # fmt: skip
    return jax.shard_map(
        lambda found: jax.lax.psum(own(found), ROWS), mesh=mesh, in_specs=PartitionSpec(ROWS),
        out_specs=PartitionSpec(), axis_names=set(ROWS), check_vma=False,
    )(results)  # fmt: skip


def stacked_zeros(like: PyTree, mesh: Mesh, specs: PyTree) -> PyTree:
    """Zeros of what ``shard_over_batch`` stacks of results like these."""

    def zeros(x, spec, stacked):
        count = math.prod(mesh.shape[name] for name in _adding(spec))
        own = jnp.zeros((count, *x.shape), x.dtype)
        return jax.lax.with_sharding_constraint(own, NamedSharding(mesh, stacked))

    return jax.tree.map(zeros, like, specs, stacked_specs(specs))


def all_gather_fsdp(weight: PyTree, axes: Sequence[str | None], place: Place) -> PyTree:
    """A weight of these logical axes, with what other devices of ``fsdp`` hold."""
    return jax.tree.map(functools.partial(_gather_array, axes=axes, place=place), weight)


def _gather_array(weight: jax.Array, axes: Sequence[str | None], place: Place) -> jax.Array:
    along = [RULES.get(str(axis)) for axis in axes]
    if weight.shape[along.index("fsdp")] == 1:  # scales that all parts share
        return weight
    gather = functools.partial(
        jax.lax.all_gather, axis_name="fsdp", axis=along.index("fsdp"), tiled=True
    )
    if place.tensor == 1:
        return gather(weight)
    # by each of those that share heads, MLP and vocabulary: the compiler would put together all of
    # it everywhere
    spec = _spec(weight.shape, axes, {"tensor": place.tensor})
    return jax.shard_map(
        gather, in_specs=spec, out_specs=spec, axis_names={"tensor"}, check_vma=False
    )(weight)


def shard_activation(x: jax.Array, place: Place, *axes: str | None) -> jax.Array:
    """An activation of rows, split over ``tensor`` as its logical axes after the first ask.

    Without this the compiler could follow the weights instead, and send activations around.
    """
    if place.tensor == 1:
        return x
    spec = [None if RULES.get(str(axis)) == "fsdp" else RULES.get(str(axis)) for axis in axes]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(None, *spec))


def whole_rows_on_cpu(mesh: Mesh | None) -> bool:
    """Whether a CPU device has all of a row to itself, and attends to rows in turn."""
    if jax.default_backend() != "cpu":
        return False
    return jax.device_count() == 1 if mesh is None else mesh.shape["tensor"] == 1


def positions(cpu: bool | None = None, shared: bool = False) -> int:
    """Positions that are best computed at a time on a device; shared: where examples share rows.

    On a CPU what was measured to be fast, on an accelerator, where nothing was, so many that
    batches are rarely cut.
    """
    cpu = jax.default_backend() == "cpu" if cpu is None else cpu
    return (2560 if shared else 1280) if cpu else 32_768


def logits(cpu: bool | None = None) -> int:
    """Logits that a device holds at a time: half a GiB of a CPU, one of an accelerator.

    The gradient of a loss holds some three times as much. Classification stays far below.
    """
    cpu = jax.default_backend() == "cpu" if cpu is None else cpu
    return 2**27 if cpu else 2**28


def device_put_global(value: np.ndarray, sharding: Sharding) -> jax.Array:
    """A NumPy array that every process holds, as one array over the devices of all of them."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def moved(x: jax.Array, sharding: Sharding) -> jax.Array:
    """An array, over all devices or the same in each process, as one over devices of all."""
    if jax.process_count() > 1 and x.is_fully_addressable:
        # what device_put makes of it has no parts that can be read (jax 0.10)
        return device_put_global(np.asarray(x), sharding)
    return jax.device_put(x, sharding)


def with_sharding(shapes: T, shardings: PyTree) -> T:
    """Shapes and dtypes of arrays as those of arrays over devices, each with its sharding."""
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(place, shapes, shardings)


def check_batch_size(batch_size: int, mesh: Mesh, key: str) -> None:
    """Refuse a batch size that the devices do not divide."""
    rows = num_batch_shards(mesh)
    if batch_size % rows:
        raise UserError(
            f"{key} is {batch_size}, which {rows} data-parallel devices do not divide; "
            f"use a multiple of {rows}."
        )
