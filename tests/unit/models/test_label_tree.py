"""Trees of labels: nodes are all that labels begin with, each once."""

import numpy as np
import pytest

from jaxprompt.models.label_tree import label_holes, label_trees, node_bucket


def test_a_tree_is_this():
    (ids, depths, visible), nodes, tokens = label_trees(
        np.array([[5, 1, -1], [5, 7, 1], [8, 1, -1]])
    )
    assert ids.tolist() == [[-1, 5, 7, 8]] and depths.tolist() == [[0, 1, 2, 1]]
    assert visible.astype(int).tolist() == [[
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 0, 0, 1],
    ]]  # fmt: skip
    assert nodes[tokens >= 0].tolist() == [0, 1, 0, 1, 2, 0, 3]
    assert tokens.tolist() == [[5, 1, -1], [5, 7, 1], [8, 1, -1]]


@pytest.mark.parametrize("count", [1, 2, 8, 9, 17, 40])
def test_every_label_can_be_read_along_its_nodes(count):
    rng = np.random.default_rng(count)
    lengths = rng.integers(1, 5, count)
    labels = np.array([[*rng.integers(2, 5, n - 1), 1, *[-1] * (5 - n)] for n in lengths])
    (ids, depths, visible), nodes, tokens = label_trees(labels)
    np.testing.assert_array_equal(tokens, labels)
    groups, size = len(ids), -(-count // len(ids))
    assert groups == -(-count // 8)
    for number, (label, n) in enumerate(zip(labels, lengths, strict=True)):
        group, own = number // size, nodes[number, :n]
        assert own[0] == 0 and ids[group, own].tolist() == [-1, *label[: n - 1]]
        assert depths[group, own].tolist() == list(range(n))
        for at, node in enumerate(own):
            assert sorted(np.flatnonzero(visible[group, node])) == sorted(own[: at + 1])
    for group in range(groups):  # each beginning once
        mine = labels[group * size : (group + 1) * size].tolist()
        beginnings = {tuple(label[:at]) for label in mine for at in range(label.index(1) + 1)}
        assert len(beginnings) == 1 + (ids[group] >= 0).sum()


def test_the_numbers_of_nodes_come_from_few_buckets():
    counts = range(1, 200)
    buckets = [node_bucket(count) for count in counts]
    assert sorted({*buckets}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert all(
        count <= bucket <= count * 3 // 2 for count, bucket in zip(counts, buckets, strict=True)
    )


def test_trees_of_other_labels_of_the_same_sizes_have_the_same_shapes():
    five = [[2, 1, -1], [3, 1, -1], [4, 1, -1], [5, 1, -1]]
    six = [[2, 1, -1], [3, 1, -1], [4, 1, -1], [5, 6, 1]]
    shapes = [[x.shape for x in label_trees(np.array(labels)).trees] for labels in (five, six)]
    assert shapes[0] == shapes[1] == [(1, 6), (1, 6), (1, 6, 6)]


def test_labels_that_are_read_in_both_directions_have_a_node_for_each_hole():
    (ids, lengths, holes), nodes, tokens = label_holes(np.array([[5, -1], [5, 7], [8, -1], [6, 7]]))
    found = [tuple(x[:n]) for x, n in zip(ids[0].tolist(), lengths[0], strict=True)]
    # of (_), (_ 7) and (5 _), (6 _): labels that lack different words share what is left
    assert found == [(0,), (0, 7), (5, 0), (6, 0)] and holes[0].tolist() == [0, 0, 1, 1]
    assert nodes[tokens >= 0].tolist() == [0, 1, 2, 0, 1, 3]


def test_any_number_of_labels_of_one_token_is_one_node():
    (ids, _, _), nodes, _ = label_holes(np.arange(20)[:, None])
    assert ids.shape == (1, 1, 1) and not nodes.any()
