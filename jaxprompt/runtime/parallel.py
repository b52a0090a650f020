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
# mesh axes over which the rows of a batch are divided
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
    """The sharding of an array with a parameter's axes, such as scales, where they divide."""
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

    An array belongs to the parameter that its path ends with. Its axes are K and those of the
    parameter; a factored moment of Adafactor lacks one of these. An array of no parameter has none.
    shapes, axes: of the model's parameters.
    """
    is_axes = lambda x: isinstance(x, tuple)
    names = jax.tree_util.tree_flatten_with_path(axes, is_axes)[0]
    parameters = {
        tuple(key.key for key in path): (x.shape, logical)
        for (path, logical), x in zip(names, jax.tree.leaves(shapes), strict=True)
    }

    def of_array(path, x):
        keys = tuple(getattr(key, "key", None) for key in path)
        ends = (keys[start:] for start in range(len(keys)))
        shape, logical = next((parameters[end] for end in ends if end in parameters), ((), ()))
        without = lambda some, i: (*some[:i], *some[i + 1 :])
        places = range(len(logical))
        lacking = {without(logical, i) for i in places if without(shape, i) == x.shape[1:]}
        if x.shape[1:] == tuple(shape):
            return (None, *logical)[: x.ndim]
        return (None, *lacking.pop()) if len(lacking) == 1 else (None,) * x.ndim

    return jax.tree_util.tree_map_with_path(of_array, tree)


def specs_of(mesh: Mesh, tree: PyTree, axes: PyTree) -> PyTree:
    """The partition spec of each array by its logical axes, where the mesh divides them."""
    sizes = {name: size for name, size in mesh.shape.items() if size > 1}

    def spec(x, of):
        along = [*_spec(x.shape, of, sizes)]
        while along and along[-1] is None:  # the compiler leaves out a None at the end
            along.pop()
        return PartitionSpec(*along)

    return jax.tree.map(spec, tree, axes)


def named_shardings(mesh: Mesh, specs: PyTree) -> PyTree:
    """Partition specs as shardings on ``mesh``."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def divides_weights(mesh: Mesh | None) -> bool:
    """Whether each device holds only a part of each large weight."""
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
    """A function that calls ``work(params, shared, rows)`` on each device with its own rows.

    Args:
        axes: the logical axes of ``params``. Each device of ``fsdp`` holds a part of them. A layer
            is gathered where it is used (``ops.matmul.dense``); what is in no layer is gathered
            first. None: every device holds all of ``params``.
        stacked: the results of the devices are stacked along a new first axis, for
            ``psum_over_batch``: the devices of ``data`` send each other nothing else. Otherwise
            they are concatenated, as the rows were. The compiler divides the work among the
            devices of ``tensor``, see ``shard_activation``.
        results: given where ``params`` are trained: makes the partition specs of what ``work``
            returns from those of ``params``. ``axes`` is then a function that makes these of
            ``params``. ``work`` itself gathers the parts, and the gradient of a part is a sum over
            the devices of ``fsdp``.
    """
    add_axis = lambda result: jax.tree.map(lambda x: x[None], result) if stacked else result
    if mesh is None or mesh.size == 1:
        return lambda params, shared, rows: add_axis(work(params, shared, rows))
    place = place_in(mesh, divided=axes is not None, trained=results is not None)

    def on_device(params, shared, rows):
        params = params if results else gather_params(params, axes, place)
        return add_axis(work(params, shared, rows))

    def on_mesh(params, shared, rows):
        specs, out = PartitionSpec(), PartitionSpec(ROWS)
        if results:
            specs = _along(axes(params), ROWS)  # pyright: ignore[reportOptionalCall]
            out = stacked_specs(results(specs))
        elif place.fsdp > 1:
            sizes = {"fsdp": place.fsdp}
            specs = map_with_axes(lambda x, of: _spec(x.shape, of, sizes), params, axes)
        return jax.shard_map(
            on_device, mesh=mesh, in_specs=(specs, PartitionSpec(), PartitionSpec(ROWS)),
            out_specs=out,
            axis_names=_own_axes(mesh), check_vma=False,
        )(params, shared, rows)  # fmt: skip

    return on_mesh


def gather_params(params: T, axes: PyTree, place: Place) -> T:
    """Parameters of which this device has parts: those outside of layers are gathered."""

    def one(x, of):
        return x if of[0] == "layers" or "embed" not in of else all_gather_fsdp(x, of, place)

    return map_with_axes(one, params, axes) if place.fsdp > 1 else params


def _along(specs: PyTree, names: Sequence[str]) -> PyTree:
    """Partition specs with these axes of the mesh alone."""
    only = lambda spec: PartitionSpec(*(name if name in names else None for name in spec))
    return jax.tree.map(only, specs, is_leaf=_is_spec)


def _adding(spec: PartitionSpec) -> tuple[str, ...]:
    """The axes of the mesh along which devices have different sums of a result of this spec."""
    return tuple(name for name in ROWS if name not in spec)


