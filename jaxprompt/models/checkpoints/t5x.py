"""T5X checkpoints of version 3: a msgpack index ``checkpoint`` beside one zarr array a tensor.

Small tensors are in the index itself. tensorstore reads local folders and gs:// alike. Names,
shapes and the scanned variants (layers stacked on axis 1) follow t5x, flaxformer and the scalable
T5 of umT5. A checkpoint has no config, so its config is inferred from its shapes.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgpack
import numpy as np

from jaxprompt.config.errors import UserError, shown
from jaxprompt.models.checkpoints.leaf import (
    DTYPES,
    MOST_AXES,
    Index,
    Leaf,
    Piece,
    Tensor,
    check_depth,
    each_layer,
    map_leaves,
)
from jaxprompt.models.checkpoints.t5_tree import depths, tree_axes
from jaxprompt.models.t5.config import T5Config
from jaxprompt.runtime.json_file import JsonObject, parse_json

_STACKS = ("encoder", "decoder")
HEAD = "decoder/logits_dense/kernel"
_SCANNED = "encoder/encoder/mlp/wo/kernel"


class _Array(NamedTuple):
    """A small tensor in the index."""

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
    """All tensors of the model (not of its optimizer), by their path below ``target``.

    Args:
        location: a folder or gs://bucket/path that holds the file ``checkpoint``.

    Raises:
        UserError: the folder cannot be read, or its index is damaged.
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


def _unpack_index(location: str, raw: bytes) -> JsonObject:
    """The tree below ``optimizer/target``: arrays, and references to zarr arrays."""

    def extension(code: int, data: bytes) -> _Array | None:
        if code != 1:
            return None  # scalars and complex numbers, which only optimizer states hold
        shape, dtype, values = msgpack.unpackb(data)
        if not all(type(n) is int and n >= 0 for n in shape) or len(shape) > MOST_AXES:
            raise ValueError(shape)
        return _Array(tuple(shape), dtype, values)

    try:
        index = msgpack.unpackb(raw, ext_hook=extension, strict_map_key=False)
    except Exception as error:  # msgpack has its own errors, and damage raises others
        raise UserError(f"{location}/checkpoint is truncated or not a T5X index") from error
    if not isinstance(index, dict) or index.get("version") != 3:
        version = index.get("version") if isinstance(index, dict) else None
        raise UserError(
            f"{location}/checkpoint has T5X version {shown(version)}, only 3 can be read"
        )
    try:
        target = index["optimizer"]["target"]
    except (KeyError, TypeError):
        target = None
    if not isinstance(target, dict):
        raise UserError(f"{location}/checkpoint has no optimizer/target, where the weights stand")
    return target


