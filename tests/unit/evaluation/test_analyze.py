"""What is said of a prompt: near words, how tight their clusters are, where class labels stay."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprompt.evaluation.analysis import nearest_words, summarize, tightness

# two bundles of four words each around an axis, and eight words far from everything
AXES = np.eye(16, dtype=np.float32)
BUNDLES = [axis + 0.1 * AXES[8 + i] for axis in AXES[:2] for i in range(4)]
TABLE = jnp.asarray(np.stack([*BUNDLES, *(3 * AXES[2:10])]))


def test_tightness_is_the_mean_cosine_of_two_different_words():
    ids = np.array([[0, 1, 2], [0, 4, 12]])
    unit = np.asarray(TABLE / np.linalg.norm(TABLE, axis=1, keepdims=True))
    by_hand = [
        np.mean([unit[a] @ unit[b] for a in row for b in row if a != b]) for row in ids.tolist()
    ]
    np.testing.assert_allclose(tightness(ids, TABLE), by_hand, rtol=1e-5, atol=1e-6)
    assert tightness(ids[:, :1], TABLE).tolist() == [1, 1]


def test_vectors_among_alike_words_have_tight_clusters_and_random_ones_do_not():
    vectors = 7 * AXES[:2]  # length does not matter
    report = summarize(vectors, TABLE, pieces=16, word=str, count=4)
    assert report["clusters"]["tightness"] == pytest.approx(1 / 1.01, abs=1e-4)
    assert report["clusters"]["random"] < 0.5
    again = summarize(vectors, TABLE, pieces=16, word=str, count=4)
    assert report == again  # the random directions are always the same


def test_labels_are_found_where_one_of_their_pieces_is_near():
    vectors = np.stack([AXES[0], AXES[5], AXES[1], AXES[0] + 0.2 * AXES[8]])
    labels = {"first": [0], "second": [5, 9], "none": []}
    found = summarize(vectors, TABLE, pieces=16, word=str, count=1, labels=labels)["labels"]
    near = nearest_words(vectors, TABLE, pieces=16, count=1).ids[:, 0]
    assert found["first"]["positions"] == np.flatnonzero(near == 0).tolist() and near[3] == 0
    assert found["second"]["positions"] == np.flatnonzero(np.isin(near, [5, 9])).tolist()
    assert found["none"] == {"positions": [], "random": 0.0}
    assert 0 <= found["first"]["random"] < 0.5
