"""Batches: literal arrays, nothing lost, and batch k as a pure function of seed and k."""

import functools
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from helpers_data import random_examples

from jaxprompt.data import batches as pipeline
from jaxprompt.data.batches import (
    Cut,
    Draw,
    Example,
    Room,
    balance_rows,
    batch_indices,
    dropout_seeds,
    epoch_order,
    make_batch,
    micro_batches,
    micro_rows,
    order_cache,
    pack_batch,
    packed_rows,
    random_stream,
    round_input_length,
    round_target_length,
    target_lengths,
    training_batches,
)
from jaxprompt.data.layout import BatchLayout


def example(inputs, targets):
    return Example(np.array(inputs, np.int32), np.array(targets, np.int32))


def assert_equal(one, two):
    for name, a, b in zip(one._fields, one, two, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


PAIR = [example([9, 8, 1], [5, 1]), example([7, 1], [6, 1])]


def test_make_batch_is_this():
    pair = [PAIR[0]._replace(member=2), PAIR[1]._replace(member=1)]
    batch = make_batch(pair, rows=3, input_length=4, target_length=3)
    assert batch.inputs.tolist() == [[9, 8, 1, 0], [7, 1, 0, 0], [0, 0, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert batch.targets.tolist() == [[5, 1, 0], [6, 1, 0], [0, 0, 0]]
    assert batch.target_segments.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert batch.member.tolist() == [2, 1, 0]
    assert batch.weights.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert {array.dtype for array in batch[:5]} == {np.dtype(np.int32)}
    assert batch.weights.dtype == np.float32


def test_pack_batch_is_this():
    batch = pack_batch([PAIR], input_length=6, target_length=5)
    assert batch.inputs.tolist() == [[9, 8, 1, 7, 1, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 0]]
    assert batch.targets.tolist() == [[5, 1, 6, 1, 0]]
    assert batch.target_segments.tolist() == [[1, 1, 2, 2, 0]]
    assert batch.weights.tolist() == [[1, 1, 1, 1, 0]]


def test_few_shapes():
    inputs = {round_input_length(n) for n in range(1, 4097)}
    assert all(n <= round_input_length(n) for n in range(1, 4097))
    assert len(inputs) < 24 and all(size % 32 == 0 for size in inputs)
    assert [round_target_length(n) for n in (0, 1, 4, 5, 9, 64)] == [4, 4, 4, 8, 16, 64]


def test_packing_keeps_every_token_exactly_once():
    examples = random_examples(200)
    batch = pack_batch([examples[first : first + 3] for first in range(0, 200, 3)])
    found = {}
    for ids, marks, targets, target_marks in zip(*batch[:4], strict=True):
        for segment in range(1, marks.max() + 1):
            # one stretch each, so that relative positions can come from offsets
            places = np.flatnonzero(marks == segment)
            assert (np.diff(places) == 1).all()
            found[ids[places[0]]] = ids[places], targets[target_marks == segment]
    assert len(found) == len(examples)
    for original in examples:
        inputs, targets = found[original.inputs[0]]
        np.testing.assert_array_equal(inputs, original.inputs)
        np.testing.assert_array_equal(targets, original.targets)
    assert (batch.inputs[batch.segments == 0] == 0).all()


def test_a_row_of_targets_has_one_member_or_one_for_each_segment():
    one, other = PAIR[0]._replace(member=2), PAIR[1]._replace(member=1)
    assert pack_batch([[one, one], [other]], rows=3).member.tolist() == [2, 1, 0]
    assert pack_batch([[one, other], [other]], rows=3).member.tolist() == [[2, 1], [1, 0], [0, 0]]


@pytest.mark.parametrize("window", [0, 1, 4, 100])
@pytest.mark.parametrize("count, size", [(103, 8), (16, 8), (8, 8), (9, 1)])
def test_an_epoch_visits_every_row_once_but_for_the_tail(window, count, size):
    lengths = np.random.default_rng(0).integers(1, 50, count)
    steps = count // size
    for epoch in (0, 3):
        seen = Counter()
        for step in range(epoch * steps, (epoch + 1) * steps):
            seen.update(
                batch_indices(lengths, batch_size=size, seed=1, step=step, window=window).tolist()
            )
        assert set(seen.values()) == {1} and len(seen) == steps * size


def test_what_an_epoch_drops_is_not_always_the_same():
    lengths = np.ones(11, int)
    epochs = [
        {int(i) for step in (2 * e, 2 * e + 1)
         for i in batch_indices(lengths, batch_size=5, seed=0, step=step, window=0)}
        for e in range(8)
    ]  # fmt: skip
    assert set.union(*epochs) == set(range(11)) and len(set(map(frozenset, epochs))) > 1


@pytest.mark.parametrize("window", [0, 4])
def test_batch_is_a_pure_function_of_seed_and_step(window):
    lengths = np.random.default_rng(0).integers(1, 50, 64)

    def at(seed, step):
        return batch_indices(lengths, batch_size=4, seed=seed, step=step, window=window).tolist()

    steps = [0, 17, 3, 40, 17, 2**31, 0]
    forward = [at(7, step) for step in steps]
    assert forward == [at(7, step) for step in reversed(steps)][::-1]
    assert at(7, 0) != at(8, 0) and at(7, 0) != at(7, 16) and at(-1, 0) != at(1, 0)
    assert at(2**63 + 1, 0) != at(2**63, 0)
    assert at(7, 0) != at(7, 1)


def test_windows_bring_equal_lengths_together_in_random_order():
    lengths = np.random.default_rng(0).integers(1, 200, 512)

    def waste(window):
        batches = [lengths[batch_indices(lengths, batch_size=16, seed=0, step=k, window=window)]
                   for k in range(32)]  # fmt: skip
        longest = np.array([batch.max() for batch in batches])
        return sum(
            (top - batch).sum() for top, batch in zip(longest, batches, strict=True)
        ), longest

    (sorted_waste, longest), (random_waste, _) = waste(16), waste(0)
    assert sorted_waste < random_waste / 5
    steps = np.sign(np.diff(longest[:16]))
    assert (steps > 0).any() and (steps < 0).any()  # no curriculum from short to long


def test_fewer_rows_than_a_batch_are_repeated():
    indices = batch_indices(np.ones(3, int), batch_size=8, seed=0, step=5, window=16)
    assert sorted(Counter(indices.tolist()).values()) == [2, 3, 3]


@pytest.mark.parametrize("window", [0, 3])
def test_resuming_continues_the_very_same_batches(window):
    examples = random_examples(50)
    draw = Draw(8, [3], window)
    whole = list(itertools.islice(training_batches([examples], draw), 20))
    for start in (0, 1, 7, 13):
        resumed = itertools.islice(training_batches([examples], draw, start=start), 6)
        for one, two in zip(whole[start : start + 6], resumed, strict=True):
            assert_equal(one[0], two[0])


def test_training_batches_are_those_of_batch_indices():
    examples = random_examples(50)
    lengths = np.array([len(e.inputs) for e in examples])
    longest = max(len(e.targets) for e in examples)
    draw = Draw(8, [3], 2)
    whole, parts = (
        itertools.islice(training_batches([examples], draw, Cut(rows)), 9) for rows in (None, 4)
    )
    for step, ([batch], (longer, shorter)) in enumerate(zip(whole, parts, strict=True)):
        chosen = batch_indices(lengths, batch_size=8, seed=3, step=step, window=2)
        ordered = sorted(chosen, key=lambda i: -lengths[i])
        drawn = dropout_seeds(random_stream(3, step), 8)
        own = {i: examples[i]._replace(dropout_seed=n) for i, n in zip(chosen, drawn, strict=True)}
        assert_equal(batch, make_batch([own[i] for i in ordered], target_length=longest))
        for part, mine in ((longer, ordered[:4]), (shorter, ordered[4:])):
            assert_equal(part, make_batch([own[i] for i in mine], target_length=longest))


def test_shared_rows_are_about_equally_long_and_hold_every_example_once():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(30, 200, 32).tolist()
        found = balance_rows(lengths, 8, most=6)
        assert sorted(i for row in found for i in row) == list(range(32))
        assert max(map(len, found)) <= 6
        longest = max(sum(lengths[i] for i in row) for row in found)
        assert longest < 1.02 * sum(lengths) / 8
    assert balance_rows([5, 5, 5], 2, most=2) in ([[0, 2], [1]], [[0], [1, 2]])


def test_shared_rows_are_this():
    examples = [example(range(1, n + 1), [n, 1]) for n in (40, 30, 50, 20)]
    widths = BatchLayout(examples_per_row=3, packed_widths=(50,))
    (one, first), (two, second) = packed_rows(
        examples, parts=2, devices=1, widths=widths, target_length=4
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
    [whole] = micro_batches(examples, rows=4, widths=widths, devices=2)
    assert whole.inputs.shape == (2, 128) and whole.targets.shape == (6, 4)
    with pytest.raises(ValueError, match="50 ids, more than 49"):
        next(packed_rows(examples, parts=1, devices=1, widths=replace(widths, packed_widths=(49,)),
                         target_length=4))  # fmt: skip


def test_the_rows_of_a_micro_batch_divide_the_batch_and_fit_the_positions():
    lengths = np.array([100, 300])  # 200 on average
    rows = functools.partial(micro_rows, lengths)
    assert rows(batch_size=32, positions=2048) == 8
    assert rows(batch_size=32, positions=100) == 1
    assert rows(batch_size=32, positions=10**6) == 32
    assert rows(batch_size=30, positions=2048) == 10
    assert rows(batch_size=32, positions=100, multiple=4) == 4  # devices share the rows


def test_targets_of_labels_are_in_one_bucket():
    assert target_lengths([2, 5, 16]) == (16,) and target_lengths([3]) == (3,)
    assert target_lengths([17, 4, 64, 65, 9]) == (9, 64, 65) and target_lengths([]) == ()


def test_one_long_target_makes_one_micro_batch_deep():
    rng = np.random.default_rng(0)
    rows = [example([9] * n, [7] * 3) for n in rng.integers(3, 90, 15)]
    rows.append(example([9] * 5, [7] * 200))
    parts = micro_batches(rows, rows=4, target_length=(4, 200))
    assert [part.targets.shape for part in parts] == [(4, 200)] + [(4, 4)] * 3
    assert sum(part.weights.sum() for part in parts) == 15 * 3 + 200
    # one that holds more than there is room for is cut again, the others stay as they are
    small = micro_batches(rows, rows=4, target_length=(4, 200), room=Room(targets=256))
    assert [part.targets.shape for part in small] == [(1, 200)] * 4 + [(4, 4)] * 3
    for one, two in zip(parts[1:], small[4:], strict=True):
        assert_equal(one, two)
    assert len({part.inputs.shape for part in small[:4]}) == 1
    # all targets are shorter: nothing is other than with one length
    for one, two in zip(
        micro_batches(rows[:8], rows=4, target_length=4),
        micro_batches(rows[:8], rows=4, target_length=(4, 200), room=Room(10**4, 10**4)),
        strict=True,
    ):
        assert_equal(one, two)


def test_micro_batches_of_shared_rows_are_as_deep_as_their_own_targets():
    rows = [example([9] * 60, [7] * 3) for _ in range(7)] + [example([9] * 60, [7] * 50)]
    widths = BatchLayout(examples_per_row=4, packed_widths=(64,))
    parts = micro_batches(rows, rows=4, target_length=(4, 50), widths=widths)
    assert sorted(part.targets.shape for part in parts) == [(4, 4), (4, 50)]


def test_training_batches_are_deep_only_where_a_long_target_is():
    rows = [example([i, 1], [7, 1]) for i in range(31)] + [example([31, 1], [7] * 200)]
    batches = training_batches([rows], Draw(8, [0]), Cut(4))
    epoch = [part for step in itertools.islice(batches, 4) for part in step]
    depths = Counter(part.targets.shape[1] for part in epoch)
    assert depths == {2: 7, 200: 1} and sum(part.weights.sum() for part in epoch) == 31 * 2 + 200


def test_a_micro_batch_of_long_rows_is_cut_where_it_holds_far_more_than_others():
    rows = [example([9] * n, [7]) for n in [500] * 4 + [20] * 28]
    parts = micro_batches(rows, rows=16, room=Room(positions=4096))
    assert [part.inputs.shape for part in parts] == [(8, 512)] * 2 + [(16, 32)]


def test_the_swaps_of_shared_rows_are_bounded(monkeypatch):
    """Rows of many examples are as equal within a per cent, for far less than all swaps."""
    lengths = np.random.default_rng(0).integers(30, 300, 4000).tolist()
    asked = []
    flatnonzero = np.flatnonzero
    monkeypatch.setattr(np, "flatnonzero", lambda x: asked.append(1) or flatnonzero(x))

    def longest(pairs):
        asked.clear()
        monkeypatch.setattr(pipeline, "_MOST_PAIRS", pairs)
        found = balance_rows(lengths, 250, most=20)
        assert sorted(i for row in found for i in row) == list(range(4000))
        return max(sum(lengths[i] for i in row) for row in found), len(asked)

    (best, many), (bounded, few) = longest(2**40), longest(20 * 4000 * 5)
    assert few <= 10 < many and bounded <= 1.01 * best


def test_only_the_orders_of_two_epochs_of_each_prompt_are_kept():
    order_of = order_cache(prompts=3)
    for seed, epoch in itertools.product(range(3), range(4)):
        np.testing.assert_array_equal(order_of(9, seed, epoch), epoch_order(9, seed, epoch))
    assert order_of.cache_info().currsize == 6
    assert epoch_order(5, 0, 0).dtype == np.int32


def test_lengths_are_rounded_after_a_prompt_that_costs_nothing():
    """With 100 vectors in front, texts of up to 32 ids take 132 columns and not 160."""
    rows = [example(range(1, 101 + n), [1]) for n in (3, 32)]
    assert make_batch(rows).inputs.shape == (2, 160)
    widths = BatchLayout(shared_prefix_length=100)
    batch = make_batch(rows, widths=widths)
    assert batch.inputs.shape == (2, 132)
    assert (batch.segments.sum(axis=1) == [103, 132]).all()


def test_fine_widths_are_multiples_of_sixteen():
    widths = BatchLayout(shared_prefix_length=20, fine_buckets=True)
    found = [round_input_length(20 + n, widths) - 20 for n in (1, 16, 17, 40, 256, 257, 1025)]
    assert found == [16, 16, 32, 48, 256, 288, 1536]
