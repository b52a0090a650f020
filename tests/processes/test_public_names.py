"""The public Python names are what they are, whatever was imported or used before."""

import itertools
import subprocess
import sys

import pytest

import jaxprompt as jp
from jaxprompt.models.checkpoints import load
from jaxprompt.moved import MOVED

MODULES = ["jaxprompt.training.loop", "jaxprompt.inference.predict", "jaxprompt.api"]
FUNCTIONS = [name for name in jp.__all__ if name[0].islower()]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("order", list(itertools.permutations(MODULES)), ids=lambda o: o[0])
def test_public_functions_stay_functions_in_every_order_of_import(order):
    code = "import importlib, inspect, jaxprompt as jp\n"
    for module in (None, *order):
        code += f"importlib.import_module({module!r})\n" if module else ""
        code += f"assert all(inspect.isfunction(getattr(jp, n)) for n in {FUNCTIONS})\n"
    code += "from jaxprompt import evaluate, train\nassert inspect.isfunction(train)\n"
    code += "assert inspect.isfunction(evaluate)\n"
    run(code)


@pytest.mark.parametrize("first", FUNCTIONS)
def test_a_name_is_the_same_object_each_time(first):
    code = f"import jaxprompt as jp\nfirst = jp.{first}\n"
    code += f"assert all(callable(getattr(jp, n)) for n in {FUNCTIONS} for _ in 'ab')\n"
    run(code + f"assert jp.{first} is first\nfrom jaxprompt import {first} as again\n"
        "assert again is first")  # fmt: skip


def test_every_public_name_exists_and_is_listed():
    assert {name for name in jp.__all__ if getattr(jp, name) is None} == set()
    assert sorted(jp.__all__, key=str.lower) == sorted(jp._HOME, key=str.lower)
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        jp.tarin  # noqa: B018  # pyright: ignore


@pytest.mark.parametrize("old", MOVED)
def test_old_names_of_modules_import_with_a_warning_and_hide_no_function(old):
    new, name = MOVED[old], old.rpartition(".")[2]
    code = (
        "import importlib, inspect, warnings, sys, jaxprompt as jp\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n"
        f"    old = importlib.import_module({old!r})\n"
        f"new = importlib.import_module({new!r})\n"
        "assert old is new, (old, new)\n"
        f"assert new.__name__ == {new!r} and new.__spec__.name == {new!r}\n"
        f"assert any({new!r} in str(w.message) for w in told)\n"
        f"assert {name!r} not in jp.__all__ or inspect.isfunction(jp.{name})\n"
    )
    run(code)


def test_a_module_inside_an_old_package_is_the_new_one():
    run(
        "import jaxprompt as jp, inspect\nfrom jaxprompt.train.loop import train\n"
        "import jaxprompt.training.loop as loop\n"
        "assert train is loop.train and inspect.isfunction(jp.train)"
    )


@pytest.mark.parametrize("name", ["save_hf", "fingerprint"])
def test_functions_that_have_moved_out_of_load_are_still_there_with_a_warning(name):
    with pytest.warns(DeprecationWarning, match=f"{name} is now in jaxprompt.models.checkpoints"):
        assert getattr(load, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        load.laod  # noqa: B018  # pyright: ignore


def test_the_package_of_configs_gives_its_names_and_loads_no_schema_before():
    code = "import sys, jaxprompt.config as config\n"
    code += "assert 'jaxprompt.config.schema' not in sys.modules\n"
    code += "from jaxprompt.config import RunConfig, UserError, load_config, parse, shown\n"
    code += "assert all(map(callable, (getattr(config, n) for n in config._HOME)))\n"
    run(code + "assert not hasattr(config, 'tarin')\n")
