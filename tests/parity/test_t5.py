import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_sums

from jaxprompt.models import blocks
from jaxprompt.models.injection import Injection
from jaxprompt.models.ops.attention import per_example
from jaxprompt.models.ops.attention.dense import dense_mask
from jaxprompt.models.ops.dropout import seeds_of_rows, seeds_of_segments
from jaxprompt.models.ops.segments import shift_right
from jaxprompt.models.t5 import t5

VARIANTS = {
    "1.1": {},
    "1.0": {"gated": False, "activation": "relu", "tied": True, "scale_output": True},
    "umT5": {"per_layer_bias": True},
    "mixed": {},
}


def make(tiny, name):
    model = tiny[0].with_config(**VARIANTS[name])
    model = model.with_runtime(dtype="mixed" if name == "mixed" else "float32")
    params = jax.jit(t5.init_params, static_argnums=0)(model.config, jax.random.key(1))
    return model, params


@functools.partial(jax.jit, static_argnums=2)
def forward(params, bank, model, inputs, segments, targets, target_segments):
    injection = Injection(bank)
    encoded = t5.Encoded(model.encode(params, injection, inputs, segments), segments)
    decoder_inputs = shift_right(targets, target_segments, model.config.decoder_start_id)
    return model.decode(params, injection, encoded, decoder_inputs, target_segments)


def batch(seed=0, virtual=4):
    rng = np.random.default_rng(seed)
    inputs = rng.integers(3, 61 + virtual, (3, 11)).astype(np.int32)
    targets = rng.integers(3, 61, (3, 6)).astype(np.int32)
    segments, target_segments = np.ones_like(inputs), np.ones_like(targets)
    segments[1, 7:], target_segments[2, 4:] = 0, 0
    return inputs * (segments > 0), segments, targets * (target_segments > 0), target_segments


