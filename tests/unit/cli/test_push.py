"""``jaxprompt push`` against a small stand-in for the hub on this machine."""

import base64
import http.server
import json
import threading

import numpy as np
import pytest
from huggingface_hub import constants

from jaxprompt.cli.artefacts import push, upload
from jaxprompt.config.errors import UserError
from jaxprompt.methods.artefact import Prompt, save_prompt


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers what ``HfApi`` asks when it makes a repository and uploads small files."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        hub = self.server
        hub.requests.append((self.path, self.headers.get("Authorization"), body))  # type: ignore
        if hub.status != 200:  # type: ignore
            self._answer({"error": "Invalid credentials"}, hub.status)  # type: ignore
        elif self.path == "/api/repos/create":
            self._answer({"url": f"http://{self.headers['Host']}/me/my-prompt"})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            facts = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer({"files": [{"path": file["path"], **facts} for file in files]})
        elif self.path.endswith("/commit/main"):
            url = f"http://{self.headers['Host']}/me/my-prompt/commit/1"
            self._answer({"commitUrl": url, "commitOid": "1"})
        else:
            self._answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self._answer({"id": "me/my-prompt", "sha": "0" * 40, "siblings": []})

    def _answer(self, value: dict, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.status = [], 200  # type: ignore
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # what HF_ENDPOINT sets when a process starts
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # only this machine
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def prompt(tmp_path):
    save_prompt(tmp_path / "prompt", Prompt(np.ones((2, 4), np.float32), {}))
    return tmp_path / "prompt"


def test_a_prompt_is_uploaded_whole_to_a_private_repository(hub, prompt, capsys):
    push(prompt, "me/my-prompt")
    told = json.loads(capsys.readouterr().out)
    assert told["repository"].endswith("/me/my-prompt")
    assert told["commit"] == f"{told['repository']}/commit/1"
    made = next(json.loads(body) for path, _, body in hub.requests if path.endswith("/create"))
    assert (
        made["name"] == "my-prompt"
        and made.get("private") is True
        or made["visibility"] == "private"
    )
    assert all(token == "Bearer hf_secret" for _, token, _ in hub.requests)
    commit = next(body for path, _, body in hub.requests if path.endswith("/commit/main"))
    files = [json.loads(line)["value"] for line in commit.splitlines() if b'"file"' in line]
    sent = {file["path"]: base64.b64decode(file["content"]) for file in files}
    assert sent == {path.name: path.read_bytes() for path in prompt.iterdir()}


def test_a_public_repository_has_to_be_asked_for(hub, prompt):
    upload(prompt, "me/my-prompt", private=False, message="first")
    made = next(json.loads(body) for path, _, body in hub.requests if path.endswith("/create"))
    assert not made.get("private") and made.get("visibility") in (None, "public")


@pytest.mark.parametrize("status", [401, 403])
def test_a_hub_that_refuses_is_one_sentence_on_the_token(hub, prompt, status):
    hub.status = status
    with pytest.raises(UserError, match="refuses the upload to 'me/my-prompt'.*set HF_TOKEN"):
        upload(prompt, "me/my-prompt", private=True, message="")


def test_a_hub_that_is_not_there_is_one_sentence(hub, prompt, monkeypatch):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError, match="The upload to http://127.0.0.1.* failed .*; check"):
        upload(prompt, "me/my-prompt", private=True, message="")


def test_a_name_that_no_repository_has_and_a_file_are_refused(hub, prompt, tmp_path):
    with pytest.raises(UserError, match="'a/b/c' is not the name of a repository"):
        upload(prompt, "a/b/c", private=True, message="")
    np.save(tmp_path / "prompt.npy", np.ones((2, 4), np.float32))
    with pytest.raises(UserError, match="is a file; give the folder of a prompt"):
        push(tmp_path / "prompt.npy", "me/my-prompt")
    assert hub.requests == []
