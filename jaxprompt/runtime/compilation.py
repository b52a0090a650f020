"""Compiled programs on disk, so that the second start of a run compiles almost nothing.

JAX reads these settings from the environment when it is imported, which is after this.
"""

import hashlib
import os
import platform
from collections.abc import MutableMapping
from pathlib import Path

from jaxprompt.runtime.cache import cache_folder

_LARGEST = 4 * 2**30  # bytes; JAX removes first what was used longest ago


def keep_compiled(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make JAX keep compiled programs in the cache, unless its own settings name a directory.

    Each kind of processor has its own directory, because a program that was compiled for one may
    not run on another one with the same home.
    """
    if "JAX_COMPILATION_CACHE_DIR" in environment:
        return
    folder = cache_folder(f"compiled/{_processor()}", environment)
    if folder is None:
        return
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    environment.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(_LARGEST))
    # small programs too: there are dozens, and each takes a tenth of a second or two
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def _processor() -> str:
    """A name that changes with every property of this processor that a compiler may use."""
    machine = f"{platform.system()} {platform.machine()} {platform.processor()}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    properties = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return hashlib.sha256("\n".join([machine, *sorted(set(properties))]).encode()).hexdigest()[:16]