def bank(prompts=1):
    return jax.random.normal(jax.random.key(7), (prompts, 4, 16))


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_decoding_equals_teacher_forcing(tiny, name):
    model, params = make(tiny, name)
    inputs, segments, targets, target_segments = batch()
    target_segments = np.ones_like(target_segments)
    whole = forward(params, bank(), model, inputs, segments, targets, target_segments)
    injection = Injection(bank())
    cache = model.init_decode(
        params, injection, model.prefill(params, injection, inputs, segments), 6
    )[1]
    step = jax.jit(functools.partial(model.decode_step, params, injection))
    ids = shift_right(jnp.asarray(targets), jnp.asarray(target_segments), 0)
    for index in range(6):
        logits, cache = step(cache, ids[:, index], jnp.int32(index))
        np.testing.assert_allclose(logits, whole[:, index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_how_layers_and_rows_take_turns_changes_nothing(tiny, name, monkeypatch):
    """Unrolled, rematerialised, and attention a row at a time."""
    monkeypatch.setattr(per_example, "LOGITS_AT_ONCE", 1)
    model, params = make(tiny, name)
    plain = forward(params, bank(), model, *batch())
    other = model.with_runtime(unroll=True, remat=True, per_example_attention=True)
    # through five layers of width 16
    assert_same_sums(plain, forward(params, bank(), other, *batch()), 16 * 5)
    assert jax.tree.structure(other.abstract_params()) == jax.tree.structure(params)


def test_packed_rows_equal_rows_of_their_own(tiny):
    """Two examples with a prompt each in one row, against one example a row."""
    model, params = tiny
    prompts = bank(prompts=2)
    first, second = [61, 62, 63, 64, 9, 8, 1], [65, 66, 67, 68, 7, 1]
    answers = [4, 1], [5, 6, 1]
    alone = [
        forward(
            params, prompts, model, np.array([ids]), np.ones((1, len(ids)), int),
            np.array([answer]), np.ones((1, len(answer)), int),
        )[0]
        for ids, answer in zip((first, second), answers, strict=True)
    ]  # fmt: skip
    packed = forward(
        params, prompts, model,
        np.array([first + second + [0, 0]]), np.array([[1] * 7 + [2] * 6 + [0] * 2]),
        np.array([answers[0] + answers[1] + [0]]), np.array([[1] * 2 + [2] * 3 + [0]]),
    )[0]  # fmt: skip
    np.testing.assert_allclose(packed[:2], alone[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(packed[2:5], alone[1], rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing(tiny):
    model, params = tiny
    inputs, segments, targets, target_segments = batch()
    pad = lambda x: np.pad(x, ((0, 0), (0, 5)))
    short = forward(params, bank(), model, inputs, segments, targets, target_segments)
    long = forward(
        params, bank(), model, pad(inputs), pad(segments), pad(targets), pad(target_segments)
    )
    real = target_segments > 0
    np.testing.assert_allclose(
        np.asarray(short)[real], np.asarray(long)[:, :6][real], rtol=1e-4, atol=1e-5
    )


def test_rows_with_different_prompts_do_not_see_each_other(tiny):
    model, params = tiny
    inputs, segments, targets, target_segments = batch(virtual=0)
    inputs[0, :4], inputs[1, :4] = range(61, 65), range(65, 69)
    prompts = bank(prompts=2)
    both = forward(params, prompts, model, inputs, segments, targets, target_segments)
    changed = prompts.at[1].add(1.0)
    other = forward(params, changed, model, inputs, segments, targets, target_segments)
    np.testing.assert_array_equal(both[0], other[0])
    assert np.abs(np.asarray(both[1] - other[1])).max() > 1e-3


def test_the_head_has_no_column_for_virtual_tokens(tiny):
    model, params = tiny
    assert forward(params, bank(), model, *batch()).shape[-1] == model.config.vocab_size


def test_dropout_needs_noise_and_is_a_function_of_it(tiny):
    model, params = tiny[0].with_runtime(dropout=0.3), tiny[1]
    inputs, segments, _, _ = batch()
    given = params, Injection(bank()), inputs, segments
    run = lambda *seeds: np.asarray(model.encode(*given, jnp.array(seeds) if seeds else None))
    np.testing.assert_array_equal(run(), forward_encoder(tiny, inputs, segments))
    first, second = run(1, 2, 3), run(2, 1, 1)
    np.testing.assert_array_equal(first, run(1, 2, 3))
    assert np.abs(first - second).max(axis=(1, 2)).min() > 1e-3
    third = run(1, 1, 3)  # each row has what its own number says
    np.testing.assert_array_equal(third[[0, 2]], first[[0, 2]])
    np.testing.assert_array_equal(third[1], second[1])


def forward_encoder(model, inputs, segments):
    return model[0].encode(model[1], Injection(bank()), inputs, segments)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_its_share_and_the_mean(rate):
    """Of places and of positions, each drawn for itself; 4 standard errors around the share."""
    seeds = seeds_of_rows(jnp.arange(64), 50)
    key, share, ones = jax.random.key(3), 1 - rate, jnp.ones((64, 50, 40))
    kept = blocks.Dropout(rate).apply({}, ones, seeds, rngs={"dropout": key})
    np.testing.assert_array_equal(kept, kept[:, :1] + 0 * kept)  # at all positions the same
    weights = blocks.DropKeys(rate, 6).apply({}, seeds, jnp.dtype("float32"), rngs={"dropout": key})
    for found in (kept[:, 0], weights.reshape(-1)):
        np.testing.assert_allclose(np.unique(found), [0, 1 / share], rtol=1e-6)
        error = (rate / share / found.size) ** 0.5
        assert float(found.mean()) == pytest.approx(1, abs=4 * error)
    varied = np.asarray(weights).std(axis=(0, 1)), np.asarray(weights).std(axis=1)
    assert all(x.min() > 0 for x in varied)


def test_dropout_of_shared_rows_is_that_of_rows_of_one_example():
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]])
    numbers = jnp.array([7, 8, 9, 10, 11, 12])  # three for each row, the last stands for none
    shared, alone = seeds_of_segments(numbers, segments), seeds_of_rows(numbers, 6)
    starts = {0: (0, 0, 3), 1: (0, 3, 2), 3: (1, 0, 1), 4: (1, 1, 5)}
    for name, size in (("keep_per_example", 5), ("keep_per_position", 3)):
        draw = lambda seeds, n=name, s=size: getattr(seeds, n)(jax.random.key(0), 0.5, s)
        found, expected = draw(shared), draw(alone)
        for example, (row, start, length) in starts.items():
            own = jnp.broadcast_to(expected[example], (6, size))[:length]
            np.testing.assert_array_equal(found[row, start : start + length], own)


def test_every_parameter_has_logical_axes_of_its_rank(tiny):
    for name in VARIANTS:
        model = tiny[0].with_config(**VARIANTS[name])
        shapes, axes = model.abstract_params(), model.logical_axes()
        ranks = jax.tree.map(lambda s, a: len(s.shape) == len(a), shapes, axes)
        assert all(jax.tree.leaves(ranks))


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
def test_lower_precision_stays_close_and_returns_float32(tiny, dtype):
    model, params = tiny
    half = model.with_runtime(dtype=dtype)
    exact, rough = (forward(params, bank(), c, *batch()) for c in (model, half))
    assert rough.dtype == jnp.float32
    error = np.abs(np.asarray(exact - rough)).max() / np.abs(np.asarray(exact)).max()
    assert 1e-5 < error < (0.05 if dtype == "bfloat16" else 0.02)


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_an_encoder_layer_keeps_little_for_the_gradient_of_the_prompt(tiny, dtype):
    """Its two inputs of norms, query, key and value, and the two halves of the gate."""
    model = tiny[0].with_runtime(dtype=dtype, per_example_attention=True)
    layer, rows, length = t5.EncoderLayer(model), 2, 24
    mask = dense_mask(jnp.ones((rows, 1, length, length), bool))
    bias = t5.Bias(jnp.zeros((1, model.config.num_heads, length, length)))
    context = t5.LayerContext(jnp.arange(length), jnp.arange(length), mask, bias)
    x = jnp.ones((rows, length, model.config.d_model))
    params = layer.init(jax.random.key(0), x, context)
    _, back = jax.vjp(lambda x: layer.apply(params, x, context)[0], x)
    per_position = [
        math.prod(leaf.shape) // (rows * length)
        for leaf in jax.tree.leaves(back)
        if leaf.shape[:2] == (rows, length) or leaf.shape[1:3] == (rows, length)
    ]
    inner = model.config.num_heads * model.config.head_dim
    assert sum(per_position) <= 2 * model.config.d_model + 3 * inner + 2 * model.config.d_ff + 8


def test_a_virtual_token_with_the_row_of_a_word_is_the_word(tiny):
    model, params = tiny
    words = jnp.array([[5, 9, 17, 33, 1]])
    bank = params["token_embedder"]["embedding"][jnp.array([9, 33])][None]
    virtual = jnp.array([[5, 61, 17, 62, 1]])
    run = jax.jit(lambda ids, bank: model.encode(params, Injection(bank), ids, jnp.ones_like(ids)))
    np.testing.assert_array_equal(run(words, None), run(virtual, bank))
