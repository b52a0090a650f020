"""Servers for measurements: started on cores of their own, and stopped with what they did."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from load import Answer, Plan

import jaxprompt as jp

LOAD = Path(__file__).with_name("load.py")


class Cores(NamedTuple):
    """Which cores the server and the generator have, as ``taskset -c`` names them."""

    server: str = "0"
    generator: str = "1"


class Server(NamedTuple):
    """A running server."""

    client: jp.Client
    port: int
    process: subprocess.Popen
    start_seconds: float
    cores: Cores

    def metrics(self) -> dict[str, float]:
        """Sums over the labels of each figure in ``/metrics``."""
        found: dict[str, float] = {}
        with urlopen(f"{self.client.url}/metrics", timeout=10) as response:
            for line in response.read().decode().splitlines():
                if match := re.match(r"(\w+)(?:\{.*\})? (\S+)", line):
                    found[match[1]] = found.get(match[1], 0.0) + float(match[2])
        return found

    def load(self, **plan: object) -> list[Answer]:
        """What a generator on a core of its own measured."""
        full = {"host": "127.0.0.1", "port": self.port, "zipf": 1.0, "seed": 0, "closed": 0} | plan
        done = subprocess.run(
            [*pinned(self.cores.generator), sys.executable, str(LOAD)],
            input=json.dumps(Plan(**full)), capture_output=True, text=True, check=True,
        )  # fmt: skip
        return [Answer(*each) for each in json.loads(done.stdout)]

    def memory(self) -> float:
        """MiB that are the process's own, with its share of what processes have together."""
        text = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        return int(re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[1]) / 1024


def pinned(cores: str) -> list[str]:
    return ["taskset", "-c", cores] if cores else []


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def served(
    arguments: Sequence[str],
    *,
    log: Path,
    cores: Cores = Cores(),
    program: Sequence[str] = ("-m", "jaxprompt"),
    environment: Mapping[str, str] | None = None,
    seconds: float = 600,
) -> Iterator[Server]:
    """A server that is ready. It is asked to end afterwards.

    Args:
        arguments: of ``jaxprompt serve``, without the port.
        log: a file for its output.
        cores: see ``Cores``.
        program: what Python runs instead of ``jaxprompt``.
        environment: more of it.
        seconds: until it must be ready.

    Raises:
        RuntimeError: it is not ready in time.
    """
    port, begin = free_port(), time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *program, "serve", *arguments, "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*pinned(cores.server), *command], stdout=out, stderr=out,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
    try:
        client = jp.Client(f"http://127.0.0.1:{port}")
        while not client.ready():
            if process.poll() is not None or time.perf_counter() - begin > seconds:
                raise RuntimeError(f"{' '.join(command)} is not ready; see {log}.")
            time.sleep(0.2)
        yield Server(client, port, process, time.perf_counter() - begin, cores)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
