"""From rows to text: fields, braces, places of virtual tokens, labels."""

import pytest

from jaxprompt.config import TaskConfig, UserError
from jaxprompt.data.templates import Piece, fill, place_prompt, to_text


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
