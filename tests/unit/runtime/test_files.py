"""What is written, and what is never lost for it: files, folders, devices, rows of any format."""

import datetime
import json
import os
import stat
import threading
from pathlib import Path

import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.data import writers
from jaxprompt.data.sources import read_rows
from jaxprompt.data.writers import Answered, check_rows, format_of, write_rows
from jaxprompt.runtime.files import check_output, replace_directory, write_atomically, write_output
from jaxprompt.runtime.lock import locked

ROWS = [
    {"text": 'a "quoted", text\r\nof\tlines\n', "other": "\u20ac é \x85 \u2028", "n": "007"},
    {"text": "", "other": " spaces \r", "n": "=1+1"},
]
ANSWER = {"prediction": "yes", "scores": {"yes": -0.25, "no": -1.5}}


def put(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


# -- files -----------------------------------------------------------------------------------------


def write(path, text="new"):
    check_output(path)
    write_output(path, lambda file: file.write(text.encode()))


def test_an_output_goes_through_links_and_keeps_names_and_modes(tmp_path):
    target, link, again = tmp_path / "target", tmp_path / "link", tmp_path / "again"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to("target")
    again.symlink_to(link)
    write(again)
    assert link.is_symlink() and again.is_symlink() and target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    os.link(target, tmp_path / "second_name")
    write(target, "newer")
    assert (tmp_path / "second_name").read_text() == "newer"
    dangling = tmp_path / "dangling"
    dangling.symlink_to("made")
    write(dangling)
    assert dangling.is_symlink() and (tmp_path / "made").read_text() == "new"
    names = {"target", "link", "again", "second_name", "dangling", "made"}
    assert set(os.listdir(tmp_path)) == names


def test_an_output_to_a_device_leaves_the_device(tmp_path):
    device = tmp_path / "null"
    device.symlink_to("/dev/null")
    before = os.stat("/dev/null")
    write(device)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and os.stat("/dev/null") == before
    assert os.listdir(tmp_path) == ["null"]


def test_an_output_to_a_fifo_reaches_its_reader_and_waits_for_none(tmp_path):
    fifo, got = tmp_path / "fifo", []
    os.mkfifo(fifo)
    with pytest.raises(UserError, match="a FIFO that nobody reads; start its reader first"):
        check_output(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    held = check_output(fifo)
    os.set_blocking(reader, True)

    def read():
        with os.fdopen(reader, "rb") as file:
            got.append(file.read())

    thread = threading.Thread(target=read)
    thread.start()
    write_output(fifo, lambda file: file.write(b"x" * 100_000), held)
    thread.join()
    assert got == [b"x" * 100_000] and stat.S_ISFIFO(fifo.stat().st_mode)


def test_an_output_to_a_descriptor_adds_to_what_was_written_there(tmp_path):
    with (tmp_path / "log").open("wb") as log:
        log.write(b"before ")
        log.flush()
        path = Path(f"/dev/fd/{log.fileno()}")
        link = tmp_path / "link"
        link.symlink_to(path)
        for place in (path, link):
            assert check_output(place) is None
            write_output(place, lambda file: file.write(b"answers "))
    assert (tmp_path / "log").read_bytes() == b"before answers answers "
    with pytest.raises(UserError, match="cannot be written"):
        check_output(Path("/dev/fd/999"))


def test_an_output_is_never_an_input_by_whatever_name(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("precious")
    (tmp_path / "link").symlink_to(source)
    os.link(source, tmp_path / "hard")
    for name in ("in.jsonl", "link", "hard", "../" + tmp_path.name + "/in.jsonl"):
        with pytest.raises(UserError, match=r"in.jsonl' itself, which is needed"):
            check_output(tmp_path / name, [tmp_path / "none", source])


@pytest.mark.parametrize("name", ["folder", "no/file", "loop", "a\0b", "file/below"])
def test_an_output_that_cannot_be_is_refused_before(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match="cannot be written"):
        check_output(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == before


def test_temporary_files_never_follow_what_was_planted(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in (".out.part", "lock"):
        (tmp_path / name).symlink_to(precious)
    write_atomically(tmp_path / "out", "new \ud800")
    with pytest.raises(UserError, match="'.*lock' is no file of its own but a link"):
        with locked(tmp_path):
            pass
    (tmp_path / "lock").unlink()
    os.link(precious, tmp_path / "lock")
    with pytest.raises(UserError, match="is no file of its own"):
        with locked(tmp_path):
            pass
    assert precious.read_text() == "precious" and (tmp_path / "out").read_text() == "new \\ud800"


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    (tmp_path / "out").write_text("old")

    def fails(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        write_output(tmp_path / "out", fails)
    assert contents(tmp_path) == {"out": "old"}


# -- directories -----------------------------------------------------------------------------------


def fill(folder):
    put(folder, marker="new")


def marked(folder):
    return (folder / "marker").is_file()


def test_a_directory_of_other_things_is_refused(tmp_path):
    home = put(tmp_path / "home", thesis="years of work")
    (home / "sub").mkdir()
    before = contents(home)
    with pytest.raises(UserError, match=r"holds other things \(sub, thesis\), which would be lost"):
        replace_directory(home, fill, marked)
    assert contents(home) == before and os.listdir(tmp_path) == ["home"]


def test_other_files_beside_ours_stay(tmp_path):
    home = put(tmp_path / "home", marker="old", notes="mine", old="also mine")
    put(home / "sub", deep="mine")
    (home / "link").symlink_to("notes")
    replace_directory(home, fill, marked)
    expected = {"marker": "new", "notes": "mine", "old": "also mine", "sub/deep": "mine"}
    assert contents(home) == expected | {"link": "mine"}
    assert (home / "link").is_symlink() and os.listdir(tmp_path) == ["home"]


def test_of_a_model_that_has_fewer_shards_now_no_old_one_stays(tmp_path):
    names = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.safetensors"]
    home = put(tmp_path / "home", marker="old", **dict.fromkeys(names, "old"))
    replace_directory(home, lambda folder: put(folder, marker="new", **{names[2]: "new"}))
    assert contents(home) == {"marker": "new", "m.safetensors": "new"}


def test_a_directory_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    real = put(tmp_path / "disk", marker="old")
    (tmp_path / "link").symlink_to("disk")
    replace_directory(tmp_path / "link", fill, marked)
    assert (tmp_path / "link").is_symlink() and contents(real) == {"marker": "new"}
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"]


def test_a_directory_has_the_mode_that_the_umask_gives_or_that_it_had(tmp_path):
    before = os.umask(0o077)
    try:
        replace_directory(tmp_path / "home", fill)
        assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700
        (tmp_path / "home").chmod(0o750)
        replace_directory(tmp_path / "home", fill)
        assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o750
    finally:
        os.umask(before)


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_rows_are_read_back_as_they_were(tmp_path, ending):
    path = tmp_path / f"out{ending}"
    rows = [{**row, **ANSWER} for row in ROWS]
    check_rows(path, ROWS, ANSWER)
    write_rows(path, rows)
    found = list(read_rows(None, str(path)))
    table = ending in (".csv", ".tsv")  # an empty cell is null
    expected = [{k: None if table and v == "" else v for k, v in row.items()} for row in ROWS]
    assert [{key: row[key] for key in ROWS[0]} for row in found] == expected
    assert [row["prediction"] for row in found] == ["yes", "yes"]
    if table:
        assert {"score:yes": "-0.25", "score:no": "-1.5"}.items() <= found[0].items()
    else:
        assert found[1]["scores"] == ANSWER["scores"]


def test_a_table_of_one_column_keeps_empty_cells_and_odd_names(tmp_path):
    rows = [{" a,\n": value} for value in (None, "x", None, '"')]
    for ending in ("csv", "tsv"):
        write_rows(tmp_path / f"o.{ending}", rows)
        assert list(read_rows(None, str(tmp_path / f"o.{ending}"))) == rows


def test_rows_of_different_columns_lose_none(tmp_path):
    rows = [{"a": "1"}, {"b": "2", "a": None}]
    write_rows(tmp_path / "o.csv", rows)
    assert list(read_rows(None, str(tmp_path / "o.csv"))) == [
        {"a": "1", "b": None}, {"a": None, "b": "2"}
    ]  # fmt: skip
    write_rows(tmp_path / "o.parquet", rows)
    assert list(read_rows(None, str(tmp_path / "o.parquet"))) == [
        {"a": "1", "b": None}, {"a": None, "b": "2"}
    ]  # fmt: skip


def test_rows_with_dates_can_be_written(tmp_path):
    row = {"day": datetime.date(2020, 1, 2), "text": "é"}
    write_rows(tmp_path / "o.jsonl", [row])
    assert (tmp_path / "o.jsonl").read_text() == '{"day": "2020-01-02", "text": "é"}\n'
    write_rows(tmp_path / "o.csv", [row])
    assert list(read_rows(None, str(tmp_path / "o.csv"))) == [row | {"day": "2020-01-02"}]
    write_rows(tmp_path / "o.parquet", [row])
    assert list(read_rows(None, str(tmp_path / "o.parquet"))) == [row]


def test_json_lines_hold_what_json_has_no_word_for(tmp_path):
    row = {"half": "\ud800 é", "nan": float("nan"), "inf": [float("-inf")], "deep": {"a": [True]}}
    write_rows(tmp_path / "o.jsonl", [row])
    text = (tmp_path / "o.jsonl").read_bytes()
    assert b'"\\ud800 \xc3\xa9"' in text
    read = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert read == {"half": "\ud800 é", "nan": None, "inf": ["-Infinity"], "deep": {"a": [True]}}


@pytest.mark.parametrize(
    "name, row, words",
    [
        ("o.jsonl", {"prediction": "mine"}, "Row 2 has a column 'prediction' already"),
        ("o.jsonl", {"scores": 1}, "Row 2 has a column 'scores' already"),
        ("o.csv", {"score:no": 1}, "Row 2 has a column 'score:no' already"),
        ("o.csv", {"x": "\ud800"}, "Row 2 has half a surrogate"),
        ("o.tsv", {"\udfff": "x"}, "The header has half a surrogate"),
        ("o.parquet", {"x": "\ud800"}, "Column 'x' cannot be written as parquet"),
        ("o.parquet", {"a": 3}, "Column 'a' cannot be written as parquet"),
        ("o.parquet", {"x": 10**30}, "Column 'x' cannot be written as parquet"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_the_work(tmp_path, name, row, words):
    with pytest.raises(UserError, match=words):
        check_rows(tmp_path / name, [{"a": "x"}, row], ANSWER)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["o", "o.jsonl", "o.csv", "o.tsv", "o.parquet"])
def test_no_rows_are_written_as_no_rows(tmp_path, name):
    check_rows(tmp_path / name, [], ANSWER)
    write_rows(tmp_path / name, [])
    assert (tmp_path / name).is_file()
    if name != "o.parquet":
        assert (tmp_path / name).read_bytes() == b""


def test_rows_and_answers_are_joined_in_their_order(tmp_path):
    rows, answers = [{"a": 1}, {"a": 2, "b": 3}], [{"prediction": "x"}, {"prediction": "y"}]
    joined = Answered(rows, answers)
    expected = [{"a": 1, "prediction": "x"}, {"a": 2, "b": 3, "prediction": "y"}]
    assert list(joined) == expected == [joined[0], joined[-1]] and len(joined) == 2
    with pytest.raises(ValueError):
        list(Answered(rows, answers[:1]))
    write_rows(tmp_path / "o.parquet", joined)
    found = list(read_rows(None, str(tmp_path / "o.parquet")))
    assert found == [{"b": None} | expected[0], expected[1]]


@pytest.mark.parametrize("name", ["o.txt", "o.json", "o.xlsx", "o.csv.gz"])
def test_a_name_that_says_no_known_format_is_refused(name):
    with pytest.raises(UserError, match="let it end in .jsonl, .csv, .tsv, .parquet"):
        format_of(Path(name))


def test_answers_outlive_a_disk_without_room(tmp_path, monkeypatch):
    """Whatever fails at the end, the answers are somewhere, and the message says where."""
    rows = [{**row, **ANSWER} for row in ROWS]
    spare = put(tmp_path / "spare")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writers.tempfile, "gettempdir", lambda: str(spare))
    with pytest.raises(UserError, match="No space left on device.*the 2 rows are in"):
        write_rows(Path("/dev/full"), rows)
    (kept,) = tmp_path.glob("full-*.jsonl")
    assert [json.loads(line) for line in kept.read_bytes().splitlines()] == rows
    kept.unlink()

    real = Path.open

    def full(path, *arguments, **options):
        if path.parent != spare:
            raise OSError(28, "No space left on device")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=f"the 2 rows are in '{spare}"):
        write_rows(tmp_path / "o.csv", rows)
    monkeypatch.undo()
    assert [json.loads(line) for line in contents(spare).popitem()[1].split("\n")[:-1]] == rows
    assert os.listdir(tmp_path) == ["spare"]


def test_answers_come_to_standard_output_where_nothing_else_is_left(tmp_path, monkeypatch, capfd):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(UserError, match="the 1 rows are in standard output, as JSON lines"):
            write_rows(tmp_path / "o.jsonl", [ANSWER])
    assert json.loads(capfd.readouterr().out) == ANSWER
