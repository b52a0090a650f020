"""Text that a user writes for a path, a folder's name or a count."""

import os
import re
from pathlib import Path

from jaxprompt.config.errors import UserError, shown


def is_count(text: str) -> bool:
    """Whether a text from outside is a whole number that ``int`` reads, in plain digits.

    >>> [is_count(text) for text in ("12", "²", "١٢", "-1", "")]
    [True, False, False, False, False]
    """
    return re.fullmatch("[0-9]{1,9}", text) is not None


def as_folder(name: str, what: str) -> str:
    """``name``, which is to be that of a folder: of one, inside the folder that it is made in.

    Raises UserError for any other; ``what`` it names is for the message ("task", "backbone").
    """
    if not re.fullmatch(r"\w[\w.+-]{0,99}", name):
        raise UserError(
            f"The {what} name {shown(name)} is to be that of a directory; use letters, digits, "
            "'_', '.', '+' and '-', at most 100, and begin with a letter, a digit or '_'."
        )
    return name


def expanded(path: str | Path) -> str:
    """A path of a user with ``~`` and ``~name`` written out, as a shell would do it.

    Every path that a config, an option or a variable of the environment names goes through here.

    Raises:
        UserError: there is no such user, or no file can have this name.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"{shown(path)} is not the name of a file; give text or a pathlib.Path")
    text = str(path)
    try:
        if "\0" in text:
            raise ValueError
        os.fsencode(text)
    except ValueError:
        raise UserError(f"{shown(text)} cannot be the name of a file; name another one") from None
    first = text.split("/", 1)[0]
    if not first.startswith("~"):
        return text
    home = os.path.expanduser(first)
    if home == first:
        raise UserError(
            f"{shown(text)} begins with the home directory {shown(first)}, and there is none; "
            "write it out, or begin with ./ if that is the name of a file"
        )
    return home + text[len(first) :]


def looked_in(path: Path) -> str:
    """For a message about a path that is not there: where it was looked for."""
    if path.is_absolute():
        return ""
    return f" in {Path.cwd()} (paths start from the directory that the command runs in)"
