"""What a step needs, counted from shapes, against what the compiler says that it takes."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCRIPTS
from jax.sharding import NamedSharding, PartitionSpec

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import MeshConfig, RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.batches import Batch
from jaxprompt.methods.registry import METHODS
from jaxprompt.models.base import Runtime
from jaxprompt.models.checkpoints.load import rounded_at_load
from jaxprompt.models.t5 import cost, t5
from jaxprompt.models.work import Work
from jaxprompt.runtime import parallel
from jaxprompt.training import plan
from jaxprompt.training.optimizer import per_member
from jaxprompt.training.plan import Layout, layouts, plan_of
from jaxprompt.training.step import init_state, make_train_step

WITHIN = 0.1  # of all bytes that a device needs


def config(**changes):
    task = {"name": "rows", "template": "{text}", "target": "{label}", "labels": ["yes", "no"],
            "train": "a.jsonl", "validation": "a.jsonl"}  # fmt: skip
    values = {"backbone": "google/t5-xxl-lm-adapt", "task": task, "output": "-"}
    return parse(RunConfig, values | changes)


SHAPES = {
    "small": t5.T5Config(
        vocab_size=32_128, d_model=512, num_heads=6, head_dim=64, d_ff=1024,
        num_encoder_layers=8, num_decoder_layers=8,
    ),
    "mixed": t5.T5Config(
        vocab_size=4096, d_model=512, num_heads=6, head_dim=64, d_ff=1024,
        num_encoder_layers=8, num_decoder_layers=8,
    ),
    "wide": t5.T5Config(
        vocab_size=4096, d_model=768, num_heads=12, head_dim=64, d_ff=2048,
        num_encoder_layers=6, num_decoder_layers=6,
    ),
}  # fmt: skip


def compiled(model, work, layout, prompt=20):
    """The compiled step of a layout's devices."""
    mesh = parallel.make_mesh(
        MeshConfig(data=layout.data, fsdp=layout.fsdp, tensor=layout.tensor),
        jax.devices()[: layout.ways * layout.tensor],
    )
    method, optimizer = METHODS["prompt-tuning"], per_member(config().train)
    place, everywhere = parallel.parameter_sharding(mesh), parallel.replicated(mesh)
    array = jax.ShapeDtypeStruct

    def held(path, leaf, axes):
        """As ``load_backbone`` rounds a weight and ``in_bits`` gives it to a step."""
        kind = leaf.dtype
        if rounded_at_load(path[-1].key, model.runtime, False):
            kind = np.uint16 if axes[0] == "layers" else jnp.bfloat16
        return array(leaf.shape, kind, sharding=place(axes))

    params = jax.tree_util.tree_map_with_path(held, model.abstract_params(), model.logical_axes())
    start = np.zeros((1, prompt, model.config.d_model), np.float32)
    state = jax.eval_shape(lambda p: init_state(method, optimizer, p, start), params)
    state = jax.tree.map(lambda x: array(x.shape, x.dtype, sharding=everywhere), state)
    rows = NamedSharding(mesh, PartitionSpec(parallel.ROWS))
    size, wide, deep = work.rows * layout.ways, work.inputs, work.targets
    one = lambda width, kind=np.int32: array((size, width), kind, sharding=rows)
    member = array((size,), np.int32, sharding=rows)
    batch = Batch(*map(one, (wide, wide, deep, deep)), member, one(deep, np.float32))
    step = make_train_step(model, method, optimizer, mesh=mesh)
    return jax.jit(step, donate_argnums=0).lower(state, params, [batch]).compile()


def bytes_of(program):
    memory = program.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize(
    ("name", "rows", "inputs"), [("small", 4, 256), ("small", 16, 96), ("wide", 8, 192)]
)
def test_bytes_are_those_of_the_compiled_step(name, rows, inputs, in_turn, remat):
    dtype = "mixed" if name == "mixed" else "float32"
    runtime = Runtime(dtype=dtype, remat=remat, per_example_attention=in_turn)
    model = t5.T5Model(SHAPES[name], runtime)
    work, layout = Work(rows, 1, inputs, 4), Layout(1, 1, 1, remat)
    counted = sum(plan.Weights.of(model, layout))
    counted += sum(cost.activations(model, work, 1).values())
    assert counted == pytest.approx(bytes_of(compiled(model, work, layout)), rel=WITHIN)


