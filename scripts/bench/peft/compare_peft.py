"""Prompt tuning here and in PEFT: same weights, rows, batches, start, optimizer and steps.

    python scripts/bench/peft/compare_peft.py --out runs/peft --python ../peft-env/bin/python \\
        --task supersense --lengths 20 100 --steps 60 --seeds 0

PYTHON is an interpreter with torch, transformers and peft (the extra `parity`). Both sides run one
after the other in this process's time, on all cores, in float32. Adapters are then judged by the
same evaluation, PEFT's as an adapter that jaxprompt reads. Prints a Markdown table; OUT/runs.jsonl
keeps every step's time and loss.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from bench_tools import WorkerEnded
from peft_tools import comparing, peft_parser

from jaxprompt import api
from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import PromptConfig, TaskConfig, TrainConfig
from jaxprompt.data.batches import make_batch
from jaxprompt.data.examples import tokenize
from jaxprompt.data.layout import round_target_length
from jaxprompt.data.references import references
from jaxprompt.data.sampling import batch_indices
from jaxprompt.data.tasks.splits import load_rows
from jaxprompt.data.tokenizer import copy_tokenizer, load_tokenizer
from jaxprompt.data.virtual_tokens import VirtualTokens
from jaxprompt.evaluation.metrics import measure
from jaxprompt.methods.artefact import Prompt, load_prompt
from jaxprompt.methods.init import Vocabulary, initial_prompt
from jaxprompt.methods.registry import METHODS
from jaxprompt.models import registry
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.models.checkpoints.save import save_hf
from jaxprompt.runtime.files import replace_directory
from jaxprompt.studies.options import read_task
from jaxprompt.training.optimizer import per_member
from jaxprompt.training.step import init_state, make_train_step


def padded(rows: list[np.ndarray]) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows))), -1, np.int64)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return out


def ours(backbone, settings: TrainConfig, start, examples, indices, length: int):
    """Vectors after training, and each step's time and loss (the first of a shape compiles)."""
    method, optimizer = METHODS["prompt-tuning"], per_member(settings)
    state = init_state(method, optimizer, backbone.params, start[None])
    model = registry.with_shared_prefix(backbone.model, [e.inputs for e in examples], length)
    step = make_train_step(model, method, optimizer, z_loss=settings.z_loss)
    target_length = round_target_length(max(len(e.targets) for e in examples))
    times, losses, seen = [], [], set()
    for number, chosen in enumerate(indices):
        began = time.perf_counter()
        drawn = [examples[i] for i in chosen]
        batch = make_batch(drawn, target_length=target_length, layout=model.layout)
        state, found = step(state, backbone.params, [batch])
        losses.append(float(found.loss[0]))
        compiles = batch.inputs.shape not in seen
        seen.add(batch.inputs.shape)
        times.append((time.perf_counter() - began, compiles))
        print(f"ours step {number + 1}/{len(indices)}: loss {losses[-1]:.4f}", file=sys.stderr)
    return np.asarray(jax.device_get(state.trainables["prompt"]))[0], times, losses


def run(options, task: TaskConfig, backbone, length: int, seed: int) -> dict:
    settings = TrainConfig(
        steps=options.steps, batch_size=options.batch_size, optimizer="adamw", weight_decay=0.0,
        learning_rate=options.learning_rate, schedule="linear", z_loss=0.0, seed=seed,
    )  # fmt: skip
    tokenizer = load_tokenizer(backbone.path, one_sequence=True)
    rows = backbone.config.vocab_size
    training = load_rows(task, "train")
    plain, virtual = (
        tokenize(task, training, tokenizer, VirtualTokens(rows, n)) for n in (0, length)
    )
    lengths = np.array([len(e.inputs) for e in virtual])
    indices = [
        batch_indices(lengths, batch_size=settings.batch_size, seed=seed, step=step, window=0)
        for step in range(settings.steps)
    ]
    start = initial_prompt(
        PromptConfig(length=length, init="sampled_vocabulary"),
        Vocabulary(
            backbone.params["token_embedder"]["embedding"],
            encode=tokenizer.encode, special_ids=tokenizer.special_ids, pieces=tokenizer.size,
            labels=[],
        ),
        seed=seed, from_file=lambda path: np.empty(0),
    )  # fmt: skip
    folder = options.out / f"{task.name}-P{length}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    problem = {
        f"{name}_{step}": padded([getattr(plain[i], name) for i in chosen])
        for step, chosen in enumerate(indices)
        for name in ("inputs", "targets")
    }
    shared = {"steps": settings.steps, "learning_rate": settings.learning_rate}
    np.savez(folder / "problem.npz", start=start, settings=json.dumps(shared), **problem)

    vectors, times, losses = ours(backbone, settings, start, virtual, indices, length)
    command = [options.python, Path(__file__).parent / "peft_side.py", folder / "problem.npz"]
    ended = subprocess.run([*command, options.out / "weights", folder / "peft"]).returncode
    if ended:
        raise WorkerEnded(f"PEFT's half ended with status {ended}; its own message is above.")
    theirs = json.loads((folder / "peft" / "times.json").read_text())

    test = load_rows(task, options.split, options.eval_rows)
    scores = {}
    for name, prompt in (("ours", Prompt(vectors, {})), ("peft", load_prompt(folder / "peft"))):
        session = api.open_session(prompt, backbone)
        answers = api.predict_rows(session, task, test)
        found = measure(task, answers.predictions, references(task, test))
        scores[name] = found[task.metrics[0]]
    steady = [seconds for seconds, compiles in times if not compiles]
    record = {
        "task": task.name, "length": length, "seed": seed, "steps": settings.steps,
        "ours": scores["ours"], "peft": scores["peft"],
        "ours_step": statistics.median(steady), "peft_step": statistics.median(theirs["times"]),
        "ours_total": sum(seconds for seconds, _ in times), "peft_total": sum(theirs["times"]),
        "loss_ours": losses, "loss_peft": theirs["losses"],
    }  # fmt: skip
    with (options.out / "runs.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    return record


def main() -> None:
    parser = peft_parser(__doc__)
    add = parser.add_argument
    add("--backbone", default="smollm2")
    add("--task", default="supersense")
    add("--lengths", nargs="+", type=int, default=[20, 100])
    add("--seeds", nargs="+", type=int, default=[0])
    add("--steps", type=int, default=60)
    add("--batch-size", type=int, default=8)
    add("--learning-rate", type=float, default=0.01)
    add("--split", default="test")
    add("--eval-rows", type=int, default=300)
    options = parser.parse_args()
    with comparing(options):
        task, backbone = read_task(options.task), load_backbone(options.backbone)
        if not registry.one_sequence(backbone.config):
            raise UserError(
                f"--backbone {options.backbone!r} is not decoder-only; name one that is."
            )

        def write(path: Path) -> None:
            save_hf(path, backbone.config, backbone.params)
            copy_tokenizer(backbone.path, path)

        replace_directory(options.out / "weights", write)
        records = [
            run(options, task, backbone, length, seed)
            for length in options.lengths
            for seed in options.seeds
        ]
    print("| P | seed | accuracy, ours | PEFT | s a step, ours | PEFT | PEFT / ours "
          "| with compilation |\n" + "|---" * 8 + "|")  # fmt: skip
    for r in records:
        print(
            f"| {r['length']} | {r['seed']} | {r['ours']:.3f} | {r['peft']:.3f} "
            f"| {r['ours_step']:.2f} | {r['peft_step']:.2f} "
            f"| {r['peft_step'] / r['ours_step']:.2f} | {r['peft_total'] / r['ours_total']:.2f} |"
        )


if __name__ == "__main__":
    main()
