"""Rows that are longer than a task allows: what is cut, what is told, which column goes first."""

import pytest
from helpers_data import make_tokenizer

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.examples import tokenize
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.data.templates import Piece, columns_of, places_of
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.data.truncation import Truncation, of_task
from jaxprompt.data.virtual_tokens import VirtualTokens

V, P = 64, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def task(**changes):
    values = {"name": "t", "template": "passage : {a} question : {b}", "max_input_length": 12}
    return TaskConfig(**(values | changes))


def cut(task, rows, tokenizer):
    """The texts of the rows as ids without EOS and virtual tokens, and what was cut."""
    heard = []
    examples = tokenize(
        task, rows, tokenizer, VirtualTokens(V, P), need_targets=False, note=heard.append
    )
    found = [example.inputs[example.inputs < V] for example in examples]
    assert all(ids[-1] == tokenizer.eos_id and len(ids) <= task.max_input_length for ids in found)
    assert all((example.inputs >= V).sum() == P for example in examples)
    [truncation] = heard
    return [ids[:-1].tolist() for ids in found], truncation


def row(a, b):
    return {"a": " ".join(["one"] * a), "b": " ".join(["two"] * b)}


def test_rows_that_are_cut_are_counted_and_columns_that_are_lost_named(tokenizer):
    # 11 tokens and EOS: two for each name of a column
    rows = [row(3, 4), row(3, 5), row(6, 1), row(7, 1), row(8, 9), row(40, 2), row(0, 30)]
    texts, truncation = cut(task(), rows, tokenizer)
    # of the fourth row the names of both columns are left, and of the fifth only one mark
    assert truncation == Truncation(7, 5, {"b": 3})
    whole = [tokenizer.encode(f"passage : {r['a']} question : {r['b']}") for r in rows]
    assert texts == [ids[:11] for ids in whole]
    sentence = of_task(truncation, task(), "training rows")
    assert sentence == (
        "5 of 7 training rows are longer than task.max_input_length, 12 tokens, and are cut; in 3 "
        "of them nothing is left of 'b'; raise it, or name in task.truncate what may be "
        "cut before the rest"
    )
    assert cut(task(), rows[:1], tokenizer)[1] == Truncation(1, 0, {})
    assert cut(task(), [], tokenizer)[1] == Truncation(0, 0, {})
    assert of_task(Truncation(7, 0, {}), task()) is None


def test_a_column_that_was_blank_is_not_lost(tokenizer):
    assert cut(task(), [row(40, 0)], tokenizer)[1] == Truncation(1, 1, {})
    # and one that stands twice is lost where both places are
    twice = task(template="{b} {a} {b}")
    assert cut(twice, [row(40, 2)], tokenizer)[1] == Truncation(1, 1, {})
    twice = task(template="{a} {b} {b}")
    assert cut(twice, [row(40, 2), row(10, 2)], tokenizer)[1] == Truncation(2, 2, {"b": 1})


@pytest.mark.parametrize(
    "template", ["passage : {a} question : {b}", "{a} [prompt:1] {b} it [prompt]"]
)
@pytest.mark.parametrize("columns", ["a", ["a"], ["a", "b"], ["b", "a"]])
def test_a_column_that_may_be_cut_makes_room_for_the_others(tokenizer, template, columns):
    rows = [row(a, b) for a in (0, 1, 5, 30, 300) for b in (0, 1, 4, 7, 30)]
    given = task(template=template, truncate=columns)
    texts, truncation = cut(given, rows, tokenizer)
    order = [columns] if isinstance(columns, str) else columns
    names = len(tokenizer.encode(template.replace("[prompt:1]", "").replace("[prompt]", "")
                                 .replace("{a}", "").replace("{b}", "")))  # fmt: skip
    one, two = tokenizer.encode("one two")
    lost = {}
    for ids, values in zip(texts, rows, strict=True):
        counts = {name: len(values[name].split()) for name in "ab"}
        left = dict(counts)
        for name in order:  # by hand: words are tokens
            over = max(sum(left.values()) + names - 11, 0)
            left[name] -= min(over, left[name])
        if order == ["a"]:  # and then the end goes, where another word of the template may stand
            over = sum(left.values()) + names - 11 - template.count(" it")
            left["b"] -= min(max(over, 0), left["b"])
        assert (ids.count(one), ids.count(two)) == (left["a"], left["b"])
        for name in "ab":
            lost[name] = lost.get(name, 0) + bool(counts[name] and not left[name])
    assert truncation.lost == {name: count for name, count in lost.items() if count}
    assert truncation.cut == sum(
        len(r["a"].split()) + len(r["b"].split()) + names > 11 for r in rows
    )
    assert "task.truncate" not in str(of_task(truncation, given))


def test_values_are_cut_as_text_of_any_kind(tokenizer):
    """Numbers are cut as they are written, and a row keeps what other columns say."""
    given = task(template="{a} question : {b}", truncate="a", max_input_length=5)
    texts, truncation = cut(given, [{"a": 12345, "b": "two"}, {"a": "one " * 9, "b": 7}], tokenizer)
    assert truncation.cut == 1 and truncation.lost == {}
    assert texts[1][0] == tokenizer.encode("one")[0] and len(texts[1]) == 4


def test_columns_of_templates():
    assert columns_of("{{x}} {a} {the b} [prompt] {a}") == ["a", "the b"]
    assert places_of([Piece("a: {x} b: {y}", 0), Piece("", 3), Piece(" {x}", 0)]) == [
        ("x", [Piece("a:", 0)]), ("y", [Piece("a: {x} b:", 0)]), ("x", [Piece("a: {x} b: {y}", 0)]),
    ]  # fmt: skip


def test_a_column_that_the_template_lacks_is_refused(tokenizer):
    values = {"name": "t", "template": "{a} {the b}"}
    for wrong in ("c", ["a", "c"], ["the"]):
        with pytest.raises(UserError, match="task.truncate names .* has 'a', 'the b'"):
            resolve_task(values | {"truncate": wrong})
    assert resolve_task(values | {"truncate": ["the b", "a"]}).truncate == ["the b", "a"]
    with pytest.raises(UserError, match="'task.truncate' is 3"):
        resolve_task(values | {"truncate": 3})
