"""Prefix tuning: its starts, its network and its sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.config.methods import PrefixConfig
from jaxprompt.config.schema import PromptConfig, RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.methods.prefix import from_words, prefix
from jaxprompt.methods.registry import method_of
from jaxprompt.models.injection import Prefix, leaf_at

PLACES = {
    "encoder": ("encoder", "layers", "attention"),
    "decoder": ("decoder", "layers", "self_attention"),
    "cross": ("decoder", "layers", "cross_attention"),
}


def shapes(depth, width, heads, size=64):
    """The weights of keys of a T5, and of a decoder-only model, none of which is allocated."""
    module = {"key": jax.ShapeDtypeStruct((depth, width, heads, size), "float32")}
    t5 = {
        "encoder": {"layers": {"attention": module}},
        "decoder": {"layers": {"self_attention": module, "cross_attention": module}},
    }
    return t5, {"layers": {"attention": module}}


BASE, _ = shapes(12, 768, 12)
LARGE, _ = shapes(24, 1024, 16)
TINY, TINY_DECODER = shapes(2, 6, 3, 4)


def started(config, params=TINY, members=1, seed=0):
    start = np.zeros((members, 0, 6), np.float32)
    return prefix(config).init(params, start, PromptConfig(), seed)


def injected(config, trainables, place="encoder"):
    layers = prefix(config).inject(trainables, {}).layers
    made = leaf_at(layers, (*PLACES[place], "prefix"))
    assert isinstance(made, Prefix)
    return made


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("params", "length", "places", "parameters"),
    [
        (BASE, 10, [*PLACES], 552_960),
        (BASE, 30, [*PLACES], 1_658_880),
        (BASE, 30, ["encoder"], 552_960),
        (LARGE, 30, [*PLACES], 4_423_680),
        (LARGE, 30, ["encoder"], 1_474_560),
    ],
)
def test_as_many_numbers_are_stored_as_the_papers_count(params, length, places, parameters):
    config = PrefixConfig(length=length, places=places, mlp=None)
    assert count(jax.eval_shape(lambda: started(config, params))) == parameters


def test_the_network_of_a_place_has_as_many_parameters_as_that_of_the_papers():
    config = PrefixConfig(length=30, places=["encoder"], mlp=512)
    trained = jax.eval_shape(lambda: started(config, BASE))
    embedding, down, up = 30 * 768, 768 * 512 + 512, 513 * 2 * 12 * 768
    assert count(trained) == embedding + down + up == 9_872_384
    stored = jax.eval_shape(lambda trainables: injected(config, trainables), trained)
    assert count(stored) == 552_960


def test_the_network_is_an_embedding_and_tanh_between_two_matrices():
    config = PrefixConfig(length=3, places=["cross"], mlp=5)
    rng = np.random.default_rng(0)
    leaves = {k: rng.normal(size=x.shape) for k, x in started(config, members=2).items()}
    made = injected(config, {k: jnp.asarray(x, jnp.float32) for k, x in leaves.items()}, "cross")
    assert made.key.shape == made.value.shape == (2, 2, 3, 3, 4)  # K L P G H
    name = "decoder/layers/cross_attention/prefix/"
    for member in range(2):
        of = {k.removeprefix(name): x[member] for k, x in leaves.items()}
        hidden = np.tanh(of["embedding"] @ of["down"] / np.sqrt(3 * 6) + of["down_bias"])
        flat = hidden @ of["up"].reshape(5, -1) / np.sqrt(3 * 5) + of["up_bias"].reshape(1, -1)
        both = flat.reshape(3, 2, 2, 3, 4)  # the layers' keys and values in turn
        for which, found in enumerate((made.key, made.value)):
            wanted = both[:, :, which].swapaxes(0, 1)
            np.testing.assert_allclose(found[member], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mlp", [None, 5])
def test_zeros_are_zeros_and_normal_numbers_are_small(mlp):
    for init in ("zeros", "normal"):
        config = PrefixConfig(length=200, mlp=mlp, init=init)
        made = np.stack(injected(config, started(config))[:2])
        deviation = {"zeros": 0, "normal": 0.02 if mlp is None else 0.28}[init]
        assert made.std() == pytest.approx(deviation, rel=0.4)


def test_members_start_alike_and_seeds_do_not():
    config = PrefixConfig(length=3, mlp=4)
    two = started(config, members=2)
    for name, leaf in started(config, seed=1).items():
        np.testing.assert_array_equal(two[name][0], two[name][1])
        assert not np.array_equal(leaf[0], two[name][0]) or name.endswith("bias")


@pytest.mark.parametrize("mlp", [None, 5])
def test_from_text_the_prefix_is_the_keys_and_values_of_the_words_bit_for_bit(mlp):
    rng = np.random.default_rng(0)
    draw = lambda: jnp.asarray(rng.normal(size=(1, 2, 3, 3, 4)), jnp.float32)
    words = {"encoder": {"layers": {"attention": {"prefix": Prefix(draw(), draw())}}}}
    config = PrefixConfig(length=3, places=["encoder"], mlp=mlp, init="text", text="some words")
    made = injected(config, from_words(started(config), words))
    wanted = words["encoder"]["layers"]["attention"]["prefix"]
    np.testing.assert_array_equal(made.key, wanted.key)
    np.testing.assert_array_equal(made.value, wanted.value)


def test_a_decoder_only_model_has_one_place_and_refuses_others_by_name():
    all_places = started(PrefixConfig(mlp=None, length=2), TINY_DECODER)
    assert sorted(all_places) == ["layers/attention/prefix/key", "layers/attention/prefix/value"]
    only = started(PrefixConfig(mlp=None, length=2, places=["decoder"]), TINY_DECODER)
    assert sorted(only) == sorted(all_places)
    with pytest.raises(UserError, match=r"prefix.places names 'encoder'.*set prefix.places to"):
        started(PrefixConfig(places=["decoder", "encoder"]), TINY_DECODER)


def test_no_place_and_no_text_are_refused():
    with pytest.raises(UserError, match=r"name at least one of encoder, decoder and cross"):
        started(PrefixConfig(places=[]))
    with pytest.raises(UserError, match=r"init=text needs prefix.text"):
        parse(PrefixConfig, {"init": "text"}, "prefix.")


def test_p_tuning_v2_is_a_prefix_of_the_encoder_without_a_network():
    run = RunConfig(task="boolq", output="x", method="p-tuning-v2")
    trainables = method_of(run).init(TINY, np.zeros((1, 0, 6), np.float32), run.prompt, 0)
    assert sorted(trainables) == [
        f"encoder/layers/attention/prefix/{name}" for name in ("key", "value")
    ]
