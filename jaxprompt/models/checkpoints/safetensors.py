"""safetensors files, read lazily and written tensor by tensor.

A file has eight bytes with the length of the header, a JSON header and the raw values. The
library's safe_open (0.8.0, which reads bfloat16 and slices) is not used, because it copies a tensor
instead of mapping it, accepts a tensor that is named twice, raises AttributeError for 8-bit floats,
and names neither the file nor the tensor in its errors.
Source: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from jaxprompt.config.errors import UserError
from jaxprompt.models.checkpoints.leaf import DTYPES, MOST_AXES, Tensor, mapped
from jaxprompt.runtime.files import write_whole
from jaxprompt.runtime.json_file import JsonObject, parse_json

_CODES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NAMES = {name: code for code, name in _CODES.items()} | {"int8": "I8"}
_OTHER = {
    f"{c}{bits}": f"{n}{bits}" for c, n in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}
_MAX_HEADER = 100 << 20  # the library's own limit


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, only the header is read; UserError if the file is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise _damaged(path, f"its header cannot be read from {size} bytes")
        try:
            header = parse_json(file.read(length), "its header")
        except UserError as error:
            raise _damaged(path, str(error)) from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + length
    return {name: _tensor(path, name, entry, start, size) for name, entry in header.items()}


def _tensor(path: Path, name: str, entry: object, start: int, size: int) -> Tensor:
    """One unread tensor; UserError if its entry in the header is damaged."""
    try:
        if not isinstance(entry, dict):
            raise TypeError(entry)
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        if not isinstance(code, str) or len(shape) > MOST_AXES:
            raise TypeError(code)
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise TypeError(numbers)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the header's entry for {name[:200]} is malformed") from error
    if code in _CODES:
        dtype = DTYPES[_CODES[code]]
    elif code in _OTHER or code == "BOOL":
        dtype = np.dtype(_OTHER.get(code, "bool"))
    else:
        raise UserError(
            f"{path}: tensor {name[:200]} has dtype {code[:40]}; weights must be one of "
            f"{', '.join(_CODES)} (quantised checkpoints cannot be loaded)"
        )
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _damaged(path, f"tensor {name[:200]} of shape {shape} has {end - begin} bytes")
    if start + end > size:
        raise _damaged(path, f"tensor {name[:200]} ends at byte {start + end} of {size}")
    return Tensor(name, str(path), shape, dtype, mapped(path, start + begin, dtype, shape))


def _damaged(path: Path, detail: str) -> UserError:
    return UserError(f"{path} is truncated or not a safetensors file: {detail}; download it again")


class Output(NamedTuple):
    """A tensor to be written; ``values`` is called when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    values: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, outputs: Iterable[Output]) -> None:
    """Write one file, one tensor in memory at a time. It gets its name when it is complete."""
    outputs = list(outputs)
    header: JsonObject = {"__metadata__": {"format": "pt"}}
    end = 0
    for out in outputs:
        begin, end = end, end + out.bytes
        code = _NAMES[out.dtype.name]
        header[out.name] = {"dtype": code, "shape": out.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start aligned

    def write(file: IO[bytes]) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for out in outputs:
            file.write(np.ascontiguousarray(out.values()).view(np.uint8).data)

    write_whole(path, write)


def write_sharded(
    directory: Path, outputs: Sequence[Output], *, max_bytes: int, stem: str = "model"
) -> list[str]:
    """Write ``outputs`` as one file, or as several of at most ``max_bytes`` with an index.

    A tensor larger than ``max_bytes`` gets a file of its own. Returns the names of the files.
    """
    shards: list[list[Output]] = [[]]
    for out in outputs:
        if shards[-1] and sum(o.bytes for o in shards[-1]) + out.bytes > max_bytes:
            shards.append([])
        shards[-1].append(out)
    if len(shards) == 1:
        write_safetensors(directory / f"{stem}.safetensors", outputs)
        return [f"{stem}.safetensors"]
    count = len(shards)
    files = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for name, shard in zip(files, shards, strict=True):
        write_safetensors(directory / name, shard)
    index = {
        "metadata": {"total_size": sum(out.bytes for out in outputs)},
        "weight_map": {
            out.name: name for name, shard in zip(files, shards, strict=True) for out in shard
        },
    }
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return files
