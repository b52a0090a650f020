"""Methods that act by virtual tokens alone: what they compute, start from and count."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.config.methods import PTuningConfig
from jaxprompt.config.schema import PromptConfig, RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.methods.multitask import MULTITASK_PROMPT_TUNING
from jaxprompt.methods.p_tuning import inject, p_tuning
from jaxprompt.methods.registry import method_of
from jaxprompt.models.registry import model_for
from jaxprompt.models.t5.config import T5Config
from jaxprompt.training.plan import Layout
from jaxprompt.training.trained_shapes import trained_shapes
from jaxprompt.training.trial import Trial

P, D, H, RANK = 5, 8, 3, 2
RUN = {
    "task": "boolq", "output": "x", "prompt": {"length": P, "rank": RANK, "bottleneck": 4},
}  # fmt: skip
METHODS = {
    name: method_of(parse(RunConfig, RUN | settings))
    for name, settings in {
        "mlp": {"method": "p-tuning", "p_tuning": {"width": H}},
        "lstm": {"method": "p-tuning", "p_tuning": {"width": H, "encoder": "lstm"}},
        "multitask": {"method": "multitask-prompt-tuning"},
        "low-rank": {"method": "low-rank-prompt-tuning"},
        "residual": {"method": "residual-prompt-tuning"},
    }.items()
}
CONFIG = PromptConfig(**RUN["prompt"])


def start(count=2, length=P, width=D):
    return np.random.default_rng(1).normal(size=(count, length, width)).astype(np.float32)


def moved(tree):
    """Trainables of which none is as it was at the start."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), tree)


def bank(method, tree):
    return np.asarray(method.inject(tree, {}).embeddings)


@pytest.mark.parametrize("name", METHODS)
def test_members_are_made_apart_from_each_other(name):
    method, begin = METHODS[name], start()
    for change in (lambda tree: tree, moved):
        both = change(method.init({}, begin, CONFIG, 3))
        for k in range(2):
            one = jax.tree.map(lambda x, k=k: x[k : k + 1], both)
            np.testing.assert_allclose(bank(method, both)[k], bank(method, one)[0], rtol=1e-5,
                                       atol=1e-6)  # fmt: skip
    alone = method.init({}, begin[1:], CONFIG, 3)
    together = method.init({}, begin, CONFIG, 3)
    for one, two in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_array_equal(one[0], two[1])
    gradient = jax.grad(lambda tree: jnp.sum(method.inject(tree, {}).embeddings[0] ** 2))(both)
    for leaf in jax.tree.leaves(gradient):
        assert np.any(np.asarray(leaf[0])) and not np.any(np.asarray(leaf[1]))


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_decides_the_start(name):
    method = METHODS[name]
    one, same, other = (jax.tree.leaves(method.init({}, start(), CONFIG, s)) for s in (0, 0, 1))
    assert all(map(np.array_equal, one, same))
    random = name in ("mlp", "lstm", "residual")
    assert any(not np.array_equal(x, y) for x, y in zip(one, other, strict=True)) == random


def torch_layout(tree, k):
    """The weights of member k as PEFT's PromptEncoder has them, with half of an LSTM's bias."""
    weights = {"embedding.weight": tree["prompt"][k]}
    for name, leaf in tree.items():
        kind, *path = name.split("/")
        if kind == "mlp" and path[1] == "kernel":
            number = 2 * int(path[0])
            weights[f"mlp_head.{number}.weight"] = leaf[k].T / leaf.shape[1] ** 0.5
            weights[f"mlp_head.{number}.bias"] = tree[f"mlp/{path[0]}/bias"][k]
        elif kind == "lstm":
            end = f"l{path[0]}" + "_reverse" * (path[1] == "backward")
            if path[2] == "bias":
                for which in ("ih", "hh"):
                    weights[f"lstm_head.bias_{which}_{end}"] = leaf[k] / 2
            else:
                which = {"input": "ih", "hidden": "hh"}[path[2]]
                weights[f"lstm_head.weight_{which}_{end}"] = leaf[k].T / leaf.shape[1] ** 0.5
    return {name: np.asarray(weight, np.float64) for name, weight in weights.items()}


