"""What a run survives: signals, damaged checkpoints, a full disk, a loss that is no number."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Killer, diverge, make_backbone, metrics
from helpers import run_config as config

from jaxprompt.config.errors import UserError
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.runtime.lock import locked
from jaxprompt.runtime.signals import Interrupted, Signals
from jaxprompt.training import checkpoint, evaluator
from jaxprompt.training.checkpoint import Checkpoints
from jaxprompt.training.divergence import Diverged
from jaxprompt.training.loop import train
from jaxprompt.training.metric_log import NullReporter
from jaxprompt.training.step import TrainState


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


@pytest.fixture(scope="module")
def whole(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(config(backbone, folder))
    return folder / "run"


def same_run(one, other):
    vectors = [load_prompt(folder / "prompt").vectors for folder in (one, other)]
    np.testing.assert_array_equal(*vectors)
    assert metrics(one) == metrics(other)


# -- signals ---------------------------------------------------------------------------------------


class Sender(NullReporter):
    """Sends a signal when a step is reported, which is while the next one runs."""

    def __init__(self, at):
        self.at = at

    def step(self, done, rates):
        if done == self.at:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("at", [1, 4, 6, 11])
def test_a_signal_saves_the_step_and_the_run_goes_on_from_it(whole, backbone, tmp_path, at):
    run = config(backbone, tmp_path)
    with Signals() as signals, pytest.raises(Interrupted, match=r"SIGTERM after step (\d+)") as why:
        train(run, Sender(at), signals)
    saved = {int(f.name) for f in (tmp_path / "run" / "checkpoints").iterdir()}
    assert int(str(why.value).split("step ")[1].split(",")[0]) in saved and max(saved) >= at
    train(run)
    same_run(whole, tmp_path / "run")


def test_a_signal_in_an_evaluation_is_heard_at_once(whole, backbone, tmp_path, monkeypatch):
    run, answer = config(backbone, tmp_path), evaluator.predict_per_member
    calls = []

    def predict_per_member(*args, **kwargs):
        calls.append(0)
        if len(calls) == 3:  # untuned, step 4, step 8
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("went on")
        return answer(*args, **kwargs)

    monkeypatch.setattr(evaluator, "predict_per_member", predict_per_member)
    with Signals() as signals, pytest.raises(Interrupted, match="after step 8, which is saved"):
        train(run, None, signals)
    train(run)
    same_run(whole, tmp_path / "run")


def test_the_second_signal_does_not_wait():
    with Signals() as signals, signals.held():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match="SIGINT"):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted):
            signals.check()
        with pytest.raises(Interrupted), signals.interruptible():
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_in_a_callback_that_swallows_it_is_heard_all_the_same(monkeypatch):
    monkeypatch.setattr(Signals, "RESEND_SECONDS", 0.05)

    class Swallows:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM"), Signals() as signals:
        thing = Swallows()
        del thing  # what a finaliser raises is lost
        with signals.held():
            time.sleep(0.2)  # reminders keep away
        for _ in range(100):
            time.sleep(0.05)
        raise AssertionError("was not heard")


def test_a_lock_is_dropped_and_does_not_outlive_its_owner(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="is at work in"), locked(tmp_path):
        pass
    (tmp_path / "lock").write_text("process 1 on elsewhere")  # of a process that was killed
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()
    assert not (tmp_path / "lock").exists()


# -- checkpoints -----------------------------------------------------------------------------------


def state(step):
    values = np.random.default_rng(step).normal(size=(2, 3, 4)).astype(np.float32)
    return TrainState(jnp.int32(step), {"prompt": jnp.asarray(values)}, ())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, 3)
    for step in (5, 10, 15, 20):
        checkpoints.save(step, state(step), {"alive": [0], "at": step})
    assert sorted(int(f.name) for f in folder.iterdir()) == [10, 15, 20]
    return folder


def damage(folder, seed):
    """Truncate, flip, delete or swap something in the newest checkpoint, perhaps in the one before.

    Returns whether anything differs now.
    """
    rng = random.Random(seed)
    files = sorted(p for p in (folder / "20").rglob("*") if p.is_file())
    before = {p: p.read_bytes() for p in files}
    file, kind = rng.choice(files), ("truncate", "flip", "delete", "swap", "folders")[seed % 5]
    data = bytearray(file.read_bytes())
    if kind == "truncate":
        file.write_bytes(data[: rng.randrange(len(data)) if data else 0])
    elif kind == "flip" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    elif kind == "delete":
        file.unlink()
    elif kind == "swap":
        other = rng.choice(files)
        mine, theirs = file.read_bytes(), other.read_bytes()
        file.write_bytes(theirs)
        other.write_bytes(mine)
    elif kind == "folders":
        os.replace(folder / "20", folder / "x")
        os.replace(folder / "15", folder / "20")
        os.replace(folder / "x", folder / "15")
    return {p: p.read_bytes() for p in files if p.exists()} != before


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_checkpoint_is_never_used(saved, tmp_path, seed):
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(saved, folder)
    differs, said = damage(folder, seed), []
    checkpoints = Checkpoints(folder, 3, said.append)
    expected = 20 if not differs else 10 if seed % 5 == 4 else 15
    assert checkpoints.latest_step() == expected
    assert bool(said) == differs and all("is not used" in text for text in said)
    found = checkpoints.restore(state(0))
    assert int(found.step) == expected == checkpoints.progress()["at"]
    np.testing.assert_array_equal(found.trainables["prompt"], state(expected).trainables["prompt"])
    # and the run goes on over the place of what was damaged
    checkpoints.save(20, state(21)._replace(step=jnp.int32(20)), {"at": 20})
    assert Checkpoints(folder, 3).latest_step() == 20


def test_where_all_are_damaged_nothing_is_made_up(saved, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(saved, folder)
    for step in folder.iterdir():
        (step / "state" / "_METADATA").write_text("{")
    with pytest.raises(UserError, match="No checkpoint in .* is good .*20: state/_METADATA is not"):
        Checkpoints(folder, 3)
    assert len(list((tmp_path / "run" / "damaged").iterdir())) == 3  # nothing is lost


def test_what_a_killed_run_was_writing_is_no_checkpoint(saved, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(saved, folder)
    (folder / "25.orbax-checkpoint-tmp-1").mkdir()
    (folder / "20" / "sha256.json").unlink()
    assert Checkpoints(folder, 3).latest_step() == 15
    assert not list(folder.glob("*tmp*"))
    for step in ("10", "15"):
        (folder / step / "sha256.json").unlink()
    assert Checkpoints(folder, 3).latest_step() is None


def test_a_run_goes_on_from_the_checkpoint_before(whole, backbone, tmp_path):
    run, said = config(backbone, tmp_path), []
    with pytest.raises(KeyboardInterrupt):
        train(run, Killer(11))
    newest = tmp_path / "run" / "checkpoints" / "10" / "state" / "manifest.ocdbt"
    newest.write_bytes(newest.read_bytes()[:-1])

    class Listener(NullReporter):
        def say(self, text):
            said.append(text)

    train(run, Listener())
    assert [text for text in said if "checkpoint 10 is not used" in text]
    assert "going on from step 5" in said
    same_run(whole, tmp_path / "run")


def test_a_full_disk_is_told_and_loses_nothing(whole, backbone, tmp_path, monkeypatch):
    run, save = config(backbone, tmp_path), checkpoint.ocp.Checkpointer.save

    def full(self, path, args):
        if path.name == "10":
            raise OSError(28, "No space left on device")
        save(self, path, args=args)

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "save", full)
    with pytest.raises(UserError, match="Checkpoint 10 cannot be written.*No space left"):
        train(run)
    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "save", save)
    train(run)
    same_run(whole, tmp_path / "run")


FULL = """
import resource, signal, sys
from pathlib import Path
import jax.numpy as jnp
import numpy as np
from jaxprompt.config.schema import UserError
from jaxprompt.training.checkpoint import Checkpoints
from jaxprompt.training.step import TrainState