@pytest.mark.parametrize("remat", [False, True])
def test_bytes_of_a_mixed_step_on_a_cpu(remat):
    test_bytes_are_those_of_the_compiled_step("mixed", 8, 320, True, remat)


@pytest.mark.parametrize("layout", [(1, 2, 1), (1, 1, 2), (1, 2, 2), (2, 2, 1)])
def test_bytes_of_each_device_and_what_it_receives(layout, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS / "bench"))
    collectives = importlib.import_module("cost_step").collectives
    model, work, layout = t5.T5Model(SHAPES["small"]), Work(4, 1, 256, 4), Layout(*layout, False)
    parts, sent = plan.needs(model, work, layout)
    program = compiled(model, work, layout)
    assert sum(parts.values()) == pytest.approx(bytes_of(program), rel=WITHIN)
    # in the program a layer is there once, in a loop over all
    once = plan.Weights.of(model, layout).others * (layout.fsdp - 1)
    without_layers = model.with_config(num_encoder_layers=0, num_decoder_layers=0)
    once += cost.shared(without_layers, work, layout.tensor)
    received = sum(one.received for one in collectives(program.as_text())) - once
    assert sent == pytest.approx(once + model.config.num_encoder_layers * received, rel=WITHIN)


def test_layouts_divide_rows_widths_and_the_model():
    found = {layout[:3] for layout in layouts(4, 8, {"heads": 6, "vocabulary": 32_128}, 512)}
    assert found == {(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)}  # no heads over four
    assert {one[:3] for one in layouts(4, 2, {"heads": 6}, 511)} == {(2, 1, 2)}


def test_the_cheapest_comes_first():
    report = plan_of(config(backbone="google/t5-v1_1-small", train={"batch_size": 4}), devices=2,
                     kind="cpu", inputs=64)  # fmt: skip
    order = [(row["data"], row["remat"]) for row in report["layouts"]]
    assert order[0] == (2, False) and order == sorted(order, key=lambda one: (one[1], -one[0]))


def test_xxl_is_planned_for_16_chips():
    report = plan_of(config(model={"dtype": "bfloat16"}), devices=16, kind="tpu-v4")
    # that the count is the program's is tested on a small shape, in test_bench.py
    assert sum(report["flops"].values()) == pytest.approx(386e12, rel=0.01)
    best = report["best"]
    assert best["total"] < plan.USABLE * 32 * plan.GIB
    alone = [row["fits"] for row in report["layouts"] if row["data"] == 16]
    assert alone == [False, True]  # with remat
    assert (best["data"], best["fsdp"], best["tensor"], best["remat"]) == (8, 1, 2, False)
    assert 0.08 < report["floor_seconds"] < 0.1
    assert report["overrides"] == [
        "mesh.data=8", "mesh.fsdp=1", "mesh.tensor=2", "model.remat=false"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {"kind": "abacus"}, "--kind is 'abacus'; known are cpu, tpu-v4"),
        ({"method": "model-tuning"}, {}, "is not counted: plan knows prompts on T5"),
        ({"train": {"batch_size": 32}}, {"devices": 7}, "7 devices divide neither"),
        ({}, {"memory": float("nan")}, "--memory is nan; give the GiB"),
        ({}, {"memory": -1.0}, "--memory is -1.0; give the GiB"),
    ],
)
def test_what_cannot_be_planned_is_told(changes, options, words):
    with pytest.raises(UserError, match=words):
        plan_of(config(**changes), **options)


def test_a_flash_kernel_is_counted_as_what_it_keeps():
    """No logits; Pallas's, the bias's gradient of each row instead."""
    find = lambda flash, kind: {
        (row["data"], row["fsdp"], row["tensor"], row["remat"]): row
        for row in plan_of(config(model={"flash": flash}), devices=4, kind=kind)["layouts"]
    }
    for kind in ("h100", "tpu-v4"):
        plain, flash = find(False, kind), find(True, kind)
        assert {at for at in plain if at[2] == 1} == set(flash)  # a run refuses the others
        for at, row in flash.items():
            assert row["kept"] < plain[at]["kept"] and row["in_work"] < plain[at]["in_work"]
    gpu, tpu = find(True, "h100"), find(True, "tpu-v4")
    assert all(gpu[at]["in_work"] < tpu[at]["in_work"] for at in gpu)
    with pytest.raises(UserError, match="JAX runs on cpu"):
        find(True, "cpu")
