"""Other words around a prompt's vectors, and the config that keeps them."""

import numpy as np
import pytest
from helpers_data import make_tokenizer

from jaxprompt.config import yaml12
from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.inference.rank import rank_program
from jaxprompt.inference.wording import Wording, kept_config, probabilities, reworded, row_of

TASK = TaskConfig(
    name="mine", template="{text}", labels=["a", "b"], label_map={"0": "a", "1": "b"},
    verbalizer={"a": ["c"]}, truncate="text",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = ["a", "b", "c", "d", "e", "It", "was", "text"]
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("words"), words))


def test_labels_take_the_places_of_as_many_old_ones(tokenizer):
    new = reworded(TASK, Wording(labels=["d", "e"]), tokenizer, 4)
    assert (new.labels, new.verbalizer) == (["d", "e"], None)
    assert new.label_map == {"0": "d", "1": "e", "a": "d", "b": "e"}


def test_other_labels_have_no_old_ones_to_take_the_place_of(tokenizer):
    new = reworded(TASK, Wording(labels=["c", "d", "e"]), tokenizer, 4)
    assert (new.labels, new.label_map) == (["c", "d", "e"], None)


def test_without_other_words_a_task_is_the_same(tokenizer):
    assert reworded(TASK, Wording("{text}", ["a", "b"]), tokenizer, 4) is TASK


def test_columns_that_a_template_no_longer_has_are_not_cut(tokenizer):
    new = reworded(TASK, Wording("[prompt] {other} [soft:It was]"), tokenizer, 4)
    assert new.truncate is None


@pytest.mark.parametrize(
    ("wording", "sentence"),
    [
        (Wording("[soft:It was] {text}"), "places 2 virtual tokens and the prompt has 4"),
        (Wording("no column"), "names no column"),
        (Wording("{text} }"), "brace without its partner"),
        (Wording("openprompt:/etc/passwd#0 {text}"), "names a file"),
        (Wording("promptsource:/etc/passwd#x {text}"), "names a file"),
        (Wording("{text}" + "x" * 2000), "at most 2,000"),
        (Wording(labels=["a"]), "give 2 to 64"),
        (Wording(labels=["a", "a"]), "some different ones are needed"),
        (Wording(labels=["a", " "]), "is blank"),
        (Wording(labels=["a", "b" * 201]), "at most 200"),
        (Wording(labels=[str(n) for n in range(65)]), "give 2 to 64"),
        (Wording(labels=["a " * 100, "b " * 100, "c " * 60]), "263 tokens together"),
        (Wording(labels=["zebra", "horse"]), "has no token of this backbone"),
    ],
)
def test_words_that_cannot_be_used_are_one_sentence(tokenizer, wording, sentence):
    with pytest.raises(UserError, match=sentence):
        reworded(TASK, wording, tokenizer, 4)


def test_probabilities_add_up_and_survive_large_scores():
    found = probabilities(np.array([[-1000.0, -1001.0], [0.0, -np.log(3.0)]], np.float32))
    np.testing.assert_allclose(found, [[0.731059, 0.268941], [0.75, 0.25]], rtol=1e-5)


def test_labels_of_one_room_have_trees_of_one_shape(tokenizer):
    shapes = set()
    for labels in (["a", "b"], ["c d", "c e", "b"], list("abcde")):
        (trees,) = rank_program(labels, tokenizer, room=16).operands
        shapes.add((trees.tokens.shape, trees.trees.ids.shape))
    assert shapes == {((8, 4), (1, 16))}


def test_a_kept_config_has_the_words_and_the_settings_of_the_run():
    new = resolve_task("supersense").model_copy(update={"template": "It was {gloss}"})
    run = parse(RunConfig, {"task": "supersense", "output": "old", "train": {"steps": 7},
                            "prompt": {"length": 4, "population": {"seed": [0, 1]}}})  # fmt: skip
    metadata = {"method": "prompt-tuning", "length": 4, "config": run.model_dump()}
    values = yaml12.load(kept_config(metadata, new, "runs/new", "old/prompt"))
    assert values == {
        "backbone": "builtin", "method": "prompt-tuning",
        "task": {"name": "supersense", "template": "It was {gloss}"}, "output": "runs/new",
        "prompt": {"length": 4, "init": "file", "file": "old/prompt"}, "train": {"steps": 7},
    }  # fmt: skip
    assert resolve_task(parse(RunConfig, values).task) == new


def test_a_prompt_without_a_recorded_run_is_kept_by_its_backbone_and_task(tokenizer):
    new = reworded(TASK, Wording(labels=["d", "e"]), tokenizer, 4)
    metadata = {"backbone": {"source": "smollm2"}, "length": 4}
    values = yaml12.load(kept_config(metadata, new, "runs/new"))
    assert values["backbone"] == "smollm2" and "file" not in values.get("prompt", {})
    assert resolve_task(values["task"]) == new


def test_a_line_is_a_text_or_an_object_with_the_columns():
    assert row_of(TASK, "hello") == {"text": "hello"}
    assert row_of(TASK, "{not JSON") == {"text": "{not JSON"}
    two = TASK.model_copy(update={"template": "{a} {b}"})
    assert row_of(two, '{"a": "x", "b": "y"}') == {"a": "x", "b": "y"}
    with pytest.raises(UserError, match="the columns a, b"):
        row_of(two, "hello")
