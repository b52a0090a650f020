"""Several processes on one machine, over Gloo, train as one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import jax
import numpy as np
import pytest
from helpers import ROOT, RUN_SUMS, assert_same_sums, make_backbone, metrics, run_values, write_run
from helpers_text import sentences

from jaxprompt.config.overrides import dump_yaml
from jaxprompt.data.batches import Example
from jaxprompt.data.references import Reference
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.training.datasets import Split


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("backbone") / "tiny")


class Run:
    """A run in ``folder`` by so many processes with so many devices each."""

    def __init__(self, backbone, folder, processes=1, devices=1, overrides=(), **train):
        folder.mkdir(exist_ok=True)
        self.folder, self.processes, self.devices = folder, processes, devices
        values = run_values(backbone, folder)
        values["train"] |= {"steps": 12, "evaluate_every": 4, "checkpoint_every": 5} | train
        self.file, self.overrides = write_run(folder / "run.yaml", values), overrides
        self.workers = []

    def begin(self, only=None, timeout=120, command=None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        flags = "--xla_backend_optimization_level=0"
        if self.processes == 1:
            # compiled as these tests are; with the older emitters of fused loops, several
            # processes wait for each other for ever (jax 0.10)
            inherited = os.environ["XLA_FLAGS"].split()
            flags = " ".join(flag for flag in inherited if "device_count" not in flag)
        for number in range(self.processes) if only is None else only:
            told = os.environ | {
                "JAX_NUM_CPU_DEVICES": str(self.devices),
                "XLA_FLAGS": flags,
            }
            if self.processes > 1:
                told |= {
                    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                    "JAX_NUM_PROCESSES": str(self.processes),
                    "JAX_PROCESS_ID": str(number),
                    "JAXPROMPT_START_TIMEOUT": str(timeout),
                }
            extra = self.overrides[number] if self.overrides else []
            words = command or ["train", self.file, *extra]
            with (self.folder / f"err{number}").open("w") as errors:
                self.workers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "jaxprompt", *map(str, words)], env=told,
                        cwd=ROOT, stderr=errors, stdout=subprocess.DEVNULL,
                    )
                )  # fmt: skip
        return self

    def wait_for_step(self, step):
        log, deadline = self.folder / "run" / "metrics.jsonl", time.monotonic() + 200
        while not (log.exists() and f'"step": {step}' in log.read_text()):
            assert self.workers[1].poll() is None and time.monotonic() < deadline
            time.sleep(0.01)

    def end(self):
        """Exit codes and what was said, of each process."""
        codes = [worker.wait(timeout=280) for worker in self.workers]
        said = [file.read_text() for file in sorted(self.folder.glob("err*"))]
        return codes, said

    def complete(self):
        codes, said = self.begin().end()
        assert codes == [0] * self.processes, said
        return self

    @property
    def vectors(self):
        return load_prompt(self.folder / "run" / "prompt").vectors

    @property
    def weights(self):
        return jax.tree.map(np.asarray, load_backbone(str(self.folder / "run" / "model")).params)

    def losses(self):
        rows = metrics(self.folder / "run")
        return [row[name] for row in rows for name in sorted(row)]


@pytest.fixture(scope="module")
def alone(backbone, tmp_path_factory):
    return Run(backbone, tmp_path_factory.mktemp("alone")).complete()


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [
        (1, 4, []),
        (2, 2, []),
        (4, 1, []),
        (1, 4, ["mesh.fsdp=4"]),
        (2, 2, ["mesh.tensor=2"]),
        (2, 2, ["mesh.fsdp=2", "mesh.tensor=2"]),
    ],
)
def test_the_layout_changes_nothing_but_the_order_of_sums(
    alone, backbone, tmp_path, processes, devices, mesh
):
    run = Run(backbone, tmp_path, processes, devices, [mesh] * processes).complete()
    assert_same_sums(run.vectors, alone.vectors, RUN_SUMS)
    assert_same_sums(run.losses(), alone.losses(), RUN_SUMS)
    files = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert files == sorted(p.name for p in (alone.folder / "run").iterdir())


def test_a_population_of_two_lengths_is_the_same_over_processes(backbone, tmp_path):
    told = [
        "prompt.population={length: [5, 3]}",
        "train.steps=6",
        "train.successive_halving_every=4",
    ]
    one = Run(backbone, tmp_path / "one", 1, 1, [told]).complete()
    two = Run(backbone, tmp_path / "two", 2, 1, [told] * 2).complete()
    for k, length in enumerate((5, 3)):
        folders = (run.folder / "run" / "population" / str(k) / "prompt" for run in (one, two))
        a, b = (load_prompt(folder).vectors for folder in folders)
        assert len(a) == length
        assert_same_sums(a, b, RUN_SUMS)
    assert_same_sums(one.losses(), two.losses(), RUN_SUMS)


@pytest.mark.parametrize("first", [(2, 1), (1, 1)])
def test_a_run_moves_to_other_processes_and_devices(alone, backbone, tmp_path, first):
    first = Run(backbone, tmp_path, *first, steps=7).complete()
    (tmp_path / "run" / "result.json").unlink()
    again = Run(backbone, tmp_path, 1, 4, [["mesh.fsdp=2"]]).complete()
    assert "going on from step 7" in (tmp_path / "err0").read_text()
    assert_same_sums(again.losses()[-2:], alone.losses()[-2:], RUN_SUMS)
    assert first.folder == again.folder


def test_full_fine_tuning_is_the_same_over_processes_that_share_the_model(backbone, tmp_path):
    told = ["method=model-tuning", "train.optimizer=adamw", "train.learning_rate=0.01"]
    mesh = ["mesh.fsdp=2"]
    one = Run(backbone, tmp_path / "one", 1, 1, [told]).complete()
    two = Run(backbone, tmp_path / "two", 2, 1, [told + mesh] * 2, steps=8).complete()
    (two.folder / "run" / "result.json").unlink()
    two = Run(backbone, tmp_path / "two", 2, 1, [told + mesh] * 2).complete()
    assert "going on from step 8" in (two.folder / "err0").read_text()
    same_model(one, two, rate=0.01)


def same_model(one, two, rate):
    """Losses are within float32's error; Adam's steps have the gradients' signs where that is 0."""
    losses = [
        [row["loss"] for row in metrics(r.folder / "run") if "loss" in row] for r in (one, two)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(one.weights), jax.tree.leaves(two.weights), strict=True):
        assert np.abs(a - b).max() < rate and np.abs(a - b).mean() < 1e-4


