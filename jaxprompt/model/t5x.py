"""T5X version-3 checkpoints: a msgpack index ``checkpoint`` beside one zarr array a large tensor.

Local folders and gs:// are read through tensorstore alike. Small tensors stand in the index itself.
Names, shapes and the scanned variants (layers stacked on axis 1) follow t5x, flaxformer and the
scalable T5 of umT5; a checkpoint carries no config, so its shapes are read as one.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np

from jaxprompt.config import UserError
from jaxprompt.model.t5_config import T5Config
from jaxprompt.model.tensors import DTYPES, Index, Leaf, Piece, Tensor

_STACKS = ("encoder", "decoder")
_HEAD = "decoder/logits_dense/kernel"
_SCANNED = "encoder/encoder/mlp/wo/kernel"


class _Array(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    values: bytes


def is_t5x(location: str) -> bool:
    """Whether a path or URL looks like a T5X checkpoint rather than a Hugging Face directory."""
    if location.startswith("gs://"):
        return True
    path = Path(location)
    return (path / "checkpoint").is_file() and not (path / "model.safetensors").exists()


def read_t5x(location: str) -> dict[str, Tensor]:
    """All tensors of the model (not of its optimizer), by the path below ``target``.

    location: a folder or gs://bucket/path that holds the file ``checkpoint``.
    """
    import tensorstore as ts  # slow to import, and only these checkpoints need it

    store = _kvstore(location)
    try:
        raw = ts.KvStore.open(store).result().read("checkpoint").result()
    except Exception as error:  # tensorstore raises ValueError, RuntimeError and others by cause
        raise UserError(f"{location} cannot be read: {str(error).splitlines()[0][:300]}") from error
    if raw.state != "value":
        raise UserError(f"{location} holds no file named checkpoint, so it is no T5X checkpoint")
    index = _unpack_index(location, raw.value)
    return {name: _tensor(location, store, name, leaf) for name, leaf in _flatten(index)}


def _kvstore(location: str) -> dict[str, str]:
    if not location.startswith("gs://"):
        return {"driver": "file", "path": str(Path(location).absolute()) + "/"}
    bucket, _, path = location.removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": path.rstrip("/") + "/"}


def _unpack_index(location: str, raw: bytes) -> dict[str, Any]:
    def extension(code: int, data: bytes) -> _Array | None:
        if code != 1:
            return None  # scalars and complex numbers, which only optimizer states hold
        shape, dtype, values = msgpack.unpackb(data)
        return _Array(tuple(shape), dtype, values)

    try:
        index = msgpack.unpackb(raw, ext_hook=extension, strict_map_key=False)
    except (
        Exception
    ) as error:  # msgpack has its own family of errors, and damaged input raises others
        raise UserError(f"{location}/checkpoint is truncated or not a T5X index") from error
    if not isinstance(index, dict) or index.get("version") != 3:
        version = index.get("version") if isinstance(index, dict) else None
        raise UserError(f"{location}/checkpoint has T5X version {version!r}, only 3 can be read")
    try:
        target = index["optimizer"]["target"]
    except (KeyError, TypeError):
        target = None
    if not isinstance(target, dict):
        raise UserError(f"{location}/checkpoint has no optimizer/target, where the weights stand")
    return target


def _flatten(tree: Mapping[str, Any], path: str = ""):
    for key, value in tree.items():
        name = f"{path}/{key}" if path else str(key)
        if isinstance(value, dict) and "driver" not in value:
            yield from _flatten(value, name)
        else:
            yield name, value


def _tensor(location: str, store: Mapping[str, str], name: str, leaf: Any) -> Tensor:
    if isinstance(leaf, _Array):
        return _inline(location, name, leaf)
    kvstore = leaf.get("kvstore") if isinstance(leaf, dict) else None
    if not isinstance(kvstore, dict) or leaf.get("driver") != "zarr":
        raise UserError(f"{location}/checkpoint: {name} is neither an array nor a zarr reference")
    # writers before tensorstore 0.1.14 put the path beside the kvstore; bucket and driver are those
    # of the machine that wrote, the path is relative to the checkpoint
    folder = kvstore.get("path") or leaf.get("path") or ""
    if not re.fullmatch(r"[\w.\-]+/?", folder) or folder.strip("./") == "":
        raise UserError(f"{location}/checkpoint: {name} lies at {folder!r}, outside the checkpoint")
    return _zarr(location, store, name, folder.rstrip("/"))


def _inline(location: str, name: str, leaf: _Array) -> Tensor:
    try:
        values = np.frombuffer(leaf.values, DTYPES[leaf.dtype]).reshape(leaf.shape)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{location}/checkpoint: {name} of dtype {leaf.dtype}, shape {leaf.shape} is damaged "
            f"or not one of {', '.join(DTYPES)}"
        ) from error
    return Tensor(name, f"{location}/checkpoint", values.shape, values.dtype, values.__getitem__)


def _zarr(location: str, store: Mapping[str, str], name: str, folder: str) -> Tensor:
    import tensorstore as ts

    spec = {"driver": "zarr", "kvstore": {**store, "path": f"{store['path']}{folder}/"}}
    file = f"{location}/{folder}"

    def failed(error: Exception) -> UserError:
        return UserError(f"{file} cannot be read: {str(error).splitlines()[0][:300]}")

    try:
        array = ts.open(spec, open=True, read=True).result()
    except Exception as error:
        raise failed(error) from error

    def read(index: Index) -> np.ndarray:
        try:
            return array[index].read().result()
        except Exception as error:
            raise failed(error) from error

    return Tensor(name, file, tuple(array.shape), np.dtype(array.dtype.numpy_dtype), read)


def infer_config(location: str, tensors: Mapping[str, Tensor]) -> T5Config:
    """The config that a checkpoint's shapes imply; the number of heads is the relative bias's.

    What shapes cannot tell is taken from the family: gated means tanh GELU, else ReLU; a head tied
    to the embedding means a scaled output; distances reach 128.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(f"{location} has no tensor {name}, so it is no T5 that can be read")
        if len(tensors[name].shape) != rank:
            raise UserError(f"{location}: {name} has shape {tensors[name].shape}, not {rank} axes")
        return tensors[name].shape

    rows, d_model = shape("token_embedder/embedding", 2)
    if _SCANNED in tensors:
        d_ff, encoder_layers, _ = shape(_SCANNED, 3)
        decoder_layers = shape("decoder/decoder/mlp/wo/kernel", 3)[1]
        heads, _, buckets = shape("encoder/encoder/relpos_bias/rel_embedding", 3)
        first = "encoder/encoder"
    else:
        encoder_layers, decoder_layers = (_depth(tensors, stack) for stack in _STACKS)
        heads, buckets = shape("encoder/relpos_bias/rel_embedding", 2)
        first = "encoder/layers_0"
        d_ff = shape(f"{first}/mlp/wo/kernel", 2)[0]
    name = f"{first}/attention/query/kernel"
    if name not in tensors:
        raise UserError(f"{location} has no tensor {name}, so it is no T5 that can be read")
    width = tensors[name].shape
    separate = len(width) == (4 if _SCANNED in tensors else 3)
    gated = f"{first}/mlp/wi_0/kernel" in tensors
    return T5Config(
        vocab_size=rows,
        d_model=d_model,
        num_heads=heads,
        head_dim=width[-1] if separate else width[-1] // heads,
        d_ff=d_ff,
        num_encoder_layers=encoder_layers,
        num_decoder_layers=decoder_layers,
        gated=gated,
        activation="gelu" if gated else "relu",
        tied=is_tied(tensors),
        scale_output=is_tied(tensors),
        per_layer_bias=_SCANNED in tensors,
        buckets=buckets,
    )


