"""Real weights in and out: ``load_backbone``, ``save_hf`` and a backbone's fingerprint.

The work is done leaf by leaf: a stacked leaf [L, ...] is allocated once in the target dtype and
filled one tensor of the file at a time, so that a host never holds more than the final parameters
and the largest tensor. With a sharding, each device's slice alone is read.
"""

import functools
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from jaxprompt.config.errors import UserError
from jaxprompt.config.paths import expanded
from jaxprompt.models import precision, registry
from jaxprompt.models.checkpoints import hf_decoder, hf_t5, hub, t5x
from jaxprompt.models.checkpoints.gguf import read_gguf
from jaxprompt.models.checkpoints.int8 import quantised
from jaxprompt.models.checkpoints.leaf import (
    DTYPES,
    Index,
    Leaf,
    Tensor,
    check,
    check_depth,
    fill,
    layer_sizes,
)
from jaxprompt.models.checkpoints.metadata import told
from jaxprompt.models.checkpoints.safetensors import Output, write_sharded
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.ops.attention import flash_attention
from jaxprompt.models.ops.quantization import BITS, MATMUL_WEIGHTS, check_installed, quantize
from jaxprompt.models.t5.config import T5Config, released
from jaxprompt.runtime import parallel

Params = registry.Params
LOAD_DTYPES = ("float32", "bfloat16", "mixed")
_SAMPLES = 4096


class Backbone(NamedTuple):
    """A frozen model: nothing ever writes ``params``."""

    model: registry.FamilyModel
    params: Params
    source: str  # as the user named it
    fingerprint: str
    path: Path | str  # directory or GGUF file with the tokenizer, or the source where there is none
    mesh: Mesh | None = None  # that it is spread over
    float16: str = ""  # the fingerprint of a copy of this model in float16

    @property
    def config(self) -> registry.Config:
        """What the checkpoint says of the model."""
        return self.model.config


def load_backbone(
    name_or_path: str,
    *,
    dtype: str | None = "float32",
    mesh: Mesh | None = None,
    dropout: float = 0.0,
    unroll: bool | None = None,
    remat: bool = False,
    attention: str = "causal",
    config: str | Path | None = None,
    trainable: bool = False,
    quantization: str | None = None,
    flash: bool = False,
    weights: str | None = None,
) -> Backbone:
    """Load a Hugging Face directory or hub id, a T5X checkpoint, a GGUF file, "builtin", "smollm2".

    dtype: of parameters and computation, "float32", "bfloat16" or "mixed" (float32 but for the
    operands of matrix products, which are rounded to bfloat16); None: what suits the backend.
    mesh: the devices that it is spread over, see runtime/parallel.py; None is the default device.
    unroll: the loop over layers, which takes longer to compile and no less time to run on CPUs.
    attention: of a decoder-only model, "causal", "prompt" or "prefix" (models/decoder/config.py).
    config: a config.json to use instead of the source's own (a T5X checkpoint has none; its shapes
    are read as one).
    trainable: whether the weights will be trained, and are needed in full with "mixed" too; else
    those that are only ever operands are rounded here, once, and take half the memory.
    quantization: "int8", "int4" or "nf4": those operands in 8 or 4 bits, see ops/quantization.py.
    flash: a T5's encoder attends by an accelerator's kernel, see flash_attention.py.
    weights: the old name of ``quantization``.
    Raises UserError for an unknown name, a damaged file or tensors that do not fit the config.
    """
    if weights is not None:
        note = "load_backbone(weights=...) is now load_backbone(quantization=...); rename it"
        warnings.warn(note, DeprecationWarning, stacklevel=2)
        quantization = weights
    name, dtype = str(name_or_path), precision.resolve_dtype(dtype)
    if dtype not in LOAD_DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported, use one of {', '.join(LOAD_DTYPES)}")
    location = hub.resolve(name)
    own, tensors, leaves = _open(location, None if config is None else Path(expanded(config)))
    runtime = registry.Runtime(dtype=dtype, unroll=bool(unroll), remat=remat)
    runtime = _with_kernels(own, runtime, name, mesh, flash)
    model = registry.model_for(own, _with_choices(own, runtime, name, dropout, attention))
    if quantization is not None:
        _check_quantization(quantization, trainable)
    params, samples = _load_params(
        model, leaves, tensors, _Storing(name, mesh, trainable, quantization)
    )
    path = name if location.startswith("gs://") else Path(location)
    fingerprint, half = _fingerprints(params, samples)
    return Backbone(model, params, name, fingerprint, path, mesh, half)


