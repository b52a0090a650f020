"""``jaxprompt init``: what is guessed from the rows of a file, what is refused, and the splits."""

import csv
import json
from pathlib import Path

import pytest

from jaxprompt.cli.first_config import (
    Columns,
    InitRequest,
    draft_config,
    guess_columns,
    split_rows,
    write,
)
from jaxprompt.config.errors import UserError
from jaxprompt.config.overrides import load_config
from jaxprompt.data.references import references
from jaxprompt.data.sources import read_rows
from jaxprompt.data.tasks.registry import resolve_task

WORDS = ("red", "green", "blue")


def rows_of(count: int = 60, **more: object) -> list[dict]:
    """Texts of three kinds; each has its label's number."""
    return [
        {
            "text": f"sentence number {i} is about the colour of a thing",
            "label": WORDS[i % 3],
            **{key: value(i) if callable(value) else value for key, value in more.items()},
        }
        for i in range(count)
    ]


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def made(tmp_path: Path, rows: list[dict], **asked):
    data = write_csv(tmp_path / "data.csv", rows)
    draft_ = draft_config(InitRequest(data, tmp_path / "my.yaml", **asked))
    write(draft_, tmp_path / "my.yaml")
    return draft_, load_config(tmp_path / "my.yaml")


def test_a_file_becomes_a_config_whose_splits_can_be_read_and_judged(tmp_path):
    draft_, run = made(tmp_path, rows_of(id=lambda i: f"a{i}"))
    task = resolve_task(run.task)
    assert task.template == "{text}" and task.target == "{label}"
    assert set(task.labels or ()) == set(WORDS) and task.label_map is None
    for name in ("train", "validation", "test"):
        rows = read_rows(None, getattr(task, name))
        assert len(references(task, rows)) == draft_.rows[name] > 0
    assert run.prompt.length == 100 and run.train.schedule == "linear"
    recipe = load_config("own_data")  # what a person writes who copies a config
    assert run.prompt == recipe.prompt and run.train == recipe.train


def test_splits_are_disjoint_whole_and_the_same_whatever_the_order_of_rows():
    rows = rows_of(90) + rows_of(90)  # every text twice
    columns = Columns(["text"], "label", [])
    parts = split_rows(rows, columns, ["train", "validation", "test"], "it")
    texts = {name: {row["text"] for row in some} for name, some in parts.items()}
    assert sum(map(len, parts.values())) == 180 and sum(map(len, texts.values())) == 90
    assert all({row["label"] for row in some} == set(WORDS) for some in parts.values())
    again = split_rows(rows[::-1], columns, ["train", "validation", "test"], "it")
    assert {n: {r["text"] for r in some} for n, some in again.items()} == texts


def test_numbers_get_words_that_a_person_can_replace(tmp_path):
    rows = [row | {"label": i % 2} for i, row in enumerate(rows_of())]
    draft_, run = made(tmp_path, rows)
    task = resolve_task(run.task)
    assert task.label_map == {"0": "zero", "1": "one"} and task.labels == ["zero", "one"]
    assert any("replace the words in labels and label_map" in reason for reason in draft_.reasons)


def test_a_column_of_words_is_taken_before_the_one_with_their_numbers():
    rows = [row | {"label": i % 3, "label_text": WORDS[i % 3]} for i, row in enumerate(rows_of())]
    assert guess_columns(rows, "it").label == "label_text"


def test_files_that_are_named_are_used_as_they_are(tmp_path):
    more = write_csv(tmp_path / "dev.csv", rows_of(12))
    draft_, run = made(tmp_path, rows_of(), validation=more)
    assert not draft_.files.to_write and run.task["validation"] == str(more)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.csv", "dev.csv", "my.yaml"]


def test_several_columns_of_text_are_all_in_the_template(tmp_path):
    _, run = made(tmp_path, rows_of(title=lambda i: f"a title of thing {i}"))
    assert run.task["template"] == "text: {text} title: {title}"


def test_a_column_of_free_text_is_generated(tmp_path):
    rows = [row | {"summary": f"thing {i}"} for i, row in enumerate(rows_of(300))]
    draft_, run = made(tmp_path, rows, text=["text"], label="summary")
    assert "labels" not in run.task and run.prompt.init == "sampled_vocabulary"
    assert any("answers are written freely" in reason for reason in draft_.reasons)


def test_what_a_yaml_file_would_read_otherwise_is_quoted(tmp_path):
    odd = ("null", "1e3", "a: b # c", 'say "x"')
    rows = [row | {"label": odd[i % 4]} for i, row in enumerate(rows_of())]
    _, run = made(tmp_path, rows)
    assert set(run.task["labels"]) == set(odd)


@pytest.mark.parametrize(
    ("change", "asked", "words"),
    [
        ({}, {"label": "lable"}, "has no column 'lable'; it has 'text', 'label'"),
        ({"label": lambda i: f"w{i}"}, {}, "no column that looks like a label"),
        ({"label": "same"}, {"label": "label"}, "has the value 'same' in every row"),
        ({"class": lambda i: WORDS[i % 2]}, {}, "several columns that may be the label"),
        ({}, {"text": ["label"], "label": "label"}, "cannot be both text and label"),
        ({"text": lambda i: i}, {}, "no column of text beside the label 'label'"),
    ],
)  # fmt: skip
def test_what_cannot_be_guessed_is_refused_in_one_sentence(tmp_path, change, asked, words):
    data = write_csv(tmp_path / "data.csv", rows_of(**change))
    with pytest.raises(UserError) as error:
        draft_config(InitRequest(data, tmp_path / "my.yaml", **asked))
    assert words in str(error.value) and str(error.value).endswith(".")


def test_a_row_without_a_label_and_a_file_of_few_rows_are_refused(tmp_path):
    data = tmp_path / "data.jsonl"
    rows = rows_of()
    rows[7]["label"] = None
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="is empty in 1 of 60 rows, first in row 8"):
        draft_config(InitRequest(data, tmp_path / "my.yaml"))
    write_csv(tmp_path / "few.csv", rows_of(6))
    with pytest.raises(UserError, match="has 6 rows, too few to cut validation rows off"):
        draft_config(InitRequest(tmp_path / "few.csv", tmp_path / "my.yaml"))


def test_nothing_that_is_there_is_overwritten_unless_asked(tmp_path):
    draft_, _ = made(tmp_path, rows_of())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="already; name another --output"):
        write(draft_, tmp_path / "my.yaml")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    write(draft_, tmp_path / "my.yaml", force=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_column_with_empty_cells_is_no_text_unless_it_is_the_only_one(tmp_path):
    rows = rows_of(60, subject=lambda i: "" if i == 7 else f"a subject of number {i}")
    draft_, run = made(tmp_path, rows)
    assert resolve_task(run.task).template == "{text}"
    assert any("'subject', because 1 of its cells are empty" in text for text in draft_.reasons)
    data = tmp_path / "data.csv"
    with pytest.raises(UserError, match="'subject' of .* is empty in 1 of 60 rows, first in row 8"):
        draft_config(InitRequest(data, tmp_path / "other.yaml", text=["subject"]))


def test_a_file_with_another_separator_is_told_so(tmp_path):
    data = tmp_path / "data.csv"
    rows = [f"sentence number {i};{WORDS[i % 3]}" for i in range(60)]
    data.write_text("\n".join(["text;label", *rows]) + "\n")
    with pytest.raises(UserError, match="look separated by ';'"):
        draft_config(InitRequest(data, tmp_path / "my.yaml"))
