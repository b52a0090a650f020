"""LoRA of a tiny backbone: merged, exported, and read back from an adapter of PEFT."""

import json

import numpy as np
import pytest
from helpers import CONFIG, make_backbone, make_rows, run_values, write_rows
from typer.testing import CliRunner

import jaxprompt as jp
from jaxprompt.cli import app
from jaxprompt.config.errors import UserError
from jaxprompt.methods.artefact import Prompt, save_prompt
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.models.injection import LowRank, Projection

PAIRS = [{"input": f"question : {row['text']}", "target": row["label"]} for row in make_rows(6)]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


@pytest.fixture(scope="module")
def lora(backbone, tmp_path_factory):
    """An artefact of LoRA, as training would leave it."""
    folder, rng = tmp_path_factory.mktemp("lora"), np.random.default_rng(0)
    random = lambda *shape: rng.normal(size=shape).astype(np.float32)
    heads = CONFIG.num_heads, CONFIG.head_dim
    change = lambda: Projection(LowRank(random(2, CONFIG.d_model, 2), random(2, 2, *heads)))
    layers = {
        "encoder": {"layers": {"attention": {"query": change(), "value": change()}}},
        "decoder": {"layers": {"cross_attention": {"key": change()}}},
    }
    metadata = {
        "backbone": {
            "source": str(backbone),
            "fingerprint": load_backbone(str(backbone)).fingerprint,
        },
        "task": run_values(backbone, folder)["task"],
        "method": "lora",
        "config": {"lora": {"rank": 2, "alpha": 2.0}},
    }
    save_prompt(folder / "prompt", Prompt(np.zeros((0, CONFIG.d_model)), metadata, layers))
    return folder / "prompt"


def scores(session):
    return [row["log_likelihood"] for row in jp.score(session, PAIRS)]


@pytest.fixture(scope="module")
def tuned_scores(lora):
    return scores(jp.open_session(lora))


def call(*words):
    result = CliRunner().invoke(app.app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return json.loads(result.stdout)


def test_a_merged_model_answers_as_the_backbone_with_its_change(lora, tuned_scores, tmp_path):
    made = call("merge", lora, "--output", tmp_path / "merged")
    assert made["model"] == str(tmp_path / "merged")
    np.testing.assert_allclose(
        scores(jp.open_session(backbone=tmp_path / "merged")), tuned_scores, rtol=1e-5
    )
    note = json.loads((tmp_path / "merged" / "exported.json").read_text())
    assert note["merged"] == {"method": "lora", "task": "mine"}
    jp.merge(lora, tmp_path / "merged", dtype="bfloat16")  # replaces what it has written
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_an_adapter_of_peft_is_used_as_what_it_was_exported_from(
    backbone, lora, tuned_scores, tmp_path
):
    made = call("export", lora, "--output", tmp_path)
    assert made["library"] == "PEFT"
    np.testing.assert_allclose(scores(jp.open_session(made["adapter"])), tuned_scores, rtol=1e-5)
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(6))
    task = jp.load_prompt(lora).metadata["task"]
    ours = jp.evaluate(lora, data=rows)
    theirs = jp.evaluate(made["adapter"], backbone=str(backbone), task=task, data=rows)
    assert theirs["metrics"] == ours["metrics"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": np.ones((3, CONFIG.d_model), np.float32)}, "virtual tokens, which no weight"),
        ({"metadata": {}}, "does not say which backbone it is for"),
    ],
)
def test_what_cannot_be_merged_is_named(lora, tmp_path, change, message):
    prompt = jp.load_prompt(lora)._replace(**change)
    with pytest.raises(UserError, match=message):
        jp.merge(prompt, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_folder_of_other_things_stays(lora, tmp_path):
    (tmp_path / "thesis.tex").write_text("months of work")
    with pytest.raises(UserError, match="holds other things .*thesis.tex"):
        jp.merge(lora, tmp_path)
    with pytest.raises(UserError, match="dtype is 'int8'; give float32 or bfloat16"):
        jp.merge(lora, tmp_path / "merged", dtype="int8")


def test_a_look_inside_says_what_is_changed(lora):
    report = call("inspect", lora)
    assert report == {
        "length": 0,
        "changes": [
            {
                "kind": "LoRA", "size": 2, "numbers": 3 * 2 * 2 * (16 + 8),
                "targets": ["decoder cross key", "encoder query", "encoder value"],
            }
        ],
    }  # fmt: skip
    card = (lora / "README.md").read_text()
    assert "# LoRA for mine" in card and "288 numbers that change the layers of a frozen" in card
    assert "- LoRA of rank 2: decoder cross key, encoder query, encoder value; 288 num" in card
    with pytest.raises(UserError, match="has no vectors to draw"):
        jp.inspect(jp.open_session(lora), figure="x.png")
