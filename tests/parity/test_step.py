import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_step import D, P, V, concatenated, examples, prompts, run, trainer

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import MeshConfig
from jaxprompt.data.batches import make_batch, pack_batch
from jaxprompt.data.layout import BatchBudget
from jaxprompt.data.microbatches import micro_batches
from jaxprompt.methods.registry import METHODS
from jaxprompt.models import registry
from jaxprompt.models.base import Model
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.injection import Injection
from jaxprompt.models.t5 import t5
from jaxprompt.runtime import parallel
from jaxprompt.training.step import (
    batch_losses,
    first_state,
    init_state,
    shardings,
)


def sharing(model):
    """The model for batches whose rows up to six examples share."""
    model = model.with_runtime(per_example_attention=True)
    return model.with_layout(packed_widths=(5, 9, 16), examples_per_row=6)


def test_the_gradient_equals_finite_differences(tiny):
    model, params = tiny
    batch = make_batch(examples(3))
    loss = jax.jit(
        lambda b: batch_losses(params, Injection(b), model, batch, num_members=1, z_loss=1e-4)[0]
    )
    bank = jnp.asarray(prompts(1))
    direction = jax.random.normal(jax.random.key(1), bank.shape)
    slope = float((jax.jit(jax.grad(loss))(bank) * direction).sum())
    eps = 1e-2
    measured = float(loss(bank + eps * direction) - loss(bank - eps * direction)) / (2 * eps)
    assert slope == pytest.approx(measured, rel=2e-3)


def test_training_lowers_the_loss_and_leaves_the_backbone_bit_identical(tiny):
    model, params = tiny
    before = jax.tree.map(np.array, params)
    ids = jnp.asarray(make_batch([e._replace(inputs=e.inputs[P:]) for e in examples(4)]).inputs)
    output = np.array(jax.jit(lambda p: model.encode(p, Injection(), ids, (ids > 0) * 1))(params))
    batch = make_batch(examples(8))
    first = float(run(tiny, [batch], prompts(1))[1].loss[0])
    last = float(run(tiny, [batch] * 60, prompts(1))[1].loss[0])
    assert last < 0.8 * first
    jax.tree.map(np.testing.assert_array_equal, before, params)
    again = np.array(jax.jit(lambda p: model.encode(p, Injection(), ids, (ids > 0) * 1))(params))
    np.testing.assert_array_equal(output, again)


@pytest.mark.parametrize(("name", "dropout"), [("adafactor-t5x", 0), ("adamw", 0), ("adamw", 0.2)])
def test_prompts_trained_together_equal_prompts_trained_alone(tiny, name, dropout):
    """Three prompts with batches of different sizes in one step, against three runs."""
    counts, starts = (2, 5, 3), prompts(3)
    tiny = tiny[0].with_runtime(dropout=dropout), tiny[1]
    together = [
        concatenated(*(
            make_batch(examples(n, member=k, seed=s), input_length=32, target_length=4)
            for k, n in enumerate(counts)
        ))
        for s in range(4)
    ]  # fmt: skip
    settings = {"name": name, "rate": 0.05}
    tree = run(tiny, together, starts, **settings)[0].trainables["prompt"]
    for k, n in enumerate(counts):
        alone = []
        for s in range(4):
            own = [
                e._replace(inputs=np.where(e.inputs >= V, e.inputs - k * P, e.inputs), member=0)
                for e in examples(n, member=k, seed=s)
            ]
            alone.append(make_batch(own, rows=5, input_length=32, target_length=4))
        single = run(tiny, alone, starts[k : k + 1], **settings)[0].trainables["prompt"]
        np.testing.assert_allclose(tree[k], single[0], rtol=2e-4, atol=2e-4)


