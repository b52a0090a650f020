"""The dtype of a run, and bfloat16 numbers that are stored as their bits."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt16

from jaxprompt.config.pretrain import PretrainConfig
from jaxprompt.config.schema import RunConfig

AnyConfig = TypeVar("AnyConfig", RunConfig, PretrainConfig)


def resolve_dtype(dtype: str | None, cpu: bool | None = None) -> str:
    """The dtype of a run. If it names none: mixed on accelerators, and float32 on CPUs."""
    cpu = jax.default_backend() == "cpu" if cpu is None else cpu
    return dtype or ("float32" if cpu else "mixed")


def resolve_config(config: AnyConfig) -> AnyConfig:
    """The config with the dtype that the run has on this backend."""
    model = config.model.model_copy(update={"dtype": resolve_dtype(config.model.dtype)})
    return config.model_copy(update={"model": model})


def to_bits(x: Float[Array, "..."]) -> UInt16[Array, "..."]:
    """The values rounded to bfloat16, as 16-bit integers with the same bits.

    XLA's CPU runtime (jax 0.10, 0.11) can neither read nor write a slice of a bfloat16 array in a
    loop: it would convert the whole array to float32 and back each time.
    """
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)


def from_bits(bits: UInt16[Array, "..."]) -> Float[Array, "..."]:
    """The bfloat16 numbers that have these bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
