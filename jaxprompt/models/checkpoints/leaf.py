"""Tensors that have not been read yet, and how they become the leaves of a parameter tree.

The reader of each file format returns ``Tensor``s. A map of ``Leaf``s says which tensors fill which
leaf, and in which order a tensor has its axes. Nothing here holds more than one tensor at a time.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxprompt.config.errors import UserError, listed, shown

MOST_AXES = 32  # of a tensor in a file; no weight has more than four
Index = tuple[slice, ...]

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class Tensor(NamedTuple):
    """One tensor of a checkpoint: its shape is known, its values are read on demand."""

    name: str  # as the file spells it
    file: str  # for error messages
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]  # one slice (start and stop, step 1) an axis


class Piece(NamedTuple):
    """A tensor and the order of its axes in letters, merged axes written together: "NH D"."""

    name: str
    axes: str


class Leaf(NamedTuple):
    """How one leaf of the parameter tree is filled.

    ``axes`` are the leaf's own, e.g. "LDNH". If they start with "L", there is either one piece a
    layer or a single piece that has an "L" of its own (layers stacked in the file).
    """

    path: tuple[str, ...]
    axes: str
    pieces: tuple[Piece, ...]


def map_leaves(axes: Mapping[str, str], pieces: Callable[[str], Sequence[Piece]]) -> list[Leaf]:
    """The leaves of a parameter tree, in the order of ``axes``.

    Args:
        axes: path of a leaf, such as "layers/mlp/wo" -> letters of its axes, such as "LFD".
        pieces: path of a leaf -> the tensors of the file that fill it.
    """
    return [
        Leaf(tuple(path.split("/")), letters, tuple(pieces(path))) for path, letters in axes.items()
    ]


def each_layer(layers: int, name: str, axes: str) -> list[Piece]:
    """One piece for each layer; ``name`` has {} in place of the layer's number."""
    return [Piece(name.format(layer), axes) for layer in range(layers)]


def mapped(
    path: Path,
    offset: int,
    dtype: np.dtype,
    shape: Sequence[int],
    strides: Sequence[int] | None = None,
) -> Callable[[Index], np.ndarray]:
    """A reader of the values at ``offset`` of a file.

    Every read makes a memory map of its own. Only the pages of the slice are read, and they are
    freed with the result. So a whole checkpoint passes through memory without staying there.

    Args:
        strides: count values, not bytes; None is row-major.
    """
    shape = tuple(shape)

    def read(index: Index) -> np.ndarray:
        if strides is None:
            return np.memmap(path, dtype, "r", offset, shape)[index]
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        flat = np.memmap(path, dtype, "r", offset, (extent,))
        byte_strides = [s * dtype.itemsize for s in strides]
        return np.lib.stride_tricks.as_strided(flat, shape, byte_strides, writeable=False)[index]

    return read


