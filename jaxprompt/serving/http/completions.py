"""``/v1/completions`` as OpenAI has it: text goes on, or is told how likely it is."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from jaxprompt.config.errors import UserError
from jaxprompt.config.values import Values
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.serving import prepare
from jaxprompt.serving.batcher import Answer
from jaxprompt.serving.completion_text import CompletionText
from jaxprompt.serving.http.errors import ApiError, of_user_error
from jaxprompt.serving.http.json_body import JsonResponse
from jaxprompt.serving.http.schemas import CompletionRequest
from jaxprompt.serving.http.service import (
    Opened,
    Service,
    check_rows,
    named,
    open_request,
    read,
    resolve,
    server_timing,
)
from jaxprompt.serving.http.streaming import EventStream
from jaxprompt.serving.http.waiting import ClientGone, Pending, watched
from jaxprompt.serving.version import Version
from jaxprompt.serving.work import Chunk, Echoed, Sampling, Tokens, Work

_NO_TOKENS = Tokens(
    np.zeros(0, np.int32), np.zeros(0), np.zeros((0, 0), np.int32), np.zeros((0, 0))
)


class _LogProbs(NamedTuple):
    """Tokens with their likelihoods, as lists that grow."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    def add(self, tokenizer: Tokenizer, tokens: Tokens, top: int) -> None:
        """Add tokens. The likeliest ones of a position include the token itself."""
        for at, id in enumerate(tokens.ids.tolist()):
            text, value = tokenizer.token_text(id), float(tokens.log_probs[at])
            start = self.text_offset[-1] + len(self.tokens[-1]) if self.tokens else 0
            others = dict(
                zip(tokens.top_ids[at].tolist(), tokens.top_log_probs[at].tolist(), strict=True)
            )
            value = others.get(id, value)  # the same number, whichever list it is read from
            self.tokens.append(text)
            self.text_offset.append(start)
            unknown = not np.isfinite(value)
            self.token_logprobs.append(None if unknown else value)
            told: dict[str, float] = {}
            for other, likely in [*list(others.items())[:top], (id, value)]:
                name = tokenizer.token_text(other)
                if np.isfinite(likely):
                    told[name] = max(likely, told.get(name, likely))
            self.top_logprobs.append(None if unknown or not top else told)

    def cut(self, length: int) -> None:
        """Forget tokens that begin behind a text of this length."""
        kept = sum(start < length for start in self.text_offset)
        for values in self:
            del values[kept:]

    def take(self, start: int) -> Values:
        """What was added from a place on."""
        return {name: values[start:] for name, values in self._asdict().items()}


@dataclass(eq=False)
class _Choice:
    """One completion: a row that is generated, one that is echoed, or both."""

    index: int
    ids: Sequence[int]  # of what it continues
    text: CompletionText
    before: str  # that is told before the completion
    logprobs: _LogProbs | None
    waiting: set[str] = field(default_factory=set)  # kinds of rows without their last answer
    held: list[Chunk] = field(default_factory=list)  # that came before the echo
    finish: str | None = None
    told: int = 0  # tokens whose likelihoods were told


class _Plan(NamedTuple):
    """A request, its choices, and the rows that the engine computes for them."""

    body: CompletionRequest
    version: Version | None
    choices: list[_Choice]
    works: list[Work]
    owner: list[_Choice]  # of each row
    ignored: list[str]


