"""The torch reader: real files are read right, hostile ones are refused and execute nothing."""

import builtins
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import GOLDENS

from jaxprompt.config.errors import UserError
from jaxprompt.models.checkpoints.legacy.torch_pickle import read_torch

GOLDEN = GOLDENS / "t5_lm_adapt"
DICT, END = b"\x80\x02}", b"."


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if abs(value) < 2**31 else pickle.dumps(value, 2)[2:-1]


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(kind="torch\nFloatStorage", key="0", count=12) -> bytes:
    found = b"c" + kind.encode() + b"\n"
    return b"(" + text("storage") + found + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(store: bytes = b"", offset=0, shape=(3, 4), strides=(4, 1), hooks=b"") -> bytes:
    """The pickle instructions that torch writes for one tensor."""
    hooks = hooks or b"ccollections\nOrderedDict\n)R"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n("
    body = (store or storage()) + number(offset) + numbers(*shape) + numbers(*strides) + b"\x89"
    return call + body + hooks + b"tR"


def state(**values: bytes) -> bytes:
    return DICT + b"(" + b"".join(text(k) + v for k, v in values.items()) + b"u" + END


VALUES = np.arange(12, dtype=np.float32)


@pytest.fixture
def torch_file(tmp_path):
    """A function that writes a torch zip around some pickle instructions."""

    def write(pickled: bytes, storages=None, compression=zipfile.ZIP_STORED) -> Path:
        path = tmp_path / "pytorch_model.bin"
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", pickled)
            for key, raw in ({"0": VALUES.tobytes()} if storages is None else storages).items():
                archive.writestr(f"archive/data/{key}", raw)
        return path

    return write


def whole(tensor) -> np.ndarray:
    return np.array(tensor.read(tuple(slice(0, n) for n in tensor.shape)))


def test_a_file_written_by_torch_equals_its_safetensors_twin():
    from safetensors.numpy import load_file

    found = read_torch(GOLDEN / "pytorch_model.bin")
    expected = load_file(GOLDEN / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(whole(found[name]), value)


def test_offsets_strides_slices_and_shared_storages(torch_file):
    path = torch_file(
        state(
            plain=tensor(),
            transposed=tensor(shape=(4, 3), strides=(1, 4)),
            part=tensor(offset=5, shape=(2, 2), strides=(4, 1)),
            broadcast=tensor(offset=2, shape=(3, 2), strides=(0, 1)),
        )
    )
    found, matrix = read_torch(path), VALUES.reshape(3, 4)
    assert np.array_equal(whole(found["plain"]), matrix)
    assert np.array_equal(whole(found["transposed"]), matrix.T)
    assert np.array_equal(whole(found["part"]), matrix[1:, 1:3])
    assert np.array_equal(whole(found["broadcast"]), [[2, 3]] * 3)
    assert np.array_equal(found["transposed"].read((slice(1, 3), slice(0, 2))), matrix.T[1:3, :2])


def test_bfloat16_parameters_and_attributes_of_the_dictionary(torch_file):
    import ml_dtypes

    raw = VALUES.astype(ml_dtypes.bfloat16).tobytes()
    inner = tensor(storage("torch\nBFloat16Storage"))
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + inner + b"\x89" + b"NtR"
    # OrderedDict() with items, and BUILD with its _metadata, as state_dict() gives it
    pickled = b"\x80\x02ccollections\nOrderedDict\n)R(" + text("w") + parameter + b"u"
    pickled += b"}(" + text("_metadata") + b"Nub."
    found = read_torch(torch_file(pickled, {"0": raw}))
    assert found["w"].dtype == ml_dtypes.bfloat16
    assert np.array_equal(whole(found["w"]).astype(np.float32), VALUES.reshape(3, 4))


class Reduced:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def attacks(mark: Path):
    """Pickles that would create ``mark``, import something or exhaust the machine if obeyed."""
    yield from calls(mark)
    yield from odd_opcodes(mark)
    yield from odd_tensors()
    yield from no_tensors()


def run_of(mark: Path) -> bytes:
    """The opcodes that call ``os.system`` to create ``mark``."""
    system = b"c" + os.system.__module__.encode() + b"\nsystem\n"
    return system + b"(" + text(f"touch {mark}") + b"tR"


def calls(mark: Path):
    """Functions that are named where a tensor's are, or anywhere else."""
    shell = f"touch {mark}"
    python = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    run = run_of(mark)
    for protocol in (0, 1, 2, 4, 5):
        yield f"os.system {protocol}", pickle.dumps({"w": Reduced(os.system, shell)}, protocol)
        yield f"eval {protocol}", pickle.dumps({"w": Reduced(builtins.eval, python)}, protocol)
    yield "exec", pickle.dumps(Reduced(builtins.exec, python), 2)
    yield "getattr", b"\x80\x02cbuiltins\ngetattr\n."
    yield "inside a tensor", state(w=tensor(hooks=run))
    yield "as a storage", state(w=tensor(store=run))
    yield "as a key", DICT + run + tensor() + b"s."
    yield "before the end", run + state(w=tensor())[2:]
    for name in (
        "torch._utils\n_rebuild_tensor_v2.__globals__",
        "torch._utils\n_import_dotted_name",
        "torch._utils\n_rebuild_tensor_v2\x00",
        "torch._utils \n_rebuild_tensor_v2",
        "torch.storage\n_load_from_bytes",
        "torch\nload",
        "torch.serialization\nload",
        "collections\nOrderedDict.__init__.__globals__",
        "collections\nnamedtuple",
        "numpy\nload",
        "jaxprompt.models.checkpoints.legacy.torch_pickle\nread_torch",
        "this_module_does_not_exist\nx",
    ):
        yield f"name {name!r}", b"\x80\x02c" + name.encode() + b"\n(" + text(shell) + b"tR."


def odd_opcodes(mark: Path):
    """Other opcodes that would name or call something."""
    shell, run = f"touch {mark}", run_of(mark)
    system = b"c" + os.system.__module__.encode() + b"\nsystem\n"
    yield "STACK_GLOBAL", b"\x80\x04" + text("os") + text("system") + b"\x93."
    yield "STACK_GLOBAL of no names", b"\x80\x04))\x93."
    yield "INST", b"(" + text(shell) + b"ios\nsystem\n."
    yield "INST with text", b"(S'" + shell.encode() + b"'\nios\nsystem\n."
    yield "OBJ", b"(" + system + text(shell) + b"o."
    yield "NEWOBJ", b"\x80\x02ccollections\nOrderedDict\n)\x81."
    yield "NEWOBJ_EX", b"\x80\x04ccollections\nOrderedDict\n)}\x92."
    yield "EXT1", b"\x80\x02\x82\x01."
    yield "PERSID", b"Pstorage\n."
    yield "persistent id is no tuple", b"\x80\x02" + text("storage") + b"Q."
    yield "persistent id holds a call", b"\x80\x02(" + text("storage") + run + b"tQ."
    yield "OrderedDict of a call", b"\x80\x02ccollections\nOrderedDict\n((" + run + b"ttR."
    yield "BUILD with a call", DICT + run + b"b."


def odd_tensors():
    """Storages and tensors that cannot be, and sizes that no machine has."""
    yield "storage of another type", state(w=tensor(storage("collections\nOrderedDict")))
    yield "storage outside", state(w=tensor(storage(key="../../../etc/passwd")))
    yield "called storage", b"\x80\x02ctorch\nFloatStorage\n" + numbers(9) + b"R."
    yield "called number", b"\x80\x02" + number(3) + b")R."
    yield "huge shape", state(w=tensor(shape=(2**62, 2**62), strides=(2**62, 1)))
    yield "beyond the storage", state(w=tensor(offset=1))
    yield "negative stride", state(w=tensor(offset=11, strides=(-4, -1)))
    yield "negative offset", state(w=tensor(offset=-1))
    yield "many axes", state(w=tensor(shape=(1,) * 99, strides=(1,) * 99))
    yield "unequal ranks", state(w=tensor(shape=(3, 4), strides=(4,)))
    yield "more than the entry", state(w=tensor(storage(count=13)))
    yield "huge string", b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f."
    yield "huge bytes", b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f."
    yield "huge number", b"\x80\x02\x8b\xff\xff\xff\x7f."
    yield "huge memo", b"\x80\x02}r\xff\xff\xff\xffh\x01."


def no_tensors():
    """What is no dictionary of tensors, or no pickle."""
    # a tuple that holds itself twice, 60 times over: hashing it would take 2**60 steps
    yield "exponential key", DICT + b")" + b"".join(b"2\x86" for _ in range(60)) + b"Ns."
    yield "memoised tuples", DICT + b")" + b"q\x00h\x00\x86" * 60 + b"Ns."
    yield "not a dictionary", b"\x80\x02" + number(1) + b"."
    yield "not tensors", state(w=number(1))
    yield "a list of itself", b"\x80\x02]q\x00h\x00a."
    yield "empty stack", b"\x80\x02R."
    yield "no mark", b"\x80\x02t."
    yield "unset memo", b"\x80\x02h\x05."
    yield "no end", DICT
    yield "no pickle", b"\xff\xfe\xfd"
    yield "empty", b""


CASES = dict(attacks(Path("executed")))


def imported():
    """The modules that are loaded; the codec of a zip file's names comes with the first archive."""
    return {name for name in sys.modules if not name.startswith("encodings.")}


@pytest.mark.parametrize("name", CASES)
def test_hostile_pickles_are_refused_and_nothing_runs(name, torch_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, before = torch_file(CASES[name]), imported()
    with pytest.raises(UserError) as refusal:
        read_torch(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    assert not Path("executed").exists()
    assert imported() == before


def test_the_refusal_names_what_was_asked_for(torch_file):
    with pytest.raises(UserError, match=r"'(posix|os|nt)\.system'.*nothing was executed"):
        read_torch(torch_file(CASES["os.system 2"]))
    with pytest.raises(UserError, match="instruction INST"):
        read_torch(torch_file(CASES["INST"]))


def test_other_archives_are_refused(torch_file, tmp_path):
    with pytest.raises(UserError, match="compressed"):
        read_torch(torch_file(state(w=tensor()), compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match="missing from the archive"):
        read_torch(torch_file(state(w=tensor()), {}))
    with pytest.raises(UserError, match="big-endian"):
        path = torch_file(state(w=tensor()))
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("archive/byteorder", "big")
        read_torch(path)
    legacy = tmp_path / "legacy.bin"
    legacy.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2))
    with pytest.raises(UserError, match="before 1.6"):
        read_torch(legacy)


def test_every_truncation_is_one_sentence(torch_file, tmp_path):
    whole_file = torch_file(state(w=tensor())).read_bytes()
    cut = tmp_path / "cut.bin"
    for length in range(0, len(whole_file), 7):
        cut.write_bytes(whole_file[:length])
        with pytest.raises(UserError, match="cut.bin"):
            read_torch(cut)


def test_flipped_bytes_never_escape(torch_file, tmp_path):
    """Damage either is noticed or changes values; nothing but UserError comes out."""
    original = torch_file(state(w=tensor())).read_bytes()
    path = tmp_path / "flipped.bin"
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(original), 300):
        damaged = bytearray(original)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            for value in read_torch(path).values():
                whole(value)
        except UserError:
            pass


def test_a_tensor_has_no_more_values_than_its_storage(torch_file):
    """Strides of 0 would make any number of values of a small file."""
    path = torch_file(state(huge=tensor(shape=(2**18, 2**18), strides=(0, 0))))
    with pytest.raises(UserError, match="a tensor has more values than its storage"):
        read_torch(path)
