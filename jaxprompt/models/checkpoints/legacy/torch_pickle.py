"""``pytorch_model.bin`` without torch and without running anything that it says.

A torch file is a zip archive: ``data.pkl`` describes the tensors, ``data/<key>`` holds their
storages. Python's own unpickler calls whatever a file names; this one is an interpreter for the two
dozen opcodes that torch writes. It imports nothing, the three functions it can "call" are the ones
below, and any other name or opcode ends the reading with a sentence that names it. Values stay in
the archive, whose entries are stored uncompressed, and are memory-mapped when asked for.
"""

import math
import pickletools
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprompt.config.errors import UserError
from jaxprompt.models.checkpoints.leaf import DTYPES, Tensor, mapped

_STORAGES = {
    "torch DoubleStorage": "float64",
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    # never weights of a T5, but tables of integers lie beside them in some files
    "torch LongStorage": "int64",
    "torch IntStorage": "int32",
    "torch ShortStorage": "int16",
    "torch CharStorage": "int8",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
}
_CALLABLE = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
_DTYPE_NAMES = {f"torch {name}" for name in (*DTYPES, "int64", "int32", "int16", "int8", "uint8")}
ALLOWED = frozenset((*_CALLABLE, *_STORAGES, *_DTYPE_NAMES, "torch bool"))

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_MAX_PICKLE = 256 << 20
_MAX_RANK = 32
# what the standard library raises for damaged, encrypted or foreign archives
_ZIP_ERRORS = (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, zlib.error)


class Global(NamedTuple):
    """A name out of ``ALLOWED``; nothing is ever imported for it."""

    name: str


class Storage(NamedTuple):
    dtype: np.dtype
    offset: int  # of the values, in the file
    size: int  # values that it holds


class Strided(NamedTuple):
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Malformed(Exception):
    """What a pickle of tensors never contains."""


def read_torch(path: Path) -> dict[str, Tensor]:
    """All tensors of one torch file, no values read; anything but tensors raises UserError."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            legacy = file.read(1) == b"\x80"
        what = (
            "was written by torch before 1.6 (no zip archive), a form that cannot be read safely"
            if legacy
            else "is truncated or not a torch file"
        )
        raise UserError(
            f"{path} {what}; use a model.safetensors or save it again with a newer torch"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            described = _interpret(archive, path)
    except UserError:
        raise
    except (*_ZIP_ERRORS, _Malformed) as error:
        raise UserError(f"{path} is damaged or not a torch file of tensors: {error}") from error
    return {
        name: Tensor(name, str(path), value.shape, value.storage.dtype, _values(path, value))
        for name, value in described.items()
    }


def _values(path: Path, value: Strided):
    start = value.storage.offset + value.offset * value.storage.dtype.itemsize
    return mapped(path, start, value.storage.dtype, value.shape, value.strides)


def _interpret(archive: zipfile.ZipFile, path: Path) -> dict[str, Strided]:
    pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
    if len(pickles) != 1:
        raise _Malformed(f"it holds {len(pickles)} entries named data.pkl instead of 1")
    prefix = pickles[0].removesuffix("data.pkl")
    if archive.getinfo(pickles[0]).file_size > _MAX_PICKLE:
        raise _Malformed("its data.pkl is larger than any list of tensors")
    names = set(archive.namelist())
    order = prefix + "byteorder"
    if order in names and (
        archive.getinfo(order).file_size != 6 or archive.read(order) != b"little"
    ):
        raise _Malformed("it was written on a big-endian machine")

    def storage(identity: Any) -> Storage:
        return _storage(archive, prefix, path, identity)

    state = _Machine(storage, path).run(archive.read(pickles[0]))
    if not isinstance(state, dict) or not all(isinstance(v, Strided) for v in state.values()):
        raise _Malformed("it does not hold a plain dictionary of tensors")
    return state


def _storage(archive: zipfile.ZipFile, prefix: str, path: Path, identity: Any) -> Storage:
    """A storage from torch's persistent id ("storage", type, key, device, number of values)."""
    if not (isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage"):
        raise _Malformed("a persistent id is not a storage")
    _, kind, key, _, count = identity
    if not (isinstance(kind, Global) and kind.name in _STORAGES and isinstance(key, str)):
        raise _Malformed("a storage has no known type")
    dtype = np.dtype(DTYPES.get(_STORAGES[kind.name], _STORAGES[kind.name]))
    try:
        info = archive.getinfo(f"{prefix}data/{key}")
    except KeyError:
        raise _Malformed("a storage is missing from the archive") from None
    if info.compress_type != zipfile.ZIP_STORED:
        raise _Malformed("a storage is compressed, which torch never does")
    if type(count) is not int or not 0 <= count * dtype.itemsize <= info.file_size:
        raise _Malformed("a storage is smaller than the pickle says")
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)  # its lengths of name and extra field differ from the directory's
    if header[:4] != b"PK\x03\x04":
        raise _Malformed("a storage has no local header")
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    offset = info.header_offset + 30 + name + extra
    if offset + info.file_size > path.stat().st_size:
        raise _Malformed("a storage reaches beyond the end of the file")
    return Storage(dtype, offset, count)