def is_tied(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the checkpoint has no head of its own."""
    return _HEAD not in tensors


def _depth(tensors: Mapping[str, Tensor], stack: str) -> int:
    found = (re.match(rf"{stack}/layers_(\d+)/", name) for name in tensors)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def leaves(config: T5Config, tensors: Mapping[str, Tensor]) -> list[Leaf]:
    """Every leaf of the parameter tree with the T5X names that fill it."""
    embedding = Piece("token_embedder/embedding", "V D")
    found = [Leaf(("token_embedder", "embedding"), "VD", (embedding,))]
    for stack, depth in zip(
        _STACKS, (config.num_encoder_layers, config.num_decoder_layers), strict=True
    ):
        found += _stack(stack, depth, config, tensors)
    if not config.tied:
        found.append(Leaf(("head",), "DV", (Piece(_HEAD, "D V"),)))
    return found


def _stack(stack: str, depth: int, config: T5Config, tensors: Mapping[str, Tensor]) -> list[Leaf]:
    scanned = f"{stack}/{stack}/mlp/wo/kernel" in tensors
    found: list[Leaf] = []

    def layers(path: str, axes: str, name: str, file_axes: str) -> None:
        """``file_axes``: of one layer, all apart; "N H" is merged where the file merges it."""
        names = [f"{stack}/{stack}/{name}"] if scanned else []
        names = names or [f"{stack}/layers_{i}/{name}" for i in range(depth)]
        if scanned:  # layers are axis 1
            file_axes = file_axes[0] + " L" + file_axes[1:]
        rank = len(tensors[names[0]].shape) if names[0] in tensors else None
        if rank != len(file_axes.split()):
            # N H merged, or in a scanned out kernel (N L H D) N and H merged before L
            file_axes = file_axes.replace("N L H", "NH L").replace("N H", "NH")
        pieces = tuple(Piece(each, file_axes) for each in names)
        found.append(Leaf((stack, "layers", *path.split("/")), "L" + axes, pieces))

    def attention(ours: str, theirs: str, norm: str) -> None:
        layers(f"{ours}_norm/scale", "D", f"{norm}_layer_norm/scale", "D")
        for name in ("query", "key", "value"):
            layers(f"{ours}/{name}", "DNH", f"{theirs}/{name}/kernel", "D N H")
        layers(f"{ours}/out", "NHD", f"{theirs}/out/kernel", "N H D")

    if stack == "encoder":
        attention("attention", "attention", "pre_attention")
    else:
        attention("self_attention", "self_attention", "pre_self_attention")
        attention("cross_attention", "encoder_decoder_attention", "pre_cross_attention")
    layers("mlp_norm/scale", "D", "pre_mlp_layer_norm/scale", "D")
    for name in ("wi_0", "wi_1") if config.gated else ("wi",):
        layers(f"mlp/{name}", "DF", f"mlp/{name}/kernel", "D F")
    layers("mlp/wo", "FD", "mlp/wo/kernel", "F D")
    if config.per_layer_bias:
        layers("relative_bias", "RN", "relpos_bias/rel_embedding", "N R")
    else:
        piece = Piece(f"{stack}/relpos_bias/rel_embedding", "N R")
        found.append(Leaf((stack, "relative_bias"), "RN", (piece,)))
    norm = Piece(f"{stack}/{stack}_norm/scale", "D")
    return [*found, Leaf((stack, "final_norm", "scale"), "D", (norm,))]