def encoder(weights):
    """PEFT's PromptEncoder in NumPy (tuners/p_tuning/model.py), with torch's equations of LSTMs."""
    x = weights["embedding.weight"]
    for layer in range(2 if "lstm_head.weight_ih_l0" in weights else 0):
        both = [one_direction(weights, f"l{layer}", x)]
        both.append(one_direction(weights, f"l{layer}_reverse", x[::-1])[::-1])
        x = np.concatenate(both, axis=-1)
    numbers = sorted(int(name.split(".")[1]) for name in weights if "mlp_head" in name)[::2]
    for number in numbers:
        x = x @ weights[f"mlp_head.{number}.weight"].T + weights[f"mlp_head.{number}.bias"]
        x = x if number == numbers[-1] else np.maximum(x, 0)
    return x


def one_direction(weights, end, rows):
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    read, keep, *biases = (
        weights[f"lstm_head.{name}_{end}"]
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    hidden = cell = np.zeros(keep.shape[1])
    states = []
    for row in rows:
        i, f, g, o = np.split(read @ row + keep @ hidden + biases[0] + biases[1], 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        states.append(hidden)
    return np.stack(states)


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_the_vectors_are_those_of_the_encoder_of_peft(name):
    tree = moved(METHODS[name].init({}, start(), CONFIG, 0))
    vectors = bank(METHODS[name], tree)
    for k in range(2):
        weights = torch_layout(tree, k)
        assert len(weights) == {"mlp": 7, "lstm": 1 + 2 * 2 * 4 + 4}[name]
        np.testing.assert_allclose(vectors[k], encoder(weights), rtol=2e-5, atol=2e-5)


def test_p_tuning_starts_at_about_half_the_length_of_the_start_vectors():
    begin = start(1, 20, 64)
    method = p_tuning(PTuningConfig())
    ratio = np.std(bank(method, method.init({}, begin, CONFIG, 0))) / np.std(begin)
    assert 0.35 < ratio < 0.65


def test_a_multitask_prompt_starts_at_the_shared_prompt_bit_for_bit():
    method = METHODS["multitask"]
    tree = method.init({}, start(), CONFIG, 0)
    np.testing.assert_array_equal(bank(method, tree), start())
    changed = bank(method, moved(tree)) / np.asarray(moved(tree)["prompt"])
    for k in range(2):
        assert np.linalg.matrix_rank(changed[k], tol=1e-4) == 1


def test_u_and_v_of_a_multitask_prompt_learn_faster_by_four_thirds():
    method = MULTITASK_PROMPT_TUNING
    tree = method.init({}, np.ones((1, P, D), np.float32), CONFIG, 0)
    step = jax.tree.map(lambda x: x + 0.3, tree)  # what Adam does first at a rate of 0.3
    only = lambda name: bank(method, tree | {name: step[name]})
    np.testing.assert_allclose(only("prompt"), 1.3, rtol=1e-6)
    np.testing.assert_allclose(only("u"), 1.4, rtol=1e-6)
    np.testing.assert_allclose(only("v"), 1.4, rtol=1e-6)


def test_a_prompt_of_low_rank_starts_as_near_to_the_start_vectors_as_it_can():
    method, begin = METHODS["low-rank"], start()
    vectors = bank(method, method.init({}, begin, CONFIG, 0))
    for k in range(2):
        assert np.linalg.matrix_rank(vectors[k], tol=1e-4) == RANK
        values = np.linalg.svd(begin[k], compute_uv=False)
        error = np.sum((vectors[k] - begin[k]) ** 2)
        np.testing.assert_allclose(error, np.sum(values[RANK:] ** 2), rtol=1e-4)
    whole = bank(method, method.init({}, begin, PromptConfig(length=P, rank=P), 0))
    np.testing.assert_allclose(whole, begin, atol=1e-5)


BASE, LARGE = 768, 1024


@pytest.mark.parametrize(
    "settings, width, count",
    [
        ({"method": "multitask-prompt-tuning"}, BASE, 77_668),
        ({"method": "multitask-prompt-tuning"}, LARGE, 103_524),
        # "11.2K" in figure 1 of the paper on low-rank prompts
        ({"method": "low-rank-prompt-tuning", "prompt": {"rank": 10}}, LARGE, 11_240),
        ({"method": "p-tuning"}, BASE, 100 * 768 + 3 * (768 * 768 + 768)),
        (
            {"method": "p-tuning", "p_tuning": {"width": 512}},
            BASE,
            100 * 768 + 768 * 512 + 512 + 512 * 512 + 512 + 512 * 768 + 768,
        ),
        (
            {"method": "p-tuning", "p_tuning": {"encoder": "lstm", "width": 256}},
            BASE,
            100 * 768
            + 2 * 4 * 256 * (768 + 256 + 1)  # one bias, where PEFT has two that are added
            + 2 * 4 * 256 * (512 + 256 + 1)
            + 512 * 512 + 512 + 512 * 768 + 768,
        ),
    ],
)  # fmt: skip
def test_as_many_parameters_are_trained_as_the_papers_count(settings, width, count):
    run = parse(RunConfig, {"task": "boolq", "output": "x"} | settings)
    method, begin = method_of(run), np.zeros((1, run.prompt.length, width), np.float32)
    shapes = jax.eval_shape(lambda: method.init({}, begin, run.prompt, 0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    made = jax.eval_shape(method.inject, shapes, {}).embeddings
    assert made.shape == (1, run.prompt.length, width)


def test_inject_needs_no_settings():
    assert METHODS["mlp"].inject is METHODS["lstm"].inject is inject


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"method": "low-rank-prompt-tuning", "prompt": {"length": 5}},
            r"prompt.rank is 10, and a prompt of 5 vectors \(prompt.length\) has at most rank 5",
        ),
        (
            {
                "method": "low-rank-prompt-tuning",
                "prompt": {"length": 5, "population": {"rank": [4, 6]}},
            },
            "prompt.population: .*prompt.rank is 6, and a prompt of 5",
        ),
        ({"prompt": {"population": {"rank": [4, 6]}}}, "method=prompt-tuning has no rank"),
        (
            {"prompt": {"population": {"p_tuning.encoder": ["mlp"]}}},
            "method=prompt-tuning has no p_tuning",
        ),
        ({"method": "p-tuning+prompt"}, "two parts have virtual tokens"),
        ({"method": "p-tuning", "p_tuning": {"encoder": "gru"}}, "mlp"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(settings, message):
    with pytest.raises(UserError, match=message):
        parse(RunConfig, {"task": "boolq", "output": "x"} | settings)


@pytest.mark.parametrize(
    "settings, structures",
    [
        ({"method": "low-rank-prompt-tuning", "prompt": {"population": {"rank": [4, 6]}}}, 2),
        (
            {
                "method": "p-tuning",
                "prompt": {"population": {"p_tuning.encoder": ["mlp", "lstm"], "seed": [0, 1]}},
            },
            2,
        ),
        ({"method": "multitask-prompt-tuning", "prompt": {"population": {"seed": [0, 1]}}}, 1),
    ],
)
def test_members_of_other_shapes_have_another_structure(settings, structures):
    run = parse(RunConfig, {"task": "boolq", "output": "x"} | settings)
    different = {
        Trial.structure.fget(SimpleNamespace(config=member, length=member.prompt.length))
        for member in run.members()
    }
    assert len(different) == structures


@pytest.mark.parametrize(
    "method, rate",
    [
        ("p-tuning", 0.03),
        ("multitask-prompt-tuning", 0.3),
        ("multitask-prompt", 0.3),
        ("low-rank-prompt-tuning", 0.3),
    ],
)
def test_a_method_has_the_recipe_of_its_source(method, rate):
    values = {"task": "boolq", "output": "x", "train": {"steps": 1000}}
    train = parse(RunConfig, values | {"method": method}).train
    assert (train.optimizer, train.schedule, train.warmup_steps) == ("adamw", "linear", 60)
    assert train.learning_rate == rate
    own = parse(RunConfig, values | {"method": method, "train": {"learning_rate": 0.1}}).train
    assert own.learning_rate == 0.1


def test_the_plan_counts_each_member_with_its_own_network():
    shape = T5Config(
        vocab_size=32, d_model=16, num_heads=2, head_dim=4, d_ff=8, num_encoder_layers=1,
        num_decoder_layers=1,
    )  # fmt: skip

    def planned(prompt, **p_tuning):
        values = {"task": "boolq", "output": "x", "method": "p-tuning", "p_tuning": p_tuning}
        trained = trained_shapes(parse(RunConfig, values | {"prompt": prompt}), shape)
        return trained.state_bytes(model_for(shape), Layout(1, 1, 1, False))

    both = planned({"length": 3, "population": {"p_tuning.width": [4, 8]}})
    assert both == sum(planned({"length": 3}, width=width) for width in (4, 8))
