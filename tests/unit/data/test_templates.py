"""From rows to text: fields, braces, places of virtual tokens, labels."""

import datetime
import decimal

import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.templates import (
    Piece,
    fill,
    place_prompt,
    split_template,
    start_words,
    to_text,
    with_counts,
)


def task(**changes):
    values = {"name": "t", "template": "question: {text}", "target": "{label}"} | changes
    return TaskConfig(**values)


@pytest.mark.parametrize(
    "template, text",
    [
        ("question: {text}", "question: a {b} [prompt]"),
        ("{text}{n}", "a {b} [prompt]3"),
        ("{{{text}}} {{n}}", "{a {b} [prompt]} {n}"),
        ("{{}} {n}", "{} 3"),
        ("{a column} {x.y} {flag}", "spaces dots True"),
        ("[prompt:3]{n} [prompt] {n}", "3  3"),
    ],
)
def test_fields_braces_and_markers(template, text):
    # values are never read as templates themselves
    row = {"text": "a {b} [prompt]", "n": 3, "a column": "spaces", "x.y": "dots", "flag": True,
           "label": "yes"}  # fmt: skip
    assert to_text(task(template=template), row) == (text, "yes")


def test_missing_column_names_it_those_there_are_and_the_row():
    with pytest.raises(UserError, match="needs column 'text', which row 3 of a.csv lacks; it has"):
        fill("question: {text}", {"txt": "a", "label": "b"}, "row 3 of a.csv")
    with pytest.raises(UserError, match="it has 'txt', 'label'"):
        fill("question: {text}", {"txt": "a", "label": "b"})
    with pytest.raises(UserError, match="no columns"):
        fill("{text}", {})
    with pytest.raises(UserError, match="it has 'text;label'; they look separated by ';'"):
        fill("{text}", {"text;label": "a;b"})


def test_null_is_not_the_word_none():
    with pytest.raises(UserError, match=r"'text' is empty \(null\) in row 1 of a.jsonl"):
        fill("{text}", {"text": None}, "row 1 of a.jsonl")
    assert fill("{text}", {"text": ""}) == ""


@pytest.mark.parametrize("template", ["{text", "text}", "{a{text}", "{{text}", "{text}}"])
def test_a_single_brace_is_an_error(template):
    with pytest.raises(UserError, match="brace without its partner"):
        place_prompt(template, 4)
    with pytest.raises(UserError, match="brace without its partner"):
        to_text(task(target=template), {"text": "a", "label": "b", "a": "c"})


@pytest.mark.parametrize(
    "template, pieces",
    [
        ("a {x}", [Piece("", 8), Piece("a {x}", 0)]),
        ("[prompt] {x}", [Piece("", 8), Piece(" {x}", 0)]),
        ("{x}[prompt]", [Piece("{x}", 0), Piece("", 8)]),
        ("[prompt:8]{x}", [Piece("", 8), Piece("{x}", 0)]),
        (
            "[prompt:3]{x} It was [prompt]",
            [Piece("", 3), Piece("{x} It was ", 0), Piece("", 5)],
        ),
        ("[prompt:6]{x}[prompt][prompt:2]", [Piece("", 6), Piece("{x}", 0), Piece("", 2)]),
    ],
)
def test_places_of_virtual_tokens_add_up_to_the_prompt(template, pieces):
    placed = place_prompt(template, 8)
    assert list(placed) == pieces
    assert sum(piece.virtual for piece in placed) == 8


@pytest.mark.parametrize("template", ["a {x}", "[prompt:3]a {x}[prompt:5]"])
def test_length_zero_leaves_the_text_alone(template):
    assert place_prompt(template, 0) == (Piece("a {x}", 0),)


@pytest.mark.parametrize(
    "template, message",
    [
        ("[prompt:3]{x}[prompt:4]", "places 7 virtual tokens and the prompt has 8; set prompt.len"),
        ("[prompt:9]{x}", "places 9 virtual tokens"),
        ("[prompt:9]{x}[prompt]", "places 9 virtual tokens"),
        ("[prompt]{x}[prompt]", "more than one bare"),
        ("[prompt:-1]{x}", r"has '\[prompt:-1\]'; write"),
        ("[prompt: 8]{x}", r"has '\[prompt: 8\]'; write"),
        ("[prompt 8]{x}", r"has '\[prompt 8\]'; write"),
    ],
)
def test_markers_that_do_not_fit(template, message):
    with pytest.raises(UserError, match=message):
        place_prompt(template, 8)


def test_other_brackets_are_text():
    assert place_prompt("[prompts] [x] {x}", 2)[1].text == "[prompts] [x] {x}"


@pytest.mark.parametrize("raw", [1, True, "1", "True"])
def test_label_map_takes_numbers_booleans_and_the_words_themselves(raw):
    boolean = task(labels=["False", "True"], label_map={"0": "False", "1": "True"})
    assert to_text(boolean, {"text": "a", "label": raw})[1] == "True"


