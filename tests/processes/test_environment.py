"""The script that makes .venv, with a stand-in for Python: which versions, and what it says."""

import os
import shutil
import subprocess

import pytest
from helpers import SCRIPTS

# says its version, makes a "virtual environment" with itself, and writes down what pip is told
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *"version_info <"*) exit 0 ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *"version_info[:2]"*) echo VERSION ;;
    "-m pip install"*) printf '%s\\n' "$*" >>pip.log ;;
    *) echo "unexpected: $*" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    """Source the script as quickstart.sh does, in a copy of what it reads."""
    (tmp_path / "scripts").mkdir()
    for name in ("environment.sh", "constraints-3.11.txt"):
        shutil.copy(SCRIPTS / name, tmp_path / "scripts")
    shutil.copy(SCRIPTS.parent / "pyproject.toml", tmp_path)
    python, log = tmp_path / "stand-in", tmp_path / "pip.log"

    def run(version):
        python.write_text(PYTHON.replace("VERSION", version))
        python.chmod(0o755)
        log.write_text("")
        script = f"set -euo pipefail; source '{tmp_path}/scripts/environment.sh'; echo went on"
        told = os.environ | {"PYTHON": str(python), "EXTRAS": ""}
        done = subprocess.run(["bash", "-c", script], env=told, capture_output=True, text=True)
        return done, log.read_text()

    return run


def test_a_python_without_tested_versions_installs_the_newest_and_says_so(start):
    done, told = start("3.99")
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
    assert "Python 3.99: no versions were tested with it" in done.stderr
    assert "-e .[test,dev]" in told and "-c " not in told
    done, told = start("3.99")  # the second time there is nothing to install
    assert (done.returncode, told) == (0, ""), done.stderr


def test_tested_versions_are_pinned_and_a_change_of_them_installs_again(start, tmp_path):
    done, told = start("3.11")
    assert done.returncode == 0 and "-c scripts/constraints-3.11.txt -e .[test,dev]" in told
    assert "tested" not in done.stderr and start("3.11")[1] == ""
    with (tmp_path / "scripts" / "constraints-3.11.txt").open("a") as file:
        file.write("# changed\n")
    assert "-c scripts/constraints-3.11.txt" in start("3.11")[1]