async def completions(request: Request) -> Response:
    """Text that goes on from a prompt."""
    opened = open_request(request, "predict")
    service = opened.service
    body = await read(request, service, CompletionRequest)
    deadline = opened.deadline(body.timeout_ms)
    _check(service, body)
    version = await resolve(opened, body.model, deadline, "model")
    texts = _texts(body)
    check_rows(service, len(texts) * (body.n or 1))
    size = sum(map(len, texts))
    try:
        plan = await service.apart(size, lambda: _plan(service, body, version, texts))
    except UserError as error:
        raise of_user_error(error, "prompt") from None
    pending = opened.submit(plan.works, deadline)
    headers = {"x-jaxprompt-ignored": ", ".join(plan.ignored)} if plan.ignored else {}
    facts = _facts(opened, plan)
    if body.stream:
        return EventStream(_events(opened, request, plan, pending, facts), headers)
    async with watched(pending, request.receive):
        async for answer in pending.answers():
            _take(service.words.tokenizer, plan, pending, answer)
    choices = [
        {
            "index": choice.index,
            "text": choice.before + choice.text.text,
            "finish_reason": choice.finish,
            "logprobs": None if choice.logprobs is None else choice.logprobs.take(0),
        }
        for choice in plan.choices
    ]
    usage = _usage(opened, plan, pending)
    timing = opened.timing(pending)
    return JsonResponse(
        facts | {"choices": choices, "usage": usage}, headers=headers | server_timing(timing)
    )


def _check(service: Service, body: CompletionRequest) -> None:
    if body.echo and service.backbone.kind == "encoder-decoder":
        raise ApiError(
            400,
            "echo_unsupported",
            "echo is of decoder-only backbones: this one reads its prompt with an encoder, which "
            "gives no likelihoods; POST /v1/score has those of targets.",
            "echo",
        )
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(
            400, "invalid_value", "max_tokens is 0; give 1 or more, or ask for echo.", "max_tokens"
        )


