"""What the scripts that compare with PEFT share: their options, and how a mistake ends."""

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from bench_tools import Worker, WorkerEnded

from jaxprompt.config.errors import UserError


def peft_parser(about: str | None) -> argparse.ArgumentParser:
    """A parser with OUT and the interpreter of PEFT's half."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--python", required=True, help="an interpreter with torch, transformers and peft"
    )
    return parser


@contextlib.contextmanager
def comparing(options: argparse.Namespace) -> Iterator[None]:
    """Make OUT and do the work; a mistake or a worker's end is one sentence and exit code 2."""
    try:
        if shutil.which(options.python) is None:
            raise UserError(f"--python {options.python!r} is no program; name an interpreter.")
        options.out.mkdir(parents=True, exist_ok=True)
        yield
    except (UserError, WorkerEnded) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def check_packages(worker: Worker, python: str) -> None:
    """Refuse an interpreter that cannot do PEFT's half."""
    if "missing" in worker.facts:
        raise UserError(
            f"--python {python!r} lacks the package {worker.facts['missing']!r}; install the extra "
            "`parity` there."
        )