class _Storing(NamedTuple):
    """In which form weights are kept, and on which devices."""

    name: str  # of the backbone, for errors
    mesh: Mesh | None
    trainable: bool
    quantization: str | None


def _load_params(
    model: registry.FamilyModel, leaves: Sequence[Leaf], tensors: Mapping[str, Tensor], to: _Storing
) -> tuple[Params, dict[tuple[str, ...], Any]]:
    """The weights, read one after another, and samples of those that are quantized."""
    axes, sizes = model.logical_axes(), _sizes(model.config)
    place = None if to.mesh is None else parallel.parameter_sharding(to.mesh)
    if to.mesh is not None:
        for leaf in leaves:
            shape = _shape_of(leaf, sizes)
            parallel.check_divides(to.mesh, _at(axes, leaf.path), shape, to.name)
    params: Params = {}
    samples = {}
    for leaf in leaves:
        rule = None if place is None else place(_at(axes, leaf.path))
        *parents, last = leaf.path
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        small = to.quantization is not None and last in MATMUL_WEIGHTS
        rounded = rounded_at_load(last, model.runtime, to.trainable) and not small
        dtype = "bfloat16" if rounded else model.runtime.activations
        array = _load_leaf(leaf, tensors, sizes, DTYPES[dtype], rule)
        if small:
            samples[leaf.path] = array.shape, _sample([array])[0]
            array = _small(array, _at(axes, leaf.path), str(to.quantization), to.mesh)
        node[last] = array
    return params, samples


def same_model(backbone: Backbone, recorded: Mapping[str, Any]) -> bool:
    """Whether a prompt's record of its backbone names this one, or one of them is its float16 copy.

    A copy in bfloat16 has the fingerprint of the model itself. One in float16 has not, as its
    values are rounded twice; so each side tells what a copy of its own would have.
    recorded: "fingerprint", and "fingerprint_float16" where the writer was not too old.
    """
    named = recorded.get("fingerprint"), recorded.get("fingerprint_float16")
    return any(each in named for each in (backbone.fingerprint, backbone.float16) if each)


def rounded_at_load(name: str, runtime: registry.Runtime, trainable: bool) -> bool:
    """Whether a parameter of that name is kept in bfloat16 although activations are float32."""
    return runtime.mixed and not trainable and name in MATMUL_WEIGHTS


def _check_quantization(kind: str, trainable: bool) -> None:
    if kind not in BITS:
        raise UserError(f"quantization {kind!r} is not supported, use one of {', '.join(BITS)}")
    if trainable:
        raise UserError(
            f"model.quantization is {kind!r}, and the weights are to be trained; leave the key out"
        )
    check_installed()


def _small(array: jax.Array, axes: tuple[str, ...], kind: str, mesh: Mesh | None) -> Any:
    return _quantizer(array.shape, axes, kind, mesh)(array)


@functools.lru_cache(maxsize=64)
def _quantizer(
    shape: tuple[int, ...], axes: tuple[str, ...], kind: str, mesh: Mesh | None
) -> Callable[[jax.Array], Any]:
    """``quantize``, compiled once for all leaves of that shape."""
    parts = 1 if mesh is None else mesh.shape["fsdp"]
    quantise = functools.partial(quantize, axes=axes, kind=kind, parts=parts)
    if mesh is None:
        return jax.jit(quantise)
    place = lambda x: parallel.part_sharding(mesh, x.shape, axes)
    stored = jax.eval_shape(quantise, jax.ShapeDtypeStruct(shape, np.float32))
    return jax.jit(quantise, out_shardings=jax.tree.map(place, stored))


