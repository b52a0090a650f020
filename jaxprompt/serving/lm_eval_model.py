"""A model of lm-evaluation-harness that a running ``jaxprompt serve`` answers.

    python -m jaxprompt.serving.lm_eval_model --model jaxprompt \\
        --model_args url=http://127.0.0.1:8000,prompt=supersense --batch_size 32 --tasks TASK

It is for encoder-decoders. The harness's own ``local-completions`` sends context and continuation
as one text, so a server cannot know where the encoder's input ends; a decoder-only backbone needs
no such knowledge and is served by ``local-completions``.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar, runtime_checkable

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.values import Values
from jaxprompt.serving.client import Client

NAME = "jaxprompt"  # of --model
_MAX_TOKENS = 256  # that the harness asks for where a task says nothing

In = TypeVar("In")
Out = TypeVar("Out")


@runtime_checkable
class Request(Protocol):
    """``lm_eval.api.instance.Instance``: what is asked of a model."""

    @property
    def args(self) -> tuple: ...


class Answers:
    """What the harness asks, in requests to a server.

    Args:
        client: of the server.
        prompt: its name there, or the id of the backbone for that alone.
        batch_size: rows of a request.
        concurrent: requests at a time.
        greedy: whether a continuation is also compared with the greedy answer, which costs one
            generated answer for each context. Without it the harness is told that it differs:
            metrics that count exact greedy matches are then 0, accuracies of choices are the same.
    """

    def __init__(
        self,
        client: Client,
        prompt: str,
        *,
        batch_size: int = 32,
        concurrent: int = 2,
        greedy: bool = True,
    ):
        self.client = client
        self.prompt = prompt
        self.batch_size = batch_size
        self.concurrent = concurrent
        self.greedy = greedy

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """log p(continuation, EOS | context) in nats, and whether it is the greedy answer.

        The space that the harness puts between both is left out: a target begins without one.
        """
        rows = [{"input": context, "target": target.strip()} for context, target in pairs]
        scores = self._in_parts(rows, lambda part: self.client.score(self.prompt, part))
        greedy = self._greedy_texts(rows, scores) if self.greedy else {}
        return [
            (float(score["log_likelihood"]), greedy.get(row["input"]) == row["target"])
            for row, score in zip(rows, scores, strict=True)
        ]

    def texts(self, asked: Sequence[tuple[str, Mapping[str, object]]]) -> list[str]:
        """Completions of contexts, each with settings of the harness."""
        settings = [_settings(given) for _, given in asked]
        kinds = sorted({repr(each) for each in settings})
        found: dict[int, str] = {}
        for kind in kinds:
            places = [place for place, each in enumerate(settings) if repr(each) == kind]
            texts = self._completions([asked[place][0] for place in places], settings[places[0]])
            found |= dict(zip(places, texts, strict=True))
        return [found[place] for place in range(len(asked))]

    def _greedy_texts(
        self, rows: Sequence[Mapping[str, str]], scores: Sequence[Mapping[str, object]]
    ) -> dict[str, str]:
        """The greedy answer of each context, as long as its longest target or shorter."""
        contexts = list(dict.fromkeys(row["input"] for row in rows))
        longest = max((int(str(score["tokens"])) for score in scores), default=1)
        texts = self._completions(contexts, {"max_tokens": longest, "temperature": 0.0})
        return {context: text.strip() for context, text in zip(contexts, texts, strict=True)}

    def _completions(self, contexts: Sequence[str], settings: Values) -> list[str]:
        def ask(part: Sequence[str]) -> list[str]:
            answer = self.client.complete(self.prompt, list(part), **settings)
            return [each["text"] for each in sorted(answer["choices"], key=lambda c: c["index"])]

        return self._in_parts(contexts, ask)

    def _in_parts(
        self, rows: Sequence[In], ask: Callable[[Sequence[In]], Iterable[Out]]
    ) -> list[Out]:
        """The answers of all rows, in order."""
        parts = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
        with ThreadPoolExecutor(self.concurrent) as threads:
            answers = [answer for part in threads.map(ask, parts) for answer in part]
        if len(answers) != len(rows):
            raise UserError(f"The server answered {len(answers)} rows of {len(rows)}.")
        return answers


def _settings(given: Mapping[str, object]) -> Values:
    """Settings of a completion from those of the harness; greedy unless it samples."""
    until = given.get("until") or []
    stop = [until] if isinstance(until, str) else list(until) if isinstance(until, list) else []
    samples = given.get("do_sample", False)
    settings: Values = {
        "max_tokens": given.get("max_gen_toks") or given.get("max_tokens") or _MAX_TOKENS,
        "temperature": given.get("temperature", 1.0) if samples else 0.0,
        "top_p": given.get("top_p") if samples else None,
        "seed": given.get("seed"),
        "stop": stop[:4] or None,
    }
    return {name: value for name, value in settings.items() if value is not None}


def answers_of(url: str, prompt: str, key: str | None, settings: Mapping[str, object]) -> Answers:
    """Answers by what ``--model_args`` has, where numbers may be texts."""
    try:
        batch_size = int(str(settings.get("batch_size") or 32))
        concurrent = int(str(settings.get("num_concurrent") or 2))
    except ValueError:
        raise UserError(
            f"batch_size is {shown(settings.get('batch_size'))} and num_concurrent "
            f"{shown(settings.get('num_concurrent'))}; give whole numbers."
        ) from None
    greedy = str(settings.get("greedy", True)).lower() not in ("false", "0", "no")
    return Answers(
        Client(url, key), prompt, batch_size=batch_size, concurrent=concurrent, greedy=greedy
    )


def register() -> type:
    """The model class, under its name in the harness's registry.

    Raises:
        UserError: if lm-evaluation-harness is not installed.
    """
    try:
        model = importlib.import_module("lm_eval.api.model")
        registry = importlib.import_module("lm_eval.api.registry")
    except ImportError:
        raise UserError(
            "lm-evaluation-harness is not installed; pip install 'jaxprompt[lm-eval]'."
        ) from None

    class ServedModel(model.LM):
        def __init__(
            self,
            prompt: str,
            url: str = "http://127.0.0.1:8000",
            key: str | None = None,
            **settings: object,
        ):
            super().__init__()
            self.answers = answers_of(url, prompt, key, settings)

        def loglikelihood(
            self, requests: Sequence[Request], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            return self.answers.log_likelihoods([request.args for request in requests])

        def generate_until(
            self, requests: Sequence[Request], disable_tqdm: bool = False
        ) -> list[str]:
            return self.answers.texts([request.args for request in requests])

        def loglikelihood_rolling(
            self, requests: Sequence[Request], disable_tqdm: bool = False
        ) -> list[float]:
            raise NotImplementedError("A text without an input has no likelihood here.")

    return registry.register_model(NAME)(ServedModel)


def main() -> None:
    """The harness's own command, which knows this model."""
    register()
    importlib.import_module("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    main()
