"""Communication between the processes of a run.

A run of one process calls the same functions, and nothing is sent.
"""

import hashlib
import json
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import PyTree

from jaxprompt.config.errors import UserError
from jaxprompt.config.values import Values

T = TypeVar("T")


def fetch(tree: PyTree) -> PyTree:
    """Copy arrays that lie on the devices of all processes to the host of each process.

    All processes must call this together.
    """

    def whole(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def fetch_to_zero(tree: PyTree) -> PyTree:
    """Copy arrays that lie on the devices of all processes to the host of process 0.

    All processes must call this together; the others get None for each array. One array at a time
    is gathered on the devices.
    """
    first = jax.process_index() == 0

    def host(x):
        whole = fetch(x) if first or not x.is_fully_replicated else None
        return np.asarray(whole) if first else None

    return jax.tree.map(host, tree)


def on_process_zero(work: Callable[[], T]) -> T:
    """Call ``work`` in process 0 and return its result (JSON) in all processes.

    Raises:
        UserError: ``work`` raised one, or any other error in another process.
    """
    if jax.process_count() == 1:
        return work()
    message: Values = {}
    if jax.process_index() == 0:
        try:
            message = {"value": work()}
        except UserError as error:
            message = {"error": str(error)}
        except Exception as error:  # the others must not wait for what will not come
            _broadcast_bytes(json.dumps({"error": f"The first process failed: {error}"}).encode())
            raise
    message = json.loads(_broadcast_bytes(json.dumps(message).encode()))
    if "error" in message:
        raise UserError(message["error"])
    return message["value"]


def broadcast_from_zero(work: Callable[[], PyTree], like: PyTree) -> PyTree:
    """Call ``work`` in process 0 and return its arrays, of the shapes of ``like``, in all."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, work())
    from jax.experimental import multihost_utils

    arrays: list[PyTree] = [like]

    def fill() -> None:
        arrays[0] = jax.tree.map(np.asarray, work())

    on_process_zero(fill)
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(arrays[0]))


def assert_equal_across_processes(what: str, value: object) -> None:
    """Raise UserError in all processes unless ``value`` (JSON) is the same in all of them."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()
    all_of_them = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    rows = np.asarray(all_of_them)
    differ = [number for number, row in enumerate(rows) if (row != rows[0]).any()]
    if differ:
        numbers = ", ".join(map(str, differ))
        raise UserError(
            f"The {what} of process {numbers} differs from that of process 0; give all processes "
            "of a run the same files and arguments."
        )


def _broadcast_bytes(message: bytes) -> bytes:
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    data = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        data[:] = np.frombuffer(message, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes()
