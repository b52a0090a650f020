"""An open-loop load generator for ``jaxprompt serve``: Poisson arrivals, Zipf over prompts.

A request is sent when its time has come, whether or not earlier ones are answered, and its latency
counts from that time. A generator that waits for answers would send less just when the server is
slow, and hide it. Reads a plan as JSON from standard input and prints the result as JSON.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypedDict

TIMEOUT = 60.0  # seconds after which a request counts as lost


class Plan(TypedDict):
    """What is sent."""

    host: str
    port: int
    phases: list[tuple[float, float]]  # requests a second, and for how many seconds
    names: list[str]  # of prompts, the most popular first
    zipf: float  # 0: all prompts are asked for equally often
    inputs: list[dict]  # rows of a task, drawn with equal probability
    seed: int
    closed: int  # 0: open loop; n: n clients that wait for their answers


class Answer(NamedTuple):
    """One request; a tuple in JSON."""

    due: float  # seconds from the start at which it was to be sent
    latency: float  # seconds from then until its answer was there
    status: int  # 0: no answer
    name: str
    version: int | None
    scores: list[float] | None  # log-likelihoods


class Connections:
    """Connections to one server that are used again."""

    def __init__(self, host: str, port: int):
        self.host, self.port = host, port
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        while self.idle:
            reader, writer = self.idle.pop()
            if not reader.at_eof():
                break
            writer.close()
        else:
            reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(request)
            status, headers = parse_head(await reader.readuntil(b"\r\n\r\n"))
            body = await reader.readexactly(int(headers.get("content-length", 0)))
        except BaseException:
            writer.close()
            raise
        if headers.get("connection") == "close":
            writer.close()
        else:
            self.idle.append((reader, writer))
        return status, body

    async def close(self) -> None:
        for _, writer in self.idle:
            writer.close()
            await writer.wait_closed()


def parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    """The status and the headers, with small letters."""
    first, *lines = head.decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines if line)
    return int(first.split()[1]), {name.lower(): text.strip().lower() for name, _, text in fields}


def request_of(host: str, path: str, body: object) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def arrivals(phases: Iterable[tuple[float, float]], rng: random.Random) -> list[float]:
    """Seconds of a Poisson process whose rate changes from phase to phase."""
    times, begin = [], 0.0
    for rate, seconds in phases:
        at = begin
        while rate and (at := at + rng.expovariate(rate)) < begin + seconds:
            times.append(at)
        begin += seconds
    return times


def popularity(count: int, exponent: float) -> list[float]:
    """Weights by Zipf's law."""
    return [1 / rank**exponent for rank in range(1, count + 1)]


class Drawn:
    """Requests, drawn from a plan."""

    def __init__(self, plan: Plan):
        self.rng = random.Random(plan["seed"])
        self.names, self.inputs = plan["names"], plan["inputs"]
        total, self.cumulative = 0.0, []
        for weight in popularity(len(self.names), plan["zipf"]):
            self.cumulative.append(total := total + weight)
        self.host = f"{plan['host']}:{plan['port']}"

    def next(self) -> tuple[str, bytes]:
        [name] = self.rng.choices(self.names, cum_weights=self.cumulative)
        body = {"prompt": name, "inputs": [self.rng.choice(self.inputs)]}
        return name, request_of(self.host, "/v1/predict", body)


async def send(connections: Connections, drawn: tuple[str, bytes], due: float, start: float):
    """One request, now; its latency counts from when it was due."""
    name, request = drawn
    status, version, scores = 0, None, None
    try:
        status, body = await asyncio.wait_for(connections.ask(request), TIMEOUT)
        if status == 200:
            [found] = json.loads(body)["predictions"]
            version = found["version"]
            scores = [each["log_likelihood"] for each in found["scores"] or ()]
    except (OSError, EOFError, TimeoutError, ValueError):
        pass
    return Answer(due, time.perf_counter() - start - due, status, name, version, scores)


async def open_loop(plan: Plan) -> list[Answer]:
    """Send each request at its time."""
    drawn, connections = Drawn(plan), Connections(plan["host"], plan["port"])
    times = arrivals(plan["phases"], drawn.rng)
    requests = [drawn.next() for _ in times]
    start, tasks = time.perf_counter(), []
    for due, request in zip(times, requests, strict=True):
        if (wait := start + due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(send(connections, request, due, start)))
    answers = list(await asyncio.gather(*tasks))
    await connections.close()
    return answers


async def closed_loop(plan: Plan) -> list[Answer]:
    """Clients that each wait for an answer before they send again: what the server can do."""
    drawn, connections = Drawn(plan), Connections(plan["host"], plan["port"])
    start, answers = time.perf_counter(), []
    seconds = sum(seconds for _, seconds in plan["phases"])

    async def client() -> None:
        while (now := time.perf_counter() - start) < seconds:
            answers.append(await send(connections, drawn.next(), now, start))
            if answers[-1].status != 200:
                await asyncio.sleep(0.05)

    await asyncio.gather(*(client() for _ in range(plan["closed"])))
    await connections.close()
    return answers


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that is not below this share of the values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Figures of what was asked in so many seconds."""
    good = [each for each in answers if each.status == 200]
    end = max((each.due + each.latency for each in good), default=seconds)
    refused = sum(each.status in (429, 503) for each in answers)
    latencies = [each.latency for each in good]
    return {
        "asked": len(answers),
        "offered": len(answers) / seconds,
        "answered": len(good),
        "throughput": len(good) / max(end, seconds),
        "p50": percentile(latencies, 0.5),
        "p99": percentile(latencies, 0.99),
        "rejected": refused / max(len(answers), 1),
        "lost": len(answers) - len(good) - refused,
        "prompts": len({each.name for each in good}),
    }


def run(plan: Plan) -> list[Answer]:
    return asyncio.run(closed_loop(plan) if plan["closed"] else open_loop(plan))


if __name__ == "__main__":
    json.dump(run(json.load(sys.stdin)), sys.stdout)
