"""`jaxprompt inspect` with rows and with several prompts: explanations, pages and errors."""

import json

import numpy as np
import pytest
from helpers import CONFIG, make_backbone, make_rows, run_values, write_rows

from jaxprompt.cli import app
from jaxprompt.methods.artefact import Prompt, save_prompt
from jaxprompt.models.checkpoints.load import load_backbone


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Artefacts: two prompts, one for free text, one without vectors."""
    folder = tmp_path_factory.mktemp("prompts")
    backbone = make_backbone(folder / "tiny")
    task = run_values(backbone, folder)["task"]
    known = {"source": str(backbone), "fingerprint": load_backbone(str(backbone)).fingerprint}
    free = {key: value for key, value in task.items() if key != "labels"}
    for name, length, of_task in (("one", 3, task), ("two", 2, task), ("free", 2, free)):
        vectors = np.random.default_rng(length).normal(size=(length, CONFIG.d_model))
        facts = {"backbone": known, "task": {**of_task, "target": "{label}"}}
        save_prompt(folder / name, Prompt(vectors.astype(np.float32), facts))
    scale = np.zeros((CONFIG.num_encoder_layers, CONFIG.d_model), np.float32)
    layers = {"encoder": {"layers": {"attention_norm": {"scale": scale}}}}
    facts = {"backbone": known, "task": task, "method": "norm-tuning"}
    save_prompt(folder / "norms", Prompt(np.zeros((0, CONFIG.d_model), np.float32), facts, layers))
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["jaxprompt", "inspect", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


def test_a_prompt_is_explained_on_the_rows_of_a_file(call, prompts, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(64))
    out = tmp_path / "why"
    code, text, err = call(prompts / "one", "--data", rows, "--output", out, "--rows", 62)
    assert code == 0, err
    found = json.loads(text)
    assert found["length"] == 3  # what inspect always says
    why = found["explanation"]
    assert {"importance", "tokens", "lens", "probes", "words"} <= why.keys()
    assert why["rows"] == 62 and len(why["importance"]["tuned"]["left_out"]) == 3
    assert len(why["lens"]["prompt"]["accuracy"]) == CONFIG.num_decoder_layers
    page = (out / "report.html").read_text()
    for name in ("importance", "tokens", "lens", "probes", "words"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 5000
    assert "wayward" in page or "told apart" in page or "no less" in page
    kept = json.loads((out / "report.json").read_text())
    assert kept["lens"] == why["lens"]


def test_several_prompts_are_compared_without_rows(call, prompts, tmp_path):
    out = tmp_path / "alike"
    code, text, err = call(f"a={prompts / 'one'}", f"b={prompts / 'two'}")
    assert code == 0, err
    found = json.loads(text)
    assert {*found["prompts"]} == {"a", "b"} == {*found["similarity"]["names"]}
    assert found["similarity"]["cka"][0][0] == 1.0
    assert "explanation" not in found["prompts"]["a"] and not out.exists()


@pytest.mark.parametrize(
    "options, part",
    [
        (["one", "--explain", "foo"], "--explain is 'foo'"),
        (["one", "--split", "foo"], "--split is 'foo'"),
        (["one", "--split", "test", "--data", "x.csv"], "give one of them"),
        (["norms", "--explain", "lens"], "has no virtual tokens, only norms"),
        (["norms", "one"], "has no virtual tokens"),
        (["free", "--explain", "lens"], "explanations are of the choice among labels"),
        (["one", "two", "--figure", "x.png"], "--figure is of one prompt"),
    ],
)
def test_what_cannot_be_explained_is_one_sentence(call, prompts, options, part):
    paths = [prompts / word if (prompts / word).is_dir() else word for word in options]
    code, text, err = call(*paths)
    assert code == 2 and not text
    assert part in err and err.count("\n") <= 2


def test_a_report_of_something_else_is_never_replaced(call, prompts, tmp_path):
    (tmp_path / "report.md").write_text("mine")
    code, _, err = call(prompts / "one", "--output", tmp_path)
    assert code == 2 and "another report" in err
    assert (tmp_path / "report.md").read_text() == "mine"
