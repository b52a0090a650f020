"""Tuning on rows that a Python program holds."""

import datasets
import pandas
import pytest
from helpers import make_backbone, make_rows, run_values, write_run

import jaxprompt as jp
from jaxprompt import api
from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig
from jaxprompt.config.validation import parse

DATA = {"train": make_rows(24), "validation": make_rows(8)}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


@pytest.fixture
def values(backbone, tmp_path):
    return run_values(backbone, tmp_path)


@pytest.fixture(scope="module")
def tuned(backbone, tmp_path_factory):
    """Settings that name no file, and the result of a run on ``DATA``."""
    values = run_values(backbone, tmp_path_factory.mktemp("tuned"))
    del values["task"]["train"], values["task"]["validation"]
    return values, jp.train(values, data=DATA)


def test_a_run_on_rows_in_memory_is_that_on_the_same_rows_in_files(tuned, values):
    _, ours = tuned
    theirs = jp.train(values)
    ours, theirs = (jp.load_prompt(result["prompt"]).vectors for result in (ours, theirs))
    assert (ours == theirs).all()


def test_a_run_may_be_asked_for_by_a_path_a_mapping_or_a_config(tuned, values, tmp_path):
    _, wanted = tuned
    path = write_run(tmp_path / "run.yaml", values)
    one, two = jp.train(path), jp.train(str(path))  # the second is complete
    assert one == two == jp.train(jp.load_config(path)) == jp.train(values)
    assert one["value"] == wanted["value"]
    with pytest.raises(UserError, match="A config is 3; give the path of a YAML file"):
        jp.train(3)  # pyright: ignore
    with pytest.raises(UserError, match="Unknown config key 'train.step'"):
        jp.train(values | {"train": {"step": 1}})


def test_a_run_goes_on_with_the_same_rows_of_any_kind_and_refuses_others(tuned):
    values, wanted = tuned
    frames = {name: pandas.DataFrame(rows) for name, rows in DATA.items()}
    sets = datasets.DatasetDict({n: datasets.Dataset.from_list(r) for n, r in DATA.items()})
    assert jp.train(values, data=frames) == jp.train(values, data=sets) == wanted
    with pytest.raises(UserError, match=r"other settings \(task.source was 'memory:"):
        jp.train(values, data=DATA | {"train": make_rows(22)})


def test_a_prompt_of_rows_in_memory_is_judged_on_rows_in_memory(tuned):
    _, result = tuned
    session = jp.open_session(result["prompt"])
    judged = jp.evaluate(session, data=DATA)
    assert judged["metrics"]["accuracy"] == result["value"] and judged["rows"] == 8
    frame = pandas.DataFrame(DATA["validation"])
    assert jp.evaluate(session, data=frame)["metrics"] == judged["metrics"]
    answers = jp.predict(session, DATA["validation"])
    assert jp.predict(session, frame[["text"]]) == answers
    assert jp.predict(session, datasets.Dataset.from_pandas(frame)) == answers
    with pytest.raises(UserError, match="given to jp.train by a Python program"):
        jp.evaluate(session)
    with pytest.raises(UserError, match="data has no test rows; it has train, validation"):
        jp.evaluate(session, data=DATA, split="test")
    with pytest.raises(UserError, match="Rows are mappings.* one is 'Who"):
        jp.predict(session, ["Who was it?"])  # pyright: ignore


def test_rows_without_splits_are_cut_into_three(tuned, tmp_path):
    values, _ = tuned
    rows = [{"text": f"{row['text']} {i}", "label": row["label"]}
            for i, row in enumerate(make_rows(40))]  # fmt: skip
    result = jp.train(values | {"output": str(tmp_path / "run")}, data=rows)
    assert result["rows"] == 4 and result["test_rows"] == 4
    with pytest.raises(UserError, match="data has 8 rows, too few"):
        jp.train(values | {"output": str(tmp_path / "other")}, data=rows[:8])
    with pytest.raises(UserError, match="needs column 'text', which row 13 of data lacks"):
        jp.train(values | {"output": str(tmp_path / "other")}, data=rows[:12] + [{"label": "yes"}])
    with pytest.raises(UserError, match="data has too few rows of each label"):
        jp.train(values | {"output": str(tmp_path / "other")}, data=make_rows(24))


def test_rows_of_one_group_stay_in_one_split(tuned, tmp_path):
    values, _ = tuned
    rows = [{"text": f"row {i}", "label": "yes" if i % 2 else "no", "question": i // 4}
            for i in range(80)]  # fmt: skip
    config = parse(RunConfig, values | {"task": values["task"] | {"group": "question"}})
    _, splits = api._with_rows(config, rows)
    groups = [{row["question"] for row in part} for part in splits.values()]
    assert all(groups) and sum(map(len, groups)) == len(set.union(*groups)) == 20


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ([{"text": "it"}], "row 25 of train lacks; it has 'text'"),
        ([{"text": None, "label": "yes"}], "Column 'text' is empty (null) in row 25 of train"),
        ([{"text": "it", "label": float("nan")}], "Column 'label' is empty (null) in row 25"),
        ([{"text": "it", "label": 1}], "row 25 of train has the label '1'; allowed are"),
        ([{"text": ["it"], "label": "yes"}], "Column 'text' is ['it'] in row 25 of train"),
        (["it"], "Rows of the train data are mappings"),
        ([{"text": {"it"}, "label": "yes"}], "Column 'text' is {'it'} in row 25 of the train data"),
    ],
)
def test_a_wrong_row_is_told_as_that_of_a_file(tuned, tmp_path, train, said):
    values = tuned[0] | {"output": str(tmp_path / "run")}
    with pytest.raises(UserError) as told:
        jp.train(values, data=DATA | {"train": DATA["train"] + train})
    assert said in str(told.value) and not (tmp_path / "run").exists()


def test_data_that_does_not_say_what_is_learnt_is_one_sentence(tuned, tmp_path):
    values = tuned[0] | {"output": str(tmp_path / "run")}
    with pytest.raises(UserError, match="data has no validation rows; give"):
        jp.train(values, data={"train": DATA["train"]})
    with pytest.raises(UserError, match="Rows of data are mappings.*one is 'rows.csv'"):
        jp.train(values, data="rows.csv")
    grid = {"population": {"task": ["supersense", "spam"]}, "length": 3}
    with pytest.raises(UserError, match="prompt.population.task names several"):
        jp.train(values | {"task": "supersense", "prompt": grid}, data=DATA)
    with pytest.raises(UserError, match="Rows of task 'multirc' are not cut into splits"):
        jp.train(values | {"task": "multirc"}, data=DATA["train"])
