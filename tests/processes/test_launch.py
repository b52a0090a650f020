"""Starters of runs elsewhere: as far as they can be tried without a cloud."""

import os
import subprocess

import pytest
import yaml
from helpers import SCRIPTS

LAUNCH = SCRIPTS / "launch"


@pytest.fixture
def run(tmp_path):
    """A script with stand-ins of gcloud, srun and scontrol that write down what they were told."""

    def call(script, *arguments, printed=""):
        for name in ("gcloud", "srun", "scontrol"):
            stand_in = tmp_path / name
            says = f"printf '%s' '{printed}'\n" if name == "srun" else ""
            stand_in.write_text(
                f'#!/usr/bin/env bash\nprintf "%s\\n" {name} "$@" >>{tmp_path}/told\n{says}'
            )
            stand_in.chmod(0o755)
        told = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        done = subprocess.run(
            ["bash", LAUNCH / script, *arguments], env=told, cwd=tmp_path, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        log = tmp_path / "told"
        return done, log.read_text().splitlines() if log.exists() else []

    return call


def test_a_pod_gets_the_same_command_on_every_worker(run):
    done, told = run("tpu.sh", "train", "pod", "zone-a", "configs/x.yaml", "task.template=a b")
    assert done.returncode == 0, done.stderr
    assert told[:9] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone", "zone-a",
                        "--worker=all"]  # fmt: skip
    assert told[-1] == (
        r"cd jaxprompt && JAXPROMPT_DISTRIBUTED=1 .venv/bin/jaxprompt train "
        r"configs/x.yaml task.template=a\ b"
    )
    for what in ("stop", "kill"):
        assert run("tpu.sh", what, "pod", "zone-a")[0].returncode == 0
    done, _ = run("tpu.sh", "train", "pod")
    assert done.returncode == 2 and "scripts/launch/tpu.sh setup NAME ZONE" in done.stderr


@pytest.mark.parametrize(("printed", "again"), [("", True), ('{"value": 1}', False)])
def test_slurm_runs_again_until_there_is_a_result(run, printed, again):
    done, told = run("slurm.sh", "configs/x.yaml", "train.steps=5", printed=printed)
    assert done.returncode == 0, done.stderr
    assert told[:3] == ["srun", "--kill-on-bad-exit=1", ".venv/bin/jaxprompt"]
    assert ("requeue" in told) == again
    assert run("slurm.sh")[0].returncode == 2


def test_manifests_are_yaml_and_name_what_there_is():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    arguments = job["template"]["spec"]["containers"][0]["args"]
    sky = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    for config in (arguments[1], sky["envs"]["CONFIG"]):
        assert (LAUNCH.parent.parent / config).is_file()
    copied = [line.split()[1] for line in (LAUNCH / "Dockerfile").read_text().splitlines()
              if line.startswith("COPY")]  # fmt: skip
    assert all((LAUNCH.parent.parent / name).exists() for name in copied)
