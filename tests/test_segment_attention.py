"""Attention of one example after another, against the plain form over the whole of the rows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprompt.model import layers
from jaxprompt.model import segment_attention as own

# lengths of the segments of each row, of 24 positions; what is left is padding
ROWS = {
    "one a row": [[24], [17], [1]],
    "several": [[5, 12, 7], [10, 3], [1, 1, 1, 20]],
    "with an empty row": [[3, 4], [], [24]],
}
WIDTH = 24


def segments_of(rows):
    return jnp.array([
        (marks := [i for i, n in enumerate(row, 1) for _ in range(n)]) + [0] * (WIDTH - len(marks))
        for row in rows
    ])  # fmt: skip


def both(rows, widths, dtype="float32", mixed=False):
    """Values and gradients, of the bias too, of both forms."""
    segments = segments_of(rows)
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    inputs = [normal(len(rows), WIDTH, 2, 4) for _ in range(3)]
    weights = normal(len(rows), WIDTH, 2, 4) * (segments > 0)[..., None, None]
    # of offsets, as in a T5: packed rows share it
    by_distance = jnp.asarray(rng.normal(size=(2, 2 * WIDTH)), jnp.float32)
    offsets = jnp.arange(WIDTH)
    bias = lambda n, table: table[:, offsets[:n, None] - offsets[None, :n] + WIDTH][None]

    def plain(query, key, value, table):
        mask = layers.additive(layers.segment_mask(segments, segments))
        return layers.attention(query, key, value, bias(WIDTH, table), mask)

    def in_turn(query, key, value, table):
        found = own.find(segments)
        biases = bias(widths[-1], table)
        return own.attention(query, key, value, biases, found, widths, mixed=mixed)

    results = []
    for form in (plain, in_turn):
        total = lambda *args, form=form: jnp.sum(form(*args).astype("float32") * weights)
        y = jnp.where((segments > 0)[..., None, None], form(*inputs, by_distance), 0)
        results.append((y, *jax.jit(jax.grad(total, (0, 1, 2, 3)))(*inputs, by_distance)))
    return zip(*results, strict=True)


@pytest.mark.parametrize("widths", [(24,), (4, 8, 24), (1, 2, 3, 5, 7, 11, 13, 17, 20, 24)])
@pytest.mark.parametrize("rows", ROWS)
def test_it_is_attention_within_segments(rows, widths):
    for expected, found in both(ROWS[rows], widths):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(("dtype", "mixed"), [("float32", True), ("bfloat16", False)])
def test_in_bfloat16_it_stays_close(dtype, mixed):
    for expected, found in both(ROWS["several"], (8, 24), dtype, mixed):
        expected, found = (np.asarray(x, np.float32) for x in (expected, found))
        error = np.abs(expected - found).max()
        assert error < 0.03 * np.abs(expected).max() and (error > 0 or not mixed)


def test_positions_of_no_segment_get_nothing_and_give_nothing():
    segments = segments_of([[3], [2, 4]])
    x = jnp.ones((2, WIDTH, 1, 2))
    bias = jnp.zeros((1, 1, 8, 8))
    attend = lambda x: own.attention(x, x, x, bias, own.find(segments), (8,))
    assert not attend(x)[segments == 0].any() and (attend(x)[segments > 0] == 1).all()
    gradient = jax.grad(lambda x: attend(x).sum())(x)
    assert not gradient[segments == 0].any() and np.isfinite(gradient).all()


def test_a_segment_beyond_the_last_width_is_never_cut_in_silence():
    x, bias = jnp.ones((1, WIDTH, 1, 2)), jnp.zeros((1, 1, 8, 8))
    found = own.attention(x, x, x, bias, own.find(segments_of([[9, 2]])), (4, 8))
    assert np.isnan(found).all()


def test_segments_are_found():
    found = own.find(segments_of([[5, 12], [], [24]]))
    assert int(found.count) == 3
    assert found.starts[:3].tolist() == [0, 5, 48] and found.lengths[:3].tolist() == [5, 12, 24]


def test_widths_are_the_least_work_there_is():
    lengths = [30, 33, 64, 65, 100, 130, 130, 250, 301]

    def work(widths):
        return sum(min(w for w in widths if w >= n) ** 2 for n in lengths)

    assert own.best_widths(lengths, 1) == (320,)
    every = sorted({-(-n // 32) * 32 for n in lengths})
    assert own.best_widths(lengths, 99) == tuple(every)
    for count in (2, 3, 4):
        found = own.best_widths(lengths, count)
        others = (
            (*rest, 320)
            for k in range(count)
            for rest in itertools.combinations(every[:-1], k)
        )  # fmt: skip
        assert len(found) <= count and work(found) == min(map(work, others))


def test_rows_of_their_own_and_back():
    segments = segments_of([[5, 12, 7], [10, 3]])
    encoded = jnp.arange(2.0 * WIDTH * 3).reshape(2, WIDTH, 3)
    rows, marks = own.rows_of_their_own(encoded, segments, each=3, width=12)
    assert rows.shape == (6, 12, 3) and marks.sum(1).tolist() == [5, 12, 7, 10, 3, 0]
    np.testing.assert_array_equal(rows[1], encoded[0, 5:17])
    np.testing.assert_array_equal(rows[4, :3], encoded[1, 10:13])
    taken = lambda x: (own.rows_of_their_own(x, segments, 3, 12)[0] * marks[..., None]).sum()
    gradient = jax.grad(taken)(encoded)  # each position is in one row
    np.testing.assert_array_equal(gradient[..., 0], segments > 0)
