"""The command that makes a library of prompts, with a router that chooses among them."""

from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from jaxprompt.cli.options import BackboneOption, at_home
from jaxprompt.cli.output import print_json, say
from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.paths import expanded


class RouterOptions(NamedTuple):
    """How the router of a library is made."""

    rows: Annotated[int, typer.Option(min=4, help="training rows of a task, for its mean")] = 256
    held_out: Annotated[
        int, typer.Option(min=1, help="validation rows of a task, for thresholds")
    ] = 128
    inside: Annotated[
        float, typer.Option(min=0.5, max=1.0, help="share of a task's rows that are near enough")
    ] = 0.99
    wrong: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="share of routed rows that may go wrong")
    ] = 0.05


def library(
    folder: Annotated[Path, typer.Argument(callback=at_home, help="the library's directory")],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="[NAME=]PROMPT: prompts to copy into it")
    ] = None,
    backbone: BackboneOption = None,
    options: RouterOptions = RouterOptions(),
) -> None:
    """Collect prompts in a directory, with the statistics by which a server chooses among them.

    A prompt without a name has that of its task. Statistics are those of the task's rows in the
    bare backbone; they are in router.safetensors, and router.json tells people of them. Only those
    of new prompts are made, and those of removed ones go. Prints what there is, as one JSON object.

    \b
    jaxprompt library prompts runs/spam/prompt words=runs/supersense/prompt
    rm -r prompts/words && jaxprompt library prompts
    """
    from jaxprompt.runtime import devices

    named = named_prompts(prompts or [])
    devices.start()
    from jaxprompt.serving.library import add_prompts, collect
    from jaxprompt.serving.router import Settings

    if named:
        add_prompts(folder, named)
    collected = collect(
        folder, backbone, rows=options.rows, held_out=options.held_out,
        settings=Settings(options.inside, options.wrong), say=say,
    )  # fmt: skip
    router = collected.router
    right = router.confusion().diagonal() if router.names else []
    print_json(
        {
            "library": str(folder),
            "prompts": {
                name: {"rows": task.rows, "routed_right": round(float(share), 4)}
                for (name, task), share in zip(router.tasks.items(), right, strict=True)
            },
            "added": collected.added,
            "removed": collected.removed,
            "left_out": collected.left_out,
        }
    )


def named_prompts(texts: list[str]) -> dict[str, Path]:
    """Prompts by name, from texts [NAME=]PROMPT; without a name it is that of the prompt's task.

    Raises:
        UserError: a name is there twice, or a prompt without a name says nothing of its task.
    """
    from jaxprompt.methods.artefact import load_prompt
    from jaxprompt.serving.store import check_name

    named: dict[str, Path] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        path = Path(expanded(place if equals and not Path(text).exists() else text))
        if not equals or Path(text).exists():
            task = load_prompt(path).metadata.get("task", {}).get("name")
            if not task:
                raise UserError(
                    f"{shown(text)} does not say which task it is for; give NAME={text}."
                )
            name = task.lower()
        if check_name(name) in named:
            raise UserError(f"Two prompts are named {shown(name)}; give each a name of its own.")
        named[name] = path
    return named
