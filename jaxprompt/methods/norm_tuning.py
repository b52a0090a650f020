"""Norm tuning: the scales of all norms are trained.

They are stored as differences from the frozen ones. So zeros change nothing, and weight decay pulls
there.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Array, Float

from jaxprompt.config.schema import PromptConfig
from jaxprompt.methods.base import Method, members_of, no_start_vectors
from jaxprompt.methods.layers import Path, nested
from jaxprompt.models.injection import Injection, Params


def norm_tuning() -> Method:
    """The method; its leaves are "PATH/scale", [K, L, D] in the layers and [K, D] behind them."""

    def init(
        params: Params, start: Float[np.ndarray, "K R D"], prompt: PromptConfig, seed: int
    ) -> dict[str, Array]:
        return members_of(norm_starts(params), start)

    def inject(trainables: dict[str, Array], params: Params) -> Injection:
        return Injection(layers=nested(trainables))

    return Method(init, inject, num_start_vectors=no_start_vectors, uses_prompt=False)


def norm_starts(params: Params) -> dict[str, np.ndarray]:
    """Zeros for the scale of each norm of a model, by its path."""
    return {"/".join(path): np.zeros(shape, np.float32) for path, shape in _scales(params, ())}


def _scales(params: Params, path: Path) -> Iterator[tuple[Path, tuple[int, ...]]]:
    for name, value in params.items():
        if isinstance(value, dict):
            yield from _scales(value, (*path, name))
        elif name == "scale":
            yield (*path, name), value.shape
