"""How long until our run is as accurate as the best of PEFT's runs at several learning rates.

    python scripts/bench/peft/bench_time_to_accuracy.py --out runs/accuracy \
        --python ../peft-env/bin/python

PYTHON is an interpreter with torch, transformers and peft (the extra `parity`). The backbone is
exported for both. PEFT tunes with AdamW at each rate as its users do (see peft_accuracy.py), in
float32; here `jaxprompt train` runs with the recipe of configs/quickstart.yaml. Each run has a
fresh process and waits until others leave the machine idle. Its time begins with the loading of the
model, and holds compilation and all evaluations; times without the evaluations are given too. The
target is the best validation accuracy of PEFT's best rate: its time is the one at which PEFT first
had it, ours the one at which our run first had at least as much; ours runs once in each dtype.
PEFT's answers are generated, ours are the likelier label, as each side's users do it; `--decoding
greedy` has ours generated too.

Prints a Markdown table with a line for each seed and dtype; OUT/accuracy.json keeps every
evaluation, OUT/accuracy.png draws them over time. Linux.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench_peft import HERE
from bench_tools import Gate, Worker, machine
from peft_tools import check_packages, comparing, peft_parser

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.examples import tokenize
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.data.tasks.splits import load_rows
from jaxprompt.data.tokenizer import copy_tokenizer, load_tokenizer
from jaxprompt.data.virtual_tokens import VirtualTokens
from jaxprompt.models import registry
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.models.checkpoints.save import save_hf
from jaxprompt.runtime import devices
from jaxprompt.runtime.files import replace_directory, write_atomically
from jaxprompt.runtime.markdown import markdown_table
from jaxprompt.runtime.memory import start_again_with_huge_pages
from jaxprompt.training import evaluator, loop

Events = list[dict[str, Any]]


def reached(events: Events, target: float) -> dict[str, Any] | None:
    """The first evaluation with at least this accuracy."""
    return next((event for event in events if event["accuracy"] >= target), None)


def best(runs: dict[str, Events]) -> tuple[str, dict[str, Any]]:
    """The rate with the best accuracy, and when it first had it; of equals the earliest."""
    firsts = {}
    for rate, events in runs.items():
        top = max(event["accuracy"] for event in events)
        firsts[rate] = next(event for event in events if event["accuracy"] == top)
    rate = min(firsts, key=lambda r: (-firsts[r]["accuracy"], firsts[r]["seconds"]))
    return rate, firsts[rate]


def without(event: dict[str, Any]) -> float:
    """Seconds until an evaluation, less those of all evaluations."""
    return event["seconds"] - event["evaluating"]


def ours(values: dict[str, Any]) -> Events:
    """A whole run in this process: each evaluation of it, with the clock at its end."""
    config, calls = parse(RunConfig, values), []
    devices.start([config.train.batch_size], config.mesh)  # as the command does
    began, judge = time.perf_counter(), evaluator.predict_per_member

    def timed(*args, **kwargs):
        paused = time.perf_counter()
        answers = judge(*args, **kwargs)
        calls.append((time.perf_counter() - began, time.perf_counter() - paused))
        return answers

    evaluator.predict_per_member = timed  # the loop has no hook for the clock
    loop.train(config)
    log = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, log) if "validation/accuracy" in row]
    events, evaluating = [], calls[0][1]
    # the first call is of the untuned backbone, and after the last step test rows may follow
    for row, (now, spent) in zip(rows, calls[1:], strict=False):
        evaluating += spent
        events.append({"step": row["step"], "accuracy": row["validation/accuracy"], "seconds": now,
                       "evaluating": evaluating})  # fmt: skip
    return events


def write_problem(options: argparse.Namespace) -> None:
    """OUT/weights and OUT/problem.json: the backbone and the rows for PEFT."""
    backbone, task = load_backbone(options.backbone), resolve_task(options.task)
    if registry.one_sequence(backbone.config):
        raise UserError(f"--backbone {options.backbone!r} has no encoder; name a T5.")
    if not task.labels or task.metrics[0] != "accuracy":
        raise UserError(f"--task {options.task!r} is not judged by accuracy; name one that is.")

    def write(path: Path) -> None:
        save_hf(path, backbone.config, backbone.params)
        copy_tokenizer(backbone.path, path)

    replace_directory(options.out / "weights", write)
    tokenizer = load_tokenizer(backbone.path)

    def rows(split: str, limit: int | None) -> list[dict[str, list[int]]]:
        found = load_rows(task, split, limit)
        examples = tokenize(task, found, tokenizer, VirtualTokens(backbone.config.vocab_size, 0))
        return [{"inputs": e.inputs.tolist(), "targets": e.targets.tolist()} for e in examples]

    problem = {
        "weights": str((options.out / "weights").resolve()),
        "start": ", ".join(task.labels),  # repeated by PEFT to fill the prompt
        "train": rows("train", None),
        "validation": rows("validation", options.eval_rows),
        "length": options.prompt, "steps": options.steps, "batch_size": options.batch_size,
        "evaluate_every": options.evaluate_every, "peft_dropout": options.peft_dropout,
    }  # fmt: skip
    write_atomically(options.out / "problem.json", json.dumps(problem))


def run_config(options: argparse.Namespace, seed: int, dtype: str) -> dict[str, Any]:
    """The quickstart's recipe on the same rows, steps and evaluations, with random batches."""
    folder = options.out / f"ours-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # a complete run would not run again
    return {
        "backbone": str(options.out / "weights"),
        "task": {"name": options.task, "decoding": options.decoding},
        "model": {"dtype": dtype}, "prompt": {"length": options.prompt},
        "train": {
            "steps": options.our_steps or options.steps, "batch_size": options.batch_size,
            "schedule": "linear", "learning_rate": options.learning_rate,
            "evaluate_every": options.evaluate_every, "checkpoint_every": options.evaluate_every,
            "max_eval_examples": options.eval_rows,
            "eval_batch_size": options.batch_size, "seed": seed,
        },
        "output": str(folder),
    }  # fmt: skip


