"""A client of ``jaxprompt serve`` that needs nothing but the standard library.

client = jp.Client("http://127.0.0.1:8000")
client.predict("supersense", [{"gloss": "a large striped cat"}])[0]["prediction"]
"""

import http.client
import json
import random
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TypedDict, Unpack, cast

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.values import Values

_BUSY = (429, 503)
_CONFIGS = ("prompt.json", "adapter_config.json")
_LONGEST_WAIT = 30.0  # seconds between two attempts, at most


class ServerError(Exception):
    """What a server refused, or that it could not be reached.

    Attributes:
        status: the HTTP status; 0 where no answer came.
        message: the sentence of the server.
        code: its machine-readable reason, if it gave one.
    """

    def __init__(self, status: int, message: str, code: str | int | None = None):
        super().__init__(f"{status}: {message}" if status else message)
        self.status = status
        self.message = message
        self.code = code


class Sampling(TypedDict, total=False):
    """Settings of a completion; those of OpenAI's ``/v1/completions``."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: str | list[str]
    logprobs: int
    echo: bool
    timeout_ms: int


class Client:
    """A server of prompts.

    Args:
        url: of the server, without ``/v1``.
        key: a bearer key, where the server wants one.
        timeout: seconds without a byte after which an attempt fails.
        retries: further attempts after 429, 503, or a refused connection; each waits as long as
            the server's ``Retry-After`` says.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        timeout: float = 120.0,
        retries: int = 5,
    ):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"The url is {shown(url)}; give one like http://127.0.0.1:8000.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.key = key
        self.timeout = timeout
        self.retries = retries
        self._opener = _opener(parts.hostname)

    def predict(
        self,
        prompt: str | Sequence[str] | None,
        inputs: Sequence[Mapping[str, object] | str],
        **settings: object,
    ) -> list[Values]:
        """Answers of rows, in order.

        Args:
            prompt: its name, or ``name@version``, or one for each row. None: the server's router
                chooses for each row.
            inputs: rows ``{column: value}``, or texts where the template has one column.
            **settings: further fields of the request, such as ``top_k``, ``timeout_ms``, or
                ``user`` instead of a prompt.

        Returns:
            For each row ``{"prediction", "scores": [{"label", "log_likelihood", "probability"}],
            "prompt", "version"}``.
        """
        rows = [row if isinstance(row, str) else dict(row) for row in inputs]
        body = {"prompt": prompt, "inputs": rows} | settings
        return self._post("/v1/predict", body, prompt)["predictions"]

    def score(
        self, prompt: str, pairs: Iterable[Mapping[str, str]], **settings: object
    ) -> list[Values]:
        """Log-likelihoods of targets: ``jp.score`` through the server.

        Args:
            prompt: its name, or the id of the backbone for that alone.
            pairs: rows ``{"input": text, "target": text}``.
            **settings: further fields of the request.

        Returns:
            For each row ``{"log_likelihood": in nats, "tokens": of the target}``.
        """
        body = {"prompt": prompt, "inputs": [dict(pair) for pair in pairs]} | settings
        return self._post("/v1/score", body, prompt)["scores"]

    def complete(self, prompt: str, text: str | list[str], **settings: Unpack[Sampling]) -> Values:
        """The whole answer of ``/v1/completions``; the texts are ``["choices"][i]["text"]``."""
        return self._post("/v1/completions", {"model": prompt, "prompt": text} | settings, prompt)

    def stream(self, prompt: str, text: str, **settings: Unpack[Sampling]) -> Iterator[str]:
        """Pieces of a completion as they are decoded. Closing the iterator cancels the request."""
        body = {"model": prompt, "prompt": text, "stream": True} | settings
        with self._open("POST", "/v1/completions", _encoded(body), _headers(prompt)) as response:
            for line in response:
                data = line.decode().strip().removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if data and not data.startswith((":", "event:", "id:", "retry:")):
                    yield from _pieces(data)
        raise ServerError(0, "The stream ended before the server said that it was done.")

    def models(self) -> list[Values]:
        """The backbone and its prompts as OpenAI lists models: ``id`` is the name."""
        return self._list("/v1/models", "id", {})

    def prompts(self, search: str | None = None) -> list[Values]:
        """Facts of all prompts that the key may see, or of those that a search finds."""
        return self._list("/v1/prompts", "name", {} if search is None else {"search": search})

    def prompt(self, name: str) -> Values:
        """Facts of one prompt: task, labels, length, version, digest, and where it is."""
        return self._get(_prompt_path(name))

    def inspect(self, name: str) -> Values:
        """What ``jaxprompt inspect`` finds in a prompt of the server."""
        return self._get(_prompt_path(name) + "/inspect")

    def put(self, name: str, artefact: str | Path, *, replace: bool = False) -> Values:
        """Gives the server a prompt; answers when requests can use it.

        Args:
            name: the prompt's name on the server.
            artefact: the folder of a tuned prompt, or of PEFT's adapter.
            replace: whether a prompt of this name is replaced; otherwise that is an error (409).

        Returns:
            Facts of the prompt, with its ``version``.
        """
        body, content_type = _multipart(_files_of(Path(artefact)))
        headers = {"Content-Type": content_type} | ({} if replace else {"If-None-Match": "*"})
        return self._read("PUT", _prompt_path(name), body, headers)

    def delete(self, name: str) -> None:
        """Removes a prompt. Requests that were admitted before are still answered by it."""
        with self._open("DELETE", _prompt_path(name), None, {}) as response:
            response.read()

    def ready(self) -> bool:
        """Whether the server has compiled its programs and takes requests."""
        try:
            with self._once(self._request("GET", "/ready", None, {})) as response:
                return response.status == http.HTTPStatus.OK
        except ServerError:
            return False

    def wait_until_ready(self, seconds: float = 300.0) -> None:
        """Returns when the server is ready.

        Raises:
            ServerError: if it is not after so many seconds.
        """
        end = time.monotonic() + seconds
        while not self.ready():
            if time.monotonic() > end:
                raise ServerError(0, f"{self.url} is not ready after {seconds:g} seconds.")
            time.sleep(0.2)

    def _list(self, path: str, cursor: str, query: Mapping[str, str]) -> list[Values]:
        """All pages of a list. ``cursor`` is the field after which the next page begins."""
        found: list[Values] = []
        while True:
            after = {"after": str(found[-1][cursor])} if found else {}
            page = self._get(f"{path}?{urllib.parse.urlencode({'limit': 1000, **query, **after})}")
            found += page["data"]
            if not page["data"] or not page.get("has_more"):
                return found

    def _get(self, path: str) -> Values:
        return self._read("GET", path, None, {})

    def _post(self, path: str, body: Values, prompt: object) -> Values:
        return self._read("POST", path, _encoded(body), _headers(prompt))

    def _read(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Values:
        with self._open(method, path, body, headers) as response:
            content = response.read()
        try:
            return json.loads(content)
        except ValueError:
            raise ServerError(response.status, f"{path} did not answer JSON.") from None

    def _request(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> urllib.request.Request:
        key = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return urllib.request.Request(self.url + path, body, headers | key, method=method)

    def _open(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        """The response. Only what the server has not carried out is sent again."""
        request = self._request(method, path, body, headers)
        for attempt in range(self.retries + 1):
            try:
                return self._once(request)
            except _Busy as busy:
                if attempt == self.retries:
                    raise ServerError(busy.status, busy.message, busy.code) from None
                time.sleep(_wait(busy.retry_after, attempt))
        raise AssertionError("a last attempt answers or raises")

    def _once(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        try:
            response = self._opener.open(request, timeout=self.timeout)
            return cast(http.client.HTTPResponse, response)
        except urllib.error.HTTPError as error:
            raise _error_of(error) from None
        except urllib.error.URLError as error:
            sentence = f"{self.url} cannot be reached: {error.reason}."
            if isinstance(error.reason, ConnectionRefusedError):
                raise _Busy(0, sentence) from None
            raise ServerError(0, sentence) from None
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(0, f"{self.url} gave no answer: {error!r}.") from None


def _headers(prompt: object) -> dict[str, str]:
    """Headers of a request to a model: a gateway hashes the prompt's name to choose a replica."""
    headers = {"Content-Type": "application/json"}
    if isinstance(prompt, str):
        headers["x-jaxprompt-prompt"] = urllib.parse.quote(prompt.partition("@")[0])
    return headers


class _Busy(ServerError):
    """A request that the server did not take, and that may be sent again."""

    retry_after: str | None = None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the key of one server is not for another."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes] | http.client.HTTPResponse,
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> None:
        del req, fp, code, msg, headers, newurl


def _opener(host: str) -> urllib.request.OpenerDirector:
    """Opens URLs; those of this machine not through a proxy."""
    here = host in ("localhost", "::1") or host.startswith("127.")
    return urllib.request.build_opener(
        _NoRedirect, *([urllib.request.ProxyHandler({})] if here else [])
    )


def _error_of(error: urllib.error.HTTPError) -> ServerError:
    """The exception of an answer that is no 2xx."""
    with error:
        content = error.read(1 << 16)
    try:
        described = json.loads(content)["error"]
        message, code = str(described["message"]), described.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code = content.decode(errors="replace").strip()[:500] or error.reason, None
    if error.code not in _BUSY:
        return ServerError(error.code, message, code)
    busy = _Busy(error.code, message, code)
    busy.retry_after = error.headers.get("Retry-After")
    return busy


def _wait(retry_after: str | None, attempt: int) -> float:
    """Seconds until the next attempt: what the server says, or doubling; never in step."""
    try:
        seconds = float(retry_after or "")
    except ValueError:
        seconds = 0.25 * 2**attempt
    return min(max(seconds, 0.0), _LONGEST_WAIT) * random.uniform(1.0, 1.25)


def _encoded(body: Values) -> bytes:
    try:
        return json.dumps(
            {name: value for name, value in body.items() if value is not None}, allow_nan=False
        ).encode()
    except (TypeError, ValueError) as error:
        raise UserError(f"A request cannot be written as JSON: {error}.") from None


def _pieces(data: str) -> Iterator[str]:
    """The texts of one event of a stream."""
    event = json.loads(data)
    if "error" in event:
        described = event["error"]
        raise ServerError(200, str(described.get("message")), described.get("code"))
    for choice in event.get("choices", ()):
        if choice["text"]:
            yield choice["text"]


def _prompt_path(name: str) -> str:
    return "/v1/prompts/" + urllib.parse.quote(name, safe="")


def _files_of(artefact: Path) -> dict[str, bytes]:
    """The files of an artefact that a server reads."""
    configs = [artefact / name for name in _CONFIGS if (artefact / name).is_file()]
    if not configs:
        raise UserError(
            f"{shown(str(artefact))} is no folder of a tuned prompt; give one that has a "
            "prompt.json, or PEFT's adapter_config.json."
        )
    wanted = [*configs, *sorted(artefact.glob("*.safetensors"))]
    return {path.name: path.read_bytes() for path in wanted}


def _multipart(files: Mapping[str, bytes]) -> tuple[bytes, str]:
    """A form of files (RFC 7578), and its content type."""
    boundary = uuid.uuid4().hex
    parts = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        f"Content-Type: application/octet-stream\r\n\r\n".encode()
        + content
        + b"\r\n"
        for name, content in files.items()
    )
    return parts + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
