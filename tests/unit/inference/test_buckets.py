"""Batches of inference: fixed shapes, every row once, and bounded logits."""

import numpy as np
import pytest
from helpers_data import random_examples

from jaxprompt.data.batches import Example
from jaxprompt.data.layout import BatchBudget, BatchLayout
from jaxprompt.inference.buckets import (
    BatchLimits,
    fitting_rows,
    inference_batches,
    row_buckets,
)


def example(inputs, targets):
    return Example(np.array(inputs, np.int32), np.array(targets, np.int32))


@pytest.mark.parametrize("count, rows", [(1, 1), (3, 4), (8, 8), (21, 8)])
def test_evaluation_visits_every_row_once_and_pads_the_last_batch(count, rows):
    examples = random_examples(count)
    visited = []
    for batch, numbers in inference_batches(examples, BatchLimits(8)):
        assert batch.inputs.shape[0] == batch.targets.shape[0] == len(numbers) == rows
        for row, number in enumerate(numbers):
            if number == -1:
                assert not batch.segments[row].any() and not batch.weights[row].any()
                continue
            visited.append(number)
            length = len(examples[number].inputs)
            np.testing.assert_array_equal(batch.inputs[row, :length], examples[number].inputs)
            assert batch.segments[row].sum() == length
    assert sorted(visited) == list(range(count))


def test_there_may_be_no_rows_and_rows_without_targets():
    assert list(inference_batches([], BatchLimits(4))) == []
    [(batch, numbers)] = inference_batches([example([5, 1], [])], BatchLimits(2))
    assert numbers.tolist() == [0] and not batch.weights.any()
    [(batch, numbers)] = inference_batches([example([5, 1], [])], BatchLimits(6, devices=3))
    assert numbers.tolist() == [0, -1, -1] and batch.inputs.shape == (3, 32)


def test_the_shapes_of_evaluation_follow_from_the_longest_example_and_the_number_of_them():
    """One long example changes nothing for the others, and no mean length is looked at."""

    def shapes(lengths, **more):
        rows = [example(range(n), []) for n in lengths]
        limits = BatchLimits(16, budget=BatchBudget(positions=1024), **more)
        return [batch.inputs.shape for batch, _ in inference_batches(rows, limits)]

    assert shapes([20] * 40) == [(16, 32)] * 3
    assert shapes([100] * 10) == [(8, 128)] * 2
    assert shapes([500] + [20] * 39) == [(2, 512)] + [(16, 32)] * 3
    assert shapes([500]) == [(1, 512)] and shapes([20] * 5) == [(8, 32)]
    assert shapes([2000]) == [(1, 2048)]  # one row is answered, however long
    assert shapes([500, 20], devices=2) == [(2, 512)]


def test_one_long_target_makes_one_batch_deep():
    rows = [example([5, 1], range(4)) for _ in range(499)] + [example([6, 1], range(600))]
    limits = BatchLimits(64, budget=BatchBudget(positions=2048, targets=4096))
    found = list(inference_batches(rows, limits))
    assert [batch.targets.shape for batch, _ in found] == [(1, 1024)] + [(64, 4)] * 8
    numbers = np.concatenate([own for _, own in found])
    assert sorted(numbers[numbers >= 0]) == list(range(500)) and found[0][1].tolist() == [499]
    # many long ones are computed a few at a time
    found = list(inference_batches(rows[-1:] * 64, limits))
    assert {batch.targets.shape for batch, _ in found} == {(2, 1024)}


def test_a_prompt_that_costs_nothing_is_no_part_of_the_length():
    rows = [example(range(1, 101 + n), [1]) for n in (3, 32)]
    (batch, _), *rest = inference_batches(
        rows, BatchLimits(2), BatchLayout(shared_prefix_length=100)
    )
    assert batch.inputs.shape == (2, 132) and not rest


def test_rows_come_from_few_buckets_that_devices_divide():
    assert row_buckets(64) == (1, 2, 4, 8, 16, 32, 64) and row_buckets(1) == (1,)
    assert row_buckets(12, devices=2) == (2, 4, 8, 12) and row_buckets(6, devices=3) == (3, 6)
    for most, devices in [(64, 1), (48, 4), (6, 3)]:
        limits = BatchLimits(most, devices)
        found = {fitting_rows(count, 32, 4, limits) for count in range(1, 200)}
        assert found == set(row_buckets(most, devices))


def test_logits_bound_the_rows_of_a_batch():
    """Many labels, or beams, hold many logits a row, though there are no targets."""
    rows = lambda logits: fitting_rows(64, 32, 4, BatchLimits(64, budget=budget, logits=logits))
    budget = BatchBudget(targets=640)
    assert [rows(n) for n in (1, 10, 11, 80, 1000)] == [64, 64, 32, 8, 1]
