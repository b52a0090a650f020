"""The command that serves prompts over HTTP."""

import asyncio
import importlib.util
import ipaddress
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from jaxprompt.cli.library import named_prompts
from jaxprompt.cli.options import Loading, at_home
from jaxprompt.cli.output import say
from jaxprompt.config.errors import UserError
from jaxprompt.config.paths import expanded

if TYPE_CHECKING:
    from jaxprompt.serving.batcher import Batcher
    from jaxprompt.serving.http.service import Service
    from jaxprompt.serving.start import Parts, Sources

_NEEDED = ("starlette", "uvicorn", "prometheus_client", "python_multipart")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Address(NamedTuple):
    """Where the server listens, and to whom."""

    host: Annotated[str, typer.Option(help="address; others than this machine need --keys")] = (
        "127.0.0.1"
    )
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000
    keys: Annotated[
        Path | None, typer.Option(callback=at_home, help="JSON file of keys' SHA-256 and scopes")
    ] = None
    insecure: Annotated[
        bool, typer.Option("--insecure", help="listen for others without keys; nobody manages")
    ] = False


class Room(NamedTuple):
    """What the server has room for."""

    slots: Annotated[int, typer.Option(min=0, help="prompts on the device; 0: by memory")] = 0
    max_prompt_length: Annotated[
        int, typer.Option(min=0, help="virtual tokens; 0: of the longest known prompt")
    ] = 0
    max_input_length: Annotated[
        int, typer.Option(min=0, help="text tokens; 0: of the known prompts' tasks")
    ] = 0
    max_target_length: Annotated[int, typer.Option(min=1, help="tokens of scored targets")] = 64
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens of a completion")] = 64
    max_label_nodes: Annotated[
        int, typer.Option(min=0, help="beginnings of a task's labels; 0: of the known prompts")
    ] = 0
    max_rows: Annotated[int, typer.Option(min=1, help="rows of a batch")] = 32


class Bounds(NamedTuple):
    """What clients may ask for, and how the server ends."""

    queued_rows: Annotated[int, typer.Option(min=1, help="rows that wait; more are a 503")] = 2048
    request_rows: Annotated[int, typer.Option(min=1, help="rows of one request")] = 256
    body_bytes: Annotated[int, typer.Option(min=1, help="of a request")] = 1 << 20
    timeout: Annotated[float, typer.Option(min=0.001, help="seconds until an answer, or 504")] = 60
    watchdog: Annotated[
        float, typer.Option(min=1, help="seconds of a batch after which the device hangs")
    ] = 300
    drain_delay: Annotated[
        float, typer.Option(min=0, help="seconds after SIGTERM in which requests are admitted")
    ] = 5
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="seconds in which admitted requests are answered")
    ] = 60


def serve(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="[NAME=]PROMPT; without a name that of its task")
    ] = None,
    library: Annotated[
        str | None, typer.Option(help="directory, s3:// URL or hf://OWNER/NAME@COMMIT of prompts")
    ] = None,
    source: Annotated[
        list[Path] | None, typer.Option(callback=at_home, help="folder that clients load from")
    ] = None,
    address: Address = Address(),
    room: Room = Room(),
    bounds: Bounds = Bounds(),
    loading: Loading = Loading(),
) -> None:
    """Answer requests of many prompts on one backbone, over HTTP.

    The page is at http://127.0.0.1:8000/. SIGTERM answers what was admitted, and ends with 0.

    \b
    jaxprompt serve runs/quickstart/prompt
    jaxprompt serve spam=runs/spam/prompt --library prompts --port 8000
    curl -d '{"prompt": "spam", "inputs": [{"text": "hello"}]}' 127.0.0.1:8000/v1/predict
    """
    _check(prompts, library, address)
    from jaxprompt.runtime import devices

    devices.available()
    named = named_prompts(prompts or [])
    from jaxprompt.serving.http import server
    from jaxprompt.serving.start import Sizes, Sources, make_parts

    _log_lines()
    bound = server.bind(address.host, address.port)
    shelf = library if library is None or "://" in library else expanded(library)
    sources = Sources(named, shelf, *loading)
    parts = make_parts(sources, Sizes(*room))
    service = _service(parts, sources, address, bounds, [str(path) for path in source or []])
    parts.catalogue.watch()
    port = bound.getsockname()[1]
    shown_host = f"[{address.host}]" if ":" in address.host else address.host
    count, programs = len(parts.catalogue), parts.compute.num_programs
    say(f"{count} prompts on {parts.backbone.source}; {programs} programs are being compiled")
    say(f"http://{shown_host}:{port}/")
    code = server.run(
        service,
        lambda loop, ended: _batcher(parts, service, bounds.queued_rows, loop, ended),
        bound,
        server.Drain(bounds.drain_delay, bounds.drain_timeout),
    )
    parts.catalogue.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread that computes, or compiles, would hold the process


