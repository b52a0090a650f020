"""What a training step of a recipe costs on a mesh, from shapes alone: no weights are allocated.

    python scripts/bench/cost_step.py configs/paper/xxl.yaml --devices 16
    python scripts/bench/cost_step.py configs/paper/xl.yaml mesh.tensor=4 --devices 8 --inputs 256
    python scripts/bench/cost_step.py configs/paper/small.yaml --rows 2 \
        --devices 1 2 4 8 16 32 64 128 256

With several numbers of devices, a table: weak scaling, of so many rows a device.

The real step, of one member, is lowered and compiled for so many (emulated) devices with the
recipe's mesh. FLOPs
are those of the whole program before it is split; bytes of weights, arguments and temporaries are
those of one device. Temporaries are the CPU compiler's, which holds bfloat16 products in float32,
so they are an upper bound. The time is a roofline's: the larger of arithmetic at peak and of
reading the weights once forward and once backward; what is sent between devices is counted, not
timed: bytes that a device receives in a step, where all-reduce and the others go around a ring.
"""

import argparse
import functools
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # JAX is imported when its devices are set
    from jax.sharding import Mesh
    from jax.stages import Compiled

    from jaxprompt.config.schema import RunConfig
    from jaxprompt.data.batches import Batch
    from jaxprompt.models import registry
    from jaxprompt.training.step import TrainState, TrainStep

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("config", type=Path)
parser.add_argument("overrides", nargs="*")
parser.add_argument("--devices", type=int, nargs="+", default=[16])
parser.add_argument("--rows", type=int, help="rows a device, instead of the recipe's batch")
parser.add_argument("--inputs", type=int, default=512, help="text tokens a row")
parser.add_argument("--targets", type=int, default=8, help="target tokens a row")
# TPU v4: 275 TFLOP/s in bfloat16, 1,200 GB/s, 32 GiB a chip (cloud.google.com/tpu/docs/v4)
parser.add_argument("--peak", type=float, default=275, help="TFLOP/s of a device")
parser.add_argument("--bandwidth", type=float, default=1200, help="GB/s of a device's memory")
parser.add_argument("--memory", type=float, default=32, help="GiB of a device")

GIB = 2**30
RESULT = re.compile(
    r" = (?P<result>.*?) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s64": 8, "pred": 1, "s8": 1, "u8": 1}
# bytes that a device receives in a ring of n, as a share of the result's
RING = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


class Sent(NamedTuple):
    """One operation of a compiled program in which devices send each other something."""

    kind: str
    bytes: int  # of its result on a device
    received: float  # bytes that a device receives, around a ring


def collectives(program: str) -> list[Sent]:
    """What a compiled program sends; what is in a loop is there once."""
    operations = []
    for line in program.splitlines():
        match = RESULT.search(line)
        if match is None:
            continue
        size = sum(
            BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n)
            for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", match["result"])
        )
        groups = re.search(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])", line)
        count = 2
        if groups:
            count = int(groups[2]) if groups[2] else len(groups[1].split(","))
        if count > 1:
            operations.append(Sent(match["kind"], size, RING[match["kind"]](count) * size))
    return operations


class Program(NamedTuple):
    """A training step and the shapes of its arguments, each with its sharding on a mesh."""

    model: "registry.FamilyModel"
    mesh: "Mesh"
    make_step: Callable[..., "TrainStep"]  # of a model; mesh=: on a mesh
    params: "registry.Params"  # frozen ones
    state: "TrainState"
    batch: "Batch"

    @property
    def arguments(self) -> "tuple[TrainState, registry.Params, list[Batch]]":
        return self.state, self.params, [self.batch]


def cost(config: "RunConfig", devices: int, options: argparse.Namespace) -> dict[str, Any]:
    """Compile the step for so many devices and count."""
    import jax

    program = make_program(config, devices, options)
    begun = time.monotonic()
    step = program.make_step(program.model, mesh=program.mesh)
    lowered = jax.jit(step, donate_argnums=0).lower(*program.arguments)
    # counted unrolled, and before it is split: in a loop a layer's FLOPs would count once
    counted = program.make_step(program.model.with_runtime(unroll=True))
    flops = jax.jit(counted).lower(*program.arguments).cost_analysis()["flops"]
    print(f"{devices} devices: lowered; compiling", file=sys.stderr, flush=True)
    compiled = lowered.compile()
    seconds = time.monotonic() - begun
    weights = jax.tree.leaves(program.params or program.state.trainables)
    sizes = {
        "backbone": config.backbone,
        "method": config.method,
        "parameters": sum(x.size for x in weights),
        "trainable": sum(x.size for x in jax.tree.leaves(program.state.trainables)),
        "mesh": dict(program.mesh.shape),
        "rows x tokens": [*program.batch.inputs.shape, program.batch.targets.shape[1]],
    }
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in weights)
    return {
        **sizes,
        **counts(compiled, flops, held, devices, options),
        "compile_seconds": round(seconds, 1),
    }


