"""What holds of every method: one set of tests for all of them.

The members are not neutral: random numbers are added to all that is trained. Compiling takes the
time, so most invariants are tested on a crowd: a member of each method, all in one program.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers_step import V, examples

from jaxprompt.config.schema import MeshConfig, RunConfig
from jaxprompt.data.batches import make_batch
from jaxprompt.data.layout import BatchLayout
from jaxprompt.data.microbatches import packed_rows
from jaxprompt.inference.rank import label_log_likelihoods
from jaxprompt.methods.base import Method, grouped
from jaxprompt.methods.registry import method_of
from jaxprompt.models import blocks
from jaxprompt.models.decoder import decoder
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.decoder.decoder import DecoderModel
from jaxprompt.models.encoder.config import EncoderConfig
from jaxprompt.models.encoder.encoder import EncoderModel
from jaxprompt.models.injection import Injection, without_dropout
from jaxprompt.models.label_tree import label_trees
from jaxprompt.models.merge import merge
from jaxprompt.models.ops import changes, quantization
from jaxprompt.models.t5 import t5
from jaxprompt.models.t5.t5 import T5Config, T5Model
from jaxprompt.runtime import parallel
from jaxprompt.training.checkpoint import Checkpoints
from jaxprompt.training.step import TrainState, batch_losses, make_train_step

P, K = 4, 3
LORA = {"rank": 2, "targets": "all", "dropout": 0.25}
PARALLEL = {"after": ["attention", "mlp"], "width": 3}
PREFIX = {"length": 3, "mlp": 4}
# method -> settings; the prompt is P vectors where there is one
CASES = {
    "lora": {"lora": LORA},
    "dora": {"lora": LORA | {"dora": True}},
    "ia3": {},
    "prefix-tuning": {"prefix": PREFIX},
    "p-tuning-v2": {"prefix": {"length": 3}},
    "p-tuning": {"p_tuning": {"encoder": "lstm", "width": 4}},
    "prompt-tuning": {},
    "residual-prompt-tuning": {"prompt": {"length": P, "bottleneck": 4}},
    "superposition-prompt-tuning": {"prompt": {"length": P, "basis": P + 2}},
    "multitask-prompt-tuning": {},
    "low-rank-prompt-tuning": {"prompt": {"length": P, "rank": 2}},
    "adapter": {"adapter": {"width": 3, "activation": "silu"}},
    "houlsby": {"adapter": {"width": 3}},
    "pfeiffer": {"adapter": {"width": 3}},
    "parallel": {"adapter": PARALLEL},
    "bitfit": {"bitfit": {"norms": True}},
    "norm-tuning": {},
    "mam": {"prefix": PREFIX, "adapter": PARALLEL},
    "prompt+lora": {"lora": LORA},
    "prompt+prefix+lora+ia3+parallel+bitfit": {
        "lora": LORA, "prefix": PREFIX, "adapter": PARALLEL, "bitfit": {"norms": True},
    },
}  # fmt: skip
# every part that a model computes, in one program
ALL = "prompt+prefix+lora+ia3+parallel+bitfit"
# a member of each; adapters of one batch are of one kind, so there are three crowds
SEQUENTIAL = {"adapter": "houlsby", "houlsby": "houlsby", "pfeiffer": "pfeiffer"}
CROWDS = {
    "parallel": [name for name in CASES if name not in {*SEQUENTIAL, "dora"}] + ["dora"],
    "houlsby": ["prompt-tuning", "adapter", "houlsby"],
    "pfeiffer": ["prompt-tuning", "pfeiffer"],
}
EXACT_AT_START = ["lora", "dora", "ia3", "parallel", "bitfit", "norm-tuning"]
MERGED = ["lora", "dora", "ia3"]
METHOD_OF = {"dora": "lora"}  # of a case that is no name of a method

T5 = T5Model(
    T5Config(
        vocab_size=V, d_model=16, num_heads=3, head_dim=4, d_ff=24,
        num_encoder_layers=2, num_decoder_layers=2,
    )
)  # fmt: skip
DECODER = DecoderModel(
    DecoderConfig(
        vocab_size=V, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24, num_layers=2,
        qkv_bias=True,
    )
)  # fmt: skip
# the last token of an input is its mask
MASKED = EncoderModel(
    EncoderConfig(
        vocab_size=V, d_model=16, num_heads=4, head_dim=4, d_ff=24, num_layers=2, mask_id=1,
        max_positions=64,
    )
)  # fmt: skip
MODELS = {"t5": T5, "decoder": DECODER, "masked": MASKED}


@functools.cache
def weights(family):
    return jax.jit(MODELS[family].init_params)(jax.random.key(0))


@functools.cache
def method(name):
    return method_of(config(name))


def config(name):
    chosen = METHOD_OF.get(name, name)
    return RunConfig(task="boolq", output="x", method=chosen, **settings(name))


def settings(name):
    return {"prompt": {"length": P}, **CASES[name]}


def has_prompt(name):
    return method(name).uses_prompt


@functools.cache
def started(name, family):
    """Trainables of K members before step 0."""
    rows = method(name).num_start_vectors(config(name).prompt)
    start = np.random.default_rng(3).normal(size=(K, rows, 16)).astype(np.float32)
    return method(name).init(weights(family), start, config(name).prompt, 0)


@functools.cache
def trained(name, family):
    """The same with random numbers added: no member is neutral or like another."""
    rng = np.random.default_rng(4)
    noise = lambda x: x + jnp.asarray(rng.normal(size=x.shape, scale=0.3), jnp.float32)
    return jax.tree.map(noise, started(name, family))


def alone(tree, member):
    return jax.tree.map(lambda x: x[member : member + 1], tree)


def rows_of(name, count, member=0, seed=0):
    rows = examples(count, member=member, seed=seed)
    if has_prompt(name):
        return rows
    return [e._replace(inputs=e.inputs[P:]) for e in rows]


def own(name, examples):
    """Examples of a member as those of a lone one."""
    shift = lambda e: np.where(e.inputs >= V, e.inputs - e.member * P, e.inputs)
    return [e._replace(inputs=shift(e), member=0) for e in examples]


def mixed_rows(name):
    """Examples of all members, in turns."""
    each = [rows_of(name, 2, member=k) for k in range(K)]
    return [rows[i] for i in range(2) for rows in each]


def batch_of(rows, **kwargs):
    return make_batch(rows, input_length=32, target_length=4, **kwargs)


# Adam would make a sign of a gradient that is nearly 0
OPTIMIZER = optax.sgd(0.1)


@functools.cache
def step_of(name, family, mesh=None):
    return make_train_step(MODELS[family], method(name), OPTIMIZER, mesh=mesh, z_loss=1e-4)


def stepped(name, family, trainables, batch, mesh=None):
    """The trainables after a step, and the losses."""
    copy = jax.tree.map(jnp.array, trainables)
    state = TrainState(jnp.int32(0), copy, OPTIMIZER.init(copy))
    batches = [batch]
    if mesh is not None:
        state = jax.device_put(state, parallel.replicated(mesh))
        batches = parallel.put_batch(batches, mesh)
    state, losses = step_of(name, family, mesh)(state, weights(family), batches)
    jax.block_until_ready(losses)
    return state.trainables, losses


def close(a, b, tolerance=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def of(*names):
    """A test of some of the methods. Those that are not named are parts of one that is."""
    return pytest.mark.parametrize("name", names)


families = pytest.mark.parametrize("family", ["t5", "decoder"])


@functools.cache
def logits_of(family):
    model = MODELS[family]

    @jax.jit
    def logits(params, injection, batch):
        prepared = model.prepare(params, injection).for_rows(len(batch.inputs), batch.member)
        return model.logits(
            params, prepared, batch.inputs, batch.segments, batch.targets, batch.target_segments
        )

    return logits


@pytest.mark.parametrize(
    ("name", "family"),
    [*itertools.product(EXACT_AT_START, ["t5", "decoder"]), ("bitfit", "masked")],
)
def test_a_neutral_start_is_the_frozen_model_bit_for_bit(name, family):
    injection = method(name).inject(alone(started(name, family), 0), weights(family))
    batch = batch_of(rows_of(name, 3))
    at_start = logits_of(family)(weights(family), injection, batch)
    frozen = logits_of(family)(weights(family), Injection(), batch)
    np.testing.assert_array_equal(at_start, frozen)


@families
def test_a_step_of_a_prompt_has_no_operation_of_another_part(family, monkeypatch):
    """Every change of a layer is looked up for its rows. So its program is that without changes."""

    def operations(name):
        trainables = started(name, family)
        step = make_train_step(MODELS[family], method(name), OPTIMIZER, z_loss=1e-4)
        state = TrainState(jnp.int32(0), trainables, OPTIMIZER.init(trainables))
        batch = batch_of(mixed_rows(name))
        jax.eval_shape(lambda *a: step(*a, [batch]), state, weights(family))

    def looked_up(*_):
        raise LookupError

    for module in (changes, blocks, t5, decoder):
        monkeypatch.setattr(module, "of_rows", looked_up)
    operations("prompt-tuning")
    for name in ("lora", "ia3", "prefix-tuning", "adapter", "bitfit"):
        with pytest.raises(LookupError):
            operations(name)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, "t5") for name in CASES),
        *((name, "decoder") for name in (ALL, "lora", "prefix-tuning") if name in CASES),
        (ALL, "masked"),
    ],
)
def test_members_together_equal_each_alone_and_no_nan_spreads(name, family):
    trainables, rows = trained(name, family), mixed_rows(name)
    together, losses = stepped(name, family, trainables, batch_of(rows))
    # where all parts are random, a lone member's own update moves by 1e-4 beside rows of padding
    tolerance = 2e-4 if name == ALL else 2e-5
    for k in range(K):
        mine = own(name, [e for e in rows if e.member == k])
        single, loss = stepped(name, family, alone(trainables, k), batch_of(mine))
        close(alone(together, k), single, tolerance)
        assert float(losses.loss[k]) == pytest.approx(float(loss.loss[0]), rel=1e-5)
    lost = jax.tree.map(lambda x: x.at[1].set(jnp.nan), trainables)
    others, _ = stepped(name, family, lost, batch_of(rows))
    for k in (0, 2):
        jax.tree.map(np.testing.assert_array_equal, alone(others, k), alone(together, k))


class Crowd(NamedTuple):
    """A member of each of several methods, with two examples of each."""

    names: list[str]
    method: Method
    trainables: tuple
    rows: list


@functools.cache
def crowd(kind, family="t5", without=()):
    without = {*without, *(["p-tuning-v2"] if family == "decoder" else [])}  # it has no encoder
    names = [name for name in CROWDS[kind] if name not in without]
    trainables = tuple(alone(trained(name, family), 0) for name in names)
    each = [rows_of(name, 2, member=k) for k, name in enumerate(names)]
    rows = [rows[i] for i in range(2) for rows in each]
    return Crowd(names, grouped([method(name) for name in names]), trainables, rows)


crowds = pytest.mark.parametrize("kind", CROWDS)
crowds_of_families = pytest.mark.parametrize(
    ("kind", "family"), [*((kind, "t5") for kind in CROWDS), ("parallel", "decoder")]
)


@functools.cache
def gradient_of(kind, family="t5", **layout):
    """The gradient of a crowd, or of others with its methods, as a compiled function."""
    of, count = crowd(kind, family).method, len(crowd(kind, family).names)
    model = MODELS[family]
    if layout:
        model = model.with_runtime(per_example_attention=True).with_layout(**layout)

    @jax.jit
    def gradient(trainables, params, batch):
        def loss(trainables):
            injection = of.inject(trainables, params)
            return batch_losses(params, injection, model, batch, num_members=count)[0]

        return jax.grad(loss)(trainables)

    return gradient


@functools.cache
def padded_gradient(kind, family="t5"):
    them = crowd(kind, family)
    return gradient_of(kind, family)(them.trainables, weights(family), batch_of(them.rows))


def each_close(names, found, wanted, tolerance):
    for name, x, y in zip(names, found, wanted, strict=True):
        for leaf, right in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
            np.testing.assert_allclose(leaf, right, rtol=tolerance, atol=tolerance, err_msg=name)


@crowds_of_families
def test_cached_decoding_equals_teacher_forcing(kind, family):
    model, params = MODELS[family], weights(family)
    them = crowd(kind, family)
    injection = without_dropout(them.method.inject(them.trainables, params))
    batch = batch_of(them.rows)
    wanted = logits_of(family)(params, injection, batch)

    @jax.jit
    def decode(injection, batch):
        prepared = model.prepare(params, injection).for_rows(len(batch.inputs), batch.member)
        read = model.prefill(params, prepared, batch.inputs, batch.segments)
        ids, cache = model.init_decode(params, prepared, read, 4)
        cache = model.tile_cache(cache, 2)  # as beams have it
        given = jnp.repeat(batch.targets, 2, axis=0).T

        def step(carry, position):
            ids, cache = carry
            logits, cache = model.decode_step(params, prepared, cache, ids, position)
            return (given[position], cache), logits

        return jax.lax.scan(step, (jnp.repeat(ids, 2), cache), jnp.arange(4))[1]

    logits = decode(injection, batch).transpose(1, 0, 2)
    there = batch.target_segments > 0
    for beam in range(2):
        for k, name in enumerate(them.names):
            mine = there & (batch.member == k)[:, None]
            np.testing.assert_allclose(
                logits[beam::2][mine], wanted[mine], rtol=3e-5, atol=3e-5, err_msg=name
            )


@crowds
def test_examples_that_share_rows_have_the_gradient_of_padded_ones(kind):
    them = crowd(kind)
    layout = BatchLayout(packed_widths=(8, 16), examples_per_row=2, one_member_per_row=True)
    [(packed, _)] = packed_rows(
        them.rows, parts=1, devices=len(them.names), layout=layout, target_length=4
    )
    gradient = gradient_of(kind, **vars(layout))
    found = gradient(them.trainables, weights("t5"), packed)
    each_close(them.names, found, padded_gradient(kind), 2e-4)


@crowds_of_families
def test_no_member_that_is_nan_changes_another_method(kind, family):
    them = crowd(kind, family)
    batch, right = batch_of(them.rows), padded_gradient(kind, family)
    for lost in range(len(them.names)):
        trainables = list(them.trainables)
        trainables[lost] = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), trainables[lost])
        found = gradient_of(kind, family)(tuple(trainables), weights(family), batch)
        for k, name in enumerate(them.names):
            if k != lost:
                message = f"{name} beside {them.names[lost]}"
                for x, y in zip(*map(jax.tree.leaves, (found[k], right[k])), strict=True):
                    np.testing.assert_array_equal(x, y, err_msg=message)


@crowds_of_families
def test_a_checkpoint_of_any_method_goes_on_bit_for_bit(kind, family, tmp_path):
    """Also what a method trains in place of its result, and both moments of Adam."""
    them, adam = crowd(kind, family), optax.adam(0.01)
    batch = batch_of(them.rows)

    def moved(state):
        gradient = gradient_of(kind, family)(state.trainables, weights(family), batch)
        updates, optimizer = jax.jit(adam.update)(gradient, state.optimizer)
        return TrainState(state.step + 1, optax.apply_updates(state.trainables, updates), optimizer)

    start = TrainState(jnp.int32(0), them.trainables, adam.init(them.trainables))
    first = moved(start)
    Checkpoints(tmp_path, keep=1).save(1, first, {})
    restored = Checkpoints(tmp_path, keep=1).restore(start)
    jax.tree.map(np.testing.assert_array_equal, moved(restored), moved(first))


@crowds
def test_devices_together_equal_one(kind):
    """A step of SGD, which moves by the gradient times its rate; DoRA needs whole columns."""
    mesh = parallel.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    them = crowd(kind, without=("dora",))
    state = TrainState(jnp.int32(0), jax.tree.map(jnp.array, them.trainables), ())
    state = state._replace(optimizer=OPTIMIZER.init(state.trainables))
    step = make_train_step(T5, them.method, OPTIMIZER, mesh=mesh)
    [batch] = parallel.put_batch([batch_of(them.rows)], mesh)
    state, losses = step(jax.device_put(state, parallel.replicated(mesh)), weights("t5"), [batch])
    jax.block_until_ready(losses)
    moved = jax.tree.map(lambda old, new: (old - new) / 0.1, them.trainables, state.trainables)
    # DoRA comes last, so without it the others are as in the whole crowd
    wanted = dict(zip(crowd(kind).names, padded_gradient(kind), strict=True))
    each_close(them.names, moved, [wanted[name] for name in them.names], 2e-4)


@crowds
def test_a_quantized_backbone_trains(kind):
    inside = lambda axes: axes[0] == "layers" and len(axes) > 2
    shrink = lambda x, axes: quantization.quantize(x, axes, "int8") if inside(axes) else x
    small = parallel.map_with_axes(shrink, weights("t5"), T5.logical_axes())
    them = crowd(kind)
    gradient = gradient_of(kind)(them.trainables, small, batch_of(them.rows))
    for name, own in zip(them.names, gradient, strict=True):
        assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(own)), name


@of(*MERGED)
@families
def test_a_merged_model_equals_the_unmerged_one(name, family):
    params = weights(family)
    injection = method(name).inject(alone(trained(name, family), 1), params)
    batch = batch_of(rows_of(name, 3))
    merged = logits_of(family)(merge(params, injection), Injection(), batch)
    np.testing.assert_allclose(
        merged, logits_of(family)(params, injection, batch), rtol=1e-4, atol=1e-4
    )


@of(ALL)
@families
def test_a_tree_of_labels_equals_each_label_by_itself(name, family):
    model, params, rows = MODELS[family], weights(family), mixed_rows(name)
    injection = method(name).inject(trained(name, family), params)
    labels = np.array([[5, 1, -1], [5, 7, 1], [9, 1, -1]])
    trees = label_trees(labels)

    @jax.jit
    def ranked(injection, batch):
        prepared = model.prepare(params, injection).for_rows(len(batch.inputs), batch.member)
        return label_log_likelihoods(params, prepared, model, batch.inputs, batch.segments, trees)

    scores = ranked(injection, batch_of(rows))
    for number, label in enumerate(labels):
        ids = label[label >= 0].astype(np.int32)
        batch = batch_of([row._replace(targets=ids) for row in rows])
        logits = jax.nn.log_softmax(logits_of(family)(params, injection, batch))
        picked = np.take_along_axis(np.asarray(logits), batch.targets[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(
            scores[:, number], (picked * batch.weights).sum(-1), rtol=1e-4, atol=1e-4
        )
