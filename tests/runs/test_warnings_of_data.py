"""Runs, Python and commands tell a user of rows that are cut and of targets that nothing equals."""

import numpy as np
import pytest
from helpers import Killer, make_backbone, run_config, write_rows
from typer.testing import CliRunner

from jaxprompt import api
from jaxprompt.cli import app
from jaxprompt.config.schema import TaskConfig
from jaxprompt.inference.predict import Predictions
from jaxprompt.methods.artefact import Prompt, load_prompt, save_prompt
from jaxprompt.training.loop import train


def mine(**changes):
    return TaskConfig(name="t", template="{text}", **changes)


def row(a, b):
    return {"a": " ".join(["one"] * a), "b": " ".join(["two"] * b)}


@pytest.mark.parametrize("split", ["training", "validation", "test"])
def test_a_run_warns_of_targets_that_nothing_equals(tmp_path, split):
    backbone = make_backbone(tmp_path / "tiny")
    rows = [{"text": "one", "label": word} for word in ("good", "zzz")]
    files = {
        name: str(write_rows(tmp_path / f"{name}.jsonl", rows if name == split else rows[:1]))
        for name in ("training", "validation", "test")
    }
    task = {"name": "t", "template": "{text}", "labels": None, "train": files["training"],
            "validation": files["validation"], "test": files["test"]}  # fmt: skip
    said = f"warning: 1 of 2 {split} targets of task 't' have characters that .*"
    with pytest.raises(KeyboardInterrupt):
        train(run_config(backbone, tmp_path / "run", task=task), Killer(said[:50]))


def test_evaluate_warns_and_compares_what_can_be_written(tmp_path, monkeypatch):
    session = api.open_session(None, str(make_backbone(tmp_path / "tiny")))
    told, path = [], tmp_path / "rows.jsonl"
    write_rows(path, [{"text": "one", "label": word} for word in (" good ", "zzz", "bad")])
    written = Predictions(["good", "", "yes"], None)
    monkeypatch.setattr(api, "predict_examples", lambda *_, **__: written)
    task = mine(train=None)
    found = api.evaluate(session, task=task, data=str(path), warn=told.append)
    assert found["metrics"] == {"accuracy": pytest.approx(1 / 3)}
    assert len(told) == 1 and "1 of 3 targets have characters" in told[0] and "'zzz'" in told[0]
    labelled = mine(labels=["good", "zzz yes"])
    write_rows(path, [{"text": "one", "label": "good"}])
    monkeypatch.setattr(api, "predict_examples", lambda *_, **__: Predictions(["good"], None))
    api.evaluate(session, task=labelled, data=str(path), warn=told.append)
    assert "lacks characters of the labels 'zzz yes'" in told[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    make_backbone(folder / "tiny")
    values = {"name": "mine", "template": "{a} {b}", "labels": ["yes", "no"],
              "max_input_length": 12}  # fmt: skip
    facts = {"task": values, "backbone": {"source": str(folder / "tiny")}}
    save_prompt(folder / "prompt", Prompt(np.zeros((2, 16), np.float32), facts))
    rows = [row(40, 2) | {"label": "yes"}, row(1, 1) | {"label": "no"}]
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "pairs.jsonl", [{"input": "one " * 600, "target": "yes"}])
    return folder


TOLD = "1 of 2 rows are longer than task.max_input_length, 12 tokens, and are cut; in 1"


def test_a_run_says_what_is_cut_of_each_split(folder, tmp_path):
    rows = str(folder / "rows.jsonl")
    values = load_prompt(folder / "prompt").metadata["task"] | {
        "train": rows,
        "validation": rows,
        "test": rows,
    }
    for split in ("training", "validation", "test"):
        with pytest.raises(KeyboardInterrupt):
            start = f"warning: 1 of 2 {split} rows of task 'mine' are longer than"
            train(run_config(folder / "tiny", tmp_path, task=values), Killer(start))


def test_python_says_what_is_cut(folder):
    session = api.open_session(folder / "prompt")
    rows = [row(40, 2), row(1, 1)]
    with pytest.warns(UserWarning, match=TOLD):
        found = api.predict(session, rows)
    heard = []
    assert api.predict(session, rows, warn=heard.append) == found
    assert len(heard) == 1 and heard[0].startswith(TOLD)
    first = load_prompt(folder / "prompt").metadata["task"] | {"truncate": "a"}
    answers = api.predict(session, rows, task=first, warn=heard.append)
    assert "nothing is left" not in heard[1] and len(heard) == 2
    asked = {"a": "one " * 9, "b": "two two"}  # what is left of the first row
    [whole] = api.predict(session, [asked])
    assert answers[0]["scores"]["yes"] == pytest.approx(whole["scores"]["yes"], rel=1e-5)
    with pytest.warns(UserWarning, match="1 of 1 inputs are longer than max_input_length, 12"):
        api.score(session, [{"input": "one " * 600, "target": "yes"}])
    api.score(session, [{"input": "one " * 11, "target": "yes"}])


@pytest.mark.parametrize("command", ["eval", "predict", "score"])
def test_commands_say_what_is_cut(folder, tmp_path, command, monkeypatch):
    monkeypatch.setattr("jaxprompt.runtime.devices.start", lambda *_: None)
    prompt, out = str(folder / "prompt"), ["--output", str(tmp_path / "out.jsonl")]
    arguments = {
        "eval": [prompt, "--data", str(folder / "rows.jsonl")],
        "predict": [prompt, "--input", str(folder / "rows.jsonl"), *out],
        "score": ["--prompt", prompt, "--input", str(folder / "pairs.jsonl"), *out],
    }[command]
    done = CliRunner().invoke(app.app, [command, *arguments])
    assert done.exit_code == 0, done.exception
    inputs = "1 of 1 inputs are longer than max_input_length, 12 tokens"
    assert f"warning: {inputs if command == 'score' else TOLD}" in done.stderr