def stacked_specs(specs: PyTree) -> PyTree:
    """The partition specs of what ``shard_over_batch`` stacks, from those of the results."""
    stack = lambda spec: PartitionSpec(_adding(spec), *spec)
    return jax.tree.map(stack, specs, is_leaf=_is_spec)


def _own_axes(mesh: Mesh) -> set[str]:
    """The axes of the mesh that ``shard_map`` divides by hand; the compiler divides the others.

    All axes if ``tensor`` is 1: a Pallas kernel may not be in a program in which the compiler
    divides an axis.
    """
    return set(mesh.axis_names) if mesh.shape["tensor"] == 1 else set(ROWS)


def batch_sharding(mesh: Mesh | None) -> NamedSharding | None:
    """The sharding of what ``shard_over_batch`` has stacked."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(ROWS))


def psum_over_batch(results: T, mesh: Mesh | None, specs: PyTree | None = None) -> T:
    """The sum of what ``shard_over_batch`` stacks: on every device, or as ``specs`` say."""
    first = lambda stacked: jax.tree.map(lambda x: x[0], stacked)
    if mesh is None or mesh.size == 1:
        return first(results)
    if specs is not None:
        specs = _along(specs, ROWS)

        def add(x, spec):
            # XLA (jax 0.10) refuses sums along axes of one device beside axes that it divides
            names = [name for name in _adding(spec) if mesh.shape[name] > 1]
            return jax.lax.psum(x[0], names) if names else x[0]

        return jax.shard_map(
            lambda stacked: jax.tree.map(add, stacked, specs), mesh=mesh,
            in_specs=(stacked_specs(specs),), out_specs=specs, axis_names=set(ROWS),
            check_vma=False,
        )(results)  # fmt: skip
    return jax.shard_map(
        lambda stacked: jax.lax.psum(first(stacked), ROWS), mesh=mesh, in_specs=PartitionSpec(ROWS),
        out_specs=PartitionSpec(), axis_names=set(ROWS), check_vma=False,
    )(results)  # fmt: skip


def stacked_zeros(like: PyTree, mesh: Mesh, specs: PyTree) -> PyTree:
    """Zeros of what ``shard_over_batch`` stacks of results like these."""

    def zeros(x, spec, stacked):
        count = math.prod(mesh.shape[name] for name in _adding(spec))
        array = jnp.zeros((count, *x.shape), x.dtype)
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, stacked))

    return jax.tree.map(zeros, like, specs, stacked_specs(specs))


def all_gather_fsdp(weight: PyTree, axes: Sequence[str | None], place: Place) -> PyTree:
    """A whole weight, of which each device of ``fsdp`` holds a part."""
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
    # within each group of devices that share heads, MLP and vocabulary: the compiler would gather
    # the whole weight on every device
    spec = _spec(weight.shape, axes, {"tensor": place.tensor})
    return jax.shard_map(
        gather, in_specs=spec, out_specs=spec, axis_names={"tensor"}, check_vma=False
    )(weight)


def shard_activation(x: jax.Array, place: Place, *axes: str | None) -> jax.Array:
    """An activation of rows, divided over ``tensor`` by its logical axes after the first.

    Without this the compiler could follow the weights instead, and send activations around.
    """
    if place.tensor == 1:
        return x
    spec = [None if RULES.get(str(axis)) == "fsdp" else RULES.get(str(axis)) for axis in axes]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(None, *spec))


def supports_per_example_attention(mesh: Mesh | None) -> bool:
    """Whether a CPU device holds whole rows, so that attention takes one example at a time."""
    if jax.default_backend() != "cpu":
        return False
    return jax.device_count() == 1 if mesh is None else mesh.shape["tensor"] == 1


def max_positions(cpu: bool | None = None, shared: bool = False) -> int:
    """The number of positions that a device should compute at a time.

    The number for a CPU is measured to be fast. That for an accelerator is not measured: it is so
    large that batches are rarely cut.

    Args:
        shared: whether examples share rows.
    """
    cpu = jax.default_backend() == "cpu" if cpu is None else cpu
    return (2560 if shared else 1280) if cpu else 32_768


def max_logits(cpu: bool | None = None) -> int:
    """The number of logits that a device holds at a time: 0.5 GiB on a CPU, 1 GiB on others.

    The gradient of a loss holds about three times as much. Classification stays far below.
    """
    cpu = jax.default_backend() == "cpu" if cpu is None else cpu
    return 2**27 if cpu else 2**28


def device_put_global(value: np.ndarray, sharding: Sharding) -> jax.Array:
    """A NumPy array that every process holds, as one array over the devices of all of them."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def reshard(x: jax.Array, sharding: Sharding) -> jax.Array:
    """An array with another sharding. A process-local array must be the same in each process."""
    if jax.process_count() > 1 and x.is_fully_addressable:
        # what device_put makes of it has no parts that can be read (jax 0.10)
        return device_put_global(np.asarray(x), sharding)
    return jax.device_put(x, sharding)


def with_sharding(shapes: T, shardings: PyTree) -> T:
    """Shapes and dtypes of arrays, each with its sharding."""
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
