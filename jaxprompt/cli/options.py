"""Options that several commands share, and how a command takes a group of them as one argument."""

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from jaxprompt.config.errors import UserError
from jaxprompt.config.limits import MOST_ROWS
from jaxprompt.config.paths import expanded


def at_home(path: Path | Sequence[Path] | None) -> Path | list[Path] | None:
    """A path, or several, with ``~`` written out: shells do not do it behind ``--output=``.

    Raises:
        UserError: the path is ``-``, which many commands take for a standard stream.
    """
    if isinstance(path, list | tuple):
        return [_at_home(one) for one in path]
    return None if path is None else _at_home(typing.cast(Path, path))


def _at_home(path: Path | str) -> Path:
    if str(path) == "-":
        raise UserError(
            "'-' is not read as a standard stream: name /dev/stdout for standard output, or ./- "
            "for a file of this name."
        )
    return Path(expanded(path))


ConfigArgument = Annotated[
    Path,
    typer.Argument(
        callback=at_home, help="YAML file of the run, or a packaged one: quickstart, paper/base"
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(help="key=value, e.g. train.steps=100; `jaxprompt settings` lists all"),
]
PromptArgument = Annotated[
    Path, typer.Argument(callback=at_home, help="artefact, adapter of PEFT or AdapterHub, or .npy")
]
BackboneOption = Annotated[
    str | None,
    typer.Option(
        help="hub id, directory, T5X or GGUF file, builtin, smollm2; default: the prompt's"
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        help="a built-in task, or keys to change in the prompt's own: '{calibration: batch}'; "
        "default: the prompt's own"
    ),
]
BatchOption = Annotated[int, typer.Option(min=1, max=MOST_ROWS, help="rows in a batch")]
RowsOutput = Annotated[
    Path,
    typer.Option(
        callback=at_home, help="rows with answers (.jsonl .csv .tsv .parquet, /dev/stdout)"
    ),
]


class Loading(NamedTuple):
    """Which backbone a prompt is used with."""

    backbone: BackboneOption = None
    tokenizer: Annotated[
        str | None,
        typer.Option(help="hub id or directory; default: the prompt's, or beside the weights"),
    ] = None
    any_backbone: Annotated[bool, typer.Option(help="allow other weights of the same width")] = (
        False
    )


def _is_group(annotation: object) -> bool:
    """Whether a parameter stands for several options: it is a NamedTuple."""
    return isinstance(annotation, type) and hasattr(annotation, "_fields")


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer is to see it: each field of a group is an option of its own.

    A parameter whose type is a NamedTuple is a group. Its fields are annotated as typer's options
    are, and their defaults are the options' defaults.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for parameter in inspect.signature(command).parameters.values():
        group = hints[parameter.name]
        if not _is_group(group):
            parameters.append(
                parameter.replace(
                    kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name]
                )
            )
            continue
        groups[parameter.name] = group
        for name, hint in typing.get_type_hints(group, include_extras=True).items():
            default = group._field_defaults.get(name, inspect.Parameter.empty)
            parameters.append(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint
                )
            )

    @functools.wraps(command)
    def run(**options: object) -> None:
        for name, group in groups.items():
            options[name] = group(**{key: options.pop(key) for key in group._fields})
        command(**options)

    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
