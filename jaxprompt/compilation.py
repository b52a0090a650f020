"""Compiled programs kept on disk, so that the second start of a run compiles next to nothing.

JAX reads these settings from the environment when it is imported, which is after this.
"""

import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

# what JAXPROMPT_CACHE may say instead of a directory
_OFF = ("0", "off", "no", "false")
# bytes; what was used longest ago goes first
_LARGEST = 4 * 2**30


def keep_compiled(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have JAX keep compiled programs, unless its own settings or JAXPROMPT_CACHE say otherwise.

    JAXPROMPT_CACHE is a directory or ``off``; the default is ``jaxprompt`` in XDG_CACHE_HOME or
    ``~/.cache``. Processors have directories of their own: what was compiled for one may not run on
    another that shares the home. Where nothing can be written nothing is kept.
    """
    wanted = environment.get("JAXPROMPT_CACHE", "")
    if "JAX_COMPILATION_CACHE_DIR" in environment or wanted.lower() in _OFF:
        return
    home = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    root = Path(wanted).expanduser() if wanted else Path(home, "jaxprompt")
    folder = root / "compiled" / _processor()
    if not _writable(folder):
        if wanted:
            print(
                f"warning: JAXPROMPT_CACHE is {wanted!r}, where nothing can be written; name a "
                "directory, or say off",
                file=sys.stderr,
            )
        return
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    environment.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(_LARGEST))
    # small programs too: there are dozens, and each takes a tenth of a second or two
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def _processor() -> str:
    """A name for all that a compiler may ask of this processor."""
    facts = f"{platform.system()} {platform.machine()} {platform.processor()}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return hashlib.sha256("\n".join([facts, *sorted(set(told))]).encode()).hexdigest()[:16]


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
