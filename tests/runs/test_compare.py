"""`jaxprompt compare`: finished prompts on the same rows, and formulations that it trains."""

import dataclasses
import json

import numpy as np
import pytest
import yaml
from helpers import CONFIG, make_backbone, make_rows, run_values, write_rows

from jaxprompt.cli import app
from jaxprompt.methods.artefact import Prompt, load_prompt, save_prompt
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.training import loop


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


@pytest.fixture(scope="module")
def prompts(backbone, tmp_path_factory):
    """Artefacts: one, one of other words and length, one for other questions, one calibrated."""
    folder = tmp_path_factory.mktemp("prompts")
    task = run_values(backbone, folder)["task"]
    known = {"source": str(backbone), "fingerprint": load_backbone(str(backbone)).fingerprint}
    words = {"template": "{text} ?", "labels": ["good", "bad"],
             "label_map": {"yes": "good", "no": "bad"}}  # fmt: skip
    other, batch = {"name": "other", "target": "{other}"}, {"calibration": "batch"}
    for name, length, changes in (
        ("one", 3, {}), ("two", 2, words), ("other", 3, other), ("batch", 3, batch),
    ):  # fmt: skip
        vectors = np.random.default_rng(length).normal(size=(length, CONFIG.d_model))
        facts = {"backbone": known, "task": task | changes}
        save_prompt(folder / name, Prompt(vectors.astype(np.float32), facts))
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["jaxprompt", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


def rows_file(folder, count=24):
    rows = [{**row, "other": "yes" if i % 3 else "no"} for i, row in enumerate(make_rows(count))]
    return write_rows(folder / "rows.jsonl", rows)


def test_prompts_are_compared_on_the_rows_of_a_file(call, prompts, tmp_path):
    file, out = rows_file(tmp_path), tmp_path / "report"
    code, text, err = call(
        f"a={prompts / 'one'}", f"b={prompts / 'one'}", prompts / "two", "--data", file,
        "--output", out, "--margin", 0.1, "--batch-size", 8,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(text)
    same, *others = found["pairs"]
    assert (same["a"], same["b"], same["difference"], same["p"]) == ("a", "b", 0, 1)
    assert same["verdict"].startswith("cannot be told apart")
    assert [pair["b"] for pair in others] == [str(prompts / "two")] * 2
    assert [one["rows"] for one in found["prompts"]] == [24] * 3
    by_name = {one["name"]: one for one in found["prompts"]}
    assert by_name["a"]["tokens"] > by_name[str(prompts / "two")]["tokens"]
    assert found["report"] == str(out / "report.html") and "cannot be told apart" in err
    assert {path.name for path in out.iterdir()} == {
        "report.md", "report.html", "report.json", "figures",
    }  # fmt: skip

    code, text, err = call(
        prompts / "one", f"b={prompts / 'one'}", "--data", file, "--sequential", "--batch-size", 8
    )
    assert code == 0, err
    [pair] = json.loads(text)["pairs"]
    assert pair["rows"] == 24 and pair["verdict"] == "cannot be told apart"


def test_what_cannot_be_paired_is_refused(call, prompts, tmp_path):
    file = rows_file(tmp_path)
    one, two, other = (prompts / name for name in ("one", "two", "other"))
    cases = [
        ([one, "--data", file], "compared with nothing"),
        ([one, one], "Two prompts are named"),
        ([one, other, "--data", file], "do not answer the same question: the right answer of row"),
        ([one, prompts / "batch", "--data", file, "--sequential"], "--sequential answers a few"),
        ([one, two, "--split", "dev"], "--split is 'dev'"),
        ([one, two, "--data", write_rows(tmp_path / "x.jsonl", [{"label": "yes"}])], "'text'"),
        ([one, two, "--data", file, "--output", file], "is a file"),
        (["missing.yaml"], "No config file"),
        (["missing.yaml", "--sequential"], "are for finished prompts"),
    ]
    for arguments, words in cases:
        code, text, err = call(*arguments)
        last = err.strip().splitlines()[-1]
        assert (code, text) == (2, "") and last.startswith("error: ") and words in last, err


def test_formulations_are_trained_halved_and_compared(call, backbone, tmp_path, monkeypatch):
    values = run_values(backbone, tmp_path)
    values["task"]["test"] = str(rows_file(tmp_path))
    values["compare"] = {
        "formulations": {
            "plain": None,
            "asked": {"template": "{text} ?"},
            "words": {"labels": ["good", "bad"], "label_map": {"yes": "good", "no": "bad"}},
        },
        "seeds": [0, 1],
        "successive_halving_every": 2,
    }
    config = tmp_path / "compare.yaml"
    config.write_text(yaml.safe_dump(values))
    code, text, err = call(config)
    assert code == 0, err
    found, out = json.loads(text), tmp_path / "run"
    assert [one["name"] for one in found["prompts"]] == ["asked", "plain", "words"]
    assert {one["seeds"] for one in found["prompts"]} == {2} and len(found["pairs"]) == 1
    assert sum("stopped at step 2" in one["note"] for one in found["prompts"]) == 1
    assert found["data"].startswith("the test rows") and found["rows"] == 24
    cells = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    assert [(cell["variant"], cell["seed"]) for cell in cells] == [
        (name, seed) for name in ("asked", "plain", "words") for seed in (0, 1)
    ]
    for cell in cells:
        assert cell["score"] == pytest.approx(np.mean(cell["scores"]))
        assert load_prompt(cell["prompt"]).metadata["task"]["name"] == f"mine-{cell['variant']}"
    assert "stopped at step 2" in (out / "report.md").read_text()

    # everything is there already: nothing is trained or answered again
    monkeypatch.setattr(loop, "TUNING", dataclasses.replace(loop.TUNING, prepare=None))
    code, again, err = call(config)
    assert code == 0 and json.loads(again) == found, err
    assert len((out / "cells.jsonl").read_text().splitlines()) == 6
    code, _, err = call(config, "compare=null")
    assert code == 2 and "has no section compare" in err
