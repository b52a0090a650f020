"""The loop with a job that trains nothing: what it calls, and when."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig
from jaxprompt.data.batches import Batch
from jaxprompt.losses import Losses
from jaxprompt.runtime.signals import Interrupted, Signals
from jaxprompt.training.divergence import Diverged
from jaxprompt.training.loop import Kind, fit
from jaxprompt.training.metric_log import NullReporter
from jaxprompt.training.progress import Progress
from jaxprompt.training.run_dir import RunDir
from jaxprompt.training.step import TrainState
from jaxprompt.training.trial import MetricName

EMPTY = Batch(*[np.zeros((1, 1), np.int32)] * len(Batch._fields))


def config(folder: Path, **train: Any) -> RunConfig:
    return RunConfig.model_validate({
        "task": "sst2",
        "train": {"steps": 6, "evaluate_every": 2, "checkpoint_every": 3, "tensorboard": False}
        | train,
        "output": str(folder / "run"),
    })  # fmt: skip


@dataclasses.dataclass
class Counting:
    """A job whose only weight is the number of its steps; ``events`` says what it was asked."""

    run: RunDir
    reporter: Any
    lost_at: list[int]
    events: list[str]
    names = [MetricName("", "accuracy")]
    sharded = False
    inputs = {"rows": "some"}

    def start(self):
        self.run.open_metrics(-1)
        self.events.append("start")
        progress = Progress.of_trials([0], inputs=self.inputs)
        self.run.checkpoints.save(0, state(0), progress.to_json())
        return state(0), progress

    def check(self, progress):
        assert progress.inputs == self.inputs

    def restore_files(self, progress):
        self.events.append(f"restore {progress.step}")

    def abstract_state(self, progress):
        return state(0)

    def steps(self, progress):
        self.events.append(f"steps from {progress.step}")
        return self

    def take(self, before):
        step = int(before.step) + 1
        lost = step in self.lost_at
        if lost:
            self.lost_at.remove(step)
        loss = math.nan if lost else 1.0
        return state(step), Losses(jnp.full(1, loss), jnp.ones(1)), [EMPTY]

    def evaluate(self, state, progress):
        assert int(state.step) == progress.step == int(state.trainables["weight"][0, 0])
        self.events.append(f"evaluate {progress.step}")
        return state, dataclasses.replace(progress, evaluated=progress.step)

    def before_checkpoint(self, state, progress):
        self.events.append(f"save {progress.step}")

    def after_checkpoint(self, progress):
        pass

    def release(self, state):
        return None

    def finish(self, state, progress, log):
        result = {
            "steps": progress.step, "seconds": 0.0, "rows": 1, "majority": 0.0, "untuned": 0.0,
            "value": 0.0, "trainable_parameters": 1, "task": "sst2", "prompt": "", "metric": "f1",
        }  # fmt: skip
        self.run.write_result(result)
        return result


def state(step: int) -> TrainState:
    return TrainState(jnp.int32(step), {"weight": jnp.full((1, 1), float(step))}, ())


def run(config: RunConfig, lost_at: tuple[int, ...] = (), signals=None) -> list[str]:
    """What a job is asked until the run ends, or the error that ends it."""
    events: list[str] = []

    def prepare(config, run, reporter, signals):
        return Counting(run, reporter, list(lost_at), events)

    try:
        fit(config, Kind(prepare, lambda _: {}), NullReporter(), signals or Signals(install=False))
    except (UserError, Interrupted) as error:
        events.append(f"{type(error).__name__}: {error}")
    return events


def test_a_run_from_its_start_to_its_end(tmp_path):
    assert run(config(tmp_path)) == [
        "start", "steps from 0", "evaluate 2", "save 3", "evaluate 4", "evaluate 6", "save 6",
    ]  # fmt: skip
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 6
    assert not (tmp_path / "run" / "lock").exists()
    assert run(config(tmp_path)) == []  # a complete run is not prepared again


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_prepared(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (told,) = run(config(tmp_path, trackers=["wandb"]))
    assert "run: pip install wandb" in told and not (tmp_path / "run").exists()


def test_more_steps_go_on_from_the_newest_checkpoint(tmp_path):
    run(config(tmp_path, steps=3))
    assert run(config(tmp_path)) == [
        "restore 3", "steps from 3", "evaluate 4", "evaluate 6", "save 6",
    ]  # fmt: skip


def test_the_last_step_is_saved_before_an_evaluation_that_a_longer_run_has_not(tmp_path):
    assert run(config(tmp_path, steps=5))[-2:] == ["save 5", "evaluate 5"]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    [*_, last] = run(config(tmp_path), lost_at=(4,))
    assert last.startswith(f"{Diverged.__name__}: The loss is nan at step 4")


def test_a_run_rolls_back_to_the_newest_checkpoint(tmp_path):
    settings = config(tmp_path, on_divergence="go_back")
    events = run(settings, lost_at=(4,))
    # step 2 is saved because it was evaluated, step 3 because it is due
    assert events == [
        "start", "steps from 0", "evaluate 2", "save 2", "save 3", "restore 3", "steps from 3",
        "evaluate 4", "save 4", "evaluate 6", "save 6",
    ]  # fmt: skip


def test_a_signal_saves_the_step_that_it_meets(tmp_path):
    class Once(Signals):
        def check(self, step=None):
            if step == 4:
                raise Interrupted("stopped by SIGTERM")

    [*events, last] = run(config(tmp_path), signals=Once(install=False))
    assert events[-1] == "save 4"
    assert last == "Interrupted: stopped by SIGTERM after step 4, which is saved"
    assert run(config(tmp_path))[0] == "restore 4"


def test_a_directory_at_work_is_not_entered(tmp_path):
    with RunDir(config(tmp_path), lambda text: None) as first:
        first.open()
        first.open()  # a second time it is open already
        [error] = run(config(tmp_path))
    assert "is at work in" in error


@pytest.mark.parametrize("rows", [{"rows": "other"}, {}])
def test_a_result_of_other_inputs_is_refused(tmp_path, rows):
    run(config(tmp_path))
    place = tmp_path / "run" / "result.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"inputs": {"rows": "some"}}))
    with RunDir(config(tmp_path), lambda text: None) as directory:
        if rows:
            with pytest.raises(UserError, match="other data or weights"):
                directory.finished(lambda: rows)
        else:  # what is not known may be anything
            assert directory.finished(lambda: rows)


def test_a_row_that_is_there_is_not_written_twice(tmp_path):
    with RunDir(config(tmp_path), lambda text: None) as directory:
        directory.open()
        directory.open_metrics(-1)
        for _ in range(2):
            directory.metrics.write({"step": 4, "validation/accuracy": 0.5})
        directory.metrics.write({"step": 6, "validation/accuracy": 0.5})
        assert [row["step"] for row in directory.metrics.rows] == [4, 6]
        directory.metrics.truncate_after(4)
        assert [row["step"] for row in directory.metrics.rows] == [4]
