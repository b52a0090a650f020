"""Jinja templates of others: what they may do, what they draw, and what rows they leave out."""

import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import JinjaConfig
from jaxprompt.data import promptsource
from jaxprompt.data.jinja_templates import columns_of_jinja, fixed_choices, render
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.data.tasks.rules import apply_rule
from jaxprompt.data.tasks.splits import load_rows
from jaxprompt.data.templates import input_columns, to_text

CHOICES = "yes ||| no"
NLI = "{{ premise }} So {{ hypothesis }}? ||| {{ answer_choices[label] }}"
ROW = {"premise": "It rains.", "hypothesis": "it is wet", "label": 0}
FILE = """\
dataset: mine
templates:
  1-2: !Template
    id: 1-2
    name: "\\u2026so what?"
    jinja: '{{ text }} ||| {{ answer_choices[label] }}'
    answer_choices: bad ||| good
    metadata: !TemplateMetadata {metrics: [Accuracy]}
  3-4: !Template
    id: 3-4
    name: old/form
    jinja: '{{ text }} ||| {{ answer }}'
    answer_choices: [bad, good]
    metadata: !TemplateMetadata {metrics: [BLEU]}
"""


def of(text, choices=None):
    return JinjaConfig(text=text, answer_choices=choices)


def task(text=NLI, choices=CHOICES, **more):
    values = {"name": "t", "jinja": {"text": text, "answer_choices": choices}} | more
    return resolve_task(values)


def test_a_template_makes_columns_and_labels():
    nli = task()
    assert nli.labels == ["yes", "no"] and input_columns(nli) == ["premise", "hypothesis"]
    [row] = apply_rule(nli, [ROW], training=True)
    assert to_text(nli, row) == ("It rains. So it is wet?", "yes")
    around = task(template="[prompt:2] {rendered_input} [prompt]")
    assert to_text(around, row)[0].strip() == "It rains. So it is wet?"


def test_a_row_without_a_label_has_an_input():
    row = {key: value for key, value in ROW.items() if key != "label"}
    assert render(of(NLI, CHOICES), row) == ("It rains. So it is wet?", None)
    guarded = of("{{ premise }} ||| {% if label != -1 %}{{ label }}{% endif %}")
    assert render(guarded, row) == ("It rains.", None)
    assert render(guarded, ROW | {"label": -1}) == ("It rains.", None)
    with pytest.raises(UserError, match="needs the column 'hypothesis', which it lacks; it has"):
        render(of(NLI, CHOICES), {"premise": "a", "label": 0})
    with pytest.raises(UserError, match="needs the column 'a'"):
        render(of("{{ premise }} ||| x", "{{ a }} ||| b"), ROW)
    with pytest.raises(UserError, match="Row 1 of a.csv: its template makes no target"):
        apply_rule(task(), [ROW | {"label": "yes"}], training=True, origin="a.csv")


@pytest.mark.parametrize(
    "text",
    [
        "{{ premise.__class__.__mro__[1].__subclasses__() }} ||| a",
        "{{ ''.__class__ }} ||| {{ (1).__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }} ||| a",
        "{% include '/etc/passwd' %} ||| a",
        "{{ premise | choice | choice(1) }} ||| a",
        "{{ 1 // 0 }} ||| a",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }} ||| a",
        "{% for i in range(100001) %}{% endfor %} ||| a",
        "{{ 'x' * 3000000 }} ||| a",
    ],
)
def test_a_template_reaches_nothing_but_its_row(text):
    with pytest.raises(UserError, match="its template cannot be filled"):
        render(of(text), ROW)


def test_what_is_no_jinja_is_one_sentence():
    with pytest.raises(UserError, match="cannot be read .*; mend it"):
        task("{{ premise ||| a")
    with pytest.raises(UserError, match="No filter named 'shout'"):
        task("{{ premise | shout }} ||| a")


def test_draws_are_a_function_of_the_row():
    drawn = of("{{ premise }} {{ ['a', 'b', 'c', 'd'] | choice }} ||| {{ answers | random }}")
    rows = [{"premise": str(i), "answers": ["x", "y"], "label": 0} for i in range(40)]
    texts = [render(drawn, row) for row in rows]
    assert texts == [render(drawn, dict(reversed(row.items())) | {"label": 1}) for row in rows]
    assert len({text.input[-1] for text in texts}) == 4  # type: ignore[union-attr]
    assert len({text.target for text in texts}) == 2  # type: ignore[union-attr]
    unlabelled = [{key: row[key] for key in ("premise",)} for row in rows]
    for row, text in zip(unlabelled, texts, strict=True):
        assert render(drawn, row).input == text.input  # type: ignore[union-attr]


