"""Figures of sequences of tasks, and how tasks are split and ordered."""

import numpy as np
import pytest

from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.data.tasks.splits import load_rows
from jaxprompt.studies.continual_parts import (
    auroc,
    average,
    forgetting,
    forward_transfer,
    order_of,
    parts_of,
)

MATRIX = [[0.9, 0.2, 0.1], [0.6, 0.8, 0.3], [0.7, 0.5, 0.9]]


def test_forgetting_and_transfer_are_those_of_the_papers():
    assert average(MATRIX) == pytest.approx(0.7)
    assert forgetting(MATRIX) == pytest.approx((0.2 + 0.3) / 2)
    assert forward_transfer(MATRIX, [0.5, 0.1, 0.1]) == pytest.approx((0.1 + 0.2) / 2)
    assert forgetting([[0.5]]) == forward_transfer([[0.5]], [0.1]) == 0
    assert auroc(np.zeros(3), np.ones(3)) == 1 and auroc(np.ones(2), np.ones(2)) == 0.5


def test_a_task_is_split_into_tasks_without_common_labels(tmp_path):
    parts = parts_of(resolve_task("supersense"), tmp_path)
    labels = [label for part in parts for label in part.labels]
    assert len(parts) == 3 and sorted(labels) == sorted(resolve_task("supersense").labels)
    for part in parts:
        assert {row["label"] for row in load_rows(part, "test")} == set(part.labels)
    spam = resolve_task("spam")
    assert parts_of(spam, tmp_path) == [spam]
    orders = [[task.name for task in order_of([*parts, spam], n)] for n in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
