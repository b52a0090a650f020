"""The stages of the measurement: each returns figures for JSON.

Most take a server whose library has ``count`` prompts; ``bench_serve.py`` starts it once for all
stages of one count.
"""

import functools
import itertools
import math
import random
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from load import Answer, percentile, summary
from prompts import make_prompts, name_of, variant
from servers import Cores, Server, served

import jaxprompt as jp
from jaxprompt.config.schema import TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.tasks.splits import read_split
from jaxprompt.data.templates import columns_of

Figures = dict[str, Any]
ROWS = 32
REPLACEMENTS = 1000


class Setup(NamedTuple):
    """What all stages share."""

    artefact: Path  # a tuned prompt
    out: Path
    backbone: str
    seconds: float  # of each load
    rounds: int
    server_options: tuple[str, ...]  # for ``jaxprompt serve``
    cores: Cores
    peft_python: str | None = None

    def library(self, count: int) -> Path:
        """A directory with so many synthetic prompts."""
        folder = self.out / "libraries" / str(count)
        make_prompts(self.artefact, folder, count)
        return folder

    def inputs(self, count: int = 2000, seed: int = 0) -> list[dict]:
        """Rows of the prompt's own task, with lengths as they come."""
        rows = task_rows(self.artefact)
        return random.Random(seed).sample(rows, min(count, len(rows)))

    def variant(self) -> Path:
        """A prompt of the same shape that answers differently."""
        return variant(self.artefact, self.out / "variant")

    def served(self, *arguments: str, **settings: Any):
        """A server of these arguments; see ``servers.served`` for the settings."""
        name = f"server-{time.time_ns()}.log"
        full = [*arguments, "--backbone", self.backbone, *self.server_options]
        return served(full, log=self.out / "logs" / name, **{"cores": self.cores} | settings)


@functools.cache
def task_rows(artefact: Path) -> list[dict]:
    """The validation rows of a prompt's task, with the columns of its template."""
    task = parse(TaskConfig, jp.load_prompt(str(artefact)).metadata["task"], "task.")
    columns = columns_of(task.template)
    return [{name: row[name] for name in columns} for row in read_split(task, "validation")]


def names(count: int) -> list[str]:
    return [name_of(number) for number in range(count)]


def capacity(
    server: Server, setup: Setup, known: Sequence[str], zipf: float = 1.0, warm: float = 2.0
) -> float:
    """Requests a second that 64 waiting clients get, after ``warm`` seconds that do not count."""
    plan = {"names": list(known), "inputs": setup.inputs(), "zipf": zipf, "closed": 64}
    server.load(**plan, phases=[(0, min(warm, setup.seconds))])
    found = server.load(**plan, phases=[(0, setup.seconds)], seed=1)
    return summary(found, setup.seconds)["throughput"]


def throughput(setup: Setup, server: Server, count: int) -> Figures:
    """Offered against answered up to saturation, with ``count`` prompts under Zipf's law."""
    most = capacity(server, setup, names(count))
    levels = []
    for share in (0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 2.0):
        answers = server.load(
            names=names(count), inputs=setup.inputs(), seed=int(100 * share),
            phases=[(share * most, setup.seconds)],
        )  # fmt: skip
        levels.append({"share": share, **summary(answers, setup.seconds)})
    return {
        "prompts": count,
        "capacity": most,
        "levels": levels,
        "ready_seconds": server.start_seconds,
        "memory_mib": server.memory(),
        "metrics": server.metrics(),
    }


def burst(setup: Setup, server: Server, count: int) -> Figures:
    """Ten times the load for a while, from half of the capacity; when it is as before again."""
    rate = 0.5 * capacity(server, setup, names(count), warm=1.0)
    calm, high = setup.seconds, min(2.0, setup.seconds)
    phases = [(rate, calm), (10 * rate, high), (rate, 1.5 * calm)]
    answers = server.load(names=names(count), inputs=setup.inputs(), phases=phases)
    before = [each for each in answers if each.due < calm]
    during = [each for each in answers if calm <= each.due < calm + high]
    after = [each for each in answers if each.due >= calm + high]
    return {
        "prompts": count,
        "rate": rate,
        "before": summary(before, calm),
        "burst": summary(during, high),
        "recovery_seconds": recovery(before, after, calm + high),
        "memory_mib": server.memory(),
    }