def test_a_packed_batch_has_the_loss_and_gradient_of_its_unpacked_rows(tiny):
    model, params = tiny
    rows = examples(4)
    value = jax.jit(
        jax.value_and_grad(
            lambda bank, batch: batch_losses(params, Injection(bank), model, batch, num_members=1)[
                0
            ]
        )
    )
    plain, packed = make_batch(rows), pack_batch([rows[:2], rows[2:]])
    (a, grad_a), (b, grad_b) = (value(jnp.asarray(prompts(1)), x) for x in (plain, packed))
    assert float(a) == pytest.approx(float(b), rel=1e-5)
    np.testing.assert_allclose(grad_a, grad_b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("method", ["prompt-tuning", "model-tuning"])
def test_a_step_on_micro_batches_equals_one_on_the_whole_batch(tiny, method, dropout):
    """Two prompts of very different shares."""
    model = tiny[0].with_runtime(dropout=dropout)
    whole = method == "model-tuning"
    rows = [*examples(6), *([] if whole else examples(2, member=1))]
    if whole:
        rows = [e._replace(inputs=e.inputs[P:]) for e in rows]
    plain = [make_batch(rows, target_length=4)]
    parts = micro_batches(rows, rows=2, target_length=4)
    assert len({b.inputs.shape for b in parts}) <= 2 and len(parts) == len(rows) // 2
    start = np.zeros((1, 0, D), np.float32) if whole else prompts(2)
    settings = {"method": method, "name": "adamw", "rate": 0.01}
    a, b = (run((model, tiny[1]), [batches], start, **settings) for batches in (plain, parts))
    np.testing.assert_allclose(a[1].loss, b[1].loss, rtol=1e-5)
    # Adam's first step is the gradient's sign: its moments show the gradient itself
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(a[1].accuracy, b[1].accuracy)
    jax.tree.map(same, a[0].optimizer, b[0].optimizer)


@pytest.mark.parametrize("shared", [False, True])
def test_a_step_on_micro_batches_of_different_depths_equals_one_on_the_whole_batch(tiny, shared):
    """One target of 20 tokens; its part is cut again, into rows of which some are empty."""
    model = tiny[0].with_runtime(dropout=0.2)
    rows = [*examples(4), *examples(3, member=1)]
    long = np.random.default_rng(0).integers(3, V, 20).astype(np.int32)
    rows.insert(2, examples(5)[4]._replace(targets=long))
    ours, more = model, {"budget": BatchBudget(targets=60)}
    if shared:
        ours = sharing(model)
        more = {"layout": ours.layout}
    parts = micro_batches(rows, rows=4, target_length=(4, 20), **more)
    depths = [(len(part.inputs), part.targets.shape[1]) for part in parts]
    assert sorted(depths) == ([(1, 4), (1, 20)] if shared else [(2, 20), (2, 20), (4, 4)])
    settings = {"name": "adamw", "rate": 0.01}
    a = run((model, tiny[1]), [make_batch(rows, target_length=20)], prompts(2), **settings)
    b = run((ours, tiny[1]), [parts], prompts(2), **settings)
    np.testing.assert_allclose(a[1].loss, b[1].loss, rtol=1e-5)
    # Adam's first step is the gradient's sign: its moments show the gradient itself
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    jax.tree.map(same, a[0].optimizer, b[0].optimizer)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("method", ["prompt-tuning", "model-tuning"])
def test_a_step_on_shared_rows_equals_one_on_the_whole_batch(tiny, method, devices, dropout):
    """Two prompts of different shares; full fine-tuning has gradients for the relative bias."""
    whole = method == "model-tuning"
    tiny = tiny[0].with_runtime(dropout=dropout), tiny[1]
    rows = examples(8) if whole else [*examples(5), *examples(3, member=1)]
    if whole:
        rows = [e._replace(inputs=e.inputs[P:]) for e in rows]
    model = sharing(tiny[0])
    parts = micro_batches(rows, rows=4, target_length=4, layout=model.layout, devices=devices)
    assert [b.inputs.shape for b in parts] == [(devices, 64)] * 2 and len(parts[0].targets) >= 4
    mesh = parallel.make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    start = np.zeros((1, 0, D), np.float32) if whole else prompts(2)
    settings = {"method": method, "name": "adamw", "rate": 0.01}
    a = run(tiny, [make_batch(rows, target_length=4)], start, **settings)
    params = jax.device_put(tiny[1], parallel.replicated(mesh))
    b = run((model, params), [parts], start, put=lambda b: parallel.put_batch(b, mesh),
            mesh=mesh, **settings)  # fmt: skip
    np.testing.assert_allclose(a[1].loss, b[1].loss, rtol=1e-5)
    np.testing.assert_array_equal(a[1].accuracy, b[1].accuracy)
    # Adam's first step is the gradient's sign: its moments show the gradient itself
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    jax.tree.map(same, a[0].optimizer, b[0].optimizer)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 1, 2), (1, 4, 1), (1, 2, 2), (2, 2, 1)])
def test_a_sharded_step_equals_a_step_on_one_device(tiny, shape, by_rows):
    model = tiny[0].with_config(vocab_size=60, num_heads=4)
    params = jax.jit(t5.init_params, static_argnums=0)(model.config, jax.random.key(0))
    rows = [e._replace(inputs=np.where(e.inputs >= V, e.inputs - 1, np.minimum(e.inputs, 59)),
                       targets=np.minimum(e.targets, 59)) for e in examples(8)]  # fmt: skip
    batches = [[make_batch(rows), make_batch(rows[:4])]] * 3
    single, _ = run((model, params), batches, prompts(1))
    mesh = parallel.make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    rule = parallel.parameter_sharding(mesh)
    axes = model.logical_axes()
    if by_rows and shape[1:] == (1, 1):
        model = model.with_runtime(per_example_attention=True)
    placed = jax.tree.map(lambda x, a: jax.device_put(x, rule(a)), params, axes)
    sharded, _ = run(
        (model, placed), batches, prompts(1), put=lambda b: parallel.put_batch(b, mesh),
        mesh=mesh if by_rows else None,
    )  # fmt: skip
    np.testing.assert_allclose(
        single.trainables["prompt"], sharded.trainables["prompt"], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("shape", "name"), [((2, 2, 1), "adafactor"), ((1, 2, 2), "adamw")])
