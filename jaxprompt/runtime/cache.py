"""The cache folder: it holds what can be computed again (compiled programs, ids of texts)."""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from jaxprompt.config.errors import UserError
from jaxprompt.config.paths import expanded

# what JAXPROMPT_CACHE may say instead of a directory
_OFF = ("0", "off", "no", "false")


def cache_folder(name: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The folder ``name`` of the cache, which is made if it is missing; None where there is none.

    JAXPROMPT_CACHE is a directory or ``off``; the default is ``jaxprompt`` in XDG_CACHE_HOME or
    ``~/.cache``. There is no cache where it is off or cannot be written to.
    """
    wanted = environment.get("JAXPROMPT_CACHE", "")
    if wanted.lower() in _OFF:
        return None
    if wanted:
        root = Path(expanded(wanted))
    else:
        try:
            root = Path(expanded(environment.get("XDG_CACHE_HOME") or "~/.cache"), "jaxprompt")
        except UserError:  # a user without a home, as in a container
            return None
    folder = root / name
    if _writable(folder):
        return folder
    if wanted:
        print(
            f"warning: JAXPROMPT_CACHE is {wanted!r}, where nothing can be written; name a "
            "directory, or say off",
            file=sys.stderr,
        )
    return None


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except (OSError, ValueError):
        return False
