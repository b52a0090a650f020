"""How alike prompts are."""

import numpy as np
import pytest

from jaxprompt.serving.similarity import similarity_map


def test_prompts_are_compared_by_direction_whatever_their_lengths():
    one = np.array([[1.0, 0.0], [0.0, 1.0]])
    two = np.array([[3.0, 0.0]])
    found = similarity_map(["one", "two"], [one, two])
    assert found["names"] == ["one", "two"]
    np.testing.assert_allclose(found["cosine"], [[1, 0.5**0.5], [0.5**0.5, 1]], atol=1e-6)
    # one of two vectors has a match in the other prompt; the only vector there has one
    np.testing.assert_allclose(found["best_match"], [[1, 0.5], [1, 1]], atol=1e-6)


def test_a_prompt_of_zeros_is_like_none():
    found = similarity_map(["zeros", "one"], [np.zeros((2, 2)), np.ones((1, 2))])
    assert found["cosine"][0][1] == pytest.approx(0.0)
