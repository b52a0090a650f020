"""Real weights in: ``load_backbone``.

Weights are loaded leaf by leaf. A stacked leaf [L, ...] is allocated once in the target dtype and
filled one tensor of the file at a time, so that a host never holds more than the final parameters
and the largest tensor. With a sharding, only each device's slice is read.
"""

import functools
import importlib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypedDict, Unpack

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from jaxprompt.config.errors import UserError
from jaxprompt.config.paths import expanded
from jaxprompt.models import precision, registry
from jaxprompt.models.checkpoints import hub
from jaxprompt.models.checkpoints.axes import axis_sizes, leaf_at
from jaxprompt.models.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jaxprompt.models.checkpoints.fingerprint import Sample, fingerprints, sample
from jaxprompt.models.checkpoints.leaf import DTYPES, Index, Leaf, Tensor, fill, layer_sizes
from jaxprompt.models.checkpoints.metadata import damage_as_user_error
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.encoder.config import EncoderConfig
from jaxprompt.models.ops.attention import flash_attention
from jaxprompt.models.ops.quantization import BITS, MATMUL_WEIGHTS, check_installed, quantize
from jaxprompt.models.t5.config import released
from jaxprompt.runtime import parallel

Params = registry.Params
LOAD_DTYPES = ("float32", "bfloat16", "mixed")
# names that were here -> the modules where they are now
_MOVED = {
    "save_hf": "jaxprompt.models.checkpoints.save",
    "fingerprint": "jaxprompt.models.checkpoints.fingerprint",
}


def __getattr__(name: str) -> object:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} is now in {_MOVED[name]}", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(_MOVED[name]), name)


class Backbone(NamedTuple):
    """A frozen model: nothing ever writes ``params``."""

    model: registry.FamilyModel
    params: Params
    source: str  # as the user named it
    fingerprint: str
    path: Path | str  # directory or GGUF file with the tokenizer, or the source where there is none
    mesh: Mesh | None = None  # over which it is spread
    float16: str = ""  # the fingerprint of a copy of this model in float16

    @property
    def config(self) -> registry.Config:
        """What the checkpoint says of the model."""
        return self.model.config


class ComputeOptions(TypedDict, total=False):
    """How a loaded model is computed; see ``load_backbone``."""

    dropout: float
    unroll: bool | None
    remat: bool
    attention: str
    flash: bool


class _Compute(NamedTuple):
    """All options of computing, with their defaults."""

    dtype: str
    dropout: float = 0.0
    unroll: bool | None = None
    remat: bool = False
    attention: str = "causal"
    flash: bool = False


class _Storage(NamedTuple):
    """In which form weights are kept, and on which devices."""

    mesh: Mesh | None
    trainable: bool
    quantization: str | None


def load_backbone(
    name_or_path: str,
    *,
    dtype: str | None = "float32",
    mesh: Mesh | None = None,
    config: str | Path | None = None,
    trainable: bool = False,
    quantization: str | None = None,
    weights: str | None = None,
    **compute: Unpack[ComputeOptions],
) -> Backbone:
    """Load a Hugging Face directory or hub id, a T5X checkpoint, a GGUF file, "builtin", "smollm2".

    Args:
        dtype: of parameters and computation: "float32", "bfloat16" or "mixed" (float32, with the
            operands of matrix products rounded to bfloat16). None: what suits the backend.
        mesh: the devices over which weights are spread, see runtime/parallel.py. None: the default.
        config: a config.json to use instead of the checkpoint's own. A T5X checkpoint has none;
            without this argument its config follows from its shapes.
        trainable: whether the weights will be trained. If not, "mixed" keeps operands of matrix
            products in bfloat16, which takes half the memory.
        quantization: "int8", "int4" or "nf4" for these operands, see ops/quantization.py.
        weights: the old name of ``quantization``.
        dropout: the rate, for a T5.
        unroll: whether the loop over layers is unrolled. That takes longer to compile, and runs no
            faster on CPUs.
        remat: whether activations of layers are computed again for the gradient.
        attention: of a decoder-only model: "causal", "prompt" or "prefix", see decoder/config.py.
        flash: whether a T5's encoder attends by an accelerator's kernel, see flash_attention.py.

    Raises:
        UserError: the name is unknown, a file is damaged, or tensors do not fit the config.
    """
    if weights is not None:
        note = "load_backbone(weights=...) is now load_backbone(quantization=...); rename it"
        warnings.warn(note, DeprecationWarning, stacklevel=2)
        quantization = weights
    how = _Compute(precision.resolve_dtype(dtype), **compute)
    config_path = None if config is None else Path(expanded(config))
    return _load(str(name_or_path), config_path, how, _Storage(mesh, trainable, quantization))


