"""Rows from files, packaged sets, datasets and TFDS, and each way in which they can be bad."""

import importlib
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.data import parquet_file
from jaxprompt.data.rows import plain_value
from jaxprompt.data.sources import read_rows

ROWS = [
    {"text": 'a "quoted", word', "label": "yes"},
    {"text": "two\nlines\tand é", "label": "no"},
]


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_the_same_rows_come_back_from_every_format(tmp_path):
    jsonl = write(tmp_path, "a.jsonl", "\n\n".join(map(json.dumps, ROWS)))
    cells = '"a ""quoted"", word"{0}yes\r\n\r\n"two\nlines\tand é"{0}no\r\n'
    csv = write(tmp_path, "a.csv", "\ufefftext,label\r\n" + cells.format(","))
    tsv = write(tmp_path, "a.tsv", "text\tlabel\r\n" + cells.format("\t"))
    folder = tmp_path / "rate=0.3"  # pyarrow would make a column of such a name
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet")
    for path in (jsonl, csv, tsv, str(folder / "a.parquet")):
        assert list(read_rows(None, path)) == ROWS


def test_jsonl_and_parquet_keep_types(tmp_path):
    row = {"n": 1, "x": 0.5, "b": True, "l": [1, 2], "s": "t"}
    path = write(tmp_path, "a.jsonl", json.dumps(row))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert read_rows(None, path)[0] == row == read_rows(None, str(tmp_path / "a.parquet"))[0]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", "", "holds no rows"),
        ("a.jsonl", "\n  \n", "holds no rows"),
        ("a.csv", "", "holds no rows"),
        ("a.csv", "text,label\n", "holds no rows"),
        ("a.jsonl", '{"a": 1}\n\n{"a": 2,}\n', r"a\.jsonl, line 3, column [89]: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', r"line 2: expected an object, found '\[1, 2\]"),
        ("a.jsonl", b'{"a": "\xff"}\n', r"a\.jsonl is not UTF-8"),
        ("a.csv", "text,label\na,b\na,b,c\n", "line 3: 3 cells, and the header has 2"),
        ("a.csv", "text,text\na,b\n", "two columns of the same name"),
        ("a.tsv", 'text\tlabel\n"Hi" said he\tyes\nok "x"\tno\n', "line 2.*quotes"),
        ("a.csv", 'text,label\n"never closed,yes\n', "line 2.*quotes"),
        ("a.parquet", b"PAR1 but no more", r"a\.parquet cannot be read as parquet"),
        ("a.parquet", b"", r"a\.parquet cannot be read as parquet"),
        ("a.xlsx", "", r"must end in \.jsonl, \.csv, \.tsv, \.parquet"),
    ],
)
def test_bad_files_are_named_in_one_sentence(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read_rows(None, write(tmp_path, name, content))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_truncated_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS * 100), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read_rows(None, write(tmp_path, "b.parquet", whole[:-20]))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="There is no file .*none.jsonl"):
        read_rows(None, str(tmp_path / "none.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match="There is no file"):
        read_rows(None, str(tmp_path / "folder.jsonl"))


def test_unknown_source_and_unknown_packaged_set():
    with pytest.raises(UserError, match="'ftp:x' is unknown; use builtin:NAME, folder:PATH, hf:"):
        read_rows("ftp:x", "train")
    with pytest.raises(UserError, match="no built-in split nothing/train; sets are .*supersense"):
        read_rows("builtin:nothing", "train")
    with pytest.raises(UserError, match="no built-in split spam/dev"):
        read_rows("builtin:spam", "dev")


@pytest.mark.parametrize("name", ["supersense", "spam"])
def test_packaged_sets_are_text(name):
    for split in ("train", "validation", "test"):
        row = read_rows(f"builtin:{name}", split)[0]
        assert all(isinstance(value, str) and value for value in row.values())


@pytest.mark.parametrize(
    "name, loadable",
    [
        ("imdb", ("imdb", None)),
        ("aps/super_glue/boolq", ("aps/super_glue", "boolq")),
        ("glue/sst2", ("glue", "sst2")),
        ("google/boolq", ("google/boolq", None)),
    ],
)
def test_hugging_face_names(monkeypatch, name, loadable):
    import datasets

    def load(path, config, *, split):
        if (path, config, split) != (*loadable, "train"):
            raise FileNotFoundError(f"no {path}\nin sight")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_rows(f"hf:{name}", "train")) == ROWS
    with pytest.raises(UserError, match=f"'{name}', split 'dev', cannot be loaded"):
        read_rows(f"hf:{name}", "dev")


def test_hugging_face_out_of_reach():
    with pytest.raises(UserError, match="cannot be loaded .*check the name and the network"):
        read_rows("hf:nobody/nothing/here", "train")


def test_tfds_reads_a_prepared_set_without_tensorflow(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class Little(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="boolq")]

        def _info(self):
            columns = {"text": tfds.features.Text(), "label": tfds.features.Scalar(np.int64)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(columns))

        def _split_generators(self, manager):
            return {"train": ((i, {"text": f"é {i}", "label": i}) for i in range(5))}

        def _generate_examples(self):
            raise NotImplementedError

    tfds.disable_progress_bar()
    # as a set whose own code needs TensorFlow even to read its files
    Little.name = "super_glue"
    # of a module that is in no package, tfds looks for no files beside it
    monkeypatch.setitem(sys.modules, "little", sys.modules[__name__])
    Little.__module__ = "little"
    Little(data_dir=tmp_path, config="boolq", file_format="array_record").download_and_prepare()
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    importlib.import_module("tensorflow_datasets.text")
    rows = read_rows("tfds:super_glue/boolq", "train")
    assert len(rows) == 5
    # iterating must end at the last row: the source raises no IndexError there
    assert sorted(row["label"] for row in rows) == [0, 1, 2, 3, 4]
    assert {row["text"] for row in rows} == {f"é {i}" for i in range(5)}
    assert rows[0] == next(iter(rows))
    assert "tensorflow" not in sys.modules
    with pytest.raises(UserError, match="split 'dev', cannot be read"):
        read_rows("tfds:super_glue/boolq", "dev")


def test_tfds_set_that_is_not_prepared():
    with pytest.raises(UserError, match="cannot be read .*file_format=array_record") as caught:
        read_rows("tfds:nothing/of_the_kind", "train")
    assert len(str(caught.value)) < 400


def test_tfds_values_become_plain_text():
    values = np.array([b"a", b"\xc3\xa9"], object)
    assert plain_value(values) == ["a", "é"]
    assert plain_value(np.int64(3)) == 3
    assert plain_value({"a": [np.float32(0.1)], "b": b"\xff"}) == {"a": [0.1], "b": b"\xff"}


def test_a_local_folder_is_a_hugging_face_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "train.parquet")
    assert list(read_rows(f"hf:{folder}", "train")) == ROWS
    assert list(read_rows(f"hf:{folder}", "train[:50%]")) == ROWS[:1]
    with pytest.raises(UserError, match="split 'dev', cannot be loaded"):
        read_rows(f"hf:{folder}", "dev")


