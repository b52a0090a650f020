"""Runs that compare labels: with T-Few's losses, and with its way to choose a label."""

import numpy as np
import pytest
from helpers import Killer, make_backbone, metrics, run_config

from jaxprompt import api
from jaxprompt.config.errors import UserError
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.training.loop import train

LOSSES = {"unlikelihood_loss": 1.0, "length_normalized_loss": 1.0}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


def vectors(folder):
    return load_prompt(folder / "prompt").vectors


def test_a_run_goes_on_as_if_never_stopped_and_its_losses_matter(backbone, tmp_path):
    whole, parts, plain = (
        run_config(backbone, tmp_path / name, train=losses)
        for name, losses in (("whole", LOSSES), ("parts", LOSSES), ("plain", {}))
    )
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(parts, reporter=Killer(7))
    train(parts)
    train(plain)
    folders = [tmp_path / name / "run" for name in ("whole", "parts", "plain")]
    assert metrics(folders[1])[-1] == metrics(folders[0])[-1]
    logged = [next(row["loss"] for row in metrics(f) if row["step"] == 10) for f in folders]
    assert logged[0] == logged[1] != logged[2]
    names = ("unlikelihood_loss", "length_normalized_loss")  # of each step, besides cross-entropy
    rows = [next(row for row in metrics(f) if row["step"] == 10) for f in folders]
    assert all(rows[0][name] > 0 and rows[0][name] == rows[1][name] for name in names)
    assert not {*names} & {*rows[2]}


def test_prompts_of_tasks_with_other_labels_are_trained_in_one_step(backbone, tmp_path):
    mine = run_config(backbone, tmp_path).task
    other = {**mine, "name": "other", "label_map": {"yes": "good", "no": "bad three"}}
    grid = {"task": [mine, {**other, "labels": ["good", "bad three"]}]}
    train(run_config(backbone, tmp_path, train=LOSSES, task="mine", prompt={"population": grid}))
    for number, task in enumerate(grid["task"]):
        folder = tmp_path / f"alone{number}"
        train(run_config(backbone, folder, train=LOSSES, task=task))
        np.testing.assert_allclose(
            vectors(tmp_path / "run" / "population" / str(number)), vectors(folder / "run"),
            rtol=2e-4, atol=2e-4,
        )  # fmt: skip


def test_labels_are_compared_by_the_mean_of_their_tokens_where_a_task_says_so(backbone, tmp_path):
    config = run_config(backbone, tmp_path)
    train(config)
    rows = [{"text": f"one two it was {word}"} for word in ("good", "bad", "three")]
    session = api.open_session(tmp_path / "run" / "prompt")
    labels = {"labels": ["yes", "no no no"]}
    sums, means = (
        api.predict(session, rows, task=config.task | labels | {"length_normalized": each})
        for each in (False, True)
    )
    for a, b in zip(sums, means, strict=True):
        found = [a["scores"][label] / n for label, n in (("yes", 2), ("no no no", 4))]
        np.testing.assert_allclose(found, list(b["scores"].values()), rtol=1e-5)
        assert b["prediction"] == max(b["scores"], key=b["scores"].get)


def test_a_task_without_labels_is_refused_in_a_sentence(backbone, tmp_path):
    config = run_config(backbone, tmp_path, train={"unlikelihood_loss": 1.0})
    task = {**config.task, "labels": None}
    with pytest.raises(UserError, match="task 'mine' has none; leave them out, or name two"):
        train(config.model_copy(update={"task": task}))
    assert not (tmp_path / "run").exists()
