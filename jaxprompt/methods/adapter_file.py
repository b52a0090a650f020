"""Adapters that other libraries have written: what was read, and where it belongs in a backbone.

A file names modules of the torch model, and holds matrices [out, in]. How many heads and layers the
model has, it does not say. So what was read stays as it is until a backbone is known.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.values import Values
from jaxprompt.data.batches import AnyArray
from jaxprompt.methods.layers import from_tensors
from jaxprompt.models.checkpoints.leaf import finite
from jaxprompt.models.checkpoints.legacy.torch_pickle import read_torch
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.models.checkpoints.safetensors import read_safetensors
from jaxprompt.models.checkpoints.torch_modules import Path as TreePath
from jaxprompt.models.checkpoints.torch_modules import Place, depths_of, places
from jaxprompt.models.injection import Layers

Tensors = Mapping[str, AnyArray]


class AdapterFile(NamedTuple):
    """An adapter as another library wrote it."""

    library: str  # PEFT | AdapterHub
    path: str
    config: Values
    tensors: Tensors  # float32


def number_in(config: Values, key: str, default: float, where: str) -> float:
    """A number of an adapter's config. Raises UserError where it is none."""
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e9:
        raise UserError(
            f"The adapter {where!r} has {key} {shown(value)}; it must be a positive number."
        )
    return value


def read_tensors(folder: Path, names: Sequence[str]) -> dict[str, Float[np.ndarray, "..."]]:
    """The tensors of the first of the files that is there, in float32.

    Args:
        names: of files of safetensors or, with the ending .bin, of torch, of which nothing is run.

    Raises:
        UserError: none of them is there, or one is damaged or holds numbers that are not finite.
    """
    for name in names:
        path = folder / name
        if path.is_file():
            break
    else:
        raise UserError(f"The adapter {str(folder)!r} has no {names[0]}; save it again.")
    read = read_torch if path.suffix == ".bin" else read_safetensors
    tensors = {}
    for name, tensor in read(path).items():
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        if size > path.stat().st_size:
            raise UserError(f"{path} is damaged: {name!r} is larger than the file.")
        values = tensor.read(tuple(slice(0, n) for n in tensor.shape))
        if values.dtype.kind != "f" and values.dtype.name != "bfloat16":
            raise UserError(f"{path} holds {values.dtype} in {name!r}; it must be float numbers.")
        with np.errstate(over="ignore"):  # of float64; refused by the next line
            tensors[name] = np.array(values, np.float32)
        if not finite(tensors[name]):
            raise UserError(f"{path} holds values that are not finite in {name!r}; it is unusable.")
    return tensors


