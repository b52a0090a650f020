"""32 rows of D prompts: the server's one batch against PEFT's one adapter after another."""

import json
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

from prompts import name_of
from servers import Server, pinned
from stages import ROWS, Figures, Setup, seconds_of

import jaxprompt as jp
from jaxprompt.config.schema import TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.templates import fill
from jaxprompt.inference.score import PairTokenizer

WORKER = Path(__file__).with_name("peft_answers.py")


def beside_peft(setup: Setup, server: Server, count: int) -> Figures:
    """Ratios of times on the same weights, rows and prompts, in turns; how far answers differ."""
    if setup.peft_python is None:
        raise ValueError("The stage peft needs --peft-python, a Python with torch and PEFT.")
    rows = setup.inputs(ROWS)
    problem = write_problem(setup, rows, count)
    worker = subprocess.Popen(
        [*pinned(setup.cores.server), setup.peft_python, str(WORKER), str(problem)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        ask(worker, None)
        cells = [cell(setup, server.client, worker, rows, d, count) for d in (1, 4, 16, 32)]
        return {"rows": ROWS, "cells": cells}
    finally:
        worker.kill()
        worker.wait()


def cell(
    setup: Setup,
    client: jp.Client,
    worker: subprocess.Popen,
    rows: list[dict],
    distinct: int,
    count: int,
) -> Figures:
    """Both sides in turns."""
    asked = [name_of(at % min(distinct, count)) for at in range(ROWS)]
    found = client.predict(asked, rows)
    ours, rank, generate = [], [], []
    for turn in range(setup.rounds + 1):
        seconds = seconds_of(lambda: client.predict(asked, rows))
        ranked = ask(worker, {"names": asked, "how": "rank"})
        generated = ask(worker, {"names": asked, "how": "generate"})
        if turn:  # the first one warms up
            ours.append(seconds)
            rank.append(ranked["seconds"])
            generate.append(generated["seconds"])
    return {
        "distinct": distinct,
        "ours_seconds": statistics.median(ours),
        "rank_ratio": statistics.median(map(lambda a, b: a / b, rank, ours)),
        "generate_ratio": statistics.median(map(lambda a, b: a / b, generate, ours)),
        "largest_difference": largest(found, ranked["scores"]),
    }


def largest(found: Sequence[dict], theirs: Sequence[Sequence[float]]) -> float:
    """Between log-likelihoods of both sides."""
    return max(
        abs(score["log_likelihood"] - other)
        for row, others in zip(found, theirs, strict=True)
        for score, other in zip(row["scores"], others, strict=True)
    )


def ask(worker: subprocess.Popen, question: object) -> dict:
    """A line to the worker and a line back; None only waits for the line that says it is ready."""
    if question is not None:
        worker.stdin.write(json.dumps(question) + "\n")
        worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError("PEFT's side ended; see what it printed.")
    return json.loads(line)


def write_problem(setup: Setup, rows: Sequence[dict], count: int) -> Path:
    """The same weights, prompts and ids for PEFT."""
    folder, library = setup.out / "peft", setup.library(count)
    folder.mkdir(parents=True, exist_ok=True)
    session = jp.open_session(jp.load_prompt(str(setup.artefact)), setup.backbone)
    jp.save_backbone(folder / "backbone", session.backbone)
    for number in range(min(ROWS, count)):
        prompt = jp.load_prompt(str(library / name_of(number)))
        jp.save_peft(str(folder / "adapters" / name_of(number)), prompt)
    task = parse(TaskConfig, session.prompt.metadata["task"], "task.")
    vocabulary = session.backbone.config.vocab_size
    tokenizer = PairTokenizer(session.tokenizer, vocabulary, 0, task)
    texts = [fill(task.template, row) for row in rows]
    inputs, _ = tokenizer.encode([{"input": text, "target": ""} for text in texts])
    labels, _ = tokenizer.encode([{"input": "", "target": label} for label in task.labels])
    problem = {
        "folder": str(folder),
        "names": [name_of(number) for number in range(min(ROWS, count))],
        "inputs": [example.inputs.tolist() for example in inputs],
        "labels": [example.targets.tolist() for example in labels],
    }
    path = folder / "problem.json"
    path.write_text(json.dumps(problem))
    return path
