import jax
import jax.numpy as jnp
import numpy as np

from jaxprompt.data.virtual_tokens import embed, virtual_ids


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
