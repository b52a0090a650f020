"""Norms: by the root mean square, as in T5 and Llama, and by mean and variance, as in BERT.

Root mean square: Raffel et al. 2020 (arXiv 1910.10683), section 2.1.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.checkpoint, static_argnums=2)
def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "*#B D"], eps: float
) -> Float[Array, "*B D"]:
    """Divide by the root mean square, in float32, then scale; the result has the dtype of ``x``.

    Only ``x`` is kept for the gradient, and the layers around it keep that anyway.
    """
    x32 = x.astype(jnp.float32)
    size = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1) + eps)
    # The gradient of this product is a product. That of a broadcast multiplication would be a sum
    # along rows, which takes ten times as long in XLA's CPU runtime (jax 0.10).
    normed = jnp.einsum("...d,...->...d", x32, size)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


@functools.partial(jax.checkpoint, static_argnums=3)
def layer_norm(
    x: Float[Array, "*B D"],
    scale: Float[Array, "*#B D"],
    bias: Float[Array, " D"],
    eps: float,
) -> Float[Array, "*B D"]:
    """Subtract the mean and divide by the standard deviation, in float32; then scale and add.

    Ba et al. 2016 (arXiv 1607.06450), section 3. Only ``x`` is kept for the gradient.
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    size = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1) + eps)
    normed = jnp.einsum("...d,...->...d", centred, size)  # see ``rms_norm``
    return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
