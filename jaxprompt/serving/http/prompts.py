"""The prompts of a server: listed, described, put, removed, looked into."""

import asyncio
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.paths import expanded
from jaxprompt.config.values import Values
from jaxprompt.data.templates import input_columns
from jaxprompt.inference.wording import Wording, kept_config
from jaxprompt.serving.artefacts import Files
from jaxprompt.serving.catalogue import Conflict, Facts
from jaxprompt.serving.http.errors import ApiError, of_user_error
from jaxprompt.serving.http.json_body import JsonResponse
from jaxprompt.serving.http.schemas import (
    ConfigRequest,
    LoadAdapterRequest,
    PinRequest,
    SourceRequest,
    UnloadAdapterRequest,
)
from jaxprompt.serving.http.service import (
    Opened,
    Service,
    open_request,
    read,
    resolve,
    within,
)
from jaxprompt.serving.http.upload import read_upload
from jaxprompt.serving.prepare import answering
from jaxprompt.serving.similarity import similarity_map
from jaxprompt.serving.store import PathStore, UnknownPrompt
from jaxprompt.serving.version import Version, in_words

R = TypeVar("R")
_MOST_LISTED = 1000
_MOST_COMPARED = 12  # prompts that an inspection puts beside one another


class _Page(NamedTuple):
    """Some prompts that a caller sees."""

    facts: list[Facts]
    has_more: bool


async def list_models(request: Request) -> Response:
    """The backbone and the prompts, as OpenAI lists models."""
    opened = open_request(request, "predict")
    service, page = opened.service, _page(opened, request)
    created = int(service.metrics.started)
    common = {"object": "model", "created": created, "owned_by": "jaxprompt"}
    backbone = {"id": service.backbone.id, **common, "root": service.backbone.source}
    models = [] if "after" in request.query_params else [{**backbone, "parent": None}]
    for facts in page.facts:
        root = f"{facts.name}@sha256:{facts.digest}" if facts.digest else facts.name
        parent = {"root": root, "parent": service.backbone.id}
        owner = {"owned_by": facts.tenant or "jaxprompt"}
        models.append({"id": facts.name, **common, **owner, **parent})
    return JsonResponse({"object": "list", "data": models, "has_more": page.has_more})


async def list_prompts(request: Request) -> Response:
    """Facts of the prompts that a caller sees."""
    opened = open_request(request, "predict")
    page = _page(opened, request)
    data = [_described(opened, facts) for facts in page.facts]
    return JsonResponse({"object": "list", "data": data, "has_more": page.has_more})


def _page(opened: Opened, request: Request) -> _Page:
    query, caller = request.query_params, opened.caller
    limit = _number(query.get("limit"), "limit", _MOST_LISTED)
    search = query.get("search", "").lower()
    after = query.get("after")
    found: list[Facts] = []
    while len(found) <= limit:
        wanted = limit + 1 if not search else _MOST_LISTED
        some = opened.service.catalogue.list(caller.tenant, limit=wanted, after=after)
        found += [facts for facts in some if search in facts.name]
        if len(some) < wanted:
            break
        after = some[-1].name
    return _Page(found[:limit], len(found) > limit)


def _number(text: str | None, name: str, most: int) -> int:
    if text is None:
        return min(100, most)
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:9]) <= most:
        raise ApiError(
            400,
            "invalid_value",
            f"{name} is {shown(text)}; give a whole number from 1 to {most}.",
            name,
        )
    return int(text)


def _described(opened: Opened, facts: Facts, version: Version | None = None) -> Values:
    """What a client is told of a prompt; of one that is not in memory only what is known so."""
    service = opened.service
    if version is None and facts.state == "ready":
        version = _in_memory(opened, facts.name)
    used = service.used.get(facts.name)
    known: Values = {
        "name": facts.name,
        "version": facts.number or None,
        "digest": facts.digest,
        "tenant": facts.tenant,
        "state": _state(service, facts, version),
        "reason": facts.reason,
        "writable": facts.writable,
        "pinned": version is not None and service.pinned.get(facts.name) is version,
        "requests": used.rows if used else 0,
        "last_used": used.last if used else None,
    }
    return known | _content(version)


def _in_memory(opened: Opened, name: str) -> Version | None:
    try:
        return opened.service.catalogue.loaded(name, opened.caller.tenant)
    except UnknownPrompt:  # it went just now
        return None


def _state(service: Service, facts: Facts, version: Version | None) -> str:
    if version is None:
        return {"stored": "store", "ready": "host"}.get(facts.state, facts.state)
    return "device" if service.device.holds(version) else "host"


