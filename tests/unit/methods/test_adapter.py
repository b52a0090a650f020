"""How many numbers adapters, biases and norms train, how they start, and what is refused."""

import functools
import math

import jax
import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.config.methods import AdapterConfig, BitfitConfig
from jaxprompt.config.schema import PromptConfig, RunConfig
from jaxprompt.methods.adapter import adapter, adapter_shapes
from jaxprompt.methods.bitfit import bitfit
from jaxprompt.methods.norm_tuning import norm_tuning
from jaxprompt.methods.registry import method_of
from jaxprompt.models.decoder import decoder
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.t5 import t5
from jaxprompt.models.t5.config import T5Config

BOTH, MLP = ["attention", "mlp"], ["mlp"]


@functools.cache
def shapes(name, gated=False):
    """Of all parameters of a T5 1.0, or of a gated T5 1.1; nothing is allocated."""
    width, heads, depth, hidden = {"base": (768, 12, 12, 3072), "large": (1024, 16, 24, 4096)}[name]
    hidden = {"base": 2048, "large": 2816}[name] if gated else hidden
    config = T5Config(
        vocab_size=32128, d_model=width, num_heads=heads, head_dim=64, d_ff=hidden, gated=gated,
        num_encoder_layers=depth, num_decoder_layers=depth,
    )  # fmt: skip
    return t5.abstract_params(config)


DECODER = decoder.abstract_params(
    DecoderConfig(
        vocab_size=16, d_model=16, num_heads=4, head_dim=4, d_ff=24, num_kv_heads=2, num_layers=3,
        qkv_bias=True,
    )
)  # fmt: skip
ONE = np.zeros((1, 0, 1), np.float32)


def count(method, params):
    """Numbers that one member trains."""
    trainables = jax.eval_shape(lambda: method.init(params, ONE, PromptConfig(), 0))
    return sum(math.prod(leaf.shape) for leaf in trainables.values())


# formulas of the table of sizes: each adapter has 2 D m + m + D numbers
@pytest.mark.parametrize(
    ("name", "after", "reduction", "expected"),
    [
        ("base", BOTH, 16, 3_578_112),
        ("base", BOTH, 32, 1_807_488),  # with the norms the 1.9 M of published tables
        ("base", MLP, 16, 1_789_056),
        ("base", MLP, 2, 14_183_424),
        ("large", BOTH, 16, 12_687_360),
        ("large", BOTH, 32, 6_392_832),
        ("large", MLP, 16, 6_343_680),
        ("large", MLP, 2, 50_405_376),
    ],
)
def test_adapters_of_published_shapes_have_as_many_numbers(name, after, reduction, expected):
    config = AdapterConfig(after=after, reduction=reduction)
    every = adapter_shapes(config, shapes(name)).values()
    assert sum(map(math.prod, every)) == expected


def test_all_norms_have_5_scales_a_pair_of_layers_and_2_behind_them():
    for name, expected in {"base": (5 * 12 + 2) * 768, "large": (5 * 24 + 2) * 1024}.items():
        assert count(norm_tuning(), shapes(name)) == expected
    assert count(norm_tuning(), DECODER) == (2 * 3 + 1) * 16


@pytest.mark.parametrize(
    ("gated", "encoder", "decoder"),
    [  # q, k, v, o and wo of 768, wi of 3072, or wi_0 and wi_1 of 2048
        (False, 5 * 768 + 3072, 9 * 768 + 3072),
        (True, 5 * 768 + 2 * 2048, 9 * 768 + 2 * 2048),
    ],
)
def test_each_projection_has_a_bias_and_norms_join_if_asked(gated, encoder, decoder):
    biases = 12 * (encoder + decoder)
    params = shapes("base", gated)
    assert count(bitfit(BitfitConfig()), params) == biases
    assert count(bitfit(BitfitConfig(norms=True)), params) == biases + 47_616


def test_biases_of_a_decoder_have_the_width_of_each_projection():
    # query 16, key and value 8 each, out 16, wi_0 and wi_1 24 each, wo 16
    assert count(bitfit(BitfitConfig()), DECODER) == 3 * (16 + 8 + 8 + 16 + 24 + 24 + 16)


