"""The options that the scripts of this folder have in common: a prompt, its backbone, a server."""

import argparse
from pathlib import Path
from typing import Any

from servers import Cores
from stages import Setup


def common_options(doc: str | None, out: str, server: str = "") -> argparse.ArgumentParser:
    """A parser to which a script adds its own options.

    Args:
        doc: the script's docstring.
        out: the folder of results, if the command line names none.
        server: options of ``jaxprompt serve``, if the command line names none.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artefact", type=Path, default=Path("runs/quickstart/prompt"))
    parser.add_argument("--backbone", default="builtin")
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--server", default=server, help="further options of `jaxprompt serve`")
    return parser


def setup_of(given: argparse.Namespace, **more: Any) -> Setup:
    """What stages share. The folder of results is made.

    Args:
        given: what a parser of ``common_options`` read.
        more: fields of ``Setup``; else loads last a second, once, on any cores.
    """
    given.out.mkdir(parents=True, exist_ok=True)
    own = {"seconds": 1.0, "rounds": 1, "cores": Cores("", "")} | more
    return Setup(
        artefact=given.artefact, out=given.out, backbone=given.backbone,
        server_options=tuple(given.server.split()), **own,
    )  # fmt: skip
