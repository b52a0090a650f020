import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import MeshConfig, TaskConfig
from jaxprompt.data.batches import Example
from jaxprompt.inference import engine as engines
from jaxprompt.inference import generate, rank, score
from jaxprompt.inference import predict as predicting
from jaxprompt.inference.engine import make_engine, num_compilations
from jaxprompt.inference.generate import BeamSearch
from jaxprompt.inference.predict import check_finite_scores, predict
from jaxprompt.models.injection import Injection
from jaxprompt.models.label_tree import label_trees
from jaxprompt.models.ops.segments import shift_right
from jaxprompt.runtime import parallel


def inputs(seed=0, rows=3):
    ids = np.random.default_rng(seed).integers(3, 61, (rows, 9)).astype(np.int32)
    segments = np.ones_like(ids)
    segments[1, 5:] = 0
    return ids * segments, segments


@functools.partial(jax.jit, static_argnums=1)
def teacher_forced(params, model, ids, segments, targets):
    ones = jnp.ones_like(targets)
    encoded = model.prefill(params, Injection(), ids, segments)
    return model.decode(params, Injection(), encoded, shift_right(targets, ones, 0), ones)


def test_greedy_ids_are_the_argmax_under_teacher_forcing(tiny):
    model, params = tiny
    ids, segments = inputs()
    out = np.asarray(generate.greedy(params, Injection(), model, ids, segments, 8))
    best = np.asarray(jnp.argmax(teacher_forced(params, model, ids, segments, out), -1))
    for row in range(3):
        end = np.flatnonzero(out[row] == model.config.eos_id)
        stop = end[0] + 1 if len(end) else 8
        np.testing.assert_array_equal(out[row, :stop], best[row, :stop])
        assert (out[row, stop:] == model.config.pad_id).all()


def test_the_most_likely_word_is_the_first_of_equals_and_always_a_word():
    logits = jnp.array([[1.0, 3, 2, 3], [0, -1, -2, -3], [np.nan] * 4])
    assert generate._most_likely(logits).tolist() == [1, 0, 3]


def test_generation_ends_at_eos_and_early(tiny):
    """With an EOS that always wins the loop must stop after one step and leave padding."""
    model, params = tiny
    ids, segments = inputs()
    first = int(generate.greedy(params, Injection(), model, ids, segments, 4)[0, 0])
    eos = model.with_config(eos_id=first)
    out = np.asarray(generate.greedy(params, Injection(), eos, ids, segments, 4))
    assert out[0].tolist() == [first, 0, 0, 0]


def test_an_empty_row_says_nothing(tiny):
    model, params = tiny
    ids, segments = inputs()
    segments[2] = 0
    out = np.asarray(generate.greedy(params, Injection(), model, ids * segments, segments, 4))
    assert (out[2] == 0).all() and (out[0] != 0).any()


def lost_head(params):
    """The parameters with one NaN in the head's column of one word."""
    return params | {"head": params["head"].at[0, 40].set(np.nan)}


@pytest.mark.parametrize("beams", [None, 3])
def test_what_is_generated_from_logits_that_are_no_numbers_is_told(tiny, beams):
    """One NaN among the words is enough, and rows that are empty or sound are as they were."""
    model, params = tiny
    ids, segments = inputs()
    segments[2] = 0

    def generated(params, bank=None):
        given = params, Injection(bank), model, ids * segments, segments
        if beams:
            return np.asarray(generate.beam(*given, BeamSearch(4, beams)))
        return np.asarray(generate.greedy(*given, 4))

    assert (generated(params) >= 0).all()
    found = generated(lost_head(params))
    assert (found[:2] == -1).all() and (found[2] == model.config.pad_id).all()
    bank = jnp.zeros((2, 1, model.config.d_model)).at[1].set(jnp.nan)
    ids[0, 0], ids[1, 0] = model.config.vocab_size, model.config.vocab_size + 1
    found = generated(params, bank)
    assert (found[0] >= 0).all() and (found[1] == -1).all()


WORDS: Any = SimpleNamespace(
    masked=False,
    encode_targets=lambda labels, separator: [[7, 1], [9, 11, 1]], eos_id=1, size=61,
    one_sequence=False, decode=lambda ids: " ".join(map(str, ids)),
)  # fmt: skip


def asked(params, model, task, count=5, mesh=None):
    rng = np.random.default_rng(0)
    rows = [Example(rng.integers(3, 61, 9).astype(np.int32), np.zeros(0, np.int32))] * count
    engine = make_engine(params, Injection(), model, mesh)
    return predict(engine, task, rows, WORDS, batch_size=4)


