"""Tuning methods: what they start from, what they come to, and that a run stores that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_backbone, run_values

from jaxprompt.api import evaluate
from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import PromptConfig, RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.inference.session import open_session
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.methods.registry import METHODS
from jaxprompt.training.loop import train

P, D = 3, 8
CONFIG = PromptConfig(length=P, bottleneck=4, basis=6)


def start(method, count=2):
    rows = METHODS[method].num_start_vectors(CONFIG)
    return np.random.default_rng(0).normal(size=(count, rows, D)).astype(np.float32)


def test_a_residual_prompt_is_the_published_formula():
    method, begin = METHODS["residual-prompt-tuning"], start("residual-prompt-tuning")
    tree = method.init({}, begin, CONFIG, 7)
    rng = np.random.default_rng(1)
    tree = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), tree)
    bank = method.inject(tree, {}).embeddings
    assert bank is not None
    for k in range(2):
        p, w1, b1, w2, b2, gain, shift = (
            np.asarray(tree[name][k], np.float64)
            for name in ("prompt", "down", "down_bias", "up", "up_bias", "scale", "shift")
        )
        hidden = np.maximum(p @ (w1 / np.sqrt(D)) + b1, 0)
        out = hidden @ (w2 / np.sqrt(4)) + b2
        out = (out - out.mean(-1, keepdims=True)) / np.sqrt(out.var(-1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(bank[k], p + out * gain + shift, rtol=2e-5, atol=2e-5)


def test_a_superposition_starts_as_the_ordinary_prompt():
    begin = start("superposition-prompt-tuning")
    assert begin.shape == (2, 6, D)
    method = METHODS["superposition-prompt-tuning"]
    tree = method.init({}, begin, CONFIG, 0)
    bank = method.inject(tree, {}).embeddings
    np.testing.assert_allclose(bank, begin[:, :P], rtol=1e-6)
    # and a change of a weight moves a vector along the basis
    moved = tree | {"mixture": tree["mixture"].at[0, 1, 4].add(6**0.5)}
    changed = method.inject(moved, {}).embeddings
    assert changed is not None
    np.testing.assert_allclose(changed[0, 1], begin[0, 1] + begin[0, 4], rtol=1e-5)
    np.testing.assert_array_equal(changed[1], bank[1])


def test_a_basis_is_never_smaller_than_the_prompt():
    assert METHODS["superposition-prompt-tuning"].num_start_vectors(PromptConfig(length=200)) == 200


@pytest.mark.parametrize("name", ["residual-prompt-tuning", "superposition-prompt-tuning"])
def test_prompts_are_reparameterised_apart_from_each_other(name):
    method, begin = METHODS[name], start(name)
    both = method.inject(method.init({}, begin, CONFIG, 3), {}).embeddings
    alone = [
        method.inject(method.init({}, begin[k : k + 1], CONFIG, 3), {}).embeddings for k in range(2)
    ]
    assert both is not None
    np.testing.assert_allclose(both[0], alone[0][0], rtol=1e-5)
    gradient = jax.grad(lambda tree: jnp.sum(method.inject(tree, {}).embeddings[0] ** 2))(
        method.init({}, begin, CONFIG, 3)
    )
    for leaf in jax.tree.leaves(gradient):
        assert not np.any(np.asarray(leaf[1]))


# trained parameters
STORED = {
    "residual-prompt-tuning": 3 * 16 + 2 * 16 * 4 + 4 + 3 * 16,
    "superposition-prompt-tuning": 3 * 5 + 5 * 16,
    "p-tuning": 3 * 16 + 2 * 16 * (16 + 4 + 1) + 2 * 16 * (8 + 4 + 1) + 8 * 8 + 8 + 8 * 16 + 16,
}


@pytest.mark.parametrize("name", STORED)
def test_a_run_stores_the_vectors_and_resumes_exactly(tmp_path, name):
    backbone = make_backbone(tmp_path / "tiny")
    values = run_values(backbone, tmp_path) | {"method": name}
    values["prompt"] = {"length": P, "bottleneck": 4, "basis": 5}
    if name == "p-tuning":
        values["train"]["schedule"] = "constant"  # which does not depend on the number of steps
        values["p_tuning"] = {"encoder": "lstm", "width": 4}
        values["task"]["template"] = "[prompt:1] question [prompt:1] : {text} [prompt:1]"

    def result(folder, steps):
        values["train"]["steps"] = steps
        return train(parse(RunConfig, values | {"output": str(tmp_path / folder)}))

    whole = result("whole", 4)
    vectors = load_prompt(whole["prompt"]).vectors
    assert vectors.shape == (P, 16)
    assert whole["trainable_parameters"] == STORED[name]
    result("parts", 2)
    parts = result("parts", 4)
    assert parts["value"] == whole["value"]
    np.testing.assert_array_equal(load_prompt(parts["prompt"]).vectors, vectors)


EVERY_PART = "prompt+prefix+lora+adapter"  # in one run, as each takes a program of its own
LAYERS = {
    "prompt+lora": {"lora": {"rank": 2}},
    EVERY_PART: {
        "lora": {"rank": 2, "dropout": 0.2, "dora": True},
        "adapter": {"width": 2},
        "prefix": {"length": 3, "mlp": 5, "init": "text", "text": "one two"},
    },
}


def run_of(tmp_path, backbone, name, folder, **changes):
    """The result of a run whose schedule does not depend on the number of steps."""
    values = run_values(backbone, tmp_path) | {"method": name, "output": str(tmp_path / folder)}
    for section, settings in (LAYERS[name] | changes).items():
        values[section] = values.get(section, {}) | settings
    values["train"]["schedule"] = "constant"
    return train(parse(RunConfig, values))


def assert_same_prompts(one, other):
    first, second = (load_prompt(path) for path in (one, other))
    np.testing.assert_array_equal(first.vectors, second.vectors)
    arrays = [jax.tree.flatten(prompt.layers) for prompt in (first, second)]
    assert arrays[0][1] == arrays[1][1]
    jax.tree.map(np.testing.assert_array_equal, arrays[0][0], arrays[1][0])


def test_changes_of_layers_are_stored_and_resume_exactly(tmp_path):
    name = EVERY_PART
    backbone = make_backbone(tmp_path / "tiny")
    whole = run_of(tmp_path, backbone, name, "whole")
    run_of(tmp_path, backbone, name, "parts", train={"steps": 2})
    parts = run_of(tmp_path, backbone, name, "parts")
    assert parts["value"] == whole["value"] and whole["prompt"] is not None
    assert_same_prompts(parts["prompt"], whole["prompt"])
    # what is stored gives the metrics that the run measured
    report = evaluate(open_session(whole["prompt"]))
    assert report["metrics"] == load_prompt(whole["prompt"]).metadata["metrics"]


def test_members_of_several_ranks_are_those_of_lone_runs(tmp_path):
    backbone = make_backbone(tmp_path / "tiny")
    grid = {"lora.rank": [1, 3], "lora.learning_rate": [0.01]}
    run_of(tmp_path, backbone, "prompt+lora", "both", prompt={"population": grid})
    for k, rank in enumerate((1, 3)):
        lora = {"rank": rank, "learning_rate": 0.01}
        alone = run_of(tmp_path, backbone, "prompt+lora", f"rank{rank}", lora=lora)
        together = load_prompt(tmp_path / "both" / "population" / str(k) / "prompt").layers
        single = load_prompt(alone["prompt"]).layers
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
        jax.tree.map(close, together, single)


def test_a_superposition_of_a_stored_prompt_is_refused():
    values = {
        "task": "supersense", "output": "x", "method": "superposition-prompt-tuning",
        "prompt": {"init": "file", "file": "p.npy"},
    }  # fmt: skip
    with pytest.raises(UserError, match="starts from words"):
        parse(RunConfig, values)


@pytest.mark.parametrize("name", ["gcg", "pez"])
def test_a_search_leaves_words_that_a_template_can_say_and_resumes_exactly(tmp_path, name):
    backbone = make_backbone(tmp_path / "tiny")
    values = run_values(backbone, tmp_path) | {"method": name, "search": {"swaps": 4}}

    def result(folder, steps):
        values["train"] |= {"steps": steps, "schedule": "constant"}
        return train(parse(RunConfig, values | {"output": str(tmp_path / folder)}))

    whole = result("whole", 4)
    prompt = load_prompt(whole["prompt"])
    words = whole["words"]
    assert len(words.split()) == P and words == prompt.metadata["words"]["text"]
    assert whole["template"] == f"{words} question : {{text}}"
    # the words say what the vectors say
    assert prompt.metadata["words"]["survives"]
    assert whole["template_value"] == whole["value"]
    result("parts", 2)
    assert result("parts", 4)["words"] == words
    np.testing.assert_array_equal(
        load_prompt(tmp_path / "parts" / "prompt").vectors, prompt.vectors
    )
