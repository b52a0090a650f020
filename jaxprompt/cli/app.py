"""The command ``jaxprompt``: which commands there are, and what ends them.

Machine output goes to standard output or a file, everything a person watches to standard error.
A user's mistake is one sentence and exit code 2. Heavy libraries are imported by the command that
needs them, so that ``--help`` answers at once.
"""

import os
import sys
import warnings
from typing import Annotated

import typer

from jaxprompt import __version__
from jaxprompt.cli import (
    artefacts,
    compare,
    discover,
    inspect,
    library,
    play,
    serve,
    studies,
    train,
    use,
    user,
)
from jaxprompt.cli.errors import check_form, end_command, show_warning
from jaxprompt.cli.options import with_groups
from jaxprompt.runtime.compilation import keep_compiled

app = typer.Typer(
    help="Soft prompt tuning of frozen T5 and decoder-only models in JAX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"jaxprompt {__version__}")
        raise typer.Exit()


@app.callback()
def before_any_command(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="print it")
    ] = False,
) -> None:
    """Nothing is written where only help is wanted."""
    keep_compiled()
    # a hub that does not answer is one sentence of ours, not twenty lines on each new try
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")


for name, command in {
    "init": discover.init,
    "train": train.train,
    "pretrain": train.pretrain,
    "plan": train.plan,
    "eval": use.evaluate,
    "compare": compare.compare,
    "predict": use.predict,
    "play": play.play,
    "score": use.score,
    "inspect": inspect.inspect,
    "similar": use.similar,
    "export": artefacts.export,
    "merge": artefacts.merge,
    "push": artefacts.push,
    "library": library.library,
    "user": user.user,
    "serve": serve.serve,
    "reproduce": studies.reproduce,
    "tasks": discover.tasks,
    "backbones": discover.backbones,
    "settings": discover.settings,
}.items():
    app.command(name)(with_groups(command))


def main() -> None:
    """Run a command; turn a user's mistake into one sentence and exit code 2."""
    warnings.showwarning = show_warning
    try:
        check_form(sys.argv[1:])
        try:
            app(standalone_mode=True)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python will flush what is left
        sys.exit(2)
    except Exception as error:
        end_command(error)


if __name__ == "__main__":
    main()