@pytest.mark.parametrize("decoding", ["rank", "greedy", "beam"])
def test_answers_that_are_no_numbers_are_counted_and_refused(tiny, decoding, monkeypatch):
    monkeypatch.setattr(predicting, "label_of", lambda task, tokenizer: {})
    model, params = tiny
    task = TaskConfig(name="q", template="{text}", labels=["a", "b"], decoding=decoding,
                      max_target_length=4)  # fmt: skip
    assert not asked(params, model, task).non_finite_rows
    found = asked(lost_head(params), model, task)
    assert list(found.non_finite_rows) == [0, 1, 2, 3, 4] and len(found.predictions) == 5
    with pytest.raises(UserError, match="m gives scores that are not finite numbers for 5 of 5"):
        check_finite_scores(found.non_finite_rows, 5, "m")
    none = asked(params, model, task, count=0)
    assert none.predictions == [] and not none.non_finite_rows
    assert none.scores is None or none.scores.shape == (0, 2)


def counting(batches, shapes):
    """The function of batches, noting the shape of each one's inputs."""

    def counted(*args, **kwargs):
        for batch, numbers in batches(*args, **kwargs):
            shapes.append(batch.inputs.shape)
            yield batch, numbers

    return counted


@pytest.mark.parametrize("decoding", ["rank", "greedy", "beam"])
def test_other_rows_of_the_same_sizes_compile_nothing(tiny, decoding, monkeypatch):
    monkeypatch.setattr(predicting, "label_of", lambda task, tokenizer: {})
    model, params = tiny
    task = TaskConfig(name="q", template="{text}", labels=["a", "b"], decoding=decoding,
                      max_target_length=3)  # fmt: skip
    rng = np.random.default_rng(0)

    def rows(*lengths):
        none = np.zeros(0, np.int32)
        return [Example(rng.integers(3, 61, n).astype(np.int32), none) for n in lengths]

    engine = make_engine(params, Injection(), model)
    run = lambda rows: predict(engine, task, rows, WORDS, batch_size=8)
    run(rows(9, 20, 40))
    compiled = num_compilations()
    run(rows(33, 5, 64, 1))
    assert num_compilations() == compiled
    other = engine._replace(params=jax.tree.map(lambda x: x + 0.01, params))
    predict(other, task, rows(60, 2, 3), WORDS, batch_size=8)  # nor do other weights
    assert num_compilations() == compiled
    run(rows(70, 2, 3))
    assert num_compilations() == compiled + 1


def test_one_row_is_computed_as_one_row(tiny, monkeypatch):
    """Not as a full batch; of several devices each has one."""
    shapes = []
    monkeypatch.setattr(engines, "inference_batches", counting(engines.inference_batches, shapes))
    model, params = tiny
    task = TaskConfig(name="q", template="{text}", labels=["a", "b"])
    alone = asked(params, model, task, count=1)
    mesh = parallel.make_mesh(MeshConfig(data=2), jax.devices()[:2])
    placed = jax.device_put(params, parallel.replicated(mesh))
    over_two = asked(placed, model, task, count=1, mesh=mesh)
    among = asked(params, model, task, count=3)
    assert shapes == [(1, 32), (2, 32), (4, 32)]
    for other in (over_two, among):
        np.testing.assert_allclose(other.scores[:1], alone.scores, rtol=1e-5)


def test_likelihoods_are_the_same_whatever_else_is_scored(tiny):
    model, params = tiny
    rng = np.random.default_rng(0)
    ids = lambda count: rng.integers(3, 61, count).astype(np.int32)
    rows = [Example(ids(n), ids(t)) for n, t in [(9, 3), (30, 40), (5, 2), (70, 4)]]
    engine = make_engine(params, Injection(), model)
    together = score.log_likelihoods(engine, rows, batch_size=64)
    alone = [score.log_likelihoods(engine, [row], batch_size=1)[0] for row in rows]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert score.log_likelihoods(engine, [], batch_size=4).shape == (0,)
    with pytest.raises(UserError, match="batch size is 0; give a whole number"):
        score.log_likelihoods(engine, rows, batch_size=0)


@pytest.mark.parametrize("count", [6, 19])
def test_label_scores_equal_the_likelihood_of_each_label_as_a_target(tiny, count):
    model, params = tiny
    ids, segments = inputs()
    some = [[7, 1, -1], [9, 11, 1], [30, 1, -1], [1, -1, -1], [9, 1, -1], [9, 11, 1]]
    labels = np.array(some if count == 6 else some * 3 + some[:1], np.int32)
    trees = label_trees(labels)
    given = params, Injection(), model, ids, segments
    scores = np.asarray(rank.label_log_likelihoods(*given, trees))
    assert scores.shape == (3, count)
    for number, label in enumerate(labels[:6]):
        marks = np.tile((label >= 0).astype(np.int32), (3, 1))
        targets = np.tile(np.maximum(label, 0), (3, 1))
        alone = score.log_likelihood(params, Injection(), model, ids, segments, targets, marks)
        for again in range(number, count, 6):
            np.testing.assert_allclose(scores[:, again], alone, rtol=1e-5)