def test_label_outside_the_set_names_value_set_and_row():
    limited = task(labels=["no", "yes"], label_map={"0": "no", "1": "yes"})
    with pytest.raises(UserError, match="row has the label 'maybe'; allowed are 'no', 'yes', '0'"):
        to_text(limited, {"text": "a", "label": "maybe"})
    with pytest.raises(UserError, match="has the label '-1'"):
        to_text(limited, {"text": "a", "label": -1})
    assert to_text(task(), {"text": "a", "label": "anything"})[1] == "anything"


@pytest.mark.parametrize(
    "value, text",
    [
        (True, "True"), (np.bool_(False), "False"), (3, "3"), (np.int64(3), "3"),
        (10**20, "1" + "0" * 20),
        (1.0, "1.0"), (0.1, "0.1"), (np.float32(0.1), "0.1"), (np.array(2.5), "2.5"),
        (decimal.Decimal("1E+3"), "1000"), (decimal.Decimal("1.50"), "1.50"),
        (datetime.date(2024, 1, 2), "2024-01-02"), (datetime.time(1, 2), "01:02:00"),
        ("café".encode(), "café"), (np.bytes_(b"x"), "x"), (np.str_("x"), "x"), ("", ""),
    ],
)  # fmt: skip
def test_values_with_one_text(value, text):
    assert fill("<{a}>", {"a": value}) == f"<{text}>"


@pytest.mark.parametrize(
    "value, message",
    [
        (None, r"is empty \(null\)"),
        (float("nan"), r"is empty \(null\)"),
        (np.float32("nan"), r"is empty \(null\)"),
        (np.datetime64("NaT", "ns"), r"is empty \(null\)"),
        (float("inf"), "is inf in"),
        (np.float32("-inf"), "is -inf in"),
        (b"\xff", "holds bytes in row 1 of a.jsonl that are not UTF-8"),
        ("x\ud800", "holds half of a surrogate pair"),
        (["a"], r"is \['a'\] in"),
        ([], r"is \[\] in"),
        ({"text": "a"}, "is {'text': 'a'} in"),
        (("a",), "a template wants text"),
        (np.array(["a"]), "a template wants text"),
        ({"a"}, "a template wants text"),
        (object(), "a template wants text"),
        ([["x" * 1000] * 1000] * 1000, "a template wants text"),
    ],
)
def test_values_without_one_text_are_refused_with_row_and_column(value, message):
    for template in ("x {a}", "{a}"):
        with pytest.raises(UserError, match=f"Column 'a' .*{message}|Column 'a' {message}") as at:
            fill(template, {"a": value}, "row 1 of a.jsonl")
        assert "row 1 of a.jsonl" in str(at.value) and len(str(at.value)) < 700


@pytest.mark.no_type_check
def test_a_row_that_is_text_is_told():
    with pytest.raises(UserError, match=r"maps columns to values, as {'text': ...}.* is 'Who am I"):
        fill("{text}", "Who am I?")


def test_a_number_that_is_no_label_names_label_map():
    with pytest.raises(UserError, match="the label '1'; .*task.label_map .* {'1': 'bad'}"):
        to_text(task(labels=["bad", "good"]), {"text": "a", "label": 1})
    with pytest.raises(UserError) as caught:
        to_text(task(labels=["bad", "good"]), {"text": "a", "label": "x" * 10**6})
    assert "label_map" not in str(caught.value) and len(str(caught.value)) < 700


def test_markers_with_endless_digits_and_templates_without_end():
    with pytest.raises(UserError, match=r"write \[prompt\] or \[prompt:10\]") as caught:
        split_template("[prompt:" + "9" * 5000 + "] {a}")
    assert len(str(caught.value)) < 1000
    with pytest.raises(UserError, match=r"'c0', .*\(100000 in all\)"):
        fill("{text}", {f"c{i}": 1 for i in range(100_000)})


def test_vectors_that_start_from_words_are_counted_and_placed():
    counted = with_counts("{x} [soft:It was] [prompt:3=so to say] [prompt:1]", str.split)
    assert counted == "{x} [prompt:2=It was] [prompt:3=so to say] [prompt:1]"
    assert start_words(counted, 6) == [(0, 2, "It was"), (2, 3, "so to say")]
    assert to_text(task(template=counted), {"x": "a", "label": "b"}) == ("a   ", "b")
    assert to_text(task(template="{x}[soft: It was]"), {"x": "a", "label": "b"}) == ("a", "b")
    with pytest.raises(UserError, match="places 6 virtual tokens and the prompt has 100"):
        place_prompt(counted, 100)
    with pytest.raises(UserError, match=r"write \[prompt:n=...\] with their number n"):
        place_prompt("{x} [soft:It was]", 2)
    with pytest.raises(UserError, match="which has no token of this backbone"):
        with_counts("{x} [soft:It was]", lambda text: [])


@pytest.mark.parametrize(
    "marker", ["[soft:]", "[soft: ]", "[soft:{x}]", "[prompt:=a]", "[prompt:2=]"]
)
def test_words_to_start_from_are_words(marker):
    with pytest.raises(UserError, match=r"or with words to start from \[soft:It was\]"):
        place_prompt(f"{{x}} {marker}", 2)
