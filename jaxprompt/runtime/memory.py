"""Huge pages for the memory in which a CPU computes.

XLA asks for the temporary memory of every call anew and gives it back at its end; in pages of 4 KB
that is a hundred thousand page faults a training step. glibc (2.35 on) can ask for pages of 2 MB
instead, but reads whether it should only when a process begins.
"""

import contextlib
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

# "always [madvise] never": the pages are there for those who ask
_POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLE = "glibc.malloc.hugetlb"


def huge_pages(
    environment: Mapping[str, str] = os.environ, policy: Path = _POLICY
) -> dict[str, str]:
    """The variables that make a new process compute in huge pages.

    There are none where the system has no huge pages or gives them to everyone, and where
    GLIBC_TUNABLES names them already (``glibc.malloc.hugetlb=0`` turns them off). Other tunables
    are kept.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if _TUNABLE in tunables or platform.libc_ver()[0] != "glibc":
        return {}
    try:
        offered = "[madvise]" in policy.read_text()
    except OSError:
        return {}
    return (
        {"GLIBC_TUNABLES": ":".join(filter(None, [tunables, f"{_TUNABLE}=1"]))} if offered else {}
    )


def start_again_with_huge_pages(policy: Path = _POLICY) -> None:
    """Replace this process by the same one with huge pages, if it has none; call it first of all.

    The process keeps its number, its files and its arguments. Where the system refuses, the
    process goes on as it is.
    """
    added = huge_pages(os.environ, policy)
    if not added or not sys.executable:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **added})
