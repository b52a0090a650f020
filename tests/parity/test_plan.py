"""What a step needs, counted from shapes, against what the compiler says that it takes."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCRIPTS
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec

from jaxprompt.config.errors import UserError
from jaxprompt.config.methods import AdapterConfig, IA3Config, LoraConfig, PrefixConfig
from jaxprompt.config.schema import MeshConfig, PromptConfig, RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.batches import Batch
from jaxprompt.methods.adapter import adapter
from jaxprompt.methods.base import composed
from jaxprompt.methods.ia3 import ia3
from jaxprompt.methods.lora import lora
from jaxprompt.methods.prefix import prefix
from jaxprompt.methods.registry import METHODS
from jaxprompt.models import registry
from jaxprompt.models.base import Runtime
from jaxprompt.models.checkpoints.load import rounded_at_load
from jaxprompt.models.cost import NOTHING
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.injection import Injection
from jaxprompt.models.t5 import cost, t5
from jaxprompt.models.work import Work
from jaxprompt.runtime import parallel
from jaxprompt.training import plan
from jaxprompt.training.optimizer import per_member
from jaxprompt.training.plan import Layout, layouts, plan_of
from jaxprompt.training.step import batch_losses, init_state, make_train_step, shardings
from jaxprompt.training.trained_shapes import TrainedShapes

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


DECODER = DecoderConfig(
    vocab_size=4096, d_model=512, num_heads=6, num_kv_heads=2, head_dim=64, d_ff=1024, num_layers=8
)
PROMPT = METHODS["prompt-tuning"]


def compiled(model, work, layout, method=PROMPT, prompt=20):
    """The compiled step of a layout's devices, and the shapes of what it trains."""
    mesh = parallel.make_mesh(
        MeshConfig(data=layout.data, fsdp=layout.fsdp, tensor=layout.tensor),
        jax.devices()[: layout.ways * layout.tensor],
    )
    optimizer, place = per_member(config().train), parallel.parameter_sharding(mesh)
    array = jax.ShapeDtypeStruct

    def held(path, leaf, axes):
        """As ``load_backbone`` rounds a weight and ``in_bits`` gives it to a step."""
        kind = leaf.dtype
        if rounded_at_load(path[-1].key, model.runtime, False):
            kind = np.uint16 if axes[0] == "layers" else jnp.bfloat16
        return array(leaf.shape, kind, sharding=place(axes))

    params = jax.tree_util.tree_map_with_path(held, model.abstract_params(), model.logical_axes())
    start = np.zeros((1, prompt * method.uses_prompt, model.config.d_model), np.float32)
    state = jax.eval_shape(lambda p: init_state(method, optimizer, p, start), params)
    injection = jax.eval_shape(method.inject, state.trainables, params)
    trained = TrainedShapes((), injection, (state,), 0)
    state = parallel.with_sharding(state, shardings(state, method, model, mesh))
    rows = NamedSharding(mesh, PartitionSpec(parallel.ROWS))
    size, wide, deep = work.rows * layout.ways, work.inputs, work.targets
    one = lambda width, kind=np.int32: array((size, width), kind, sharding=rows)
    member = array((size,), np.int32, sharding=rows)
    batch = Batch(*map(one, (wide, wide, deep, deep)), member, one(deep, np.float32))
    step = make_train_step(model, method, optimizer, mesh=mesh)
    params = params if method.frozen else {}
    return jax.jit(step, donate_argnums=0).lower(state, params, [batch]).compile(), trained


def bytes_of(program):
    memory = program.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def planned(model, work, layout, trained):
    """Bytes of the plan."""
    parts, _ = plan.needs(model, work, layout, None, trained.injection)
    return sum(parts.values()) + trained.state_bytes(model, layout)


@pytest.mark.parametrize(
    ("name", "rows", "inputs", "in_turn", "remat"),
    [
        ("small", 4, 256, False, False),
        ("small", 16, 96, True, False),
        ("wide", 8, 192, False, True),
        ("small", 4, 256, True, True),
    ],
)
def test_bytes_are_those_of_the_compiled_step(name, rows, inputs, in_turn, remat):
    dtype = "mixed" if name == "mixed" else "float32"
    runtime = Runtime(dtype=dtype, remat=remat, per_example_attention=in_turn)
    model = t5.T5Model(SHAPES[name], runtime)
    work, layout = Work(rows, 1, inputs, 4), Layout(1, 1, 1, remat)
    counted = sum(plan.Weights.of(model, layout))
    counted += sum(cost.activations(model, work, 1).values())
    program, _ = compiled(model, work, layout)
    assert counted == pytest.approx(bytes_of(program), rel=WITHIN)


