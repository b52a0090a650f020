"""Trackers: what they are told, what a run that goes on continues, and that none can kill a run."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.training.metric_log import MetricWriter
from jaxprompt.training.trackers import TrackedRun, check_installed, open_trackers

SETTINGS = {"train.steps": 4, "task.labels": ["yes", "no"]}


def module(monkeypatch, name, **members):
    """A module that can be imported, and whose library counts as installed."""
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
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
            finish=lambda: self.call("finish"),
        )
        return run

    def of(self, name):
        return [values for called, *values in self.told if called == name]


class MLflow(Wandb):
    """What is used of the library: its client."""

    def get_experiment_by_name(self, name):
        self.call("experiment", name)
        return None

    def create_experiment(self, name):
        return f"place of {name}"

    def create_run(self, place, run_name):
        self.call("create", place, run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id="7"))

    def update_run(self, run, status):
        self.call("update", run, status)

    def log_batch(self, run, metrics=(), params=()):
        self.call("params" if params else "metrics", run, [*metrics, *params])

    def set_terminated(self, run):
        self.call("terminated", run)


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
    assert wandb.told[-1] == ("finish",)


def test_a_run_that_goes_on_is_the_same_run_of_wandb(wandb, tmp_path):
    writer(tmp_path / "run", ["wandb"]).close()
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
    assert mlflow.of("update") == [["7", "RUNNING"]] * 2 and mlflow.told[-1] == ("terminated", "7")


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


def test_going_back_opens_trackers_again_from_that_step(wandb, tmp_path):
    book = writer(tmp_path / "run", ["wandb", "tensorboard"])
    for step in range(4):
        book.write({"step": step, "loss": 1.0})
    book.truncate_after(1)
    book.write({"step": 2, "loss": 3.0})
    book.close()
    assert [row["step"] for row in book.rows] == [0, 1, 2]
    assert len({options["id"] for (options,) in wandb.of("init")}) == 1
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) >= 1


def test_an_id_that_cannot_be_read_is_made_anew(wandb, tmp_path):
    for text in ("[]", "{", '{"wandb": 3}'):
        (tmp_path / "trackers.json").write_text(text)
        writer(tmp_path, ["wandb"]).close()
    assert all(isinstance(options["id"], str) for (options,) in wandb.of("init"))


def test_a_library_that_is_missing_is_one_sentence_with_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="run: pip install mlflow, or leave it out"):
        check_installed(["mlflow"])
