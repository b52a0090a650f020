"""The dtype of a run, and bfloat16 numbers that are stored as their bits."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt16

from jaxprompt.config.pretrain import PretrainConfig
from jaxprompt.config.schema import RunConfig

AnyConfig = TypeVar("AnyConfig", RunConfig, PretrainConfig)


def resolve_dtype(dtype: str | None, cpu: bool | None = None) -> str:
    """The dtype of a run; one that names none is mixed on accelerators and float32 on CPUs."""
    cpu = jax.default_backend() == "cpu" if cpu is None else cpu
    return dtype or ("float32" if cpu else "mixed")


def resolve_config(config: AnyConfig) -> AnyConfig:
    """The run with the dtype that it has on this backend: what is kept of it names one."""
    model = config.model.model_copy(update={"dtype": resolve_dtype(config.model.dtype)})
    return config.model_copy(update={"model": model})


def to_bits(x: Float[Array, "..."]) -> UInt16[Array, "..."]:
    """Rounded to bfloat16, as its bits.

    XLA's CPU runtime (jax 0.10, 0.11) has no slice of bfloat16 in a loop, nor can it write one: it
    would turn all of the array to float32, and back, each time.
    """
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)


def from_bits(bits: UInt16[Array, "..."]) -> Float[Array, "..."]:
    """The bfloat16 numbers of these bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