def test_json_without_end_and_texts_without_measure(tmp_path):
    deep = write(tmp_path, "deep.jsonl", '{"a": 1}\n' + "[" * 100_000 + "\n")
    with pytest.raises(UserError, match=r"deep.jsonl, line 2: not usable JSON"):
        read_rows(None, deep)
    digits = write(tmp_path, "digits.jsonl", '{"a": ' + "9" * 5000 + "}\n")
    with pytest.raises(UserError, match=r"digits.jsonl, line 1: not usable JSON"):
        read_rows(None, digits)
    text = "word " * 50_000  # beyond the csv module's old limit
    assert read_rows(None, write(tmp_path, "a.csv", f"text\n{text}\n"))[0]["text"] == text


def test_tfds_that_cannot_prepare_says_what_it_needs(monkeypatch):
    import tensorflow_datasets as tfds

    def needs(package):
        def raise_it(*_, **__):
            raise ModuleNotFoundError(f"No module named {package}", name=package)

        return raise_it

    monkeypatch.setattr(tfds, "data_source", needs("tensorflow.io"))
    with pytest.raises(UserError, match="needs 'tensorflow' for that; run 'pip install tensorf"):
        read_rows("tfds:glue/sst2", "train")
    monkeypatch.setattr(tfds, "data_source", needs(None))
    with pytest.raises(UserError, match="needs 'tensorflow'.*file_format=array_record"):
        read_rows("tfds:glue/sst2", "train")


