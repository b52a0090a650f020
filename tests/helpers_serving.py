"""A server without a model: an engine that makes its answers up, and requests without sockets."""

import contextlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path

import httpx2
import numpy as np
from helpers_data import make_tokenizer

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.methods.artefact import save_prompt
from jaxprompt.methods.tuned import Prompt
from jaxprompt.serving.artefacts import read_artefact
from jaxprompt.serving.batcher import Batcher
from jaxprompt.serving.catalogue import Catalogue
from jaxprompt.serving.fair_queue import Limits
from jaxprompt.serving.http.app import make_app
from jaxprompt.serving.http.keys import OPEN
from jaxprompt.serving.http.service import BackboneFacts, Service
from jaxprompt.serving.prepare import Words
from jaxprompt.serving.store import DirectoryStore
from jaxprompt.serving.version import Version, label_plan
from jaxprompt.serving.work import (
    Chunk,
    Echoed,
    Failed,
    Featured,
    Ranked,
    Scored,
    Tokens,
)

VOCAB, WIDTH, LONGEST = 64, 4, 40
TASK = {"name": "mine", "template": "question : {text}", "labels": ["yes", "no"],
        "max_input_length": 16, "max_target_length": 4}  # fmt: skip


def tokens(ids) -> Tokens:
    """Tokens of which each is twice as likely as the next id, with log p -1."""
    ids = np.asarray(ids, np.int32)
    top = np.stack([ids, (ids + 1) % VOCAB], axis=1)
    return Tokens(
        ids, np.full(len(ids), -1.0, np.float32), top, np.tile([-1.0, -2.0], (len(ids), 1))
    )


class FakeEngine:
    """Answers by the first number of a prompt's vectors: the number of the likeliest label."""

    def __init__(self, one_sequence: bool = False):
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.one_sequence, self.batches, self.error = one_sequence, [], None

    def check(self, work):
        if len(work.example.inputs) > LONGEST:
            raise UserError(f"The input has {len(work.example.inputs)} tokens; shorten it.")

    def lane(self, work):
        return (work.kind,)

    def cost(self, work):
        return 32

    def run(self, batch):
        self._enter(batch)
        return [self._outcome(work) for work in batch]

    def generate(self, batch):
        words = [12, 13, 14, 15, 16, 17]
        for step in range(0, 6, 2):
            self._enter(batch)
            chunks = []
            for work in batch:
                left = work.settings.max_tokens - step
                ids = words[step : step + 2][: max(left, 0)]
                finish = "cancelled" if work.cancelled else "length" if left <= 2 else None
                chunks.append(Chunk(tokens(ids), finish or ("stop" if step == 4 else None)))
            yield chunks

    def _outcome(self, work):
        value = 0 if work.version is None else int(work.version.prompt.vectors[0, 0])
        if value < 0:
            return Failed("The scores of this row are not finite numbers.")
        if work.kind == "rank":
            scores = np.full(len(work.labels.labels), -3.0, np.float32)
            scores[value] = -1.0
            return Ranked(scores)
        if work.kind == "score":
            return Scored(-float(len(work.example.targets)), len(work.example.targets))
        if work.kind == "features":
            return Featured(work.example.inputs.astype(np.float32))
        ids = work.example.inputs[work.example.inputs < VOCAB]
        return Echoed(tokens([*ids, 12]))

    def _enter(self, batch):
        self.batches.append(batch)
        self.entered.set()
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error


class FailingFiles:
    """A file system of fsspec that raises an error from all that it is asked, once it has one."""

    def __init__(self, files):
        self.files, self.error = files, None

    def __getattr__(self, name):
        if self.error is not None:
            raise self.error
        return getattr(self.files, name)


class FakeDevice:
    """A bank of slots that only remembers what is pinned."""

    def __init__(self):
        self.pinned = set()

    def holds(self, version: Version) -> bool:
        return version in self.pinned

    def pin(self, version: Version, pinned: bool) -> None:
        self.pinned.add(version) if pinned else self.pinned.discard(version)

    def facts(self) -> Mapping[str, float]:
        return {"slots": 8, "compilations": 0}


def prompt_folder(folder: Path, answer: int = 0, task: dict | None = TASK) -> Path:
    """An artefact whose rows the fake engine answers with label number ``answer``."""
    vectors = np.full((2, WIDTH), answer, np.float32)
    save_prompt(folder, Prompt(vectors, {} if task is None else {"task": task}))
    return folder


class Running:
    """A service with its batcher, and a client of its application."""

    def __init__(self, folder: Path, *, one_sequence: bool = False, store=None, **more):
        library = folder / "library"
        for number, name in enumerate(("first", "second")):
            if not (library / name).exists():
                prompt_folder(library / name, number)
        prompt_folder(library / "acme" / "own", 1)
        make_tokenizer(folder / "tokenizer")
        words = Words(load_tokenizer(folder / "tokenizer", one_sequence=one_sequence), VOCAB)
        self.library, self.engine, self._words = library, FakeEngine(one_sequence), words
        self.catalogue = Catalogue([store or DirectoryStore(library)], self._made)
        self.catalogue.scan()
        kind = "decoder-only" if one_sequence else "encoder-decoder"
        self.service = Service(
            BackboneFacts("tiny", "tiny", "f00d", kind, WIDTH), words, self.catalogue, self.engine,
            FakeDevice(), lambda version, nearest: {"length": version.length},
            **{"anyone": OPEN} | more,
        )  # fmt: skip

    def _made(self, candidate) -> Version:
        prompt = read_artefact(candidate.files, candidate.name)
        if prompt.vectors.shape[1] != WIDTH:
            raise UserError("The prompt has vectors of another width.")
        recorded = prompt.metadata.get("task")
        task = None if recorded is None else TaskConfig(**recorded)
        plan = None if task is None else label_plan(task, self._words.tokenizer)
        return Version(
            candidate.name, candidate.tenant, candidate.digest, 0, prompt, task, labels=plan
        )

    @contextlib.asynccontextmanager
    async def client(self, limits: Limits = Limits(), **headers: str):
        """A client that talks to the application in this event loop."""
        import asyncio

        loop = asyncio.get_running_loop()
        self.service.batcher = Batcher(self.engine, loop.call_soon_threadsafe, limits)
        self.service.batcher.start()
        while self.service.batcher.state == "warming":
            await asyncio.sleep(0.001)
        transport = httpx2.ASGITransport(make_app(self.service))
        base = "http://127.0.0.1:8000"
        async with httpx2.AsyncClient(
            transport=transport, base_url=base, headers=headers, timeout=20
        ) as client:
            try:
                yield client
            finally:
                self.engine.gate.set()
                self.service.batcher.drain()
                assert self.service.batcher.join(20)
                self.catalogue.close()


def error_of(response) -> tuple[int, str]:
    """Status and code of an answer that is an error."""
    return response.status_code, response.json()["error"]["code"]


def events_of(text: str) -> list[dict]:
    """The values of a stream of events, whose end is checked."""
    parts = [part.removeprefix("data: ") for part in text.strip().split("\n\n")]
    assert parts[-1] == "[DONE]"
    return [json.loads(part) for part in parts[:-1] if not part.startswith(":")]
