"""The files of a prompt as a form sends them, within a limit of bytes and time."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from jaxprompt.serving.artefacts import NAMES
from jaxprompt.serving.http.errors import ApiError
from jaxprompt.serving.http.service import HttpLimits

_SECONDS_A_MEGABYTE = 1.0  # that a slow client may take, beside the time of any body


async def read_upload(request: Request, limits: HttpLimits) -> dict[str, bytes]:
    """The content of each file by its name.

    Raises:
        ApiError: the form is damaged, too large or too slow, or has something else in it.
    """
    most = limits.upload_bytes
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > most:
        raise _too_large(most)
    seconds = limits.body_seconds + _SECONDS_A_MEGABYTE * most / (1 << 20)
    try:
        async with asyncio.timeout(seconds):
            parser = MultiPartParser(
                request.headers, _counted(request, most), max_files=len(NAMES), max_fields=0
            )
            form = await parser.parse()
            return {name: content async for name, content in _files(form.multi_items())}
    except TimeoutError:
        raise ApiError(
            408, "slow_request", f"The files did not come within {seconds:g} seconds."
        ) from None
    except MultiPartException as error:
        sentence = f"The form cannot be read: {error.message.rstrip('.')}."
        raise ApiError(400, "invalid_form", sentence) from None
    except ClientDisconnect:
        raise ApiError(400, "invalid_form", "The form ended too early.") from None


async def _counted(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    count = 0
    async for part in request.stream():
        count += len(part)
        if count > most:
            raise _too_large(most)
        yield part


def _too_large(most: int) -> ApiError:
    sentence = f"The files have more than {most:,} bytes."
    return ApiError(413, "too_large", sentence, headers={"connection": "close"})


async def _files(
    items: list[tuple[str, UploadFile | str]],
) -> AsyncIterator[tuple[str, bytes]]:
    for field, value in items:
        if isinstance(value, str):
            raise ApiError(400, "invalid_form", f"{field[:80]!r} is no file.", field[:80])
        name = (value.filename or field).rpartition("/")[2]
        yield name, await value.read()
        await value.close()
