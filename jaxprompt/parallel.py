"""Meshes, shardings and processes: one device is a mesh of one, a pod slice a larger one."""

import hashlib
import json
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxprompt.config import MeshConfig, UserError

# logical axis of a parameter -> mesh axis; what is not named is replicated
RULES = {"vocab": "model", "heads": "model", "mlp": "model"}


def make_mesh(config: MeshConfig = MeshConfig(), devices: list[Any] | None = None) -> Mesh:
    """A mesh with axes ``data`` and ``model``; a size of -1 takes the devices that are left."""
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "model": config.model}
    fixed = int(np.prod([size for size in sizes.values() if size > 0]))
    free = [axis for axis, size in sizes.items() if size == -1]
    if any(size < 1 and size != -1 for size in sizes.values()) or len(free) > 1:
        raise UserError(f"Mesh {sizes} is not possible; sizes are positive, and one may be -1.")
    for axis in free:
        sizes[axis] = len(devices) // fixed
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise UserError(
            f"Mesh {sizes} does not cover {len(devices)} device(s); "
            "set mesh.data and mesh.model so that their product is the number of devices."
        )
    # Auto, not Explicit: with explicit axes the embedding gather raises a sharding error
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


def parameter_sharding(mesh: Mesh) -> Callable[[tuple[str | None, ...]], NamedSharding]:
    """A function from the logical axes of a parameter to its sharding on ``mesh``."""
    return lambda axes: NamedSharding(mesh, PartitionSpec(*(RULES.get(str(a)) for a in axes)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of prompt, optimizer state and metrics."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Rows of a NumPy batch over the ``data`` axis; each process places only the rows it holds.

    Every process computes the same global batch (a pure function of seed and step), so no host
    needs to hear from another.
    """
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: put(x, sharding), batch)


def ways(mesh: Mesh | None) -> int:
    """Over how many devices the rows of a batch go."""
    return 1 if mesh is None else mesh.shape["data"]


def over_rows(work: Callable[[Any, Any], Any], mesh: Mesh | None, *, summed: bool = False) -> Any:
    """``work(shared, rows)`` of each device's own rows, by itself, and the results together.

    summed: added up, which is all that the devices of ``data`` ever send each other; else one after
    another, as the rows were. Other axes of the mesh are left to the compiler.
    """
    if ways(mesh) == 1:
        return work

    def mine(shared, rows):
        told = _SHARED_BY.set((ways(mesh), jax.lax.axis_index("data")))
        try:
            found = work(shared, rows)
        finally:
            _SHARED_BY.reset(told)
        return jax.lax.psum(found, "data") if summed else found

    return jax.shard_map(
        mine, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec() if summed else PartitionSpec("data"),
        axis_names={"data"}, check_vma=False,
    )  # fmt: skip


# within over_rows: the number of devices that share a batch's rows, and which one this is
_SHARED_BY: ContextVar[tuple[int, Any]] = ContextVar("_SHARED_BY", default=(1, 0))


def own_rows(draw: Callable[[int], jax.Array], rows: int) -> jax.Array:
    """This device's ``rows`` of what ``draw`` makes for a whole batch: the same on any mesh."""
    count, place = _SHARED_BY.get()
    if count == 1:
        return draw(rows)
    return jax.lax.dynamic_slice_in_dim(draw(count * rows), place * rows, rows)


def whole_rows_on_cpu(mesh: Mesh | None) -> bool:
    """Whether a CPU device has all of a row to itself, and attends to rows in turn."""
    if jax.default_backend() != "cpu":
        return False
    return jax.device_count() == 1 if mesh is None else mesh.size == mesh.shape["data"]


def put(value: np.ndarray, sharding: Any) -> jax.Array:
    """A NumPy array that every process holds, as one array over the devices of all of them."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def fetch(tree: Any) -> Any:
    """Arrays over the devices of all processes as what each process can read; all must ask."""

    def whole(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


T = TypeVar("T")


def by_first(work: Callable[[], T]) -> T:
    """What ``work`` returns (JSON) in the first process, in all of them; so with a UserError."""
    if jax.process_count() == 1:
        return work()
    said: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            said = {"value": work()}
        except UserError as error:
            said = {"error": str(error)}
        except Exception as error:  # the others must not wait for what will not come
            _from_first_bytes(json.dumps({"error": f"The first process failed: {error}"}).encode())
            raise
    said = json.loads(_from_first_bytes(json.dumps(said).encode()))
    if "error" in said:
        raise UserError(said["error"])
    return said["value"]


def from_first(work: Callable[[], Any], like: Any) -> Any:
    """Arrays of the shapes of ``like`` that ``work`` returns in the first process, in all."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, work())
    from jax.experimental import multihost_utils

    held: list[Any] = [like]

    def fill() -> None:
        held[0] = jax.tree.map(np.asarray, work())

    by_first(fill)
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(held[0]))


def check_same(what: str, facts: Any) -> None:
    """Raise UserError in all processes unless ``facts`` (JSON) are the same in all of them."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).digest()
    all_of_them = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    differ = [n for n, own in enumerate(np.asarray(all_of_them)) if (own != all_of_them[0]).any()]
    if differ:
        numbers = ", ".join(map(str, differ))
        raise UserError(
            f"The {what} of process {numbers} differs from that of process 0; give all processes "
            "of a run the same files and arguments."
        )


def _from_first_bytes(said: bytes) -> bytes:
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
    data = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        data[:] = np.frombuffer(said, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes()


def check_batch_size(batch_size: int, mesh: Mesh, key: str) -> None:
    """Refuse a batch size that the ``data`` axis does not divide."""
    rows = mesh.shape["data"]
    if batch_size % rows:
        raise UserError(
            f"{key} is {batch_size}, which {rows} data-parallel devices do not divide; "
            f"use a multiple of {rows}."
        )
