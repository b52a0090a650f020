"""The labels of a task as one tree, and the edges that each is made of."""

import numpy as np
from helpers_data import make_tokenizer

from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.serving.version import label_plan, plan_of_ids


def test_labels_share_the_edges_of_a_common_beginning():
    plan = plan_of_ids(["a", "b"], [[5, 1], [5, 7, 1]])
    assert plan.tree.ids.tolist() == [-1, 5, 7] and plan.nodes == 3
    pairs = list(zip(plan.parents.tolist(), plan.tokens.tolist(), strict=True))
    assert pairs == [(0, 5), (1, 1), (1, 7), (2, 1)]
    assert plan.edges.tolist() == [[0, 1, -1], [0, 2, 3]]


def test_a_score_is_the_sum_or_the_mean_over_a_labels_tokens():
    log_p = np.array([-1.0, -2.0, -4.0, -8.0, np.nan], np.float32)
    ids = [[5, 1], [5, 7, 1]]
    assert plan_of_ids("ab", ids).scores(log_p).tolist() == [-3.0, -13.0]
    means = plan_of_ids("ab", ids, length_normalized=True).scores(log_p)
    np.testing.assert_allclose(means, [-1.5, -13 / 3], rtol=1e-6)


def test_a_tree_has_less_than_two_edges_a_node():
    rng = np.random.default_rng(0)
    for count in (1, 5, 40):
        ids = [[*rng.integers(2, 6, rng.integers(1, 5)).tolist(), 1] for _ in range(count)]
        plan = plan_of_ids([str(i) for i in range(count)], list({tuple(row) for row in ids}))
        assert len(plan.parents) == len(plan.tokens) < 2 * plan.nodes


def test_a_label_of_several_words_has_their_pooled_score(tmp_path):
    words = {"verbalizer": {"yes": ["good", "True"]}, "labels": ["yes", "no"]}
    task = TaskConfig(name="t", template="{text}", **words)
    plan = label_plan(task, load_tokenizer(make_tokenizer(tmp_path)))
    assert plan is not None and plan.labels == ("yes", "no") and len(plan.edges) == 3
    log_p = np.log(np.full(len(plan.tokens), 0.5, np.float32))
    np.testing.assert_allclose(np.exp(plan.scores(log_p)), [0.5, 0.25], rtol=1e-6)