def _check(prompts: list[str] | None, library: str | None, address: Address) -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"The server needs {', '.join(missing)}; run: pip install 'jaxprompt[serve]'."
        )
    if not prompts and library is None:
        raise UserError("There is nothing to serve; name a prompt, or --library DIR.")
    if not _is_loopback(address.host) and address.keys is None and not address.insecure:
        raise UserError(
            f"On --host {address.host} others reach the server, and there are no keys; give --keys "
            "FILE, or say --insecure."
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _log_lines() -> None:
    """Lines of JSON for requests, and plain ones for the rest, to standard error."""
    access = logging.getLogger("jaxprompt.access")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.handlers, access.propagate = [handler], False
    access.setLevel(logging.INFO)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("jaxprompt").setLevel(logging.INFO)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # of damaged forms of clients


def _service(
    parts: "Parts", sources: "Sources", address: Address, bounds: Bounds, folders: list[str]
) -> "Service":
    from jaxprompt.evaluation.inspection import inspect_prompt
    from jaxprompt.models import registry
    from jaxprompt.serving.http.keys import OPEN, PUBLIC, Keys
    from jaxprompt.serving.http.service import BackboneFacts, HttpLimits, Service
    from jaxprompt.serving.prepare import Words
    from jaxprompt.serving.start import Slots, name_of

    backbone = parts.backbone
    one_sequence = registry.one_sequence(backbone.config)
    facts = BackboneFacts(
        name_of(sources, backbone), str(backbone.source), backbone.fingerprint,
        "decoder-only" if one_sequence else "encoder-decoder", backbone.config.d_model,
    )  # fmt: skip
    keys = None if address.keys is None else Keys(address.keys)
    local = _is_loopback(address.host)
    anyone = None if keys is not None else OPEN if local else PUBLIC
    limits = HttpLimits(
        body_bytes=bounds.body_bytes, rows=bounds.request_rows, seconds=bounds.timeout,
        watchdog_seconds=bounds.watchdog,
    )  # fmt: skip
    slots = Slots(parts.compute)
    inspect = lambda version, nearest: dict(
        inspect_prompt(version.prompt, backbone, parts.tokenizer, nearest)
    )
    service = Service(
        facts, Words(parts.tokenizer, backbone.config.vocab_size), parts.catalogue, parts.compute,
        slots, inspect, anyone, keys,
        parts.router, parts.users, limits, _LOOPBACK if local and keys is None else None, folders,
    )  # fmt: skip
    service.metrics.watch(slots.facts, service.figures)
    return service


def _batcher(
    parts: "Parts",
    service: "Service",
    queued_rows: int,
    loop: asyncio.AbstractEventLoop,
    ended: Callable[[], None],
) -> "Batcher":
    from jaxprompt.serving.batcher import Batcher
    from jaxprompt.serving.start import queue_limits

    def progress(done: int, programs: int) -> None:
        service.warming.done, service.warming.programs = done, programs
        if done == programs:
            say("ready")

    return Batcher(
        parts.compute, loop.call_soon_threadsafe, queue_limits(parts.compute, queued_rows),
        warm=lambda: parts.compute.warm(progress), observe=service.metrics.note_batch,
        ended=ended, room=lambda: parts.compute.bank.room,
    )  # fmt: skip
