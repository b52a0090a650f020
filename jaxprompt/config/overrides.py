"""From a YAML file and key=value overrides to a checked config, and back to YAML."""

import difflib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from pydantic import (
    BaseModel,
)

from jaxprompt.config import yaml12
from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.methods import recipe_of
from jaxprompt.config.names import current_key, current_names
from jaxprompt.config.paths import expanded, looked_in
from jaxprompt.config.schema import RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.config.values import Value, Values


def _packaged_folder(package: Path) -> Path:
    """The folder with the configs of the package.

    In a clone it is a link to the repository's configs/, and a wheel has the files themselves.
    Where links are not kept, as in a downloaded archive or on Windows, a file stands in its place.
    """
    folder = package / "builtin" / "configs"
    return folder if folder.is_dir() else package.parent / "configs"


PACKAGED = _packaged_folder(Path(__file__).parent.parent)


def read_yaml(text: str, where: str) -> Value:
    """Parse YAML (1.2 scalars) without executing anything; ``where`` names the text in errors."""
    try:
        return yaml12.load(text)
    except (yaml12.Error, ValueError, RecursionError) as error:
        problem = " ".join(str(error)[:1000].split())[:300]
        raise UserError(f"{where} is not valid YAML: {problem}.") from None


def override_value(text: str, key: str) -> Value:
    """What stands behind ``key=`` on a command line: a number, a list, else the text as typed.

    Lists and mappings are written as in YAML, ``[yes, no]`` and ``{name: boolq}``; in quotes of
    their own, numbers are text and escapes are understood. Nothing is ``null``. Everything else is
    text to the last character: it holds no comments and no further keys.
    """
    kept = text.strip()
    if kept[:1] in ("[", "{", "'", '"'):
        try:
            value = yaml12.load_flow(kept)
            return text if value == kept else value
        except (yaml12.Error, ValueError, RecursionError) as error:
            # "[prompt:10] {text}" is a template, "[1, 2" is no list
            if kept[0] in "[{" and any(kept.count(a) != kept.count(b) for a, b in ("[]", "{}")):
                problem = " ".join(str(error)[:1000].split())[:300]
                raise UserError(f"The value of {key!r} is not valid YAML: {problem}.") from None
            return text
    try:
        return yaml12.scalar(text)
    except yaml12.Error as error:
        raise UserError(f"The value of {key!r} is not usable: {str(error).strip()}.") from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run from a YAML file and apply ``key=value`` overrides such as ``train.steps=100``.

    Args:
        path: The file, or the name of a config of the package, such as ``quickstart``.
        overrides: Settings that replace those of the file, in their order.
    """
    return parse(RunConfig, read_config(path, overrides))


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Values:
    """The values of a YAML file with ``key=value`` overrides applied, not yet validated."""
    path = _config_file(path)
    if path.stat().st_size > 4 * yaml12.LONGEST:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, more than any config; name a YAML file such "
            "as those in configs/."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}.") from None
    values = read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of keys, such as 'task: supersense'.")
    try:  # before the overrides, which may use the other spelling
        values = current_names(values)
    except UserError as error:
        raise UserError(f"{path}: {error}.") from None
    _drop_other_recipe(values, overrides, path)
    for override in overrides:
        set_value(values, override)
    return values


def _drop_other_recipe(values: Values, overrides: Sequence[str], path: Path) -> None:
    """Drop the file's learning rate, optimizer and the like where an override changes the method.

    They suit the method of the file. The recipe of the other method takes their place.
    """
    methods = [value for key, _, value in (text.partition("=") for text in overrides)
               if key == "method"]  # fmt: skip
    train = values.get("train")
    if not methods or methods[-1] == values.get("method", "prompt-tuning"):
        return
    dropped = recipe_of(methods[-1]).get("train", {}).keys() & {*(train or ())}
    if dropped and isinstance(train, dict):
        values["train"] = {key: value for key, value in train.items() if key not in dropped}
        keys = ", ".join(f"train.{key}" for key in sorted(dropped))
        warnings.warn(
            f"{path} has {keys} for another method; method={methods[-1]} has a recipe of its own, "
            "which replaces them; set them on the command line to have other values",
            FutureWarning,
            stacklevel=4,
        )


def packaged_configs() -> list[str]:
    """The names of the configs that are part of the package: quickstart, paper/base, ..."""
    files = sorted(PACKAGED.glob("*.yaml")) + sorted(PACKAGED.glob("*/*.yaml"))
    return [file.relative_to(PACKAGED).with_suffix("").as_posix() for file in files]


def _config_file(path: str | Path) -> Path:
    """The file at a path, else the packaged config of that name.

    Raises:
        UserError: there is neither.
    """
    file = Path(expanded(path))
    if file.is_file():
        return file
    known = packaged_configs()
    if str(path) in known:
        return PACKAGED / f"{path}.yaml"
    meant = str(path).removeprefix("configs/").removesuffix(".yaml")
    close = difflib.get_close_matches(meant[:80], known, n=1)
    hint = f": did you mean {close[0]!r}?" if close else f", such as {', '.join(known[:3])}."
    if not known:
        raise UserError(
            f"No config file at {shown(str(file))}{looked_in(file)}, and this copy of the package "
            "has no configs of its own; give the path of a YAML file, or install the package again."
        )
    raise UserError(
        f"No config file at {shown(str(file))}{looked_in(file)}; give the path of a YAML file, or "
        f"the name of a config of the package{hint}"
    )


def set_value(values: Values, override: str) -> None:
    """Apply ``key=value``; a key is a path such as ``train.steps`` or ``text.0.train``."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(
            f"Override {shown(override)} must have the form key=value, e.g. train.steps=100."
        )
    key = current_key(key)
    *parents, last = key.split(".")
    inside: Value = values
    for depth, parent in enumerate(parents):
        place = _place(inside, parent, key)
        inner = inside[place] if isinstance(place, int) else inside.get(place)
        if isinstance(inner, str) and depth == 0 and parent == "task":
            inner = {"name": inner}  # `task: supersense` with `task.max_input_length=64`
        inside[place] = inner = {} if inner is None else inner
        if not isinstance(inner, dict | list):
            raise UserError(
                f"Override {shown(key)}: {parent!r} is {shown(inner)}, which has no keys inside."
            )
        inside = inner
    inside[_place(inside, last, key)] = override_value(text, key)


def _place(inside: Values | list[Value], part: str, key: str) -> str | int:
    """A key of a mapping, or the number of a list's item."""
    if isinstance(inside, dict):
        return part
    if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(inside):
        raise UserError(
            f"Override {shown(key)}: {shown(part)} names no item of a list of {len(inside)}; items "
            "are numbered from 0."
        )
    return int(part)


def dump_yaml(config: BaseModel) -> str:
    """The config as YAML text that ``load_config`` reads back to an equal object."""
    return yaml12.dump(config.model_dump())
