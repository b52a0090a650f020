"""Labels of a run's tasks, and which of them an example chooses from."""

import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.data.batches import Example, make_batch, pack_batch
from jaxprompt.data.label_sets import label_sets, with_choices

SETS = [[[5, 1], [6, 7, 1]], [[6, 7, 1], [10, 11, 12, 1], [13, 1]]]


def example(targets, member=0):
    return Example(np.array([5, 1], np.int32), np.array(targets, np.int32), member)


ROWS = [example([5, 1]), example([6, 7, 1], 1), example([6, 7, 1]), example([13, 1], 1)]


def test_a_label_of_two_sets_is_there_once():
    labels = label_sets(SETS)
    assert labels.tokens.tolist() == [
        [5, 1, -1, -1], [6, 7, 1, -1], [10, 11, 12, 1], [13, 1, -1, -1]
    ]  # fmt: skip
    assert labels.included.astype(int).tolist() == [[1, 1, 0, 0], [0, 1, 1, 1]]
    assert labels.lengths.tolist() == [2, 3, 4, 2]


def test_an_example_chooses_among_the_labels_of_its_set():
    batch = make_batch(with_choices(ROWS, label_sets(SETS), lambda e: e.member), rows=5)
    assert batch.choices.right.tolist() == [0, 1, 1, 3, 0]
    assert batch.choices.wrong.astype(int).tolist() == [
        [0, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]
    ]  # fmt: skip


def test_weights_make_means_of_sums_that_are_divided_by_target_tokens():
    """Member 0 has 5 target tokens, 3 + 2 wrong ones and two examples; member 1: 5, 6 + 7, two."""
    rows = with_choices(ROWS, label_sets(SETS), lambda e: e.member)
    token_weights = [float(e.choices.token_weight) for e in rows]
    assert token_weights == pytest.approx([5 / 5, 5 / 13, 5 / 5, 5 / 13])
    assert [float(e.choices.example_weight) for e in rows] == pytest.approx([5 / 2] * 4)
    assert make_batch(rows, rows=6).choices.example_weight.tolist()[4:] == [0, 0]


def test_a_target_that_is_no_label_of_its_task_is_refused():
    for targets in ([9, 1], [13, 1]):  # of no task, and of the other one
        with pytest.raises(UserError, match="is no label of its task"):
            with_choices([example(targets)], label_sets(SETS), lambda e: 0)


def test_batches_without_choices_have_the_arrays_that_they_always_had():
    batch = make_batch(ROWS)
    assert batch.choices is None and batch.dropout_seed is None


def test_examples_that_choose_have_targets_of_their_own():
    rows = with_choices(ROWS, label_sets(SETS), lambda e: e.member)
    with pytest.raises(ValueError, match="rows of targets of their own"):
        pack_batch([rows[:2], rows[2:]])
