"""Whole commands on an encoder with a mask: pre-training, tuning, answers and exports."""

import json

import numpy as np
import pytest
from helpers import make_rows, run_values
from helpers_data import make_masked_tokenizer

import jaxprompt as jp
from jaxprompt.config.errors import UserError
from jaxprompt.config.pretrain import PretrainConfig
from jaxprompt.config.schema import RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.inference.session import open_session
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.training.loop import train
from jaxprompt.training.pretrain import pretrain

SHAPE = {"d_model": 16, "num_heads": 2, "d_ff": 32, "num_encoder_layers": 2, "max_positions": 48}
PATTERN = [f"{a} {b} it was {c} . yes no" for a in "xyz" for b in "uvw" for c in ("good", "bad")]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The result of a BERT's few steps on text that repeats itself."""
    folder = tmp_path_factory.mktemp("pretrained")
    lines = [f"{line} {chr(97 + i % 26)}{i % 7}" for i, line in enumerate(PATTERN * 20)]
    (folder / "text.txt").write_text("\n".join(lines))
    values = {
        "shape": SHAPE,
        "tokenizer": {"vocabulary": 128},
        "text": [{"name": "book", "train": str(folder / "text.txt")}],
        "objectives": {"masked_lm": 1.0},
        "input_length": 32,
        "target_length": 8,
        "validation": 0.1,
        "train": {
            "steps": 60, "batch_size": 8, "learning_rate": 0.01, "optimizer": "adamw",
            "schedule": "constant", "warmup_steps": 5, "evaluate_every": 60,
            "checkpoint_every": 60, "evaluate_batches": 1, "tensorboard": False,
        },
        "output": str(folder / "run"),
    }  # fmt: skip
    return pretrain(parse(PretrainConfig, values))


def run_of(backbone, folder, **changes):
    values = run_values(backbone["model"], folder)
    values["task"] |= {"template": "{text} . [mask]"}
    return parse(RunConfig, values | changes)


def test_masked_text_is_learnt_and_the_model_is_a_backbone(backbone):
    folder = load_backbone(backbone["model"]).path.parent
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    name = "held_out/masked_lm/book/loss"
    losses = [row[name] for row in rows if name in row]
    assert losses[-1] < 0.7 * losses[0]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert samples and all("[MASK]" in sample["input"] for sample in samples)
    loaded = load_backbone(backbone["model"])
    assert loaded.config.family == "encoder" and loaded.fingerprint == backbone["fingerprint"]
    assert loaded.config.num_layers == 2 and loaded.config.longest == 48


def test_a_prompt_is_tuned_and_answers_and_is_not_exported(backbone, tmp_path):
    result = train(run_of(backbone, tmp_path))
    session = open_session(result["prompt"])
    answers = jp.predict(session, make_rows(3))
    assert {*answers[0]["scores"]} == {"yes", "no"}
    assert all(score < 0 for answer in answers for score in answer["scores"].values())
    assert jp.evaluate(session)["metrics"]["accuracy"] == result["value"]
    for export in (jp.save_peft, jp.save_adapterhub):
        with pytest.raises(UserError, match="tuned on an encoder with a mask"):
            export(tmp_path / "out", session.prompt)
    with pytest.raises(UserError, match="no likelihood of a text after another"):
        jp.score(session, [{"input": "one", "target": "two"}])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": {"length": 40}}, "has .* tokens with its prompt .* has 48 positions"),
        ({"method": "p-tuning-v2", "prefix": {"length": 40}}, "with a prefix of 40"),
        ({"method": "prefix-tuning", "prefix": {"places": ["cross"]}}, "has an encoder alone"),
    ],
)
def test_what_such_a_backbone_has_not_is_one_sentence(backbone, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        train(run_of(backbone, tmp_path, **changes))


def test_a_whole_model_is_tuned_and_read_back(backbone, tmp_path):
    steps = {"steps": 2, "batch_size": 8, "evaluate_every": 2, "checkpoint_every": 2}
    run = run_of(backbone, tmp_path, method="model-tuning", train=steps | {"tensorboard": False})
    model = load_backbone(train(run)["model"])
    assert model.config.family == "encoder" and model.fingerprint != backbone["fingerprint"]
    answers = jp.predict(None, make_rows(2), backbone=model, task=run.task)
    assert np.isfinite([*answers[0]["scores"].values()]).all()


def test_a_tokenizer_with_another_mask_is_refused(backbone, tmp_path):
    folder = make_masked_tokenizer(tmp_path / "other")
    text = (folder / "tokenizer.json").read_text()
    for old, new in (('"[SEP]"', '"[HELD]"'), ('"[MASK]"', '"[SEP]"'), ('"[HELD]"', '"[MASK]"')):
        text = text.replace(old, new)
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="The mask is token 3 .* and token 4 of the backbone"):
        train(run_of(backbone, tmp_path, tokenizer=str(folder)))
