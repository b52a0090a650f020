"""How much host memory loading a backbone takes, as a multiple of its parameters (Linux).

    python scripts/measure_load_memory.py PATH_OR_HUB_ID [float32|bfloat16]

Prints one JSON object. ``ratio`` is the rise of the process's peak resident memory during the load
over the bytes of the final parameters; on a CPU those are part of it, so 1.0 is the least possible.
"""

import json
import sys
import time
from pathlib import Path

import jax

from jaxprompt.model.load import load_backbone


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    path, dtype = sys.argv[1], (sys.argv[2:] or ["float32"])[0]
    jax.numpy.zeros(3).block_until_ready()  # the backend's own memory is not the load's
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, start = resident("VmRSS"), time.monotonic()
    params = load_backbone(path, dtype=dtype).params
    jax.block_until_ready(params)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    rise = resident("VmHWM") - before
    result = {
        "path": path,
        "dtype": dtype,
        "seconds": round(time.monotonic() - start, 2),
        "parameters_mb": round(sum(sizes) / 1e6, 1),
        "largest_leaf_mb": round(max(sizes) / 1e6, 1),
        "peak_rise_mb": round(rise / 1e6, 1),
        "ratio": round(rise / sum(sizes), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
