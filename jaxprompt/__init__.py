"""Soft prompt tuning of frozen T5 and decoder-only models in JAX.

    import jaxprompt as jp
    backbone = jp.load_backbone("builtin")
    prompt = jp.load_prompt("runs/supersense/prompt")
    jp.predict(prompt, [{"gloss": "a large cat with stripes"}], backbone=backbone)

Names are loaded when they are first used, so that ``import jaxprompt`` costs nothing.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING

from jaxprompt import moved

if TYPE_CHECKING:
    from jaxprompt.api import evaluate, inspect, merge, open_session, predict, score, train
    from jaxprompt.config.errors import UserError
    from jaxprompt.config.overrides import load_config
    from jaxprompt.config.schema import RunConfig, TaskConfig
    from jaxprompt.methods.artefact import (
        Prompt,
        load_prompt,
        save_adapterhub,
        save_peft,
        save_prompt,
    )
    from jaxprompt.models.checkpoints.export import save_backbone
    from jaxprompt.models.checkpoints.load import Backbone, load_backbone
    from jaxprompt.serving.client import Client, ServerError
    from jaxprompt.training.metric_log import NullReporter, Reporter

__version__ = "0.1.0"

_HOMES = {
    "jaxprompt.api": ("evaluate", "inspect", "merge", "open_session", "predict", "score", "train"),
    "jaxprompt.config.errors": ("UserError",),
    "jaxprompt.config.overrides": ("load_config",),
    "jaxprompt.config.schema": ("RunConfig", "TaskConfig"),
    "jaxprompt.models.checkpoints.export": ("save_backbone",),
    "jaxprompt.models.checkpoints.load": ("Backbone", "load_backbone"),
    "jaxprompt.methods.artefact": (
        "Prompt", "load_prompt", "save_adapterhub", "save_peft", "save_prompt"
    ),
    "jaxprompt.serving.client": ("Client", "ServerError"),
    "jaxprompt.training.metric_log": ("NullReporter", "Reporter"),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Backbone", "Client", "NullReporter", "Prompt", "Reporter", "RunConfig", "ServerError",
    "TaskConfig", "UserError", "evaluate", "inspect", "load_backbone", "load_config", "load_prompt",
    "merge", "open_session", "predict", "save_adapterhub", "save_backbone", "save_peft",
    "save_prompt", "score", "train",
]  # fmt: skip


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'jaxprompt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


class _Package(types.ModuleType):
    """A package whose public names are never replaced by a module of the same name.

    Python sets a submodule as an attribute of its package when it is imported. Without this, a
    submodule called ``train`` would hide the function ``train`` from then on.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
moved.install()
