"""Runs that learn several tasks, or a task in several forms, with one set of trainables."""

import json
from typing import ClassVar

import numpy as np
import pytest
from helpers import Killer, make_backbone, make_rows, metrics, run_config, write_rows

from jaxprompt import api
from jaxprompt.config.errors import UserError
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.training.dry_run import dry_run
from jaxprompt.training.loop import train
from jaxprompt.training.metric_log import NullReporter


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


def learning(task, backbone, folder, **settings):
    """A run whose task is this and nothing else."""
    return run_config(backbone, folder, **settings).model_copy(update={"task": task})


def two_tasks(backbone, folder, **settings):
    """A mixture of two tasks with other labels, templates and metrics; one has test rows."""
    mine = run_config(backbone, folder).task
    rows = [{**row, "label": f"it was {row['label']}"} for row in make_rows(30)]
    other = mine | {
        "template": "{text} ?", "labels": ["it was yes", "it was no"], "weight": 2,
        "train": str(write_rows(folder / "other.jsonl", rows)),
        "validation": str(write_rows(folder / "few.jsonl", rows[:6])),
        "test": str(write_rows(folder / "test.jsonl", rows[6:16])),
        "metrics": ["macro_f1", "accuracy"], "max_target_length": 8,
        "templates": ["{text} ?", "question : {text}"],
    }  # fmt: skip
    mine, other = ({k: x for k, x in task.items() if k != "name"} for task in (mine, other))
    task = {"name": "both", "mixture": {"mine": mine, "other": other}}
    return learning(task, backbone, folder, **settings)


def vectors(folder):
    return load_prompt(folder / "run" / "prompt").vectors


@pytest.fixture(scope="module")
def mixture(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    return folder, train(two_tasks(backbone, folder))


def test_each_task_is_judged_and_the_mean_of_first_metrics_selects_the_best(mixture):
    folder, result = mixture
    assert result["task"] == "both" and result["metric"] == "mean" and result["rows"] == 8 + 6
    rows = [row for row in metrics(folder / "run") if "validation/mean" in row]
    assert [row["step"] for row in rows] == [4, 8, 12]
    for row in rows:
        firsts = [row["validation/mine/accuracy"], row["validation/other/macro_f1"]]
        assert row["validation/mean"] == pytest.approx(np.mean(firsts))
        assert "validation/other/accuracy" in row
    assert result["value"] == max(row["validation/mean"] for row in rows)
    assert result["test_rows"] == 10
    assert result["test"]["mean"] == result["test"]["other/macro_f1"]
    assert json.loads((folder / "run" / "result.json").read_text()) == result


def test_the_artefact_answers_each_task_as_it_was_learnt(mixture):
    folder, result = mixture
    prompt = folder / "run" / "prompt"
    best = load_prompt(prompt).metadata["metrics"]
    for name, metric in (("mine", "accuracy"), ("other", "macro_f1")):
        report = api.evaluate(prompt, task=name)
        assert report["metrics"][metric] == best[f"{name}/{metric}"]
    with pytest.raises(UserError, match="several tasks .*mine, other.*name one with --task"):
        api.evaluate(prompt)


def test_a_mixture_goes_on_as_if_never_stopped(mixture, backbone, tmp_path):
    config = two_tasks(backbone, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(config, reporter=Killer(7))
    train(config)
    np.testing.assert_array_equal(vectors(tmp_path), vectors(mixture[0]))
    assert metrics(tmp_path / "run") == metrics(mixture[0] / "run")


def test_a_mixture_of_one_task_and_one_template_are_the_task_bit_for_bit(backbone, tmp_path):
    plain = run_config(backbone, tmp_path / "plain")
    train(plain)
    own = {k: x for k, x in plain.task.items() if k != "name"}
    for name, task in (
        ("mixture", {"mixture": {"mine": own}}),
        ("templates", plain.task | {"templates": [plain.task["template"]]}),
    ):
        train(learning(task, backbone, tmp_path / name))
        np.testing.assert_array_equal(vectors(tmp_path / name), vectors(tmp_path / "plain"))


def test_whole_models_learn_mixtures_and_labels_of_each_task_are_compared(backbone, tmp_path):
    losses = {"unlikelihood_loss": 1.0, "length_normalized_loss": 1.0}
    train(two_tasks(backbone, tmp_path / "losses", train=losses))
    full = {"method": "model-tuning", "train": {"learning_rate": 1e-3}}
    result = train(two_tasks(backbone, tmp_path / "full", **full))
    assert result["metric"] == "mean" and (tmp_path / "full" / "run" / "model").is_dir()


def test_a_dry_run_tells_of_each_task_and_of_its_share(backbone, tmp_path):
    class Heard(NullReporter):
        lines: ClassVar[list[str]] = []

        def say(self, text):
            self.lines.append(text)

    facts = dry_run(two_tasks(backbone, tmp_path), Heard())
    assert {name: each["splits"]["train"]["rows"] for name, each in facts["tasks"].items()} == {
        "mine": 24, "other": 30
    }  # fmt: skip
    assert "mixture both: 28.6% mine, 71.4% other" in Heard.lines  # 24 and 2 x 30


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"mixture": {}}, "task.mixture"),
        ({"mixture": {"boolq": 0}}, "task.mixture.boolq"),
        ({"mixture": {"bolq": 1}}, "did you mean boolq"),
        ({"mixture": {"boolq": {"weight": "much"}}}, "weight is 'much'"),
        ({"mixture": {"boolq": 1}, "template": "{text}"}, "template"),
        ({"mixture": {"boolq": 1, "rte": 1}, "name": "rte"}, "different tasks of the name 'rte'"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(backbone, tmp_path, task, words):
    with pytest.raises(UserError, match=words):
        train(learning(task, backbone, tmp_path))
    assert not (tmp_path / "run").exists()
