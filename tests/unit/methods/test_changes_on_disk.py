"""Artefacts of format 2, which hold changes of layers: to the bit, or refused by one sentence."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxprompt.config.errors import UserError
from jaxprompt.methods.artefact import Prompt, load_prompt, save_prompt
from jaxprompt.methods.contents import changes_in
from jaxprompt.methods.layers import check_fit, to_tensors
from jaxprompt.models.injection import Adapter, LowRank, Prefix, Projection


def random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


ADAPTER = Adapter(random(2, 16, 3), random(2, 3), random(2, 3, 16), random(2, 16), "silu", "sum", 2)
LAYERS = {
    "encoder": {
        "final_norm": {"scale": random(16)},
        "layers": {
            "attention": {
                "query": Projection(LowRank(random(2, 16, 3), random(2, 3, 2, 4))),
                "key": Projection(scale=random(2, 2, 4), bias=random(2, 2, 4)),
                "prefix": Prefix(random(2, 5, 2, 4), random(2, 5, 2, 4)),
            },
            "mlp": {"hidden": random(2, 24)},
            "mlp_adapter": ADAPTER,
        },
    }
}
A = "encoder/layers/attention/query/low_rank/a"


@pytest.fixture
def saved(tmp_path):
    save_prompt(tmp_path / "p", Prompt(random(4, 16), {"method": "all"}, LAYERS))
    return tmp_path / "p"


def change(saved, **tensors):
    """Replace tensors of the file; None takes one away."""
    file = saved / "prompt.safetensors"
    every = load_file(file) | tensors
    save_file({name: tensor for name, tensor in every.items() if tensor is not None}, file)


def refused(saved, message):
    with pytest.raises(UserError, match=message) as caught:
        load_prompt(saved)
    assert "\n" not in str(caught.value)


def test_every_kind_of_change_comes_back_to_the_bit(saved):
    prompt = load_prompt(saved)
    tensors, settings = to_tensors(prompt.layers)
    wanted, wanted_settings = to_tensors(LAYERS)
    assert settings == wanted_settings and tensors.keys() == wanted.keys()
    assert all(tensors[name].tobytes() == wanted[name].tobytes() for name in wanted)
    assert prompt.metadata["format"] == 2 and prompt.vectors.tobytes() == random(4, 16).tobytes()


def test_it_says_what_it_holds(saved):
    kinds = {
        each["kind"]: each for each in json.loads((saved / "prompt.json").read_text())["changes"]
    }
    assert list(kinds) == ["LoRA", "IA3", "biases", "norms", "prefixes", "adapters"]
    assert kinds["LoRA"] == {
        "kind": "LoRA", "targets": ["encoder query"], "size": 3, "numbers": 2 * 3 * (16 + 8)
    }  # fmt: skip
    assert kinds["IA3"]["targets"] == ["encoder hidden", "encoder key"]
    assert kinds["norms"]["targets"] == ["encoder final norm"]
    assert (kinds["prefixes"]["size"], kinds["adapters"]["size"]) == (5, 3)
    assert sum(each["numbers"] for each in kinds.values()) == sum(
        tensor.size for tensor in to_tensors(LAYERS)[0].values()
    )
    card = (saved / "README.md").read_text()
    assert "4 vectors of 16 numbers that go before the text, and" in card
    assert "- adapters of width 3: encoder mlp adapter; 230 numbers" in card


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({A: None}, "'encoder/layers/attention/query' do not belong together"),
        ({"encoder/layers/mlp_adapter/up": None}, "'encoder/layers/mlp_adapter' do not belong"),
        ({"encoder/layers/attention/prefix/key": None}, "attention/prefix' do not belong together"),
        ({"encoder/layers/odd/thing": random(2)}, "'encoder/layers/odd/thing' is of no change"),
        ({"x": random(2)}, "'x' is of no change that this version knows"),
        ({A: np.full((2, 16, 3), np.nan, np.float32)}, "low_rank/a' holds values .* not finite"),
        ({A: np.ones((2, 16, 3), np.int32)}, "low_rank/a' holds int32; it must be of float"),
        ({"prompt": random(5, 16)}, "says length 4 and prompt.safetensors has 5"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_named(saved, tensors, message):
    change(saved, **tensors)
    refused(saved, message)


def test_an_adapter_without_its_settings_has_the_usual_ones(saved):
    values = json.loads((saved / "prompt.json").read_text())
    values["layers"] = {"encoder/layers/mlp_adapter": {"odd": 1}}
    (saved / "prompt.json").write_text(json.dumps(values))
    refused(saved, "'encoder/layers/mlp_adapter' do not belong together")
    values["layers"] = [1]
    (saved / "prompt.json").write_text(json.dumps(values))
    refused(saved, r"'layers' is \[1\], no object")


def parameters(width=16, heads=2, depth=2):
    attention = {name: np.zeros((depth, width, heads, 4)) for name in ("query", "key", "value")}
    mlp = {"wi": np.zeros((depth, width, 24)), "wo": np.zeros((depth, 24, width))}
    return {
        "encoder": {
            "final_norm": {"scale": np.zeros(width)},
            "layers": {"attention": attention, "mlp": mlp},
        }
    }


def test_changes_fit_their_own_backbone_and_no_other(saved):
    layers = load_prompt(saved).layers
    check_fit(layers, parameters(), "mine")
    for other in (parameters(width=8), parameters(heads=3), parameters(depth=3), {}):
        with pytest.raises(UserError, match="and other has no weights of that place and size"):
            check_fit(layers, other, "other")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (A, random(2, 16, 4)),
        ("encoder/layers/mlp_adapter/up", random(2, 4, 16)),
        ("encoder/layers/mlp_adapter/down_bias", random(2, 4)),
        ("encoder/layers/attention/prefix/value", random(2, 4, 2, 4)),
        ("encoder/layers/attention/prefix/used", np.ones(2, bool)),
    ],
)
def test_tensors_of_one_change_are_of_one_size(saved, name, tensor):
    change(saved, **{name: tensor})
    with pytest.raises(UserError, match="has shape .*; the two do not belong together"):
        check_fit(load_prompt(saved).layers, parameters(), "mine")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (A, random(2, 3)),
        ("encoder/layers/mlp_adapter/up_bias", random(2, 15)),
        ("encoder/layers/mlp/hidden", random(2)),
        ("encoder/final_norm/scale", random(2, 16)),
    ],
)
def test_a_wrong_shape_is_named(saved, name, tensor):
    change(saved, **{name: tensor})
    with pytest.raises(UserError, match=f"The changes at '{name}' have shape"):
        check_fit(load_prompt(saved).layers, parameters(), "mine")


def test_nothing_is_changed_by_nothing():
    assert changes_in(None) == [] == changes_in({})