def test_a_separator_in_a_row_is_text():
    row = {"premise": "a ||| b", "hypothesis": "c", "label": 1}
    assert render(of(NLI, CHOICES), row) == ("a ||| b So c?", "no")
    listed = of("{{ parts | join(',') }} ||| {{ n }}")
    assert render(listed, {"parts": ["a|||b"], "n": np.int64(3)}) == ("a|||b", "3")


def test_rows_without_texts_are_left_out_with_a_warning():
    some = task("{% if label == 0 %}{{ premise }} ||| yes{% endif %}", None)
    with pytest.warns(UserWarning, match="no text for 1 of the 2 rows of a.csv; they are left out"):
        rows = apply_rule(some, [ROW, ROW | {"label": 1}], training=True, origin="a.csv")
    assert len(rows) == 1
    with pytest.raises(UserError, match=r"with \|\|\| between them, of none of the 1 rows"):
        apply_rule(some, [ROW | {"label": 1}], training=False)
    with pytest.raises(UserError, match="of none of the 1 rows"):
        apply_rule(task("{{ premise }} ||| a ||| b", None), [ROW], training=False)


def test_columns_and_fixed_answers():
    assert columns_of_jinja(of(NLI, CHOICES)) == ["premise", "hypothesis"]
    assert columns_of_jinja(of(NLI, CHOICES), all_of_them=True)[-1] == "label"
    assert columns_of_jinja(of("{{ range(2) | list }}{{ q }} ||| a", "{{ c }} ||| d")) == ["c", "q"]
    assert fixed_choices("{{ c }} ||| d") is None and fixed_choices(" a |||b ") == ["a", "b"]
    assert task(choices="same ||| same").labels is None


def test_rows_of_a_file_are_rendered(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("premise,hypothesis,label\nIt rains.,it is wet,1\n")
    counted = task("{{ premise }} {{ hypothesis }} ||| {{ answer_choices[label | int] }}",
                   train=str(file))  # fmt: skip
    [row] = load_rows(counted, "train")
    assert to_text(counted, row) == ("It rains. it is wet", "no")


def test_promptsources_files_are_read_as_they_are(tmp_path):
    folder = tmp_path / "promptsource" / "templates" / "mine"
    folder.mkdir(parents=True)
    (folder / "templates.yaml").write_text(FILE)
    read = lambda name, place=tmp_path: promptsource.task_values(f"promptsource:{place}#{name}")
    assert read("mine/...So what") == read("1-2", folder / "templates.yaml")
    assert read("mine/...So what")["labels"] == ["bad", "good"]
    old = read("old/form", folder)
    assert old["labels"] == ["bad", "good"] and old["metrics"] == ["bleu"]
    for name, message in {
        "mine/other": "has no template 'other'; it has 2, such as",
        "none/other": "has no templates of the data set of 'none/other'",
    }.items():
        with pytest.raises(UserError, match=message):
            read(name)
    with pytest.raises(UserError, match="write promptsource:PATH#super_glue/rte/GPT-3 style"):
        promptsource.task_values("promptsource:x")
    with pytest.raises(UserError, match="There is no file or folder"):
        read("a", tmp_path / "none")


@pytest.mark.parametrize(
    "text",
    [
        "templates: !!python/object/apply:os.system ['true']",
        "templates: {a: !Other {name: b}}",
        "templates: {a: !Template [1]}",
        "templates: {a: !Template {name: b}}",
        "templates: {}",
        "- a",
        "a: [",
    ],
)
def test_other_yaml_is_refused(tmp_path, text):
    (tmp_path / "templates.yaml").write_text(text)
    with pytest.raises(UserError, match="is no file of PromptSource templates|has no 'name'"):
        promptsource.task_values(f"promptsource:{tmp_path}#b")


def test_a_list_of_forms_names_no_files():
    with pytest.raises(UserError, match="only task.template may name a file of others"):
        resolve_task({"name": "t", "template": "{a}", "templates": ["promptsource:a#b"]})
