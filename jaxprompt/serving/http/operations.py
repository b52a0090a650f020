"""What operators and harnesses ask: health, readiness, figures, the tokenizer."""

import time
from typing import cast

from starlette.requests import Request
from starlette.responses import Response

from jaxprompt import __version__
from jaxprompt.config.errors import UserError
from jaxprompt.serving.http.errors import ApiError, of_user_error
from jaxprompt.serving.http.json_body import JsonResponse
from jaxprompt.serving.http.metrics import TYPE
from jaxprompt.serving.http.schemas import DetokenizeRequest, TokenizeRequest
from jaxprompt.serving.http.service import Service, open_request, read


def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


def hangs(service: Service) -> bool:
    """Whether a batch takes longer than any batch may."""
    since = service.batcher.busy_since
    return since is not None and time.monotonic() - since > service.limits.watchdog_seconds


async def health(request: Request) -> Response:
    """Whether the process computes. A process that does not should be started anew."""
    service = _service(request)
    if service.batcher.state == "failed":
        return JsonResponse({"status": "failed", "reason": "The device failed."}, 503)
    if hangs(service):
        return JsonResponse({"status": "failed", "reason": "A batch does not end."}, 503)
    return JsonResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether requests are answered: all is compiled, and the server does not end."""
    service = _service(request)
    warming = service.warming
    state = "draining" if service.draining else service.batcher.state
    body = {"state": state, "done": warming.done, "programs": warming.programs}
    if state == "ready" and not hangs(service):
        return JsonResponse(body)
    return JsonResponse(body, 503, headers={"retry-after": "1"})


async def version(request: Request) -> Response:
    """What runs here."""
    service = _service(request)
    facts = service.device.facts()
    return JsonResponse({
        "version": __version__,
        "backbone": service.backbone.id,
        "source": service.backbone.source,
        "fingerprint": service.backbone.fingerprint,
        "kind": service.backbone.kind,
        "width": service.backbone.width,
        "prompts": len(service.catalogue),
        "slots": facts.get("slots"),
        "max_prompt_length": facts.get("max_prompt_length"),
        "router": service.router is not None,
        "users": service.users is not None,
        "keys": service.keys is not None,
        "state": service.batcher.state,
        "limits": service.limits._asdict(),
    })  # fmt: skip


async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(_service(request).metrics.text(), media_type=TYPE)


async def tokenizer_info(request: Request) -> Response:
    """What lm-evaluation-harness asks of a tokenizer before it sends ids."""
    service = open_request(request, "predict").service
    tokenizer = service.words.tokenizer
    size = min(tokenizer.ids, service.words.vocab_rows)
    return JsonResponse({**tokenizer.special_names(), "chat_template": None, "size": size})


async def tokenize(request: Request) -> Response:
    """The ids of a text."""
    service = open_request(request, "predict").service
    body = await read(request, service, TokenizeRequest)
    tokenizer = service.words.tokenizer

    def encode() -> list[int]:
        ids = tokenizer.encode(body.prompt)
        if not body.add_special_tokens:
            return ids
        return [*tokenizer.start_ids, *ids, *([] if tokenizer.one_sequence else [tokenizer.eos_id])]

    try:
        ids = await service.apart(len(body.prompt), encode)
    except UserError as error:
        raise of_user_error(error, "prompt") from None
    return JsonResponse({"tokens": ids, "count": len(ids)})


async def detokenize(request: Request) -> Response:
    """The text of ids."""
    service = open_request(request, "predict").service
    body = await read(request, service, DetokenizeRequest)
    most = min(service.words.tokenizer.ids, service.words.vocab_rows)
    wrong = [id for id in body.tokens if id >= most]
    if wrong:
        sentence = f"The id {wrong[0]} is no token's; ids are from 0 to {most - 1}."
        raise ApiError(400, "invalid_value", sentence, "tokens")
    text = service.words.tokenizer.decode_all(body.tokens)
    return JsonResponse({"prompt": text})
