"""Activation functions, and the product of a gated MLP (Shazeer 2020, arXiv 2002.05202)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprompt.models.precision import from_bits, to_bits

# all are 0 at 0, so the zeros that pad a narrow adapter change nothing
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
}

# names of transformers, AdapterHub and a config's ``adapter.activation`` -> ours
HUGGING_FACE_NAMES = {
    "relu": "relu",
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "silu": "silu",
    "swish": "silu",
}


def gate(
    a: Float[Array, "*B F"], b: Float[Array, "*B F"], activation: str, mixed: bool = False
) -> Float[Array, "*B F"]:
    """The activation of ``a``, times ``b``. Only these two are kept for the gradient.

    mixed: they are kept in bfloat16; the next product rounds their gradients to it anyway.
    """
    return _gate(a, b, activation, mixed)


def _gated(a: jax.Array, b: jax.Array, activation: str, mixed: bool) -> jax.Array:
    return ACTIVATIONS[activation](a) * b


_gate = jax.custom_vjp(_gated, nondiff_argnums=(2, 3))


def _gate_forward(a, b, activation, mixed):
    residuals = (to_bits(a), to_bits(b), jnp.zeros((0,), a.dtype)) if mixed else (a, b, a)
    return _gated(a, b, activation, mixed), residuals


def _gate_backward(activation, mixed, residuals, cotangent):
    a, b, like = residuals
    if mixed:
        a, b = (from_bits(x).astype(like.dtype) for x in (a, b))
    return jax.vjp(lambda a, b: ACTIVATIONS[activation](a) * b, a, b)[1](cotangent)


_gate.defvjp(_gate_forward, _gate_backward)
