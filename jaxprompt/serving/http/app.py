"""The application: which route is answered by which function."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from jaxprompt.serving.http import completions, operations, predict, prompts
from jaxprompt.serving.http.errors import ApiError
from jaxprompt.serving.http.json_body import JsonResponse
from jaxprompt.serving.http.middleware import Edge
from jaxprompt.serving.http.openapi import openapi
from jaxprompt.serving.http.service import Service

PAGE = Path(__file__).parents[1] / "page"

Handler = Callable[[Request], Awaitable[Response]]


def _methods(**handlers: Handler) -> Handler:
    """One handler of several methods, so that a wrong method hears of all of them."""

    async def answer(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        return await handlers[method.lower()](request)

    return answer


async def _openapi(request: Request) -> Response:
    del request
    return JsonResponse(openapi())


def routes() -> list[Route]:
    """All routes but the page."""
    prompt = _methods(get=prompts.get_prompt, put=prompts.put_prompt, delete=prompts.delete_prompt)
    post, methods = ["POST"], ["GET", "PUT", "DELETE"]
    name = "/v1/prompts/{name:path}"
    return [
        Route("/v1/predict", predict.predict, methods=post),
        Route("/v1/score", predict.score, methods=post),
        Route("/v1/completions", completions.completions, methods=post),
        Route("/v1/models", prompts.list_models),
        Route("/v1/prompts", prompts.list_prompts),
        Route(f"{name}/inspect", prompts.inspect_prompt),
        Route(f"{name}/config", prompts.config_of_words, methods=post),
        Route(f"{name}/pin", prompts.pin_prompt, methods=post),
        Route(name, prompt, methods=methods),
        Route("/v1/load_lora_adapter", prompts.load_adapter, methods=post),
        Route("/v1/unload_lora_adapter", prompts.unload_adapter, methods=post),
        Route("/tokenizer_info", operations.tokenizer_info),
        Route("/tokenize", operations.tokenize, methods=post),
        Route("/detokenize", operations.detokenize, methods=post),
        Route("/health", operations.health),
        Route("/ready", operations.ready),
        Route("/version", operations.version),
        Route("/metrics", operations.metrics),
        Route("/openapi.json", _openapi),
    ]


def _page_routes(folder: Path) -> list[Route]:
    """One route for each file of the page, so that nothing else of the disk can be asked for."""
    return [
        Route("/" if file.name == "index.html" else f"/{file.name}", _file(file))
        for file in sorted(folder.glob("*"))
        if file.is_file()
    ]


def _file(path: Path) -> Handler:
    async def answer(request: Request) -> Response:
        del request
        return FileResponse(path, headers={"cache-control": "no-cache"})

    return answer


async def _no_route(request: Request, error: Exception) -> Response:
    """Starlette's own errors in the form of ours."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        wrong = ApiError(
            405,
            "method_not_allowed",
            f"{request.method} is not for {request.url.path}; use {allowed}.",
            headers=error.headers,
        )
        return wrong.response()
    if error.status_code == 404:
        return ApiError(404, "not_found", "There is nothing here; see /openapi.json.").response()
    return ApiError(error.status_code, "invalid_request", f"{error.detail}.").response()


def make_app(service: Service, page: Path = PAGE) -> Starlette:
    """The whole application."""
    app = Starlette(
        routes=[*routes(), *_page_routes(page)],
        middleware=[Middleware(Edge, service)],
        exception_handlers={HTTPException: _no_route},
    )
    app.state.service = service
    return app