def test_tfds_knows_its_text_sets_without_tensorflow():
    import tensorflow_datasets as tfds

    with pytest.raises(UserError):
        read_rows("tfds:nothing", "train")
    assert tfds.builder_cls("super_glue").name == "super_glue"
    assert "tensorflow" not in sys.modules


def test_folder_of_files_named_by_splits(tmp_path):
    (tmp_path / "BoolQ").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    for name in ("train", "val"):
        (tmp_path / "BoolQ" / f"{name}.jsonl").write_text(lines)
    source = f"folder:{tmp_path / 'BoolQ'}"
    assert list(read_rows(source, "train")) == ROWS == list(read_rows(source, "validation"))
    with pytest.raises(UserError, match="no file for the split 'test'; it would be called test"):
        read_rows(source, "test")
    with pytest.raises(UserError, match="There is no folder"):
        read_rows(source + "Q", "train")


# what json.dumps, pandas and people write, and a row cannot mean
@pytest.mark.parametrize(
    "line, message",
    [
        ('{"a": 1, "b": {"c": [Infinity]}}', "line 2: column 'b': Infinity is no number of JSON"),
        ('{"a": -Infinity}', "line 2: column 'a': -Infinity is no number"),
        ('{"a": 1e400}', "line 2: column 'a': 1e400 is too large a number"),
        ('{"a": "x", "a": "y"}', "line 2: the key 'a' is given twice in one object"),
        ('{"b": [{"a": 1, "a": 1}]}', "line 2: column 'b': the key 'a' is given twice"),
        ("NaN", "line 2: expected an object"),
        ('{"a": ' + "[" * 150 + "]" * 150 + "}", "line 2: column 'a': nested deeper than 100"),
        ('\ufeff{"a": 1}', "line 2, column 1: not valid JSON"),
        ('{"a": "x\x00"}', "line 2, column 9: not valid JSON"),
    ],
)
def test_lines_that_are_json_of_a_kind_and_no_row(tmp_path, line, message):
    with pytest.raises(UserError, match=message) as caught:
        read_rows(None, write(tmp_path, "a.jsonl", f'{{"ok": 1}}\n{line}\n{{"ok": 2}}\n'))
    assert len(str(caught.value)) < 300 and str(caught.value).endswith(".")


def test_nan_is_null_in_every_format(tmp_path):
    nan = float("nan")
    lines = write(tmp_path, "a.jsonl", '{"a": NaN, "b": [NaN, 1.5], "c": "NaN"}\n')
    pq.write_table(pa.table({"a": [nan], "b": [[nan, 1.5]], "c": ["NaN"]}), tmp_path / "a.parquet")
    for path in (lines, str(tmp_path / "a.parquet")):
        assert list(read_rows(None, path)) == [{"a": None, "b": [None, 1.5], "c": "NaN"}]


def test_breaks_of_unicode_end_no_line(tmp_path):
    texts = ["a\x85b", "c\u2028d\u2029e", "f\x0bg\x0ch", "\x1c\x1d\x1e"]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts[:2])
    assert [row["text"] for row in read_rows(None, write(tmp_path, "a.jsonl", lines))] == texts[:2]
    cells = "text,n\n" + "".join(f"{text},1\n" for text in texts)
    assert [row["text"] for row in read_rows(None, write(tmp_path, "a.csv", cells))] == texts


def test_half_a_surrogate_in_a_column_is_kept_for_whom_it_does_not_concern(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"a": "x", "b": "\\ud800"}\n')
    assert read_rows(None, path)[0] == {"a": "x", "b": "\ud800"}


