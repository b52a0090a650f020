"""Rotary positions (Su et al. 2021, arXiv 2104.09864), with the frequencies of Llama 3.1.

Letters: see ``jaxprompt.data.virtual_tokens``. Llama 3.1: Grattafiori et al. 2024 (arXiv
2407.21783).
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def rotary_frequencies(
    head_dim: int, theta: float, scaling: Sequence[float] = ()
) -> Float[np.ndarray, " half"]:
    """Radians per position for each pair of a head's dimensions: theta ** (-2i / H).

    Args:
        head_dim: H.
        theta: the base.
        scaling: (), or (factor,), which divides all frequencies, or Llama 3.1's (factor, low, high,
            original length): frequencies of wavelengths above original / low are divided by the
            factor, those of wavelengths below original / high stay, and the ones between are
            interpolated.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if not scaling:
        return frequencies
    if len(scaling) == 1:
        return frequencies / scaling[0]
    factor, low, high, original = scaling
    rotations = original * frequencies / (2 * math.pi)  # within the length of training
    smooth = np.clip((rotations - low) / (high - low), 0, 1)
    return frequencies * (smooth + (1 - smooth) / factor)


def rotate(
    x: Float[Array, "B T N H"], angles: Float[Array, "#B T half"]
) -> Float[Array, "B T N H"]:
    """Rotate dimension i and i + half of every head by the position's angle, in float32."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
