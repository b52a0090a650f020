"""Prompts of one run against as many runs of one prompt each: seconds of both, and their prompts.

    python scripts/bench/bench_population.py --out runs/population --rounds 3

Both sides are `jaxprompt train` in fresh processes, from the command to its end: loading, data,
compilation, evaluations and files. Each side of a round begins with an empty cache of compiled
programs, which lone runs after the first find filled. Waits until others leave the machine idle.
Prints a Markdown table; OUT/population.json keeps every time. Works on accelerators too. Linux.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jaxprompt.methods.artefact import load_prompt
from jaxprompt.runtime.files import write_atomically
from jaxprompt.runtime.markdown import markdown_table

sys.path.append(str(Path(__file__).parent / "peft"))
from bench_tools import Gate, Moment, machine  # noqa: E402


def run_values(options: argparse.Namespace, name: str, seeds: list[int]) -> dict[str, Any]:
    """A run of these seeds."""
    grid = {"population": {"seed": seeds}} if len(seeds) > 1 else {}
    return {
        "backbone": options.backbone,
        "task": options.task,
        "model": {"dtype": options.dtype},
        "prompt": {"length": options.prompt, **grid},
        "train": {
            "steps": options.steps, "batch_size": options.batch_size, "seed": seeds[0],
            "evaluate_every": options.steps, "checkpoint_every": options.steps,
            "max_eval_examples": options.eval_rows, "tensorboard": False,
        },
        "output": str(options.out / name),
    }  # fmt: skip


def train(options: argparse.Namespace, name: str, seeds: list[int], cache: Path) -> float:
    """Seconds of the command."""
    values = run_values(options, name, seeds)
    shutil.rmtree(values["output"], ignore_errors=True)  # a complete run would not run again
    file = options.out / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "jaxprompt.cli.app", "train", str(file)], check=True,
        env=os.environ | {"JAXPROMPT_CACHE": str(cache)},
        stdout=subprocess.DEVNULL, stderr=None if options.verbose else subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - began


def now(gate: Gate) -> Moment:
    """What was used so far, the ended runs' part of it as our own."""
    used, moment = resource.getrusage(resource.RUSAGE_CHILDREN), gate.now()
    return moment._replace(own=moment.own + used.ru_utime + used.ru_stime)


def round_of(options: argparse.Namespace) -> dict[str, Any]:
    """Both sides once."""
    found: dict[str, Any] = {}
    seeds = list(range(options.prompts))
    sides = {"together": {"together": seeds}, "alone": {f"alone-{k}": [k] for k in seeds}}
    for side, runs in sides.items():
        cache = options.out / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        gate = Gate([os.getpid()], threshold=options.idle, limit=options.wait)
        gate.wait()
        before = now(gate)
        found[side] = [train(options, name, own, cache) for name, own in runs.items()]
        found[f"others beside {side}"] = before.others(now(gate))
    return found


def apart(options: argparse.Namespace) -> list[float]:
    """The largest difference of each prompt to that of its lone run, over the largest number."""
    pairs = [
        (options.out / "together" / "population" / str(k), options.out / f"alone-{k}")
        for k in range(options.prompts)
    ]
    vectors = [[load_prompt(folder / "prompt").vectors for folder in pair] for pair in pairs]
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in vectors]


def table(options: argparse.Namespace, rounds: list[dict[str, Any]]) -> str:
    together = [sum(found["together"]) for found in rounds]
    alone = [sum(found["alone"]) for found in rounds]
    ratios = [b / a for a, b in zip(together, alone, strict=True)]
    show = lambda values, form: (
        f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
    )
    others = max(found[key] for found in rounds for key in found if key.startswith("others"))
    cells = {
        "prompts": f"{options.prompts}", "rows each": f"{options.batch_size}",
        "steps": f"{options.steps}", "dtype": options.dtype, "one run, s": show(together, ".1f"),
        "runs of their own, s": show(alone, ".1f"), "times faster": show(ratios, ".2f"),
        "others, cores": f"{others:.2f}",
    }  # fmt: skip
    return markdown_table([list(cells), list(cells.values())])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--backbone", default="builtin")
    add("--task", default="supersense")
    add("--dtype", default="float32", choices=("float32", "mixed", "bfloat16"))
    add("--prompts", type=int, default=8)
    add("--prompt", type=int, default=100, help="vectors of each")
    add("--batch-size", type=int, default=4)
    add("--steps", type=int, default=100)
    add("--eval-rows", type=int, default=100)
    add("--rounds", type=int, default=3)
    add("--idle", type=float, default=0.15, help="cores that others may use")
    add("--wait", type=float, default=600, help="seconds to wait for that before each side")
    add("--verbose", action="store_true", help="show what the runs print")
    options = parser.parse_args()
    if options.prompts < 2:
        parser.error(f"--prompts is {options.prompts}; a population has two and more")
    options.out.mkdir(parents=True, exist_ok=True)
    rounds = []
    for number in range(options.rounds):
        rounds.append(round_of(options))
        settings = {k: v for k, v in vars(options).items() if k != "out"}
        kept = {
            "machine": machine(), "settings": settings, "rounds": rounds, "apart": apart(options)
        }  # fmt: skip
        write_atomically(options.out / "population.json", json.dumps(kept, indent=1) + "\n")
        print(f"round {number + 1}/{options.rounds}", file=sys.stderr)
    print(table(options, rounds))
    found = ", ".join(f"{x:.1e}" for x in apart(options))
    print(f"\nLargest difference to the lone run's prompt, relative, of each: {found}")


if __name__ == "__main__":
    main()
