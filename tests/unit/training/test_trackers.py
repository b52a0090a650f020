"""Trackers: what they are told, what a run that goes on continues, and that none can kill a run."""

import contextlib
import json
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.runtime.signals import Interrupted
from jaxprompt.training.divergence import Diverged
from jaxprompt.training.metric_log import MetricWriter
from jaxprompt.training.run_dir import RunDir
from jaxprompt.training.trackers import TrackedRun, check_installed, open_trackers

SETTINGS = {"train.steps": 4, "task.labels": ["yes", "no"]}


def module(monkeypatch, name, **members):
    """A module that can be imported, and whose library counts as installed."""
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None, origin=name)
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)
    return made


class Wandb:
    """What is used of the library: ``init`` and a run. ``told`` has all calls."""

    def __init__(self, broken=()):
        self.told, self.broken = [], set(broken)

    def call(self, name, *values):
        self.told.append((name, *values))
        if name in self.broken:
            raise RuntimeError(f"no network\nin {name}")

    def init(self, **options):
        self.call("init", options)
        run = SimpleNamespace(
            define_metric=lambda *names, **options: self.call("define", *names),
            log=lambda row: self.call("log", row),
            finish=lambda exit_code: self.call("finish", exit_code),
        )
        return run

    def of(self, name):
        return [values for called, *values in self.told if called == name]


class MLflow(Wandb):
    """What is used of the library: its client."""

    place, rival = None, None  # of the experiment, and what another run makes meanwhile

    def get_experiment_by_name(self, name):
        self.call("experiment", name)
        return self.place

    def create_experiment(self, name):
        if self.rival is not None:
            self.place = SimpleNamespace(experiment_id=self.rival)
            raise RuntimeError("exists already")
        return f"place of {name}"

    def create_run(self, place, run_name):
        self.call("create", place, run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id="7"))

    def update_run(self, run, status):
        self.call("update", run, status)

    def log_batch(self, run, metrics=(), params=()):
        self.environment = dict(os.environ)
        self.call("params" if params else "metrics", run, [*metrics, *params])

    def set_terminated(self, run, status):
        self.call("terminated", run, status)


@pytest.fixture
def wandb(monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    library = Wandb()
    module(monkeypatch, "wandb", init=library.init, Settings=SimpleNamespace)
    return library


@pytest.fixture
def mlflow(monkeypatch):
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    library = MLflow()
    entities = module(
        monkeypatch, "mlflow.entities",
        Metric=lambda key, value, timestamp, step: (key, value, step),
        Param=lambda key, value: (key, value),
    )  # fmt: skip
    module(monkeypatch, "mlflow", MlflowClient=lambda: library, entities=entities)
    return library


def writer(folder, names, step=-1, say=print):
    folder.mkdir(exist_ok=True)
    run = lambda step: TrackedRun(folder, SETTINGS, step)
    trackers = lambda step: open_trackers(names, run(step), say)
    return MetricWriter(folder, step, trackers=trackers, say=say)


def test_every_row_goes_to_wandb_with_its_step_as_axis(wandb, tmp_path):
    book = writer(tmp_path / "run", ["wandb"])
    book.write({"step": 0, "loss": 2.0})
    book.write({"step": 0, "loss": 2.0})  # is there already
    book.write({"step": 4, "loss": 1.0, "validation/accuracy": 0.5})
    book.close()
    (options,) = wandb.of("init")[0]
    assert options["project"] == "jaxprompt" and options["name"] == "run"
    assert options["config"] == SETTINGS and options["dir"] == str(tmp_path / "run")
    assert wandb.of("log") == [[{"step": 0, "loss": 2.0}],
                               [{"step": 4, "loss": 1.0, "validation/accuracy": 0.5}]]  # fmt: skip
    assert wandb.told[-1] == ("finish", 0)


def test_a_run_that_goes_on_is_the_same_run_of_wandb(wandb, tmp_path):
    writer(tmp_path / "run", ["wandb"]).close("interrupted")
    writer(tmp_path / "run", ["wandb"], step=2).close()
    writer(tmp_path / "other", ["wandb"]).close()
    first, again, other = (options for (options,) in wandb.of("init"))
    assert first["id"] == again["id"] != other["id"] and again["resume"] == "allow"


def test_a_run_that_goes_on_is_the_same_run_of_mlflow(mlflow, tmp_path):
    book = writer(tmp_path / "run", ["mlflow"])
    book.write({"step": 3, "prompt0/loss": 1.5, "a:b": 2.0})
    book.close()
    writer(tmp_path / "run", ["mlflow"], step=3).close()
    assert mlflow.of("create") == [["place of jaxprompt", "run"]]
    assert mlflow.of("params") == [["7", [("train.steps", "4"), ("task.labels", "['yes', 'no']")]]]
    assert mlflow.of("metrics") == [["7", [("prompt0/loss", 1.5, 3), ("a_b", 2.0, 3)]]]
    assert mlflow.of("update") == [["7", "RUNNING"]] * 2
    assert mlflow.told[-1] == ("terminated", "7", "FINISHED")


def test_a_run_that_begins_anew_forgets_the_runs_before(wandb, mlflow, tmp_path):
    for _ in range(2):
        writer(tmp_path / "run", ["wandb", "mlflow"]).close()
    first, second = (options for (options,) in wandb.of("init"))
    assert first["id"] != second["id"] and len(mlflow.of("create")) == 2


def test_parameters_of_mlflow_have_names_that_it_takes_and_follow_the_id(mlflow, tmp_path):
    mlflow.broken.add("params")
    said = []
    run = TrackedRun(tmp_path, {"task.label_map.so so?": "a", "b/c": 1}, -1)
    open_trackers(["mlflow"], run, said.append)
    assert mlflow.of("params") == [["7", [("task.label_map.so so_", "a"), ("b_c", "1")]]]
    assert len(said) == 1 and json.loads((tmp_path / "trackers.json").read_text()) == {
        "mlflow": "7"
    }


def test_an_experiment_that_another_run_makes_meanwhile_is_taken(mlflow, tmp_path):
    mlflow.rival = "3"
    writer(tmp_path / "run", ["mlflow"], say=pytest.fail).close()
    assert mlflow.of("create") == [["3", "run"]]


def test_requests_of_mlflow_are_short_and_the_environment_stays_the_callers(
    mlflow, tmp_path, monkeypatch
):
    retries, timeout = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"
    monkeypatch.setenv(retries, "9")
    monkeypatch.delenv(timeout, raising=False)
    book = writer(tmp_path / "run", ["mlflow"])
    book.write({"step": 0, "loss": 1.0})
    book.close()
    assert mlflow.environment[retries] == "9" and int(mlflow.environment[timeout]) <= 20
    assert os.environ[retries] == "9" and timeout not in os.environ


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [(None, 0, "FINISHED"), (Diverged("no number"), 1, "FAILED"),
     (Interrupted("SIGTERM"), 1, "KILLED"), (KeyboardInterrupt(), 1, "KILLED")],
    ids=["none", "diverged", "interrupted", "control-C"],
)  # fmt: skip
def test_trackers_are_told_how_a_run_ended(wandb, mlflow, tmp_path, error, code, status):
    values = {"backbone": "builtin", "task": "spam", "output": str(tmp_path),
              "train": {"trackers": ["wandb", "mlflow"]}}  # fmt: skip
    with contextlib.suppress(Diverged, Interrupted, KeyboardInterrupt):
        with RunDir(parse(RunConfig, values), print) as run:
            run.open_metrics(-1)
            if error is not None:
                raise error
    assert wandb.told[-1] == ("finish", code)
    assert mlflow.told[-1] == ("terminated", "7", status)


