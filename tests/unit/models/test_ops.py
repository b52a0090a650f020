import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprompt.models.base import Runtime
from jaxprompt.models.ops.activations import ACTIVATIONS, gate
from jaxprompt.models.ops.attention.dense import dense_mask
from jaxprompt.models.ops.attention.mask import (
    CrossKernels,
    UnprojectedKernel,
    attend_unprojected,
)
from jaxprompt.models.ops.matmul import head, matmul
from jaxprompt.models.ops.norm import rms_norm
from jaxprompt.models.ops.positions import relative_buckets
from jaxprompt.models.ops.segments import segment_mask, shift_right


def test_buckets_of_a_bidirectional_stack():
    """32 buckets to distance 128: 8 exact ones a side, then logarithmic (T5, section 2.1)."""
    offsets = jnp.array([0, 1, 7, 8, 127, 128, 5000, -1, -7, -8, -127, -5000])
    got = relative_buckets(offsets, bidirectional=True, buckets=32, max_distance=128)
    np.testing.assert_array_equal(got, [0, 17, 23, 24, 31, 31, 31, 1, 7, 8, 15, 15])


def test_buckets_of_a_causal_stack_see_only_the_past():
    offsets = jnp.array([0, 1, 9, -1, -15, -16, -127, -5000])
    got = relative_buckets(offsets, bidirectional=False, buckets=32, max_distance=128)
    np.testing.assert_array_equal(got, [0, 0, 0, 1, 15, 16, 31, 31])


def test_buckets_never_decrease_with_distance():
    distances = jnp.arange(0, 600)
    got = relative_buckets(-distances, bidirectional=False, buckets=32, max_distance=128)
    assert (np.diff(got) >= 0).all() and got.max() == 31


def test_rms_norm_has_unit_mean_square_and_keeps_the_dtype():
    x = 100 * jax.random.normal(jax.random.key(0), (2, 3, 64))
    normed = rms_norm(x, jnp.ones(64), 1e-6)
    np.testing.assert_allclose(jnp.mean(normed**2, axis=-1), 1.0, rtol=1e-5)
    assert rms_norm(x.astype(jnp.bfloat16), jnp.ones(64), 1e-6).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "spec, a, b",
    [
        ("bsd,dnh->bsnh", (2, 3, 8), (8, 2, 4)),
        ("btnh,nhd->btd", (2, 3, 2, 4), (2, 4, 8)),
        ("btd,dv->btv", (1, 1, 8), (8, 33)),
    ],
)
def test_mixed_products_are_float32_products_of_rounded_operands(spec, a, b):
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = (jax.random.normal(k, shape) for k, shape in zip(keys[:2], (a, b), strict=True))
    rounded = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
    plain, back = jax.vjp(lambda a, b: matmul(spec, a, b), rounded(a), rounded(b))
    mixed = jax.jit(lambda a, b: matmul(spec, a, b, mixed=True))(a, b)
    np.testing.assert_allclose(mixed, plain, rtol=1e-5, atol=1e-5)
    assert mixed.dtype == jnp.float32 and np.abs(mixed - jnp.einsum(spec, a, b)).max() > 1e-4

    # the cotangent is rounded too, and gradients have the dtype of what they belong to
    cotangent = jax.random.normal(keys[2], mixed.shape)
    _, mixed_back = jax.vjp(lambda a, b: matmul(spec, a, b, mixed=True), a, b)
    pairs = zip(jax.jit(mixed_back)(cotangent), back(rounded(cotangent)), strict=True)
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        assert got.dtype == jnp.float32


@pytest.mark.parametrize("mixed", [False, True])
def test_a_tied_head_is_the_head_of_the_transposed_table(mixed):
    """Values, and the gradient of the table, which full fine-tuning of a tied model needs."""
    rng = np.random.default_rng(0)
    y = jnp.asarray(rng.normal(size=(3, 2, 8)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(11, 8)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(3, 2, 11)), jnp.float32)

    @jax.jit
    def tied(table):
        logits = head(y, table, mixed, tied=True)
        return jnp.sum(logits * weights), logits

    (_, logits), gradient = jax.value_and_grad(tied, has_aux=True)(table)
    tolerance = 0.05 if mixed else 1e-5
    np.testing.assert_allclose(logits, head(y, table.T), atol=tolerance)
    expected = np.einsum("btv,btd->vd", weights, y)
    np.testing.assert_allclose(gradient, expected, atol=tolerance)