def _texts(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a request."""
    given = body.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise ApiError(400, "invalid_value", "The prompt is an empty list.", "prompt")
    if isinstance(given[0], int):
        return [[id for id in given if isinstance(id, int)]]
    return [each for each in given if isinstance(each, str | list)]


def _plan(
    service: Service,
    body: CompletionRequest,
    version: Version | None,
    texts: Sequence[str | list[int]],
) -> _Plan:
    words, count = service.words, body.n or 1
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    plan = _Plan(body, version, [], [], [], sorted(body.model_extra or {}))
    for text in texts:
        ids = prepare.prompt_ids(words, text)
        before = ""
        if body.echo:
            before = text if isinstance(text, str) else words.tokenizer.decode_all(ids)
        for _ in range(count):
            choice = _Choice(
                len(plan.choices), ids, CompletionText(words.tokenizer, ids, stop), before,
                None if body.logprobs is None else _LogProbs([], [], [], []),
            )  # fmt: skip
            plan.choices.append(choice)
            for settings in _rows(body, choice.index):
                work = prepare.completion_work(words, version, ids, settings)
                choice.waiting.add(work.kind)
                plan.works.append(work)
                plan.owner.append(choice)
    return plan


def _rows(body: CompletionRequest, index: int) -> list[Sampling | None]:
    """What is computed for a choice: None is the echo, settings are a generation."""
    most = 16 if body.max_tokens is None else body.max_tokens
    temperature = 1.0 if body.temperature is None else body.temperature
    echoes = body.echo and (body.logprobs is not None or most == 0)
    if echoes and (most == 0 or (most == 1 and temperature == 0)):
        return [None]  # an echo has the likeliest next token, too
    seed = secrets.randbelow(1 << 31) if body.seed is None else (body.seed + index) % (1 << 31)
    settings = Sampling(most, temperature, body.top_p or 1.0, seed, bool(body.ignore_eos))
    return [None, settings] if echoes else [settings]


def _take(tokenizer: Tokenizer, plan: _Plan, pending: Pending, answer: Answer) -> str:
    """Add an answer to its choice; the text that it makes certain."""
    choice, outcome = plan.owner[answer.number], answer.outcome
    if answer.last:
        choice.waiting.discard(plan.works[answer.number].kind)
    if isinstance(outcome, Echoed):
        new = _take_echo(tokenizer, plan.body, choice, outcome)
        for chunk in choice.held:
            new += _take_chunk(tokenizer, plan, pending, choice, chunk, answer.number + 1)
        choice.held.clear()
        return new
    if not isinstance(outcome, Chunk):
        return ""
    if "echo" in choice.waiting:  # the text before it comes first
        choice.held.append(outcome)
        return ""
    return _take_chunk(tokenizer, plan, pending, choice, outcome, answer.number)


def _take_echo(
    tokenizer: Tokenizer, body: CompletionRequest, choice: _Choice, outcome: Echoed
) -> str:
    alone = "generate" not in choice.waiting and not choice.held
    tokens, top = outcome.tokens, body.logprobs or 0
    count = len(choice.ids) + (alone and body.max_tokens == 1)
    kept = Tokens(*(part[:count] for part in vars(tokens).values()))
    if choice.logprobs is not None:
        choice.logprobs.add(tokenizer, kept, top)
    if not alone:
        return ""
    following = kept.ids[len(choice.ids) :].tolist()
    choice.finish = "stop" if tokenizer.eos_id in following else "length"
    return choice.text.add([id for id in following if id != tokenizer.eos_id], last=True).text


def _take_chunk(
    tokenizer: Tokenizer, plan: _Plan, pending: Pending, choice: _Choice, chunk: Chunk, number: int
) -> str:  # fmt: skip
    if choice.finish is not None:  # a stop string has ended it
        return ""
    ids = chunk.tokens.ids.tolist()
    piece = choice.text.add(ids, last=chunk.finish is not None)
    if choice.logprobs is not None:
        choice.logprobs.add(tokenizer, chunk.tokens, plan.body.logprobs or 0)
    if piece.stopped:
        choice.finish = "stop"
        pending.cancel(number)
        if choice.logprobs is not None:
            choice.logprobs.cut(len(choice.before) + len(choice.text.text))
    elif chunk.finish is not None:
        choice.finish = "length" if chunk.finish == "length" else "stop"
    return piece.text


def _facts(opened: Opened, plan: _Plan) -> Values:
    version = named(opened.service, plan.version)
    return {
        "id": f"cmpl-{opened.id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": plan.body.model,
        "version": version["version"],
        "digest": version["digest"],
        "system_fingerprint": opened.service.backbone.fingerprint,
    }


def _usage(opened: Opened, plan: _Plan, pending: Pending) -> Values:
    """The tokens of a request; they are noted in the log and in the figures, too."""
    count = plan.body.n or 1
    read = sum(len(choice.ids) for choice in plan.choices[::count])
    written = sum(len(choice.text.ids) for choice in plan.choices)
    virtual = 0 if plan.version is None else plan.version.length * len(plan.choices[::count])
    opened.note(pending, [plan.version] * len(plan.choices), read + written)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "virtual_tokens": virtual,
    }


async def _events(
    opened: Opened, request: Request, plan: _Plan, pending: Pending, facts: Values
) -> AsyncIterator[Values]:
    """The events of a stream; an error is the last one."""
    tokenizer = opened.service.words.tokenizer
    options = plan.body.stream_options
    wants_usage = options is not None and options.include_usage
    started: set[int] = set()
    ended: set[int] = set()
    try:
        async with watched(pending, request.receive):
            async for answer in pending.answers():
                choice = plan.owner[answer.number]
                text = _take(tokenizer, plan, pending, answer)
                ends = choice.finish is not None and choice.index not in ended
                if choice.index in ended or not (text or ends):
                    continue
                if choice.index not in started:
                    started.add(choice.index)
                    text = choice.before + text
                if ends:
                    ended.add(choice.index)
                yield facts | {"choices": [_delta(choice, text)], "usage": None}
        usage = _usage(opened, plan, pending)
        if wants_usage:
            yield facts | {"choices": [], "usage": usage}
    except ApiError as error:
        opened.log["error"] = error.code
        yield error.body()
    except ClientGone:
        opened.log["error"] = "client_gone"
    finally:
        pending.close()


def _delta(choice: _Choice, text: str) -> Values:
    logprobs = None
    if choice.logprobs is not None:
        logprobs = choice.logprobs.take(choice.told)
        choice.told = len(choice.logprobs.tokens)
    return {
        "index": choice.index, "text": text, "finish_reason": choice.finish, "logprobs": logprobs
    }  # fmt: skip
