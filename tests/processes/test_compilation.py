import os
import subprocess
import sys

import pytest

from jaxprompt.runtime.compilation import keep_compiled

PROGRAM = """
from jaxprompt.runtime.compilation import keep_compiled
keep_compiled()
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(
    lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None
)
print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones(7))), len(hits))
"""


def run(**changes):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    done = subprocess.run(command, env=environment | changes, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    value, hits = done.stdout.split()
    return float(value), int(hits), done.stderr


def test_the_second_process_compiles_nothing(tmp_path):
    first, again = (run(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    assert first[0] == again[0] and first[1] == 0 and again[1] > 0
    assert again[2] == ""  # no warning about the processor
    (folder,) = (tmp_path / "jaxprompt" / "compiled").iterdir()
    for file in folder.glob("*-cache"):
        file.write_bytes(b"damaged")
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-c", PROGRAM]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout.split()[0]) == first[0]


@pytest.mark.parametrize(
    ("environment", "kept"),
    [
        ({}, True),
        ({"JAXPROMPT_CACHE": "off"}, False),
        ({"JAXPROMPT_CACHE": "{tmp}/mine"}, True),
        ({"JAXPROMPT_CACHE": "{tmp}/file"}, False),  # a file: nothing can be written there
        ({"JAX_COMPILATION_CACHE_DIR": "own"}, False),
    ],
)
def test_where_programs_are_kept(tmp_path, capsys, environment, kept):
    (tmp_path / "file").write_text("")
    given = {k: v.format(tmp=tmp_path) for k, v in environment.items()}
    found = {"XDG_CACHE_HOME": str(tmp_path / "home"), **given}
    before = dict(found)
    keep_compiled(found)
    assert (found != before) == kept
    told = capsys.readouterr().err
    assert ("nothing can be written" in told) == environment.get("JAXPROMPT_CACHE", "").endswith(
        "/file"
    )
    if kept:
        place = given.get("JAXPROMPT_CACHE", str(tmp_path / "home" / "jaxprompt"))
        assert found["JAX_COMPILATION_CACHE_DIR"].startswith(f"{place}/compiled/")
        assert os.path.isdir(found["JAX_COMPILATION_CACHE_DIR"])
