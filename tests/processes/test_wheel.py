"""The wheel has all that the package needs outside the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version

import pytest
from helpers import ROOT

OLD = int(version("setuptools").partition(".")[0]) < 77  # pyproject.toml asks for 77
pytestmark = pytest.mark.skipif(OLD, reason="setuptools is older than pyproject.toml asks for")


def tracked(*paths):
    listed = subprocess.run(
        ["git", "ls-files", "-z", *paths], cwd=ROOT, capture_output=True, check=True, text=True
    )
    return [name for name in listed.stdout.split("\0") if name]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Made from a copy, since the build leaves files beside the sources."""
    copy, output = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in tracked("jaxprompt", "configs", "pyproject.toml", "README.md", "LICENSE"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (copy / name).symlink_to((ROOT / name).readlink())
        else:
            shutil.copyfile(ROOT / name, copy / name)
    code = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    made = subprocess.run([sys.executable, "-c", code, output], cwd=copy, capture_output=True)
    assert made.returncode == 0, made.stderr.decode()
    (path,) = output.glob("*.whl")
    return path


def test_the_wheel_has_every_file_of_the_package_and_every_recipe(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = [name for name in tracked("jaxprompt") if not (ROOT / name).is_symlink()]
    documents = [name for name in wanted if name.endswith(".md") and "builtin" not in name]
    wanted = set(wanted) - set(documents)
    wanted |= {f"jaxprompt/builtin/{name}" for name in tracked("configs")}
    assert wanted - held == set() and len(wanted) > 100


def test_recipes_data_and_backbones_are_read_from_the_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import jaxprompt\n"
        "from jaxprompt.config.overrides import load_config\n"
        "from jaxprompt.data.sources import read_rows\n"
        "from jaxprompt.models.checkpoints.hub import resolve\n"
        f"assert jaxprompt.__file__.startswith({str(tmp_path)!r})\n"
        "task = load_config('quickstart', ['train.steps=4']).task\n"
        "assert len(read_rows(f'builtin:{task}', 'test')) > 1000\n"
        f"assert resolve('builtin').startswith({str(tmp_path)!r})\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr.decode()
