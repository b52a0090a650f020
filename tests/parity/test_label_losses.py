"""T-Few's losses against a plain reference that reads each label in a row of its own."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_step import D, P, V, prompts

from jaxprompt.config.schema import MeshConfig, PromptConfig, RunConfig, TrainConfig
from jaxprompt.data.batches import Example, make_batch
from jaxprompt.data.label_sets import label_sets, with_choices
from jaxprompt.data.microbatches import micro_batches
from jaxprompt.losses import LabelLoss
from jaxprompt.methods.registry import METHODS, method_of
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.decoder.decoder import DecoderModel, init_params
from jaxprompt.models.injection import Injection
from jaxprompt.models.label_tree import label_trees
from jaxprompt.runtime import parallel
from jaxprompt.training.optimizer import per_member
from jaxprompt.training.step import batch_losses, init_state, make_train_step

# of two tasks, which have a label in common; labels have 2, 3 and 4 tokens
SETS = [[[5, 1], [6, 7, 1], [6, 8, 9, 1]], [[6, 7, 1], [10, 1]]]
MANY = [[[5, 10 + n, 1] for n in range(11)]]  # two trees
ADAM = {"optimizer": "adamw", "learning_rate": 0.05}
FACTORS = {"unlikelihood": 0.7, "length_normalized": 0.4, "z_loss": 0.01}


def examples(count, member=0, own=0, seed=0, sets=SETS):
    """Examples of a task that belong to a member."""
    rng = np.random.default_rng([seed, own])
    virtual = np.arange(P) + V + member * P
    labels = sets[own]
    return [
        Example(
            np.concatenate([virtual, rng.integers(3, V, rng.integers(2, 9)), [1]]).astype(np.int32),
            np.array(labels[rng.integers(len(labels))], np.int32),
            member,
            dropout_seed=100 * seed + number,
        )
        for number in range(count)
    ]


def chosen(rows, set_of=lambda example: example.member, sets=SETS):
    return with_choices(rows, label_sets(sets), set_of)


def loss_of(sets=SETS, **factors):
    return LabelLoss(label_trees(label_sets(sets).tokens), **(factors or FACTORS))


@functools.cache
def trained(model, **factors):
    optimizer = per_member(TrainConfig(**ADAM))
    step = make_train_step(model, METHODS["prompt-tuning"], optimizer, loss=loss_of(**factors))
    return optimizer, step


def run(tuned, steps, start, **factors):
    """The state after a step on each list of micro-batches, and the last losses."""
    model, params = tuned
    optimizer, step = trained(model, **factors)
    state = init_state(METHODS["prompt-tuning"], optimizer, params, start)
    for batches in steps:
        state, losses = step(state, params, batches)
        jax.block_until_ready(losses)
    return state, losses


@pytest.fixture(scope="module")
def causal():
    config = DecoderConfig(
        vocab_size=V, d_model=D, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24, num_layers=2
    )
    return DecoderModel(config), jax.jit(init_params, static_argnums=0)(config, jax.random.key(3))


def reference(tuned, bank, rows, own, sets, factors):
    """The three losses of one member as the paper writes them, a row for each label."""
    model, params = tuned
    labels = sets[own]
    repeated = [
        e._replace(targets=np.array(label, np.int32), dropout_seed=None)
        for e in rows
        for label in labels
    ]
    batch = make_batch(repeated)
    prepared = model.prepare(params, Injection(bank))
    logits = model.logits(
        params, prepared, batch.inputs, batch.segments, batch.targets, batch.target_segments
    )
    log_p = jax.nn.log_softmax(logits)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    likelihood, unlikelihood, ranking, counts = 0.0, 0.0, 0.0, np.zeros(2)
    for number, example in enumerate(rows):
        right, means = labels.index(example.targets.tolist()), []
        for at, label in enumerate(labels):
            row = number * len(labels) + at
            each = jnp.stack([log_p[row, t, token] for t, token in enumerate(label)])
            means.append(each.mean())
            if at == right:
                likelihood -= (each - factors["z_loss"] * log_z[row, : len(label)] ** 2).sum()
            else:
                unlikelihood -= jnp.log(1 - jnp.exp(each)).sum()
            counts[int(at != right)] += len(label)
        ranking -= jax.nn.log_softmax(jnp.stack(means))[right]
    return (
        likelihood / counts[0]
        + factors["unlikelihood"] * unlikelihood / counts[1]
        + factors["length_normalized"] * ranking / len(rows)
    )


@pytest.mark.parametrize("family", ["tiny", "causal"])
@pytest.mark.parametrize("sets", [SETS, MANY], ids=["one tree", "two trees"])
def test_losses_and_gradients_are_those_of_a_row_for_each_label(request, family, sets):
    tuned = request.getfixturevalue(family)
    model, params = tuned
    rows = examples(3, sets=sets)
    batch = make_batch(chosen(rows, sets=sets), rows=4)  # one row is empty
    loss = loss_of(sets, **FACTORS)

    def ours(bank):
        total, means = batch_losses(params, Injection(bank), model, batch, num_members=1, loss=loss)
        return total, (means.unlikelihood[0], means.length_normalized[0])

    def plain(bank):
        whole = lambda factors: reference(tuned, bank, rows, 0, sets, factors)
        none = dict.fromkeys(FACTORS, 0.0)
        parts = [
            whole(none | {name: 1.0}) - whole(none)
            for name in ("unlikelihood", "length_normalized")
        ]
        return whole(FACTORS), tuple(parts)

    bank = jnp.asarray(prompts(1))
    ((a, parts_a), grad_a), ((b, parts_b), grad_b) = (
        jax.jit(jax.value_and_grad(f, has_aux=True))(bank) for f in (ours, plain)
    )
    assert float(a) == pytest.approx(float(b), rel=1e-5)
    np.testing.assert_allclose(parts_a, parts_b, rtol=1e-3)  # those of b are differences
    np.testing.assert_allclose(grad_a, grad_b, rtol=1e-4, atol=1e-6)


def alone(rows):
    """The examples of a member as those of the only one."""
    return [
        e._replace(inputs=np.where(e.inputs >= V, e.inputs - e.member * P, e.inputs), member=0)
        for e in rows
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_members_with_labels_of_their_own_equal_members_trained_alone(tiny, dropout):
    tuned, counts, starts = (tiny[0].with_runtime(dropout=dropout), tiny[1]), (2, 5), prompts(2)
    shape = {"input_length": 32, "target_length": 4}
    own = [[examples(n, member=k, own=k, seed=s) for k, n in enumerate(counts)] for s in range(3)]
    together = [[make_batch(chosen([*itertools.chain(*rows)]), **shape)] for rows in own]
    tree = run(tuned, together, starts)[0].trainables["prompt"]
    for k in range(2):
        batches = [
            [make_batch(chosen(alone(rows[k]), lambda _, k=k: k), rows=6, **shape)] for rows in own
        ]
        single = run(tuned, batches, starts[k : k + 1])[0].trainables["prompt"]
        np.testing.assert_allclose(tree[k], single[0], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("shared", [False, True], ids=["own rows", "shared rows"])
def test_a_step_on_micro_batches_equals_one_on_the_whole_batch(tiny, dropout, shared):
    """Members of very different shares, in rows of their own and in rows that examples share."""
    model = tiny[0].with_runtime(dropout=dropout)
    rows = chosen([*examples(6), *examples(2, member=1, own=1)])
    plain, ours = [make_batch(rows, target_length=4)], model
    if shared:
        ours = model.with_runtime(per_example_attention=True)
        ours = ours.with_layout(packed_widths=(5, 9, 16), examples_per_row=6)
    parts = micro_batches(rows, rows=4, target_length=4, layout=ours.layout)
    assert len(parts) == 2
    a, b = (run((m, tiny[1]), [x], prompts(2)) for m, x in ((model, plain), (ours, parts)))
    np.testing.assert_allclose(a[1].loss, b[1].loss, rtol=1e-5)
    np.testing.assert_array_equal(a[1].accuracy, b[1].accuracy)
    # Adam's first step is the gradient's sign: its moments show the gradient itself
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-7)
    jax.tree.map(same, a[0].optimizer, b[0].optimizer)


def test_without_factors_the_gradient_is_that_of_cross_entropy(tiny):
    model, params = tiny
    batch = make_batch(chosen(examples(5)))

    def gradient(loss, batch):
        value = lambda bank: batch_losses(
            params, Injection(bank), model, batch, num_members=1, z_loss=0.01, loss=loss
        )
        return jax.jit(jax.value_and_grad(value, has_aux=True))(jnp.asarray(prompts(1)))

    (a, means_a), grad_a = gradient(loss_of(z_loss=0.01), batch)
    (b, means_b), grad_b = gradient(None, batch._replace(choices=None))
    assert float(a) == pytest.approx(float(b), rel=1e-5)
    np.testing.assert_allclose(means_a.loss, means_b.loss, rtol=1e-5)
    np.testing.assert_array_equal(means_a.accuracy, means_b.accuracy)
    np.testing.assert_allclose(grad_a, grad_b, rtol=1e-4, atol=1e-6)


def test_a_member_that_is_nan_leaves_the_others_alone(tiny):
    rows = chosen([*examples(3), *examples(2, member=1, own=1)])
    start = prompts(2)
    start[0] = np.nan
    state, losses = run(tiny, [[make_batch(rows, target_length=4)]], start)
    assert np.isnan(losses.loss).tolist() == [True, False]
    assert np.isfinite(state.trainables["prompt"][1]).all()


def test_members_that_change_the_layers_have_the_gradients_of_members_alone(tiny):
    """Two LoRAs with labels of their own in one batch."""
    model, params = tiny
    method = method_of(
        RunConfig(task="boolq", output="x", method="lora", lora={"rank": 2, "targets": "all"})
    )
    rng = np.random.default_rng(0)
    random = lambda x: rng.normal(size=(2, *x.shape[1:])).astype(np.float32) / 4
    start = np.zeros((1, 0, D), np.float32)
    trainables = jax.tree.map(random, method.init(params, start, PromptConfig(), 0))
    plain = lambda rows: [e._replace(inputs=e.inputs[P:]) for e in rows]
    rows = [plain(examples(n, member=k, own=k)) for k, n in enumerate((2, 3))]

    @functools.partial(jax.jit, static_argnames="count")
    def gradient(trainables, batch, count):
        return jax.grad(
            lambda x: batch_losses(
                params, method.inject(x, params), model, batch, num_members=count, loss=loss_of()
            )[0]
        )(trainables)

    together = gradient(trainables, make_batch(chosen([*rows[0], *rows[1]])), 2)
    for k in range(2):
        own = chosen([e._replace(member=0) for e in rows[k]], lambda _, k=k: k)
        single = gradient(jax.tree.map(lambda x, k=k: x[k : k + 1], trainables), make_batch(own), 1)
        same = lambda a, b, k=k: np.testing.assert_allclose(a[k], b[0], rtol=1e-4, atol=2e-5)
        jax.tree.map(same, together, single)


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)], ids=str)
def test_devices_that_share_the_rows_compute_the_same_step(tiny, shape):
    model, params = tiny[0].with_runtime(dropout=0.2), tiny[1]
    rows = chosen([*examples(5), *examples(3, member=1, own=1)])
    batch = make_batch(rows, target_length=4)
    alone, losses = run((model, params), [[batch]], prompts(2))
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = parallel.make_mesh(MeshConfig(data=shape[0], fsdp=shape[1]), devices)
    optimizer, method = per_member(TrainConfig(**ADAM)), METHODS["prompt-tuning"]
    step = make_train_step(model, method, optimizer, mesh=mesh, loss=loss_of())
    rule = parallel.parameter_sharding(mesh)
    place = lambda x, axes: jax.device_put(x, rule(axes))
    params = jax.tree.map(place, params, model.logical_axes())
    state = init_state(method, optimizer, params, prompts(2))
    state, found = step(state, params, parallel.put_batch([batch], mesh))
    np.testing.assert_allclose(found.loss, losses.loss, rtol=1e-5)
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-7)
    jax.tree.map(same, state.optimizer, alone.optimizer)
