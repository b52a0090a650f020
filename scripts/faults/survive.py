"""Kills runs at random moments, starts them again until they are done, and compares their prompts.

    python scripts/faults/survive.py --kills 50
    python scripts/faults/survive.py --kills 10 --processes 2

Each run is `jaxprompt train` on the quickstart's task with a small random backbone, written for it.
One of its processes gets SIGKILL at a moment drawn evenly over the time that the run takes
undisturbed, and so again at the next start, so that loading, compiling, saving and judging are hit
alike; the others end by themselves. The prompt at the end must have the same bits as that of the
undisturbed run. Prints one JSON object; exit code 1 if any run differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import yaml

from jaxprompt.data.tokenizer import copy_tokenizer
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.models.checkpoints.hub import resolve
from jaxprompt.models.checkpoints.save import save_hf
from jaxprompt.models.t5 import t5

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--kills", type=int, default=50, help="runs that are killed")
parser.add_argument("--processes", type=int, default=1)
parser.add_argument("--starts", type=int, default=2, help="starts of a run that are killed")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--seed", type=int, default=0)

TRAIN = {
    "batch_size": 8,
    "max_eval_examples": 64,
    "evaluate_every": 6,
    "checkpoint_every": 4,
    "keep": 2,
}


def write_inputs(folder: Path, steps: int) -> None:
    """A backbone with random weights, and the run's settings."""
    source = Path(resolve("builtin-small"))
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    shape = t5.T5Config(
        vocab_size=vocabulary, d_model=32, num_heads=2, head_dim=16, d_ff=48,
        num_encoder_layers=2, num_decoder_layers=2,
    )  # fmt: skip
    save_hf(folder / "backbone", shape, t5.init_params(shape, jax.random.key(0)))
    copy_tokenizer(source, folder / "backbone")
    values = {
        "backbone": str(folder / "backbone"), "task": "supersense",
        "prompt": {"length": 8, "init": "sampled_vocabulary"},
        "train": TRAIN | {"steps": steps}, "output": "-",
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(values))


def start(folder: Path, name: str, processes: int) -> list[subprocess.Popen]:
    """The processes of a run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    workers = []
    for number in range(processes):
        told = os.environ | {"JAX_PLATFORMS": "cpu", "JAXPROMPT_CACHE": str(folder / "cache")}
        if processes > 1:
            told |= {
                "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number), "JAX_NUM_CPU_DEVICES": "1",
            }  # fmt: skip
        command = [sys.executable, "-m", "jaxprompt", "train", str(folder / "run.yaml")]
        with (folder / f"{name}.{number}.log").open("a") as log:
            workers.append(
                subprocess.Popen(
                    [*command, f"output={folder / name}"], env=told, stderr=log,
                    stdout=subprocess.DEVNULL,
                )
            )  # fmt: skip
    return workers


def finish(workers: list[subprocess.Popen]) -> list[int]:
    return [worker.wait() for worker in workers]


def main(options: argparse.Namespace, folder: Path) -> dict:
    """Run, kill, run again, compare."""
    write_inputs(folder, options.steps)
    rng, took = random.Random(options.seed), []
    for name in ("first", "whole"):  # the first one fills the cache of compiled programs
        began = time.monotonic()
        assert not any(finish(start(folder, name, options.processes))), folder
        took.append(time.monotonic() - began)
    expected = load_prompt(folder / "whole" / "prompt").vectors
    kills = same = 0
    for number in range(options.kills):
        name, stages = f"run{number}", []
        for _ in range(10 + options.starts):
            workers = start(folder, name, options.processes)
            if len(stages) < options.starts:
                time.sleep(rng.uniform(0, took[-1]))
                rng.choice(workers).send_signal(signal.SIGKILL)  # nothing, where it has ended
                stages.append(sorted(f.name for f in (folder / name).glob("checkpoints/*")))
            if not any(finish(workers)):
                break
        else:
            raise RuntimeError(f"{name} did not end: {(folder / f'{name}.0.log').read_text()}")
        found = load_prompt(folder / name / "prompt").vectors
        equal = bool(np.array_equal(found, expected))
        same += equal
        kills += len(stages)
        print(
            f"[{number + 1}/{options.kills}] killed with checkpoints {stages}; "
            f"{'the same' if equal else 'OTHER'} bits", file=sys.stderr, flush=True,
        )  # fmt: skip
        shutil.rmtree(folder / name)
    return {
        "runs": options.kills, "processes": options.processes, "same bits": same,
        "kills": kills, "undisturbed seconds": round(took[-1], 1),
    }  # fmt: skip


if __name__ == "__main__":
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        result = main(chosen, Path(place))
    print(json.dumps(result))
    sys.exit(result["same bits"] != chosen.kills)
