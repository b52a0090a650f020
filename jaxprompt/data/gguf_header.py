"""A check of the header of a GGUF file before the ``gguf`` package reads it.

The package trusts every length that a file declares, and makes some objects for each element of an
array. So a file of 100 bytes can keep it busy for ever. This walk compares all lengths with the
size of the file, and makes no objects.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from pathlib import Path

from jaxprompt.config.errors import UserError

# bytes of a scalar by its type number: integers, floats and bool
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MOST_ELEMENTS = 1 << 22  # of all arrays together; the largest vocabularies have a quarter as many
_MOST_DEPTH, _MOST_AXES = 4, 4
_FEWEST_BITS = 1  # a value of the smallest quantised kind


class _Malformed(Exception):
    """The header contradicts itself or the size of the file."""


def check_header(path: Path) -> None:
    """Raise UserError unless the header of a GGUF file ends inside the file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(data).header()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (_Malformed, ValueError) as error:  # ValueError: an empty file has no map
        raise UserError(
            f"{path} is truncated or not a GGUF file: {error}; download it again"
        ) from error


class _Walk:
    """A cursor over the bytes of a GGUF file."""

    def __init__(self, data: mmap.mmap):
        self.data, self.size, self.at, self.elements, self.order = data, len(data), 0, 0, "<"

    def take(self, kind: str) -> int:
        at = self.at
        self.skip(struct.calcsize(kind))
        return struct.unpack_from(self.order + kind, self.data, at)[0]

    def skip(self, length: int) -> None:
        if length > self.size - self.at:
            raise _Malformed(f"a value at byte {self.at} of {self.size} reaches beyond its end")
        self.at += length

    def count(self, least: int, what: str) -> int:
        """A declared number of things that take at least ``least`` bytes each."""
        number = self.take("Q")
        if number * least > self.size - self.at:
            raise _Malformed(f"it declares {number} {what} in {self.size - self.at} bytes")
        return number

    def text(self) -> None:
        self.skip(self.take("Q"))

    def header(self) -> None:
        if self.data[:4] != b"GGUF":
            raise _Malformed("it does not start with GGUF")
        self.at = 4
        if self.take("I") & 0xFFFF == 0:  # written on a machine of the other byte order
            self.order = ">"
        tensors = self.count(24, "tensors")
        for _ in range(self.count(13, "keys")):
            self.text()
            self.value(self.take("I"), 0)
        for _ in range(tensors):
            self.tensor()

    def value(self, kind: int, depth: int) -> None:
        if kind in _SCALARS:
            self.skip(_SCALARS[kind])
        elif kind == _STRING:
            self.text()
        elif kind == _ARRAY and depth < _MOST_DEPTH:
            self.array(depth + 1)
        else:
            raise _Malformed(f"a value at byte {self.at} has the unknown type {kind}")

    def array(self, depth: int) -> None:
        kind = self.take("I")
        count = self.count(_SCALARS.get(kind, 8), "elements of an array")
        self.elements += count
        if self.elements > _MOST_ELEMENTS:
            raise _Malformed(f"its arrays have more than {_MOST_ELEMENTS:,} elements")
        if kind in _SCALARS:
            self.skip(count * _SCALARS[kind])
            return
        for _ in range(count):
            self.value(kind, depth)

    def tensor(self) -> None:
        self.text()
        axes = self.take("I")
        if not 1 <= axes <= _MOST_AXES:
            raise _Malformed(f"a tensor has {axes} axes")
        values = math.prod(self.take("Q") for _ in range(axes))
        if not 0 < values * _FEWEST_BITS <= self.size * 8:
            raise _Malformed(f"a tensor has {values} values in a file of {self.size} bytes")
        self.take("I")
        if self.take("Q") > self.size:
            raise _Malformed("a tensor lies beyond the end of the file")