def _flatten(tree: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of the index with their paths; a reference to a zarr array is a leaf."""
    for key, value in tree.items():
        name = f"{path}/{key}" if path else str(key)
        if isinstance(value, dict) and "driver" not in value:
            yield from _flatten(value, name)
        else:
            yield name, value


def _tensor(location: str, store: Mapping[str, str], name: str, leaf: object) -> Tensor:
    """One unread tensor; UserError if its entry in the index is damaged."""
    if isinstance(leaf, _Array):
        return _inline(location, name, leaf)
    entry: JsonObject = leaf if isinstance(leaf, dict) else {}
    kvstore = entry.get("kvstore")
    if not isinstance(kvstore, dict) or entry.get("driver") != "zarr":
        raise UserError(f"{location}/checkpoint: {name} is neither an array nor a zarr reference")
    # Writers before tensorstore 0.1.14 put the path beside the kvstore. Bucket and driver name the
    # machine that wrote the checkpoint, and the path is relative to the checkpoint.
    folder = kvstore.get("path") or entry.get("path") or ""
    inside = isinstance(folder, str) and re.fullmatch(r"[\w.\-]+/?", folder)
    if not isinstance(folder, str) or not inside or folder.strip("./") == "":
        raise UserError(
            f"{location}/checkpoint: {name} lies at {shown(folder)}, outside the checkpoint"
        )
    tensor = _zarr(location, store, name, folder.rstrip("/"))
    metadata = entry.get("metadata")
    declared = metadata.get("shape") if isinstance(metadata, dict) else None
    if isinstance(declared, list | tuple) and tuple(declared) != tensor.shape:
        raise UserError(
            f"{location}/checkpoint: {name} has shape {shown(tuple(declared))}, and "
            f"{tensor.file} has {tensor.shape}; the checkpoint is damaged, download it again"
        )
    return tensor


def _inline(location: str, name: str, leaf: _Array) -> Tensor:
    """A tensor whose values are in the index."""
    try:
        values = np.frombuffer(leaf.values, DTYPES[leaf.dtype]).reshape(leaf.shape)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise UserError(
            f"{location}/checkpoint: {name} of dtype {shown(leaf.dtype)}, shape {leaf.shape} is "
            f"damaged or not one of {', '.join(DTYPES)}"
        ) from error
    return Tensor(name, f"{location}/checkpoint", values.shape, values.dtype, values.__getitem__)


def _zarr(location: str, store: Mapping[str, str], name: str, folder: str) -> Tensor:
    """A tensor whose values are in a zarr array beside the index."""
    import tensorstore as ts

    kvstore = {**store, "path": f"{store['path']}{folder}/"}
    # a missing chunk is an error here, not zeros as in zarr
    spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
    file = f"{location}/{folder}"

    def failed(error: Exception) -> UserError:
        return UserError(f"{file} cannot be read: {str(error).splitlines()[0][:300]}")

    try:
        described = ts.KvStore.open(kvstore).result().read(".zarray").result()
        if described.state == "value":  # else opening says what is missing
            _check_chunks(file, described.value)
        array = ts.open(spec, open=True, read=True).result()
    except UserError:
        raise
    except Exception as error:
        raise failed(error) from error

    def read(index: Index) -> np.ndarray:
        try:
            return array[index].read().result()
        except Exception as error:
            raise failed(error) from error

    return Tensor(name, file, tuple(array.shape), np.dtype(array.dtype.numpy_dtype), read)


_SMALL_CHUNK = 64 << 20  # bytes


def _check_chunks(file: str, described: bytes) -> None:
    """Raise UserError for a .zarray with which tensorstore could exhaust the memory.

    tensorstore allocates a whole chunk of the declared size before it looks at the stored bytes,
    and ends the process if there is not enough memory. So a chunk may not be larger than the array,
    unless it is small.
    """
    raw = parse_json(described, f"{file}/.zarray")
    if not isinstance(raw, dict):
        raise UserError(f"{file}/.zarray holds no JSON object")
    shape, chunks = (_sizes(file, raw, key) for key in ("shape", "chunks"))
    a_chunk, whole = (math.prod(sizes) * 8 for sizes in (chunks, shape))
    if len(chunks) != len(shape) or a_chunk > max(whole, _SMALL_CHUNK):
        raise UserError(
            f"{file}/.zarray: chunks of {shown(tuple(chunks))} do not suit an array of shape "
            f"{shown(tuple(shape))}; the checkpoint is damaged, download it again"
        )
    if Path(file).is_dir():
        _check_stored(Path(file), shape, chunks, str(raw.get("dimension_separator") or "."))


def _sizes(file: str, raw: Mapping[str, object], key: str) -> list[int]:
    """A list of whole numbers above 0 from a .zarray."""
    sizes = raw.get(key)
    if (
        not isinstance(sizes, list)
        or not 1 <= len(sizes) <= MOST_AXES
        or not all(type(n) is int and 1 <= n < 2**62 for n in sizes)
    ):
        raise UserError(f"{file}/.zarray: {key} is {shown(sizes)}, expected whole numbers above 0")
    return sizes


def _check_stored(folder: Path, shape: list[int], chunks: list[int], separator: str) -> None:
    """Raise UserError if the files of a local array are too small for the declared values."""
    counts = [-(-n // c) for n, c in zip(shape, chunks, strict=True)]
    last = folder / separator.join(str(n - 1) for n in counts)
    present = [p for p in (folder / separator.join("0" for _ in counts), last) if p.is_file()]
    if len(present) < 2:
        raise UserError(f"{last} is missing; the checkpoint is incomplete, download it again")
    # values in full precision hardly compress; a thousandth of their size is a bomb
    if math.prod(chunks) > max(1000 * max(p.stat().st_size for p in present), _SMALL_CHUNK):
        raise UserError(
            f"{last} has {last.stat().st_size} bytes for a chunk of {shown(tuple(chunks))} values; "
            "the checkpoint is damaged, download it again"
        )


def infer_config(location: str, tensors: Mapping[str, Tensor]) -> T5Config:
    """The config that a checkpoint's shapes imply. The relative bias has the number of heads.

    Shapes do not say everything, so the rest is as in the family: a gated MLP uses tanh GELU and
    another one ReLU, a head that is the embedding means a scaled output, and distances reach 128.
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
    if min(rows, d_model, d_ff, heads, encoder_layers, decoder_layers) < 1 or buckets < 4:
        raise UserError(
            f"{location} has the shapes of no T5: {rows} words, width {d_model} and {d_ff}, "
            f"{heads} heads, {buckets} buckets, {encoder_layers} and {decoder_layers} layers"
        )
    gated = f"{first}/mlp/wi_0/kernel" in tensors
    return T5Config(
        vocab_size=rows,
        d_model=d_model,
        num_heads=heads,
        head_dim=_head_dim(location, tensors, f"{first}/attention/query/kernel", heads),
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


def _head_dim(location: str, tensors: Mapping[str, Tensor], name: str, heads: int) -> int:
    """H, from the shape of the query's kernel: [D, N, H], or N and H merged."""
    if name not in tensors:
        raise UserError(f"{location} has no tensor {name}, so it is no T5 that can be read")
    shape, merged = tensors[name].shape, 3 if _SCANNED in tensors else 2
    if len(shape) == merged + 1 and shape[-1]:
        return shape[-1]
    if len(shape) != merged or not shape[-1] or shape[-1] % heads:
        raise UserError(f"{location}: {name} of shape {shape} does not suit {heads} heads")
    return shape[-1] // heads


def is_tied(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the checkpoint has no head of its own."""
    return HEAD not in tensors


def _depth(tensors: Mapping[str, Tensor], stack: str) -> int:
    """The number of layers of a stack, from the names of its tensors."""
    matches = (re.match(rf"{stack}/layers_(\d{{1,9}})/", name) for name in tensors)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


# axes of a layer's kernels in the file
_KERNELS = {
    **dict.fromkeys(("query", "key", "value"), "D N H"),
    "out": "N H D",
    **dict.fromkeys(("wi", "wi_0", "wi_1"), "D F"),
    "wo": "F D",
}


def leaves(config: T5Config, tensors: Mapping[str, Tensor]) -> list[Leaf]:
    """Every leaf of the parameter tree with the T5X names that fill it."""
    for stack, layers in depths(config).items():
        if not _is_scanned(stack, tensors):
            file = next((tensor.file for tensor in tensors.values()), stack)
            check_depth(file, layers, tensors)
    return map_leaves(tree_axes(config), lambda path: _pieces(path, config, tensors))


def _is_scanned(stack: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the layers of a stack are stacked in the file, along axis 1."""
    return f"{stack}/{stack}/mlp/wo/kernel" in tensors


def _pieces(path: str, config: T5Config, tensors: Mapping[str, Tensor]) -> list[Piece]:
    """The tensors of the leaf at ``path``."""
    if path == "token_embedder/embedding":
        return [Piece("token_embedder/embedding", "V D")]
    if path == "head":
        return [Piece(HEAD, "D V")]
    stack, *inside = path.split("/")
    if inside[0] == "final_norm":
        return [Piece(f"{stack}/{stack}_norm/scale", "D")]
    if inside[0] == "relative_bias":  # one that the layers share
        return [Piece(f"{stack}/relpos_bias/rel_embedding", "N R")]
    name, axes = _in_layer(*inside[1:])
    if _is_scanned(stack, tensors):
        name, axes = f"{stack}/{stack}/{name}", f"{axes[0]} L{axes[1:]}"
        return [Piece(name, _merged(axes, tensors.get(name)))]
    name = f"{stack}/layers_{{}}/{name}"
    return each_layer(depths(config)[stack], name, _merged(axes, tensors.get(name.format(0))))


def _in_layer(part: str, weight: str = "") -> tuple[str, str]:
    """Name below the layer, and axes, of one weight of a layer."""
    if part == "relative_bias":
        return "relpos_bias/rel_embedding", "N R"
    if part.endswith("_norm"):
        return f"pre_{part.removesuffix('_norm')}_layer_norm/scale", "D"
    module = "encoder_decoder_attention" if part == "cross_attention" else part
    return f"{module}/{weight}/kernel", _KERNELS[weight]


def _merged(axes: str, tensor: Tensor | None) -> str:
    """``axes`` with heads and their numbers as one axis, where the file has merged them."""
    if tensor is not None and len(tensor.shape) == len(axes.split()):
        return axes
    # in a scanned out kernel (N L H D) N and H are merged before L
    return axes.replace("N L H", "NH L").replace("N H", "NH")
