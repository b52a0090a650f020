"""What explains a prompt: the maths of it, on tiny arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprompt.data.batches import Example
from jaxprompt.data.verbalizers import LabelWords
from jaxprompt.evaluation.explain import gradients, kinship, probes
from jaxprompt.evaluation.explain.variants import judged, random_like, without
from jaxprompt.models.base import Model, ModelConfig
from jaxprompt.models.injection import Injection
from jaxprompt.models.label_tree import label_trees

RNG = np.random.default_rng(0)


def vectors(length, width=12, seed=0):
    return np.random.default_rng(seed).normal(size=(length, width)).astype(np.float32)


def test_random_vectors_are_as_long_as_the_prompts_and_point_elsewhere():
    prompt = vectors(5) * np.arange(1, 6)[:, None].astype(np.float32)
    control = random_like(prompt)
    np.testing.assert_allclose(
        np.linalg.norm(control, axis=1), np.linalg.norm(prompt, axis=1), rtol=1e-5
    )
    assert abs(np.sum(control * prompt)) < 0.9 * np.sum(prompt**2)


def test_a_row_without_vectors_lacks_their_ids_and_keeps_the_order_of_all_others():
    # a prompt of three vectors around text, of member 1: ids 35, 36, 37 of a table of 32
    example = Example(np.array([35, 36, 7, 8, 37, 1], np.int32), np.zeros(0, np.int32), member=1)
    left = without(example, 32, 3, np.array([False, True, False]))
    assert left.inputs.tolist() == [35, 7, 8, 37, 1]
    assert without(example, 32, 3, np.ones(3, bool)).inputs.tolist() == [7, 8, 1]


def test_log_p_is_that_of_the_right_label_among_all():
    scores = np.log(np.array([[[0.2, 0.1, 0.1]]]))
    answers = judged(scores, np.array([1]))
    np.testing.assert_allclose(answers.log_p, np.log([[0.25]]), rtol=1e-6)
    assert not answers.correct[0, 0]


def test_cka_sees_no_rotation_no_size_and_no_order():
    prompt = vectors(4)
    turned = np.linalg.qr(RNG.normal(size=(4, 4)))[0] @ prompt  # mixes the vectors
    assert kinship.prompt_cka(prompt, 3 * turned) == pytest.approx(1, abs=1e-6)
    assert kinship.prompt_cka(prompt, prompt[::-1]) == pytest.approx(1, abs=1e-6)
    assert kinship.prompt_cka(prompt, vectors(4, seed=1)) < 0.9


def test_cka_is_the_published_formula():
    # Kornblith et al. 2019, equation 3, with HSIC of centred linear kernels
    x, y = vectors(6, 3), vectors(6, 4, seed=1)
    centre = np.eye(6) - 1 / 6
    hsic = lambda a, b: np.trace(a @ a.T @ centre @ b @ b.T @ centre)
    wanted = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    assert kinship.linear_cka(x, y) == pytest.approx(wanted, rel=1e-5)


def test_like_prompts_become_neighbours():
    one, two = vectors(3), vectors(3, seed=1)
    close = lambda base, seed: base + 0.05 * vectors(3, seed=seed)
    found = kinship.kinship(
        ["a", "b", "a again", "b again"], [one, two, close(one, 5), close(two, 6)]
    )
    order = found.names
    assert abs(order.index("a") - order.index("a again")) == 1
    assert abs(order.index("b") - order.index("b again")) == 1
    assert found.random_cka < found.cka[order.index("a"), order.index("a again")]


def test_a_probe_reads_what_is_there_and_memorises_no_random_label():
    labels = RNG.integers(0, 3, 150)
    states = RNG.normal(size=(150, 1, 6))
    states[np.arange(150), 0, labels] += 5
    types = [f"word {i}" for i in range(150)]  # each comes once, so nothing can be learned of it
    found = probes.probe(states, labels, types)
    assert found.task[0] > 0.95
    assert found.control[0] < 0.6
    assert found.selectivity[0] == found.task[0] - found.control[0]


def test_a_control_task_of_repeated_words_can_be_learned_from_states_that_hold_the_word():
    types = [f"word {i % 6}" for i in range(150)]
    states = np.eye(6)[np.arange(150) % 6][:, None]
    found = probes.probe(states, RNG.integers(0, 3, 150), types)
    assert found.control[0] == 1.0


def test_the_same_word_has_the_same_random_label():
    found = probes.control_labels(["a", "b", "a", "c", "b"], np.array([0, 1, 2, 1, 0]))
    assert found[0] == found[2] and found[1] == found[4]


@pytest.mark.parametrize("pooling", ["sum", "mean", "max"])
def test_labels_of_several_words_are_pooled_as_predictions_pool_them(pooling, monkeypatch):
    words = LabelWords(("a", "b", "c"), (0, 2), pooling)
    scores = RNG.normal(size=(4, 3)).astype(np.float32)
    monkeypatch.setattr(gradients, "label_log_likelihoods", lambda *_: jnp.asarray(scores))
    trees = label_trees(np.array([[1], [2], [3]], np.int32))
    question = gradients.Question(trees, gradients._members(words), np.ones(3, np.float32))
    ids = jnp.ones((4, 2), jnp.int32)
    found = gradients.label_log_p(
        {}, Injection(), Model(ModelConfig(vocab_size=4, d_model=1, num_heads=1, head_dim=1,
        d_ff=1)), ids, ids, question, pooling,
    )  # fmt: skip
    np.testing.assert_allclose(found, jax.nn.log_softmax(words.pooled(scores)), rtol=1e-5)