def _load(name: str, config_path: Path | None, compute: _Compute, storage: _Storage) -> Backbone:
    if compute.dtype not in LOAD_DTYPES:
        raise UserError(
            f"dtype {compute.dtype!r} is not supported, use one of {', '.join(LOAD_DTYPES)}"
        )
    location = hub.resolve(name)
    checkpoint = open_checkpoint(location, config_path)
    runtime = _runtime(checkpoint.config, compute, name, storage.mesh)
    model = registry.model_for(checkpoint.config, runtime)
    if storage.quantization is not None:
        _check_quantization(storage.quantization, storage.trainable)
    if storage.mesh is not None:
        _check_mesh(storage.mesh, model, checkpoint, name)
    params, samples = _load_params(model, checkpoint, storage)
    path = name if location.startswith("gs://") else Path(location)
    own, float16 = fingerprints(params, samples)
    return Backbone(model, params, name, own, path, storage.mesh, float16)


def open_config(name: str) -> registry.Config:
    """The config of a backbone, no weights read. A released T5 1.1 need not be on this machine."""
    return released(name) or open_checkpoint(hub.resolve(name)).config


def same_model(backbone: Backbone, recorded: Mapping[str, object]) -> bool:
    """Whether a prompt was tuned on this model, or on a copy of it in another dtype.

    A copy in bfloat16 has the fingerprint of the model itself. A copy in float16 has another one,
    because its values are rounded twice. So both sides say what such a copy of theirs would have.

    Args:
        recorded: the prompt's record of its backbone: "fingerprint", and "fingerprint_float16"
            unless an old version wrote it.
    """
    named = recorded.get("fingerprint"), recorded.get("fingerprint_float16")
    return any(each in named for each in (backbone.fingerprint, backbone.float16) if each)


def rounded_at_load(name: str, runtime: registry.Runtime, trainable: bool) -> bool:
    """Whether a parameter of that name is kept in bfloat16 although activations are float32."""
    return runtime.mixed and not trainable and name in MATMUL_WEIGHTS


def _runtime(
    config: registry.Config, compute: _Compute, name: str, mesh: Mesh | None
) -> registry.Runtime:
    """The runtime of a model; UserError for a choice that its family does not have."""
    runtime = registry.Runtime(
        dtype=compute.dtype, unroll=bool(compute.unroll), remat=compute.remat
    )
    if isinstance(config, DecoderConfig):
        if compute.flash:
            raise UserError(
                f"model.flash is on, and {name} is decoder-only; flash kernels are there for the "
                "encoder of a T5, leave the key out."
            )
        if compute.dropout:
            raise UserError(
                f"model.dropout is {compute.dropout}, and {name} is decoder-only: such models have "
                "none, set it to 0"
            )
        return replace(runtime, attention=compute.attention)
    if isinstance(config, EncoderConfig):
        _check_encoder(compute, name)
        return runtime
    kernel = flash_attention.kernel(compute.flash, runtime.dtype, mesh)
    if compute.attention != "causal":
        raise UserError(
            f"model.attention is {compute.attention!r}, and {name} has an encoder, which sees all "
            "of its input; leave the key out"
        )
    per_example = parallel.supports_per_example_attention(mesh)
    return replace(
        runtime, per_example_attention=per_example, flash=kernel, dropout=compute.dropout
    )


def _check_encoder(compute: _Compute, name: str) -> None:
    """Raise UserError for what an encoder with a mask does not have."""
    for key, value, allowed in (
        ("flash", compute.flash, False),
        ("dropout", compute.dropout, 0.0),
        ("attention", compute.attention, "causal"),
    ):
        if value != allowed:
            raise UserError(
                f"model.{key} is {value!r}, and {name} is an encoder with a mask, which has no "
                "such choice here; leave the key out"
            )


