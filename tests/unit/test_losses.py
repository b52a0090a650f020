"""Losses: sums for each member that equal the direct formula, whatever shares the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprompt.data.batches import Example, make_batch, pack_batch
from jaxprompt.losses import cross_entropy, sum_by_member, target_members, unlikelihood

V, K = 7, 3


def example(member, targets):
    return Example(np.array([5, 1], np.int32), np.array(targets, np.int32), member)


EXAMPLES = [example(1, [3, 1]), example(0, [2, 4, 1]), example(1, [1]), example(2, [6, 5, 1])]


def logits_for(batch):
    shape = *batch.targets.shape, V
    return jax.random.normal(jax.random.key(0), shape)


def test_the_sums_of_each_member_are_those_of_the_formula():
    batch = make_batch(EXAMPLES, rows=6)
    logits = np.asarray(logits_for(batch), np.float64)
    objective, sums = cross_entropy(z_loss=0.01)(jnp.asarray(logits, jnp.float32), batch, K)
    loss, right, tokens, extra = np.zeros((4, K))
    for row, own in enumerate(EXAMPLES):
        for at, id in enumerate(own.targets):
            log_z = np.log(np.exp(logits[row, at]).sum())
            loss[own.member] += log_z - logits[row, at, id]
            extra[own.member] += 0.01 * log_z**2
            right[own.member] += logits[row, at].argmax() == id
            tokens[own.member] += 1
    np.testing.assert_allclose(sums.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(objective, loss + extra, rtol=1e-5)
    np.testing.assert_array_equal(sums.correct, right)
    np.testing.assert_array_equal(sums.num_tokens, tokens)
    np.testing.assert_allclose(sums.means().loss, loss / tokens, rtol=1e-5)


def test_a_number_for_each_row_gives_the_bits_of_a_number_for_each_target():
    batch = make_batch(EXAMPLES, rows=6)
    values = logits_for(batch)[..., 0]
    owners = np.repeat(batch.member[:, None], batch.targets.shape[1], axis=1)
    weighted = values * batch.weights
    direct = jax.ops.segment_sum(weighted.reshape(-1), owners.reshape(-1), num_segments=K)
    np.testing.assert_array_equal(sum_by_member(weighted, target_members(batch), K), direct)


def test_members_that_share_a_row_own_their_own_segments():
    batch = pack_batch([EXAMPLES[:2], EXAMPLES[2:]])
    expected = [[1, 1, 0, 0, 0], [1, 2, 2, 2]]
    members = target_members(batch)
    for row, own in enumerate(expected):
        assert members[row, : len(own)].tolist() == own
    assert sum_by_member(jnp.asarray(batch.weights), members, K).tolist() == [3, 3, 3]


@pytest.mark.parametrize("lost", range(3))
def test_a_member_whose_logits_are_nan_leaves_the_others_alone(lost):
    batch = make_batch(EXAMPLES, rows=4)
    logits = jnp.where((batch.member == lost)[:, None, None], jnp.nan, logits_for(batch))
    _, sums = cross_entropy()(logits, batch, K)
    assert np.isnan(sums.loss).tolist() == [member == lost for member in range(K)]


def test_a_wrong_token_that_is_certain_has_a_finite_loss_and_still_a_gradient():
    """In float32 p is 1 from a difference of 17 nats on; where 1 - p is 1e-4 the formula holds."""
    wrong = jnp.array([[[True]]])

    def value(logit):
        log_p = jax.nn.log_softmax(jnp.stack([logit, 0.0]))[0]
        return unlikelihood(log_p.reshape(1, 1, 1), wrong)[0]

    for logit, slope in ((0.0, 0.5), (9.2, 1.0), (12.0, 0.8)):
        assert float(jax.grad(value)(logit)) == pytest.approx(slope, rel=0.15)
    assert float(value(9.2)) == pytest.approx(np.log1p(np.exp(9.2)), rel=1e-2)
    for logit in (40.0, 1e6):
        assert np.isfinite(value(logit)) and np.isfinite(jax.grad(value)(logit))