@pytest.mark.parametrize(
    ("shape", "method", "shared", "layout"),
    [
        (SHAPES["mixed"], METHODS["model-tuning"], 0, (1, 2, 1)),
        (SHAPES["mixed"], lora(LoraConfig()), 0, (1, 1, 1)),
        (DECODER, PROMPT, 20, (1, 1, 1)),
        (DECODER, METHODS["model-tuning"], 0, (1, 1, 1)),
    ],
    ids=["whole-fsdp", "lora", "decoder-only", "decoder-only-whole"],
)
def test_bytes_of_other_methods_and_decoder_only_models(shape, method, shared, layout, monkeypatch):
    model = registry.model_for(shape).with_layout(shared_prefix_length=shared)
    work, layout = Work(8, 1, 160, 6), Layout(*layout, False)
    program, trained = compiled(model, work, layout, method)
    counted = planned(model, work, layout, trained)
    assert counted == pytest.approx(bytes_of(program), rel=WITHIN)
    monkeypatch.syspath_prepend(str(SCRIPTS / "bench"))
    collectives = importlib.import_module("cost_step").collectives
    received = sum(one.received for one in collectives(program.as_text()))
    _, sent = plan.needs(model, work, layout, None, trained.injection)
    # embedding and head are gathered and their gradients scattered once, layers in a loop
    once = 2 * plan.Weights.of(model, layout, trained=True).others * (layout.fsdp - 1)
    loops = received - once if layout.fsdp > 1 else 0
    assert sent == pytest.approx((once + loops * SHAPES["mixed"].num_encoder_layers), rel=WITHIN)


def test_bytes_of_a_mixed_step_on_a_cpu():
    test_bytes_are_those_of_the_compiled_step("mixed", 8, 320, True, False)


@pytest.mark.parametrize("layout", [(1, 2, 1), (1, 2, 2)])
def test_bytes_of_each_device_and_what_it_receives(layout, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS / "bench"))
    collectives = importlib.import_module("cost_step").collectives
    model, work, layout = t5.T5Model(SHAPES["small"]), Work(4, 1, 256, 4), Layout(*layout, False)
    parts, sent = plan.needs(model, work, layout)
    program, _ = compiled(model, work, layout)
    assert sum(parts.values()) == pytest.approx(bytes_of(program), rel=WITHIN)
    # in the program a layer is there once, in a loop over all
    once = plan.Weights.of(model, layout).others * (layout.fsdp - 1)
    without_layers = model.with_config(num_encoder_layers=0, num_decoder_layers=0)
    once += cost.shared(without_layers, work, layout.tensor)
    received = sum(one.received for one in collectives(program.as_text())) - once
    assert sent == pytest.approx(once + model.config.num_encoder_layers * received, rel=WITHIN)