def run(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All runs of a seed, and what they come to."""
    runs: dict[str, Events] = {}
    others: dict[str, float] = {}

    @contextlib.contextmanager
    def on_an_idle_machine(name: str, process: int):
        gate = Gate([os.getpid(), process], threshold=options.idle, limit=options.wait)
        gate.wait()
        before = gate.now()
        yield
        others[name] = before.others(gate.now())

    for rate in options.learning_rates:
        command = [options.python, HERE / "peft_accuracy.py", options.out / "problem.json"]
        worker = Worker([str(part) for part in command], "PEFT")
        check_packages(worker, options.python)
        with on_an_idle_machine(f"{rate:g}", worker.process.pid):
            runs[f"{rate:g}"] = worker.ask("tune", rate=rate, seed=seed)["events"]
        worker.close()
    spawn, own = multiprocessing.get_context("spawn"), {}
    for dtype in options.dtypes:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:  # as fresh as PEFT's
            process, values = pool.submit(os.getpid).result(), run_config(options, seed, dtype)
            with on_an_idle_machine(dtype, process):
                own[dtype] = pool.submit(ours, values).result()
    rate, target = best(runs)
    return {
        "seed": seed, "rate": rate, "target": target,
        "ours": {name: reached(events, target["accuracy"]) for name, events in own.items()},
        "best_of_ours": {name: max(e["accuracy"] for e in events) for name, events in own.items()},
        "others": others, "events": {"ours": own, "PEFT": runs},
    }  # fmt: skip


def table(records: list[dict[str, Any]]) -> str:
    """A line for each seed and dtype of ours, and the medians of the ratios."""
    lines = [[
        "seed", "ours in", "PEFT's best rate", "accuracy", "PEFT, s", "ours, s", "ratio",
        "ratio without evaluations", "steps, PEFT", "ours", "our best", "others, cores",
    ]]  # fmt: skip
    pairs: dict[str, list[tuple[float, float]]] = {}
    every = [(r, dtype, here) for r in records for dtype, here in r["ours"].items()]
    for r, dtype, here in every:
        theirs = r["target"]
        line = [
            str(r["seed"]),
            dtype,
            r["rate"],
            f"{theirs['accuracy']:.3f}",
            f"{theirs['seconds']:.0f}",
        ]
        if here is None:
            line += ["never", "–", "–", str(theirs["step"]), "–"]
        else:
            pair = theirs["seconds"] / here["seconds"], without(theirs) / without(here)
            pairs.setdefault(dtype, []).append(pair)
            line += [f"{here['seconds']:.0f}", *(f"{x:.2f}" for x in pair)]
            line += [str(theirs["step"]), str(here["step"])]
        best_of_ours, others = r["best_of_ours"][dtype], max(r["others"].values())
        lines.append([*line, f"{best_of_ours:.3f}", f"{others:.2f}"])
    text = markdown_table(lines)
    for dtype, found in pairs.items():
        for name, values in zip(("with", "without"), zip(*found, strict=True), strict=True):
            text += (
                f"\n\nRatio {name} evaluations, {dtype}: {statistics.median(values):.2f} "
                f"({min(values):.2f} to {max(values):.2f}), {len(found)} of {len(records)} seeds."
            )
    return text


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over seconds of every run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for record in records:
        every = {f"ours, {dtype}": e for dtype, e in record["events"]["ours"].items()}
        every |= {f"PEFT, rate {rate}": e for rate, e in record["events"]["PEFT"].items()}
        for number, (name, events) in enumerate(every.items()):
            axis.plot(
                [e["seconds"] for e in events], [e["accuracy"] for e in events], marker="o",
                color=f"C{number}", label=name if record is records[0] else None,
            )  # fmt: skip
    axis.set(xlabel="seconds, with loading, compilation and evaluations", ylabel="accuracy")
    axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = peft_parser(__doc__)
    add = parser.add_argument
    add("--backbone", default="builtin")
    add("--task", default="supersense")
    add("--prompt", type=int, default=100, help="vectors of the prompt")
    add("--steps", type=int, default=600)
    add("--our-steps", type=int, help="the length of our schedule; PEFT's if not given")
    add("--batch-size", type=int, default=32)
    add("--evaluate-every", type=int, default=50)
    add("--eval-rows", type=int, default=300)
    add("--learning-rates", nargs="+", type=float, default=[0.01, 0.05, 0.3], help="PEFT's")
    add("--learning-rate", type=float, default=0.3, help="ours")
    add("--dtypes", nargs="+", choices=("float32", "mixed"), default=["float32", "mixed"])
    add("--decoding", choices=("rank", "greedy"), default="rank", help="ours")
    add("--peft-dropout", type=float, default=0.0)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--idle", type=float, default=0.15, help="cores that others may use")
    add("--wait", type=float, default=600, help="seconds to wait for that before each run")
    options = parser.parse_args()
    with comparing(options):
        write_problem(options)
        records = []
        for seed in options.seeds:
            records.append(run(options, seed))
            settings = {k: v for k, v in vars(options).items() if k not in ("out", "python")}
            kept = {"machine": machine(), "settings": settings, "runs": records}
            write_atomically(options.out / "accuracy.json", json.dumps(kept, indent=1) + "\n")
        print(table(records))
        draw(records, options.out / "accuracy.png")


if __name__ == "__main__":
    start_again_with_huge_pages()  # both sides then have them
    main()
