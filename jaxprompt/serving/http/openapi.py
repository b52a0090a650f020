"""The published schema of the interface, made of the classes that check requests."""

from collections.abc import Mapping
from typing import NamedTuple

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from jaxprompt import __version__
from jaxprompt.config.values import Values
from jaxprompt.serving.http import schemas

_REF = "#/components/schemas/{model}"


class _Operation(NamedTuple):
    """A method of a route."""

    summary: str
    body: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    query: tuple[str, ...] = ()
    status: int = 200
    upload: bool = False


_OPERATIONS: Mapping[tuple[str, str], _Operation] = {
    ("post", "/v1/predict"): _Operation(
        "Answer rows by the tasks of their prompts", schemas.PredictRequest, schemas.PredictAnswer
    ),
    ("post", "/v1/score"): _Operation(
        "Log-likelihoods of targets", schemas.ScoreRequest, schemas.ScoreAnswer
    ),
    ("post", "/v1/completions"): _Operation(
        "Go on from a text", schemas.CompletionRequest, schemas.CompletionAnswer
    ),
    ("get", "/v1/models"): _Operation("The backbone and the prompts", query=("limit", "after")),
    ("get", "/v1/prompts"): _Operation("Facts of prompts", query=("limit", "after", "search")),
    ("get", "/v1/prompts/{name}"): _Operation("Facts of a prompt"),
    ("put", "/v1/prompts/{name}"): _Operation(
        "Add or replace a prompt", schemas.SourceRequest, status=201, upload=True
    ),
    ("delete", "/v1/prompts/{name}"): _Operation("Remove a prompt", status=204),
    ("get", "/v1/prompts/{name}/inspect"): _Operation("Look into a prompt", query=("nearest",)),
    ("post", "/v1/prompts/{name}/pin"): _Operation(
        "Keep a prompt on the device", schemas.PinRequest
    ),
    ("post", "/v1/prompts/{name}/config"): _Operation(
        "A config that tunes a prompt with other words, as YAML", schemas.ConfigRequest
    ),
    ("post", "/v1/load_lora_adapter"): _Operation(
        "vLLM's route to load", schemas.LoadAdapterRequest
    ),
    ("post", "/v1/unload_lora_adapter"): _Operation(
        "vLLM's route to unload", schemas.UnloadAdapterRequest
    ),
    ("get", "/tokenizer_info"): _Operation("The special tokens"),
    ("post", "/tokenize"): _Operation("Text to ids", schemas.TokenizeRequest),
    ("post", "/detokenize"): _Operation("Ids to text", schemas.DetokenizeRequest),
    ("get", "/health"): _Operation("Whether the process computes"),
    ("get", "/ready"): _Operation("Whether requests are answered"),
    ("get", "/version"): _Operation("What runs here"),
    ("get", "/metrics"): _Operation("Figures for Prometheus"),
}
_OPEN = ("/health", "/ready", "/version", "/metrics")


def openapi() -> Values:
    """The schema as OpenAPI 3.1."""
    used = {schemas.ErrorAnswer}
    for operation in _OPERATIONS.values():
        used |= {model for model in (operation.body, operation.answer) if model is not None}
    models = sorted(used, key=lambda model: model.__name__)
    _, shared = models_json_schema([(m, "validation") for m in models], ref_template=_REF)
    paths: dict[str, Values] = {}
    for (method, path), operation in _OPERATIONS.items():
        paths.setdefault(path, {})[method] = _described(path, operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxprompt", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": shared["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _described(path: str, operation: _Operation) -> Values:
    status = str(operation.status)
    answer: Values = {"description": "The answer"}
    if operation.answer is not None:
        answer["content"] = _json(operation.answer)
    error = {"description": "What is wrong", "content": _json(schemas.ErrorAnswer)}
    described: Values = {
        "summary": operation.summary,
        "responses": {status: answer, "default": error},
        "parameters": [
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
        * ("{name}" in path)
        + [_query(name) for name in operation.query],
    }
    if operation.upload:
        described["responses"]["200"] = {"description": "It was replaced"}
    if operation.body is not None:
        content = _json(operation.body) | (_FORM if operation.upload else {})
        described["requestBody"] = {"required": True, "content": content}
    if path not in _OPEN:
        described["security"] = [{"key": []}, {}]
    return described


def _json(model: type[BaseModel]) -> Values:
    reference = _REF.format(model=model.__name__)
    return {"application/json": {"schema": {"$ref": reference}}}


def _query(name: str) -> Values:
    number = name in ("limit", "nearest")
    schema = {"type": "integer", "minimum": 1} if number else {"type": "string"}
    return {"name": name, "in": "query", "schema": schema}


_FORM: Values = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "additionalProperties": {"type": "string", "format": "binary"},
        }
    }
}
