"""Batches: literal arrays, nothing lost, and batch k as a pure function of seed and k."""

import functools
import itertools
from collections import Counter

import numpy as np
import pytest
from helpers_data import random_examples

from jaxprompt.data.pipeline import (
    Example,
    Widths,
    batch_indices,
    evaluation_batches,
    first_fit,
    make_batch,
    micro_batches,
    micro_rows,
    noise,
    pack_batch,
    random_stream,
    round_input_length,
    round_target_length,
    shared_rows,
    shares,
    training_batches,
)


def example(inputs, targets):
    return Example(np.array(inputs, np.int32), np.array(targets, np.int32))


def assert_equal(one, two):
    for name, a, b in zip(one._fields, one, two, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


PAIR = [example([9, 8, 1], [5, 1]), example([7, 1], [6, 1])]


def test_make_batch_is_this():
    pair = [PAIR[0]._replace(prompt=2), PAIR[1]._replace(prompt=1)]
    batch = make_batch(pair, rows=3, input_length=4, target_length=3)
    assert batch.inputs.tolist() == [[9, 8, 1, 0], [7, 1, 0, 0], [0, 0, 0, 0]]
    assert batch.input_segments.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert batch.targets.tolist() == [[5, 1, 0], [6, 1, 0], [0, 0, 0]]
    assert batch.target_segments.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert batch.target_prompts.tolist() == [[2, 2, 0], [1, 1, 0], [0, 0, 0]]
    assert batch.loss_weights.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert {array.dtype for array in batch[:5]} == {np.dtype(np.int32)}
    assert batch.loss_weights.dtype == np.float32


def test_pack_batch_is_this():
    batch = pack_batch([PAIR], input_length=6, target_length=5)
    assert batch.inputs.tolist() == [[9, 8, 1, 7, 1, 0]]
    assert batch.input_segments.tolist() == [[1, 1, 1, 2, 2, 0]]
    assert batch.targets.tolist() == [[5, 1, 6, 1, 0]]
    assert batch.target_segments.tolist() == [[1, 1, 2, 2, 0]]
    assert batch.loss_weights.tolist() == [[1, 1, 1, 1, 0]]


def test_few_shapes():
    inputs = {round_input_length(n) for n in range(1, 4097)}
    assert all(n <= round_input_length(n) for n in range(1, 4097))
    assert len(inputs) < 24 and all(size % 32 == 0 for size in inputs)
    assert [round_target_length(n) for n in (0, 1, 4, 5, 9, 64)] == [4, 4, 4, 8, 16, 64]


def test_packing_keeps_every_token_exactly_once():
    examples = random_examples(200)
    rows = first_fit(examples, input_length=64, target_length=16)
    assert len(rows) < len(examples) / 2
    batch = pack_batch(rows, input_length=64, target_length=16)
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
    assert (batch.inputs[batch.input_segments == 0] == 0).all()


def test_packing_refuses_what_fits_nowhere():
    with pytest.raises(ValueError, match="does not fit"):
        first_fit([example(range(9), [1])], input_length=8, target_length=8)


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
    options = {"batch_size": 8, "seeds": [3], "window": window}
    whole = list(itertools.islice(training_batches([examples], **options), 20))
    for start in (0, 1, 7, 13):
        resumed = itertools.islice(training_batches([examples], start=start, **options), 6)
        for one, two in zip(whole[start : start + 6], resumed, strict=True):
            assert_equal(one[0], two[0])


def test_training_batches_are_those_of_batch_indices():
    examples = random_examples(50)
    lengths = np.array([len(e.inputs) for e in examples])
    longest = max(len(e.targets) for e in examples)
    options = {"batch_size": 8, "seeds": [3], "window": 2}
    whole, parts = (
        itertools.islice(training_batches([examples], rows=rows, **options), 9)
        for rows in (None, 4)
    )
    for step, ([batch], (longer, shorter)) in enumerate(zip(whole, parts, strict=True)):
        chosen = batch_indices(lengths, batch_size=8, seed=3, step=step, window=2)
        ordered = sorted(chosen, key=lambda i: -lengths[i])
        drawn = noise(random_stream(3, step), 8)
        own = {i: examples[i]._replace(noise=n) for i, n in zip(chosen, drawn, strict=True)}
        assert_equal(batch, make_batch([own[i] for i in ordered], target_length=longest))
        for part, mine in ((longer, ordered[:4]), (shorter, ordered[4:])):
            assert_equal(part, make_batch([own[i] for i in mine], target_length=longest))


def test_shared_rows_are_about_equally_long_and_hold_every_example_once():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(30, 200, 32).tolist()
        found = shares(lengths, 8, most=6)
        assert sorted(i for row in found for i in row) == list(range(32))
        assert max(map(len, found)) <= 6
        longest = max(sum(lengths[i] for i in row) for row in found)
        assert longest < 1.02 * sum(lengths) / 8
    assert shares([5, 5, 5], 2, most=2) in ([[0, 2], [1]], [[0], [1, 2]])


def test_shared_rows_are_this():
    examples = [example(range(1, n + 1), [n, 1]) for n in (40, 30, 50, 20)]
    widths = Widths(shared=3, packed=50)
    (one, first), (two, second) = shared_rows(
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
            ids = batch.inputs[batch.input_segments == number]
            assert ids.tolist() == list(range(1, length + 1))
    [whole] = micro_batches(examples, rows=4, widths=widths, devices=2)
    assert whole.inputs.shape == (2, 128) and whole.targets.shape == (6, 4)
    with pytest.raises(ValueError, match="50 ids, more than 49"):
        next(shared_rows(examples, parts=1, devices=1, widths=widths._replace(packed=49),
                         target_length=4))  # fmt: skip


def test_the_rows_of_a_micro_batch_divide_the_batch_and_fit_the_positions():
    lengths = np.array([100, 300])  # 200 on average
    rows = functools.partial(micro_rows, lengths)
    assert rows(batch_size=32, positions=2048) == 8
    assert rows(batch_size=32, positions=100) == 1
    assert rows(batch_size=32, positions=10**6) == 32
    assert rows(batch_size=30, positions=2048) == 10
    assert rows(batch_size=32, positions=100, multiple=4) == 4  # devices share the rows


@pytest.mark.parametrize("count", [1, 8, 21])
def test_evaluation_visits_every_row_once_and_pads_the_last_batch(count):
    examples = random_examples(count)
    visited = []
    for batch, numbers in evaluation_batches(examples, batch_size=8):
        assert batch.inputs.shape[0] == batch.targets.shape[0] == len(numbers) == 8
        for row, number in enumerate(numbers):
            if number == -1:
                assert not batch.input_segments[row].any() and not batch.loss_weights[row].any()
                continue
            visited.append(number)
            length = len(examples[number].inputs)
            np.testing.assert_array_equal(batch.inputs[row, :length], examples[number].inputs)
            assert batch.input_segments[row].sum() == length
    assert sorted(visited) == list(range(count))


def test_evaluation_of_nothing_and_of_rows_without_targets():
    assert list(evaluation_batches([], batch_size=4)) == []
    [(batch, numbers)] = evaluation_batches([example([5, 1], [])], batch_size=2)
    assert numbers.tolist() == [0, -1] and not batch.loss_weights.any()


def test_lengths_are_rounded_after_a_prompt_that_costs_nothing():
    """With 100 vectors in front, texts of up to 32 ids take 132 columns and not 160."""
    rows = [example(range(1, 101 + n), [1]) for n in (3, 32)]
    assert make_batch(rows).inputs.shape == (2, 160)
    widths = Widths(lead=100)
    batch = make_batch(rows, widths=widths)
    assert batch.inputs.shape == (2, 132)
    assert (batch.input_segments.sum(axis=1) == [103, 132]).all()
    (found, _), *rest = evaluation_batches(rows, batch_size=2, widths=widths)
    assert found.inputs.shape == (2, 132) and not rest


def test_fine_widths_are_multiples_of_sixteen():
    widths = Widths(lead=20, fine=True)
    found = [round_input_length(20 + n, widths) - 20 for n in (1, 16, 17, 40, 256, 257, 1025)]
    assert found == [16, 16, 32, 48, 256, 288, 1536]