def _check_quantization(kind: str, trainable: bool) -> None:
    if kind not in BITS:
        raise UserError(f"quantization {kind!r} is not supported, use one of {', '.join(BITS)}")
    if trainable:
        raise UserError(
            f"model.quantization is {kind!r}, and the weights are to be trained; leave the key out"
        )
    check_installed()


def _check_mesh(mesh: Mesh, model: registry.FamilyModel, checkpoint: Checkpoint, name: str) -> None:
    """Raise UserError if a parameter cannot be divided over the mesh."""
    axes, sizes = model.logical_axes(), axis_sizes(model.config)
    for leaf in checkpoint.leaves:
        parallel.check_divides(mesh, leaf_at(axes, leaf.path), _shape_of(leaf, sizes), name)


def _load_params(
    model: registry.FamilyModel, checkpoint: Checkpoint, storage: _Storage
) -> tuple[Params, dict[tuple[str, ...], Sample]]:
    """The weights, read one after another, and samples of those that are quantized."""
    logical_axes, sizes = model.logical_axes(), axis_sizes(model.config)
    place = None if storage.mesh is None else parallel.parameter_sharding(storage.mesh)
    params: Params = {}
    samples: dict[tuple[str, ...], Sample] = {}
    for leaf in checkpoint.leaves:
        axes = leaf_at(logical_axes, leaf.path)
        *parents, last = leaf.path
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        kind = storage.quantization if last in MATMUL_WEIGHTS else None
        rounded = kind is None and rounded_at_load(last, model.runtime, storage.trainable)
        dtype = DTYPES["bfloat16" if rounded else model.runtime.activations]
        sharding = None if place is None else place(axes)
        array = _load_leaf(leaf, checkpoint.tensors, sizes, dtype, sharding)
        if kind is not None:
            samples[leaf.path] = sample([array])[0]
            array = _quantizer(array.shape, axes, kind, storage.mesh)(array)
        node[last] = array
    return params, samples


@functools.lru_cache(maxsize=64)
def _quantizer(
    shape: tuple[int, ...], axes: tuple[str, ...], kind: str, mesh: Mesh | None
) -> Callable[[Float[Array, "..."]], PyTree]:
    """``quantize``, compiled once for all leaves of that shape."""
    parts = 1 if mesh is None else mesh.shape["fsdp"]
    quantise = functools.partial(quantize, axes=axes, kind=kind, parts=parts)
    if mesh is None:
        return jax.jit(quantise)
    place = lambda x: parallel.part_sharding(mesh, x.shape, axes)
    stored = jax.eval_shape(quantise, jax.ShapeDtypeStruct(shape, np.float32))
    return jax.jit(quantise, out_shardings=jax.tree.map(place, stored))


def _shape_of(leaf: Leaf, sizes: Mapping[str, int]) -> tuple[int, ...]:
    here = layer_sizes(leaf, sizes)
    return tuple(here[letter] for letter in leaf.axes)


def _load_leaf(
    leaf: Leaf,
    tensors: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    dtype: np.dtype,
    sharding: jax.sharding.NamedSharding | None,
) -> Float[Array, "..."]:
    """One leaf of the tree, on its devices."""
    shape = _shape_of(leaf, sizes)

    def read(index: Index) -> np.ndarray:
        bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
        with damage_as_user_error("/".join(leaf.path), "cannot be read from the checkpoint"):
            out = _aligned([stop - start for start, stop in bounds], dtype)
            fill(leaf, tensors, sizes, index, out)
        return out

    # A device may adopt the array instead of copying it, because nobody else knows it. Several
    # may: the devices of a CPU share one.
    if sharding is None:
        return jax.device_put(read(tuple(slice(0, n) for n in shape)), may_alias=True)
    kept = functools.cache(lambda bounds: read(tuple(slice(*b) for b in bounds)))
    parts = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        index = index or ()  # None only for scalars, and there are none
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        parts.append(jax.device_put(kept(bounds), device, may_alias=True))
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _aligned(shape: list[int], dtype: np.dtype, to: int = 64) -> np.ndarray:
    """An empty array that starts at a multiple of ``to`` bytes.

    XLA's CPU backend then uses it in place.
    """
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + to, np.uint8)
    start = -raw.ctypes.data % to
    return raw[start : start + size].view(dtype).reshape(shape)
