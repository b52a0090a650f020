"""What a run will need, before there is one: memory and time of a step from shapes alone.

Nothing is allocated or compiled. Bytes of weights are exact; those of activations are counted, see
``model/t5_cost.py``.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprompt import parallel
from jaxprompt.config import RunConfig, UserError
from jaxprompt.data.pipeline import round_target_length
from jaxprompt.data.tasks import resolve_task
from jaxprompt.model import family
from jaxprompt.model.load import open_config, rounded_at_load
from jaxprompt.model.work import Work
from jaxprompt.prompts.methods import METHODS
from jaxprompt.train.loop import CPU_POSITIONS, POSITIONS
from jaxprompt.train.optimizer import per_prompt
from jaxprompt.train.step import init_state

GIB = 2**30


class Device(NamedTuple):
    """What one device can do, by its vendor."""

    tflops: float  # in bfloat16, dense
    bandwidth: float  # GB/s of its memory
    memory: float  # GiB


# cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e; NVIDIA's sheets of A100 80GB, H100 and H200 SXM
DEVICES = {
    "tpu-v4": Device(275, 1200, 32),
    "tpu-v5e": Device(197, 819, 16),
    "tpu-v5p": Device(459, 2765, 95),
    "tpu-v6e": Device(918, 1640, 32),
    "a100": Device(312, 2039, 80),
    "h100": Device(989, 3350, 80),
    "h200": Device(989, 4800, 141),
}


class Layout(NamedTuple):
    """How a step is spread: rows over ``data``, heads, MLP and vocabulary over ``model``."""

    data: int
    model: int
    remat: bool


def layouts(devices: int, batch_size: int, axes: dict[str, int]) -> Iterator[Layout]:
    """All that are possible, cheapest first.

    Fewer devices on ``model`` send each other less, and remat computes the forward pass twice.
    """
    for remat in (False, True):
        for model in range(1, devices + 1):
            data = devices // model
            fits = data * model == devices and batch_size % data == 0
            if fits and all(size % model == 0 for size in axes.values()):
                yield Layout(data, model, remat)


def work_of(config: RunConfig, layout: Layout, inputs: int, targets: int, cpu: bool) -> Work:
    """Rows of the longest length that a device holds at a time, as the loop cuts batches."""
    rows = config.train.batch_size * len(config.members()) // layout.data
    some = rows
    if config.train.micro_batch is not None:
        some = max(config.train.micro_batch // layout.data, 1)
    elif rows * inputs > (most := CPU_POSITIONS if cpu else POSITIONS):
        fitting = [n for n in range(1, rows + 1) if rows % n == 0 and n * inputs <= most]
        some = max(fitting, default=1)
    return Work(some, rows // some, inputs, targets)


def weights(shape: family.Config, layout: Layout, trainable: bool) -> int:
    """Bytes of the frozen weights on a device."""
    model = family.of(shape)
    found = 0
    params, axes = model.abstract_params(shape), model.logical_axes(shape)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    for (path, leaf), named in zip(leaves, names, strict=True):
        cut = layout.model if any(parallel.RULES.get(str(name)) for name in named) else 1
        rounded = rounded_at_load(path[-1].key, shape, trainable)
        size = 2 if rounded or shape.activations == "bfloat16" else 4
        found += math.prod(leaf.shape) * size // cut
    return found


def plan_of(
    config: RunConfig,
    *,
    devices: int = 1,
    kind: str = "tpu-v4",
    memory: float | None = None,
    inputs: int | None = None,
) -> dict[str, Any]:
    """All layouts with their bytes, the cheapest that fits, FLOPs, and the floor of a step's time.

    kind: of a device, or "cpu", whose speed is not known. memory: GiB of one, instead of the
    kind's. inputs: positions of the longest row, prompt included; None: what the task allows.
    Raises UserError for methods and families that are not counted, and where no layout is possible.
    """
    if kind != "cpu" and kind not in DEVICES:
        raise UserError(f"--kind is {kind!r}; known are cpu, {', '.join(DEVICES)}.")
    cpu, device = kind == "cpu", DEVICES.get(kind, Device(0, 0, _memory_here()))
    limit = device.memory if memory is None else memory
    task = resolve_task(config.task)
    shape = open_config(config.backbone)
    inputs = inputs or config.prompt.length + task.max_input_length
    targets = round_target_length(4 if task.labels else task.max_target_length)
    cost = family.cost(shape)
    if cost is None or not METHODS[config.method].uses_prompt:
        raise UserError(
            f"{config.backbone!r} with method {config.method!r} is not counted: plan knows prompts "
            "on T5; measure a run of a few steps instead."
        )
    shape = replace(shape, dtype=config.model.dtype)
    axes = {"heads": shape.num_heads, "d_ff": shape.d_ff, "vocabulary": shape.vocab_size}
    batch = config.train.batch_size
    rows = []
    for layout in layouts(devices, batch, axes):
        own = replace(shape, remat=layout.remat, rows_in_turn=cpu and layout.model == 1)
        work = work_of(config, layout, inputs, targets, cpu)
        parts = {
            "weights": weights(own, layout, trainable=False),
            "state": state_bytes(config, own),
        }
        parts |= cost.activations(own, work, layout.model)
        total = sum(parts.values())
        rows.append({
            "data": layout.data, "model": layout.model, "remat": layout.remat,
            "rows at a time": work.rows, "parts": work.parts, **parts, "total": total,
            "fits": total <= limit * GIB,
        })  # fmt: skip
    if not rows:
        raise UserError(
            f"{devices} devices divide neither train.batch_size, {batch}, nor heads, MLP and "
            f"vocabulary ({axes}); choose another number of devices, or another batch size."
        )
    best = next((row for row in rows if row["fits"]), None)
    counted = cost.flops(shape, batch * len(config.members()), inputs, targets)
    report = {
        "backbone": config.backbone, "devices": devices, "kind": kind, "memory_gib": limit,
        "inputs": inputs, "targets": targets, "flops": counted, "layouts": rows, "best": best,
    }  # fmt: skip
    if best is not None and not cpu:
        operations = sum(counted.values()) * (4 / 3 if best["remat"] else 1)
        compute = operations / devices / (device.tflops * 1e12)
        reading = 2 * best["parts"] * best["weights"] / (device.bandwidth * 1e9)
        report["floor_seconds"] = max(compute, reading)
        report["bound_by"] = "arithmetic" if compute > reading else "reading weights"
    if best is not None:
        report["overrides"] = [
            f"mesh.data={best['data']}", f"mesh.model={best['model']}",
            f"model.remat={str(best['remat']).lower()}",
        ]  # fmt: skip
    return report


def _memory_here() -> float:
    """GiB of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def state_bytes(config: RunConfig, shape: family.Config) -> int:
    """Bytes of prompts, their gradient and the optimizer's state, which every device has."""
    method, optimizer = METHODS[config.method], per_prompt(config.train)
    start = np.zeros((len(config.members()), method.rows(config.prompt), shape.d_model), np.float32)
    params = family.of(shape).abstract_params(shape)
    state = jax.eval_shape(lambda p: init_state(method, optimizer, p, start, config.prompt), params)
    size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return size(state) + size(state.tree)
