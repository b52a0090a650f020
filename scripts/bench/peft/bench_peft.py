"""Speed and memory of tuning a T5 1.1, here and in PEFT: the same weights, rows and batches.

    python scripts/bench/peft/bench_peft.py --out runs/bench --python ../peft-env/bin/python

PYTHON is an interpreter with torch, transformers and peft (the extra `parity`). Weights are random,
in the shape of a released T5 1.1; rows are random words in the lengths of BoolQ, cut to 512 with
the prompt; targets have 2 or 3 tokens. Each side is one process that lives for the whole benchmark:
loading, compilation and a first pass over all batches are reported as warm-up. A job is a pass over
the batches from the same start, AdamW included; all jobs take turns in every round, and each waits
until others leave the machine idle. A job that was disturbed is repeated, and the try that others
disturbed least is kept, whatever its time. Nothing is timed where the first losses differ.

--method lora compares LoRA (rank 8, query and value) instead of prompt tuning. It adds a population
of 8 LoRAs against 8 lone runs, and answers of batches in which rows have 8 different LoRAs against
8 batches of one LoRA each. Weights are the same; the first factors are drawn on each side.

--gpu compares what both sides do on one: bfloat16, autocast and torch.compile there, bfloat16 and
mixed here, with and without flash kernels, and as many positions at a time as fit; without a GPU it
runs on the CPU, to test it, but for the kernels: leave them out with --only '^(?!.*flash)'.

Prints Markdown tables: times, then the medians over rounds of PEFT's time divided by ours, with the
least and the largest. OUT/bench.json has everything, OUT/ratios.png the figure. Linux.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bench_report import draw, tables
from bench_tools import (
    DROPOUT,
    MEMBERS,
    Gate,
    Row,
    Worker,
    draw_rows,
    machine,
    ratios,
    useful_share,
)
from peft_tools import check_packages, comparing, peft_parser

from jaxprompt.config.errors import UserError
from jaxprompt.data.microbatches import length_sorted_microbatches, micro_rows
from jaxprompt.models.checkpoints.save import save_hf
from jaxprompt.models.t5 import t5
from jaxprompt.models.t5.config import released
from jaxprompt.runtime.files import replace_directory, write_atomically
from jaxprompt.runtime.memory import huge_pages
from jaxprompt.runtime.parallel import max_positions

Job = dict[str, Any]
HERE = Path(__file__).parent
MEMORY_STEPS = 3


def make_jobs(options: argparse.Namespace) -> list[Job]:
    """All jobs that --stages, --batch-size and --only leave."""
    found = lora_jobs(options) if options.method == "lora" else prompt_jobs(options)
    return [job for job in found if re.search(options.only, job["name"])]


def job(side: str, kind: str, name: str, dtype: str, size: int, **other: Any) -> Job:
    """members: trained in one step, or answering in turn. apart: in batches of one member each."""
    own = side == "ours"
    plain = {"attention": None, "dropout": 0.0, "micro": own, "sorted": own, "compiled": False,
             "members": 1, "apart": False}  # fmt: skip
    full = f"{side} {name} {'answers' if kind == 'answer' else f'B{size}'}"
    return plain | {"name": full, "side": side, "kind": kind, "dtype": dtype,
                    "batch_size": size, **other}  # fmt: skip


def lora_jobs(options: argparse.Namespace) -> list[Job]:
    """A step, a population, and answers of several LoRAs; on a GPU in lower precision alone."""
    pairs = [("bfloat16", "bfloat16"), ("autocast", "mixed")]
    pairs = pairs if options.gpu else [("float32", "float32"), *reversed(pairs)]
    found = []
    for size in options.batch_size if "train" in options.stages else ():
        for theirs, ours in pairs:
            eager = {"attention": "eager"} if theirs == "bfloat16" and not options.gpu else {}
            found.append(job("PEFT", "train", theirs, theirs, size, **eager))
            found.append(job("PEFT", "train", f"{theirs} micro", theirs, size, micro=True, **eager))
            if ours != "bfloat16" or options.gpu:
                several = {"members": MEMBERS}
                found.append(job("ours", "train", ours, ours, size))
                found.append(job("ours", "train", f"{MEMBERS} {ours}", ours, size, **several))
    if "answer" in options.stages:
        for theirs, ours in pairs if options.gpu else pairs[:1]:
            for side, dtype in (("PEFT", theirs), ("ours", ours)):
                for name, apart in ((f"{MEMBERS} mixed", False), (f"{MEMBERS} apart", True)):
                    several = {"members": MEMBERS, "apart": apart, "sorted": False}
                    found.append(job(side, "answer", f"{name} {dtype}", dtype, 32, **several))
    return found


def prompt_jobs(options: argparse.Namespace) -> list[Job]:
    """A step and answers of one prompt."""
    found = []
    for size in options.batch_size if "train" in options.stages and options.gpu else ():
        found += [
            job("PEFT", "train", "bfloat16", "bfloat16", size),
            job("ours", "train", "bfloat16", "bfloat16", size),
            job("PEFT", "train", "bfloat16 compiled", "bfloat16", size, compiled=True),
            job("ours", "train", "mixed", "mixed", size),
            job("ours", "train", "bfloat16 flash", "bfloat16", size, attention="flash"),
            job("ours", "train", "mixed flash", "mixed", size, attention="flash"),
            job("PEFT", "train", "autocast", "autocast", size),
            job("PEFT", "train", "autocast compiled", "autocast", size, compiled=True),
            job("PEFT", "train", "bfloat16 compiled micro", "bfloat16", size, compiled=True,
                micro=True),
        ]  # fmt: skip
    for size in options.batch_size if "train" in options.stages and not options.gpu else ():
        found += [
            job("PEFT", "train", "float32", "float32", size),
            job("ours", "train", "float32", "float32", size),
            job("PEFT", "train", "autocast", "autocast", size),
            job("ours", "train", "mixed", "mixed", size),
            job("PEFT", "train", "bfloat16", "bfloat16", size, attention="eager"),
            job("PEFT", "train", "float32 micro", "float32", size, micro=True),
            job("PEFT", "train", "autocast micro", "autocast", size, micro=True),
            job("PEFT", "train", "bfloat16 micro", "bfloat16", size, attention="eager", micro=True),
            job("PEFT", "train", "float32 dropout", "float32", size, dropout=DROPOUT),
            job("ours", "train", "float32 dropout", "float32", size, dropout=DROPOUT),
            job("PEFT", "train", "float32 dropout micro", "float32", size, dropout=DROPOUT,
                micro=True),
        ]  # fmt: skip
    if "answer" in options.stages and options.gpu:
        found += [
            job("PEFT", "answer", "bfloat16", "bfloat16", 128),
            job("ours", "answer", "bfloat16", "bfloat16", 128),
            job("PEFT", "answer", "bfloat16 sorted", "bfloat16", 128, sorted=True),
        ]
    elif "answer" in options.stages:
        found += [
            job("PEFT", "answer", "float32", "float32", 32),
            job("ours", "answer", "float32", "float32", 32),
            job("PEFT", "answer", "float32 sorted", "float32", 32, sorted=True),
            job("ours", "answer", "mixed", "mixed", 32),
            job("PEFT", "answer", "autocast", "autocast", 32),
            job("PEFT", "answer", "bfloat16", "bfloat16", 32, attention="eager"),
        ]
    return found


def write_problem(options: argparse.Namespace) -> dict[str, Any]:
    """OUT/weights and OUT/problem.json; returns the problem."""
    config = released(f"google/t5-v1_1-{options.size}")
    assert config is not None

    def write(path: Path) -> None:
        save_hf(path, config, jax.jit(t5.init_params, static_argnums=0)(config, key))

    key = jax.random.key(options.seed)
    print(f"writing random weights of T5 1.1 {options.size}", file=sys.stderr)
    replace_directory(options.out / "weights", write)
    rng, longest = np.random.default_rng(options.seed), 512 - options.prompt
    batches = {
        str(size): [draw_rows(rng, size, longest=longest) for _ in range(options.batches)]
        for size in options.batch_size
    }

    def split(drawn: list[list[Row]], size: int) -> list[list[list[int]]]:
        lengths = [[options.prompt + len(row["inputs"]) for row in rows] for rows in drawn]
        every = np.concatenate(lengths)
        rows = micro_rows(every, batch_size=size, positions=options.positions)
        return [length_sorted_microbatches(own, rows) for own in lengths]

    splits = {size: split(drawn, int(size)) for size, drawn in batches.items()}
    problem = {
        "weights": str((options.out / "weights").resolve()),
        "start": rng.integers(3, 32_000, options.prompt).tolist(),
        "batches": batches,
        "splits": splits,
        "questions": draw_rows(rng, options.questions, longest=longest),
        "learning_rate": options.learning_rate,
        "method": options.method,
    }
    write_atomically(options.out / "problem.json", json.dumps(problem))
    return problem


def typical(options: argparse.Namespace, size: int, batches: int = 2000) -> dict[str, float]:
    """What batches of ``size`` are like on average when padded to their longest row."""
    rng, longest = np.random.default_rng(options.seed + 1), 512 - options.prompt
    rows = draw_rows(rng, size * batches, longest=longest)
    lengths = np.array([len(r["inputs"]) for r in rows]).reshape(batches, size) + options.prompt
    widest = lengths.max(axis=1)
    return {
        "longest": float(widest.mean()),
        "useful": float((lengths.sum(axis=1) / (widest * size)).mean()),
    }


def start_worker(options: argparse.Namespace, side: str) -> Worker:
    program = {
        "ours": (sys.executable, "bench_ours.py"),
        "PEFT": (options.python, "peft_worker.py"),
    }
    python, script = program[side]
    command = [python, str(HERE / script), str(options.out / "problem.json")]
    outside = huge_pages() if side in options.huge_pages else {}
    # both live on one GPU
    worker = Worker(command, side, {**outside, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    check_packages(worker, options.python)
    return worker


def check_losses(jobs: list[Job], warm: dict[str, dict[str, Any]]) -> None:
    """Refuse to time sides that do not compute the same; reduced precision may differ by 5%."""
    exact = [job for job in jobs if job["kind"] == "train" and not job["dropout"]]
    reference: dict[int, tuple[str, float]] = {}
    for job in sorted(exact, key=lambda job: job["dtype"] != "float32"):
        loss = warm[job["name"]]["losses"][0]
        name, value = reference.setdefault(job["batch_size"], (job["name"], loss))
        allowed, found = 1e-4 if job["dtype"] == "float32" else 0.05, abs(loss / value - 1)
        print(f"first loss of {job['name']}: {loss:.6f}, off by {found:.1e}", file=sys.stderr)
        if not found <= allowed:
            raise UserError(
                f"The first loss of {job['name']!r} is {loss:.6f} and that of {name!r} "
                f"{value:.6f}: the two do not compute the same, so nothing was timed."
            )


def measure(job: Job, worker: Worker, gate: Gate, tries: int) -> dict[str, Any]:
    """One pass of a job on an idle machine, if it becomes idle."""
    best: dict[str, Any] = {}
    for number in range(1, tries + 1):
        idle, before = gate.wait(), gate.now()
        reply = worker.ask(job["kind"], job=job)
        others = before.others(gate.now())
        if others < best.get("others", math.inf):
            kept = {key: reply[key] for key in ("seconds", "user", "system")}
            best = {**kept, "others": others, "others_before": idle, "try": number}
        if others <= gate.threshold:
            break
    return best


def memory(options: argparse.Namespace, jobs: list[Job]) -> list[dict[str, Any]]:
    """Peak resident memory of a fresh process that loads and takes three steps, for each job."""
    found = []
    for job in (job for job in jobs if job["kind"] == "train"):
        print(f"memory of {job['name']}", file=sys.stderr)
        worker = start_worker(options, job["side"])
        worker.ask("train", job=job, steps=MEMORY_STEPS)
        peak, bare = worker.ask("peak")["peak"], worker.facts["bare"]
        worker.close()
        found.append({"job": job["name"], "peak": peak, "bare": bare, "beyond": peak - bare})
    return found


def compare(jobs: list[Job], rounds: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Ratios of every pair of ours and PEFT's that does the same work.

    A population is compared with as many lone runs of either side, and answers of mixed batches of
    ours also with ours apart.
    """
    total = lambda job: np.array([sum(found["seconds"]) for found in rounds[job["name"]]])
    same = ("kind", "batch_size", "dropout")
    found = []
    for ours, peer in itertools.product(jobs, jobs):
        if ours["side"] != "ours" or any(ours[key] != peer[key] for key in same):
            continue
        times = ours["members"] // peer["members"]
        itself = times > 1 or (not ours["apart"] and peer["apart"])
        if peer["side"] == "PEFT" or (itself and ours["dtype"] == peer["dtype"]):
            name = f"{times} x {peer['name']}" if times > 1 else peer["name"]
            pair = ratios((times * total(peer)).tolist(), total(ours).tolist())
            found.append({"ours": ours["name"], "peft": name, **pair})
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark; OUT/bench.json is written again after every job."""
    jobs, problem = make_jobs(options), write_problem(options)
    if not jobs:
        raise UserError(f"--only {options.only!r} leaves no job; give another pattern.")
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "python")}
    result: dict[str, Any] = {"machine": machine(), "settings": settings, "jobs": jobs}
    result["typical"] = {size: typical(options, size) for size in options.batch_size}
    workers = {side: start_worker(options, side) for side in ("PEFT", "ours")}
    result["workers"] = {side: worker.facts for side, worker in workers.items()}
    warm: dict[str, dict[str, Any]] = {}
    result["warm_up"] = warm
    rounds: dict[str, list[dict[str, Any]]] = {job["name"]: [] for job in jobs}
    result["rounds"] = rounds
    for job in jobs:
        print(f"warm-up of {job['name']}", file=sys.stderr)
        found = warm[job["name"]] = workers[job["side"]].ask(job["kind"], job=job)
        if job["kind"] == "train":
            rows = [row for batch in problem["batches"][str(job["batch_size"])] for row in batch]
            shapes = [shape for step in found["shapes"] for shape in step]
            found["useful"] = useful_share(rows, shapes, options.prompt)
    check_losses(jobs, warm)
    processes = [os.getpid(), *(worker.process.pid for worker in workers.values())]
    gate = Gate(processes, threshold=options.idle, limit=options.wait)
    for number in range(options.rounds):
        shift = number % len(jobs)  # nobody always follows the same one
        for job in jobs[shift:] + jobs[:shift]:
            found = measure(job, workers[job["side"]], gate, options.tries)
            rounds[job["name"]].append(found)
            took, others = sum(found["seconds"]), found["others"]
            told = f"{job['name']}: {took:.2f} s (others used {others:.2f} cores)"
            print(f"round {number + 1}/{options.rounds}: {told}", file=sys.stderr)
            write_atomically(options.out / "bench.json", json.dumps(result, indent=1) + "\n")
        result["ratios"] = compare(jobs, rounds)
        write_atomically(options.out / "bench.json", json.dumps(result, indent=1) + "\n")
    for worker in workers.values():
        worker.close()
    result["memory"] = memory(options, jobs) if "memory" in options.stages else []
    write_atomically(options.out / "bench.json", json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    parser = peft_parser(__doc__)
    add = parser.add_argument
    add("--size", choices=("small", "base", "large", "xl"), default="small")
    add("--gpu", action="store_true", help="jobs and defaults for a GPU")
    add("--method", choices=("prompt", "lora"), default="prompt")
    add("--prompt", type=int, help="vectors of the prompt; 100, of LoRA 0")
    add("--batch-size", nargs="+", type=int, help="32 8, on a GPU 32 128 256")
    add("--batches", type=int, default=4, help="of each size")
    add("--positions", type=int, help="of a micro-batch, prompt included; 1280, on a GPU 32768")
    add("--questions", type=int, default=256, help="rows to answer")
    add("--learning-rate", type=float, default=0.01)
    add("--rounds", type=int, default=5)
    add("--huge-pages", nargs="*", choices=("ours", "PEFT"), default=["ours"],
        help="whose process computes in huge pages, as the command jaxprompt does")  # fmt: skip
    add("--stages", nargs="+", choices=("train", "answer", "memory"),
        default=["train", "answer", "memory"])  # fmt: skip
    add("--only", default="", help="pattern of the jobs to run, such as 'float32.* B8$'")
    add("--idle", type=float, default=0.15, help="cores that others may use")
    add("--wait", type=float, default=600, help="seconds to wait for that before each job")
    add("--tries", type=int, default=3, help="of a job that others have disturbed")
    add("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.prompt is None or options.method == "lora":
        options.prompt = 0 if options.method == "lora" else 100
    options.batch_size = options.batch_size or ([32, 128, 256] if options.gpu else [32, 8])
    options.positions = options.positions or max_positions(cpu=not options.gpu)
    with comparing(options):
        result = run(options)
        print(tables(result))
        draw(result, options.out / "ratios.png")


if __name__ == "__main__":
    main()