def test_attention_ignores_what_the_mask_hides():
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (1, 5, 2, 4)) for k in keys)
    segments = jnp.array([[1, 1, 2, 2, 0]])
    mask = dense_mask(segment_mask(segments, segments))
    whole = mask.attend(query, key, value)
    everything = dense_mask(jnp.ones((1, 1, 2, 2), bool))
    first = everything.attend(query[:, :2], key[:, :2], value[:, :2])
    np.testing.assert_allclose(whole[:, :2], first, rtol=1e-5, atol=1e-6)
    assert np.isfinite(whole).all()  # the padding query sees nothing and must not become NaN


def _attended(form, mixed=False):
    """Values and gradients of cross-attention over packed rows, with dropout, in both forms."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    query, weights = normal(6, 8, 2, 4), normal(6, 8, 2, 4)
    encoded, kernels = normal(6, 8, 5), normal(2, 5, 2, 4) / 2
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (6, 8)), axis=1)[:, ::-1])
    mask = dense_mask(segment_mask(segments, segments))
    keep = jnp.asarray(rng.integers(0, 2, (6, 8, 2)), jnp.float32)

    @jax.jit
    def value(query, encoded, kernels):
        if form == "to":
            runtime = Runtime(dtype="mixed" if mixed else "float32")
            both = CrossKernels(UnprojectedKernel(kernels[0]), UnprojectedKernel(kernels[1]))
            y = attend_unprojected(query, both, encoded, mask, keep, runtime=runtime)
        else:
            key, val = (matmul("bsd,dnh->bsnh", encoded, k, mixed) for k in kernels)
            val = val * keep[..., None]
            y = mask.attend(query, key, val, mixed=mixed)
        return jnp.sum(y * weights), y

    grads, found = jax.grad(value, argnums=(0, 1, 2), has_aux=True)(query, encoded, kernels)
    return found, *grads


@pytest.mark.parametrize("mixed", [False, True])
def test_the_forms_of_cross_attention_agree(mixed):
    tolerance = 0.1 if mixed else 2e-6
    for a, b in zip(_attended("to", mixed), _attended("of keys"), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max() + 1e-30))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_gate_and_its_gradients(mixed):
    rng = np.random.default_rng(0)
    a, b, of = (jnp.asarray(rng.normal(size=(3, 7)), jnp.float32) for _ in range(3))
    plain = lambda a, b: jnp.sum(of * jax.nn.gelu(a, approximate=True) * b)
    ours = lambda a, b: jnp.sum(of * gate(a, b, "gelu", mixed))
    assert ours(a, b) == pytest.approx(float(plain(a, b)), rel=1e-6)  # nothing is rounded here
    for x, y in zip(jax.grad(ours, (0, 1))(a, b), jax.grad(plain, (0, 1))(a, b), strict=True):
        bound = 0.02 if mixed else 16 * np.finfo(np.float32).eps * float(jnp.abs(y).max())
        np.testing.assert_allclose(x, y, atol=bound)
        assert mixed == bool((np.abs(x - y) > 1e-4).any())


def test_shift_right_starts_each_segment():
    targets = jnp.array([[7, 8, 1, 9, 1, 0]])
    segments = jnp.array([[1, 1, 1, 2, 2, 0]])
    np.testing.assert_array_equal(shift_right(targets, segments, 0), [[0, 7, 8, 0, 9, 0]])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_zero_at_zero_and_grow(name):
    x = jnp.array([0.0, 1.0, 2.0])
    y = ACTIVATIONS[name](x)
    assert y[0] == 0 and y[1] < y[2]
