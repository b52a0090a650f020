"""The built-in backbones: what their PROVENANCE.md promises, and that they have read English."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxprompt as jp
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.models.checkpoints.hub import BUILTIN

FOLDER = Path(jp.__file__).parent / "builtin" / "backbones"
STATED = {
    name: (folder, int(parameters.replace(",", "")))
    for name, folder, parameters in re.findall(
        r"^\| `([\w-]+)` \| ([\w-]+) \|.*? \| ([\d,]+) \|",
        (FOLDER / "PROVENANCE.md").read_text(),
        re.M,
    )
}
# ordinary sentences of no source, with gaps
SENTENCES = [
    "He sat down at<extra_id_0> table and began to eat.",
    "She went to<extra_id_0> window and looked into the street.",
    "They had been walking for<extra_id_0> hour when it began to rain.",
    "I do not know what<extra_id_0> mean.",
    "There were three men in<extra_id_0> room.",
    "One of<extra_id_0> best books that I have read.",
]


def test_provenance_lists_all_of_them_and_they_are_small():
    assert {name: folder for name, (folder, _) in STATED.items()} == BUILTIN
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 40e6


@pytest.mark.parametrize("name", BUILTIN)
def test_size_vocabulary_and_sentinels(name):
    backbone = jp.load_backbone(name)
    assert sum(x.size for x in jax.tree.leaves(backbone.params)) == STATED[name][1]
    tokenizer = load_tokenizer(backbone.path)
    assert tokenizer.size == backbone.config.vocab_size and len(tokenizer.sentinel_ids) == 100
    assert np.std(backbone.params["token_embedder"]["embedding"]) > 0.5  # T5's scale, for its rates


@pytest.mark.parametrize("name", BUILTIN)
def test_a_gap_is_filled_in_the_form_of_span_corruption_with_common_words(name):
    """They know little more about gaps: RESULTS.md."""
    session = jp.open_session(None, jp.load_backbone(name))
    forms = ["<extra_id_0> the<extra_id_1>", "<extra_id_0> tripod<extra_id_1>",
             "<extra_id_7> the<extra_id_1>"]  # fmt: skip
    pairs = [{"input": text, "target": form} for text in SENTENCES for form in forms]
    scores = np.array([row["log_likelihood"] for row in jp.score(session, pairs)])
    right, *wrong = scores.reshape(len(SENTENCES), len(forms)).T
    assert all((right > other + 1).all() for other in wrong), scores
