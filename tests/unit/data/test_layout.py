"""The shapes of batches: few, and as small as can be."""

import numpy as np

from jaxprompt.data.batches import Example, make_batch
from jaxprompt.data.layout import (
    BatchLayout,
    round_input_length,
    round_target_length,
    target_lengths,
)


def example(inputs, targets):
    return Example(np.array(inputs, np.int32), np.array(targets, np.int32))


def test_few_shapes():
    inputs = {round_input_length(n) for n in range(1, 4097)}
    assert all(n <= round_input_length(n) for n in range(1, 4097))
    assert len(inputs) < 24 and all(size % 32 == 0 for size in inputs)
    assert [round_target_length(n) for n in (0, 1, 4, 5, 9, 64)] == [4, 4, 4, 8, 16, 64]


def test_targets_of_labels_are_in_one_bucket():
    assert target_lengths([2, 5, 16]) == (16,) and target_lengths([3]) == (3,)
    assert target_lengths([17, 4, 64, 65, 9]) == (9, 64, 65) and target_lengths([]) == ()


def test_lengths_are_rounded_after_a_prompt_that_costs_nothing():
    """With 100 vectors in front, texts of up to 32 ids take 132 columns and not 160."""
    rows = [example(range(1, 101 + n), [1]) for n in (3, 32)]
    assert make_batch(rows).inputs.shape == (2, 160)
    layout = BatchLayout(shared_prefix_length=100)
    batch = make_batch(rows, layout=layout)
    assert batch.inputs.shape == (2, 132)
    assert (batch.segments.sum(axis=1) == [103, 132]).all()


def test_fine_widths_are_multiples_of_sixteen():
    layout = BatchLayout(shared_prefix_length=20, fine_buckets=True)
    found = [round_input_length(20 + n, layout) - 20 for n in (1, 16, 17, 40, 256, 257, 1025)]
    assert found == [16, 16, 32, 48, 256, 288, 1536]
