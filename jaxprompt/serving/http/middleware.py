"""What every request goes through: an id, hosts, errors, figures, one line in the log.

It is plain ASGI. A middleware that wraps ``receive`` would hide that a client has gone.
"""

import json
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxprompt.config.errors import UserError
from jaxprompt.config.values import Values
from jaxprompt.serving.http.errors import ApiError, of_fault, of_user_error
from jaxprompt.serving.http.service import Service
from jaxprompt.serving.http.waiting import ClientGone

log = logging.getLogger("jaxprompt.access")
_fault = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET = ("/health", "/ready", "/metrics")  # asked for again and again
_GONE = 499  # what nginx calls a client that has gone; nobody reads it
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'; object-src 'none'",
}


class Edge:
    """The outermost layer."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        call = _Call(self._service, scope, send, id)
        scope.setdefault("state", {}).update(id=id, began=call.began, log=call.log)
        try:
            self._check_host(headers)
            await self._app(scope, receive, call.send)
        except ApiError as error:
            await call.fail(error, receive)
        except UserError as error:  # of a place that had no better name for it
            await call.fail(of_user_error(error), receive)
        except (ClientGone, ClientDisconnect):
            call.status = _GONE
        except Exception as error:
            _fault.exception("request %s", id)
            await call.fail(of_fault(error, id), receive)
        finally:
            call.end()

    def _check_host(self, headers: Headers) -> None:
        hosts = self._service.hosts
        if hosts is None:
            return
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if name.strip("[]").lower() not in hosts:
            raise ApiError(
                421,
                "wrong_host",
                "A server without keys answers to the names of this machine alone; use "
                "http://127.0.0.1, or start it with --keys FILE.",
            )
        origin = headers.get("origin")
        if origin is not None and origin.rpartition("//")[2].lower() != host.lower():
            raise ApiError(403, "wrong_origin", "A server without keys answers no other web page.")


class _Call:
    """One request: what is sent back, and what is known of it in the end."""

    def __init__(self, service: Service, scope: Scope, send: Send, id: str):
        self.began, self.status, self.log = time.monotonic(), 0, Values()
        self._service, self._scope, self._send, self._id = service, scope, send, id

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._id
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            if self._service.draining:
                headers["connection"] = "close"
        await self._send(message)

    async def fail(self, error: ApiError, receive: Receive) -> None:
        """Answer with an error, unless an answer has begun."""
        self.log["error"] = error.code
        if error.status in (429, 503, 504, 413):
            self._service.metrics.rejected.labels(error.code).inc()
        if not self.status:
            await error.response()(self._scope, receive, self.send)

    def end(self) -> None:
        """Count the request and write its line."""
        seconds = time.monotonic() - self.began
        route = getattr(self._scope.get("route"), "path", "other")
        metrics = self._service.metrics
        metrics.requests.labels(route, str(self.status or _GONE)).inc()
        metrics.seconds.labels(route).observe(seconds)
        if "rows" in self.log:
            metrics.rows.labels(route).inc(self.log["rows"])
        if route in _QUIET and self.status in (200, 503):  # 503: not ready yet
            return
        method = self._scope["method"]
        line = {"id": self._id, "method": method, "route": route, "status": self.status or _GONE}
        log.info(json.dumps(line | {"ms": round(1000 * seconds, 1)} | self.log))