@pytest.mark.parametrize(
    "name, content, line",
    [
        ("a.csv", 'text,label\n"never closed,yes\nok,no\nthe end",yes\n', "line 2: a quote opens"),
        ("a.csv", 'text,label\na,no\n"x,yes\ny",yes\n', "line 3: .*line 4.* 2 rows"),
        ("a.csv", 'n,text,label\n1,"x,yes\n2,y,no\n\n3,z",no\n', "line 2: a quote opens"),
        ("a.csv", 'text,label\n"open,yes\nok, fine,no\nit,no\nend",yes\n', "line 2: a quote opens"),
        ("a.tsv", 'text\tlabel\n"Hello\tyes\nBye"\tno\n', "line 2: a quote opens"),
        ("a.csv", 'text,label\na,b\n"open,yes\nok,no\n', "line 3: unexpected end.* runs to line 4"),
        ("a.csv", 'text,label\n"open,yes\nit is ""so"",no\nthe "end,no\n', "line 2.*line 4"),
    ],
)
def test_quotes_that_swallow_rows_are_refused_where_they_open(tmp_path, name, content, line):
    with pytest.raises(UserError, match=line) as caught:
        read_rows(None, write(tmp_path, name, content))
    assert ".jsonl" in str(caught.value)


@pytest.mark.parametrize(
    "cell",
    [
        "Dear Bob, hello\nBye",
        "one\ntwo\nthree",
        'he said "yes", then\nleft,gone',
        "a,b,c\nd",
        "x,\ny",
        "Dear Bob,\nHello",
        "Dear Ann, thanks\none,two\nthree,four\nBye",
    ],
)
def test_texts_of_several_lines_are_cells(tmp_path, cell):
    import csv

    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], [cell, "yes"], ["b", "no"]])
    rows = [{"text": cell, "label": "yes"}, {"text": "b", "label": "no"}]
    assert list(read_rows(None, str(tmp_path / "a.csv"))) == rows


