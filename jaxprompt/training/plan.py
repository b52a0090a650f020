"""What a run will need, before there is one: memory and time of a step from shapes alone.

Nothing is compiled, and no weights are allocated. Bytes of weights and of the state are exact;
those of activations are counted, see ``models/cost.py``.
"""

import functools
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from jaxprompt.config.errors import UserError
from jaxprompt.config.mixture import parts_of
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.config.values import Values
from jaxprompt.data.layout import round_target_length
from jaxprompt.data.tasks.registry import resolve_learnt
from jaxprompt.data.templates import place_prompt, split_template
from jaxprompt.models import precision, registry
from jaxprompt.models.checkpoints.load import open_config, rounded_at_load
from jaxprompt.models.cost import A_PROMPT, NOTHING
from jaxprompt.models.injection import Injection
from jaxprompt.models.ops import quantization
from jaxprompt.models.ops.attention import flash_attention
from jaxprompt.models.work import Work
from jaxprompt.runtime import parallel
from jaxprompt.training.label_losses import compares_labels
from jaxprompt.training.trained_shapes import TrainedShapes, trained_shapes

GIB = 2**30
USABLE = 0.9  # share of a device's memory; the rest is for its runtime and for gaps


class Device(NamedTuple):
    """What one device can do, by its vendor."""

    tflops: float  # in bfloat16, dense
    bandwidth: float  # GB/s of its memory
    memory: float  # GiB
    link: float  # GB/s that it receives from others of a slice or a server


# cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e; NVIDIA's sheets of A100 80GB, H100 and H200 SXM.
# Links: half of what is given for both directions; v4: all-reduce of a pod, by its chips
DEVICES = {
    "tpu-v4": Device(275, 1200, 32, 268),
    "tpu-v5e": Device(197, 819, 16, 200),
    "tpu-v5p": Device(459, 2765, 95, 600),
    "tpu-v6e": Device(918, 1640, 32, 400),
    "a100": Device(312, 2039, 80, 300),
    "h100": Device(989, 3350, 80, 450),
    "h200": Device(989, 4800, 141, 450),
}


class Layout(NamedTuple):
    """How a step is spread, see ``parallel.make_mesh``."""

    data: int
    fsdp: int
    tensor: int
    remat: bool

    @property
    def ways(self) -> int:
        """Devices that share a batch's rows."""
        return self.data * self.fsdp


def layouts(
    devices: int, batch_size: int, widths: dict[str, int], d_model: int
) -> Iterator[Layout]:
    """All that are possible: rows, ``widths`` and the model's width must divide."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for tensor, fsdp in itertools.product(divisors, divisors):
        data = devices // (tensor * fsdp)
        if data * fsdp * tensor != devices or batch_size % (data * fsdp) or d_model % fsdp:
            continue
        if all(size % tensor == 0 for size in widths.values()):
            yield from (Layout(data, fsdp, tensor, remat) for remat in (False, True))


def work_of(config: RunConfig, layout: Layout, inputs: int, targets: int, cpu: bool) -> Work:
    """Rows of the longest length that a device holds at a time, as the loop cuts batches."""
    rows = config.train.batch_size * len(config.members()) // layout.ways
    micro_rows = rows
    if config.train.micro_batch_size is not None:
        micro_rows = max(config.train.micro_batch_size // layout.ways, 1)
    elif rows * inputs > (
        max_positions := parallel.max_positions(
            cpu, shared=config.train.length_bucketing_window == 0
        )
    ):
        fitting = [n for n in range(1, rows + 1) if rows % n == 0 and n * inputs <= max_positions]
        micro_rows = max(fitting, default=1)
    return Work(micro_rows, rows // micro_rows, inputs, targets)


@functools.lru_cache(maxsize=4)
def _parameters(shape: registry.Config) -> "list[Parameter]":
    """All parameters of a model: the same for all layouts."""
    model = registry.model_for(shape)
    leaves, _ = jax.tree_util.tree_flatten_with_path(model.abstract_params())
    names = jax.tree.leaves(model.logical_axes(), is_leaf=lambda x: isinstance(x, tuple))
    return [
        Parameter(path[-1].key, leaf.shape, axes)
        for (path, leaf), axes in zip(leaves, names, strict=True)
    ]


class Parameter(NamedTuple):
    """One weight of a model, all layers of it together."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical ones


