"""Attention of one example after another, against the plain form over the whole of the rows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_sums

from jaxprompt.models.ops.attention.dense import dense_mask
from jaxprompt.models.ops.attention.per_example import best_widths, per_example_mask
from jaxprompt.models.ops.segments import segment_mask

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
        mask = dense_mask(segment_mask(segments, segments))
        return mask.attend(query, key, value, bias(WIDTH, table))

    def in_turn(query, key, value, table):
        mask = per_example_mask(segments, widths)
        return mask.attend(query, key, value, bias(widths[-1], table), mixed=mixed)

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
        assert_same_sums(found, expected, 24 * 16)


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
    attend = lambda x: per_example_mask(segments, (8,)).attend(x, x, x, bias)
    assert not attend(x)[segments == 0].any() and (attend(x)[segments > 0] == 1).all()
    gradient = jax.grad(lambda x: attend(x).sum())(x)
    assert not gradient[segments == 0].any() and np.isfinite(gradient).all()


def test_a_segment_beyond_the_last_width_is_never_cut_in_silence():
    x, bias = jnp.ones((1, WIDTH, 1, 2)), jnp.zeros((1, 1, 8, 8))
    mask = per_example_mask(segments_of([[9, 2]]), (4, 8))
    assert np.isnan(mask.attend(x, x, x, bias)).all()


def test_a_mask_knows_where_segments_are():
    segments = segments_of([[5, 12], [], [24]])
    mask = per_example_mask(segments)
    assert mask.widths == (WIDTH,) and mask.bounds.tolist() == [0, 3]
    assert mask.starts[:3].tolist() == [0, 5, 48] and mask.lengths[:3].tolist() == [5, 12, 24]
    mask = per_example_mask(segments, (5, 16, 20, 99), queries_per_row=2)  # by their widths
    assert mask.widths == (5, 16, 20, WIDTH) and mask.bounds.tolist() == [0, 1, 2, 2, 3]
    assert mask.lengths[:3].tolist() == [5, 12, 24] and mask.query_rows[:3].tolist() == [0, 1, 4]
    mask = per_example_mask(segments_of([[12, 5], [3, 2]]), (5, 16))
    assert mask.starts[:4].tolist() == [12, 24, 27, 0] and mask.bounds.tolist() == [0, 3, 4]


def test_widths_are_the_least_work_there_is():
    lengths = [30, 33, 64, 65, 100, 130, 130, 250, 301]

    def work(widths):
        return sum(min(w for w in widths if w >= n) ** 2 for n in lengths)

    assert best_widths(lengths, 1) == (320,)
    every = sorted({-(-n // 32) * 32 for n in lengths})
    assert best_widths(lengths, 99) == tuple(every)
    for count in (2, 3, 4):
        found = best_widths(lengths, count)
        others = (
            (*rest, 320)
            for k in range(count)
            for rest in itertools.combinations(every[:-1], k)
        )  # fmt: skip
        assert len(found) <= count and work(found) == min(map(work, others))


def test_rows_of_queries_attend_to_a_segment_each():
    """Two heads, and one whose keys are its values too, as where nothing is projected."""
    rows = [[5, 12, 7], [10, 3], []]
    segments, each, asking = segments_of(rows), 4, 3
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(len(rows) * each, asking, 2, 4)), jnp.float32)
    key, value = jnp.asarray(rng.normal(size=(2, len(rows), WIDTH, 2, 4)), jnp.float32)
    numbers = jnp.tile(jnp.arange(1, each + 1), len(rows))
    keep = jnp.asarray(rng.integers(0, 3, (len(rows), WIDTH, 6)), jnp.float32)
    mask = lambda *widths: per_example_mask(segments, widths, queries_per_row=each)

    def plain(query, key, value, keep):
        keys, values, marks, kept = (
            jnp.repeat(x, each, axis=0) for x in (key, value, segments, keep)
        )
        seen = (marks == numbers[:, None])[:, None, None]
        logits = jnp.einsum("btnh,bsnh->btns", query, keys)
        weights = jax.nn.softmax(logits + dense_mask(seen).added, axis=-1)
        # queries of one head in turn have what is kept for theirs: 2 heads with 3 queries each
        kept = kept.reshape(*kept.shape[:2], 2, 3).transpose(0, 3, 2, 1)
        y = jnp.einsum("btns,bsnh->btnh", weights * kept, values)
        return jnp.where(seen.any(-1)[:, :, :, None], y, 0)

    def in_turn(query, key, value, keep):
        return mask(4, 12)._attend(query, key, value, None, keep, False)

    def found(form, *given):
        total = lambda *three: jnp.sin(form(*three, given[3])).sum()
        return form(*given), *jax.grad(total, (0, 1, 2))(*given[:3])

    ones = jnp.ones_like(keep)
    for given in ((query, key, value, keep), (query, key, key, keep), (query, key, key, ones)):
        for expected, got in zip(found(plain, *given), found(in_turn, *given), strict=True):
            assert_same_sums(got, expected, 24 * 16)
    for expected, got in zip(found(in_turn, *given[:3], None), found(in_turn, *given), strict=True):
        assert_same_sums(got, expected, 24 * 16)
    assert np.isnan(mask(4, 8).attend(query, key, value)).all()