def test_log_likelihood_is_the_sum_of_token_log_probabilities(tiny):
    model, params = tiny
    ids, segments = inputs()
    targets = np.array([[7, 8, 1], [9, 1, 0], [5, 6, 1]], np.int32)
    marks = (targets > 0).astype(np.int32)
    got = score.log_likelihood(params, Injection(), model, ids, segments, targets, marks)
    logits = np.asarray(teacher_forced(params, model, ids, segments, targets), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, length in enumerate((3, 2, 3)):
        expected = sum(logp[row, i, targets[row, i]] for i in range(length))
        assert float(got[row]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("devices", [1, 2])
def test_answers_are_the_same_where_examples_share_rows(tiny, devices, monkeypatch):
    model, params = tiny[0].with_runtime(per_example_attention=True), tiny[1]
    rng, words = np.random.default_rng(0), [[7, 1], [9, 11, 1], [30, 1]]
    examples = [
        Example(rng.integers(3, 61, length).astype(np.int32), np.array(words[length % 3], np.int32))
        for length in rng.integers(20, 250, engines.FEWEST_PACKED + 3)
    ]
    mesh = parallel.make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    params = jax.device_put(params, parallel.replicated(mesh))
    task = TaskConfig(
        name="q", train="-", validation="-", template="{text}", labels=["a", "b", "c"]
    )
    tokenizer = SimpleNamespace(masked=False, encode_targets=lambda labels, separator: words)
    shapes = []

    def answers(model, **settings):
        engine = make_engine(params, Injection(), model, mesh)
        return predict(engine, task, examples, tokenizer, batch_size=16, **settings)

    for name in ("inference_batches", "packed_rows"):
        monkeypatch.setattr(engines, name, counting(getattr(engines, name), shapes))
    shared = answers(model, pack=True)
    assert len(set(shapes)) == 1 and shapes[0][0] == devices
    for alone in (answers(model), answers(tiny[0], pack=True)):
        np.testing.assert_allclose(shared.scores, alone.scores, rtol=1e-5)
        assert shared.predictions == alone.predictions
    assert len(set(shapes)) > 5


def searched(params, model, ids, segments, length, beams, alpha):
    """Beam search of one row as it is defined, without a cache."""
    worth = lambda value, count: value / ((5 + count) / 6) ** alpha
    live, ended = [(0.0, [])], []
    for step in range(length):
        candidates = []
        for value, words in live:
            targets = np.full((1, length), 3, np.int32)
            targets[0, : len(words)] = words
            row = teacher_forced(params, model, ids, segments, targets)[0, step]
            logp = np.asarray(jax.nn.log_softmax(row))
            candidates += [(value + float(logp[v]), [*words, v]) for v in range(len(logp))]
        candidates.sort(key=lambda found: -found[0])
        for value, words in candidates[:beams]:
            if words[-1] == model.config.eos_id:
                ended.append((worth(value, step + 1), words))
        live = [found for found in candidates if found[1][-1] != model.config.eos_id][:beams]
    return max(ended or live)[1]


@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
def test_beams_are_searched_as_defined(tiny, alpha):
    model, params = tiny
    ids, segments = inputs(seed=3)
    greedy = np.asarray(generate.greedy(params, Injection(), model, ids, segments, 5))
    model = model.with_config(eos_id=int(greedy[0, 1]))  # so that answers end
    found = generate.beam(params, Injection(), model, ids, segments, BeamSearch(5, 3, alpha))
    for row in range(3):
        one = slice(row, row + 1)
        best = searched(params, model, ids[one], segments[one], 5, 3, alpha)
        assert np.asarray(found[row]).tolist() == best + [model.config.pad_id] * (5 - len(best))


def test_one_beam_without_a_penalty_is_greedy(tiny):
    model, params = tiny
    ids, segments = inputs(rows=5)
    segments[4] = 0
    first = int(generate.greedy(params, Injection(), model, ids, segments, 8)[0, 1])
    model = model.with_config(eos_id=first)  # so that a row ends early
    given = params, Injection(), model, ids * segments, segments
    expected = np.asarray(generate.greedy(*given, 8))
    np.testing.assert_array_equal(generate.beam(*given, BeamSearch(8, 1, 0.0)), expected)
    assert (expected[0] == model.config.pad_id).any() and not expected[4].any()
