"""Errors as clients see them: a status, a code for programs, and one sentence for people."""

from collections.abc import Mapping
from typing import NamedTuple

from starlette.responses import Response

from jaxprompt.config.errors import UserError
from jaxprompt.config.values import Values
from jaxprompt.serving.batcher import Broken, Late
from jaxprompt.serving.catalogue import Conflict
from jaxprompt.serving.fair_queue import Refused
from jaxprompt.serving.http.json_body import JsonResponse
from jaxprompt.serving.store import ReadOnlyStore, StoreUnavailable, UnknownPrompt
from jaxprompt.serving.work import Failed


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        code: str,
        sentence: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(sentence)
        self.status, self.code, self.sentence, self.param = status, code, sentence, param
        self.headers = dict(headers or {})

    def body(self) -> Values:
        """The error as OpenAI's clients read it."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        error = {"message": self.sentence, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """The error as an answer."""
        return JsonResponse(self.body(), self.status, headers=self.headers)


_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


class _Case(NamedTuple):
    status: int
    code: str


_REFUSED = {
    "queue_full": _Case(503, "overloaded"),
    "key_full": _Case(429, "key_limit"),
    "too_large": _Case(413, "too_large"),
    "not_ready": _Case(503, "not_ready"),
    "draining": _Case(503, "draining"),
}
# what a user did wrong; the first class that fits counts
_USER_ERRORS: dict[type[UserError], _Case] = {
    UnknownPrompt: _Case(404, "model_not_found"),
    Conflict: _Case(412, "version_conflict"),
    ReadOnlyStore: _Case(409, "read_only"),
    StoreUnavailable: _Case(503, "store_unavailable"),
}


def of_refused(error: Refused, retry_after: int) -> ApiError:
    """The error of rows that were not admitted."""
    status, code = _REFUSED[error.reason]
    headers = {"retry-after": str(retry_after)} if status in (429, 503) else {}
    return ApiError(status, code, error.sentence, headers=headers)


def of_user_error(
    error: UserError, param: str | None = None, otherwise: tuple[int, str] = (400, "invalid_value")
) -> ApiError:
    """The error of a mistake that the client can mend."""
    sentence = f"{str(error).rstrip('.')}."
    for kind, (status, code) in _USER_ERRORS.items():
        if isinstance(error, kind):
            headers = {"retry-after": "5"} if status == 503 else {}
            return ApiError(status, code, sentence, param, headers)
    return ApiError(*otherwise, sentence, param)


def of_outcome(outcome: Failed, param: str | None, request_id: str) -> ApiError:
    """The error of a row that has no answer."""
    if isinstance(outcome, Late):
        return too_late()
    if isinstance(outcome, Broken):
        sentence = f"{outcome.message.rstrip('.')} (request {request_id})."
        return ApiError(500, "device_error", sentence, param)
    return ApiError(500, "non_finite_scores", outcome.message, param)


def too_late() -> ApiError:
    """The error of a request that was not answered in time."""
    return ApiError(
        504,
        "deadline_exceeded",
        "The answer was not there in time; send fewer rows, or a larger timeout_ms.",
    )


def of_fault(error: Exception, request_id: str) -> ApiError:
    """The error of a fault of the machine or of ours."""
    if isinstance(error, OSError) and error.errno is not None:  # a disk that is full, and the like
        sentence = (
            f"The server's machine cannot do that now ({error.strerror}); nothing is changed."
        )
        return ApiError(503, "store_unavailable", sentence, headers={"retry-after": "5"})
    sentence = f"A fault of the server; its log has the details under request {request_id}."
    return ApiError(500, "internal_error", sentence)
