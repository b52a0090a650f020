"""Huge pages: who gets them, and that the command starts itself with them once."""

import json
import os
import platform
import subprocess
import sys

import pytest

from jaxprompt.runtime.memory import huge_pages

GLIBC = platform.libc_ver()[0] == "glibc"
TUNABLE = "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    ("policy", "told", "expected"),
    [
        ("always [madvise] never", "", TUNABLE),
        ("always [madvise] never", "glibc.malloc.check=0", f"glibc.malloc.check=0:{TUNABLE}"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", None),  # the user's own word
        ("always [madvise] never", TUNABLE, None),
        ("[always] madvise never", "", None),
        ("always madvise [never]", "", None),
        (None, "", None),  # a kernel without them
    ],
)
def test_they_are_asked_for_where_that_helps(tmp_path, policy, told, expected):
    file = tmp_path / "enabled"
    if policy is not None:
        file.write_text(policy)
    found = huge_pages({"GLIBC_TUNABLES": told} if told else {}, file)
    assert found == ({"GLIBC_TUNABLES": expected} if expected and GLIBC else {})


PROGRAM = """
import json, os, sys
from pathlib import Path
from jaxprompt.runtime import memory
print("started", flush=True)
memory.start_again_with_huge_pages(Path(sys.argv[1]))
print(json.dumps([sys.argv[1:], os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.flags.dev_mode]))
"""


@pytest.mark.skipif(not GLIBC, reason="huge pages are asked for through glibc")
def test_a_process_starts_again_once_and_stays_what_it_was(tmp_path):
    policy = tmp_path / "enabled"
    policy.write_text("always [madvise] never")
    kept = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-X", "dev", "-c", PROGRAM, str(policy), "a b", "--c=\u00e4"]
    with subprocess.Popen(command, env=kept, stdout=subprocess.PIPE, text=True) as process:
        out = process.communicate()[0].splitlines()
    assert process.returncode == 0 and out[:2] == ["started", "started"] and len(out) == 3
    given = [str(policy), "a b", "--c=\u00e4"]
    assert json.loads(out[2]) == [given, process.pid, TUNABLE, True]