def open_config(name: str) -> registry.Config:
    """The shape of a backbone, of which no weight is read; released T5 1.1 need not be there."""
    return released(name) or _open(hub.resolve(name), None)[0]


def _with_kernels(
    config: registry.Config, runtime: registry.Runtime, name: str, mesh: Mesh | None, flash: bool
) -> registry.Runtime:
    """The runtime with the kernels of attention that the family has on these devices."""
    if isinstance(config, T5Config):
        kernel = flash_attention.kernel(flash, runtime.dtype, mesh)
        per_example = parallel.whole_rows_on_cpu(mesh)
        return replace(runtime, per_example_attention=per_example, flash=kernel)
    if flash:
        raise UserError(
            f"model.flash is on, and {name} is decoder-only; flash kernels are there for the "
            "encoder of a T5, leave the key out."
        )
    return runtime


def _with_choices(
    config: registry.Config, runtime: registry.Runtime, name: str, dropout: float,
    attention: str,
) -> registry.Runtime:  # fmt: skip
    """The runtime with what only one of the families lets a user choose."""
    if isinstance(config, DecoderConfig):
        if dropout:
            raise UserError(
                f"model.dropout is {dropout}, and {name} is decoder-only: such models have none, "
                "set it to 0"
            )
        return replace(runtime, attention=attention)
    if attention != "causal":
        raise UserError(
            f"model.attention is {attention!r}, and {name} has an encoder, which sees all of its "
            "input; leave the key out"
        )
    return replace(runtime, dropout=dropout)


def _open(
    location: str, config_path: Path | None
) -> tuple[registry.Config, dict[str, Tensor], list[Leaf]]:
    """Config, unread tensors and the map between them, for whatever lies at ``location``."""
    with told(location, "cannot be read as a model"):
        config, tensors, leaves = _opened(location, config_path)
        check(leaves, tensors, _sizes(config))
    return config, tensors, leaves


def _opened(
    location: str, config_path: Path | None
) -> tuple[registry.Config, dict[str, Tensor], list[Leaf]]:
    if location.endswith(".gguf"):
        config, tensors = read_gguf(Path(location))
        check_depth(location, config.num_layers, tensors)
        return config, tensors, hf_decoder.leaves(config)
    if t5x.is_t5x(location):
        tensors = t5x.read_t5x(location)
        beside = None if location.startswith("gs://") else Path(location) / "config.json"
        if config_path is None and beside is not None and beside.is_file():
            config_path = beside
        if config_path is None:
            config = t5x.infer_config(location, tensors)
        else:
            tied = t5x.is_tied(tensors)
            hf_t5.check_head(config_path, tied=tied, head=t5x.HEAD)
            config = hf_t5.config_from_json(config_path, tied=tied)
        return config, tensors, t5x.leaves(config, tensors)
    directory = Path(location)
    config_path = config_path or directory / "config.json"
    if not config_path.is_file():
        raise UserError(f"{config_path} is missing; a backbone needs its config.json")
    raw, flax = hf_t5.open_checkpoint(directory)
    if hf_t5.read_json(config_path).get("model_type") in hf_decoder.MODEL_TYPES:
        tensors, tied = hf_decoder.tidy(raw)
        config = hf_decoder.config_from_json(config_path, tied=tied)
        check_depth(config_path, config.num_layers, tensors)
        hf_t5.check_head(config_path, tied="lm_head.weight" not in raw)
        return config, tensors, hf_decoder.leaves(config)
    tensors, tied = hf_t5.tidy(raw, flax)
    config = hf_t5.config_from_json(config_path, tied=tied)
    check_depth(config_path, max(config.num_encoder_layers, config.num_decoder_layers), tensors)
    head = "lm_head/kernel" if flax else "lm_head.weight"
    hf_t5.check_head(config_path, tied=head not in raw, head=head)  # a copy of the embedding is one
    leaves = hf_t5.leaves(config)
    return config, tensors, [hf_t5.flax_leaf(leaf) for leaf in leaves] if flax else leaves


