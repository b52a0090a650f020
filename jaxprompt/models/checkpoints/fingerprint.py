"""The fingerprint of a backbone, which is the same for all file formats and dtypes."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt

from jaxprompt.models.registry import Params

_SAMPLES = 4096


class Sample(NamedTuple):
    """Some values of a leaf, from which its part of the fingerprint is computed."""

    shape: tuple[int, ...]  # of the leaf
    values: Float[np.ndarray, " n"]


class Fingerprints(NamedTuple):
    """The fingerprint of a model, and that of the same model after a cast to float16."""

    own: str
    float16: str


def fingerprint(params: Params) -> str:
    """16 hex digits that tell backbones apart, whatever file format and dtype they came from.

    SHA-256 over path, shape and at most 4096 evenly strided values of each leaf, rounded to
    bfloat16. That is constant work for each leaf, also where leaves are sharded over devices.
    """
    return fingerprints(params).own


def fingerprints(
    params: Params, samples: Mapping[tuple[str, ...], Sample] | None = None
) -> Fingerprints:
    """``fingerprint``, and that of the same values after they have been rounded to float16.

    Args:
        samples: by path, of the leaves that have been quantized since.
    """
    digests = hashlib.sha256(), hashlib.sha256()
    known = samples or {}
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, lambda x: not isinstance(x, dict))
    by_path = {tuple(str(key.key) for key in path): leaf for path, leaf in leaves}
    unknown = [path for path in by_path if path not in known]
    taken = dict(zip(unknown, sample([by_path[path] for path in unknown]), strict=True))
    for path in by_path:
        shape, values = known[path] if path in known else taken[path]
        with np.errstate(over="ignore"):
            both = values, values.astype(np.float16)
        for digest, each in zip(digests, both, strict=True):
            digest.update(f"{'/'.join(path)} {tuple(shape)}\n".encode())
            bits = np.ascontiguousarray(each.astype(ml_dtypes.bfloat16)).view(np.uint16)
            digest.update(bits.astype("<u2").tobytes())
    return Fingerprints(*(digest.hexdigest()[:16] for digest in digests))


def sample(leaves: Sequence[Float[Array, "..."] | Float[np.ndarray, "..."]]) -> list[Sample]:
    """At most ``_SAMPLES`` values of each leaf, to the bit, gathered where the leaf lives."""
    remote = [leaf for leaf in leaves if isinstance(leaf, jax.Array) and not _on_host(leaf)]
    gathered = iter(_gather(remote) if remote else ())
    samples = []
    for leaf in leaves:
        shape = tuple(leaf.shape)
        if isinstance(leaf, jax.Array) and not _on_host(leaf):
            values = np.asarray(next(gathered)).view(leaf.dtype)
        else:
            values = np.asarray(leaf)[_strided(shape)]
        samples.append(Sample(shape, values))
    return samples


def _on_host(leaf: jax.Array) -> bool:
    """Whether NumPy can see the values without a copy of the leaf."""
    return len(leaf.devices()) == 1 and next(iter(leaf.devices())).platform == "cpu"


def _strided(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Indices of at most ``_SAMPLES`` values at even distances."""
    size = math.prod(shape)
    count = min(_SAMPLES, size)
    return np.unravel_index(np.arange(count, dtype=np.int64) * size // max(count, 1), shape)


def _gather(leaves: list[Shaped[Array, "..."]]) -> list[UInt[Array, " _"]]:
    """The bits of the sampled values, as integers.

    Integers, because some devices turn the smallest floats into 0 when they compute.
    """

    def take(leaves: list[Shaped[Array, "..."]]) -> list[UInt[Array, " _"]]:
        kinds = {2: jnp.uint16, 4: jnp.uint32}
        bits = [jax.lax.bitcast_convert_type(x, kinds[x.dtype.itemsize]) for x in leaves]
        return [each[_strided(each.shape)] for each in bits]

    mesh = getattr(leaves[0].sharding, "mesh", None)
    if mesh is None:
        return jax.jit(take)(leaves)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(take, out_shardings=everywhere)(leaves)
