"""Rows in memory: which kinds are read, under which name, and what is said of others."""

import datetime

import datasets
import numpy as np
import pandas
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.data.holdout import hold_out
from jaxprompt.data.memory import digest_of, only_plain, rows_in_memory, splits_in_memory
from jaxprompt.data.sources import read_rows
from jaxprompt.data.templates import as_text

ROWS = [{"text": "it was good", "label": 1}, {"text": "it was bad", "label": 0}]


@pytest.mark.parametrize(
    "rows",
    [ROWS, tuple(ROWS), pandas.DataFrame(ROWS), datasets.Dataset.from_list(ROWS),
     [{"text": np.str_(row["text"]), "label": np.int64(row["label"])} for row in ROWS]],
    ids=["list", "tuple", "data frame", "datasets.Dataset", "NumPy's values"],
)  # fmt: skip
def test_rows_of_every_kind_are_the_same_rows(rows):
    assert list(rows_in_memory(rows)) == ROWS
    assert digest_of({"train": rows_in_memory(rows)}) == digest_of({"train": ROWS})


def test_a_value_that_a_data_frame_lacks_is_none():
    frame = pandas.DataFrame({
        "a": [1.5, float("nan")], "b": ["x", None], "c": pandas.array([1, None], dtype="Int64"),
        "d": pandas.to_datetime(["2020-01-01", None]), "e": pandas.Categorical(["x", None]),
    })  # fmt: skip
    first, second = rows_in_memory(frame)
    assert set(second.values()) == {None} and first["a"] == 1.5 and first["c"] == 1
    assert as_text(first["d"], "d") == "2020-01-01 00:00:00" and first["e"] == "x"


def test_nan_in_a_list_is_none_as_in_a_file():
    assert rows_in_memory([{"label": float("nan")}]) == [{"label": None}]
    with pytest.raises(UserError, match="is empty"):
        as_text(rows_in_memory([{"label": np.float32("nan")}])[0]["label"], "label")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("some text", "one is 'some text'"),
        (["a", "b"], "one is 'a'"),
        ([ROWS[0], "b"], "one is 'b'"),
        (3, "one is 3"),
        (None, "one is None"),
        ({"text": ["a"], "label": [1]}, "one is {'text'"),
        ((row for row in ROWS), "generator"),
        (np.zeros((2, 3)), "array"),
        (pandas.Series(["a", "b"]), "one is 'a'"),
        ([{0: "a"}], "a column 0; names of columns are text"),
    ],
)
def test_what_is_no_rows_is_one_sentence(rows, said):
    with pytest.raises(UserError) as told:
        rows_in_memory(rows, "it")
    assert said in str(told.value) and str(told.value).startswith("Rows of it")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "the keys (none)"),
        ({"training": ROWS}, "the keys 'training'; give rows, or a mapping of train"),
        ({"train": []}, "The train data holds no rows"),
        ({"train": "rows.csv"}, "Rows of the train data are mappings"),
    ],
)
def test_what_is_no_mapping_of_splits_is_one_sentence(data, said):
    with pytest.raises(UserError) as told:
        splits_in_memory(data)
    assert said in str(told.value)


def test_splits_may_be_a_dataset_dict_and_of_different_kinds():
    whole = datasets.Dataset.from_list(ROWS)
    splits = splits_in_memory(datasets.DatasetDict(train=whole, validation=whole))
    assert list(splits) == ["train", "validation"] and list(splits["train"]) == ROWS
    mixed = splits_in_memory({"validation": pandas.DataFrame(ROWS), "train": ROWS, "test": None})
    assert list(mixed) == ["train", "validation"]


def test_a_digest_says_what_rows_hold_and_not_how_columns_are_ordered():
    digest = digest_of({"train": ROWS})
    assert digest == digest_of({"train": [dict(reversed(row.items())) for row in ROWS]})
    others = [
        {"train": ROWS[::-1]},
        {"train": ROWS[:1]},
        {"test": ROWS},
        {"train": ROWS, "test": ROWS},
        {"train": [ROWS[0], ROWS[1] | {"label": "0"}]},
        {"train": [ROWS[0], ROWS[1] | {"day": datetime.date(2020, 1, 1)}]},
        {"train": [ROWS[0], ROWS[1] | {"text": "\ud800"}]},
        {"train": [ROWS[0], ROWS[1] | {"list": list(range(5000))}]},
        {"train": [ROWS[0], ROWS[1] | {"list": [*range(4999), 0]}]},
    ]
    assert len({digest, *map(digest_of, others)}) == len(others) + 1


def test_rows_that_were_in_memory_are_not_on_disk():
    with pytest.raises(UserError, match="give them again, as data="):
        read_rows(f"memory:{digest_of({'train': ROWS})}", "train")


def test_an_object_in_a_column_that_is_used_is_refused_and_others_are_left_out():
    rows = [ROWS[0], ROWS[1] | {"picture": object()}]
    assert only_plain(rows_in_memory(rows), ["text", "label"], "data") == ROWS
    assert only_plain(ROWS, None, "data") is ROWS
    for value in (object(), {"a", "b"}, [object()], {"x": object()}):
        with pytest.raises(UserError, match=r"Column 'picture' is .* in row 2 of data; give text"):
            only_plain([ROWS[0], ROWS[1] | {"picture": value}], ["picture"], "data")
        with pytest.raises(UserError, match="in row 2 of data"):
            only_plain([ROWS[0], ROWS[1] | {"picture": value}], None, "data")


def test_values_of_a_data_set_are_plain_as_those_of_a_list():
    rows = [{"text": b"it", "score": float("nan")}, {"text": b"was", "score": 1.0}]
    kept = rows_in_memory(datasets.Dataset.from_list(rows))
    assert list(kept) == [{"text": "it", "score": None}, {"text": "was", "score": 1.0}]
    assert kept[1] == list(kept)[1] and len(kept) == 2


def test_parts_of_rows_share_no_text_and_stay_what_they_are():
    rows = [{"text": f"row {i // 2}", "label": i % 2} for i in range(60)]
    parts = hold_out(rows, ["text"], ["label"], ("train", "validation", "test"))
    texts = [{row["text"] for row in part} for part in parts.values()]
    assert sum(map(len, texts)) == 30 and all(texts)
    again = hold_out(rows[::-1], ["text"], ["label"], ("train", "validation", "test"))
    assert {row["text"] for row in again["test"]} == texts[2]
