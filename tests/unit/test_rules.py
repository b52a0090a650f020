"""Rules that no linter knows: short functions, few parameters, no hidden state."""

import ast
from pathlib import Path

import pytest
from helpers_source import nodes

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "jaxprompt"
MODULES = sorted(PACKAGE.rglob("*.py"))
OTHERS = sorted(path for name in ("scripts", "tests") for path in (ROOT / name).rglob("*.py"))
MOST_LINES, MOST_PARAMETERS, MOST_ANYS, MOST_MODULES = 60, 7, 6, 5


def functions(path: Path):
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    names = [x.arg for x in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


@pytest.mark.parametrize("path", [*MODULES, *OTHERS], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_function_is_short_and_has_few_parameters_and_rebinds_nothing_outside(path):
    for function in functions(path):
        lines = (function.end_lineno or 0) - function.lineno + 1
        count = parameters(function)
        assert lines <= MOST_LINES, f"{function.name} has {lines} lines"
        assert count <= MOST_PARAMETERS, f"{function.name} has {count} parameters"
        hidden = [x for x in ast.walk(function) if isinstance(x, ast.Nonlocal | ast.Global)]
        assert not hidden, f"{function.name} rebinds {hidden[0].names}"


def test_there_is_no_ambient_state():
    users = [p for p in MODULES if "ContextVar" in p.read_text()]
    assert not users


def test_the_loop_has_no_function_inside_a_function():
    for function in functions(PACKAGE / "training" / "loop.py"):
        inner = [x for x in ast.walk(function) if isinstance(x, ast.FunctionDef)][1:]
        assert not inner, f"{function.name} has {inner[0].name} inside"


def test_few_values_are_typed_as_anything():
    names = (x for path in MODULES for x in nodes(path))
    count = sum(isinstance(x, ast.Name) and x.id == "Any" for x in names)
    assert count < MOST_ANYS, f"Any is used {count} times"


def test_few_modules_lie_outside_the_packages():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_MODULES