def _content(version: Version | None) -> Values:
    """What only a loaded prompt tells."""
    if version is None:
        names = ("task", "labels", "columns", "template", "decoding", "length", "method",
                 "attention", "backbone", "metrics")  # fmt: skip
        return dict.fromkeys(names)
    task, metadata = version.task, version.prompt.metadata
    recorded = metadata.get("backbone") or {}
    return {
        "task": None if task is None else task.name,
        "labels": None if task is None else task.labels,
        "columns": None if task is None else input_columns(task),
        "template": None if task is None else task.template,
        "decoding": None if task is None else task.decoding,
        "length": version.length,
        "method": metadata.get("method"),
        "attention": version.attention,
        "backbone": {key: recorded.get(key) for key in ("source", "fingerprint")},
        "metrics": metadata.get("metrics"),
    }


async def get_prompt(request: Request) -> Response:
    """Facts of one prompt, with what its artefact records."""
    opened = open_request(request, "predict")
    version = await _version(opened, request)
    facts = _facts(opened, version.name)
    metadata = version.prompt.metadata
    body = _described(opened, facts, version) | {"metadata": metadata}
    body |= {"version": version.number, "digest": version.digest}
    return JsonResponse(body, headers=_etag(version))


async def _version(opened: Opened, request: Request) -> Version:
    name = request.path_params["name"]
    version = await resolve(opened, name, opened.deadline(None), "name")
    if version is None:
        raise ApiError(404, "model_not_found", f"{shown(name)} is the backbone, and no prompt.")
    return version


def _facts(opened: Opened, name: str) -> Facts:
    try:
        return opened.service.catalogue.facts(name, opened.caller.tenant)
    except UnknownPrompt as error:
        raise of_user_error(error, "name") from None


def _etag(version: Version) -> dict[str, str]:
    return {"etag": f'"{version.digest}"'}


async def inspect_prompt(request: Request) -> Response:
    """Nearest words, norms and similarities of a prompt's vectors."""
    opened = open_request(request, "predict")
    version = await _version(opened, request)
    nearest = 5
    if "nearest" in request.query_params:
        nearest = _number(request.query_params["nearest"], "nearest", 50)
    service, beside = opened.service, _beside(opened, version)

    def look() -> Values:
        vectors = [each.prompt.vectors for each in beside]
        alike = similarity_map([each.name for each in beside], vectors) if beside else None
        return {**service.inspect(version, nearest), "prompts": alike}

    try:
        report = await asyncio.get_running_loop().run_in_executor(service.pool, look)
    except UserError as error:
        raise of_user_error(error) from None
    facts = {"prompt": version.name, "version": version.number, "digest": version.digest}
    return JsonResponse(facts | report)


def _beside(opened: Opened, version: Version) -> list[Version]:
    """A prompt and others that are in memory, as far as they have vectors."""
    listed = opened.service.catalogue.list(opened.caller.tenant, limit=_MOST_LISTED)
    ready = (facts.name for facts in listed if facts.state == "ready")
    loaded = (_in_memory(opened, name) for name in ready if name != version.name)
    comparable = (each for each in (version, *loaded) if each is not None and each.length)
    return list(itertools.islice(comparable, _MOST_COMPARED))


async def pin_prompt(request: Request) -> Response:
    """Keep a prompt in its slot of the device, or let it go."""
    opened = open_request(request, "manage")
    service = opened.service
    body = await read(request, service, PinRequest)
    version = await _version(opened, request)
    before = service.pinned.get(version.name)

    def pin() -> None:
        if before is not None and (before is not version or not body.pinned):
            service.device.pin(before, False)
        if body.pinned and before is not version:
            service.device.pin(version, True)

    try:
        await within(service.batcher.call(pin), opened.deadline(None))
    except UserError as error:
        raise of_user_error(error, "pinned") from None
    service.pinned.pop(version.name, None)
    if body.pinned:
        service.pinned[version.name] = version
    return JsonResponse(_described(opened, _facts(opened, version.name), version))


async def config_of_words(request: Request) -> Response:
    """A config that tunes a prompt with other words, as YAML. Nothing is written here."""
    opened = open_request(request, "predict")
    body = await read(request, opened.service, ConfigRequest)
    version = await _version(opened, request)
    wording = Wording(body.wording.template, body.wording.labels)
    try:
        changed = in_words(version, wording, opened.service.words.tokenizer)
        text = kept_config(version.prompt.metadata, answering(changed), "runs/kept")
    except UserError as error:
        raise of_user_error(error, "wording") from None
    return PlainTextResponse(text, media_type="application/yaml")


