"""Figures are drawn for the odd cases too, and show what they should."""

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from jaxprompt.config.errors import UserError
from jaxprompt.data.references import Reference
from jaxprompt.evaluation import plots
from jaxprompt.evaluation.analysis import summarize
from jaxprompt.evaluation.classes import confusion_of


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figures that are saved, and a path for them."""
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    return figures, tmp_path / "figure.png"


def texts_of(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_the_curve_begins_with_the_untuned_backbone_and_both_panels_share_their_steps(drawn):
    rows = [
        {"step": 0, "untuned/accuracy": 0.1},
        {"step": 10, "loss": 2.0},
        {"step": 50, "loss": 1.0, "validation/accuracy": 0.6},
    ]
    plots.draw_curves(rows, "accuracy", 0.5, drawn[1])
    left, right = drawn[0][0].axes
    assert left.get_xlim() == right.get_xlim()
    points = {line.get_label(): line.get_xydata() for line in right.lines}
    assert points["untuned backbone"].tolist() == [[0, 0.1]]
    assert points["accuracy"].tolist() == [[50, 0.6]]


def test_curves_of_a_run_without_steps_are_drawn(drawn):
    plots.draw_curves([], "accuracy", 0.5, drawn[1])
    assert len(drawn[0]) == 1


@pytest.mark.parametrize("length", [1, 3])
def test_nearest_words_stand_beside_each_vector(drawn, length):
    table = np.eye(8, dtype=np.float32)
    report = summarize(
        table[:length], jnp.asarray(table), pieces=8, word=lambda i: f"word{i}$", count=3
    )
    plots.draw_prompt(report, table[:length], drawn[1])
    words = texts_of(drawn[0][0])
    assert len(words) == length
    assert all(text.startswith(rf"word{i}\$") for i, text in enumerate(words))


def test_a_confusion_matrix_shows_its_counts(drawn):
    references = [Reference(text, (text,), i) for i, text in enumerate(["a", "a", "b"])]
    plots.draw_confusion(confusion_of(["a", "b", "b"], references, ["a", "b"]), drawn[1])
    plots.draw_confusion(confusion_of(["a", "b", "?"], references, ["a", "b"]), drawn[1])
    assert texts_of(drawn[0][0]) == ["1", "1", "0", "1"]
    assert texts_of(drawn[0][1]) == ["1", "1", "0", "0", "0", "1"]


def test_a_figure_is_a_file_and_an_unknown_format_is_one_sentence(tmp_path):
    plots.draw_curves([], "accuracy", 0.5, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="cannot be drawn as .*figure.xyz"):
        plots.draw_curves([], "accuracy", 0.5, tmp_path / "figure.xyz")