def test_a_model_that_devices_share_is_trained_as_on_one(tiny, shape, name):
    """Each holds its part of weights and moments, and the step's outcome stays what it was."""
    model = tiny[0].with_config(vocab_size=60, num_heads=4).with_runtime(dropout=0.1)
    params = jax.jit(t5.init_params, static_argnums=0)(model.config, jax.random.key(0))
    rows = [e._replace(inputs=np.minimum(e.inputs[P:], 59), targets=np.minimum(e.targets, 59))
            for e in examples(8)]  # fmt: skip
    batches = [[make_batch(rows)], [make_batch(rows), make_batch(rows[:4])]]
    start = np.zeros((1, 0, D), np.float32)
    settings = {"method": "model-tuning", "name": name, "rate": 1e-3}
    alone, losses = run((model, params), batches, start, **settings)

    method, mesh = METHODS["model-tuning"], make_mesh(shape)
    optimizer, step = trainer(model, mesh=mesh, **settings)
    state = first_state(method.init(params, start, None, 0), method, optimizer, model, mesh)
    place = shardings(state, method, model, mesh)
    for batch in batches:
        state, found = step(state, {}, parallel.put_batch(batch, mesh))
        for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(place), strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)
    np.testing.assert_allclose(found.loss, losses.loss, rtol=1e-5)
    # the sign of a gradient that is 0 but for rounding decides a step of Adam
    for a, b in zip(
        jax.tree.leaves(alone.trainables), jax.tree.leaves(state.trainables), strict=True
    ):
        assert np.abs(a - b).max() < 1e-3 and np.abs(a - b).mean() < 1e-5
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    jax.tree.map(near, alone.optimizer, state.optimizer)
    parts = shape[1] * shape[2]
    wi = state.trainables["encoder"]["layers"]["mlp"]["wi_0"]
    assert wi.addressable_shards[0].data.size == wi.size // parts
    held = lambda tree: sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(tree))
    whole = sum(x.size for x in jax.tree.leaves(state))
    assert held(state) < whole * (1 / parts + 0.1)  # norms, biases and row statistics are on all


