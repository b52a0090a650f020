"""Meshes, and what devices add up."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxprompt.config.schema import MeshConfig
from jaxprompt.runtime import parallel


def test_sums_of_parts_need_no_second_device_for_rows():
    """Devices of ``tensor`` alone share weights that are trained."""
    mesh = parallel.make_mesh(MeshConfig(data=1, fsdp=1, tensor=2), jax.devices()[:2])
    specs = {"w": PartitionSpec(None, "tensor"), "scale": PartitionSpec()}
    stacked = {"w": jnp.arange(8.0).reshape(1, 2, 4), "scale": jnp.ones((1, 3))}
    place = parallel.named_shardings(mesh, parallel.stacked_specs(specs))
    add = jax.jit(lambda x: parallel.psum_over_batch(x, mesh, specs))
    summed = add(jax.device_put(stacked, place))
    assert jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y[0]), summed, stacked))