def test_pre_training_is_the_same_over_processes(tmp_path):
    """The first process trains the tokenizer and writes; the other takes what is there."""

    def run(processes, tokenizer, told):
        run = Run("none", tmp_path / str(processes), processes, 1)
        file = run.folder / "pretrain.yaml"
        config = sentences(run.folder, tokenizer=tokenizer)
        file.write_text(dump_yaml(config))
        codes, said = run.begin(command=["pretrain", file, *told]).end()
        assert codes == [0] * processes, said
        return run

    two = run(2, {"vocabulary": 150, "sentinels": 10}, [])
    (two.folder / "run" / "result.json").unlink()
    shutil.rmtree(two.folder / "run" / "checkpoints" / "8")
    two = run(2, {"vocabulary": 150, "sentinels": 10}, [])
    assert "going on from step 4" in (two.folder / "err0").read_text()
    one = run(1, str(two.folder / "run" / "tokenizer"), [])
    same_model(one, two, rate=0.01)
    results = [json.loads((r.folder / "run" / "result.json").read_text()) for r in (one, two)]
    assert results[0]["tokens"] == results[1]["tokens"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-4)
    files = [{p.name for p in (r.folder / "run").iterdir()} for r in (one, two)]
    assert files[1] - files[0] == {"tokenizer"} and {"samples.jsonl", "losses.png"} < files[0]
    rows = [len((r.folder / "run" / "samples.jsonl").read_text().splitlines()) for r in (one, two)]
    assert rows[0] == rows[1] > 0