class Changes:
    """What changes a backbone, gathered from one module of one layer at a time."""

    def __init__(self, file: AdapterFile, backbone: Backbone) -> None:
        self.file, self.backbone = file, backbone
        self.places = places(backbone.config)
        self.depths = depths_of(backbone.config)
        # the parts of each tensor of the tree, by layer
        self.parts: dict[str, dict[int | None, AnyArray]] = {}
        # of adapters, by their path
        self.settings: dict[str, Values] = {}

    def place(self, module: str, weight: bool = True) -> Place:
        """Where a module of the torch model is.

        Raises:
            UserError: the backbone has no such module, or changes of it cannot be represented.
        """
        place = self.places.get(module)
        if place is None:
            raise UserError(
                f"The adapter {self.file.path!r} changes {module!r}, and {self.backbone.source} "
                "has no such module; use the backbone that it was tuned on."
            )
        if weight and (place.layer is None or place.path[-1] == "relative_bias"):
            raise UserError(
                f"The adapter {self.file.path!r} changes {module!r}; only weights of attention "
                "and of the MLP of a layer can be changed here."
            )
        return place

    def fitting(self, name: str, shape: tuple[int, ...]) -> AnyArray:
        """The tensor of this name. Raises UserError where its shape is not ``shape``."""
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise UserError(
                f"The adapter {self.file.path!r} lacks the tensor {name!r}; it is incomplete."
            )
        if tensor.shape != shape:
            raise UserError(
                f"The adapter {self.file.path!r} has {name!r} of shape {list(tensor.shape)} and "
                f"{self.backbone.source} needs {list(shape)}; use the backbone that it was tuned "
                "on."
            )
        return tensor

    def rows(self, name: str) -> int:
        """The rows of a matrix. Raises UserError where the tensor is none."""
        tensor = self.file.tensors[name]
        if tensor.ndim != 2 or 0 in tensor.shape:
            raise UserError(
                f"The adapter {self.file.path!r} has {name!r} of shape {list(tensor.shape)}, which "
                "is no matrix; it is damaged."
            )
        return len(tensor)

    def low_rank(self, module: str, a: str, b: str, scale: float) -> None:
        """Add the product of factors [r, in] and [out, r] to a weight.

        Args:
            a: name of the first tensor.
            b: name of the second.
            scale: of the product; the second factor is multiplied by it.
        """
        place, rank = self.place(module), self.rows(a)
        first = self.fitting(a, (rank, math.prod(place.inputs)))
        second = self.fitting(b, (math.prod(place.outputs), rank))
        second = np.float32(scale) * second.T.reshape(rank, *place.outputs)
        path = (*place.path, "low_rank")
        self.add((*path, "a"), place.layer, first.T.reshape(*place.inputs, rank))
        self.add((*path, "b"), place.layer, second)

    def add(self, path: TreePath, layer: int | None, tensor: AnyArray) -> None:
        """Add a tensor of a change, for one layer.

        Args:
            path: as ``methods.layers.to_tensors`` names it.
            layer: None: it is of no layer.
        """
        self.parts.setdefault("/".join(path), {})[layer] = tensor

    def tree(self) -> Layers:
        """All changes. Layers that have none have zeros, and so have lower ranks and widths.

        It is a differentiable function of the tensors.
        """
        tensors = {name: self._stacked(name) for name in self.parts}
        return from_tensors(tensors, self.settings)

    def _stacked(self, name: str) -> Float[Array, "..."]:
        parts = self.parts[name]
        if None in parts:
            return jnp.asarray(parts[None])
        nothing = jnp.zeros_like(next(iter(parts.values())))
        depth = self.depths[name.partition("/")[0]]
        return _padded([parts.get(layer, nothing) for layer in range(depth)])


def _padded(leaves: Sequence[AnyArray]) -> Float[Array, "L ..."]:
    """Arrays of several sizes, filled up with zeros, on a new first axis."""
    shape = np.max([leaf.shape for leaf in leaves], axis=0)
    pads = [[(0, s - own) for s, own in zip(shape, x.shape, strict=True)] for x in leaves]
    return jnp.stack([jnp.pad(x, pad) for x, pad in zip(leaves, pads, strict=True)])


def check_all_read(file: AdapterFile, read: Iterable[str], means: Mapping[str, str]) -> None:
    """Refuse tensors that nothing has read.

    Args:
        read: names of the tensors that were read.
        means: a part of a tensor's name -> what such tensors are.
    """
    rest = sorted(set(file.tensors) - set(read))
    if rest:
        what = next((words for part, words in means.items() if part in rest[0]), "not known here")
        raise UserError(
            f"The adapter {file.path!r} holds {listed(rest, 3)}: this is {what}, which cannot be "
            "represented."
        )


def check_complete(file: AdapterFile, changed: Iterable[str], expected: Iterable[str]) -> None:
    """Refuse a file that lacks modules which its config names."""
    lacking = sorted(set(expected) - set(changed))
    if lacking:
        raise UserError(
            f"The adapter {file.path!r} lacks {listed(lacking, 3)}, which its config names; it is "
            "incomplete, or of another backbone."
        )
