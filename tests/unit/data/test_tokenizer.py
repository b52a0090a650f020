"""What the rest may rely on from a tokenizer, and what is refused instead of made up."""

import json

import pytest
from helpers_data import make_tokenizer, sentencepiece_model

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.examples import tokenize
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.data.virtual_tokens import VirtualTokens


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
        (["no no", "no  no"], "Labels 'no no' and 'no  no' are the same tokens to this backbone"),
    ],
)
def test_labels_that_a_backbone_cannot_say_are_refused(tokenizer, labels, message):
    task = TaskConfig(name="t", template="{text}", labels=labels)
    with pytest.raises(UserError, match=message):
        tokenize(task, [{"text": "it", "label": "yes"}], tokenizer, VirtualTokens(64, 2))


def test_a_folder_without_a_config_says_what_is_missing(tmp_path):
    sentencepiece_model(tmp_path)
    with pytest.raises(UserError, match="put the model's config.json or tokenizer_config.json"):
        load_tokenizer(tmp_path)


def test_code_of_a_folder_is_never_run(folder, tmp_path, monkeypatch):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    names = {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Words", "own.Words"]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": names}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": names}))
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Words: ...\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked"))
    with pytest.raises(UserError, match="no tokenizer .*needs code of its own, which is not run"):
        load_tokenizer(tmp_path)
    assert not ran.exists()


def test_a_vocabulary_without_an_unknown_piece_names_the_text(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    saved = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {("[UNK]" if k == "<unk>" else k): i for k, i in saved["model"]["vocab"].items()}
    saved["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<none>"}
    saved["added_tokens"] = [t for t in saved["added_tokens"] if t["content"] != "<unk>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_all(["it was", "one"]) == [[9, 10], [17]]
    with pytest.raises(UserError, match="cannot read the text 'it is' .*without an unknown piece"):
        tokenizer.encode_all(["it was", "it is"])
