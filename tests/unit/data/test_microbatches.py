"""Micro-batches: every example once, and few positions wasted."""

import functools
from dataclasses import replace

import numpy as np
import pytest

from jaxprompt.data import microbatches
from jaxprompt.data.batches import Example
from jaxprompt.data.layout import BatchBudget, BatchLayout
from jaxprompt.data.microbatches import balance_rows, micro_batches, micro_rows, packed_rows


def example(inputs, targets):
    return Example(np.array(inputs, np.int32), np.array(targets, np.int32))


def assert_equal(one, two):
    for name, a, b in zip(one._fields, one, two, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_shared_rows_are_about_equally_long_and_hold_every_example_once():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(30, 200, 32).tolist()
        found = balance_rows(lengths, 8, max_per_row=6)
        assert sorted(i for row in found for i in row) == list(range(32))
        assert max(map(len, found)) <= 6
        longest = max(sum(lengths[i] for i in row) for row in found)
        assert longest < 1.02 * sum(lengths) / 8
    assert balance_rows([5, 5, 5], 2, max_per_row=2) in ([[0, 2], [1]], [[0], [1, 2]])


def test_shared_rows_are_this():
    examples = [example(range(1, n + 1), [n, 1]) for n in (40, 30, 50, 20)]
    layout = BatchLayout(examples_per_row=3, packed_widths=(50,))
    (one, first), (two, second) = packed_rows(
        examples, parts=2, devices=1, layout=layout, target_length=4
    )
    assert sorted([*first, *second]) == [-1, -1, 0, 1, 2, 3]
    for batch, numbers in ((one, first), (two, second)):
        targets = [0 if i < 0 else len(examples[i].inputs) for i in numbers]
        assert batch.targets[:, 0].tolist() == targets
    assert one.inputs.shape == two.inputs.shape == (1, 128) and len(one.targets) == 3
    for batch in (one, two):
        lengths = batch.targets[:, 0]
        assert lengths.sum() == 70 and (batch.target_segments[:, 0] == (lengths > 0)).all()
        for number, length in enumerate(lengths[lengths > 0], 1):
            ids = batch.inputs[batch.segments == number]
            assert ids.tolist() == list(range(1, length + 1))
    [whole] = micro_batches(examples, rows=4, layout=layout, devices=2)
    assert whole.inputs.shape == (2, 128) and whole.targets.shape == (6, 4)
    with pytest.raises(ValueError, match="50 ids, more than 49"):
        next(packed_rows(examples, parts=1, devices=1, layout=replace(layout, packed_widths=(49,)),
                         target_length=4))  # fmt: skip


def test_the_rows_of_a_micro_batch_divide_the_batch_and_fit_the_positions():
    lengths = np.array([100, 300])  # 200 on average
    rows = functools.partial(micro_rows, lengths)
    assert rows(batch_size=32, positions=2048) == 8
    assert rows(batch_size=32, positions=100) == 1
    assert rows(batch_size=32, positions=10**6) == 32
    assert rows(batch_size=30, positions=2048) == 10
    assert rows(batch_size=32, positions=100, multiple=4) == 4  # devices share the rows


def test_one_long_target_makes_one_micro_batch_deep():
    rng = np.random.default_rng(0)
    rows = [example([9] * n, [7] * 3) for n in rng.integers(3, 90, 15)]
    rows.append(example([9] * 5, [7] * 200))
    parts = micro_batches(rows, rows=4, target_length=(4, 200))
    assert [part.targets.shape for part in parts] == [(4, 200)] + [(4, 4)] * 3
    assert sum(part.weights.sum() for part in parts) == 15 * 3 + 200
    # one that holds more than there is room for is cut again, the others stay as they are
    small = micro_batches(rows, rows=4, target_length=(4, 200), budget=BatchBudget(targets=256))
    assert [part.targets.shape for part in small] == [(1, 200)] * 4 + [(4, 4)] * 3
    for one, two in zip(parts[1:], small[4:], strict=True):
        assert_equal(one, two)
    assert len({part.inputs.shape for part in small[:4]}) == 1
    # all targets are shorter: nothing is other than with one length
    for one, two in zip(
        micro_batches(rows[:8], rows=4, target_length=4),
        micro_batches(rows[:8], rows=4, target_length=(4, 200), budget=BatchBudget(10**4, 10**4)),
        strict=True,
    ):
        assert_equal(one, two)


def test_micro_batches_of_shared_rows_are_as_deep_as_their_own_targets():
    rows = [example([9] * 60, [7] * 3) for _ in range(7)] + [example([9] * 60, [7] * 50)]
    layout = BatchLayout(examples_per_row=4, packed_widths=(64,))
    parts = micro_batches(rows, rows=4, target_length=(4, 50), layout=layout)
    assert sorted(part.targets.shape for part in parts) == [(4, 4), (4, 50)]


def test_a_micro_batch_of_long_rows_is_cut_where_it_holds_far_more_than_others():
    rows = [example([9] * n, [7]) for n in [500] * 4 + [20] * 28]
    parts = micro_batches(rows, rows=16, budget=BatchBudget(positions=4096))
    assert [part.inputs.shape for part in parts] == [(8, 512)] * 2 + [(16, 32)]


def test_the_swaps_of_shared_rows_are_bounded(monkeypatch):
    """Rows of many examples are as equal within a per cent, for far less than all swaps."""
    lengths = np.random.default_rng(0).integers(30, 300, 4000).tolist()
    asked = []
    flatnonzero = np.flatnonzero
    monkeypatch.setattr(np, "flatnonzero", lambda x: asked.append(1) or flatnonzero(x))

    def longest(pairs):
        asked.clear()
        monkeypatch.setattr(microbatches, "_MOST_PAIRS", pairs)
        found = balance_rows(lengths, 250, max_per_row=20)
        assert sorted(i for row in found for i in row) == list(range(4000))
        return max(sum(lengths[i] for i in row) for row in found), len(asked)

    (best, many), (bounded, few) = longest(2**40), longest(20 * 4000 * 5)
    assert few <= 10 < many and bounded <= 1.01 * best