def test_errors_of_trackers_are_told_without_passwords(monkeypatch, tmp_path):
    def client():
        raise RuntimeError("https://me:secret@host/api has failed, http://token@host too")

    module(
        monkeypatch, "mlflow", MlflowClient=client, entities=module(monkeypatch, "mlflow.entities")
    )
    said = []
    writer(tmp_path / "run", ["mlflow"], say=said.append).close()
    assert "(https://host/api has failed, http://host too)" in said[0]


@pytest.mark.parametrize("broken", ["init", "define", "log", "finish"])
def test_a_tracker_that_fails_is_told_of_once_and_the_rows_are_kept(wandb, tmp_path, broken):
    wandb.broken.add(broken)
    said = []
    book = writer(tmp_path / "run", ["wandb"], say=said.append)
    for step in range(3):
        book.write({"step": step, "loss": 1.0})
    book.close()
    assert len(said) == 1 and said[0].startswith("warning: wandb has failed (no network in ")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert len(wandb.of("log")) == {"init": 0, "define": 0, "log": 1, "finish": 3}[broken]


def test_going_back_opens_tensorboard_alone_again(wandb, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "tensorboardX.SummaryWriter",
        lambda folder, purge_step: opened.append(purge_step) or MagicMock(),
    )
    book = writer(tmp_path / "run", ["wandb", "tensorboard"])
    for step in range(4):
        book.write({"step": step, "loss": 1.0})
    book.truncate_after(1)
    book.write({"step": 2, "loss": 3.0})
    book.close()
    assert [row["step"] for row in book.rows] == [0, 1, 2]
    assert len(wandb.of("init")) == len(wandb.of("finish")) == 1
    assert [row["step"] for (row,) in wandb.of("log")] == [0, 1, 2, 3, 2]
    assert len(opened) == 2 and opened[1] == 2


def test_an_id_that_cannot_be_read_is_made_anew(wandb, tmp_path):
    for text in ("[]", "{", '{"wandb": 3}'):
        (tmp_path / "trackers.json").write_text(text)
        writer(tmp_path, ["wandb"], step=0).close()
    assert all(isinstance(options["id"], str) for (options,) in wandb.of("init"))


def test_a_library_that_is_missing_is_one_sentence_with_the_command(monkeypatch):
    # a folder of results is not the library
    for spec in (None, ModuleSpec("mlflow", None, is_package=True)):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, spec=spec: spec)
        with pytest.raises(UserError, match="run: pip install mlflow, or leave it out"):
            check_installed(["mlflow"])
