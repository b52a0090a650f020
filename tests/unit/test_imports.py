"""Imports point downwards only: a module imports what is at its own level or below."""

import ast
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from helpers_source import nodes

PACKAGE = ROOT / "jaxprompt"
# from the lowest level to the highest
ORDER = ["moved", "config", "runtime", "data", "models", "losses", "methods", "inference",
         "evaluation", "training", "api", "serving", "studies", "cli", "__main__"]  # fmt: skip
HEAVY_ALLOWED = {
    "orbax": {"training/checkpoint.py"},
    "linen": {
        "models/blocks.py",
        "models/t5/t5.py",
        "models/encoder/encoder.py",
        "models/decoder/decoder.py",
    },
    "gguf": {"data/gguf_tokenizer.py", "models/checkpoints/gguf.py"},
}


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path):
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_import_only_what_is_below(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "jaxprompt" and len(parts) > 1 and parts[1] in ORDER:
            assert ORDER.index(parts[1]) <= ORDER.index(layer(path)), f"{path} imports {name}"


@pytest.mark.parametrize("library, homes", HEAVY_ALLOWED.items())
def test_few_files_know_a_heavy_library(library, homes):
    used = {p: any(library in name.split(".")[:2] for name in imports(p))
            for p in MODULES}  # fmt: skip
    assert {str(p.relative_to(PACKAGE)) for p in MODULES if used[p]} == homes


def test_one_file_spells_scan_and_remat():
    users = {p.name for p in MODULES if any(n in p.read_text() for n in ("nn.scan", "nn.remat"))}
    assert users == {"blocks.py"}


def test_the_family_of_a_backbone_is_known_in_one_folder():
    """Outside ``models`` nobody names a family's module; what is asked goes through registry.py."""
    allowed = {"training/pretrain.py"}  # whose objectives are T5's
    families = tuple(f"jaxprompt.models.{name}" for name in ("t5", "decoder", "encoder"))
    for path in MODULES:
        where = str(path.relative_to(PACKAGE))
        if layer(path) == "models" or where in allowed:
            continue
        named = [name for name in imports(path) if name.startswith(families)]
        assert not named, f"{where} imports {named}"


def test_the_product_never_imports_torch_tensorflow_or_pickle():
    for path in MODULES:
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"torch", "tensorflow", "pickle", "dill", "joblib"}, path


def test_every_packaged_config_is_valid():
    from jaxprompt.config.overrides import load_config, read_config
    from jaxprompt.config.pretrain import PretrainConfig
    from jaxprompt.config.validation import parse
    from jaxprompt.data.tasks.registry import resolve_task

    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert files
    for file in files:
        if file.parent.name == "pretrain":
            assert parse(PretrainConfig, read_config(file)).objectives
        else:
            assert resolve_task(load_config(file).task).metrics
        assert file.read_text().startswith("#"), f"{file} must start with its command and cost"
        assert yaml.safe_load(file.read_text())
