"""Batches are these literal arrays, and nothing is lost in them."""

import numpy as np
from helpers_data import random_examples

from jaxprompt.data.batches import Example, make_batch, pack_batch


def example(inputs, targets):
    return Example(np.array(inputs, np.int32), np.array(targets, np.int32))


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