async def put_prompt(request: Request) -> Response:
    """Add a prompt, or replace it. It is checked before its name means it."""
    opened = open_request(request, "manage")
    service, name = opened.service, request.path_params["name"]
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        files = await read_upload(request, service.limits)
    else:
        asked = await read(request, service, SourceRequest)
        files = await _apart(lambda: read_source(service.sources, asked.source))
    match = request.headers.get("if-match", "").strip('" ')
    create = request.headers.get("if-none-match", "").strip() == "*"
    version, new = await _put(opened, name, files, match or None, create)
    facts = _facts(opened, version.name)
    body = _described(opened, facts, version)
    body |= {"version": version.number, "digest": version.digest}
    return JsonResponse(body, 201 if new else 200, headers=_etag(version))


async def _put(
    opened: Opened, name: str, files: Files, if_match: str | None, create: bool
) -> tuple[Version, bool]:
    """The version that a name means now, and whether the name is new."""
    service, tenant = opened.service, opened.caller.tenant
    if name == service.backbone.id:
        raise ApiError(409, "already_exists", f"{shown(name)} is the backbone's name.", "name")
    new = not _exists(opened, name)
    put = lambda: service.catalogue.put(name, files, tenant, if_match=if_match, create=create)
    try:
        version = await _apart(put)
    except Conflict as error:
        service.metrics.changes.labels("refused").inc()
        status = (409, "already_exists") if create else (412, "version_conflict")
        raise ApiError(*status, str(error), "name") from None
    except UserError as error:
        service.metrics.changes.labels("refused").inc()
        raise of_user_error(error, "name", (422, "prompt_rejected")) from None
    service.metrics.changes.labels("put").inc()
    return version, new


def _exists(opened: Opened, name: str) -> bool:
    try:
        opened.service.catalogue.facts(name, opened.caller.tenant)
    except UnknownPrompt:
        return False
    return True


async def delete_prompt(request: Request) -> Response:
    """Remove a prompt. Requests that were admitted before are still answered by it."""
    opened = open_request(request, "manage")
    match = request.headers.get("if-match", "").strip('" ')
    await _remove(opened, request.path_params["name"], match or None)
    return Response(status_code=204)


async def _remove(opened: Opened, name: str, if_match: str | None) -> None:
    service = opened.service
    remove = lambda: service.catalogue.remove(name, opened.caller.tenant, if_match=if_match)
    try:
        await _apart(remove)
    except UserError as error:
        raise of_user_error(error, "name") from None
    service.metrics.changes.labels("removed").inc()


async def load_adapter(request: Request) -> Response:
    """vLLM's route to load an adapter."""
    opened = open_request(request, "manage")
    service = opened.service
    _check_json(request)
    body = await read(request, service, LoadAdapterRequest)
    files = await _apart(lambda: read_source(service.sources, body.lora_path))
    create = not body.load_inplace
    await _put(opened, body.lora_name, files, None, create)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload_adapter(request: Request) -> Response:
    """vLLM's route to unload an adapter."""
    opened = open_request(request, "manage")
    _check_json(request)
    body = await read(request, opened.service, UnloadAdapterRequest)
    await _remove(opened, body.lora_name, None)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _check_json(request: Request) -> None:
    """Refuse what a form of another web page could send."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ApiError(
            400, "invalid_json", "Send the header Content-Type: application/json with this body."
        )


async def _apart(function: Callable[[], R]) -> R:
    """What a function that may wait for a disk or a network returns."""
    return await asyncio.to_thread(function)


def read_source(folders: Sequence[str], source: str) -> Files:
    """The files of a prompt in a folder that the server's operator has allowed.

    Raises:
        ApiError: the place is not allowed, or there is no prompt.
    """
    try:
        path = Path(os.path.realpath(expanded(source)))
    except UserError as error:
        raise of_user_error(error, "source") from None
    if "://" in source or not any(path.is_relative_to(os.path.realpath(f)) for f in folders):
        raise ApiError(
            403,
            "source_not_allowed",
            f"{shown(source)} is not in a folder that this server may read prompts from; send the "
            "files, or start it with --source FOLDER.",
            "source",
        )
    try:
        return PathStore({"prompt": path}).read("prompt")
    except UserError as error:
        raise of_user_error(error, "source", (422, "prompt_rejected")) from None
