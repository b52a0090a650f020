"""What the processes of a run tell each other; one process does it without a word."""

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from jaxprompt.config.errors import UserError


def fetch(tree: Any) -> Any:
    """Arrays over the devices of all processes as what each process can read; all must ask."""

    def whole(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def fetch_to_zero(tree: Any) -> Any:
    """Arrays over the devices of all processes as NumPy arrays in the first one; all must ask.

    The others get None. One array at a time is put together on the devices.
    """
    first = jax.process_index() == 0

    def host(x):
        whole = fetch(x) if first or not x.is_fully_replicated else None
        return np.asarray(whole) if first else None

    return jax.tree.map(host, tree)


T = TypeVar("T")


def on_process_zero(work: Callable[[], T]) -> T:
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


def broadcast_from_zero(work: Callable[[], Any], like: Any) -> Any:
    """Arrays of the shapes of ``like`` that ``work`` returns in the first process, in all."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, work())
    from jax.experimental import multihost_utils

    held: list[Any] = [like]

    def fill() -> None:
        held[0] = jax.tree.map(np.asarray, work())

    on_process_zero(fill)
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(held[0]))


def assert_equal_across_processes(what: str, facts: Any) -> None:
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
