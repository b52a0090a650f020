"""What ``jaxprompt reproduce`` is given: tasks, named paths, settings of runs."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxprompt.config.errors import UserError
from jaxprompt.config.methods import parts_of
from jaxprompt.config.names import RENAMED
from jaxprompt.config.overrides import override_value, read_config, set_value
from jaxprompt.config.paths import as_folder
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.studies.runs import RECIPES, Settings


class StudyOptions(NamedTuple):
    """What a study is of. An option that is not given has the study's default."""

    backbones: dict[str, str]  # name -> path
    tasks: Sequence[str] = ()
    seeds: int | None = None
    length: int | None = None
    recipe: str | None = None
    settings: Settings = {}
    span: str | None = None
    adapted: dict[str, int] = {}
    methods: Sequence[str] = ()
    rows: Sequence[int] | None = None


def read_task(name: str) -> TaskConfig:
    """A task by name, or of a YAML file that is a task or a run."""
    if not name.endswith((".yaml", ".yml")):
        return resolve_task(name)
    values = read_config(name)
    return resolve_task(values.get("task", values))


def named(texts: Sequence[str]) -> dict[str, str]:
    """From ["a=1", "b"] to a mapping. A path without a name is named by its last part."""
    paths = {}
    for text in texts:
        name, equals, path = text.partition("=")
        name, path = (name, path) if equals else (re.split(r"[/\\]", text.rstrip("/\\"))[-1], text)
        if not name or not path or name in paths:
            raise UserError(f"{text!r} must have the form name=path, each name once.")
        paths[as_folder(name, "backbone")] = path
    return paths


def read_overrides(overrides: Sequence[str]) -> Settings:
    """``key=value`` settings of runs as a flat mapping. Each is checked to be a setting of a run.

    ``prompt:key=value`` and ``full:key=value`` are settings of one method's runs, and so is
    ``lora:key=value`` in the study of methods.
    """
    settings: Settings = {}
    runs: dict[str, Settings] = {"prompt": {}, "full": {}}
    others: dict[str, Settings] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        method, _, setting = key.rpartition(":")
        if method not in ("", *runs) and not _is_method(method):
            raise UserError(
                f"Setting {override!r}: {method!r} is neither prompt nor full, and no method."
            )
        for name in (method,) if method else runs:
            values = runs[name] if name in runs else others.setdefault(name, {"method": name})
            set_value(values, override.removeprefix(f"{method}:"))
        renamed = key.removesuffix(setting) + RENAMED.get(setting, setting)
        settings[renamed] = override_value(text, key)
    for values in (*runs.values(), *others.values()):
        parse(RunConfig, {"task": "any", "output": "any", **values})
    return settings


def _is_method(name: str) -> bool:
    try:
        parts_of(name)
    except UserError:
        return False
    return True


def check_recipe(name: str) -> None:
    """Refuse a recipe that does not exist."""
    if name not in RECIPES:
        raise UserError(f"--recipe is {name!r}; allowed are {', '.join(RECIPES)}.")
