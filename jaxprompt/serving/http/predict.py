"""``/v1/predict`` and ``/v1/score``: rows and their answers, in order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.config.values import Values
from jaxprompt.data.tasks.rules import makes_rows
from jaxprompt.data.verbalizers import check_batch, prior_of, wants_content_free
from jaxprompt.inference.wording import Wording, probabilities
from jaxprompt.methods.user_library import SHARED_PROMPT
from jaxprompt.serving import prepare
from jaxprompt.serving.http.errors import ApiError, of_user_error
from jaxprompt.serving.http.json_body import JsonResponse
from jaxprompt.serving.http.schemas import PredictRequest, ScoreRequest
from jaxprompt.serving.http.service import (
    Choice,
    Opened,
    Router,
    Service,
    check_rows,
    named,
    open_request,
    read,
    resolve,
    server_timing,
)
from jaxprompt.serving.http.waiting import Pending, watched
from jaxprompt.serving.prepare import Asked, BadInput
from jaxprompt.serving.version import Version, in_words
from jaxprompt.serving.work import Chunk, Featured, Outcome, Ranked, Scored, Work

Given = str | Mapping[str, object]


@dataclass(eq=False)
class _Row:
    """One row of a request, and what came of it."""

    version: Version | None  # that answers it
    work: Work
    asked: Version | None = None  # whose task it is; another one where the backbone answers alone
    routed: Choice | None = None
    outcome: Outcome | None = None
    ids: list[int] = field(default_factory=list)  # that were generated
    content_free: bool = False  # it is asked to calibrate the others, and not answered


class _Prepared(NamedTuple):
    rows: list[_Row]
    warnings: list[str]


async def predict(request: Request) -> Response:
    """The answers of rows by the tasks of their prompts."""
    opened = open_request(request, "predict")
    service = opened.service
    body = await read(request, service, PredictRequest)
    check_rows(service, len(body.inputs))
    deadline = opened.deadline(body.timeout_ms)
    rankings: Sequence[Choice | None] = [None] * len(body.inputs)
    if body.user is not None:
        names = _of_users(opened, body, body.user)
    elif body.prompt is None:
        rankings = await _route(opened, request, body, deadline)
        names = [ranking.prompt or "" for ranking in rankings if ranking is not None]
    else:
        names = _one_each(body.prompt, len(body.inputs))
    versions = await _resolved(opened, names, deadline)
    if None in versions:
        raise ApiError(
            400,
            "invalid_value",
            "The backbone has no task of its own; name a prompt and send bare: true to have the "
            "backbone answer that prompt's task.",
            "prompt",
        )
    size = sum(map(_size, body.inputs))
    asked = [version for version in versions if version is not None]
    if body.wording is not None:
        asked = _in_words(service, body, asked)
    prepared = await service.apart(size, lambda: _predictions(service, body, asked, rankings))
    pending = await _answered(opened, request, prepared.rows, deadline)
    priors = _priors(service, prepared.rows, body.bare)
    return _answer(
        opened, prepared, pending, "predictions",
        [
            _prediction(service, row, body.top_k, priors.get(row.asked))
            for row in prepared.rows
            if not row.content_free
        ],
    )  # fmt: skip


def _in_words(service: Service, body: PredictRequest, versions: Sequence[Version]) -> list[Version]:
    """The version of each row in the words of the request. Raises ApiError."""
    if not isinstance(body.prompt, str) or body.wording is None:
        raise ApiError(
            400, "invalid_value", "Other words are for one prompt; name it in prompt.", "wording"
        )
    wording = Wording(body.wording.template, body.wording.labels)
    try:
        changed = in_words(versions[0], wording, service.words.tokenizer)
    except UserError as error:
        raise of_user_error(error, "wording") from None
    return [changed] * len(versions)


def _priors(service: Service, rows: Sequence[_Row], bare: bool) -> dict[Version | None, np.ndarray]:
    """The log prior of the labels of each version whose task is calibrated."""
    found: dict[Version | None, np.ndarray] = {}
    for version in dict.fromkeys(row.asked for row in rows):
        if version is None or version.task is None or version.labels is None:
            continue
        prior = service.priors.get(version, {}).get(bare)
        if prior is None:
            prior = _prior(version.task, version, rows)
        if prior is None:
            continue
        found[version] = prior
        if wants_content_free(version.task):
            service.priors.setdefault(version, {})[bare] = prior
    return found


def _prior(task: TaskConfig, version: Version, rows: Sequence[_Row]) -> np.ndarray | None:
    scores: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for row in rows:
        if row.asked is version and isinstance(row.outcome, Ranked):
            scores[row.content_free].append(row.outcome.scores)
    none = np.empty((0, len(task.labels or ())), np.float32)
    asked, free = (np.stack(each) if each else none for each in scores)
    return prior_of(task, asked, free)


async def score(request: Request) -> Response:
    """The log-likelihoods of targets."""
    opened = open_request(request, "predict")
    service = opened.service
    body = await read(request, service, ScoreRequest)
    check_rows(service, len(body.inputs))
    deadline = opened.deadline(body.timeout_ms)
    names = _one_each(body.prompt, len(body.inputs))
    versions = await _resolved(opened, names, deadline)
    size = sum(len(pair.input) + len(pair.target) for pair in body.inputs)
    prepared = await service.apart(size, lambda: _scores(service, body, versions))
    pending = await _answered(opened, request, prepared.rows, deadline)
    scores = [
        {"log_likelihood": row.outcome.log_likelihood, "tokens": row.outcome.tokens}
        | named(service, row.version)
        for row in prepared.rows
        if isinstance(row.outcome, Scored)
    ]
    return _answer(opened, prepared, pending, "scores", scores)


def _size(given: Given) -> int:
    if isinstance(given, str):
        return len(given)
    return sum(len(value) for value in given.values() if isinstance(value, str))


def _one_each(given: str | list[str], rows: int, what: str = "prompt") -> list[str]:
    """The prompt, or the user, of each row."""
    if isinstance(given, str):
        return [given] * rows
    if len(given) != rows:
        raise ApiError(
            400,
            "invalid_value",
            f"There are {len(given)} {what}s for {rows} inputs; name one {what}, or one for each "
            "input.",
            what,
        )
    return given


def _of_users(opened: Opened, body: PredictRequest, user: str | list[str]) -> list[str]:
    """The prompt of the user of each row, or the shared one. Raises ApiError."""
    service = opened.service
    if service.users is None:
        raise ApiError(
            400,
            "no_users",
            "This server has no library of users; start it with --library RUN/users.",
            "user",
        )
    if body.prompt is not None or body.candidates is not None:
        raise ApiError(
            400,
            "invalid_value",
            "A user decides which prompt answers; leave prompt and candidates out.",
            "user",
        )
    own = map(service.users.name_of, _one_each(user, len(body.inputs), "user"))
    sees = lambda name: service.catalogue.sees(name, opened.caller.tenant)
    return [name if sees(name) else SHARED_PROMPT for name in own]


async def _resolved(opened: Opened, names: Sequence[str], deadline: float) -> list[Version | None]:
    """The version of each name. One name is one version throughout a request."""
    found: dict[str, Version | None] = {}
    for name in names:
        if name not in found:
            found[name] = await resolve(opened, name, deadline)
    return [found[name] for name in names]


def _groups(versions: Sequence[Version | None]) -> dict[Version | None, list[int]]:
    """The places of each version."""
    groups: dict[Version | None, list[int]] = {}
    for place, version in enumerate(versions):
        groups.setdefault(version, []).append(place)
    return groups


def _predictions(
    service: Service,
    body: PredictRequest,
    versions: Sequence[Version],
    rankings: Sequence[Choice | None],
) -> _Prepared:
    """The rows of a request in the order of its inputs. Raises ApiError."""
    made: list[list[_Row]] = [[] for _ in body.inputs]
    warnings: list[str] = []
    free: list[_Row] = []
    for version, places in _groups(versions).items():
        assert version is not None
        ruled = version.task is not None and makes_rows(version.task)
        for some in [[place] for place in places] if ruled else [places]:  # a rule makes many rows
            asked = _asked(service, version, some, body)
            warnings += asked.warnings
            used = None if body.bare else version.placed
            for turn, work in enumerate(asked.works):
                place = some[0] if ruled else some[turn]
                made[place].append(_Row(used, work, version, rankings[place]))
        free += _calibrating(service, version, sum(len(made[place]) for place in places), body.bare)
    return _Prepared([*(row for rows in made for row in rows), *free], warnings)


def _calibrating(service: Service, version: Version, count: int, bare: bool) -> list[_Row]:
    """Rows that say nothing, where a version's task is calibrated by them for the first time.

    Raises ApiError where ``count`` rows are too few for calibration by batch.
    """
    if bare in service.priors.get(version, {}):
        return []
    try:
        if version.task is not None:
            check_batch(version.task, count)
        works = prepare.content_free_works(service.words, version, bare)
    except UserError as error:
        raise of_user_error(error, "inputs") from None
    used = None if bare else version.placed
    return [_Row(used, work, version, content_free=True) for work in works]


def _asked(
    service: Service, version: Version, places: Sequence[int], body: PredictRequest
) -> Asked:
    inputs: list[Given] = [body.inputs[place] for place in places]
    try:
        return prepare.prediction_works(service.words, version, inputs, body.bare)
    except BadInput as error:
        place = places[error.number]
        raise of_user_error(error, f"inputs.{place}") from None
    except UserError as error:
        raise of_user_error(error, "inputs") from None


def _scores(service: Service, body: ScoreRequest, versions: Sequence[Version | None]) -> _Prepared:
    rows: dict[int, _Row] = {}
    warnings: list[str] = []
    for version, places in _groups(versions).items():
        pairs = [prepare.Pair(body.inputs[p].input, body.inputs[p].target) for p in places]
        try:
            asked = prepare.score_works(
                service.words, version, pairs, body.raw, body.max_input_length
            )
        except UserError as error:
            raise of_user_error(error, "inputs") from None
        warnings += asked.warnings
        for place, work in zip(places, asked.works, strict=True):
            rows[place] = _Row(version, work, version)
    return _Prepared([rows[place] for place in sorted(rows)], warnings)


async def _answered(
    opened: Opened, request: Request, rows: Sequence[_Row], deadline: float
) -> Pending:
    """Fill in the outcome of each row."""
    pending = opened.submit([row.work for row in rows], deadline)
    async with watched(pending, request.receive):
        async for answer in pending.answers():
            row = rows[answer.number]
            row.outcome = answer.outcome
            if isinstance(answer.outcome, Chunk):
                row.ids += answer.outcome.tokens.ids.tolist()
    return pending


def _prediction(
    service: Service, row: _Row, top: int | None, prior: np.ndarray | None = None
) -> Values:
    assert row.asked is not None and row.asked.task is not None
    facts = named(service, row.version) | {"routed": _routed(row.routed)}
    plan = row.work.labels
    if plan is None or not isinstance(row.outcome, Ranked):
        text = prepare.generated_answer(service.words, row.asked.task, row.ids)
        return {"prediction": text, "label_index": None, "scores": None} | facts
    scores = row.outcome.scores if prior is None else row.outcome.scores - prior
    each = probabilities(scores)
    best = int(scores.argmax())
    told = [
        {
            "label": plan.labels[n],
            "log_likelihood": float(scores[n]),
            "probability": float(each[n]),
        }
        for n in prepare.label_numbers(plan, scores, top)
    ]
    return {"prediction": plan.labels[best], "label_index": best, "scores": told} | facts


def _routed(ranking: Choice | None) -> Values | None:
    if ranking is None:
        return None
    return {
        "prompt": ranking.prompt,
        "score": ranking.score,
        "margin": ranking.margin,
        "candidates": [{"prompt": name, "score": score} for name, score in ranking.candidates],
    }


def _answer(
    opened: Opened, prepared: _Prepared, pending: Pending, name: str, answers: list[Values]
) -> Response:
    rows, service = prepared.rows, opened.service
    read = sum(prepare.text_tokens(service.words, row.work) for row in rows)
    virtual = sum(len(row.work.example.inputs) for row in rows) - read
    written = sum(len(row.ids) for row in rows)
    usage = {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "virtual_tokens": virtual,
    }
    opened.note(pending, [row.version for row in rows], read + written)
    timing = opened.timing(pending)
    body: Values = {name: answers, "usage": usage, "timing": timing}
    if prepared.warnings:
        body["warnings"] = prepared.warnings
    return JsonResponse(body, headers=server_timing(timing))


# ---- without a prompt


async def _route(
    opened: Opened, request: Request, body: PredictRequest, deadline: float
) -> list[Choice]:
    """The prompt that the router chooses for each input. Raises ApiError where it abstains."""
    rankings = await rank_prompts(opened, request, body.inputs, body.candidates, deadline)
    for number, ranking in enumerate(rankings):
        if ranking.prompt is None:
            raise ApiError(
                422,
                "no_prompt_fits",
                f"No prompt fits input {number + 1}{ranking.reason}; name one.",
                f"inputs.{number}",
            )
    return rankings


def _allowed(opened: Opened, router: Router, candidates: Sequence[str] | None) -> list[str]:
    """Prompts that the caller sees. Raises UserError for a candidate that is not there."""
    catalogue, tenant = opened.service.catalogue, opened.caller.tenant
    if candidates:
        return [catalogue.facts(name, tenant).name for name in candidates]
    return [name for name in router.names if catalogue.sees(name, tenant)]


async def rank_prompts(
    opened: Opened,
    request: Request,
    inputs: Sequence[Given],
    candidates: Sequence[str] | None,
    deadline: float,
) -> list[Choice]:
    """What the router finds for each input. Raises ApiError where there is no router."""
    service = opened.service
    router = service.router
    if router is None:
        raise ApiError(
            400,
            "no_prompt",
            "Name a prompt: this server has no router (see jaxprompt library).",
            "prompt",
        )
    works = [prepare.feature_work(service.words, given) for given in inputs]
    pending = opened.submit(works, deadline)
    vectors: dict[int, np.ndarray] = {}
    async with watched(pending, request.receive):
        async for answer in pending.answers():
            if isinstance(answer.outcome, Featured):
                vectors[answer.number] = answer.outcome.vector
    try:
        allowed = _allowed(opened, router, candidates)
        rankings = [router.choose(vectors[number], allowed) for number in range(len(inputs))]
    except UserError as error:
        raise of_user_error(error, "candidates") from None
    for ranking in rankings:
        service.metrics.routed.labels(str(ranking.prompt is None).lower()).inc()
    return rankings
