"""What a run trains and stores, from shapes."""

import pytest

from jaxprompt.config.schema import RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.models import registry
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.t5.config import T5Config, released
from jaxprompt.training.plan import Layout
from jaxprompt.training.trained_shapes import trained_shapes

BASE = released("google/t5-v1_1-base")
TINY = T5Config(
    vocab_size=128, d_model=32, num_heads=4, head_dim=8, d_ff=64,
    num_encoder_layers=2, num_decoder_layers=3,
)  # fmt: skip
TINY_DECODER = DecoderConfig(
    vocab_size=128, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=64, num_layers=2
)
ONE = Layout(1, 1, 1, False)


def config(**changes):
    task = {"name": "rows", "template": "{text}", "target": "{label}", "labels": ["yes", "no"],
            "train": "a.jsonl", "validation": "a.jsonl"}  # fmt: skip
    return parse(RunConfig, {"backbone": "b", "task": task, "output": "-"} | changes)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 76_800),
        ({"method": "lora"}, 884_736),
        ({"method": "lora", "lora": {"rank": 16}}, 2 * 884_736),
        ({"method": "ia3"}, 104_448),
        ({"method": "houlsby"}, 3_578_112),
        ({"method": "pfeiffer"}, 1_789_056),
        ({"method": "norm-tuning"}, 47_616),
        ({"method": "prompt+lora"}, 76_800 + 884_736),
        ({"method": "model-tuning"}, 247_577_856),
    ],
)
def test_trained_and_stored_parameters_of_each_method_on_a_t5_base(changes, count):
    (member,) = trained_shapes(config(**changes), BASE).members
    assert member == (count, 4 * count)


@pytest.mark.parametrize(
    ("method", "count", "stored"),
    [
        ("multitask-prompt-tuning", 77_668, 76_800),
        ("p-tuning-v2", 552_960, 552_960),
        # a network for each of encoder, decoder and cross-attention: PD + Dm + m + m 2LI + 2LI
        ("prefix-tuning", 3 * (30 * 768 + 769 * 512 + 513 * 2 * 12 * 768), 1_658_880),
    ],
)
def test_what_only_makes_the_injection_is_not_stored(method, count, stored):
    (member,) = trained_shapes(config(method=method), BASE).members
    assert member == (count, 4 * stored)


def test_a_network_that_makes_vectors_is_trained_and_not_stored():
    changes = {"method": "residual-prompt-tuning", "prompt": {"length": 10}}
    (member,) = trained_shapes(config(**changes), TINY).members
    assert member.stored_bytes == 4 * 10 * 32
    assert member.parameters > 10 * 32
    assert trained_shapes(config(**changes), TINY).network_flops > 0
    assert trained_shapes(config(), TINY).network_flops == 0


@pytest.mark.parametrize("method", ["prompt-tuning", "lora", "prompt+lora"])
def test_a_state_has_trainables_gradient_and_two_moments(method):
    trained = trained_shapes(config(method=method, train={"optimizer": "adamw"}), TINY)
    count = trained.members[0].parameters
    model = registry.model_for(TINY)
    assert trained.state_bytes(model, ONE) == pytest.approx(4 * 4 * count, abs=64)
    # the gradient of a micro-batch beside the sum of those before
    assert trained.state_bytes(model, ONE, 3) == pytest.approx(5 * 4 * count, abs=64)


@pytest.mark.parametrize("shape", [TINY, TINY_DECODER])
def test_members_of_several_structures_are_counted_one_by_one(shape):
    grid = {"lora.rank": [2, 4], "seed": [0, 1, 2]}
    both = trained_shapes(config(method="lora", prompt={"population": grid}), shape)
    alone = [
        trained_shapes(config(method="lora", lora={"rank": rank}), shape).members[0]
        for rank in (2, 4)
    ]
    assert both.members == (*[alone[0]] * 3, *[alone[1]] * 3)
    assert both.injection.num_members == 6
    assert len(both.states) == 2


def test_moments_and_gradient_of_a_whole_model_are_divided_as_its_weights():
    trained = trained_shapes(config(method="model-tuning", train={"optimizer": "adamw"}), TINY)
    model, count = registry.model_for(TINY), trained.members[0].parameters
    alone = trained.state_bytes(model, ONE)
    assert trained.state_bytes(model, ONE, 2) == alone + 4 * count
    assert alone == pytest.approx(3 * 4 * count, abs=64)  # and the weights themselves
    norms = 4 * 3 * (2 * 2 + 3 * 3 + 2) * 32  # which every device has whole, and the biases
    four = trained.state_bytes(model, Layout(1, 4, 1, False))
    assert alone / 4 <= four <= alone / 4 + norms + 4 * 3 * 2 * 32 * 4
    assert trained.state_bytes(model, Layout(4, 1, 1, False)) == alone


def test_a_gradient_goes_around_a_ring_of_all_devices_that_have_it():
    model = registry.model_for(TINY)
    prompt = trained_shapes(config(prompt={"length": 10}), TINY)
    assert prompt.gradient_traffic(model, ONE) == 0
    assert prompt.gradient_traffic(model, Layout(2, 2, 1, False)) == 2 * 4 * 320 * 3 // 4
    whole = trained_shapes(config(method="model-tuning"), TINY)
    size = 4 * whole.members[0].parameters
    assert whole.gradient_traffic(model, Layout(1, 2, 1, False)) == 0
    assert whole.gradient_traffic(model, Layout(2, 1, 1, False)) == size
