import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt.data.virtual_tokens import embed, virtual_ids
from jaxprompt.models.injection import Injection


def test_ids_follow_the_layout():
    np.testing.assert_array_equal(virtual_ids(10, 3), [10, 11, 12])
    np.testing.assert_array_equal(virtual_ids(10, 3, prompt=2), [16, 17, 18])


def test_every_id_finds_its_own_row():
    table = jax.random.normal(jax.random.key(0), (10, 4))
    bank = jax.random.normal(jax.random.key(1), (2, 3, 4))
    got = embed(jnp.arange(16)[None], table, bank)[0]
    np.testing.assert_array_equal(got[:10], table)
    np.testing.assert_array_equal(got[10:], bank.reshape(6, 4))


def test_bank_stays_float32_and_the_result_has_the_dtype_of_the_table():
    table = jnp.zeros((10, 4), jnp.bfloat16)
    bank = jnp.ones((1, 2, 4), jnp.float32)
    assert embed(jnp.array([[10, 1]]), table, bank).dtype == jnp.bfloat16
    grad = jax.grad(lambda b: embed(jnp.array([[10, 1]]), table, b).astype(jnp.float32).sum())(bank)
    assert grad.dtype == jnp.float32
    np.testing.assert_array_equal(grad[0], [[1] * 4, [0] * 4])


def test_a_virtual_token_with_the_row_of_a_word_is_the_word(tiny):
    model, params = tiny
    words = jnp.array([[5, 9, 17, 33, 1]])
    bank = params["token_embedder"]["embedding"][jnp.array([9, 33])][None]
    virtual = jnp.array([[5, 61, 17, 62, 1]])
    run = jax.jit(lambda ids, bank: model.encode(params, Injection(bank), ids, jnp.ones_like(ids)))
    np.testing.assert_array_equal(run(words, None), run(virtual, bank))
