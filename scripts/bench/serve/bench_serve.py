"""Measures ``jaxprompt serve`` with prompts made from a real one.

    python scripts/bench/serve/bench_serve.py throughput burst --prompts 1 100 1000 10000 \
        --artefact runs/quickstart/prompt --out runs/bench-serve --seconds 10
    python scripts/bench/serve/bench_serve.py report --out runs/bench-serve

Each stage can run alone: throughput, burst, distinct, changes, replace, mixed, processes, peft.
It replaces its own figures in OUT/results.json. ``report`` writes OUT/report.md and OUT/report.png.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import stages
from beside_peft import beside_peft
from report import write_report
from servers import Cores

Stage = Callable[[stages.Setup, int], stages.Figures]
# the second number is how many prompts, or replacements, where the command line says nothing
STAGES: dict[str, tuple[Stage, tuple[int, ...]]] = {
    "throughput": (stages.throughput, (1, 100, 1000, 10000)),
    "burst": (stages.burst, (100,)),
    "distinct": (stages.distinct, (32,)),
    "changes": (stages.changes, (1, 100, 1000, 10000)),
    "replace": (stages.replace, (1000,)),
    "mixed": (stages.mixed, (32,)),
    "processes": (stages.processes, (4,)),
    "peft": (beside_peft, (32,)),
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "report"])
    parser.add_argument("--artefact", type=Path, default=Path("runs/quickstart/prompt"))
    parser.add_argument("--backbone", default="builtin")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-serve"))
    parser.add_argument("--prompts", type=int, nargs="+", help="or replacements, of `replace`")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--server-cores", default="0", help="as `taskset -c`; empty: any")
    parser.add_argument("--generator-cores", default="1")
    parser.add_argument("--peft-python", help="a Python with torch and PEFT, for `peft`")
    parser.add_argument("--server", default="", help="further options of `jaxprompt serve`")
    return parser.parse_args()


def main() -> None:
    given = options()
    given.out.mkdir(parents=True, exist_ok=True)
    setup = stages.Setup(
        given.artefact, given.out, given.backbone, given.seconds, given.rounds,
        given.server.split(), Cores(given.server_cores, given.generator_cores), given.peft_python,
    )  # fmt: skip
    for name in given.stages:
        if name == "report":
            write_report(given.out)
            continue
        stage, counts = STAGES[name]
        for count in given.prompts or counts:
            print(f"{name}, {count}", flush=True)
            keep(given.out / "results.json", name, count, stage(setup, count))


def keep(path: Path, stage: str, count: int, figures: stages.Figures) -> None:
    """Put figures of a stage into the file of all."""
    results = json.loads(path.read_text()) if path.is_file() else {}
    results.setdefault(stage, {})[str(count)] = figures
    results["machine"] = {"cores": os.cpu_count()}
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(results, indent=1))
    fresh.replace(path)
    print(json.dumps(figures)[:2000], flush=True)


if __name__ == "__main__":
    main()
