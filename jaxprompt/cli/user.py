"""The command that manages a library of users' prompts."""

from pathlib import Path
from typing import Annotated

import typer

from jaxprompt.cli.options import BackboneOption, at_home
from jaxprompt.cli.output import print_json
from jaxprompt.config.errors import UserError

ACTIONS = ("add", "remove", "name")


def user(
    action: Annotated[str, typer.Argument(help="add, remove or name")],
    library: Annotated[
        Path, typer.Argument(callback=at_home, help="users/ of a run with users in its config")
    ],
    id: Annotated[str, typer.Option(help="the user, as the column of the data names him")],
    data: Annotated[
        Path | None, typer.Option(callback=at_home, help="add: rows of this user (.jsonl .csv ...)")
    ] = None,
    backbone: BackboneOption = None,
) -> None:
    """Add a user's prompt to a library, remove it, or tell the name that a server knows it by.

    \b
    jaxprompt user add runs/my/users --id 4711 --data rows.jsonl
    jaxprompt user name runs/my/users --id 4711
    jaxprompt user remove runs/my/users --id 4711
    """
    from jaxprompt.methods.user_library import open_library

    if action not in ACTIONS:
        raise UserError(f"{action!r} is no action on a user; use add, remove or name.")
    if not id:
        raise UserError("--id is empty; give the user as the column of the data names him.")
    if (data is not None) != (action == "add"):
        raise UserError("--data has the rows of a user to add; give it for add alone.")
    opened = open_library(library)
    result: dict[str, object] = {"name": opened.name_of(id)}
    if action == "add":
        from jaxprompt.runtime import devices

        assert opened.config.users is not None
        devices.start([opened.config.users.rows])
        from jaxprompt.training.add_user import add_user

        result |= add_user(opened, id, str(data), backbone)
    elif action == "remove":
        result["removed"] = opened.remove(id)
    else:
        result["own_prompt"] = opened.prompt_of(id) != opened.shared_prompt
    print_json(result)