def _rebuild_tensor(args: tuple) -> Strided:
    """torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)."""
    if len(args) < 4 or not isinstance(args[0], Storage):
        raise _Malformed("a tensor has no storage")
    storage, offset, shape, strides = args[:4]
    if not (isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise _Malformed("a tensor has no shape")
    numbers = (offset, *shape, *strides)
    if not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(strides):
        raise _Malformed("a tensor has an impossible shape or stride")
    if len(shape) > _MAX_RANK:
        raise _Malformed(f"a tensor has {len(shape)} axes")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if math.prod(shape) > 0 and last >= storage.size:
        raise _Malformed("a tensor reaches beyond its storage")
    if math.prod(shape) > storage.size:  # by strides of 0: a small file of any number of values
        raise _Malformed("a tensor has more values than its storage")
    return Strided(storage, offset, shape, strides)


class _Machine:
    """A pickle interpreter that can build dictionaries, lists, tuples and tensor descriptions."""

    def __init__(self, storage, path: Path):
        self.storage, self.path = storage, path
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        try:
            for op, argument, _ in pickletools.genops(pickled):
                if op.name == "STOP":
                    return self.pop()
                self.step(op.name, argument)
        except (IndexError, KeyError, UnicodeDecodeError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise _Malformed("its data.pkl is not a complete pickle") from error
        raise _Malformed("its data.pkl has no end")

    def step(self, name: str, argument: Any) -> None:
        push = self.stack.append
        if name in ("PROTO", "FRAME"):
            pass
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _LITERALS:
            push(argument)
        elif name == "EMPTY_DICT":
            push({})
        elif name == "EMPTY_LIST":
            push([])
        elif name == "EMPTY_TUPLE":
            push(())
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name == "TUPLE":
            push(tuple(self.pop_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            push(tuple(self.pop_many(int(name[-1]))))
        elif name in ("APPEND", "APPENDS"):
            items = [self.pop()] if name == "APPEND" else self.pop_mark()
            self.top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.pop_many(2) if name == "SETITEM" else self.pop_mark()
            self.set_items(items)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            push(self.memo[argument])
        elif name == "GLOBAL":
            push(self.find(argument))
        elif name == "STACK_GLOBAL":
            module, attribute = self.pop_many(2)
            push(
                self.find(
                    f"{module} {attribute}" if type(module) is type(attribute) is str else "?"
                )
            )
        elif name == "BINPERSID":
            push(self.storage(self.pop()))
        elif name == "REDUCE":
            function, arguments = self.pop_many(2)
            push(self.call(function, arguments))
        elif name == "BUILD":
            self.pop()  # attributes of the dictionary (its version); nobody reads them
        else:
            raise self.refused(f"the pickle instruction {name}")

    def find(self, name: str) -> Global:
        if name not in ALLOWED:
            raise self.refused(f"the Python object {name.replace(' ', '.')[:120]!r}")
        return Global(name)

    def refused(self, what: str) -> UserError:
        return UserError(
            f"{self.path} asks for {what}, which has no place in a file of weights; nothing was "
            "executed, and the file is refused: do not open it with torch, use a safetensors file"
        )

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise _Malformed("it calls something that is not a function")
        if function.name == "collections OrderedDict" and arguments in ((), ([],)):
            return {}
        if function.name == "torch._utils _rebuild_tensor_v2":
            return _rebuild_tensor(arguments)
        if function.name == "torch._utils _rebuild_parameter" and arguments:
            return arguments[0]
        raise self.refused(f"a call of {function.name.replace(' ', '.')!r} that torch never writes")

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        # keys must be strings: hashing nested tuples that share their parts takes exponential time
        if len(items) % 2 or not all(type(key) is str for key in items[::2]):
            raise _Malformed("a dictionary has keys that are not names")
        target.update(zip(items[::2], items[1::2], strict=True))

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise _Malformed(f"it fills something that is not a {kind.__name__}")
        return self.stack[-1]

    def pop(self) -> Any:
        if self.marks and self.marks[-1] == len(self.stack):
            raise _Malformed("it takes more from its stack than there is")
        return self.stack.pop()

    def pop_many(self, count: int) -> list[Any]:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise _Malformed("it takes more from its stack than there is")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def pop_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items
