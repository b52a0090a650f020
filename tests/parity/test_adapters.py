"""Adapters in tiny models, against their formulas in NumPy. test_method_invariants.py has the rest.

The reference reads one row at a time, in float64, and shares no code with the models but that of
relative positions and of rotary angles.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprompt.config.methods import AdapterConfig, BitfitConfig
from jaxprompt.config.schema import PromptConfig
from jaxprompt.methods.adapter import adapter
from jaxprompt.methods.bitfit import bitfit
from jaxprompt.methods.norm_tuning import norm_tuning
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.decoder.decoder import DecoderModel
from jaxprompt.models.decoder.rotary import rotary_frequencies, rotate
from jaxprompt.models.injection import Injection
from jaxprompt.models.ops.positions import relative_buckets
from jaxprompt.models.t5.config import T5Config
from jaxprompt.models.t5.t5 import T5Model

SIZES = {"vocab_size": 24, "d_model": 16, "num_heads": 2, "head_dim": 4, "d_ff": 24}
T5 = T5Model(T5Config(**SIZES, num_encoder_layers=2, num_decoder_layers=2))
DECODER = DecoderModel(DecoderConfig(**SIZES, num_kv_heads=2, num_layers=2))
MODELS = {"T5": T5, "decoder-only": DECODER}
MEMBER = np.array([1, 0, 1], np.int32)
KINDS = {  # what is read: activation, scale
    "output": ("silu", 1.0),
    "sum": ("relu", 1.0),
    "input": ("gelu", 4.0),
    "normed": ("gelu_exact", 0.5),
}


@functools.cache
def weights(name):
    """Random weights, and norms whose scales are not all 1."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        start = 1 if path[-1].key == "scale" else 0
        return jnp.asarray((start + 0.35 * rng.normal(size=leaf.shape)).astype("f4"))

    return jax.tree_util.tree_map_with_path(draw, MODELS[name].abstract_params())


def batch(seed=0):
    """Ids and segments of three rows of inputs and targets, without padding."""
    rng = np.random.default_rng(seed)
    inputs, targets = rng.integers(3, 24, (3, 6)), rng.integers(3, 24, (3, 4))
    return inputs, np.ones_like(inputs), targets, np.ones_like(targets)


def method_of(name, reads):
    activation, scale = KINDS[reads]
    after = ["attention", "mlp"] + ["cross"] * (name == "T5")
    return adapter(
        AdapterConfig(after=after, width=3, reads=reads, activation=activation, scale=scale)
    )


def started(method, params, count):
    return method.init(params, np.zeros((count, 0, 16), np.float32), PromptConfig(), 0)


def random_injection(method, params, count=2, seed=0):
    """Trainables of any values, other ones for each member, injected."""
    rng = np.random.default_rng(seed)
    start = jax.eval_shape(lambda: started(method, params, count))
    draw = lambda shape: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)
    leaves = {name: draw(leaf.shape) for name, leaf in start.items()}
    return method.inject(leaves, params)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, injection, member, arrays):
    return model.logits(params, injection.for_rows(len(member), member), *arrays)


def logits(name, injection, member=MEMBER, arrays=None, params=None):
    params = weights(name) if params is None else params
    return np.asarray(_logits(MODELS[name], params, injection, member, arrays or batch()))


# the reference


def in_float64(tree, *index):
    return jax.tree.map(lambda x: np.asarray(x, np.float64)[index], tree)


