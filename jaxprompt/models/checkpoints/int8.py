"""Matrices of 8-bit integers with one scale a row, dequantised as they are read.

The names are those of compressed-tensors (vLLM): ``X.weight`` holds round(W / scale) as int8 and
``X.weight_scale`` the scales [rows, 1], where scale = max |row| / 127. A quarter of float32 on
disk; a value is off by at most half a scale.
"""

from collections.abc import Callable

import numpy as np

from jaxprompt.config.errors import UserError
from jaxprompt.models.checkpoints.leaf import DTYPES, Index, Tensor
from jaxprompt.models.checkpoints.safetensors import Output

_SCALE = "_scale"


def dequantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with every int8 one that has scales as one of float32."""
    pairs = {
        name: name + _SCALE
        for name, tensor in tensors.items()
        if tensor.dtype == np.int8 and name + _SCALE in tensors
    }
    scales = set(pairs.values())
    return {
        name: _combined(tensor, tensors[pairs[name]]) if name in pairs else tensor
        for name, tensor in tensors.items()
        if name not in scales
    }


def _combined(tensor: Tensor, scale: Tensor) -> Tensor:
    if len(tensor.shape) != 2 or scale.shape != (tensor.shape[0], 1):
        raise UserError(
            f"{tensor.file}: int8 tensor {tensor.name} of shape {tensor.shape} has scales of shape "
            f"{scale.shape}; one scale a row is supported"
        )

    def read(index: Index) -> np.ndarray:
        rows = np.asarray(scale.read((index[0], slice(0, 1))), np.float32)
        return tensor.read(index).astype(np.float32) * rows

    return tensor._replace(dtype=DTYPES["float32"], read=read)


def quantised(output: Output) -> list[Output]:
    """A matrix as int8 values and their scales; any other tensor in float32."""
    if len(output.shape) != 2:
        return [output._replace(dtype=DTYPES["float32"], values=_float32(output.values))]

    def parts() -> tuple[np.ndarray, np.ndarray]:
        values = np.asarray(output.values(), np.float32)
        scale = np.abs(values).max(axis=1, keepdims=True) / 127
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        return np.round(values / scale).astype(np.int8), scale

    shape = (output.shape[0], 1)
    return [
        Output(output.name, output.shape, np.dtype(np.int8), lambda: parts()[0]),
        Output(output.name + _SCALE, shape, DTYPES["float32"], lambda: parts()[1]),
    ]


def _float32(values: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(values(), np.float32)
