"""Commands that take a tuned prompt elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from jaxprompt.cli.options import BackboneOption, PromptArgument, at_home
from jaxprompt.cli.output import print_json


def export(
    prompt: PromptArgument,
    output: Annotated[Path, typer.Option(callback=at_home, help="a folder for the result")],
    backbone: BackboneOption = None,
) -> None:
    """Write OUTPUT/adapter for PEFT and, of a backbone that only jaxprompt knows, OUTPUT/backbone
    for transformers. Prints where they are, as one JSON object.

    \b
    jaxprompt export runs/my/prompt --output exported
    """
    from jaxprompt.methods.artefact import load_prompt, save_peft
    from jaxprompt.models.checkpoints.export import save_backbone
    from jaxprompt.models.checkpoints.hub import only_here

    loaded = load_prompt(prompt)
    base = backbone or loaded.facts.get("backbone", {}).get("source")
    if base is not None and only_here(base):
        from jaxprompt.runtime import devices

        devices.start()
        save_backbone(output / "backbone", base)
        base = str((output / "backbone").absolute())
    save_peft(output / "adapter", loaded, base_model=base)
    print_json({"adapter": str(output / "adapter"), "backbone": base})