class Weights(NamedTuple):
    """Bytes of a model's weights on a device."""

    layers: int
    others: int  # embedding and head

    @classmethod
    def of(
        cls,
        model: registry.FamilyModel,
        layout: Layout,
        small: str | None = None,
        *,
        trained: bool = False,
    ) -> "Weights":
        """Those of a model on a layout's devices.

        Args:
            small: ``model.quantization``.
            trained: the weights are trained, so they are float32.
        """
        total = {True: 0, False: 0}
        for name, shape, named in _parameters(model.config):
            axes = {parallel.RULES.get(str(axis)) for axis in named}
            cut = math.prod(getattr(layout, axis) for axis in ("fsdp", "tensor") if axis in axes)
            size = 2 if rounded_at_load(name, model.runtime, trained) else 4
            size = 2 if model.runtime.activations == "bfloat16" and not trained else size
            if small is not None and name in quantization.MATMUL_WEIGHTS:
                size = quantization.bytes_each(small, named, shape)
            total[named[0] == "layers"] += int(math.prod(shape) * size) // cut
        return cls(total[True], total[False])


def needs(
    model: registry.FamilyModel,
    work: Work,
    layout: Layout,
    small: str | None = None,
    injection: Injection = A_PROMPT,
) -> tuple[dict[str, int], int]:
    """Bytes that a device holds, by part, and that it receives in a step for weights and layers.

    Args:
        small: ``model.quantization``.
        injection: the shapes of what is trained.
    """
    trained = injection.params is not None
    cost, held = registry.cost(model.config), Weights.of(model, layout, small, trained=trained)
    depth = cost.depth(model.config)
    parts = {"weights": sum(held), **cost.activations(model, work, layout.tensor, injection)}
    gathered = 0
    if small is not None:  # one dequantized layer, and the head
        dense = Weights.of(model, layout)
        parts["workspace"] += dense.layers * layout.fsdp // depth
        parts["workspace"] += dense.others * layout.fsdp // 2
    if layout.fsdp > 1:
        # gathered at the same time: the head, a layer, and the next layer while it arrives
        parts["workspace"] += 2 * held.layers * layout.fsdp // depth
        others = held.others * layout.fsdp
        if trained:  # embedding and head, and their gradients before each device gets its part
            parts["workspace"] += 2 * others
        else:
            parts["workspace"] += others // (1 if model.config.tied else 2)
        # each layer is gathered in the forward and in the backward pass
        gathered = (2 * held.layers + held.others) * (layout.fsdp - 1)
        if trained:  # gradients of whole weights are added up, and each device gets its part
            gathered += sum(held) * (layout.fsdp - 1)
    return parts, work.parts * (gathered + cost.shared(model, work, layout.tensor))


class Machine(NamedTuple):
    """The devices that a plan is for."""

    num_devices: int
    kind: str  # of DEVICES, or "cpu", whose speed is not known
    device: Device
    memory: float  # GiB of one device

    @property
    def cpu(self) -> bool:
        return self.kind == "cpu"

    @property
    def backend(self) -> str:
        """The name that JAX has for devices of this kind."""
        return "cpu" if self.cpu else "tpu" if self.kind.startswith("tpu") else "gpu"


def _machine(count: int, kind: str, memory: float | None) -> Machine:
    """The machine of a user's options; raises UserError where they name none."""
    if kind != "cpu" and kind not in DEVICES:
        raise UserError(f"--kind is {kind!r}; known are cpu, {', '.join(DEVICES)}.")
    device = DEVICES.get(kind, Device(0, 0, _memory_here(), 0))
    limit = device.memory if memory is None else memory
    if not 0 < limit < math.inf:
        raise UserError(f"--memory is {limit}; give the GiB of a device, a number above 0.")
    return Machine(count, kind, device, limit)


