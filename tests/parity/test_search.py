"""The steps of a search for words: candidates are scored as if each were alone."""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers_step import P, V, examples

from jaxprompt.config.methods import SearchConfig
from jaxprompt.data.batches import make_batch
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.losses import cross_entropy
from jaxprompt.methods.hard_prompt import IDS, VECTORS, nearest, rows_of
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.decoder.decoder import DecoderModel
from jaxprompt.models.injection import Injection
from jaxprompt.runtime import parallel
from jaxprompt.training import search as searching
from jaxprompt.training.search import Search, candidate_losses, of_vectors, search_step
from jaxprompt.training.step import TrainState, batch_losses

K, SWAPS = 2, 3
ALLOWED = np.arange(V) % 3 > 0
DECODER = DecoderModel(
    DecoderConfig(
        vocab_size=V, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24, num_layers=2
    )
)


@pytest.fixture(scope="module", params=["t5", "decoder"])
def tuned(request, tiny):
    if request.param == "t5":
        return tiny
    return DECODER, jax.jit(DECODER.init_params)(jax.random.key(0))


@pytest.fixture(autouse=True)
def all_words_survive(monkeypatch):
    monkeypatch.setattr(searching, "surviving", lambda ids, tokenizer: np.ones(len(ids), bool))


def search_of(model, **settings):
    return Search(
        model=model.with_layout(shared_prefix_length=P) if model is DECODER else model,
        plain=model,
        loss=cross_entropy(0.0),
        mesh=parallel.make_mesh(),
        tokenizer=cast(Tokenizer, None),
        allowed=ALLOWED,
        settings=SearchConfig(swaps=SWAPS, candidates=8, **settings),
        seeds=[0, 7],
    )


def batch():
    rows = [row for pair in zip(examples(2), examples(2, 1), strict=True) for row in pair]
    return make_batch(rows, input_length=16, target_length=4)


def words(count, seed=0):
    return np.random.default_rng(seed).choice(np.flatnonzero(ALLOWED), (K, count, P))


def loss_alone(tuned, ids):
    """The loss of each member's rows with these words [K, P]."""
    model, params = tuned
    bank = Injection(rows_of(params, jnp.asarray(ids)))
    return batch_losses(params, bank, model, batch(), num_members=K)[1].loss


def test_candidates_together_have_the_losses_of_each_alone(tuned, monkeypatch):
    model, params = tuned
    candidates = words(5)
    found = candidate_losses(search_of(model))(jnp.asarray(candidates), params, [batch()])
    wanted = np.stack([loss_alone(tuned, candidates[:, c]) for c in range(5)], axis=1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    # the same where two share a pass, the last of which begins earlier
    monkeypatch.setattr(searching, "_at_once", lambda *_: 2)
    parts = candidate_losses(search_of(model))(jnp.asarray(candidates), params, [batch()])
    np.testing.assert_allclose(parts, wanted, rtol=1e-5)


def test_a_step_of_gcg_takes_the_best_change_of_one_allowed_word(tuned):
    model, params = tuned
    step = search_step("gcg", search_of(model), optax.identity())
    ids = words(1)[:, 0]
    state = TrainState(jnp.int32(0), {IDS: jnp.asarray(ids)}, ())
    before = np.asarray(loss_alone(tuned, ids))
    after, losses = step(state, params, [batch()])
    np.testing.assert_allclose(losses.loss, before, rtol=1e-5)
    new = np.asarray(after.trainables[IDS])
    assert ((new != ids).sum(axis=1) <= 1).all() and ALLOWED[new].all()
    assert (np.asarray(loss_alone(tuned, new)) <= before * (1 + 1e-6)).all()
    assert int(after.step) == 1
    # the draws are a function of seed and step
    again, _ = step(state, params, [batch()])
    np.testing.assert_array_equal(again.trainables[IDS], new)


def test_members_draw_what_each_draws_alone():
    rng = np.random.default_rng(0)
    gradient, table = rng.normal(size=(K, P, 8)), rng.normal(size=(V, 8))
    ids = jnp.asarray(words(1)[:, 0])
    keys = searching._keys(np.array([3, 9], np.uint32), jnp.int32(4))
    args = jnp.asarray(table), ALLOWED
    both = searching._drawn(8, 20, jnp.asarray(gradient), *args, ids, keys)
    for k in range(K):
        one = slice(k, k + 1)
        alone = searching._drawn(8, 20, jnp.asarray(gradient[one]), *args, ids[one], keys[one])
        np.testing.assert_array_equal(alone[0], both[k])
    np.testing.assert_array_equal(both[:, 0], ids)
    gain = np.where(ALLOWED, -gradient @ table.T, -np.inf)
    best = np.argsort(-gain, axis=-1)[..., :8]
    for k, c in np.ndindex(K, 21):
        for place in np.flatnonzero(both[k, c] != ids[k]):
            assert both[k, c, place] in best[k, place]


def test_a_step_of_pez_descends_with_the_gradient_at_the_words(tuned):
    model, params = tuned
    optimizer = of_vectors(optax.sgd(0.5))
    step = search_step("pez", search_of(model), optimizer)
    ids = jnp.asarray(words(1)[:, 0])
    start = {IDS: ids, VECTORS: rows_of(params, ids) + 0.01}
    after, _ = step(TrainState(jnp.int32(0), start, optimizer.init(start)), params, [batch()])

    def objective(vectors):
        return batch_losses(params, Injection(vectors), model, batch(), num_members=K)[0]

    gradient = jax.grad(objective)(rows_of(params, ids))
    moved = start[VECTORS] - 0.5 * gradient
    np.testing.assert_allclose(after.trainables[VECTORS], moved, rtol=1e-5, atol=1e-6)
    table = params["token_embedder"]["embedding"]
    np.testing.assert_array_equal(after.trainables[IDS], nearest(moved, table, ALLOWED))


def test_fluency_is_the_likelihood_of_the_words_in_a_language_model():
    params = jax.jit(DECODER.init_params)(jax.random.key(0))
    candidates = words(2)
    found = searching.negative_log_likelihood(DECODER, params, jnp.asarray(candidates))
    rows = candidates.reshape(-1, P)
    for ids, value in zip(rows, np.ravel(found), strict=True):
        given = jnp.asarray(ids[None]), jnp.ones((1, P), jnp.int32)
        each = []
        for k in range(1, P):
            front = [x[:, :k] for x in given]
            target = [x[:, k : k + 1] for x in given]
            logits = DECODER.logits(params, Injection(), *front, *target)
            each.append(jax.nn.log_softmax(logits[0, 0])[ids[k]])
        assert value == pytest.approx(-np.mean(each), rel=1e-4)
