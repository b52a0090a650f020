"""What a training step of a recipe costs on a mesh, from shapes alone: no weights are allocated.

    python scripts/cost_step.py configs/paper/xxl.yaml --devices 16
    python scripts/cost_step.py configs/paper/xl.yaml mesh.model=4 --devices 8 --inputs 256

The real step is lowered and compiled for so many (emulated) devices with the recipe's mesh. FLOPs
are those of the whole program before it is split; bytes of weights, arguments and temporaries are
those of one device. Temporaries are the CPU compiler's, which holds bfloat16 products in float32,
so they are an upper bound. The time is a roofline's: the larger of arithmetic at peak and of
reading the weights once forward and once backward; what is sent between devices is counted, not
timed.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("config", type=Path)
parser.add_argument("overrides", nargs="*")
parser.add_argument("--devices", type=int, default=16)
parser.add_argument("--inputs", type=int, default=512, help="text tokens a row")
parser.add_argument("--targets", type=int, default=8, help="target tokens a row")
# TPU v4: 275 TFLOP/s in bfloat16, 1,200 GB/s, 32 GiB a chip (cloud.google.com/tpu/docs/v4)
parser.add_argument("--peak", type=float, default=275, help="TFLOP/s of a device")
parser.add_argument("--bandwidth", type=float, default=1200, help="GB/s of a device's memory")
parser.add_argument("--memory", type=float, default=32, help="GiB of a device")

GIB = 2**30


def main(options: argparse.Namespace) -> None:
    """Compile, count, and print one JSON object."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxprompt import parallel
    from jaxprompt.config import UserError, load_config
    from jaxprompt.data.pipeline import Batch
    from jaxprompt.model import family
    from jaxprompt.model.t5_config import released
    from jaxprompt.prompts.methods import METHODS
    from jaxprompt.train.optimizer import per_prompt
    from jaxprompt.train.step import init_state, make_train_step

    config = load_config(options.config, options.overrides)
    shape = released(config.backbone)
    if shape is None:
        raise UserError(
            f"{config.backbone!r} is none of the released T5 1.1, whose shape is known."
        )
    numerics = {"dtype": config.model.dtype, "dropout": config.model.dropout}
    unroll = config.model.unroll in (None, True)
    shape = dataclasses.replace(shape, remat=config.model.remat, unroll=unroll, **numerics)
    mesh = parallel.make_mesh(config.mesh, jax.devices()[: options.devices])
    parallel.check_batch_size(config.train.batch_size, mesh, "train.batch_size")
    model, method, length = family.of(shape), METHODS[config.method], config.prompt.length
    kept = "bfloat16" if config.model.dtype == "bfloat16" else "float32"
    place = parallel.parameter_sharding(mesh)
    params = jax.tree.map(
        lambda x, axes: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(axes)),
        model.abstract_params(shape, kept),
        model.logical_axes(shape),
    )
    optimizer = per_prompt(config.train)
    start = np.zeros((1, method.rows(config.prompt), shape.d_model), np.float32)
    everywhere = parallel.replicated(mesh)
    state = jax.eval_shape(lambda p: init_state(method, optimizer, p, start, config.prompt), params)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), state
    )
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def array(width, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((config.train.batch_size, width), dtype, sharding=rows)

    wide, narrow = length + options.inputs, options.targets
    batch = Batch(*map(array, (wide, wide, narrow, narrow, narrow)), array(narrow, jnp.float32))
    step = make_train_step(shape, method, optimizer, z_loss=config.train.z_loss)

    begun = time.monotonic()
    lowered = jax.jit(step, donate_argnums=0).lower(state, params, [batch])
    # counted unrolled: in a loop a layer's FLOPs would count once
    flat = dataclasses.replace(shape, unroll=True)
    counted = make_train_step(flat, method, optimizer, z_loss=config.train.z_loss)
    flops = jax.jit(counted).lower(state, params, [batch]).cost_analysis()["flops"]
    print("lowered; compiling", file=sys.stderr, flush=True)
    compiled = lowered.compile()
    seconds = time.monotonic() - begun
    memory, text = compiled.memory_analysis(), compiled.as_text()
    sent = {
        kind: len(re.findall(rf" {kind}(?:-start)?\(", text))
        # in a loop, once for all of a stack's layers
        for kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
    }
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(params)
    )
    compute = flops / options.devices / (options.peak * 1e12)
    reading = 2 * held / (options.bandwidth * 1e9)
    print(json.dumps({
        "backbone": config.backbone,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "trainable": sum(x.size for x in jax.tree.leaves(state.tree)),
        "mesh": dict(mesh.shape),
        "rows x tokens": [config.train.batch_size, wide, narrow],
        "flops": flops,
        "flops_per_device": flops / options.devices,
        "weights_gib_per_device": round(held / GIB, 3),
        "arguments_gib_per_device": round(memory.argument_size_in_bytes / GIB, 3),
        "temporaries_gib_per_device": round(memory.temp_size_in_bytes / GIB, 3),
        "fits": memory.argument_size_in_bytes + memory.temp_size_in_bytes < options.memory * GIB,
        "collectives": {kind: count for kind, count in sent.items() if count},
        "roofline_ms": round(1e3 * max(compute, reading), 2),
        "bound_by": "arithmetic" if compute > reading else "reading weights",
        "compile_seconds": round(seconds, 1),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    chosen = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={chosen.devices}"
    from jaxprompt.config import UserError

    try:
        main(chosen)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
