"""``jaxprompt serve`` in replicas of Ray Serve, which sends a prompt's requests to where it is.

    pip install "ray[serve]" "jaxprompt[serve]"
    python scripts/serve_ray.py --replicas 2 --port 8000 -- --library library --backbone builtin
    curl http://127.0.0.1:8000/v1/predict -H "content-type: application/json" \
        -H "serve_multiplexed_model_id: spam" -d '{"prompt": "spam", "inputs": [{"text": "win"}]}'

Each replica is a server of its own with all prompts; what follows ``--`` are its arguments. The
header is optional: it tells Ray which prompt a request is for, and Ray prefers a replica that has
answered for this prompt lately. Answers come in one piece, so completions do not stream here.
"""

import argparse
import asyncio
import contextlib
import http.client
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

from ray import serve
from starlette.requests import Request
from starlette.responses import Response

HOST = "127.0.0.1"
PROMPTS = 256  # that Ray remembers of a replica
START_SECONDS = 600.0
HOP_BY_HOP = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}


class Answer(NamedTuple):
    """What a server answered."""

    status: int
    headers: dict[str, str]
    body: bytes


def ask(port: int, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
    """One request to a server on this machine."""
    with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=300)) as connection:
        kept = {name: text for name, text in headers.items() if name.lower() not in HOP_BY_HOP}
        connection.request(method, path, body or None, kept)
        response = connection.getresponse()
        fields = {
            name: text for name, text in response.getheaders() if name.lower() not in HOP_BY_HOP
        }
        return Answer(response.status, fields, response.read())


def ready(port: int) -> bool:
    try:
        return ask(port, "GET", "/ready", {}, b"").status == http.client.OK
    except OSError:
        return False


@serve.deployment(max_ongoing_requests=256, health_check_period_s=5)
class Replica:
    """A server on a port of its own."""

    def __init__(self, arguments: list[str]):
        with socket.socket() as found:
            found.bind((HOST, 0))
            self.port = found.getsockname()[1]
        command = [sys.executable, "-m", "jaxprompt", "serve", *arguments]
        self.process = subprocess.Popen([*command, "--host", HOST, "--port", str(self.port)])
        end = time.monotonic() + START_SECONDS
        while not ready(self.port):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{' '.join(command)} is not ready.")
            time.sleep(0.2)

    @serve.multiplexed(max_num_models_per_replica=PROMPTS)
    async def note(self, prompt: str) -> str:
        """Nothing is loaded here: Ray learns that this replica answers for the prompt."""
        return prompt

    async def __call__(self, request: Request) -> Response:
        prompt = serve.get_multiplexed_model_id()
        if prompt:
            await self.note(prompt)
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        body = await request.body()
        answer = await asyncio.to_thread(
            ask, self.port, request.method, path, dict(request.headers), body
        )
        return Response(answer.body, answer.status, answer.headers)

    def check_health(self) -> None:
        if self.process.poll() is not None:
            raise RuntimeError(f"The server ended with {self.process.returncode}.")

    def __del__(self) -> None:
        if hasattr(self, "process"):
            self.process.send_signal(signal.SIGTERM)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("arguments", nargs="*", help="of `jaxprompt serve`, after --")
    given = parser.parse_args()
    serve.start(http_options={"host": HOST, "port": given.port})
    replicas = Replica.options(num_replicas=given.replicas)
    serve.run(replicas.bind(given.arguments), blocking=True)


if __name__ == "__main__":
    main()
