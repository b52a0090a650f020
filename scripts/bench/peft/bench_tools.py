"""What both sides of bench_peft.py share: rows, a worker's loop, idleness, ratios.

Needs NumPy alone, so that an interpreter without jax or without torch can use it. Linux.
"""

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Tokens of a BoolQ row with EOS, one number for each 128th of the training rows (the middle of its
# quantiles): 6,472 rows of scripts/datasets/real_tasks.py as "passage: {passage} question:
# {question}" in T5's SentencePiece. Mean 156, median 142.
# fmt: off
BOOLQ_LENGTHS = (
    37, 44, 49, 53, 56, 59, 62, 64, 67, 69, 71, 73, 75, 77, 78, 80, 81, 83, 85, 86, 88, 89, 91, 92,
    94, 95, 97, 98, 99, 100, 101, 103, 104, 105, 106, 108, 109, 110, 111, 113, 114, 115, 116, 117,
    118, 120, 121, 122, 123, 124, 126, 127, 128, 129, 131, 132, 133, 135, 136, 137, 138, 139, 140,
    142, 143, 144, 146, 147, 148, 150, 151, 152, 153, 155, 157, 158, 159, 160, 162, 163, 165, 166,
    168, 170, 171, 173, 175, 176, 178, 180, 181, 183, 185, 187, 189, 192, 194, 197, 199, 201, 203,
    206, 208, 211, 214, 217, 219, 222, 226, 229, 232, 236, 240, 244, 248, 253, 259, 264, 272, 281,
    289, 297, 306, 317, 332, 357, 390, 469,
)
# fmt: on
YES_SHARE = 0.62  # of BoolQ's answers
WORDS = 32_000  # ids from 3 on that are words of T5's vocabulary
EOS = 1
LABELS = {"yes": [4273, EOS], "no": [150, 5, EOS]}  # 2 and 3 tokens
DROPOUT = 0.1
RANK = 8  # of LoRA, at the queries and values of all attention; alpha is as large
MEMBERS = 8  # LoRAs of a population, and of a mixed batch of answers
# what changes times from outside
SETTINGS = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_", "OMP_", "MKL_", "KMP_", "XLA_", "JAX_")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")

Row = dict[str, list[int]]


class Start(NamedTuple):
    """What a worker is told before its first job, from problem.json."""

    weights: str  # a Hugging Face directory
    start: list[int]  # the words whose embeddings the prompt starts as
    batches: dict[str, list[list[Row]]]  # by batch size
    splits: dict[str, list[list[list[int]]]]  # of each batch: the rows of each micro-batch
    questions: list[Row]
    learning_rate: float
    method: str = "prompt"  # or lora: rank 8 at query and value

    @classmethod
    def read(cls, path: str) -> "Start":
        return cls(**json.loads(Path(path).read_text()))


def draw_rows(rng: np.random.Generator, count: int, *, longest: int) -> list[Row]:
    """Random words in rows as long as BoolQ's, cut to ``longest``; the targets are its answers."""
    rows = []
    for length in np.minimum(rng.choice(BOOLQ_LENGTHS, count), longest):
        label = "yes" if rng.random() < YES_SHARE else "no"
        words = rng.integers(3, WORDS, length - 1).tolist()
        rows.append({"inputs": [*words, EOS], "targets": LABELS[label]})
    return rows


def padded(rows: Sequence[Sequence[int]], fill: int) -> np.ndarray:
    """Rows as one array [B, S], padded to the longest."""
    out = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return out


def useful_share(rows: Sequence[Row], shapes: Sequence[Sequence[int]], prompt: int) -> float:
    """Share of the encoder's positions that hold a token or a vector of the prompt."""
    tokens = sum(prompt + len(row["inputs"]) for row in rows)
    return tokens / sum(count * width for count, width in shapes)


def ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, Any]:
    """How many times faster: median, least and largest of the ratios of each round."""
    rounds = [a / b for a, b in zip(slow, fast, strict=True)]
    return {
        "median": statistics.median(rounds),
        "min": min(rounds),
        "max": max(rounds),
        "rounds": rounds,
    }


# ---- who uses the processor


def busy_seconds(stat: str, ticks: int) -> float:
    """Seconds that all cores were busy, of the text of /proc/stat; stolen time is busy too."""
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / ticks  # user has guests' in it


def own_seconds(stat: str, ticks: int) -> float:
    """Seconds that a process has computed, of the text of /proc/PID/stat."""
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return (int(fields[11]) + int(fields[12])) / ticks


class Moment(NamedTuple):
    """Clock, busy seconds of the machine, and those of the processes of the benchmark."""

    clock: float
    busy: float
    own: float

    def others(self, then: "Moment") -> float:
        """Cores that others have used on average from this moment to ``then``."""
        used = (then.busy - self.busy) - (then.own - self.own)
        return max(used, 0.0) / (then.clock - self.clock)


class Gate:
    """Waits until others leave the machine alone, and tells how much they used meanwhile."""

    def __init__(self, processes: Sequence[int], *, threshold: float, limit: float):
        self.processes, self.threshold, self.limit = processes, threshold, limit
        self.ticks = os.sysconf("SC_CLK_TCK")

    def now(self) -> Moment:
        stats = (Path(f"/proc/{number}/stat") for number in self.processes)
        own = sum(own_seconds(stat.read_text(), self.ticks) for stat in stats)
        return Moment(
            time.monotonic(), busy_seconds(Path("/proc/stat").read_text(), self.ticks), own
        )

    def wait(self) -> float:
        """Cores used by others in the last second; above the threshold where waiting took long."""
        began = time.monotonic()
        while True:
            before = self.now()
            time.sleep(1.0)
            found = before.others(self.now())
            if found <= self.threshold or time.monotonic() - began >= self.limit:
                return found


def machine() -> dict[str, Any]:
    """Processor, cores and what else times depend on."""
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", text, re.M)
    flags = set(text.split())
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in FLAGS if flag in flags],
        "python": platform.python_version(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(SETTINGS)},
    }


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# ---- workers


class WorkerEnded(Exception):
    """A worker that is gone; what was measured until then is in OUT."""


class Worker:
    """A process that answers one JSON object a line with another."""

    def __init__(
        self, command: Sequence[str], side: str, environment: Mapping[str, str] | None = None
    ):
        self.side = side
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        self.facts = self._read()  # what it says of itself once it has imported everything

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # pyright: ignore[reportOptionalMemberAccess]
        if not line:
            status = self.process.wait()
            raise WorkerEnded(
                f"The worker of {self.side} ended with status {status} (-9: killed, as for lack of "
                "memory); its own message is above. Jobs can be left out with --only."
            )
        return json.loads(line)

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Have the method ``do`` called."""
        print(json.dumps({"do": do, **values}), file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        self.process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
        self.process.wait()


def serve(make: Any) -> None:
    """A worker's loop: methods of ``make()`` by name until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is for people
    worker = make()
    facts = {"bare": resident("VmRSS"), **worker.facts()}
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        request, before = json.loads(line), resource.getrusage(resource.RUSAGE_SELF)
        reply = getattr(worker, request.pop("do"))(**request)
        after = resource.getrusage(resource.RUSAGE_SELF)
        reply |= {"user": after.ru_utime - before.ru_utime,
                  "system": after.ru_stime - before.ru_stime}  # fmt: skip
        print(json.dumps(reply), file=answers, flush=True)
