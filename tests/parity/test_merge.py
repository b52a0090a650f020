"""A merged model answers as the frozen one does with what was merged into it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.decoder.decoder import DecoderModel
from jaxprompt.models.injection import Adapter, Injection, LowRank, Prefix, Projection
from jaxprompt.models.merge import merge
from jaxprompt.models.ops.quantization import quantize
from jaxprompt.models.t5.config import T5Config
from jaxprompt.models.t5.t5 import T5Model

SIZES = {"vocab_size": 24, "d_model": 16, "num_heads": 4, "head_dim": 4, "d_ff": 24}
DEPTHS = {"num_encoder_layers": 2, "num_decoder_layers": 2}
MODELS = {
    "gated T5": T5Model(T5Config(**SIZES, **DEPTHS)),
    "ungated T5": T5Model(T5Config(**SIZES, **DEPTHS, gated=False, activation="relu", tied=True)),
    "Qwen2": DecoderModel(DecoderConfig(**SIZES, num_layers=2, num_kv_heads=2, qkv_bias=True)),
}
KERNELS = "query", "key", "value", "out", "wi", "wi_0", "wi_1", "wo"


@functools.cache
def weights(name):
    rng = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(0.35 * rng.normal(size=leaf.shape), jnp.float32)
    return jax.tree.map(draw, MODELS[name].abstract_params())


def random(rng, *sizes):
    return jnp.asarray(0.3 * rng.normal(size=(1, *sizes)), jnp.float32)


def change(name, shape, rng, parts, with_bias):
    """A change of a kernel [L, *in, *out] with some of the parts."""
    draw = lambda *sizes: random(rng, *sizes)
    summed = 2 if name == "out" else 1
    depth, inputs, outputs = shape[0], shape[1 : 1 + summed], shape[1 + summed :]
    return Projection(
        LowRank(draw(depth, *inputs, 3), draw(depth, 3, *outputs)) if "low rank" in parts else None,
        draw(depth, *outputs) if "scale" in parts else None,
        draw(depth, *outputs) if "bias" in parts and with_bias else None,
    )


def changes_of(params, parts, rng):
    """Such changes of every weight, hidden values and norm of a model."""
    layers = {}
    for name, value in params.items():
        if isinstance(value, dict):
            inner = changes_of(value, parts, rng)
            layers |= {name: inner} if inner else {}
        elif name in KERNELS:
            layers[name] = change(name, value.shape, rng, parts, f"{name}_bias" in params)
            if name == "wo" and "hidden" in parts:
                layers["hidden"] = random(rng, *value.shape[:2])
        elif name == "scale" and "norms" in parts:
            layers[name] = random(rng, *value.shape)
    return layers


def injection_of(name, *parts):
    return Injection(layers=changes_of(weights(name), parts, np.random.default_rng(2)))


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, injection):
    ids = jnp.asarray(np.random.default_rng(0).integers(3, 24, (2, 5)))
    return model.logits(params, injection, ids, jnp.ones_like(ids), ids, jnp.ones_like(ids))


@pytest.mark.parametrize("name", MODELS)
def test_merged_equals_unmerged(name):
    params, model = weights(name), MODELS[name]
    injection = injection_of(name, "low rank", "scale", "bias", "hidden", "norms")
    merged = merge(params, injection)
    expected = _logits(model, params, injection)
    found = _logits(model, merged, Injection())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.abs(_logits(model, params, Injection()) - expected).max() > 0.1
    assert jax.tree.structure(merged) == jax.tree.structure(params)


def test_the_frozen_model_stays_as_it_is():
    params = weights("Qwen2")
    before = jax.tree.map(np.array, params)
    merged = merge(params, injection_of("Qwen2", "low rank", "bias"))
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert merged["token_embedder"] is params["token_embedder"]


def test_scales_of_hidden_values_alone_go_into_the_rows_of_wo():
    params = weights("gated T5")
    layers = {"encoder": {"layers": {"mlp": {"hidden": jnp.full((1, 2, 24), 0.5)}}}}
    merged = merge(params, Injection(layers=layers))
    wo = params["encoder"]["layers"]["mlp"]["wo"]
    np.testing.assert_array_equal(merged["encoder"]["layers"]["mlp"]["wo"], wo * 1.5)


def test_a_weight_in_bfloat16_is_rounded_once():
    """W (1 + hidden) (1 + scale) with one rounding at the end, for numbers and for their bits."""
    rng = np.random.default_rng(0)
    wo = jnp.asarray(rng.normal(size=(2, 24, 16)), jnp.bfloat16)
    hidden, scale = (random(rng, 2, n) for n in (24, 16))
    layers = {"layers": {"mlp": {"hidden": hidden, "wo": Projection(scale=scale)}}}
    exact = np.float32(wo) * (1 + hidden[0, :, :, None]) * (1 + scale[0, :, None])
    for stored in (wo, jnp.asarray(np.asarray(wo).view(np.uint16))):
        merged = merge({"layers": {"mlp": {"wo": stored}}}, Injection(layers=layers))
        found = merged["layers"]["mlp"]["wo"]
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(found), exact, rtol=2**-8)


def refused(params, layers, **fields):
    with pytest.raises(UserError) as error:
        merge(params, Injection(layers=layers, **fields))
    return str(error.value)


def test_what_no_weight_can_hold_is_refused_by_name():
    params, zeros = weights("gated T5"), jnp.zeros((1, 2, 4))
    part = Adapter(zeros, zeros, zeros, zeros)
    text = refused(params, {"encoder": {"layers": {"mlp_adapter": part}}})
    assert text.startswith("The method has adapters (encoder/layers/mlp_adapter), which no weight")
    prefix = {"attention": {"prefix": Prefix(zeros, zeros)}}
    assert "prefixes of keys and values" in refused(params, {"encoder": {"layers": prefix}})
    bias = {"attention": {"query": Projection(bias=jnp.zeros((1, 2, 4, 4)))}}
    text = refused(params, {"encoder": {"layers": bias}})
    assert "biases (encoder/layers/attention/query), where this backbone has none" in text
    assert "virtual tokens" in refused(params, None, embeddings=jnp.zeros((1, 3, 16)))
    assert "does not have" in refused(params, {"layers": {"mlp": {"hidden": zeros}}})


def test_quantized_weights_are_refused():
    pytest.importorskip("qwix")
    weight = quantize(jnp.ones((2, 16, 4, 4)), ("layers", "embed", "heads", "kv"), "int8")
    change = Projection(scale=jnp.zeros((1, 2, 4, 4)))
    text = refused(
        {"layers": {"attention": {"query": weight}}}, {"layers": {"attention": {"query": change}}}
    )
    assert text.startswith("The backbone is quantized (layers/attention/query)")


def test_one_member_is_merged_at_a_time():
    with pytest.raises(ValueError, match="2 members"):
        merge({}, Injection(layers={"mlp": {"hidden": jnp.zeros((2, 3))}}))
