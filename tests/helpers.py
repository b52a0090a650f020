"""A tiny backbone on disk that learns, and runs of it: what the tests of whole commands share."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import yaml
from helpers_data import make_tokenizer

from jaxprompt.config.schema import RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.models.checkpoints.save import save_hf
from jaxprompt.models.t5 import t5
from jaxprompt.training import divergence, metric_log
from jaxprompt.training.metric_log import NullReporter

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
GOLDENS = ROOT / "tests" / "parity" / "goldens"
GOLDENS_CAUSAL = ROOT / "tests" / "parity" / "goldens_causal"
GOLDENS_MASKED = ROOT / "tests" / "parity" / "goldens_masked"

CONFIG = t5.T5Config(
    vocab_size=32, d_model=16, num_heads=2, head_dim=4, d_ff=24,
    num_encoder_layers=2, num_decoder_layers=2,
)  # fmt: skip


def make_backbone(folder: Path, *, seed: int = 0, config: t5.T5Config = CONFIG) -> Path:
    """A Hugging Face directory with random weights and the word tokenizer of ``helpers_data``."""
    save_hf(folder, config, jax.jit(t5.init_params, static_argnums=0)(config, jax.random.key(seed)))
    make_tokenizer(folder)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_rows(count: int) -> list[dict]:
    """Sentences whose last word decides their label."""
    words = [("one", "good", "yes"), ("two three", "bad", "no")]
    return [
        {"text": f"{words[i % 2][0]} it was {words[i % 2][1]}", "label": words[i % 2][2]}
        for i in range(count)
    ]


def run_values(backbone: Path, folder: Path) -> dict:
    """A run of four steps that takes a second or two; rows are written beside it."""
    train = write_rows(folder / "train.jsonl", make_rows(24))
    validation = write_rows(folder / "valid.jsonl", make_rows(8))
    return {
        "backbone": str(backbone),
        "task": {
            "name": "mine", "train": str(train), "validation": str(validation),
            "template": "question : {text}", "labels": ["yes", "no"],
            "max_input_length": 16, "max_target_length": 4,
        },
        "model": {"unroll": False},
        "prompt": {"length": 3},
        "train": {"steps": 4, "batch_size": 8, "eval_batch_size": 8, "evaluate_every": 2,
                  "checkpoint_every": 2, "tensorboard": False},
        "output": str(folder / "run"),
    }  # fmt: skip


def write_run(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def run_config(backbone, folder, **settings) -> RunConfig:
    folder.mkdir(exist_ok=True)
    values = run_values(backbone, folder)
    values["train"] |= {"steps": 12, "evaluate_every": 4, "checkpoint_every": 5, "patience": None}
    for key, value in settings.items():
        if isinstance(value, dict):
            values[key] = values.get(key, {}) | value
        else:
            values[key] = value
    return parse(RunConfig, values)


def assert_same_sums(found, wanted, terms: int) -> None:
    """Equal but for the order of float32 sums, which processors and layouts of devices choose.

    terms: how many numbers a result is the sum of, over all layers and steps that it goes through.
    Such sums differ by up to ``terms`` roundings of the largest value (Higham 2002, section 4.2).
    """
    bound = terms * np.finfo(np.float32).eps * np.abs(np.asarray(wanted)).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)


# of the vectors of a run on the tiny backbone: width, layers forward and backward, steps
RUN_SUMS = 16 * 8 * 12


class Killer(NullReporter):
    """Raises at a step, or at a line that starts as given, as a kill would."""

    def __init__(self, at):
        self.at = at

    def step(self, done, rates):
        if done == self.at:
            raise KeyboardInterrupt

    def say(self, text):
        if isinstance(self.at, str) and text.startswith(self.at):
            raise KeyboardInterrupt


def metrics(folder):
    """Rows of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("per_second")} for row in rows]


def diverge(monkeypatch, at, times):
    """Let the loss of a step be no number, so many times."""
    check, write, met = divergence.check_loss, metric_log.log_step, []

    def log_step(log, progress, losses):
        if progress.step == at and len(met) < times:
            met.append(at)
            check(float("nan"), at)
        return write(log, progress, losses)

    monkeypatch.setattr(metric_log, "log_step", log_step)