def activated(x, name):
    if name == "relu":
        return np.maximum(x, 0)
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def normed(x, norm, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * norm["scale"]


def attention(p, x, read, bias, turn=lambda y: y, scale=1.0):
    query, key = (turn(np.einsum("td,dnh->tnh", y, p[k])) for y, k in ((x, "query"), (read, "key")))
    value = np.einsum("sd,dnh->snh", read, p["value"])
    scores = np.exp(scale * np.einsum("tnh,snh->nts", query, key) + bias)
    y = np.einsum("nts,snh->tnh", scores / scores.sum(-1, keepdims=True), value)
    return np.einsum("tnh,nhd->td", y, p["out"])


def mlp(p, x, activation):
    return activated(x @ p["wi_0"], activation) * (x @ p["wi_1"]) @ p["wo"]


def with_adapter(x, normed_x, f, part):
    """x + f + scale A(h), by the formula of each placement."""
    if part is None:
        return x + f
    h = {"output": f, "sum": x + f, "input": x, "normed": normed_x}[part.reads]
    down = activated(h @ part.down + part.down_bias, part.activation)
    return x + f + part.scale * (down @ part.up + part.up_bias)


def layer(p, adapters, x, sublayers, eps):
    for name, leaf, function in sublayers:
        y = normed(x, p[f"{name}_norm"], eps)
        x = with_adapter(x, y, function(p[name], y), adapters.get(leaf))
    return x


def causal(length):
    return np.where(np.arange(length)[:, None] >= np.arange(length), 0, -np.inf)


def t5_row(params, layers, ids, targets):
    c, table = T5.config, params["token_embedder"]["embedding"]

    def stack(side, x, bidirectional, sublayers):
        offsets = np.arange(len(x)) - np.arange(len(x))[:, None]
        buckets = relative_buckets(
            jnp.asarray(offsets), bidirectional=bidirectional, buckets=c.buckets,
            max_distance=c.max_distance,
        )  # fmt: skip
        bias = params[side]["relative_bias"][np.asarray(buckets)].transpose(2, 0, 1)
        bias = bias if bidirectional else bias + causal(len(x))
        for i in range(2):
            adapters = in_float64(layers[side]["layers"], i)
            x = layer(
                in_float64(params[side]["layers"], i), adapters, x, sublayers(bias), c.norm_eps
            )
        return normed(x, params[side]["final_norm"], c.norm_eps)

    feed = "mlp", "mlp_adapter", lambda p, y: mlp(p, y, "gelu")
    encoded = stack("encoder", table[ids], True, lambda bias: (
        ("attention", "attention_adapter", lambda p, y: attention(p, y, y, bias)), feed,
    ))  # fmt: skip
    decoded = stack("decoder", table[np.append(0, targets[:-1])], False, lambda bias: (
        ("self_attention", "attention_adapter", lambda p, y: attention(p, y, y, bias)),
        ("cross_attention", "cross_attention_adapter", lambda p, y: attention(p, y, encoded, 0)),
        feed,
    ))  # fmt: skip
    return decoded @ params["head"]


def decoder_row(params, layers, ids, targets):
    c, text = DECODER.config, np.append(ids, targets[:-1])
    angles = np.arange(len(text))[:, None] * rotary_frequencies(c.head_dim, c.rope_theta, ())
    turn = lambda y: np.asarray(rotate(jnp.asarray(y[None]), jnp.asarray(angles[None])))[0]
    attend = functools.partial(attention, bias=causal(len(text)), turn=turn, scale=0.5)
    sublayers = (
        ("attention", "attention_adapter", lambda p, y: attend(p, y, y)),
        ("mlp", "mlp_adapter", lambda p, y: mlp(p, y, "silu")),
    )
    x = params["token_embedder"]["embedding"][text]
    for i in range(2):
        adapters = in_float64(layers["layers"], i)
        x = layer(in_float64(params["layers"], i), adapters, x, sublayers, c.norm_eps)
    return (normed(x, params["final_norm"], c.norm_eps) @ params["head"])[len(ids) - 1 :]


ROWS = {"T5": t5_row, "decoder-only": decoder_row}


@pytest.mark.parametrize("reads", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_adapters_of_each_placement_are_their_formula_in_every_row(name, reads):
    params = weights(name)
    injection = random_injection(method_of(name, reads), params)
    inputs, _, targets, _ = batch()
    rows = [
        ROWS[name](in_float64(params), in_float64(injection.layers, k), inputs[row], targets[row])
        for row, k in enumerate(MEMBER)
    ]
    np.testing.assert_allclose(logits(name, injection), rows, rtol=2e-5, atol=2e-5)
    assert np.abs(logits(name, Injection()) - rows).max() > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_adapters_keep_the_dtype_of_activations(name, dtype):
    """Else the scan over layers would refuse what they give."""
    model = MODELS[name].with_runtime(dtype=dtype, remat=True)
    injection = random_injection(method_of(name, "sum"), weights(name))
    found = jax.eval_shape(
        functools.partial(_logits, model), weights(name), injection, MEMBER, batch()
    )
    assert found.shape == (3, 4, 24) and found.dtype == jnp.float32


NEUTRAL = {
    "adapters": adapter(AdapterConfig(after=["attention", "mlp"], reads="normed", init="zeros")),
    "biases and norms": bitfit(BitfitConfig(norms=True)),
    "norms": norm_tuning(),
}


@pytest.mark.parametrize("kind", NEUTRAL)
@pytest.mark.parametrize("name", MODELS)
def test_a_neutral_start_of_several_members_is_the_frozen_model_bit_for_bit(name, kind):
    params, method = weights(name), NEUTRAL[kind]
    injection = method.inject(started(method, params, 2), params)
    np.testing.assert_array_equal(logits(name, injection), logits(name, Injection()))


@pytest.mark.parametrize("name", MODELS)
def test_cached_decoding_of_several_answers_a_row_equals_teacher_forcing(name):
    model, params, times = MODELS[name], weights(name), 2
    method = method_of(name, "normed")
    injection = random_injection(method, params).for_rows(3, jnp.asarray(MEMBER))
    inputs, segments, _, _ = batch()
    repeat = lambda x: np.repeat(x, times, axis=0)
    targets = np.random.default_rng(5).integers(3, 24, (3 * times, 4))
    arrays = repeat(inputs), repeat(segments), targets, np.ones_like(targets)
    forced = logits(name, injection._replace(member=None), repeat(MEMBER), arrays)
    prefill = jax.jit(model.prefill)(params, injection, inputs, segments)
    ids, cache = model.init_decode(params, injection, prefill, 4)
    ids, cache, step = jnp.repeat(ids, times), model.tile_cache(cache, times), model.decode_step
    step = jax.jit(step)
    for at in range(4):
        found, cache = step(params, injection, cache, ids, jnp.asarray(at))
        np.testing.assert_allclose(found, forced[:, at], rtol=2e-5, atol=2e-5)
        ids = targets[:, at]