class Workload(NamedTuple):
    """What each step of a run computes, however it is spread."""

    shape: registry.Config
    dtype: str  # that it is computed in
    inputs: int  # positions of the longest row, prompt included
    targets: int
    shared_prefix: int  # positions that are computed once for all rows of a member
    flash: str  # the attention kernel, or ""
    flops: dict[str, float]  # of a step, by part
    recomputed: float  # operations that rematerialised layers take beside
    trained: TrainedShapes


def _workload(config: RunConfig, machine: Machine, inputs: int | None) -> Workload:
    """The work of a run's steps."""
    members = config.members()
    tasks = [resolve_learnt(member.task) for member in members]
    shape = open_config(config.backbone)
    inputs = inputs or max(
        member.prompt_length + part.max_input_length
        for member, task in zip(members, tasks, strict=True)
        for part in parts_of(task)
    )
    # where a loss compares labels, the tree of all of them is read
    of_labels = lambda labels: 4 * (len(labels) if compares_labels(config.train) else 1)
    longest_target = max(
        of_labels(part.labels) if part.labels else part.max_target_length
        for task in tasks
        for part in parts_of(task)
    )
    targets = round_target_length(longest_target)
    cost, rows = registry.cost(shape), config.train.batch_size * len(members)
    dtype = precision.resolve_dtype(config.model.dtype, machine.cpu)
    other = registry.one_sequence(shape) or registry.masked(shape)
    if other and config.model.flash:
        raise UserError(
            f"model.flash is on, and {config.backbone} is no T5; flash kernels are there for the "
            "encoder of a T5, leave the key out."
        )
    flash = flash_attention.kernel(config.model.flash, dtype, None, machine.backend)
    trained = trained_shapes(config, shape)
    prefix = min(_shared_prefix(config, shape, tasks), inputs)
    flops = cost.flops(shape, rows, inputs, targets, trained.injection, prefix)
    recomputed = cost.recomputed(shape, rows, inputs, targets, trained.injection, prefix)
    flops["making what is injected"] = trained.network_flops
    if config.method == "gcg":
        # forward alone; a prompt that a decoder-only model computes once is counted in each row
        tried = rows * (config.search.swaps + 1)
        flops["candidates"] = sum(cost.flops(shape, tried, inputs, targets, NOTHING).values())
    return Workload(shape, dtype, inputs, targets, prefix, flash, flops, recomputed, trained)


def _shared_prefix(config: RunConfig, shape: registry.Config, tasks: Sequence[TaskConfig]) -> int:
    """The vectors that are computed once for all rows, see ``registry.with_shared_prefix``."""
    lengths = {member.prompt_length for member in config.members()}
    if not registry.one_sequence(shape) or config.model.attention == "prefix" or len(lengths) > 1:
        return 0
    length = lengths.pop()
    parts = [part for task in tasks for part in parts_of(task)]
    # vectors that start from words stand within the text, and only a tokenizer counts them
    if any(piece.virtual == -2 for part in parts for piece in split_template(part.template)):
        return 0
    first = {place_prompt(part.template, length)[0].virtual for part in parts}
    return length if first == {length} else 0