def recovery(before: Sequence[Answer], after: Sequence[Answer], end: float) -> float | None:
    """Seconds after a burst from which on each half second is like those before it.

    Like before: nothing is refused or lost, and the median latency is at most twice the p99 of
    before. None: never in what was measured.
    """
    limit = 2 * (percentile([each.latency for each in before if each.status == 200], 0.99) or 0.0)
    last = -1
    for step, group in itertools.groupby(after, key=lambda each: int((each.due - end) / 0.5)):
        part = list(group)
        median = statistics.median(each.latency for each in part)
        if any(each.status != 200 for each in part) or median > limit:
            last = step
    ending = max((int((each.due - end) / 0.5) for each in after), default=-1)
    return None if last == ending else 0.5 * (last + 1)


def distinct(setup: Setup, server: Server, count: int) -> Figures:
    """The throughput of ``count`` prompts in turn against that of one, in alternating rounds."""
    rounds = []
    capacity(server, setup, names(count), zipf=0.0)  # all prompts are on the device
    for _ in range(setup.rounds):
        one = capacity(server, setup, names(1), warm=0.5)
        many = capacity(server, setup, names(count), zipf=0.0, warm=0.5)
        rounds.append({"identical": one, "distinct": many, "ratio": many / one})
    ratios = [each["ratio"] for each in rounds]
    return {"prompts": count, "rounds": rounds, "ratio": statistics.median(ratios)}


def changes(setup: Setup, server: Server, count: int) -> Figures:
    """Seconds until a prompt that is added, replaced or removed is so for requests.

    A change is over when the server says so; the next request proves it. ``first`` is the time of
    the first request to a new prompt, ``second`` that of the next one.
    """
    other, row, client = setup.variant(), setup.inputs(1), server.client
    found = {"add": [], "first": [], "second": [], "replace": [], "remove": []}
    for number in range(6 * setup.rounds):
        name = f"fresh{number}"
        found["add"].append(seconds_of(lambda n=name: client.put(n, setup.artefact)))
        found["first"].append(seconds_of(lambda n=name: client.predict(n, row)))
        found["second"].append(seconds_of(lambda n=name: client.predict(n, row)))
        first = client.predict(name, row)[0]
        found["replace"].append(seconds_of(lambda n=name: client.put(n, other, replace=True)))
        second = client.predict(name, row)[0]
        if first["digest"] == second["digest"]:
            raise RuntimeError("A replaced prompt answered after it had been replaced.")
        found["remove"].append(seconds_of(lambda n=name: client.delete(n)))
        if is_there(client, name, row):
            raise RuntimeError("A removed prompt answered.")
    return {"prompts": count} | {
        what: {"p50": statistics.median(times), "p99": percentile(times, 0.99)}
        for what, times in found.items()
    }


def is_there(client: jp.Client, name: str, row: list[dict]) -> bool:
    try:
        client.predict(name, row)
    except jp.ServerError as error:
        return error.status != 404
    return True