def make_model(config: "RunConfig") -> "registry.FamilyModel":
    """The model of a recipe, without weights. Raises UserError where its shape is not known."""
    from jaxprompt.config.errors import UserError
    from jaxprompt.models import precision, registry
    from jaxprompt.models.t5.config import released

    shape = released(config.backbone)
    if shape is None:
        raise UserError(
            f"{config.backbone!r} is none of the released T5 1.1, whose shape is known."
        )
    dtype = precision.resolve_dtype(config.model.dtype, cpu=False)
    runtime = registry.Runtime(
        dtype=dtype, dropout=config.model.dropout, unroll=bool(config.model.unroll),
        remat=config.model.remat,
    )  # fmt: skip
    return registry.model_for(shape, runtime)


def make_program(config: "RunConfig", devices: int, options: argparse.Namespace) -> Program:
    """The recipe's step on so many devices; nothing is allocated."""
    import jax

    from jaxprompt.methods.registry import method_of
    from jaxprompt.runtime import parallel
    from jaxprompt.training.step import make_train_step, shardings
    from jaxprompt.training.trained_shapes import optimizer_of, trained_shapes

    config = config.members()[0]
    model, method = make_model(config), method_of(config)
    mesh = parallel.make_mesh(config.mesh, jax.devices()[:devices])
    size = options.rows * devices if options.rows else config.train.batch_size
    parallel.check_batch_size(size, mesh, "train.batch_size")
    kept = "bfloat16" if model.runtime.dtype == "bfloat16" else "float32"
    place = parallel.parameter_sharding(mesh)
    params = jax.tree.map(
        lambda x, axes: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(axes)),
        model.abstract_params(kept),
        model.logical_axes(),
    )
    (state,) = trained_shapes(config, model.config).states
    return Program(
        model=model,
        mesh=mesh,
        make_step=functools.partial(
            make_train_step,
            method=method,
            optimizer=optimizer_of([config]),
            z_loss=config.train.z_loss,
        ),
        # a whole model that is trained is in the state alone
        params=params if method.frozen else {},
        state=parallel.with_sharding(state, shardings(state, method, model, mesh)),
        batch=abstract_batch(mesh, size, config.prompt_length + options.inputs, options.targets),
    )


def abstract_batch(mesh: "Mesh", size: int, inputs: int, targets: int) -> "Batch":
    """Shapes of a batch of so many rows, inputs and targets, spread over a mesh."""
    import jax
    import jax.numpy as jnp

    from jaxprompt.data.batches import Batch
    from jaxprompt.runtime import parallel

    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(parallel.ROWS))
    array = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
    return Batch(
        inputs=array(size, inputs),
        segments=array(size, inputs),
        targets=array(size, targets),
        target_segments=array(size, targets),
        member=array(size),
        weights=array(size, targets, dtype=jnp.float32),
        dropout_seed=array(size),
    )


def counts(
    compiled: "Compiled", flops: float, held: int, devices: int, options: argparse.Namespace
) -> dict[str, Any]:
    """FLOPs, bytes and the roofline's time of a compiled step.

    Args:
        flops: of the whole program.
        held: bytes of weights on a device.
    """
    memory, sent = compiled.memory_analysis(), collectives(compiled.as_text())
    compute = flops / devices / (options.peak * 1e12)
    reading = 2 * held / (options.bandwidth * 1e9)
    return {
        "flops": flops,
        "flops_per_device": flops / devices,
        "weights_gib_per_device": round(held / GIB, 3),
        "arguments_gib_per_device": round(memory.argument_size_in_bytes / GIB, 3),
        "temporaries_gib_per_device": round(memory.temp_size_in_bytes / GIB, 3),
        "fits": memory.argument_size_in_bytes + memory.temp_size_in_bytes < options.memory * GIB,
        # in a loop, once for all of a stack's layers
        "collectives": dict(Counter(one.kind for one in sent)),
        "largest_collective": max((one.bytes for one in sent), default=0),
        "result_bytes": sum(one.bytes for one in sent),
        "received_bytes_per_device": round(sum(one.received for one in sent)),
        "roofline_ms": round(1e3 * max(compute, reading), 2),
        "bound_by": "arithmetic" if compute > reading else "reading weights",
    }


def main(options: argparse.Namespace) -> None:
    """One JSON object, or a table of several numbers of devices."""
    from jaxprompt.config.overrides import load_config

    config = load_config(options.config, options.overrides)
    if len(options.devices) == 1:
        print(json.dumps(cost(config, options.devices[0], options), indent=2))
        return
    print("| devices | mesh | rows | TFLOP a device | operations | bytes of results | received |")
    print("|---|---|---|---|---|---|---|")
    for devices in options.devices:
        result = cost(config, devices, options)
        mesh = " x ".join(map(str, result["mesh"].values()))
        kinds = ", ".join(f"{n} {kind}" for kind, n in result["collectives"].items()) or "none"
        print(
            f"| {devices} | {mesh} | {result['rows x tokens'][0]} "
            f"| {result['flops_per_device'] / 1e12:.3f} | {kinds} "
            f"| {result['result_bytes']:,} | {result['received_bytes_per_device']:,} |",
            flush=True,
        )


if __name__ == "__main__":
    chosen = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={max(chosen.devices)}"
    from jaxprompt.config.errors import UserError

    try:
        main(chosen)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
