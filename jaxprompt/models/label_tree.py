"""Labels as trees: a common beginning is computed once, and one pass computes all nodes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

# labels of a tree, at most: each node has logits over the whole vocabulary
_LABELS_AT_ONCE = 8


def node_bucket(count: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, ... that is not below ``count``.

    Trees are padded to it, so that tasks whose labels have other numbers of nodes share programs.
    """
    power = 1 << max(count - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


class Tree(NamedTuple):
    """Beginnings of answers. Each is a node that attends to itself and to its own beginnings.

    Node 0 is the empty beginning, from which the first token is predicted.
    """

    ids: Int[np.ndarray, "*G n"]  # the last token of each; -1: what all answers start with
    depths: Int[np.ndarray, "*G n"]  # the number of its tokens
    visible: Bool[np.ndarray, "*G n n"]  # which nodes each attends to

    @property
    def num_nodes(self) -> int:
        """n."""
        return self.ids.shape[-1]


class Holes(NamedTuple):
    """Answers that lack one token, for models that read an answer in both directions.

    Each is a node. Labels of one token share the node that has no other token.
    """

    ids: Int[np.ndarray, "*G n T"]  # of the answer; what stands in the hole means nothing
    lengths: Int[np.ndarray, "*G n"]  # of the answer
    holes: Int[np.ndarray, "*G n"]  # the number of the token that it lacks

    @property
    def num_nodes(self) -> int:
        """n."""
        return self.ids.shape[-2]


AnyTree = Tree | Holes


class LabelTrees(NamedTuple):
    """C labels as G trees, each of the same number of labels; the last may have fewer."""

    trees: AnyTree
    nodes: Int[np.ndarray, "C T"]  # at which each token of a label is predicted
    tokens: Int[np.ndarray, "C T"]  # -1 after a label's end


def label_trees(labels: Int[np.ndarray, "C T"], room: int = 1) -> LabelTrees:
    """The trees of labels, which are padded with -1. Trees have ``room`` nodes or more.

    Labels [5 1] and [5 7 1] have the nodes (), (5) and (5 7): ids [-1 5 7], depths [0 1 2].
    """
    count = -(-len(labels) // _LABELS_AT_ONCE)
    size = -(-len(labels) // count)
    groups = [labels[i : i + size] for i in range(0, len(labels), size)]
    pairs = [_tree(group) for group in groups]
    max_nodes = node_bucket(max(room, *(len(beginnings) for beginnings, _ in pairs)))
    nodes = np.concatenate([nodes for _, nodes in pairs])
    trees = [_padded(beginnings, max_nodes) for beginnings, _ in pairs]
    return LabelTrees(Tree(*map(np.stack, zip(*trees, strict=True))), nodes, labels)


def label_holes(labels: Int[np.ndarray, "C T"]) -> LabelTrees:
    """The same labels for models that read an answer in both directions.

    Labels [5 -1] and [5 7] have the nodes (_), (_ 7) and (5 _), where _ is the hole.
    """
    lengths = (labels >= 0).sum(axis=1)
    count = 1 if lengths.max() == 1 else -(-len(labels) // _LABELS_AT_ONCE)
    size = -(-len(labels) // count)
    groups = [labels[i : i + size] for i in range(0, len(labels), size)]
    found = [_holes(group) for group in groups]
    most = max(len(numbers) for numbers, _ in found)
    shape = len(groups), most
    answers = np.zeros((*shape, labels.shape[1]), np.int32)
    sizes, holes = np.ones(shape, np.int32), np.zeros(shape, np.int32)
    for group, (numbers, _) in enumerate(found):
        for (answer, hole), node in numbers.items():
            answers[group, node, : len(answer)] = answer
            sizes[group, node], holes[group, node] = len(answer), hole
    nodes = np.concatenate([nodes for _, nodes in found])
    return LabelTrees(Holes(answers, sizes, holes), nodes, labels)


def one_token_each(count: int, masked: bool) -> LabelTrees:
    """C labels of which each is one token, its own number, and which all share one node.

    masked: for a model that reads an answer in both directions.
    """
    nodes, tokens = np.zeros((count, 1), np.int32), np.arange(count, dtype=np.int32)[:, None]
    zero, one = np.zeros((1, 1), np.int32), np.ones((1, 1), np.int32)
    if masked:
        return LabelTrees(Holes(zero[None], one, zero), nodes, tokens)
    return LabelTrees(Tree(-one, zero, np.ones((1, 1, 1), bool)), nodes, tokens)


def _holes(labels):
    """Answers with a hole, and for each token of a label the number of the one that lacks it."""
    numbers: dict[tuple[tuple[int, ...], int], int] = {}
    nodes = np.zeros_like(labels)
    for row, label in enumerate(labels.tolist()):
        tokens = tuple(token for token in label if token >= 0)
        for at in range(len(tokens)):
            answer = (*tokens[:at], 0, *tokens[at + 1 :])
            nodes[row, at] = numbers.setdefault((answer, at), len(numbers))
    return numbers, nodes


def label_tree(labels: Int[np.ndarray, "C T"]) -> tuple[Tree, Int[np.ndarray, "C T"]]:
    """One tree of all labels without padding, and the node at which each token is predicted.

    labels: padded with -1.
    """
    beginnings, nodes = _tree(labels)
    return _padded(beginnings, len(beginnings)), nodes


def stack_trees(trees: Sequence[Tree], rows: int, nodes: int) -> Tree:
    """The trees of a batch's rows, each padded to ``nodes`` nodes: leaves [rows, nodes, ...].

    Rows after the last tree have the empty beginning alone. Padding attends to itself.
    """
    ids = np.full((rows, nodes), -1, np.int32)
    depths = np.zeros((rows, nodes), np.int32)
    visible = np.tile(np.eye(nodes, dtype=bool), (rows, 1, 1))
    for row, tree in enumerate(trees):
        n = len(tree.ids)
        ids[row, :n], depths[row, :n], visible[row, :n, :n] = tree
    return Tree(ids, depths, visible)


def _tree(labels):
    """The beginnings of labels, and for each token of a label the number of the one it follows."""
    numbers: dict[tuple[int, ...], int] = {(): 0}
    nodes = np.zeros_like(labels)
    for row, label in enumerate(labels.tolist()):
        for at, token in enumerate(label):
            if token >= 0:
                nodes[row, at] = numbers.setdefault(tuple(label[:at]), len(numbers))
    return list(numbers), nodes


def _padded(beginnings, count):
    ids, depths = np.full(count, -1, np.int32), np.zeros(count, np.int32)
    visible = np.eye(count, dtype=bool)  # padding attends to itself
    for node, beginning in enumerate(beginnings):
        ids[node], depths[node] = (beginning or (-1,))[-1], len(beginning)
        visible[node, : len(beginnings)] = [beginning[: len(b)] == b for b in beginnings]
    return Tree(ids, depths, visible)
