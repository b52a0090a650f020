"""Templates and verbalizers of OpenPrompt's files."""

import json

import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.data.openprompt import label_words, read_template
from jaxprompt.data.tasks.registry import resolve_task


@pytest.fixture
def read(tmp_path):
    def read(line, columns=""):
        (tmp_path / "t.txt").write_text(f"first\n{line}\n")
        return read_template(f"openprompt:{tmp_path}/t.txt#1{columns}")

    return read


@pytest.mark.parametrize(
    "line, text",
    [
        ('{"placeholder":"text_a"} It was {"mask"}.', "{text_a} It was"),
        ('{"meta":"premise", "shortenable": True}? {"mask"}', "{premise}?"),
        ('{"soft"} {"soft"} {"placeholder": "text_a"} {"mask"}', "[prompt:2] {text_a}"),
        ('{"soft": None, "duplicate": 20}{"placeholder": "text_a"}{"mask"}', "[prompt:20]{text_a}"),
        ('{"placeholder": "text_a"} {"soft": "It was"} {"mask"}', "{text_a} [soft:It was]"),
        ("<text_a> <meta:answer> <soft> <soft> <mask>", "{text_a} {answer} [prompt:2]"),
        ('{"text": "a b"} {"placeholder": "text_a"} {"mask"}', "a b {text_a}"),
    ],
)
def test_a_template_has_this_packages_form(read, line, text):
    assert read(line) == (text, False)


def test_a_mask_within_the_text_becomes_a_sentinel(read, tmp_path):
    line = '{"mask"} news: {"placeholder":"text_a"}'
    assert read(line) == ("<extra_id_0> news: {text_a}", True)
    reference = f"openprompt:{tmp_path}/t.txt#1?text_a=text"
    task = resolve_task({"name": "t", "template": reference, "labels": ["a", "b"]})
    assert task.template == "<extra_id_0> news: {text}" and task.labels == ["a", "b"]
    assert task.verbalizer == {"a": ["<extra_id_0> a"], "b": ["<extra_id_0> b"]}
    free = resolve_task({"name": "t", "template": reference})
    assert free.target == "<extra_id_0> {label}" and free.separator == ""


def test_places_stand_for_columns(read):
    line = '{"placeholder":"text_a"} {"placeholder":"text_b"} {"mask"}'
    assert read(line, "?text_a=premise&text_b=the other").text == "{premise} {the other}"


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"placeholder": "text_a", "post_processing": lambda s: s} {"mask"}', "has code, which"),
        ('{__import__("os").system("true")} {"mask"}', "is no Python literal"),
        ('{"placeholder": "text_a"}', "has 0 masks, and one is needed"),
        ('{"mask"} {"mask"}', "has 2 masks"),
        ('{"placeholder": "text_a", "soft_id": 1} {"mask"}', "has soft_id, which has no"),
        ('{"placeholder": "text_a" {"mask"}', "brace without its partner"),
        ('{"soft": "It", "duplicate": 3} {"mask"}', "has no counterpart here"),
        ("", "has no template in line 1"),
    ],
)  # fmt: skip
def test_what_a_template_cannot_have_is_one_sentence(read, line, message):
    with pytest.raises(UserError, match=message):
        read(line)


def test_words_of_text_files_and_json(tmp_path):
    text, by_name = tmp_path / "v.txt", tmp_path / "v.json"
    text.write_text("good, great\nbad\n\nyes\nno\n")
    by_name.write_text(json.dumps([{"pos": ["good"], "neg": "bad"}]))
    assert label_words(f"openprompt:{text}") == [["good", "great"], ["bad"]]
    assert label_words(f"openprompt:{text}#1") == [["yes"], ["no"]]
    assert label_words(f"openprompt:{by_name}#0") == {"pos": ["good"], "neg": ["bad"]}
    with pytest.raises(UserError, match="has 2 verbalizers and none with number 2"):
        label_words(f"openprompt:{text}#2")
    with pytest.raises(UserError, match="write openprompt:FILE#0"):
        label_words(f"openprompt:{text}#two")
    by_name.write_text("[1")
    with pytest.raises(UserError, match="is no JSON"):
        label_words(f"openprompt:{by_name}")


def test_a_verbalizer_gives_labels_their_words(tmp_path):
    file = tmp_path / "v.txt"
    file.write_text("good, great\nbad\n")
    values = {"name": "t", "template": "{a}", "verbalizer": f"openprompt:{file}"}
    task = resolve_task(values)
    assert task.labels == ["good", "bad"] and task.label_map == {"0": "good", "1": "bad"}
    assert task.verbalizer == {"good": ["good", "great"], "bad": ["bad"]}
    named = resolve_task(values | {"labels": ["pos", "neg"], "label_map": {"p": "pos"}})
    assert named.verbalizer == {"pos": ["good", "great"], "neg": ["bad"]}
    assert named.label_map == {"p": "pos"}
    with pytest.raises(UserError, match="has words of 2 classes, and task.labels is"):
        resolve_task(values | {"labels": ["a", "b", "c"]})
