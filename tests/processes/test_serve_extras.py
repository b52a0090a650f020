"""The server beside other programs: replicas of Ray Serve, and a bucket of a local S3 server.

They need `pip install 'jaxprompt[ray,cloud]' 'moto[server]'`, and are skipped without.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest
from helpers import CONFIG, SCRIPTS, make_backbone

from jaxprompt.config.errors import UserError
from jaxprompt.methods.artefact import save_prompt
from jaxprompt.methods.tuned import Prompt
from jaxprompt.serving.artefacts import digest_of, files_of
from jaxprompt.serving.store import (
    ObjectStore,
    UnknownPrompt,
    changes,
    open_store,
)

TASK = {"name": "mine", "template": "question : {text}", "labels": ["yes", "no"],
        "max_input_length": 16, "max_target_length": 4}  # fmt: skip
SMALL = ["--max-rows", "2", "--max-new-tokens", "2", "--max-target-length", "4", "--slots", "4",
         "--drain-delay", "0"]  # fmt: skip


def needed(*modules: str):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


def prompt_of(value: float) -> Prompt:
    return Prompt(np.full((2, CONFIG.d_model), value, np.float32), {"task": TASK})


# ---- a bucket


@pytest.fixture(scope="module")
def s3():
    """A server of S3's interface on this machine, with a bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import s3fs

        s3fs.S3FileSystem().mkdir("prompts")
        yield server
        server.stop()


@needed("moto", "flask", "s3fs")
@pytest.mark.filterwarnings("ignore")  # of libraries that are not ours
def test_a_bucket_of_s3_is_a_store_of_which_each_server_sees_the_others_changes(s3):
    mine, other = open_store("s3://prompts/library"), open_store("s3://prompts/library")
    assert isinstance(mine, ObjectStore) and not mine.list()
    one, two = files_of(prompt_of(1.0)), files_of(prompt_of(2.0))
    mine.write("spam", one)
    mine.write("acme/spam", one)
    seen = other.list()
    assert set(seen) == {"spam", "acme/spam"} and other.read("spam") == one
    mine.write("spam", two)
    assert set(changes(other, seen).changed) == {"spam"}
    assert other.read("spam") == two and other.read("spam", digest_of(one)) == one
    other.delete("spam")
    assert changes(mine, seen).gone == {"spam"}
    with pytest.raises(UnknownPrompt):
        mine.read("spam")
    with pytest.raises(UserError, match="no bucket 'no-such-bucket'"):
        open_store("s3://no-such-bucket/library")


# ---- Ray


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    """The port of a server in one replica of Ray Serve, which is ready."""
    folder = tmp_path_factory.mktemp("ray")
    backbone = make_backbone(folder / "tiny")
    for number, name in enumerate(("first", "second")):
        vectors = jax.random.normal(jax.random.key(number), (2, CONFIG.d_model))
        metadata = {"backbone": {"source": str(backbone)}, "task": {**TASK, "name": name}}
        save_prompt(folder / "library" / name, Prompt(np.asarray(vectors), metadata))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, str(SCRIPTS / "serve_ray.py"), "--replicas", "1",
               "--port", str(port), "--", "--library", str(folder / "library"), *SMALL]  # fmt: skip
    quiet = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=quiet) as process,
    ):
        try:
            end = time.monotonic() + 240
            while ask(port, "/ready")[0] != 200:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(1)
            yield port
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def ask(port: int, path: str, body: object = None, prompt: str | None = None) -> tuple[int, dict]:
    """Status and body of an answer; 0 where none comes. ``prompt``: what Ray is told."""
    content = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    if prompt is not None:
        headers["serve_multiplexed_model_id"] = prompt
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", content, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        content = error.read()
        return error.code, json.loads(content) if content[:1] == b"{" else {}
    except OSError:
        return 0, {}


@needed("ray")
def test_a_replica_of_ray_answers_as_the_server_does(replicas):
    row = {"inputs": [{"text": "is it so"}]}
    for name in ("first", "second"):
        status, found = ask(replicas, "/v1/predict", {"prompt": name, **row}, name)
        assert status == 200 and found["predictions"][0]["prompt"] == name
    status, found = ask(replicas, "/v1/predict", {"prompt": "third", **row})
    assert (status, found["error"]["code"]) == (404, "model_not_found")
    status, found = ask(replicas, "/v1/models?limit=1")
    assert status == 200 and found["has_more"]
