"""What explains a prompt, on tiny models: it adds up, and it is what the model computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CONFIG, make_backbone, make_rows, run_values

from jaxprompt.data.examples import tokenize
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.data.virtual_tokens import VirtualTokens, virtual_ids
from jaxprompt.evaluation.explain.gradients import gate_gradients, integrated_gradients
from jaxprompt.evaluation.explain.importance import leave_one_out
from jaxprompt.evaluation.explain.variants import (
    TUNED,
    Subject,
    engine_of,
    random_like,
)
from jaxprompt.inference.predict import predict
from jaxprompt.inference.session import open_session
from jaxprompt.methods.artefact import Prompt
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.decoder.decoder import DecoderModel
from jaxprompt.models.encoder.config import EncoderConfig
from jaxprompt.models.encoder.encoder import EncoderModel
from jaxprompt.models.injection import Injection
from jaxprompt.models.t5.t5 import T5Model

SMALL = {"vocab_size": 32, "d_model": 16, "num_heads": 2, "head_dim": 8, "d_ff": 24}
MASK = 3
MODELS = {
    "T5": T5Model(CONFIG),
    "decoder": DecoderModel(DecoderConfig(**SMALL, num_layers=3, num_kv_heads=1)),
    "encoder": EncoderModel(EncoderConfig(**SMALL, num_layers=2, max_positions=32, mask_id=MASK)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_lens_behind_the_last_layer_is_what_the_model_answers(name):
    model = MODELS[name]
    params = jax.jit(model.init_params)(jax.random.key(0))
    bank = jax.random.normal(jax.random.key(1), (2, 3, 16))
    rows = [[*virtual_ids(32, 3, k), 9, MASK, 7 + k] for k in range(2)]
    inputs = np.array([[*row, 0, 0] for row in rows], np.int32)
    segments = (np.arange(8)[None] < 6).astype(np.int32) * np.ones((2, 1), np.int32)
    targets = np.array([[5], [6]], np.int32)
    injection = Injection(bank)
    rows = params, injection, inputs, segments
    wanted = jax.jit(model.logits)(*rows, targets, np.ones_like(targets))
    states = jax.jit(model.states)(*rows)
    found = jax.jit(model.read_out)(params, injection, states.answer)
    np.testing.assert_allclose(found[:, -1], wanted[:, 0], atol=2e-5)
    assert np.abs(found[:, 0] - wanted[:, 0]).max() > 1e-4  # an earlier layer says something else
    assert states.text.shape == (2, states.text.shape[1], 8, 16)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    backbone = make_backbone(folder / "model")
    task = resolve_task(run_values(backbone, folder)["task"])
    vectors = np.random.default_rng(5).normal(size=(3, CONFIG.d_model)).astype(np.float32)
    session = open_session(Prompt(2 * vectors, {}), str(backbone))
    rows = make_rows(4)
    examples = tokenize(task, rows, session.tokenizer, VirtualTokens(CONFIG.vocab_size, 3))
    assert task.labels is not None
    right = np.array([task.labels.index(row["label"]) for row in rows])
    engine = engine_of(session, [session.prompt.vectors, random_like(vectors)])
    return Subject(session, engine, task, examples, right)


def log_p(subject, engine, examples):
    scores = predict(engine, subject.task, examples, subject.tokenizer, batch_size=8).scores
    return np.asarray(jax.nn.log_softmax(scores))[np.arange(len(examples)), subject.right]


def test_attributions_add_up_to_the_difference_of_the_outputs(subject):
    virtual = lambda ids: ids >= subject.vocabulary
    found = integrated_gradients(subject, subject.examples, virtual)
    assert found.complete and found.difference > 0.01
    assert found.gap < 0.02 * found.difference + 1e-4
    # the difference is from a prompt of mean words to the prompt
    from jaxprompt.evaluation.explain.variants import mean_word

    start = np.tile(mean_word(subject), (3, 1))
    change = log_p(subject, subject.engine, subject.examples) - log_p(
        subject, engine_of(subject.session, [start]), subject.examples
    )
    sums = [values.sum() for values in found.values]
    np.testing.assert_allclose(sums, change, atol=0.02 * np.abs(change).mean() + 5e-4)
    for example, values in zip(subject.examples, found.values, strict=True):
        assert np.all(values[example.inputs < subject.vocabulary] == 0)


def test_words_that_move_have_attributions_and_the_prompt_has_none(subject):
    found = integrated_gradients(subject, subject.examples, lambda ids: ids < subject.vocabulary)
    assert found.complete and found.difference > 1e-3
    for example, values in zip(subject.examples, found.values, strict=True):
        assert np.all(values[example.inputs >= subject.vocabulary] == 0)


def test_a_gate_has_the_gradient_of_finite_differences(subject):
    one = subject.part([0])
    found = gate_gradients(one, list(one.examples))
    vectors, step = one.session.prompt.vectors, 1e-2
    for position in range(3):
        sides = []
        for sign in (1, -1):
            scaled = vectors.copy()
            scaled[position] *= 1 + sign * step
            sides.append(log_p(one, engine_of(one.session, [scaled]), one.examples)[0])
        assert found[position] == pytest.approx(
            abs(sides[0] - sides[1]) / (2 * step), rel=0.05, abs=1e-3
        )


def test_a_vector_that_is_left_out_is_as_if_the_prompt_never_had_it(subject):
    found = leave_one_out(subject, TUNED)
    assert found.log_p.shape == (4, 4)
    np.testing.assert_allclose(
        found.log_p[0], log_p(subject, subject.engine, subject.examples), atol=1e-5
    )
    vectors = subject.session.prompt.vectors
    shorter = open_session(Prompt(vectors[[0, 2]], {}), subject.session.backbone)
    examples = tokenize(
        subject.task, make_rows(4), shorter.tokenizer, VirtualTokens(CONFIG.vocab_size, 2)
    )
    np.testing.assert_allclose(found.log_p[2], log_p(subject, shorter.engine, examples), atol=1e-5)


def test_a_bank_of_each_row_is_looked_up_as_words_are():
    from jaxprompt.data.virtual_tokens import embed

    table = jnp.arange(12.0).reshape(6, 2)
    ids = jnp.array([[1, 5, 2]])
    own = jnp.arange(3)[None] + 6
    np.testing.assert_array_equal(embed(own, table, embed(ids, table, None)), table[ids])
