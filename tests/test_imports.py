"""Data flows one way: a module imports only what stands above it."""

import ast
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxprompt"
ORDER = ["yaml12", "config", "parallel", "bank", "data", "model", "prompts", "evaluate", "train",
         "api", "progress", "cli"]  # fmt: skip
HEAVY_ALLOWED = {"orbax": "train/checkpoint.py", "linen": "model/t5.py"}


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_import_only_upwards(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "jaxprompt" and len(parts) > 1 and parts[1] in ORDER:
            assert ORDER.index(parts[1]) <= ORDER.index(layer(path)), f"{path} imports {name}"


@pytest.mark.parametrize("library, home", HEAVY_ALLOWED.items())
def test_one_file_knows_orbax_and_one_knows_linen(library, home):
    users = {str(p.relative_to(PACKAGE)) for p in MODULES if any(library in n for n in imports(p))}
    assert users == {home}


def test_the_product_never_imports_torch_tensorflow_or_pickle():
    for path in MODULES:
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"torch", "tensorflow", "pickle", "dill", "joblib"}, path


def test_files_stay_readable():
    long = {p.name: n for p in MODULES if (n := len(p.read_text().splitlines())) > 400}
    assert not long, f"each perhaps two modules: {long}"


def test_every_packaged_config_is_valid():
    from jaxprompt.config import PretrainConfig, load_config, parse, read_config
    from jaxprompt.data.tasks import resolve_task

    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert files
    for file in files:
        if file.parent.name == "pretrain":
            assert parse(PretrainConfig, read_config(file)).objectives
        else:
            assert resolve_task(load_config(file).task).metrics
        assert file.read_text().startswith("#"), f"{file} must start with its command and cost"
        assert yaml.safe_load(file.read_text())
