"""``flax_model.msgpack`` read lazily: a walk over the file notes where each array's bytes lie.

The file consists of nested maps. An array is of extension type 1, and its payload is msgpack again:
shape, name of the dtype and raw bytes (flax.serialization). The walk jumps over the bytes, so it
reads a few kilobytes of a checkpoint of any size. flax.serialization would read all of it into
memory.
"""

import math
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jaxprompt.config.errors import UserError
from jaxprompt.models.checkpoints.leaf import DTYPES, MOST_AXES, Index, Tensor, mapped

_CHUNKED = "__msgpack_chunked_array__"  # flax cuts arrays of more than 2**30 bytes into flat chunks


class _Malformed(Exception):
    """The bytes are not what flax writes."""


def read_msgpack(path: Path) -> dict[str, Tensor]:
    """All arrays of one file by their paths, joined by "/"; UserError if the file is damaged."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            values: dict[str, Tensor | int | bool] = {}
            for name, value in _Walk(path, data).map_items((), 0):
                if name in values:
                    raise _Malformed(f"it holds {name[:100]} twice")
                values[name] = value
    except (_Malformed, IndexError, UnicodeDecodeError, ValueError) as error:
        detail = str(error) if isinstance(error, _Malformed) else "it ends too early"
        raise UserError(
            f"{path} is truncated or not a flax msgpack checkpoint: {detail}; download it again"
        ) from error
    return _join_chunks(path, values)


class _Walk:
    """A cursor over msgpack bytes, which understands only the forms that flax writes."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0

    def number(self, width: int) -> int:
        raw = self.data[self.at : self.at + width]
        if len(raw) < width:
            raise _Malformed("it ends too early")
        self.at += width
        return int.from_bytes(raw, "big")

    def skip(self, length: int) -> int:
        """Where the next ``length`` bytes start; the cursor moves behind them."""
        start = self.at
        if start + length > len(self.data):
            raise _Malformed(f"a value ends at byte {start + length} of {len(self.data)}")
        self.at += length
        return start

    def length(self, *kinds: tuple[int, int, int]) -> int | None:
        """The length that follows one of ``kinds`` (tag, mask, width); width 0: inside the tag."""
        tag = self.data[self.at]
        for value, mask, width in kinds:
            if tag & mask == value:
                self.at += 1
                return self.number(width) if width else tag & ~mask & 0xFF
        return None

    def text(self) -> str:
        size = self.length((0xA0, 0xE0, 0), (0xD9, 0xFF, 1), (0xDA, 0xFF, 2), (0xDB, 0xFF, 4))
        if size is None:
            raise _Malformed("a name is not a string")
        start = self.skip(size)
        return self.data[start : start + size].decode()

    def integer(self) -> int:
        kinds = (
            (0x00, 0x80, 0),
            (0xCC, 0xFF, 1),
            (0xCD, 0xFF, 2),
            (0xCE, 0xFF, 4),
            (0xCF, 0xFF, 8),
        )
        value = self.length(*kinds)
        if value is None:
            raise _Malformed("a size is not a number")
        return value

    def map_items(
        self, path: tuple[str, ...], depth: int
    ) -> Iterator[tuple[str, Tensor | int | bool]]:
        count = self.length((0x80, 0xF0, 0), (0xDE, 0xFF, 2), (0xDF, 0xFF, 4))
        if count is None or depth > 64:
            raise _Malformed("it is not a dictionary of arrays")
        for _ in range(count):
            key = (*path, self.text())
            tag = self.data[self.at]
            if tag & 0xF0 == 0x80 or tag in (0xDE, 0xDF):
                yield from self.map_items(key, depth + 1)
            elif tag in (0xC2, 0xC3):
                self.at += 1
                yield "/".join(key), tag == 0xC3
            elif tag in (*range(0xC7, 0xCA), *range(0xD4, 0xD9)):
                yield "/".join(key), self.array("/".join(key))
            else:
                yield "/".join(key), self.integer()

    def array(self, name: str) -> Tensor:
        """One extension value: type 1 around [shape, dtype name, bytes]."""
        fixed = self.length((0xD4, 0xFF, 0), *((tag, 0xFF, 0) for tag in range(0xD5, 0xD9)))
        if fixed is None:
            self.length((0xC7, 0xFF, 1), (0xC8, 0xFF, 2), (0xC9, 0xFF, 4))
        if self.number(1) != 1 or self.length((0x90, 0xF0, 0)) != 3:
            raise _Malformed(f"{name} is not an array")
        rank = self.length((0x90, 0xF0, 0))
        if rank is None or rank > MOST_AXES:
            raise _Malformed(f"{name} has no shape")
        shape = tuple(self.integer() for _ in range(rank))
        kind = self.text()
        size = self.length((0xC4, 0xFF, 1), (0xC5, 0xFF, 2), (0xC6, 0xFF, 4))
        if kind not in DTYPES:
            raise _Malformed(f"{name} has dtype {kind[:40]!r}, weights are {', '.join(DTYPES)}")
        dtype = DTYPES[kind]
        if size is None or size != math.prod(shape) * dtype.itemsize:
            raise _Malformed(f"{name} of shape {shape} has {size} bytes")
        offset = self.skip(size)
        return Tensor(name, str(self.path), shape, dtype, mapped(self.path, offset, dtype, shape))


def _join_chunks(path: Path, values: dict[str, Tensor | int | bool]) -> dict[str, Tensor]:
    """Plain arrays, and one tensor for each of flax's chunked arrays (flag, shape, chunks)."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    for flag in [name for name in values if name.split("/")[-1] == _CHUNKED]:
        name = flag.removesuffix(_CHUNKED).rstrip("/")
        parts, shape = [], []
        while (key := f"{name}/shape/{len(shape)}") in values and len(shape) < MOST_AXES:
            size = values[key]
            if type(size) is not int:
                raise UserError(f"{path}: {key} is not a size; download the file again")
            shape.append(size)
        while (key := f"{name}/chunks/{len(parts)}") in tensors:
            parts.append(tensors.pop(key))
        kinds = {(len(part.shape), part.dtype) for part in parts}
        flat = len(kinds) == 1 and len(parts[0].shape) == 1
        if not flat or sum(part.shape[0] for part in parts) != math.prod(shape):
            raise UserError(f"{path}: the chunks of {name} do not make its shape {tuple(shape)}")
        read = _chunk_reader(parts, tuple(shape))
        tensors[name] = Tensor(name, str(path), tuple(shape), parts[0].dtype, read)
    return tensors


def _chunk_reader(parts: list[Tensor], shape: tuple[int, ...]) -> Callable[[Index], np.ndarray]:
    def read(index: Index) -> np.ndarray:
        flat = [part.read((slice(None),)) for part in parts]
        return np.concatenate(flat).reshape(shape)[
            index
        ]  # rare, so the whole tensor is in memory once

    return read