def file_shape(piece: Piece, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that a piece must have in its file, given the size of every letter."""
    return tuple(math.prod(sizes[letter] for letter in group) for group in piece.axes.split())


def check_depth(where: str | Path, layers: int, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError if there are more layers than tensors, before names of layers are made."""
    if layers > len(tensors):
        raise UserError(
            f"{where}: the config has {layers:,} layers, and the checkpoint has {len(tensors):,} "
            "tensors in all; check the number of layers"
        )


def check(leaves: Sequence[Leaf], tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
    """Compare names and shapes of a checkpoint with what the config expects.

    Args:
        sizes: the size of every letter but L. Numbers of layers differ between stacks, and are
            under the names of the stacks ("encoder", "decoder", "layers").

    Raises:
        UserError: tensors are missing or superfluous, or one has another shape or dtype.
    """
    pieces = [(leaf, piece) for leaf in leaves for piece in leaf.pieces]
    missing = [piece.name for _, piece in pieces if piece.name not in tensors]
    if missing:
        where = next((t.file for t in tensors.values()), "the checkpoint")
        raise UserError(
            f"{where}: {len(missing)} of {len(pieces)} tensors are missing "
            f"({_first_names(missing)}); the checkpoint is incomplete or belongs to "
            "another config"
        )
    extra = sorted(set(tensors) - {piece.name for _, piece in pieces})
    if extra:
        raise UserError(
            f"{tensors[extra[0]].file}: {len(extra)} tensors have no place in this config's model "
            f"({_first_names(extra)}); check config.json"
        )
    for leaf, piece in pieces:
        tensor = tensors[piece.name]
        expected = file_shape(piece, layer_sizes(leaf, sizes))
        if tensor.shape != expected:
            raise UserError(
                f"{tensor.file}: tensor {tensor.name} (our {'/'.join(leaf.path)}) has shape "
                f"{shown(tensor.shape)}, the config expects {expected}; check config.json"
            )
        if tensor.dtype not in DTYPES.values():
            raise UserError(
                f"{tensor.file}: tensor {tensor.name} has dtype {tensor.dtype}, weights must be "
                f"one of {', '.join(DTYPES)}; quantised checkpoints cannot be loaded"
            )


def _first_names(names: Sequence[str]) -> str:
    return listed(names[:3], 3) + (", ..." if len(names) > 3 else "")


def layer_sizes(leaf: Leaf, sizes: Mapping[str, int]) -> dict[str, int]:
    """``sizes`` with "L" set to the depth of the leaf's stack."""
    return {**sizes, "L": sizes.get(leaf.path[0], 0)}


_AT_A_TIME = 2**25  # bytes of a tensor that is not in a layer


def fill(
    leaf: Leaf,
    tensors: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    index: Index,
    out: np.ndarray,
) -> None:
    """Read ``leaf[index]`` into ``out``, cast to its dtype, one tensor of the file at a time.

    A large tensor outside the layers (the embedding) is read some rows at a time: if a device has a
    part of each row, all rows pass through memory.

    Raises:
        UserError: a value is not a finite number.
    """
    sizes = layer_sizes(leaf, sizes)
    stacked_here = leaf.axes[0] == "L" and not any("L" in p.axes for p in leaf.pieces)
    if not stacked_here:
        (piece,) = leaf.pieces
        tensor, first = tensors[piece.name], piece.axes.split()[0]
        if len(first) > 1:
            _put(out, _read(piece, tensor, leaf.axes, sizes, index), tensor)
            return
        axis = leaf.axes.index(first)
        start, stop, _ = index[axis].indices(sizes[first])
        a_row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        some = max(_AT_A_TIME // max(a_row, 1), 1)
        for begin in range(start, stop, some):
            end = min(begin + some, stop)
            part = (*index[:axis], slice(begin, end), *index[axis + 1 :])
            here = (*[slice(None)] * axis, slice(begin - start, end - start))
            _put(out[here], _read(piece, tensor, leaf.axes, sizes, part), tensor)
        return
    start, stop, _ = index[0].indices(sizes["L"])
    for row, layer in enumerate(range(start, stop)):
        piece = leaf.pieces[layer]
        tensor = tensors[piece.name]
        _put(out[row], _read(piece, tensor, leaf.axes[1:], sizes, index[1:]), tensor)


def _put(out: np.ndarray, values: np.ndarray, tensor: Tensor) -> None:
    with np.errstate(over="ignore"):  # infinite values are refused just below
        out[...] = values
    if not finite(out):
        raise UserError(
            f"{tensor.file}: tensor {tensor.name} has values that are not finite numbers (NaN or "
            f"infinite as {out.dtype}); the checkpoint is damaged or has overflowed, download it "
            "again"
        )


def finite(values: np.ndarray) -> bool:
    """Whether all values are finite. This takes far less time than reading them from a disk."""
    if values.dtype == DTYPES["bfloat16"]:  # NumPy computes slowly with it
        exponents = values.view(np.uint16) & np.uint16(0x7F80)
        return not exponents.size or int(exponents.max()) < 0x7F80
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum()  # NaN and infinity spoil it, and no array of flags is made
    return bool(np.isfinite(total)) or bool(np.isfinite(values).all())


def _read(
    piece: Piece, tensor: Tensor, target: str, sizes: Mapping[str, int], index: Index
) -> np.ndarray:
    """The slice ``index`` of a tensor, with the axes ``target``.

    Of merged axes only the outermost one is cut in the file. Inner axes are cut in the view, before
    anything is copied.
    """
    bounds = {a: s.indices(sizes[a])[:2] for a, s in zip(target, index, strict=True)}
    groups = piece.axes.split()
    pushed, shape, rest = [], [], {}
    for group in groups:
        outer, inner = group[0], group[1:]
        size = math.prod(sizes[a] for a in inner)
        start, stop = bounds[outer]
        pushed.append(slice(start * size, stop * size))
        shape += [stop - start, *(sizes[a] for a in inner)]
        rest |= {outer: slice(None)} | {a: slice(*bounds[a]) for a in inner}
    view = tensor.read(tuple(pushed)).reshape(shape)
    letters = "".join(groups)
    return view.transpose([letters.index(a) for a in target])[tuple(rest[a] for a in target)]


def elements(tensor: Tensor, limit: int = 1 << 22) -> Iterator[np.ndarray]:
    """The values of a matrix in blocks of whole rows, each of about ``limit`` values."""
    rows = tensor.shape[0]
    step = max(1, limit // max(1, math.prod(tensor.shape[1:])))
    whole = tuple(slice(0, n) for n in tensor.shape[1:])
    return (tensor.read((slice(i, min(i + step, rows)), *whole)) for i in range(0, rows, step))


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices hold the same values (reads both, block by block, until they differ)."""
    alike = a.shape == b.shape and len(a.shape) == 2 and 0 not in a.shape
    return alike and all(
        np.array_equal(x, y) for x, y in zip(elements(a), elements(b), strict=True)
    )
