"""The swap control of the study of users, and its clusters."""

import numpy as np

from jaxprompt.studies.figures import draw
from jaxprompt.studies.study import Study
from jaxprompt.studies.user_swaps import draw_swaps, swap_control, swap_matrix
from jaxprompt.studies.users import k_means

OWNERS = np.repeat(np.arange(6), [5, 1, 2, 3, 4, 5])
NUMBERS = np.arange(6, dtype=np.float32).reshape(6, 1, 1)


def test_each_user_is_asked_with_the_prompt_of_each():
    """A row is right where the prompt's number is at most its user's."""
    matrix = swap_matrix(lambda bank: bank[OWNERS, 0, 0] <= OWNERS, NUMBERS, OWNERS)
    np.testing.assert_array_equal(matrix, np.tri(6))


def test_swapped_prompts_are_told_apart_from_own_ones():
    found = swap_control(np.eye(6), np.bincount(OWNERS), shifts=(1, 2, 6))
    assert found == {"swapped": 0.0, "own_wins": 1.0, "own_loses": 0.0}


def test_the_control_is_the_mean_over_rows_and_not_over_users():
    rows = np.bincount(OWNERS)
    found = swap_control(np.tri(6), rows, shifts=(1,))
    # the next user's prompt is too large for all but the last, who is given the first one
    assert found["swapped"] == rows[5] / rows.sum()
    assert (found["own_wins"], found["own_loses"]) == (5 / 6, 0.0)


def test_users_stand_in_the_order_of_their_rows_in_the_figure(tmp_path):
    axes = []

    def fill(axis):
        draw_swaps(np.tri(3), np.array([1, 3, 2]), axis)
        axes.append(axis)

    study = Study("title", "paper", lambda plan: [])
    path = draw(study, {}, {}, tmp_path / "swaps.png", {"swaps": fill})
    assert path is not None and path.stat().st_size > 1000
    (image,) = axes[0].get_images()
    np.testing.assert_array_equal(image.get_array(), [[1, 0, 1], [1, 1, 1], [0, 0, 1]])
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["3", "2", "1"]


def test_clusters_hold_the_points_that_are_near():
    points = np.concatenate([np.zeros((3, 2)), np.full((4, 2), 9.0)])
    labels = k_means(points + np.arange(7)[:, None] / 100, 2, seed=0)
    assert len({*labels[:3]}) == len({*labels[3:]}) == 1 and labels[0] != labels[-1]
