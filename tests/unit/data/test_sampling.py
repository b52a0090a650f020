"""Batch k is a pure function of seed and k."""

import itertools
from collections import Counter

import numpy as np
import pytest
from helpers_data import random_examples

from jaxprompt.data.batches import Example, make_batch
from jaxprompt.data.microbatches import Cut
from jaxprompt.data.sampling import (
    Draw,
    MixedExamples,
    batch_indices,
    dropout_seeds,
    epoch_order,
    mixing_shares,
    order_cache,
    random_stream,
    training_batches,
)


def example(inputs, targets):
    return Example(np.array(inputs, np.int32), np.array(targets, np.int32))


def assert_equal(one, two):
    for name, a, b in zip(one._fields, one, two, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


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


def test_training_batches_are_deep_only_where_a_long_target_is():
    rows = [example([i, 1], [7, 1]) for i in range(31)] + [example([31, 1], [7] * 200)]
    batches = training_batches([rows], Draw(8, [0]), Cut(4))
    epoch = [part for step in itertools.islice(batches, 4) for part in step]
    depths = Counter(part.targets.shape[1] for part in epoch)
    assert depths == {2: 7, 200: 1} and sum(part.weights.sum() for part in epoch) == 31 * 2 + 200


def test_only_the_orders_of_two_epochs_of_each_prompt_are_kept():
    order_of = order_cache(3)
    for seed, epoch in itertools.product(range(3), range(4)):
        np.testing.assert_array_equal(order_of(9, seed, epoch), epoch_order(9, seed, epoch))
    assert order_of.cache_info().currsize == 6
    assert epoch_order(5, 0, 0).dtype == np.int32


def rows_of(count, mark):
    """Examples whose first id says which task and template they are of."""
    return [
        Example(np.array([mark, i, 1], np.int32), np.array([2, 1], np.int32)) for i in range(count)
    ]


def drawn(pool, steps, seed=3, window=0):
    lengths = np.array([len(e.inputs) for e in pool])
    of = lambda k: pool.indices(lengths, batch_size=8, seed=seed, step=k, window=window)
    return [[pool[i] for i in of(k)] for k in steps]


def test_shares_are_those_of_the_paper():
    """Raffel et al. 2020, section 3.5.2: min(e, K) by its sum, to the power of 1 / T."""
    sizes = [1000, 4000, 50_000]
    limited = np.array([1000, 4000, 9000])
    np.testing.assert_allclose(mixing_shares(sizes), np.array(sizes) / 55_000)
    np.testing.assert_allclose(mixing_shares(sizes, cap=9000), limited / 14_000)
    warm = np.sqrt(limited / 14_000)
    np.testing.assert_allclose(mixing_shares(sizes, cap=9000, temperature=2), warm / warm.sum())
    np.testing.assert_allclose(mixing_shares(sizes, temperature=None), [1 / 3] * 3)
    weighted = mixing_shares(sizes, [1, 1, 2], temperature=None)
    np.testing.assert_allclose(weighted, [1 / 4, 1 / 4, 1 / 2])


def test_tasks_of_a_mixture_have_their_shares_and_go_through_their_rows_in_epochs():
    shares = [0.1, 0.3, 0.6]
    pool = MixedExamples([[rows_of(7, 0)], [rows_of(50, 1)], [rows_of(4000, 2)]], shares)
    batches = drawn(pool, range(2048))  # one cycle
    examples = [e for batch in batches for e in batch]
    counts = np.bincount([e.task for e in examples])
    np.testing.assert_allclose(counts / len(examples), shares, atol=1e-4)
    for task, rows in enumerate((7, 50, 4000)):
        own = [int(e.inputs[1]) for e in examples if e.task == task]
        assert {int(e.inputs[0]) for e in examples if e.task == task} == {task}
        whole = len(own) // rows * rows
        assert set(np.bincount(own[:whole], minlength=rows)) == {whole // rows}
    # and hardly a batch has a task alone
    assert np.mean([len({e.task for e in batch}) for batch in batches]) > 2


def test_a_batch_of_a_mixture_depends_on_the_seed_and_its_number_alone():
    pool = MixedExamples([[rows_of(9, 0), rows_of(9, 1)], [rows_of(30, 2)]], [0.5, 0.5])
    ids = lambda batches: [[e.inputs.tolist() for e in batch] for batch in batches]
    whole = ids(drawn(pool, range(20)))
    assert ids(drawn(pool, range(13, 20))) == whole[13:]
    assert ids(drawn(pool, range(20), seed=4)) != whole
    streamed = training_batches([pool], Draw(8, [3]), start=13)
    inputs = next(streamed)[0].inputs[:, :3]
    assert inputs.tolist() == whole[13]


def test_a_window_of_a_mixture_sorts_the_rows_of_its_batches_by_length():
    longer = [e._replace(inputs=np.pad(e.inputs, (0, i % 7))) for i, e in enumerate(rows_of(30, 2))]
    pool = MixedExamples([[rows_of(9, 0), rows_of(9, 1)], [longer]], [0.5, 0.5])
    ids = lambda batches: sorted(e.inputs.tolist() for batch in batches for e in batch)
    lengths = lambda batch: sorted(len(e.inputs) for e in batch)
    plain, sorted_ones = drawn(pool, range(12)), drawn(pool, range(12), window=4)
    for first in (0, 4, 8):
        window = sorted_ones[first : first + 4]
        assert ids(window) == ids(plain[first : first + 4])
        ordered = sorted(map(lengths, window))
        assert all(a[-1] <= b[0] for a, b in itertools.pairwise(ordered))
    again = drawn(pool, range(6, 12), window=4)  # a resumed run
    assert [ids([batch]) for batch in again] == [ids([batch]) for batch in sorted_ones[6:]]


def test_a_template_is_drawn_for_each_example():
    pool = MixedExamples([[rows_of(5, mark) for mark in range(3)]])
    examples = [e for batch in drawn(pool, range(500)) for e in batch]
    pairs = np.array([e.inputs[:2] for e in examples])
    counts = np.zeros((3, 5), int)
    np.add.at(counts, tuple(pairs.T), 1)
    np.testing.assert_allclose(counts, len(examples) / 15, rtol=0.2)
    assert {e.task for e in examples} == {0}


@pytest.mark.parametrize("window", [0, 4])
def test_one_task_with_one_template_has_the_batches_that_it_has_without_a_mixture(window):
    plain = rows_of(37, 0)
    batches = [
        [batch.inputs.tolist() for batch in itertools.chain(*itertools.islice(
            training_batches([examples], Draw(8, [5], window)), 12))]
        for examples in (plain, MixedExamples([[plain]]))
    ]  # fmt: skip
    assert batches[0] == batches[1]
    seeds = [
        next(training_batches([examples], Draw(8, [5])))[0].dropout_seed.tolist()
        for examples in (plain, MixedExamples([[plain]]))
    ]
    assert seeds[0] == seeds[1]


def test_the_least_task_has_a_place():
    pool = MixedExamples([[rows_of(3, 0)], [rows_of(9, 1)]], [1e-7, 1 - 1e-7])
    assert sum(e.task == 0 for batch in drawn(pool, range(2048)) for e in batch) == 1