def _candidate(config: RunConfig, machine: Machine, workload: Workload, layout: Layout) -> Values:
    """Bytes and times of a step in one layout, as a row of the report."""
    one_tensor = layout.tensor == 1
    runtime = registry.Runtime(
        dtype=workload.dtype,
        remat=layout.remat,
        per_example_attention=machine.cpu and one_tensor,
        flash=workload.flash,
    )
    model = registry.model_for(workload.shape, runtime)
    model = model.with_layout(shared_prefix_length=workload.shared_prefix)
    work = work_of(config, layout, workload.inputs, workload.targets, machine.cpu)
    trained = workload.trained
    held, sent = needs(model, work, layout, config.model.quantization, trained.injection)
    state = trained.state_bytes(model, layout, work.parts)
    parts = {"weights": held.pop("weights"), "state": state, **held}
    sent += trained.gradient_traffic(model, layout)
    total = sum(parts.values())
    seconds = {}
    if not machine.cpu:
        device = machine.device
        flops = sum(workload.flops.values()) + layout.remat * workload.recomputed
        read = 2 * work.parts * parts["weights"] * layout.fsdp
        seconds = {
            "arithmetic": flops / machine.num_devices / (device.tflops * 1e12),
            "reading weights": read / (device.bandwidth * 1e9),
            "what devices send": sent / (device.link * 1e9),
        }
    return {
        **layout._asdict(), "rows at a time": work.rows, "parts": work.parts, **parts,
        "total": total, "fits": total <= machine.memory * GIB * USABLE, "sent": sent,
        "seconds": seconds,
    }  # fmt: skip


def _cost_order(row: Values) -> tuple[float, ...]:
    """Cheapest first: where nothing overlaps, and of those that take as long, the simplest."""
    return sum(row["seconds"].values()), row["remat"], row["sent"], row["tensor"], row["fsdp"]


def plan_of(
    config: RunConfig,
    *,
    devices: int = 1,
    kind: str = "tpu-v4",
    memory: float | None = None,
    inputs: int | None = None,
) -> Values:
    """All layouts with their bytes, the cheapest that fits, FLOPs, and the floor of a step's time.

    Args:
        kind: of a device, or "cpu", whose speed is not known.
        memory: GiB of a device, instead of the kind's.
        inputs: positions of the longest row, prompt included; None: what the task allows.

    Raises:
        UserError: a run could not have these settings, or no layout is possible.
    """
    machine = _machine(devices, kind, memory)
    workload = _workload(config, machine, inputs)
    shape, batch = workload.shape, config.train.batch_size
    widths = {"heads": shape.num_heads, "d_ff": shape.d_ff, "vocabulary": shape.vocab_size}
    rows = [
        _candidate(config, machine, workload, layout)
        for layout in layouts(devices, batch, widths, shape.d_model)
        if layout.tensor == 1 or not workload.flash  # a run refuses such a kernel
    ]
    if not rows:
        raise UserError(
            f"{devices} devices divide neither train.batch_size, {batch}, nor heads, MLP and "
            f"vocabulary ({widths}); choose another number of devices, or another batch size."
        )
    rows.sort(key=_cost_order)
    best = next((row for row in rows if row["fits"]), None)
    report = {
        "backbone": config.backbone, "method": config.method, **_trained(config, workload.trained),
        "devices": devices, "kind": kind,
        "memory_gib": machine.memory, "inputs": workload.inputs, "targets": workload.targets,
        "flops": workload.flops, "layouts": rows, "best": best,
    }  # fmt: skip
    return report if best is None else report | _advice(best, machine)


def _trained(config: RunConfig, trained: TrainedShapes) -> Values:
    """What is trained and what of it is stored, of all members and of each."""
    figures = [
        {"trained_parameters": member.parameters, "stored_bytes": member.stored_bytes}
        for member in trained.members
    ]
    total = {key: sum(each[key] for each in figures) for key in figures[0]}
    pairs = zip(config.choices(), figures, strict=True)
    members = [{**choice, **each} for choice, each in pairs]
    return total | ({"members": members} if len(members) > 1 else {})


def _advice(best: Values, machine: Machine) -> Values:
    """What bounds a step in the best layout, and the overrides that choose it."""
    advice: Values = {}
    if not machine.cpu:
        advice["bound_by"] = max(best["seconds"], key=best["seconds"].get)
        advice["floor_seconds"] = best["seconds"][advice["bound_by"]]
    advice["overrides"] = [
        f"mesh.data={best['data']}", f"mesh.fsdp={best['fsdp']}",
        f"mesh.tensor={best['tensor']}", f"model.remat={str(best['remat']).lower()}",
    ]  # fmt: skip
    return advice


def _memory_here() -> float:
    """GiB of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
