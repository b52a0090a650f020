"""Measures ``jaxprompt serve`` with prompts made from a real one.

    python scripts/bench/serve/bench_serve.py throughput burst --prompts 1 100 1000 10000 \
        --artefact runs/quickstart/prompt --out runs/bench-serve --seconds 10
    python scripts/bench/serve/bench_serve.py report --out runs/bench-serve

Each stage can run alone: throughput, burst, changes, distinct, mixed, replace, peft, processes,
starts.
Stages that ask for the same number of prompts share a server. The figures of each are put into
OUT/results.json, and what is there already is not measured again without --again. ``report``
writes OUT/report.md and OUT/report.png.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import stages
from beside_peft import beside_peft
from options import common_options, setup_of
from report import write_report
from servers import Cores, Server


class Stage(NamedTuple):
    """What is measured, and with how many prompts where the command line says nothing."""

    measure: Callable[[stages.Setup, Server, int], stages.Figures]
    counts: tuple[int, ...]


SWEEP = (1, 100, 1000, 10000)
STAGES = {
    "throughput": Stage(stages.throughput, SWEEP),
    "burst": Stage(stages.burst, SWEEP),
    "changes": Stage(stages.changes, SWEEP),
    "distinct": Stage(stages.distinct, (100,)),
    "mixed": Stage(stages.mixed, (100,)),
    "replace": Stage(stages.replace, (100,)),
    "peft": Stage(beside_peft, (100,)),
}
# these start servers of their own
ALONE = {"processes": (stages.processes, (4,)), "starts": (stages.starts, (2,))}


def options() -> argparse.Namespace:
    parser = common_options(__doc__, "runs/bench-serve")
    parser.add_argument("stages", nargs="+", choices=[*STAGES, *ALONE, "report"])
    parser.add_argument("--prompts", type=int, nargs="+", help="how many; by default as the stage")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--server-cores", default="0", help="as `taskset -c`; empty: any")
    parser.add_argument("--generator-cores", default="1")
    parser.add_argument("--peft-python", help="a Python with torch and PEFT, for `peft`")
    parser.add_argument("--again", action="store_true", help="measure also what is there already")
    return parser.parse_args()


def main() -> None:
    given = options()
    setup = setup_of(
        given, seconds=given.seconds, rounds=given.rounds, peft_python=given.peft_python,
        cores=Cores(given.server_cores, given.generator_cores),
    )  # fmt: skip
    results = Results(given.out / "results.json", given.again)
    wanted = [
        (count, name)
        for name in given.stages if name in STAGES
        for count in given.prompts or STAGES[name].counts
        if results.lacks(name, count)
    ]  # fmt: skip
    for count in sorted({count for count, _ in wanted}):
        beside_each_other(setup, results, count, [name for many, name in wanted if many == count])
    for name in set(given.stages) & set(ALONE):
        measure, counts = ALONE[name]
        for count in given.prompts or counts:
            if results.lacks(name, count):
                results.keep(name, count, lambda m=measure, c=count: m(setup, c))
    if "report" in given.stages:
        write_report(given.out)
    sys.exit(int(results.failed))


def beside_each_other(
    setup: stages.Setup, results: "Results", count: int, names: Sequence[str]
) -> None:
    """The stages of one number of prompts, on one server."""
    try:
        with setup.served("--library", str(setup.library(count))) as server:
            for name in names:
                measure = STAGES[name].measure
                results.keep(name, count, lambda m=measure: m(setup, server, count))
    except RuntimeError:
        traceback.print_exc()
        results.failed = True


class Results:
    """The file of all figures."""

    def __init__(self, path: Path, again: bool):
        self._path, self._again = path, again
        self._found = json.loads(path.read_text()) if path.is_file() else {}
        self.failed = False

    def lacks(self, stage: str, count: int) -> bool:
        """Whether a stage is still to be measured."""
        return self._again or str(count) not in self._found.get(stage, {})

    def keep(self, stage: str, count: int, measure: Callable[[], stages.Figures]) -> None:
        """Measure, and put the figures into the file. A stage that fails leaves the others."""
        print(f"{stage}, {count} prompts", flush=True)
        begin = time.perf_counter()
        try:
            figures = measure()
        except Exception:
            traceback.print_exc()
            self.failed = True
            return
        figures["stage_seconds"] = time.perf_counter() - begin
        self._found.setdefault(stage, {})[str(count)] = figures
        self._found["machine"] = {"cores": os.cpu_count()}
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(self._found, indent=1))
        fresh.replace(self._path)
        print(json.dumps(figures)[:1500], flush=True)


if __name__ == "__main__":
    main()