def products(jaxpr):
    """Floating-point operations of all matrix products of a program, norms not among them."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), (of_batch, _)) = equation.params["dimension_numbers"]
            left, right = (x.aval.shape for x in equation.invars)
            depth = math.prod(left[axis] for axis in contracted)
            if not contracted or len(left) == len(right) == len(contracted) + len(of_batch):
                continue  # rows are scaled or added up
            total += 2 * math.prod(equation.outvars[0].aval.shape) * depth
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            total += times * products(inner)
    return total


def traced(model, work, method, members=1, prompt=20):
    """Operations of the gradient, bytes that layers keep for it, and the shapes of an injection."""
    params, array = model.abstract_params(), jax.ShapeDtypeStruct
    start = np.zeros((members, prompt * method.uses_prompt, model.config.d_model), np.float32)
    trainables = jax.eval_shape(lambda p: method.init(p, start, PromptConfig(), 0), params)
    one = lambda width, kind=np.int32: array((work.rows, width), kind)
    wide, deep = work.inputs, work.targets
    batch = Batch(*map(one, (wide, wide, deep, deep)), array((work.rows,), np.int32),
                  one(deep, np.float32))  # fmt: skip

    def step(trainables, params, batch):
        def objective(trainables):
            injection = method.inject(trainables, params)
            return batch_losses(params, injection, model, batch, num_members=members)[0]

        loss, backward = jax.vjp(objective, trainables)
        return backward(loss), jax.tree.leaves(backward)

    program, (_, kept) = jax.make_jaxpr(step, return_shape=True)(trainables, params, batch)
    weights = {x.shape for x in jax.tree.leaves((params, trainables))}
    of_layers = [x for x in kept if x.shape[:1] == (LAYERS,) and len(x.shape) > 1]
    size = sum(x.size * x.dtype.itemsize for x in of_layers if x.shape not in weights)
    injection = jax.eval_shape(method.inject, trainables, params)
    return products(program.jaxpr), size, injection


LAYERS = 3
T5_TINY = t5.T5Config(
    vocab_size=512, d_model=64, num_heads=4, head_dim=24, d_ff=160,
    num_encoder_layers=LAYERS, num_decoder_layers=LAYERS,
)  # fmt: skip
DECODER_TINY = DecoderConfig(
    vocab_size=512, d_model=64, num_heads=4, num_kv_heads=2, head_dim=24, d_ff=160,
    num_layers=LAYERS,
)  # fmt: skip


PREFIX = prefix(PrefixConfig(length=5, mlp=None))


@pytest.mark.parametrize(
    ("shape", "method", "runtime", "members"),
    [
        (T5_TINY, PROMPT, {}, 1),
        (T5_TINY, METHODS["model-tuning"], {"dtype": "mixed"}, 1),
        (T5_TINY, lora(LoraConfig(targets="all", rank=2)), {"dtype": "bfloat16"}, 1),
        (T5_TINY, lora(LoraConfig(stacks=["decoder", "cross"], rank=2)), {}, 1),
        (T5_TINY, composed({"lora": lora(LoraConfig(rank=2)), "ia3": ia3(IA3Config())}), {}, 3),
        (T5_TINY, composed({"prompt": PROMPT, "adapter": adapter(AdapterConfig())}), {}, 1),
        (T5_TINY, PREFIX, {}, 1),
        (DECODER_TINY, PROMPT, {}, 2),
        (DECODER_TINY, METHODS["model-tuning"], {"dtype": "mixed"}, 1),
        (DECODER_TINY, composed({"lora": lora(LoraConfig(rank=2)), "p": PREFIX}),
         {}, 1),
    ],
    ids=["prompt", "whole-mixed", "lora-all-bfloat16", "lora-decoder", "lora-ia3-of-members",
         "prompt-adapter", "prefix", "decoder-only-prompts", "decoder-only-whole-mixed",
         "decoder-only-lora-prefix"],
)  # fmt: skip
def test_operations_and_what_layers_keep_are_those_of_the_traced_step(
    shape, method, runtime, members
):
    model = registry.model_for(shape, Runtime(**runtime))
    shared = 20 if method.uses_prompt and shape is DECODER_TINY else 0
    model, work = model.with_layout(shared_prefix_length=shared), Work(6, 1, 100, 5)
    operations, kept, injection = traced(model, work, method, members)
    counts = registry.cost(shape)
    counted = counts.flops(shape, work.rows, work.inputs, work.targets, injection, shared)
    assert sum(counted.values()) == operations
    saved = counts.activations(model, work, 1, injection)["saved_activations"]
    assert saved == pytest.approx(kept, rel=0.05)


def test_answers_as_long_as_half_a_head_have_keys_and_values_of_their_own():
    model, work = t5.T5Model(T5_TINY), Work(6, 1, 60, 16)
    operations, kept, _ = traced(model, work, PROMPT)
    assert sum(cost.flops(T5_TINY, 6, 60, 16).values()) == operations
    saved = cost.activations(model, work, 1)["saved_activations"]
    assert saved == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize(("shape", "shared"), [(T5_TINY, 0), (DECODER_TINY, 20)])
def test_a_rematerialised_step_repeats_its_layers_without_their_last_products(shape, shared):
    model = registry.model_for(shape, Runtime(remat=True)).with_layout(shared_prefix_length=shared)
    operations, _, injection = traced(model, Work(6, 1, 60, 5), PROMPT)
    counts, args = registry.cost(shape), (shape, 6, 60, 5, injection, shared)
    assert sum(counts.flops(*args).values()) + counts.recomputed(*args) == operations


def test_layouts_divide_rows_widths_and_the_model():
    found = {layout[:3] for layout in layouts(4, 8, {"heads": 6, "vocabulary": 32_128}, 512)}
    assert found == {(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)}  # no heads over four
    assert {one[:3] for one in layouts(4, 2, {"heads": 6}, 511)} == {(2, 1, 2)}


def test_the_cheapest_comes_first():
    report = plan_of(config(backbone="google/t5-v1_1-small", train={"batch_size": 4}), devices=2,
                     kind="cpu", inputs=64)  # fmt: skip
    order = [(row["data"], row["remat"]) for row in report["layouts"]]
    assert order[0] == (2, False) and order == sorted(order, key=lambda one: (one[1], -one[0]))


def test_a_report_says_what_is_trained_and_stored():
    grid = {"lora.rank": [4, 8]}
    report = plan_of(config(backbone="google/t5-v1_1-base", method="prompt+lora",
                            prompt={"population": grid}), kind="cpu")  # fmt: skip
    assert report["method"] == "prompt+lora"
    assert report["trained_parameters"] == 2 * 76_800 + 884_736 * 3 // 2
    assert report["stored_bytes"] == 4 * report["trained_parameters"]
    assert [member["lora.rank"] for member in report["members"]] == [4, 8]
    assert report["members"][1]["trained_parameters"] == 76_800 + 884_736


def test_a_search_counts_a_forward_pass_for_each_candidate():
    model, rows, wide, deep = registry.model_for(T5_TINY), 6, 100, 5
    array = lambda width: jax.ShapeDtypeStruct((rows, width), np.int32)
    bank = jax.ShapeDtypeStruct((1, 20, T5_TINY.d_model), np.float32)
    forward = lambda params, bank, *batch: model.logits(params, Injection(bank), *batch)
    batch = map(array, (wide, wide, deep, deep))
    program = jax.make_jaxpr(forward)(model.abstract_params(), bank, *batch)
    counted = registry.cost(T5_TINY).flops(T5_TINY, rows, wide, deep, NOTHING)
    assert sum(counted.values()) == products(program.jaxpr)
    plans = [
        plan_of(config(method="gcg", search={"swaps": swaps}), inputs=110)["flops"]
        for swaps in (3, 7)
    ]
    assert plans[1]["candidates"] == 2 * plans[0]["candidates"] > 0
    assert "candidates" not in plan_of(config(method="pez"), inputs=110)["flops"]


def test_a_whole_model_is_planned_over_fsdp():
    settings = {"method": "model-tuning", "train": {"optimizer": "adamw", "batch_size": 32}}
    rows = plan_of(config(backbone="google/t5-v1_1-xl", **settings), devices=8)["layouts"]
    at = {(row["data"], row["fsdp"], row["tensor"], row["remat"]): row for row in rows}
    alone, shared = at[8, 1, 1, True], at[1, 8, 1, True]
    assert not alone["fits"] and shared["fits"]
    assert alone["state"] == pytest.approx(3 * alone["weights"], rel=1e-3)
    assert shared["weights"] + shared["state"] == pytest.approx(
        (alone["weights"] + alone["state"]) / 8, rel=0.01
    )
    # three halves of a frozen backbone's products
    frozen = plan_of(config(backbone="google/t5-v1_1-xl", method="lora"), inputs=512)["flops"]
    whole = plan_of(config(backbone="google/t5-v1_1-xl", **settings), inputs=512)["flops"]
    for part in ("encoder, products with weights", "head"):
        assert whole[part] == 1.5 * frozen[part]


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
            assert all(row[key] < plain[at][key] for key in ("saved_activations", "workspace"))
    gpu, tpu = find(True, "h100"), find(True, "tpu-v4")
    assert all(gpu[at]["workspace"] < tpu[at]["workspace"] for at in gpu)
    with pytest.raises(UserError, match="JAX runs on cpu"):
        find(True, "cpu")