def seconds_of(act: Callable[[], object]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def replace(setup: Setup, server: Server, count: int) -> Figures:
    """Replacements of a prompt under load; each answer must be that of the version it names."""
    artefacts = [setup.artefact, setup.variant()]
    row, client, name = setup.inputs(1), server.client, "changing"
    kinds: dict[int, int] = {}
    wanted = []
    for kind, artefact in enumerate(artefacts):
        kinds[client.put(name, artefact, replace=True)["version"]] = kind
        [found] = client.predict(name, row)
        wanted.append([each["log_likelihood"] for each in found["scores"]])
    answers: list[Answer] = []
    rate = 0.4 * capacity(server, setup, [name])
    stop = threading.Event()
    thread = threading.Thread(target=keep_asking, args=(server, name, row, rate, answers, stop))
    thread.start()
    times = []
    for number in range(REPLACEMENTS):
        kind = number % 2
        begin = time.perf_counter()
        version = client.put(name, artefacts[kind], replace=True)["version"]
        times.append(time.perf_counter() - begin)
        kinds[version] = kind
    stop.set()
    thread.join()
    client.delete(name)
    return {
        "prompts": count,
        "replacements": REPLACEMENTS,
        "seconds_each": statistics.median(times),
        "compilations": server.metrics()["jaxprompt_compilations"],
        "difference_of_versions": max(abs(a - b) for a, b in zip(*wanted, strict=True)),
        **judged(answers, kinds, wanted),
    }


def keep_asking(
    server: Server,
    name: str,
    row: list[dict],
    rate: float,
    answers: list[Answer],
    stop: threading.Event,
) -> None:
    """Load for as long as it is wanted, two seconds at a time."""
    for seed in itertools.count():
        if stop.is_set():
            return
        answers += server.load(names=[name], inputs=row, phases=[(rate, 2.0)], seed=seed)


def judged(
    answers: Sequence[Answer], kinds: Mapping[int, int], wanted: Sequence[Sequence[float]]
) -> Figures:
    """How many answers are those of the version that they name."""
    good = [each for each in answers if each.status == 200]
    wrong = [
        each for each in good
        if each.version not in kinds
        or not close(each.scores or (), wanted[kinds[each.version]])
    ]  # fmt: skip
    return {
        "answers": len(good),
        "wrong_version": len(wrong),
        "failed": len(answers) - len(good),
        "versions_seen": len({each.version for each in good}),
        "p99": percentile([each.latency for each in good], 0.99),
    }


def close(one: Sequence[float], two: Sequence[float], tolerance: float = 1e-3) -> bool:
    return len(one) == len(two) and all(
        math.isclose(a, b, abs_tol=tolerance) for a, b in zip(one, two, strict=True)
    )


def mixed(setup: Setup, server: Server, count: int) -> Figures:
    """32 rows of D prompts as one batch, against a batch for each prompt."""
    rows, cells = setup.inputs(ROWS), []
    for distinct_prompts in (1, 4, 16, 32):
        asked = [name_of(at % min(distinct_prompts, count)) for at in range(ROWS)]
        parts = [
            (name, [row for row, other in zip(rows, asked, strict=True) if other == name])
            for name in sorted(set(asked))
        ]
        together = lambda a=asked: server.client.predict(a, rows)
        apart = lambda p=parts: [server.client.predict(name, part) for name, part in p]
        together(), apart()
        times = [(seconds_of(together), seconds_of(apart)) for _ in range(2 * setup.rounds)]
        ratios = sorted(apart_seconds / mixed_seconds for mixed_seconds, apart_seconds in times)
        cells.append(
            {
                "distinct": distinct_prompts,
                "mixed_seconds": statistics.median(first for first, _ in times),
                "apart_seconds": statistics.median(second for _, second in times),
                "ratio": statistics.median(ratios),
                "ratio_low": ratios[0],
                "ratio_high": ratios[-1],
            }
        )
    return {"rows": ROWS, "cells": cells}


def processes(setup: Setup, count: int) -> Figures:
    """Memory of one process for each prompt, and of one process for all of them."""
    library, cells, total = setup.library(count), [], 0.0
    with setup.served("--library", str(library)) as server:
        server.client.predict(names(count), setup.inputs(count))
        cells.append({"processes": 1, "prompts": count, "memory_mib": server.memory()})
    servers: list[Server] = []
    with ExitStack() as stack:
        for number in range(count):
            server = stack.enter_context(setup.served(f"only={library / name_of(number)}"))
            server.client.predict("only", setup.inputs(1))
            servers.append(server)
            total = sum(each.memory() for each in servers)
            cells.append({"processes": number + 1, "prompts": number + 1, "memory_mib": total})
    return {"cells": cells}


def starts(setup: Setup, count: int) -> Figures:
    """Seconds until a server is ready, with an empty cache of programs and with a full one.

    The server has its own defaults, and all cores.
    """
    library, cache = str(setup.library(count)), setup.out / "compiled"
    shutil.rmtree(cache, ignore_errors=True)
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(cache.resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    plain, found = setup._replace(server_options=(), cores=Cores("", "")), []
    for _ in range(3):
        with plain.served("--library", library, environment=environment) as server:
            programs = server.client._get("/ready")["programs"]
            found.append(server.start_seconds)
    return {
        "prompts": count,
        "programs": programs,
        "empty_cache": found[0],
        "full_cache": found[1:],
    }