@pytest.mark.parametrize("kind", ["decoder-only", "tied, mixed and rematerialised"])
def test_the_gradient_of_a_shared_model_is_that_of_one_device(tiny, kind):
    config = DecoderConfig(
        vocab_size=60, d_model=D, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24, num_layers=2,
        qkv_bias=True,
    )  # fmt: skip
    model: Model = registry.model_for(config)
    if kind != "decoder-only":
        model = tiny[0].with_config(vocab_size=60, num_heads=4, tied=True)
        model = model.with_runtime(dtype="mixed", remat=True)
    params = model.init_params(jax.random.key(0))
    rows = [e._replace(inputs=np.minimum(e.inputs[P:], 59), targets=np.minimum(e.targets, 59))
            for e in examples(4)]  # fmt: skip
    start, batch = np.zeros((1, 0, D), np.float32), make_batch(rows)
    settings = {"method": "model-tuning", "name": "adamw", "rate": 1e-3}
    alone, losses = run((model, params), [batch], start, **settings)
    method, mesh = METHODS["model-tuning"], make_mesh((1, 2, 2))
    optimizer, step = trainer(model, mesh=mesh, **settings)
    state = first_state(method.init(params, start, None, 0), method, optimizer, model, mesh)
    state, found = step(state, {}, [parallel.put_batch(batch, mesh)])
    np.testing.assert_allclose(found.loss, losses.loss, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (alone.optimizer, state.optimizer)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())


def make_mesh(shape):
    return parallel.make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))


def test_devices_send_each_other_sums_of_the_prompts_alone(tiny):
    """All that leaves a device of the data axis: a gradient and three numbers for each prompt."""
    model, params = tiny
    mesh = parallel.make_mesh(MeshConfig(data=4, tensor=1))
    optimizer, step = trainer(model, mesh=mesh)
    start = prompts(2)
    state = init_state(METHODS["prompt-tuning"], optimizer, params, start)
    state, placed = jax.device_put((state, params), parallel.replicated(mesh))
    batch = parallel.put_batch(make_batch(examples(8)), mesh)
    text = jax.jit(lambda *args: step(*args)).lower(state, placed, [batch]).compile().as_text()
    sent = [
        line
        for line in text.splitlines()
        if re.search(r" (all-|reduce-scatter|collective-)[\w-]*\(", line)
    ]
    assert sent and all("all-reduce(" in line for line in sent)
    shapes = re.findall(r"f32\[([\d,]*)\]", " ".join(line.split("all-reduce(")[0] for line in sent))
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes if shape]
    assert sum(sizes) == start.size + 3 * len(start)


def test_model_tuning_changes_a_copy(tiny):
    model, params = tiny
    before = jax.tree.map(np.array, params)
    plain = [e._replace(inputs=e.inputs[P:]) for e in examples(6)]
    batches = [make_batch(plain)] * 10
    none = np.zeros((1, 0, D), np.float32)
    settings = {"method": "model-tuning", "name": "adafactor", "rate": 1e-2}
    first = run(tiny, batches[:1], none, **settings)[1]
    state, last = run(tiny, batches, none, **settings)
    assert float(last.loss[0]) < float(first.loss[0])
    jax.tree.map(np.testing.assert_array_equal, before, params)
    assert jax.tree.structure(state.trainables) == jax.tree.structure(params)


def test_dropout_is_a_function_of_the_batch(tiny):
    model = tiny[0].with_runtime(dropout=0.2)
    batches = [make_batch(examples(4))] * 3
    tuned = lambda *model: np.asarray(run(model, batches, prompts(1))[0].trainables["prompt"])
    a = tuned(model, tiny[1])
    np.testing.assert_array_equal(a, tuned(model, tiny[1]))
    assert np.abs(a - tuned(*tiny)).max() > 1e-3
    batches = [make_batch([e._replace(dropout_seed=e.dropout_seed + 1) for e in examples(4)])] * 3
    assert np.abs(a - tuned(model, tiny[1])).max() > 1e-3
    batches = [make_batch([e._replace(dropout_seed=None) for e in examples(4)])]
    with pytest.raises(ValueError, match="without dropout seeds"):
        tuned(model, tiny[1])


def test_meshes_that_cannot_be():
    for config in (MeshConfig(data=3), MeshConfig(data=-1, tensor=-1), MeshConfig(data=0)):
        with pytest.raises(UserError, match="[Mm]esh"):
            parallel.make_mesh(config)
    with pytest.raises(UserError, match="multiple of 4"):
        parallel.check_batch_size(6, parallel.make_mesh(), "train.batch_size")
