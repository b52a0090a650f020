"""What the rest may rely on from a tokenizer, and what is refused instead of made up."""

import json

import pytest
from helpers_data import make_tokenizer

from jaxprompt.config import TaskConfig, UserError
from jaxprompt.data.tasks import tokenize
from jaxprompt.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def test_special_ids_are_those_of_t5(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.special_ids == [0, 1, 2]
    assert tokenizer.piece(1) == "</s>"


def test_no_vocabulary_is_made_up_from_a_config(tmp_path):
    # transformers answers with an empty vocabulary where only a config.json is there
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    with pytest.raises(UserError, match="no tokenizer that can be read .*tokenizer.json or spiece"):
        load_tokenizer(tmp_path)


def test_a_damaged_file_is_one_sentence(folder, tmp_path):
    whole = (folder / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    with pytest.raises(UserError, match="no tokenizer that can be read") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_text_that_is_no_unicode_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"The text 'it was \\ud800' is not Unicode"):
        tokenizer.encode_all(["good", json.loads('"it was \\ud800"')])


@pytest.mark.parametrize(
    "labels, message",
    [
        (["yes", "zzz"], "Label 'zzz' has no token of this backbone; use another word"),
        (["yes", "yes "], "Labels 'yes' and 'yes ' are the same tokens to this backbone"),
    ],
)
def test_labels_that_a_backbone_cannot_say_are_refused(tokenizer, labels, message):
    task = TaskConfig(name="t", template="{text}", labels=labels)
    with pytest.raises(UserError, match=message):
        tokenize(task, [{"text": "it", "label": "yes"}], tokenizer, 2, 64)
