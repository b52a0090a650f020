"""What commands write: JSON on standard output, files of rows, a line on the devices."""

import json
import sys
from pathlib import Path


def print_json(value: object) -> None:
    """Print a value readably, with escapes where standard output cannot show a character."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(text)


def say(text: str) -> None:
    """A line on standard error, which a person watches."""
    print(text, file=sys.stderr, flush=True)


def say_devices() -> None:
    """A line on what computes, so that a GPU that is not used is noticed."""
    import jax

    from jaxprompt.runtime import devices

    if jax.process_index() == 0:
        say(f"computing on {devices.describe()}")


def files_of(prompt: Path | None) -> list[Path]:
    """The files of a prompt, none of which may be an output."""
    if prompt is None:
        return []
    return [prompt, *prompt.iterdir()] if prompt.is_dir() else [prompt]


def check_rows_output(path: Path, inputs: list[Path]) -> int | None:
    """``files.check_output`` for a file of rows, whose name says a format.

    Raises:
        UserError: the file cannot be written, is one of the inputs, or its name says no format.
    """
    from jaxprompt.data.writers import format_of
    from jaxprompt.runtime.files import check_output

    format_of(path)
    return check_output(path, inputs)