place = Path(sys.argv[1]) / "checkpoints"
checkpoints = Checkpoints(place, 2)
values = np.random.default_rng(0).normal(size=(100, 1000)).astype(np.float32)
state = lambda step: TrainState(jnp.int32(step), {"prompt": jnp.asarray(values)}, ())
checkpoints.save(1, state(1), {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    checkpoints.save(2, state(2), {"best": 1})
except UserError as error:
    print(error)
assert Checkpoints(place, 2).latest_step() == 1
"""


@pytest.mark.parametrize("room", [0, 20_000])
def test_what_does_not_fit_is_one_sentence(tmp_path, room):
    """Files that may not grow fail as on a full disk, also in the threads that write them."""
    command = [sys.executable, "-c", FULL, str(tmp_path), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Checkpoint 2 cannot be written to")
    assert len(done.stdout.splitlines()) == 1 and "Traceback" not in done.stderr


# -- divergence ------------------------------------------------------------------------------------


def test_a_run_goes_back_with_a_lower_rate(whole, backbone, tmp_path, monkeypatch):
    run, said = config(backbone, tmp_path, train={"on_divergence": "go_back"}), []
    diverge(monkeypatch, at=7, times=2)

    class Listener(NullReporter):
        def say(self, text):
            said.append(text)

    result = train(run, Listener())
    assert [text for text in said if "going on from step 5 with 0.25 of the learning rate" in text]
    assert result["steps"] == 12
    steps = [row["step"] for row in metrics(tmp_path / "run") if "loss" in row]
    assert steps == sorted(set(steps))
    losses = [{r["step"]: r.get("loss") for r in metrics(f)} for f in (whole, tmp_path / "run")]
    assert losses[0][10] != losses[1][10]  # of another rate


def test_going_back_ends(backbone, tmp_path, monkeypatch):
    diverge(monkeypatch, at=3, times=100)
    run = config(backbone, tmp_path, train={"on_divergence": "go_back"})
    with pytest.raises(Diverged, match="loss is nan at step 3"):
        train(run)


def test_what_is_no_number_is_not_saved(backbone, tmp_path):
    settings = {"learning_rate": 1e38, "clip": 0.0, "steps": 1}
    with pytest.raises(Diverged):
        train(config(backbone, tmp_path, train=settings))
    assert Checkpoints(tmp_path / "run" / "checkpoints", 2).latest_step() == 0