def _sizes(config: registry.Config) -> dict[str, int]:
    """Sizes of the axis letters; depths under the names of their stacks."""
    if isinstance(config, DecoderConfig):
        return {
            "V": config.vocab_size,
            "D": config.d_model,
            "N": config.num_heads,
            "G": config.num_kv_heads,
            "H": config.head_dim,
            "F": config.d_ff,
            "layers": config.num_layers,
        }
    return {
        "V": config.vocab_size,
        "D": config.d_model,
        "N": config.num_heads,
        "H": config.head_dim,
        "F": config.d_ff,
        "R": config.buckets,
        "encoder": config.num_encoder_layers,
        "decoder": config.num_decoder_layers,
    }


def _at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _shape_of(leaf: Leaf, sizes: Mapping[str, int]) -> tuple[int, ...]:
    here = layer_sizes(leaf, sizes)
    return tuple(here[letter] for letter in leaf.axes)


def _load_leaf(
    leaf: Leaf,
    tensors: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    dtype: np.dtype,
    sharding: jax.sharding.NamedSharding | None,
) -> jax.Array:
    shape = _shape_of(leaf, sizes)

    def read(index: Index) -> np.ndarray:
        bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
        with told("/".join(leaf.path), "cannot be read from the checkpoint"):
            out = _aligned([stop - start for start, stop in bounds], dtype)
            fill(leaf, tensors, sizes, index, out)
        return out

    # a leaf that only this function knows may be adopted by a device instead of copied, and by
    # several: the devices of a CPU share one
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
    """An empty array whose start is aligned as XLA's CPU backend wants it to use it in place."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + to, np.uint8)
    start = -raw.ctypes.data % to
    return raw[start : start + size].view(dtype).reshape(shape)


def fingerprint(params: Params, samples: Mapping[tuple[str, ...], Any] | None = None) -> str:
    """16 hex digits that tell backbones apart, whatever file format and dtype they came from.

    SHA-256 over path, shape and at most 4096 evenly strided values of each leaf, rounded to
    bfloat16: constant work a leaf, also where leaves are sharded over devices.
    samples: shape and those values of leaves, by path, that are quantised by now.
    """
    return _fingerprints(params, samples)[0]


def _fingerprints(
    params: Params, samples: Mapping[tuple[str, ...], Any] | None = None
) -> tuple[str, str]:
    """``fingerprint``, and that of the same values after they have been rounded to float16."""
    digests = hashlib.sha256(), hashlib.sha256()
    known = samples or {}
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, lambda x: not isinstance(x, dict))
    paths = [tuple(str(key.key) for key in path) for path, _ in leaves]
    taken = iter(_sample([x for p, (_, x) in zip(paths, leaves, strict=True) if p not in known]))
    for path, (_, leaf) in zip(paths, leaves, strict=True):
        shape, sample = known[path] if path in known else (tuple(leaf.shape), next(taken))
        with np.errstate(over="ignore"):
            rounded = sample, sample.astype(np.float16)
        for digest, values in zip(digests, rounded, strict=True):
            digest.update(f"{'/'.join(path)} {tuple(shape)}\n".encode())
            bits = np.ascontiguousarray(values.astype(ml_dtypes.bfloat16)).view(np.uint16)
            digest.update(bits.astype("<u2").tobytes())
    own, half = (digest.hexdigest()[:16] for digest in digests)
    return own, half


def _sample(leaves: list[Any]) -> list[np.ndarray]:
    """At most ``_SAMPLES`` values of each leaf, to the bit, gathered where the leaf lives."""
    taken: list[Any] = [None] * len(leaves)
    remote = []
    for i, leaf in enumerate(leaves):
        if _on_host(leaf):
            taken[i] = np.asarray(leaf)[_strided(leaf.shape)]
        else:
            remote.append(i)
    if remote:
        gathered = _gather([leaves[i] for i in remote])
        for i, values in zip(remote, gathered, strict=True):
            taken[i] = np.asarray(values).view(leaves[i].dtype)
    return taken


def _on_host(leaf: Any) -> bool:
    """Whether NumPy can see the values without a copy of the leaf."""
    if not isinstance(leaf, jax.Array):
        return True
    return len(leaf.devices()) == 1 and next(iter(leaf.devices())).platform == "cpu"


def _strided(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    size = math.prod(shape)
    count = min(_SAMPLES, size)
    return np.unravel_index(np.arange(count, dtype=np.int64) * size // max(count, 1), shape)


def _gather(leaves: list[jax.Array]) -> list[jax.Array]:
    """Their bits as integers: devices that compute with the smallest numbers make 0 of them."""

    def take(leaves):
        kinds = {2: jnp.uint16, 4: jnp.uint32}
        bits = [jax.lax.bitcast_convert_type(x, kinds[x.dtype.itemsize]) for x in leaves]
        return [each[_strided(each.shape)] for each in bits]

    mesh = getattr(leaves[0].sharding, "mesh", None)
    if mesh is None:
        return jax.jit(take)(leaves)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(take, out_shardings=everywhere)(leaves)


def save_hf(
    path: str | Path,
    config: registry.Config,
    params: Params,
    *,
    int8: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    dropout: float = 0.0,
) -> None:
    """Write config.json and safetensors that transformers reads, in the dtype of ``params``.

    Above ``max_shard_bytes`` the weights are split over several files with an index. The tokenizer
    is not part of the parameters: copy its files beside them. An mT5 is saved as the T5 1.1 that it
    is; transformers 5 scales the output of every umT5, there its logits are d_model**-0.5 of ours.
    With ``int8`` matrices are stored as in ``int8.py``, which transformers does not read.
    dropout: the rate that a T5's config.json names, for those who train it further.
    """
    directory = Path(expanded(path))
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(config, DecoderConfig):
        leaves, describe = hf_decoder.leaves(config), partial(hf_decoder.config_to_json, config)
    else:
        leaves, describe = (
            hf_t5.leaves(config),
            partial(hf_t5.config_to_json, config, dropout=dropout),
        )
    outputs = [out for leaf in leaves for out in _outputs(leaf, config, params)]
    dtype = outputs[0].dtype.name
    if int8:
        outputs = [part for out in outputs for part in quantised(out)]
    write_sharded(directory, outputs, max_bytes=max_shard_bytes)
    (directory / "config.json").write_text(json.dumps(describe(dtype), indent=2) + "\n")


def _outputs(leaf: Leaf, config: registry.Config, params: Params) -> list[Output]:
    array = _at(params, leaf.path)
    sizes = layer_sizes(leaf, _sizes(config))
    layered = leaf.axes[0] == "L"
    axes = leaf.axes[1:] if layered else leaf.axes
    outputs = []
    for layer, piece in enumerate(leaf.pieces):
        groups = piece.axes.split()
        shape = tuple(math.prod(sizes[a] for a in group) for group in groups)
        order = [axes.index(a) for a in "".join(groups)]
        values = partial(_values, array, layer if layered else None, order, shape)
        outputs.append(Output(piece.name, shape, np.dtype(array.dtype), values))
    return outputs


def _values(array: Any, layer: int | None, order: list[int], shape: tuple[int, ...]) -> np.ndarray:
    part = np.asarray(array if layer is None else array[layer])
    return part.transpose(order).reshape(shape)
