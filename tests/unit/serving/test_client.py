"""The client against a server that answers what a test tells it to."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import jaxprompt as jp
from jaxprompt.serving import client as client_module


class Told(ThreadingHTTPServer):
    """A server with prepared answers ``(status, headers, body)``, and what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[tuple[int, dict, bytes]] = []
        self.asked: list[tuple[str, str, dict, bytes]] = []

    def say(self, body, status=200, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.answers.append((status, {k.replace("_", "-"): v for k, v in headers.items()}, content))

    @property
    def sent(self):
        return json.loads(self.asked[-1][3])


class _Handler(BaseHTTPRequestHandler):
    server: Told

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, self.path, dict(self.headers), body))
        status, headers, content = self.server.answers.pop(0)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, format, *args):
        del format, args


@pytest.fixture
def server():
    with Told() as told:
        thread = threading.Thread(target=told.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield told
        told.shutdown()
        thread.join()


@pytest.fixture
def client(server, monkeypatch):
    monkeypatch.setattr(client_module.time, "sleep", lambda seconds: server.asked.append(seconds))
    return jp.Client(f"http://127.0.0.1:{server.server_port}/", "secret")


def test_predictions_come_back_in_order_and_the_key_goes_along(client, server):
    server.say({"predictions": [{"prediction": "ham"}, {"prediction": "spam"}]})
    found = client.predict("mail", [{"text": "hi"}, "win"], top_k=1)
    assert [each["prediction"] for each in found] == ["ham", "spam"]
    assert server.sent == {"prompt": "mail", "inputs": [{"text": "hi"}, "win"], "top_k": 1}
    assert server.asked[-1][2]["Authorization"] == "Bearer secret"
    assert server.asked[-1][2]["X-Jaxprompt-Prompt"] == "mail"


def test_without_a_prompt_the_field_is_left_out_so_that_the_router_chooses(client, server):
    server.say({"predictions": [{}]})
    client.predict(None, ["x"])
    assert server.sent == {"inputs": ["x"]}


def test_pairs_are_scored(client, server):
    server.say({"scores": [{"log_likelihood": -1.5, "tokens": 2}]})
    assert client.score("mail", [{"input": "a", "target": "b"}])[0]["tokens"] == 2
    assert server.sent["inputs"] == [{"input": "a", "target": "b"}]


def test_a_busy_server_is_asked_again_after_the_time_that_it_names(client, server):
    for status in (503, 429):
        server.say({"error": {"message": "full"}}, status, Retry_After="7")
    server.say({"predictions": []})
    client.predict("mail", [])
    waits = [each for each in server.asked if isinstance(each, float)]
    assert len(waits) == 2 and all(7 <= each <= 8.75 for each in waits)


def test_a_server_that_stays_busy_is_an_error_with_its_status(server, client):
    client.retries = 1
    for _ in range(2):
        server.say({"error": {"message": "full", "code": "overloaded"}}, 503)
    with pytest.raises(jp.ServerError, match="503: full") as caught:
        client.models()
    assert caught.value.status == 503 and caught.value.code == "overloaded"


@pytest.mark.parametrize(
    "status, body, message",
    [
        (404, {"error": {"message": "There is no x.", "code": "model_not_found"}}, "There is no x"),
        (502, b"<html>bad gateway", "<html>bad gateway"),
        (500, b"", "Internal Server Error"),
        (400, [1], r"\[1\]"),
    ],
)
def test_an_error_has_the_sentence_of_the_server_and_is_not_tried_again(
    client, server, status, body, message
):
    server.say(body, status)
    with pytest.raises(jp.ServerError, match=message) as caught:
        client.prompt("x")
    assert caught.value.status == status and len(server.asked) == 1


def test_a_redirect_does_not_take_the_key_elsewhere(client, server):
    server.say(b"", 302, Location="http://127.0.0.2/")
    with pytest.raises(jp.ServerError) as caught:
        client.prompt("x")
    assert caught.value.status == 302


def test_pieces_of_a_stream_come_one_by_one(client, server):
    events = [": ping", "", *(f"data: {json.dumps(_piece(text))}\n" for text in ("a", "", " cat"))]
    server.say("\n".join([*events, "data: [DONE]", ""]).encode())
    assert list(client.stream("mail", "what", max_tokens=3)) == ["a", " cat"]
    assert server.sent == {"model": "mail", "prompt": "what", "stream": True, "max_tokens": 3}


def _piece(text):
    return {"choices": [{"index": 0, "text": text, "finish_reason": None}]}


def test_a_stream_that_breaks_off_is_an_error(client, server):
    server.say(f"data: {json.dumps(_piece('a'))}\n\n".encode())
    with pytest.raises(jp.ServerError, match="ended before"):
        list(client.stream("mail", "what"))


def test_an_error_within_a_stream_is_raised(client, server):
    server.say(b'data: {"error": {"message": "device", "code": "device_error"}}\n\n')
    with pytest.raises(jp.ServerError, match="device"):
        list(client.stream("mail", "what"))


def test_lists_are_read_page_by_page(client, server):
    server.say({"data": [{"name": "a"}, {"name": "b c"}], "has_more": True})
    server.say({"data": [{"name": "d"}], "has_more": False})
    assert [each["name"] for each in client.prompts(search="x")] == ["a", "b c", "d"]
    assert server.asked[-1][1] == "/v1/prompts?limit=1000&search=x&after=b+c"


def test_an_artefact_is_sent_as_a_form_of_its_files(client, server, tmp_path: Path):
    (tmp_path / "prompt.json").write_text("{}")
    (tmp_path / "prompt.safetensors").write_bytes(b"\x00\r\n--")
    (tmp_path / "notes.txt").write_text("not sent")
    server.say({"name": "a/b", "version": 3}, 201)
    assert client.put("a/b", tmp_path)["version"] == 3
    method, path, headers, body = server.asked[-1]
    assert (method, path, headers["If-None-Match"]) == ("PUT", "/v1/prompts/a%2Fb", "*")
    assert b'filename="prompt.json"\r\n' in body and b"\r\n\r\n\x00\r\n--\r\n" in body
    assert b"notes" not in body


def test_replacing_is_said_by_the_caller(client, server, tmp_path):
    (tmp_path / "prompt.json").write_text("{}")
    server.say({"version": 4})
    client.put("a", tmp_path, replace=True)
    assert "If-None-Match" not in server.asked[-1][2]


def test_a_prompt_is_removed(client, server):
    server.say(b"", 204)
    client.delete("a")
    assert server.asked[-1][:2] == ("DELETE", "/v1/prompts/a")


def test_a_server_is_ready_when_it_says_so(client, server):
    server.say({}, 503)
    server.say({}, 200)
    assert [client.ready(), client.ready()] == [False, True]


def test_a_server_that_is_not_there_is_an_error_of_one_sentence():
    lost = jp.Client("http://127.0.0.1:9", retries=0)
    assert not lost.ready()
    with pytest.raises(jp.ServerError, match="127.0.0.1:9 cannot be reached") as caught:
        lost.models()
    assert caught.value.status == 0


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://"])
def test_an_url_that_is_none_is_refused(url):
    with pytest.raises(jp.UserError, match="give one like"):
        jp.Client(url)


def test_a_folder_that_is_no_artefact_is_refused_before_anything_is_sent(client, server, tmp_path):
    with pytest.raises(jp.UserError, match=r"has a prompt\.json, or PEFT"):
        client.put("a", tmp_path)
    assert not server.asked


def test_a_value_that_json_lacks_is_refused(client, server):
    with pytest.raises(jp.UserError, match="JSON"):
        client.predict("a", [{"x": float("nan")}])
    assert not server.asked
