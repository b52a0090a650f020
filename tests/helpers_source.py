"""The package's source as syntax trees, each parsed once however many tests walk it."""

import ast
import functools
from pathlib import Path


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of the file's tree."""
    return tuple(ast.walk(ast.parse(path.read_text())))
