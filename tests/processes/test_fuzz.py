"""The fuzzer counts what goes wrong, and a few inputs of each kind go right."""

import json
import os
import random
import subprocess
import sys

import pytest
from helpers import SCRIPTS

FAULTS = SCRIPTS / "faults"
sys.path.insert(0, str(FAULTS))

import fuzz  # noqa: E402
import kinds  # noqa: E402
import mutations  # noqa: E402

from jaxprompt.config.errors import UserError  # noqa: E402


def does(action):
    def kind(rng, folder):
        return "an input", lambda: action(folder)

    return kind


def raises(error):
    def action(folder):
        raise error

    return action


@pytest.mark.parametrize(
    "action, outcome",
    [
        (lambda folder: None, "accepted"),
        (raises(UserError("5 is too large; use 4.")), "refused"),
        (raises(FileNotFoundError(2, "no such file")), "refused"),
        (raises(FileNotFoundError("x" * 4000)), "traceback"),
        (raises(KeyError("a")), "traceback"),
        (raises(RecursionError()), "traceback"),
        (raises(SystemExit(1)), "traceback"),
        (raises(kinds.Lost("a file is gone")), "lost"),
        (lambda folder: (folder / kinds.MARK).touch(), "executed"),
    ],
)
def test_each_outcome_is_counted_as_what_it_is(action, outcome, tmp_path, monkeypatch):
    monkeypatch.setitem(kinds.KINDS, "mine", does(action))
    assert fuzz.attempt("mine", 0, 0, tmp_path)[0] == outcome


def test_an_input_is_a_function_of_seed_and_number(tmp_path):
    def made(seed, number):
        rng = random.Random(f"{seed} {number}")
        tree = {"a": [1, {"b": "text"}], "c": 2.5}
        return mutations.tree_bytes(mutations.damage_tree(rng, tree)), mutations.damage_bytes(
            rng, bytes(range(100))
        )

    assert made(0, 3) == made(0, 3)
    assert len({made(0, number) for number in range(50)}) > 40


def test_some_inputs_of_every_kind_are_read_or_refused_in_a_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, FAULTS / "fuzz.py", "--inputs", "80", "--seed", "1"],
        capture_output=True, text=True, cwd=tmp_path, timeout=500, check=False,
        env=os.environ | {"PYTHONPATH": str(FAULTS.parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["inputs"] == 80 and report["wrong"] == []
    assert all(counts["accepted"] and counts["refused"] for counts in report["counts"].values())
