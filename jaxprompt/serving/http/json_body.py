"""Bodies of requests, read within limits of bytes and time, and bodies of answers."""

import asyncio
import json
from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from jaxprompt.config.values import Values

Model = TypeVar("Model", bound=BaseModel)


class BadBody(Exception):
    """Why a body cannot be used: a status, a code, a sentence, and the field, if it is one's."""

    def __init__(self, status: int, code: str, sentence: str, param: str | None = None):
        super().__init__(sentence)
        self.status, self.code, self.sentence, self.param = status, code, sentence, param


class JsonResponse(Response):
    """An answer in JSON. What JSON cannot say is a fault of ours, and raises ValueError."""

    media_type = "application/json"

    def __init__(
        self, content: Values, status_code: int = 200, headers: Mapping[str, str] | None = None
    ):
        super().__init__(content, status_code, headers)

    def render(self, content: Values) -> bytes:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")  # half a surrogate has no UTF-8 form


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The body. Its bytes are counted as they come, whatever the header says.

    Raises:
        BadBody: it is larger than ``most`` bytes, or did not come within ``seconds``.
    """
    sentence = f"The body has more than {most:,} bytes; send fewer rows at a time."
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > most:
        raise BadBody(413, "too_large", sentence)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise BadBody(413, "too_large", sentence)
    except TimeoutError:
        sentence = f"The body did not come within {seconds:g} seconds."
        raise BadBody(408, "slow_request", sentence) from None
    return bytes(body)


def parse_body(body: bytes, model: type[Model]) -> Model:
    """The body as a request of this kind.

    Raises:
        BadBody: it is no JSON object, or a field is wrong.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())[:200]
        raise BadBody(400, "invalid_json", f"The body is not JSON: {problem}.") from None
    if not isinstance(values, dict):
        raise BadBody(400, "invalid_json", "The body is not a JSON object.")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(str(part) for part in first["loc"] if not _of_union(part)) or None
        where = f"{param}: " if param else ""
        problem = first["msg"].removeprefix("Value error, ").rstrip(".")
        problem = _PROBLEMS.get(first["type"], problem)
        if first["type"] == "extra_forbidden":
            problem = f"there is no such field; there are {', '.join(model.model_fields)}"
        raise BadBody(400, "invalid_value", f"{where}{problem}.", param) from None


def _of_union(part: str | int) -> bool:
    """Whether a part of an error's place is pydantic's name of a type, and no field."""
    return isinstance(part, str) and any(c in part for c in "[](),") or part in _TYPES


_PROBLEMS = {"missing": "it is missing", "too_short": "it is empty; give at least one"}
_TYPES = ("str", "int", "float", "bool")
