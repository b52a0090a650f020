"""How much host memory loading a backbone takes, beside its parameters (Linux).

    python scripts/bench/measure_load_memory.py PATH_OR_HUB_ID [float32|bfloat16]
    python scripts/bench/measure_load_memory.py google/t5-xl-lm-adapt bfloat16 --random /tmp/xl
    python scripts/bench/measure_load_memory.py /tmp/xl bfloat16 --processes 2 --axis tensor

Prints one JSON object a process. ``ratio`` is the rise of its peak resident memory during the load
over the bytes of the parameters that it holds; on a CPU those are part of it, so 1.0 is the least
possible. With several processes each has one device of a mesh along ``--axis``, and ``beside`` is
what it took beyond its share, in units of the largest tensor in the files.
``--random DIRECTORY`` first writes a checkpoint of that shape there, of random bfloat16 numbers in
several files.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from jaxprompt.config.schema import MeshConfig
from jaxprompt.models import registry
from jaxprompt.models.checkpoints.hf_files import open_weights
from jaxprompt.models.checkpoints.load import load_backbone, open_config
from jaxprompt.models.checkpoints.save import save_hf
from jaxprompt.runtime import devices, parallel

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("path")
parser.add_argument("dtype", nargs="?", default="float32", choices=("float32", "bfloat16"))
parser.add_argument("--random", type=Path, help="directory for a random checkpoint")
parser.add_argument("--processes", type=int, default=1)
parser.add_argument("--axis", default="fsdp", choices=("fsdp", "tensor"))


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def write_random(name: str, folder: Path) -> None:
    """A checkpoint of the shape of ``name``, in files of 1 GB."""
    config, rng = open_config(name), np.random.default_rng(0)

    def draw(x):
        out = np.empty(x.size, ml_dtypes.bfloat16)
        for i in range(0, x.size, 2**22):
            part = out[i : i + 2**22]
            part[:] = rng.standard_normal(part.shape, np.float32)
        return out.reshape(x.shape)

    params = jax.tree.map(draw, registry.model_for(config).abstract_params())
    save_hf(folder, config, params, max_shard_bytes=10**9)


def measure(options: argparse.Namespace) -> None:
    """Load in this process, which may be one of several."""
    devices.start()
    mesh = None
    if options.processes > 1:
        mesh = parallel.make_mesh(MeshConfig(data=1, **{options.axis: options.processes}))
    jax.numpy.zeros(3).block_until_ready()  # the backend's own memory is not the load's
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, start = resident("VmRSS"), time.monotonic()
    params = load_backbone(options.path, dtype=options.dtype, mesh=mesh).params
    jax.block_until_ready(params)
    rise = resident("VmHWM") - before
    leaves = jax.tree.leaves(params)
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    tensors = open_weights(Path(options.path))[0] if Path(options.path).is_dir() else {}
    largest = max((np.prod(t.shape) * t.dtype.itemsize for t in tensors.values()), default=0)
    result = {
        "path": options.path,
        "dtype": options.dtype,
        "process": jax.process_index(),
        "of": jax.process_count(),
        "seconds": round(time.monotonic() - start, 2),
        "parameters_mb": round(sum(leaf.nbytes for leaf in leaves) / 1e6, 1),
        "held_mb": round(held / 1e6, 1),
        "largest_tensor_mb": round(float(largest) / 1e6, 1),
        "peak_rise_mb": round(rise / 1e6, 1),
        "ratio": round(rise / held, 3),
    }
    if largest:
        result["beside"] = round(float((rise - held) / largest), 2)
    print(json.dumps(result), flush=True)


def main() -> None:
    """Write, then measure in this process or in several."""
    options = parser.parse_args()
    if options.random:
        write_random(options.path, options.random)
        options.path = str(options.random)
    if options.processes == 1 or "JAX_PROCESS_ID" in os.environ:
        # what this process has allocated to write would be found again
        if options.random:
            os.execv(sys.executable, [sys.executable, __file__, options.path, options.dtype])
        measure(options)
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(options.processes)}
    told |= {"JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, __file__, options.path, options.dtype]
    command += ["--processes", str(options.processes), "--axis", options.axis]
    workers = [
        subprocess.Popen(command, env=os.environ | told | {"JAX_PROCESS_ID": str(n)})
        for n in range(options.processes)
    ]
    sys.exit(max(worker.wait() for worker in workers))


if __name__ == "__main__":
    main()