def test_an_empty_cell_is_null_and_a_blank_line_is_one_of_a_lone_column(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\n,yes\n\na,\n")
    rows = [{"text": None, "label": "yes"}, {"text": "a", "label": None}]
    assert list(read_rows(None, path)) == rows
    path = write(tmp_path, "b.csv", '\ntext\n\na\n""\n\n\nb\n\n')
    found = [row["text"] for row in read_rows(None, path)]
    assert found == [None, "a", None, None, None, "b"]


def test_what_is_no_utf8_csv_is_told(tmp_path):
    for content in ("a,b\n1,2\n".encode("utf-16-le"), b"a,b\n1,\x002\n"):
        with pytest.raises(UserError, match="line [12]: a NUL character"):
            read_rows(None, write(tmp_path, "a.csv", content))
    path = write(tmp_path, "A.CSV", "\ufeff\ufeffa,b\n1,2\n")
    assert read_rows(None, path)[0] == {"a": "1", "b": "2"}


def test_values_of_parquet_are_what_they_stand_for(tmp_path):
    columns = {
        "bytes": pa.array(["a café".encode()], pa.binary()),
        "fixed": pa.array([b"1234"], pa.binary(4)),
        "coded": pa.array([b"x"]).dictionary_encode(),
        "list": pa.array([[b"x", b"y"]]),
        "struct": pa.array([{"k": b"v"}]),
        "float": pa.array([0.1], pa.float32()),
        "half": pa.array([np.float16(0.1)], pa.float16()),
        "view": pa.array(["x"], pa.string_view()),
        "other": pa.array([b"\xff"]),
        "time": pa.array([1], pa.timestamp("ns")),
        "day": pa.array([0], pa.date32()),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    row = read_rows(None, str(tmp_path / "a.parquet"))[0]
    assert str(row.pop("day")) == "1970-01-01"
    assert row == {
        "bytes": "a café", "fixed": "1234", "coded": "x", "list": ["x", "y"], "struct": {"k": "v"},
        "float": 0.1, "half": 0.1, "view": "x", "other": b"\xff",
        "time": "1970-01-01 00:00:00.000000001",
    }  # fmt: skip


@pytest.mark.parametrize(
    "column",
    [
        pa.array([0, 2**31 - 1], pa.date32()),
        pa.array([0, 2**62], pa.duration("s")),
        pa.array([0, 2**61], pa.timestamp("us")),
        pa.Array.from_buffers(
            pa.string(),
            2,
            [None, pa.py_buffer(np.int32([0, 1, 2]).tobytes()), pa.py_buffer(b"a\xff")],
        ),
    ],
)
def test_values_that_cannot_be_are_refused_with_row_and_column(tmp_path, column):
    pq.write_table(pa.table({"x": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet, row 2, column 'x': .* cannot be read"):
        list(read_rows(None, str(tmp_path / "a.parquet")))


def test_equal_names_of_parquet_columns(tmp_path):
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="two columns of the same name: a"):
        read_rows(None, str(tmp_path / "a.parquet"))


def test_many_rows_of_parquet_are_made_on_demand(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_file, "LAZY_FROM", 10)
    monkeypatch.setattr(parquet_file, "BLOCK", 7)
    table = pa.table({"i": list(range(100)), "s": [str(i) for i in range(100)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=23)
    rows = read_rows(None, str(tmp_path / "a.parquet"))
    assert not isinstance(rows, list) and len(rows) == 100
    assert list(rows) == table.to_pylist() == [rows[i] for i in range(100)]
    order = [99, 3, 50, 22, 23, 22, 0, 46, 45, 98, 99]
    assert [rows[i]["i"] for i in order] == order and rows[-100]["i"] == 0
    assert rows[21:25] == table.to_pylist()[21:25]
    with pytest.raises(IndexError):
        rows[100]
    column = pa.array([0] * 60 + [2**31 - 1] + [0] * 39, pa.date32())
    pq.write_table(pa.table({"x": column}), tmp_path / "b.parquet", row_group_size=23)
    rows = read_rows(None, str(tmp_path / "b.parquet"))
    for read in (list, lambda rows: rows[60]):
        with pytest.raises(UserError, match="row 61, column 'x'"):
            read(rows)
    assert [rows[i]["x"].year for i in (99, 30, 70, 0)] == [1970] * 4


def test_a_file_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, name in ((None, "train.csv"), ("folder:data", "train")):
        with pytest.raises(UserError, match="There is no f.*paths start from the directory") as at:
            read_rows(source, name)
        assert str(tmp_path) in str(at.value)
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "a.jsonl", '{"a": 1}\n')
    assert list(read_rows(None, "~/a.jsonl")) == [{"a": 1}] == list(read_rows("folder:~", "a"))


@pytest.mark.parametrize(
    "line", ['x, "y"', ' "x",y', 'x, "y, z"', '"a ""b""", "y"'],
)  # fmt: skip
def test_quotes_behind_a_blank_do_not_silently_become_text(tmp_path, line):
    path = write(tmp_path, "a.csv", f"text,label\na,b\n{line}\n")
    with pytest.raises(UserError, match="line 3: a blank stands before the quotes of a cell"):
        read_rows(None, path)


@pytest.mark.parametrize(
    "line, cells",
    [
        ('x," ""y"""', ["x", ' "y"']),  # said with quotes around the cell
        ('"x, ""y""",z', ['x, "y"', "z"]),
        ('x, "y" she said', ["x", ' "y" she said']),  # not the whole cell
        ("x, y", ["x", " y"]),
    ],
)
def test_quotes_and_blanks_that_are_text_stay(tmp_path, line, cells):
    path = write(tmp_path, "a.csv", f"text,label\n{line}\n")
    assert [list(row.values()) for row in read_rows(None, path)] == [cells]


def test_a_table_with_another_separator_is_told(tmp_path):
    path = write(tmp_path, "a.csv", "text;label\na, b;yes\n")
    with pytest.raises(UserError, match="line 2: 2 cells.*they look separated by ';', and a .csv"):
        read_rows(None, path)
