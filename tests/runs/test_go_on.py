"""A run that goes on is the run that began, or says why it is not."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Killer, diverge, make_backbone, make_rows, run_config, write_rows
from safetensors.numpy import load_file, save_file

from jaxprompt.config.errors import UserError
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.runtime.signals import Interrupted, Signals
from jaxprompt.training import evaluator, metric_log
from jaxprompt.training.checkpoint import Checkpoints
from jaxprompt.training.loop import train
from jaxprompt.training.metric_log import NullReporter


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


class Listener(NullReporter):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


# -- inputs ----------------------------------------------------------------------------------------


def other_rows(folder, name):
    rows = make_rows(24 if name == "train" else 8)
    rows[3]["label"] = "yes" if rows[3]["label"] == "no" else "no"
    write_rows(folder / f"{name}.jsonl", rows)


def other_weights(backbone):
    file = backbone / "model.safetensors"
    weights = load_file(file)
    weights = {name: np.float32(x * 1.1) for name, x in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})


def other_constants(backbone):
    file = backbone / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"layer_norm_epsilon": 1e-3}))


def other_tokenizer(backbone):
    file = backbone / "tokenizer.json"
    text = file.read_text()
    assert '"good"' in text
    file.write_text(text.replace('"good"', '"fine"'))


CHANGES = {
    "rows/mine/train": lambda folder: other_rows(folder, "train"),
    "rows/mine/valid": lambda folder: other_rows(folder, "valid"),
    "backbone/fingerprint": lambda folder: other_weights(folder / "tiny"),
    "backbone/norm_eps": lambda folder: other_constants(folder / "tiny"),
    "tokenizer": lambda folder: other_tokenizer(folder / "tiny"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_inputs_at_the_same_paths_are_refused(backbone, tmp_path, what):
    shutil.copytree(backbone, tmp_path / "tiny")
    run = run_config(tmp_path / "tiny", tmp_path, train={"steps": 4})
    with pytest.raises(KeyboardInterrupt):
        train(run, Killer(2))
    before = load_all(tmp_path / "run")
    CHANGES[what](tmp_path)
    with pytest.raises(UserError, match=rf"other data or weights .*{what}\w* was .* and is "):
        train(run)
    assert load_all(tmp_path / "run") == before


def load_all(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder): p.read_bytes() for p in files}


def test_a_complete_run_is_not_that_of_other_rows(backbone, tmp_path):
    """Nor is its test figure one of other test rows; rows that are gone say nothing."""
    run = run_config(backbone, tmp_path, train={"steps": 1})
    test = write_rows(tmp_path / "test.jsonl", make_rows(6))
    run = run.model_copy(update={"task": {**as_dict(run.task), "test": str(test)}})
    result = train(run)
    assert result["test_rows"] == 6 and train(run) == result
    write_rows(test, make_rows(5))
    with pytest.raises(UserError, match="rows/mine/test was '6 with .* and is '5 with"):
        train(run)
    # test rows decide nothing of what is learnt: with more steps the figure is that of the new rows
    more = run.model_copy(update={"train": run.train.model_copy(update={"steps": 2})})
    assert train(more)["test_rows"] == 5
    test.unlink()
    assert train(more)["test_rows"] == 5


def as_dict(task: Any) -> dict[str, Any]:
    assert isinstance(task, dict)
    return task


def test_a_run_that_recorded_no_inputs_goes_on(backbone, tmp_path, monkeypatch):
    run = run_config(backbone, tmp_path, train={"steps": 4})
    save = Checkpoints.save

    def old(self, step, state, progress):
        save(self, step, state, {k: v for k, v in progress.items() if k != "inputs"})

    monkeypatch.setattr(Checkpoints, "save", old)
    with pytest.raises(KeyboardInterrupt):
        train(run, Killer(2))
    monkeypatch.setattr(Checkpoints, "save", save)
    assert "rows/mine/train" in train(run)["inputs"]


def test_eval_rows_cut_the_validation_rows_alone(backbone, tmp_path):
    run = run_config(backbone, tmp_path, train={"steps": 1, "max_eval_examples": 2})
    test = write_rows(tmp_path / "test.jsonl", make_rows(6))
    run = run.model_copy(update={"task": {**as_dict(run.task), "test": str(test)}})
    listener = Listener()
    result = train(run, listener)
    assert result["rows"] == 2 and result["test_rows"] == 6
    assert "task mine: 24 training rows, 2 validation rows, 6 test rows" in listener.said


# -- the best prompt -------------------------------------------------------------------------------


def scores(monkeypatch, by_step):
    """Let the validation metric be what is said for each step."""
    measure, write, steps = evaluator.measure_answers, metric_log.log_step, [0]

    def log_step(log, progress, losses):
        steps[0] = progress.step
        return write(log, progress, losses)

    def fake(task, predictions, references):
        found = measure(task, predictions, references)
        return {name: by_step.get(steps[0], 0.0) for name in found}

    monkeypatch.setattr(metric_log, "log_step", log_step)
    monkeypatch.setattr(evaluator, "measure_answers", fake)


def agrees(folder: Path, result: dict[str, Any], name: str = "prompt") -> None:
    """What lies there is what the result tells of."""
    facts = (
        load_prompt(folder / name).metadata
        if name == "prompt"
        else json.loads((folder / name / "tuning.json").read_text())
    )
    assert (facts["step"], facts["metrics"]["accuracy"]) == (result["best_step"], result["value"])


@pytest.mark.parametrize("later", [{8: 0.4, 12: 0.3}, {8: 0.4, 12: 0.6}, {8: 0.95, 12: 0.3}])
@pytest.mark.parametrize("method", ["prompt-tuning", "model-tuning"])
def test_a_better_prompt_that_no_checkpoint_knows_is_forgotten(
    backbone, tmp_path, monkeypatch, later, method
):
    """Killed between the two, and judged otherwise when it goes on, as on other devices."""
    run = run_config(backbone, tmp_path, method=method, train={"learning_rate": 1e-3})
    with monkeypatch.context() as patch:
        scores(patch, {4: 0.5, 8: 0.9})
        with pytest.raises(KeyboardInterrupt):
            train(run, Killer(9))
    name = "prompt" if method == "prompt-tuning" else "model"
    agrees(tmp_path / "run", {"best_step": 8, "value": 0.9}, name)  # the best so far
    scores(monkeypatch, {4: 0.5, **later})
    result = train(run)
    best = max({4: 0.5, **later}.items(), key=lambda pair: pair[1])
    assert (result["best_step"], result["value"]) == best
    agrees(tmp_path / "run", result, name)


def test_members_of_a_population_are_forgotten_alike(backbone, tmp_path, monkeypatch):
    prompt = {"population": {"seed": [0, 1]}}
    run = run_config(backbone, tmp_path, prompt=prompt)
    with monkeypatch.context() as patch:
        scores(patch, {4: 0.5, 8: 0.9})
        with pytest.raises(KeyboardInterrupt):
            train(run, Killer(9))
    scores(monkeypatch, {4: 0.5, 8: 0.4, 12: 0.3})
    result = train(run)
    agrees(tmp_path / "run", result)
    for k, row in enumerate(result["population"]):
        assert (row["best_step"], row["value"]) == (4, 0.5)
        agrees(tmp_path / "run" / "population" / str(k), row)


def test_a_result_goes_before_the_prompt_that_it_tells_of(backbone, tmp_path, monkeypatch):
    run = run_config(backbone, tmp_path, train={"steps": 4})
    scores(monkeypatch, {4: 0.5, 8: 0.9})
    train(run)
    more = run.model_copy(update={"train": run.train.model_copy(update={"steps": 12})})
    for killed_at, there in ((6, True), (9, False)):
        with pytest.raises(KeyboardInterrupt):
            train(more, Killer(killed_at))
        assert (tmp_path / "run" / "result.json").exists() == there
    result = train(more)
    agrees(tmp_path / "run", result)


def test_what_is_kept_aside_goes_with_its_checkpoint(backbone, tmp_path, monkeypatch):
    run = run_config(backbone, tmp_path, train={"steps": 20, "checkpoint_every": 4})
    scores(monkeypatch, {step: step / 20 for step in range(4, 21, 4)})
    train(run)
    kept = sorted(p.name for p in (tmp_path / "run").glob(".prompt*"))
    assert kept == [".prompt@16"]  # checkpoint 16 is still there and names it


# -- more steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [[4, 8, 12], [6, 7, 12]])
def test_a_run_that_gets_more_steps_is_that_of_as_many(backbone, tmp_path, steps):
    """Halving at the last step, and no trace of an evaluation that the longer run has not."""
    prompt = {"population": {"seed": [0, 1, 2, 3]}}
    runs = [
        run_config(
            backbone,
            tmp_path / name,
            prompt=prompt,
            train={"successive_halving_every": 4, "patience": 3},
        )
        for name in ("whole", "parts")
    ]
    whole = train(runs[0])
    for count in steps:
        settings = runs[1].train.model_copy(update={"steps": count})
        result = train(runs[1].model_copy(update={"train": settings}))
    assert [row["steps"] for row in whole["population"]].count(12) == 1
    assert result["population"] == whole["population"]
    vectors = [load_prompt(Path(run.output) / "prompt").vectors for run in runs]
    np.testing.assert_array_equal(*vectors)


@pytest.mark.parametrize("keep", [1, 2])
def test_more_steps_go_on_with_the_prompt_of_the_checkpoint(backbone, tmp_path, monkeypatch, keep):
    """The last step of the shorter run is judged, and its checkpoint is of before that."""
    run = run_config(backbone, tmp_path, train={"steps": 6, "keep": keep})
    scores(monkeypatch, {4: 0.5, 6: 0.9, 8: 0.3, 12: 0.4})
    result = train(run)
    assert (result["best_step"], result["value"]) == (6, 0.9)
    agrees(tmp_path / "run", result)
    more = run.model_copy(update={"train": run.train.model_copy(update={"steps": 12})})
    result = train(more)
    assert (result["best_step"], result["value"]) == (4, 0.5)
    agrees(tmp_path / "run", result)


# -- scores that are no numbers --------------------------------------------------------------------


def test_a_run_whose_scores_were_never_numbers_has_no_result(backbone, tmp_path, monkeypatch):
    """Its losses may be finite all the time: other rows are trained on than judged."""
    predict, asked = evaluator.predict_per_member, []

    def lost(*args, **settings):
        asked.append(len(asked))
        found = predict(*args, **settings)
        return [each._replace(non_finite_rows=[0]) for each in found] if asked[-1] else found

    monkeypatch.setattr(evaluator, "predict_per_member", lost)
    with pytest.raises(UserError, match="No scores of task 'mine' .* finite numbers"):
        train(run_config(backbone, tmp_path, train={"steps": 4}))
    assert len(asked) == 2  # the bare model and the prompt at step 4
    assert not (tmp_path / "run" / "result.json").exists()


# -- signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "error"), [("go_back", Interrupted), ("stop", UserError)])
def test_a_signal_in_a_step_that_diverged(backbone, tmp_path, monkeypatch, way, error):
    """A preempted job that may go back is to be started again, and has not failed."""
    run = run_config(backbone, tmp_path, train={"on_divergence": way})
    diverge(monkeypatch, at=7, times=1)
    with Signals() as signals:

        def check(step=None):
            if step == 7:
                raise Interrupted("stopped by SIGTERM")

        monkeypatch.setattr(signals, "check", check)
        with pytest.raises(error, match="step 7"):
            train(run, None, signals)
    assert Checkpoints(tmp_path / "run" / "checkpoints", 9).latest_step() < 7
    if way == "go_back":
        result = train(run)
        assert result["steps"] == 12 and math.isfinite(result["value"])
