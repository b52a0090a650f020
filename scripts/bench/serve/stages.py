"""The stages of the measurement. Each starts its own server and returns figures for JSON."""

import itertools
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
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


class Setup(NamedTuple):
    """What all stages share."""

    artefact: Path  # a tuned prompt
    out: Path
    backbone: str
    seconds: float  # of each load
    rounds: int
    server_options: Sequence[str]  # for ``jaxprompt serve``
    cores: Cores
    peft_python: str | None = None

    def library(self, count: int) -> Path:
        """A directory with so many synthetic prompts."""
        folder = self.out / "libraries" / str(count)
        make_prompts(self.artefact, folder, count)
        return folder

    def inputs(self, count: int = 2000, seed: int = 0) -> list[dict]:
        """Rows of the prompt's own task, with lengths as they come."""
        task = parse(TaskConfig, jp.load_prompt(str(self.artefact)).metadata["task"], "task.")
        rows = list(read_split(task, "validation"))
        columns = columns_of(task.template)
        drawn = random.Random(seed).sample(rows, min(count, len(rows)))
        return [{name: row[name] for name in columns} for row in drawn]

    def served(self, *arguments: str):
        name = f"server-{time.time_ns()}.log"
        return served(
            [*arguments, "--backbone", self.backbone, *self.server_options],
            cores=self.cores, log=self.out / "logs" / name,
        )  # fmt: skip


def names(count: int) -> list[str]:
    return [name_of(number) for number in range(count)]


def capacity(server: Server, setup: Setup, known: Sequence[str], zipf: float = 1.0) -> float:
    """Requests a second that 64 waiting clients get."""
    plan = {"names": list(known), "inputs": setup.inputs(), "zipf": zipf, "closed": 64}
    server.load(**plan, phases=[(0, min(2.0, setup.seconds))])
    found = server.load(**plan, phases=[(0, setup.seconds)], seed=1)
    return summary(found, setup.seconds)["throughput"]


def throughput(setup: Setup, count: int) -> Figures:
    """Offered against answered up to saturation, with ``count`` prompts under Zipf's law."""
    with setup.served("--library", str(setup.library(count))) as server:
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


def burst(setup: Setup, count: int) -> Figures:
    """Ten times the load for a while, from half of the capacity; when it is as before again."""
    with setup.served("--library", str(setup.library(count))) as server:
        rate = 0.5 * capacity(server, setup, names(count))
        calm, high = setup.seconds, min(2.0, setup.seconds)
        phases = [(rate, calm), (10 * rate, high), (rate, 2 * calm)]
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


def distinct(setup: Setup, count: int) -> Figures:
    """The throughput of ``count`` prompts in turn against that of one, in alternating rounds."""
    with setup.served("--library", str(setup.library(count))) as server:
        rounds = []
        for _ in range(setup.rounds):
            one = capacity(server, setup, names(1))
            many = capacity(server, setup, names(count), zipf=0.0)
            rounds.append({"identical": one, "distinct": many, "ratio": many / one})
        ratios = [each["ratio"] for each in rounds]
        return {"prompts": count, "rounds": rounds, "ratio": statistics.median(ratios)}


def changes(setup: Setup, count: int) -> Figures:
    """Seconds until a prompt that is added, replaced or removed is so for requests."""
    other = variant(setup.artefact, setup.out / "variant")
    row = setup.inputs(1)
    with setup.served("--library", str(setup.library(count))) as server:
        client, found = server.client, {"add": [], "replace": [], "remove": []}
        for number in range(10 * setup.rounds):
            name = f"fresh{number}"
            found["add"].append(seconds_of(lambda n=name: client.put(n, setup.artefact)))
            first = client.predict(name, row)[0]
            found["replace"].append(seconds_of(lambda n=name: client.put(n, other, replace=True)))
            second = client.predict(name, row)[0]
            if first["digest"] == second["digest"]:
                raise SystemExit("A replaced prompt answered after it had been replaced.")
            found["remove"].append(seconds_of(lambda n=name: client.delete(n)))
            if is_there(client, name, row):
                raise SystemExit("A removed prompt answered.")
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


def replace(setup: Setup, count: int) -> Figures:
    """Replacements of a prompt under load; each answer must be that of the version it names."""
    artefacts = [setup.artefact, variant(setup.artefact, setup.out / "variant")]
    row = setup.inputs(1)
    with setup.served("--library", str(setup.library(1))) as server:
        client, name = server.client, "changing"
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
        for number in range(count):
            kind = number % 2
            begin = time.perf_counter()
            version = client.put(name, artefacts[kind], replace=True)["version"]
            times.append(time.perf_counter() - begin)
            kinds[version] = kind
        stop.set()
        thread.join()
        client.delete(name)
        compilations = {k: v for k, v in server.metrics().items() if "compil" in k}
    return {
        "replacements": count,
        "seconds_each": statistics.median(times),
        "compilations": compilations,
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


ROWS = 32


def mixed(setup: Setup, count: int) -> Figures:
    """32 rows of D prompts as one batch, against a batch for each prompt."""
    rows = setup.inputs(ROWS)
    with setup.served("--library", str(setup.library(count))) as server:
        cells = []
        for distinct_prompts in (1, 4, 16, 32):
            asked = [name_of(at % min(distinct_prompts, count)) for at in range(ROWS)]
            parts = [
                (name, [row for row, other in zip(rows, asked, strict=True) if other == name])
                for name in sorted(set(asked))
            ]
            together = lambda a=asked: server.client.predict(a, rows)
            apart = lambda p=parts: [server.client.predict(name, part) for name, part in p]
            together(), apart()
            times = [(seconds_of(together), seconds_of(apart)) for _ in range(5 * setup.rounds)]
            ratios = sorted(one / all_of_them for all_of_them, one in times)
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
    library = setup.library(count)
    cells = []
    with setup.served("--library", str(library)) as server:
        server.client.predict(names(count), setup.inputs(count))
        cells.append({"processes": 1, "prompts": count, "memory_mib": server.memory()})
    for many in (1, 2, min(count, 4)):
        cells.append({"processes": many, "prompts": many, "memory_mib": together(setup, many)})
    return {"cells": cells}


def together(setup: Setup, many: int) -> float:
    """MiB of so many servers with a prompt each."""
    open_servers, total = [], 0.0
    library = setup.library(many)
    try:
        for number in range(many):
            manager = setup.served(f"only={library / name_of(number)}")
            server = manager.__enter__()
            open_servers.append((manager, server))
            server.client.predict("only", setup.inputs(1))
        total = sum(server.memory() for _, server in open_servers)
    finally:
        for manager, _ in reversed(open_servers):
            manager.__exit__(None, None, None)
    return total
