"""Free answers and their targets are compared as the vocabulary writes them."""

import dataclasses

import numpy as np
import pytest
from helpers_data import t5_tokenizer

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.batches import Example
from jaxprompt.data.examples import tokenize
from jaxprompt.data.references import references
from jaxprompt.data.targets import as_written, label_of, label_warnings
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.data.virtual_tokens import VirtualTokens
from jaxprompt.evaluation.metrics import measure
from jaxprompt.inference.engine import Engine
from jaxprompt.inference.predict import predict
from jaxprompt.models.injection import Injection


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return load_tokenizer(t5_tokenizer(tmp_path_factory.mktemp("t5")))


@dataclasses.dataclass
class Settings:
    eos_id: int = 1

    @property
    def config(self):
        return self

    def with_config(self, **changes):
        return dataclasses.replace(self, **changes)


def mine(**changes):
    return TaskConfig(name="t", template="{text}", **changes)


def perfect(task, rows, tokenizer):
    """The metrics of a model that writes each row's target, token by token."""
    judged = as_written(task, references(task, rows), tokenizer)
    ids = tokenizer.encode_targets([row["label"] for row in rows], task.separator)
    return measure(task, [tokenizer.decode(row) for row in ids], judged.references), judged.warnings


@pytest.mark.parametrize(
    "target", ["bread", "bread ", " is  it", "good\nbad", "good\u00a0bad", "\uff47ood", "\ufb01t"]
)
def test_a_perfect_answer_is_right_however_the_target_is_spelled(t5, target):
    task = mine(metrics=["accuracy"])
    metrics, warnings = perfect(task, [{"text": "it", "label": target}] * 2, t5)
    assert metrics == {"accuracy": 1.0}
    assert warnings == []


def test_targets_with_unknown_characters_are_told_and_equal_nothing(t5):
    rows = [{"text": "it", "label": word} for word in ("{a}", "bread", "日本")]
    metrics, [warning] = perfect(mine(), rows, t5)
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert "2 of 3 targets have characters" in warning and "'{a}'" in warning
    # one of several answers is enough
    several = mine(answers="all", metrics=["exact_match"])
    rows = [{"text": "it", "label": "{a}", "all": ["{a}", " a "]}]
    judged = as_written(several, references(several, rows), t5)
    assert judged.references[0].answers == ("{a}", "a") and judged.warnings == []


def test_targets_that_answers_are_too_short_for_are_told(t5):
    task = mine(max_target_length=8)
    rows = [{"text": "it", "label": "bread"}, {"text": "it", "label": "the roof leaks: is it"}]
    judged = as_written(task, references(task, rows), t5)
    assert judged.warnings == [
        "1 of 2 targets are longer than task.max_target_length, 8 tokens, at which answers end; "
        "raise it"
    ]


def test_labels_that_the_vocabulary_cannot_write_are_told(t5):
    assert label_warnings(mine(labels=["good", "bad"]), t5) == []
    for label in ("<b>", "{yes}", "日本", "\uff5byes\uff5d"):
        [warning] = label_warnings(mine(labels=["good", label]), t5)
        assert f"lacks characters of the labels {label!r}" in warning


def test_labels_are_told_apart_when_answers_are_written(t5, monkeypatch):
    task = mine(labels=["yes ", "{no}"], decoding="greedy", max_target_length=8)
    rows = t5.encode_targets(task.labels)
    rows += t5.encode_targets(["it"])
    written = np.array([row + [0] * (8 - len(row)) for row in rows])
    monkeypatch.setattr(Engine, "run", lambda *_, **__: written)
    asked = [Example(np.zeros(1, np.int32), np.zeros(0, np.int32))] * 3
    engine = Engine({}, Injection(), Settings())  # pyright: ignore[reportArgumentType]
    found = predict(engine, task, asked, t5, batch_size=8)
    assert found.predictions == ["yes ", "{no}", "it"]
    with pytest.raises(UserError, match="Label 'yes ' has . tokens, and task.max_target_length"):
        label_of(task.model_copy(update={"max_target_length": 1}), t5)
    same = mine(labels=["yes", "yes\u200b"], decoding="greedy")
    with pytest.raises(UserError, match="the same (text|tokens) to this backbone"):
        tokenize(same, [{"text": "it", "label": "yes"}], t5, VirtualTokens(500, 1))


def test_labels_that_differ_only_in_blanks_are_refused():
    for labels in (["yes", "yes "], [" no", "yes", "no"]):
        with pytest.raises(ValueError, match="labels are .*some different ones are needed"):
            mine(labels=labels)


def test_a_blank_at_the_end_of_a_label_is_told(t5):
    [warning] = label_warnings(mine(labels=["good ", "bad"]), t5)
    assert "the labels 'good ' end with a blank" in warning
    assert label_warnings(mine(labels=["good", " bad"]), t5) == []
