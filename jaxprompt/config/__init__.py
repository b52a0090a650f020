"""What a run is asked to do: schemas, YAML with overrides, and what is said of mistakes.

Names are loaded when they are first used: the schema takes a while, and ``--help`` needs none.
"""

import importlib

_HOMES = {
    "errors": ("UserError", "listed", "shown"),
    "overrides": ("dump_yaml", "load_config", "read_config", "read_yaml", "set_value"),
    "schema": (
        "MeshConfig", "ModelConfig", "PromptConfig", "RunConfig", "TaskConfig", "TrainConfig"
    ),
    "validation": ("parse",),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
