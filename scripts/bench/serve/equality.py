"""Whether answers through the server equal those of ``jaxprompt predict``.

    python scripts/bench/serve/equality.py --artefact runs/quickstart/prompt --out runs/equality

20 prompts of 3 lengths and 4 tasks, with random vectors of the size of a real prompt's, are asked
in requests that mix them at random. Each answer is compared with ``jp.predict`` of the row alone,
and with the same row asked of the server alone: these two have one number of rows and one width.
Writes OUT/equality.json.
"""

import json
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from options import common_options, setup_of
from safetensors.numpy import load_file, save_file
from servers import Server
from stages import Figures, Setup

import jaxprompt as jp

LENGTHS = (5, 20, 100)
TASKS: tuple[dict[str, object], ...] = (
    {"name": "kinds", "template": "{gloss}",
     "labels": ["object", "person", "animal", "plant", "food", "place"]},
    {"name": "alive", "template": "Is this alive? {gloss}", "labels": ["yes", "no"]},
    {"name": "means", "template": "{gloss} What is meant?", "length_normalized": True,
     "labels": ["a person", "a person or an animal", "something to eat", "a place in a town"]},
    {"name": "grade", "template": "gloss: {gloss}", "labels": ["1", "12", "123", "2", "23"]},
)  # fmt: skip


class Asked(NamedTuple):
    """One row."""

    name: str
    row: dict[str, str]


def make_library(setup: Setup, count: int, lengths: Sequence[int]) -> dict[str, Path]:
    """The folders of prompts with random vectors, by name."""
    root = setup.out / "equal"
    shutil.rmtree(root, ignore_errors=True)
    [(key, vectors)] = load_file(setup.artefact / "prompt.safetensors").items()
    facts = json.loads((setup.artefact / "prompt.json").read_text())
    rng, found = np.random.default_rng(0), {}
    for number in range(count):
        length, task = lengths[number % len(lengths)], TASKS[number % len(TASKS)]
        folder = found[f"r{number:02d}"] = root / f"r{number:02d}"
        folder.mkdir(parents=True)
        made = rng.normal(size=(length, vectors.shape[1]), scale=float(vectors.std()))
        save_file({key: made.astype(np.float32)}, folder / "prompt.safetensors")
        own = facts | {
            "length": length,
            "task": facts["task"] | {"length_normalized": False} | task,
        }
        (folder / "prompt.json").write_text(json.dumps(own))
    return found


def requests(asked: Sequence[Asked], rng: random.Random) -> Iterator[Sequence[Asked]]:
    """The rows in requests of random sizes."""
    start = 0
    while start < len(asked):
        size = rng.choice((1, 2, 5, 17, 32))
        yield asked[start : start + size]
        start += size


def through_server(server: Server, asked: Sequence[Asked]) -> list[np.ndarray]:
    """The log-likelihoods of each row."""
    found = server.client.predict([each.name for each in asked], [each.row for each in asked])
    return [np.array([each["log_likelihood"] for each in row["scores"]]) for row in found]


def largest(one: Sequence[np.ndarray], two: Sequence[np.ndarray]) -> dict[str, float]:
    """The largest difference, in nats and relative to the larger number."""
    pairs = list(zip(one, two, strict=True))
    return {
        "nats": max(float(np.abs(a - b).max()) for a, b in pairs),
        "relative": max(
            float((np.abs(a - b) / np.maximum(np.abs(a), np.abs(b))).max()) for a, b in pairs
        ),
    }


def compared(setup: Setup, count: int, rows: int, lengths: Sequence[int]) -> Figures:
    """The largest differences of scores, and how many rows have another answer."""
    library, rng = make_library(setup, count, lengths), random.Random(0)
    inputs = setup.inputs()
    asked = [Asked(rng.choice(list(library)), rng.choice(inputs)) for _ in range(rows)]
    with setup.served("--library", str(setup.out / "equal")) as server:
        mixed = [each for part in requests(asked, rng) for each in through_server(server, part)]
        alone = [each for one in asked for each in through_server(server, [one])]
        compilations = server.metrics()["jaxprompt_compilations"]
    # one row at a time has few shapes, so little is compiled
    lone: list[np.ndarray] = [np.empty(0)] * rows
    loaded = jp.load_backbone(setup.backbone, dtype=None)
    for name, folder in library.items():
        session = jp.open_session(str(folder), loaded)
        places = [at for at, each in enumerate(asked) if each.name == name]
        answers = jp.predict(session, [asked[at].row for at in places], batch_size=1)
        for at, answer in zip(places, answers, strict=True):
            lone[at] = np.array(list(answer["scores"].values()))
    other = sum(int(a.argmax() != b.argmax()) for a, b in zip(mixed, lone, strict=True))
    return {
        "backbone": setup.backbone, "prompts": count, "lengths": list(lengths), "rows": rows,
        "tasks": len(TASKS), "compilations": compilations, "other_answers": other,
        "server_alone_against_predict_alone": largest(alone, lone),
        "server_mixed_against_server_alone": largest(mixed, alone),
        "server_mixed_against_predict_alone": largest(mixed, lone),
    }  # fmt: skip


def main() -> None:
    parser = common_options(__doc__, "runs/equality")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rows", type=int, default=300)
    given = parser.parse_args()
    found = compared(setup_of(given), given.prompts, given.rows, given.lengths)
    (given.out / "equality.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))
    worst = found["server_mixed_against_predict_alone"]
    sys.exit(int(min(worst["nats"], worst["relative"]) > 1e-5))


if __name__ == "__main__":
    main()
