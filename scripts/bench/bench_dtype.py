"""Time of a step in each dtype, interleaved in one run: pre-training, and prompt tuning (P = 20).

    python scripts/bench/bench_dtype.py [--backbone builtin] [--rounds 5]

A batch has 32 rows, of 128 input and 32 target tokens for pre-training, of 64 and 4 for a prompt.
Prints the median time of a step, and the median over rounds of float32's time divided by it.
"""

import argparse
import statistics
import sys
import time

import jax
import numpy as np

from jaxprompt.config.errors import UserError
from jaxprompt.config.pretrain import PretrainOptimization
from jaxprompt.config.schema import TrainConfig
from jaxprompt.data.batches import Batch
from jaxprompt.methods.full import PRETRAINING
from jaxprompt.methods.registry import METHODS
from jaxprompt.models.checkpoints.load import LOAD_DTYPES, load_backbone
from jaxprompt.training.optimizer import per_member
from jaxprompt.training.step import init_state, make_train_step

ROWS, PROMPT, STEPS = 32, 20, 3  # STEPS a round


def random_batch(
    vocabulary: int, inputs: int, targets: int, virtual: int, *, rows: int = ROWS, prompts: int = 1
) -> Batch:
    """Random words in full rows of one segment, after ``virtual`` virtual tokens.

    ``rows`` of each of the ``prompts``.
    """
    rng, count = np.random.default_rng(0), rows * prompts
    owners = np.repeat(np.arange(prompts, dtype=np.int32), rows)[:, None]
    ids = rng.integers(3, vocabulary - 200, (count, inputs)).astype(np.int32)
    ids[:, :virtual] = vocabulary + owners * virtual + np.arange(virtual)
    words = rng.integers(3, vocabulary - 200, (count, targets)).astype(np.int32)
    ones = lambda width, dtype: np.ones((count, width), dtype)
    return Batch(
        ids, ones(inputs, np.int32), words, ones(targets, np.int32),
        owners[:, 0], ones(targets, np.float32),
    )  # fmt: skip


def job(name: str, dtype: str, path: str):
    """A function that runs one step, compiled already."""
    backbone = load_backbone(path, dtype=dtype, unroll=True)
    rows, width = backbone.params["token_embedder"]["embedding"].shape
    if name == "pre-training":
        method, settings, frozen = PRETRAINING, PretrainOptimization(), {}
        batch, prompts = random_batch(rows, 128, 32, 0), np.zeros((1, 0, width), np.float32)
    else:
        method, settings, frozen = METHODS["prompt-tuning"], TrainConfig(), backbone.params
        batch, prompts = random_batch(rows, 64, 4, PROMPT), np.ones((1, PROMPT, width), np.float32)
    optimizer = per_member(settings)
    step = make_train_step(backbone.model, method, optimizer)
    held = [init_state(method, optimizer, backbone.params, prompts)]

    def run() -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            held[0], _ = step(held[0], frozen, [batch])
        jax.block_until_ready(held[0])
        return (time.perf_counter() - start) / STEPS

    run()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="builtin")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = jax.devices()[0].device_kind
    print(f"| step of {args.backbone} ({device}) | dtype | seconds | times float32's speed |")
    print("|---|---|---|---|")
    for name in ("pre-training", "prompt tuning"):
        jobs = {dtype: job(name, dtype, args.backbone) for dtype in LOAD_DTYPES}
        rounds = [{dtype: run() for dtype, run in jobs.items()} for _ in range(args.rounds)]
        for dtype in jobs:
            seconds = statistics.median(r[dtype] for r in rounds)
            ratios = [r["float32"] / r[dtype] for r in rounds]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"| {name} | {dtype} | {seconds:.3f} | {spread} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
