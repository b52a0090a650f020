"""Files of torch, such as ``pytorch_model.bin``, read without torch. Nothing in them is executed.

A torch file is a zip archive: ``data.pkl`` describes the tensors, ``data/<key>`` holds their
storages. Python's own unpickler calls whatever a file names. This one is an interpreter for the two
dozen opcodes that torch writes. It imports nothing, and the three functions that it can "call" are
written below. Any other name or opcode ends the reading with a sentence that names it. The
archive's entries are not compressed, so values are memory-mapped when they are asked for.
"""

import math
import pickletools
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeGuard, TypeVar

import numpy as np

from jaxprompt.config.errors import UserError
from jaxprompt.models.checkpoints.leaf import DTYPES, Index, Tensor, mapped

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

_MAX_PICKLE = 256 << 20
_MAX_RANK = 32
# exceptions of the standard library for damaged, encrypted or foreign archives
_ZIP_ERRORS = (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, zlib.error)


_Container = TypeVar("_Container", list, dict)
_Handler = Callable[["_Machine", object], None]  # of one pickle instruction and its argument


class Global(NamedTuple):
    """A name out of ``ALLOWED``; nothing is ever imported for it."""

    name: str


class Storage(NamedTuple):
    """Where the values of one or more tensors lie."""

    dtype: np.dtype
    offset: int  # of the values, in the file
    size: int  # values that it holds


class Strided(NamedTuple):
    """A tensor as torch describes it; offset and strides count values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Malformed(Exception):
    """The file contains something that a pickle of tensors never contains."""


def read_torch(path: Path) -> dict[str, Tensor]:
    """All tensors of one torch file, no values read.

    Raises:
        UserError: the file is damaged, or holds anything but a dictionary of tensors.
    """
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


def _values(path: Path, value: Strided) -> Callable[[Index], np.ndarray]:
    start = value.storage.offset + value.offset * value.storage.dtype.itemsize
    return mapped(path, start, value.storage.dtype, value.shape, value.strides)


def _interpret(archive: zipfile.ZipFile, path: Path) -> dict[str, Strided]:
    """The tensors that the archive's pickle describes, by name."""
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

    def storage(identity: object) -> Storage:
        return _storage(archive, prefix, path, identity)

    state = _Machine(storage, path).run(archive.read(pickles[0]))
    if not isinstance(state, dict) or not all(isinstance(v, Strided) for v in state.values()):
        raise _Malformed("it does not hold a plain dictionary of tensors")
    return state


def _storage(archive: zipfile.ZipFile, prefix: str, path: Path, identity: object) -> Storage:
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


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _rebuild_tensor(args: tuple[object, ...]) -> Strided:
    """torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)."""
    storage, offset, shape, strides, *_ = (*args, *[None] * 4)
    if len(args) < 4 or not isinstance(storage, Storage):
        raise _Malformed("a tensor has no storage")
    if not (isinstance(shape, tuple) and isinstance(strides, tuple)):
        raise _Malformed("a tensor has no shape")
    if not (_is_size(offset) and all(map(_is_size, (*shape, *strides)))) or (
        len(shape) != len(strides)
    ):
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
    """A pickle interpreter that can build dictionaries, lists, tuples and tensor descriptions.

    Each instruction that torch writes has a handler in ``_HANDLERS``. Handlers only move values
    between the stack, the marks and the memo. Any other instruction ends the reading.
    """

    def __init__(self, storage: Callable[[object], Storage], path: Path):
        self.storage, self.path = storage, path
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[object, object] = {}

    def run(self, pickled: bytes) -> object:
        """The value that a pickle describes. Raises _Malformed or UserError."""
        try:
            for op, argument, _ in pickletools.genops(pickled):
                if op.name == "STOP":
                    return self.pop()
                if op.name not in _HANDLERS:
                    raise self.refused(f"the pickle instruction {op.name}")
                _HANDLERS[op.name](self, argument)
        except (IndexError, KeyError, UnicodeDecodeError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise _Malformed("its data.pkl is not a complete pickle") from error
        raise _Malformed("its data.pkl has no end")

    def refused(self, what: str) -> UserError:
        return UserError(
            f"{self.path} asks for {what}, which has no place in a file of weights; nothing was "
            "executed, and the file is refused: do not open it with torch, use a safetensors file"
        )

    def lookup(self, name: str) -> Global:
        """The name of an object; nothing is imported."""
        if name not in ALLOWED:
            raise self.refused(f"the Python object {name.replace(' ', '.')[:120]!r}")
        return Global(name)

    def call(self, function: object, arguments: object) -> object:
        """What one of the three known functions would return."""
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise _Malformed("it calls something that is not a function")
        if function.name == "collections OrderedDict" and arguments in ((), ([],)):
            return {}
        if function.name == "torch._utils _rebuild_tensor_v2":
            return _rebuild_tensor(arguments)
        if function.name == "torch._utils _rebuild_parameter" and arguments:
            return arguments[0]
        raise self.refused(f"a call of {function.name.replace(' ', '.')!r} that torch never writes")

    def extend(self, items: list[object]) -> None:
        self.top(list).extend(items)

    def set_items(self, items: list[object]) -> None:
        target = self.top(dict)
        # keys must be strings: hashing nested tuples that share their parts takes exponential time
        if len(items) % 2 or not all(type(key) is str for key in items[::2]):
            raise _Malformed("a dictionary has keys that are not names")
        target.update(zip(items[::2], items[1::2], strict=True))

    def top(self, kind: type[_Container]) -> _Container:
        top = self.stack[-1]
        if not isinstance(top, kind):
            raise _Malformed(f"it fills something that is not a {kind.__name__}")
        return top

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        if self.marks and self.marks[-1] == len(self.stack):
            raise _Malformed("it takes more from its stack than there is")
        return self.stack.pop()

    def pop_many(self, count: int) -> list[object]:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise _Malformed("it takes more from its stack than there is")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def pop_mark(self) -> list[object]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items


def _skip(machine: _Machine, argument: object) -> None:
    """The protocol's version and the frames say nothing that is needed here."""


def _literal(machine: _Machine, argument: object) -> None:
    machine.push(argument)


def _constant(value: object) -> _Handler:
    return lambda machine, _: machine.push(value)


def _tuple_of(count: int) -> _Handler:
    return lambda machine, _: machine.push(tuple(machine.pop_many(count)))


def _remember(machine: _Machine, argument: object) -> None:
    machine.memo[argument] = machine.stack[-1]


def _memoize(machine: _Machine, _: object) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _recall(machine: _Machine, argument: object) -> None:
    machine.push(machine.memo[argument])


def _global(machine: _Machine, argument: object) -> None:
    machine.push(machine.lookup(str(argument)))


def _stack_global(machine: _Machine, _: object) -> None:
    module, attribute = machine.pop_many(2)
    both_text = type(module) is type(attribute) is str
    machine.push(machine.lookup(f"{module} {attribute}" if both_text else "?"))


def _reduce(machine: _Machine, _: object) -> None:
    function, arguments = machine.pop_many(2)
    machine.push(machine.call(function, arguments))


def _build(machine: _Machine, _: object) -> None:
    """Attributes of a dictionary (its version), which nobody reads."""
    machine.pop()


_HANDLERS: dict[str, _Handler] = {
    **dict.fromkeys(("PROTO", "FRAME"), _skip),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"), _literal),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _literal),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": _constant(()),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_mark())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop_many(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _remember),
    "MEMOIZE": _memoize,
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _recall),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "BINPERSID": lambda machine, _: machine.push(machine.storage(machine.pop())),
    "REDUCE": _reduce,
    "BUILD": _build,
}
