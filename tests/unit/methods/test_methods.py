"""Methods of several parts, and members of several structures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.config.methods import IA3Config, LoraConfig
from jaxprompt.config.schema import PromptConfig, RunConfig
from jaxprompt.methods.base import grouped, join_groups
from jaxprompt.methods.full import MODEL_TUNING, PRETRAINING
from jaxprompt.methods.ia3 import ia3
from jaxprompt.methods.lora import lora
from jaxprompt.methods.registry import METHODS, method_of
from jaxprompt.models.registry import model_for
from jaxprompt.models.t5.config import T5Config

PROMPTS = sorted(name for name, method in METHODS.items() if method.uses_prompt)
WEIGHTS = {"token_embedder": {"embedding": jnp.ones((7, 4))}, "scale": jnp.arange(4.0)}


def first_trainables(method, length, members=1):
    config = PromptConfig(length=length, bottleneck=3, basis=length)
    shape = members, method.num_start_vectors(config), 4
    start = np.random.default_rng(length).normal(size=shape).astype(np.float32)
    return method.init(WEIGHTS, start, config, 0)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_several_lengths_are_one_bank(name):
    method = METHODS[name]
    lengths = {2: 1, 3: 2}  # members by length
    groups = [first_trainables(method, *item) for item in lengths.items()]
    together = grouped([method, method]).inject(join_groups(groups), WEIGHTS)
    assert together.embeddings.shape == (3, 3, 4)
    alone = method.inject(groups[0], WEIGHTS)
    np.testing.assert_array_equal(together.embeddings[:1, :2], alone.embeddings)


def test_a_whole_model_starts_as_the_frozen_one():
    for method, part in ((MODEL_TUNING, lambda x: x), (PRETRAINING, lambda x: x["model"])):
        trainables = part(first_trainables(method, 2))
        restored = jax.tree.map(lambda x: x[0], trainables)
        assert jax.tree.all(jax.tree.map(np.array_equal, restored, WEIGHTS))


def sized(layers=12, d_model=768, heads=12, d_ff=2048, gated=True):
    """Shapes of a T5's parameters, of which none is allocated."""
    config = T5Config(
        vocab_size=32128, d_model=d_model, num_heads=heads, head_dim=64, d_ff=d_ff, gated=gated,
        num_encoder_layers=layers, num_decoder_layers=layers,
    )  # fmt: skip
    return model_for(config).abstract_params()


BASE, BASE_1_0 = {}, {"d_ff": 3072, "gated": False}
LARGE = {"layers": 24, "d_model": 1024, "heads": 16, "d_ff": 2816}


@pytest.mark.parametrize(
    "method, shape, count",
    [
        (lora(LoraConfig(rank=8)), BASE, 884_736),
        (lora(LoraConfig(rank=16)), BASE, 1_769_472),
        (lora(LoraConfig(rank=32)), BASE, 3_538_944),
        (lora(LoraConfig(rank=8)), LARGE, 2_359_296),
        (ia3(IA3Config()), BASE_1_0, 129_024),
        (ia3(IA3Config()), BASE, 104_448),
        (ia3(IA3Config()), LARGE, 282_624),
        (ia3(IA3Config()), LARGE | {"d_ff": 4096, "gated": False}, 344_064),
    ],
)
def test_as_many_parameters_are_trained_as_the_papers_count(method, shape, count):
    start = np.zeros((1, 0, 768), np.float32)
    begin = lambda params: method.init(params, start, PromptConfig(), 0)
    leaves = jax.tree.leaves(jax.eval_shape(begin, sized(**shape)))
    assert sum(leaf.size for leaf in leaves) == count


def test_all_linear_layers_with_rank_4_have_1_7_million_parameters():
    method = lora(LoraConfig(rank=4, targets="all"))
    begin = lambda p: method.init(p, np.zeros((1, 0, 768), np.float32), PromptConfig(), 0)
    leaves = jax.tree.leaves(jax.eval_shape(begin, sized()))
    assert sum(leaf.size for leaf in leaves) == 12 * 4 * (
        3 * 4 * 2 * 768 + 2 * 3 * (768 + 2048)
    )  # 1.70 million


def test_a_method_of_two_parts_has_both(tiny):
    params = tiny[1]
    run = RunConfig(task="boolq", output="x", method="prompt+lora", prompt={"length": 3})
    method = method_of(run)
    start = np.ones((2, 3, 16), np.float32)
    trainables = method.init(params, start, run.prompt, 0)
    assert trainables.keys() == {"prompt", "lora"}
    injection = method.inject(trainables, params)
    assert injection.embeddings.shape == (2, 3, 16) and injection.num_members == 2
    assert injection.layers["encoder"]["layers"]["attention"].keys() == {"query", "value"}


def test_members_of_several_ranks_are_filled_up_with_zeros(tiny):
    params = tiny[1]
    methods = [lora(LoraConfig(rank=2)), lora(LoraConfig(rank=4, targets=["key", "query"]))]
    start, prompt = np.zeros((1, 0, 16), np.float32), PromptConfig()
    groups = [method.init(params, start, prompt, 0) for method in methods]
    layers = grouped(methods).inject(tuple(groups), params).layers["encoder"]["layers"]["attention"]
    assert layers.keys() == {"query", "value", "key"}
    a, b = layers["query"].low_rank
    assert a.shape == (2, 3, 16, 4) and b.shape == (2, 3, 4, 3, 4)
    assert not a[0, ..., 2:].any() and a[0, ..., :2].any() and not layers["key"].low_rank.a[0].any()


@pytest.mark.parametrize(
    "config, message",
    [
        ({"targets": ["wi"]}, "lora.targets names 'wi', .* it has key, out, query"),
        ({"rank": 13}, "lora.rank is 13, .* of at most 12"),
    ],
)
def test_a_lora_that_does_not_fit_is_one_sentence(tiny, config, message):
    with pytest.raises(UserError, match=message):
        start = np.zeros((1, 0, 16), np.float32)
        lora(LoraConfig(**config)).init(tiny[1], start, PromptConfig(), 0)