def test_two_processes_answer_a_file_and_the_first_writes(alone, backbone, tmp_path):
    answers = []
    for processes in (1, 2):
        run = Run(backbone, tmp_path / str(processes), processes)
        output = run.folder / "answers.jsonl"
        command = ["predict", alone.folder / "run" / "prompt", "--input",
                   run.folder / "valid.jsonl", "--output", output]  # fmt: skip
        codes, said = run.begin(command=command).end()
        assert codes == [0] * processes, said
        answers.append([json.loads(line)["prediction"] for line in output.read_text().splitlines()])
    assert answers[0] == answers[1] and len(answers[0]) == 8


def test_a_killed_worker_ends_all_and_the_run_goes_on(alone, backbone, tmp_path):
    run = Run(backbone, tmp_path, 2, 1).begin()
    run.wait_for_step(4)
    run.workers[1].send_signal(signal.SIGKILL)
    codes, said = run.end()
    assert codes[0] not in (0, -signal.SIGKILL) and codes[1] == -signal.SIGKILL
    assert "start all of them again to go on" in said[0]
    run = Run(backbone, tmp_path, 2, 1).complete()
    assert_same_sums(run.vectors, alone.vectors, RUN_SUMS)


def test_a_signal_to_one_worker_stops_all_at_one_step(alone, backbone, tmp_path):
    run = Run(backbone, tmp_path, 2, 1, steps=4000, evaluate_every=4000).begin()
    run.wait_for_step(10)
    run.workers[1].send_signal(signal.SIGTERM)
    codes, said = run.end()
    assert codes == [0, 0], said
    words = {text.strip().splitlines()[-1] for text in said}
    assert len(words) == 1 and "stopped by SIGTERM after step" in words.pop()


def test_mistakes_are_told_by_every_process(backbone, tmp_path):
    overrides = [["train.learning_rate=0.3"], ["train.learning_rate=0.1"]]
    codes, said = Run(backbone, tmp_path / "a", 2, 1, overrides).begin().end()
    assert codes == [2, 2], said
    assert all("The config of process 1 differs from that of process 0" in t for t in said)
    run = Run(backbone, tmp_path / "b", 2, 1)
    (tmp_path / "b" / "run").mkdir()
    (tmp_path / "b" / "run" / "thesis.tex").write_text("years of work")
    codes, said = run.begin().end()
    assert codes == [2, 2] and all("exists and is not a run" in t for t in said), said


def test_what_processes_agree_on_are_ids_and_references_not_lengths():
    ids = lambda *values: np.array(values, np.int32)
    reference = Reference("yes", ("yes",), 0)
    of = partial(Split, truncation=None)
    split = of([Example(ids(5, 6, 1), ids(7, 1)), Example(ids(8, 1), ids(9, 1))], [reference] * 2)
    others = [
        [Example(ids(5, 4, 1), ids(7, 1)), split.examples[1]],
        [Example(ids(5, 6, 1), ids(3, 1)), split.examples[1]],
        [Example(ids(5, 6), ids(1, 7, 1)), split.examples[1]],
        list(reversed(split.examples)),
    ]
    digests = {of(examples, [reference] * 2).digest() for examples in others}
    digests.add(of(split.examples, [reference, reference._replace(group=1)]).digest())
    digests.add(split.digest())
    assert len(digests) == 6
    same = [e._replace(inputs=e.inputs.astype(np.int64)) for e in split.examples]
    assert of(same, [reference] * 2).digest() == split.digest()


def test_a_missing_worker_is_told(backbone, tmp_path):
    codes, said = Run(backbone, tmp_path, 2, 1).begin(only=[0], timeout=3).end()
    assert codes == [2] and "did not come together in 3 s" in said[0], (codes, said)
    codes, said = Run(backbone, tmp_path / "x", 2, 1).begin(only=[1], timeout=3).end()
    assert codes == [2] and "did not come together in 3 s" in said[0], (codes, said)