def started(**settings):
    method = adapter(AdapterConfig(**settings))
    return method.init(DECODER, np.zeros((2, 0, 16), np.float32), PromptConfig(), 7)


def test_all_members_start_alike_and_a_seed_decides_how():
    leaves = started(after=BOTH, reduction=4)
    for leaf in leaves.values():
        np.testing.assert_array_equal(leaf[0], leaf[1])
    other = adapter(AdapterConfig(after=BOTH, reduction=4)).init(DECODER, ONE, PromptConfig(), 8)
    name = "layers/mlp_adapter/down"
    assert (
        leaves[name].shape == (2, 3, 16, 4) and np.abs(leaves[name][0] - other[name][0]).min() > 0
    )


def test_a_normal_start_has_deviation_one_in_fifty_and_biases_of_zero():
    leaves = started(width=400)
    for name in ("down", "up"):
        assert np.std(leaves[f"layers/mlp_adapter/{name}"]) == pytest.approx(0.02, rel=0.02)
        assert not np.any(leaves[f"layers/mlp_adapter/{name}_bias"])


def test_a_start_at_zero_has_a_first_matrix_within_the_root_of_its_inputs():
    leaves = started(width=400, init="zeros")
    down, up = (np.asarray(leaves[f"layers/mlp_adapter/{name}"]) for name in ("down", "up"))
    assert not up.any() and np.abs(down).max() == pytest.approx(0.25, rel=1e-3)
    assert np.std(down) == pytest.approx(0.25 / 3**0.5, rel=0.02)


def test_a_reduction_wider_than_the_model_leaves_a_width_of_one():
    assert started(reduction=99)["layers/mlp_adapter/up"].shape == (2, 3, 1, 16)


def test_a_sublayer_that_a_model_has_not_is_refused():
    with pytest.raises(UserError, match="names 'cross', and this backbone has no such sublayer"):
        started(after=["mlp", "cross"])


def test_the_injection_says_what_an_adapter_reads():
    config = AdapterConfig(activation="silu", reads="normed", scale=4.0, after=BOTH)
    method = adapter(config)
    layers = method.inject(method.init(DECODER, ONE, PromptConfig(), 0), DECODER).layers
    assert layers["layers"].keys() == {"attention_adapter", "mlp_adapter"}
    leaf = layers["layers"]["mlp_adapter"]
    assert (leaf.activation, leaf.reads, leaf.scale) == ("silu", "normed", 4.0)
    assert leaf.down.shape == (1, 3, 16, 1)


def run_of(method, **settings):
    return RunConfig(task="boolq", output="x", method=method, **settings)


# as in the papers and, but for "parallel", which reads what the sublayer reads, in AdapterHub
PRESETS = {
    "adapter": (BOTH, "output", 32, "gelu", 1, "normal"),
    "houlsby": (BOTH, "output", 16, "silu", 1, "normal"),
    "pfeiffer": (MLP, "sum", 16, "relu", 1, "normal"),
    "parallel": (MLP, "normed", 2, "relu", 4, "zeros"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_settings_of_its_paper_alone_and_beside_a_prompt(name):
    for run in (run_of(name), run_of(f"prompt+{name}")):
        c = run.adapter
        found = c.after, c.reads, c.reduction, c.activation, c.scale, c.init
        assert found == PRESETS[name]
        assert run.learning_rates()["adapter"] == 3e-4
        assert (run.train.optimizer, run.train.schedule) == ("adamw", "linear")


def test_what_a_config_sets_wins_over_the_preset():
    assert run_of("pfeiffer", adapter={"width": 8, "reads": "output"}).adapter.reads == "output"


@pytest.mark.parametrize("name", ["parallel", "bitfit", "norm-tuning", "norm-tuning+adapter"])
def test_the_registry_makes_the_methods(name):
    method = method_of(run_of(name))
    start = jax.eval_shape(lambda: method.init(DECODER, ONE, PromptConfig(), 0))
    layers = jax.eval_shape(method.inject, start, DECODER).layers["layers"]
    assert ("mlp_adapter" in layers) == (name in ("parallel", "norm-tuning+adapter"))
    assert ("mlp_norm" in layers) == ("norm" in name)
    assert ("query" in layers.get("attention", {})) == (name == "bitfit")
