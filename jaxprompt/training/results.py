"""What a run leaves: its best prompts or models, their metadata, and copies for checkpoints.

A run that was killed may have saved a better prompt after its newest checkpoint. When those steps
are repeated on other devices, another prompt may be the best. So a prompt that a checkpoint names
as the best is copied to ``.prompt@STEP``, until no checkpoint names it any more.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import flax
import jax
import numpy as np

import jaxprompt
from jaxprompt.config.mixture import Mixture, parts_of
from jaxprompt.data.tokenizer import copy_tokenizer
from jaxprompt.methods.artefact import Prompt, load_prompt, save_prompt
from jaxprompt.methods.tuned import Metadata
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.models.checkpoints.save import save_hf
from jaxprompt.models.injection import Injection, Params
from jaxprompt.runtime import processes
from jaxprompt.runtime.files import replace_directory
from jaxprompt.training.metric_log import Metrics
from jaxprompt.training.progress import Progress, best_trial
from jaxprompt.training.trial import Trial, by_task, slot_order


def metadata_for(trial: Trial, backbone: Backbone, scores: Metrics, progress: Progress) -> Metadata:
    """What the artefact of a trial says about itself, with its scores at this step."""
    config, shape, name = trial.config, backbone.config, trial.task.name
    tasks = parts_of(trial.task)
    metadata = {
        "backbone": {
            "source": config.backbone,
            "fingerprint": backbone.fingerprint,
            "fingerprint_float16": backbone.float16,
            "tokenizer": config.tokenizer,
            "d_model": shape.d_model,
            "vocab_size": shape.vocab_size,
            "family": shape.family,
            "num_layers": shape.num_layers,
            "num_heads": shape.num_heads,
        },
        "task": tasks[0].model_dump(),
        "method": config.method,
        "metrics": scores,
        "rows": len(trial.dataset.validation.examples),
        "step": progress.step,
        "seed": config.train.seed,
        "config": config.model_dump(),
        "versions": {
            "jaxprompt": jaxprompt.__version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
        },
        "baselines": {
            "majority": (progress.majority or {})[name],
            "untuned": (progress.untuned or {})[name],
        },
    }
    if isinstance(trial.task, Mixture):
        metadata["mixture"] = [task.model_dump() for task in tasks]
    return cast(Metadata, metadata)


def note_test(folder: Path, scores: dict[str, float]) -> None:
    """Add the metrics of the test split to the artefact of a finished run."""
    if jax.process_index() == 0:
        prompt = load_prompt(folder)
        save_prompt(folder, prompt._replace(metadata={**prompt.metadata, "test": scores}))


def save_tuned(
    folder: Path,
    tuned: Injection | Params,
    backbone: Backbone,
    metadata: Metadata,
    known: int = -1,
) -> None:
    """Write what was tuned: the prompt artefact, or the whole model as a Hugging Face directory.

    All processes call it, and the first one writes.

    Args:
        tuned: the injection of one trial, or a whole model with an axis K of size 1.
        known: the step of the version on disk, if a checkpoint names it as the best: that version
            is copied first. -1: none does.
    """
    prompt = isinstance(tuned, Injection)
    weights = None if prompt else processes.fetch_to_zero(tuned)
    if jax.process_index() != 0:
        return
    _put_aside(tuned_in(folder, prompt), known)
    if isinstance(tuned, Injection):
        bank, layers = jax.tree.map(
            lambda x: np.asarray(x)[0], jax.device_get((tuned.embeddings, tuned.layers))
        )
        vectors = np.zeros((0, backbone.config.d_model), np.float32) if bank is None else bank
        save_prompt(folder / "prompt", Prompt(vectors, metadata, layers))
        return

    def write(path: Path) -> None:
        rate = backbone.model.runtime.dropout
        save_hf(path, backbone.config, jax.tree.map(lambda x: x[0], weights), dropout=rate)
        copy_tokenizer(backbone.path, path)
        (path / "tuning.json").write_text(json.dumps(metadata, indent=2) + "\n")

    replace_directory(folder / "model", write, lambda old: (old / "tuning.json").is_file())


def tuned_in(folder: Path, prompt: bool) -> Path:
    """Where ``save_tuned`` writes in ``folder``."""
    return folder / ("prompt" if prompt else "model")


def _aside(path: Path) -> dict[int, Path]:
    """What is kept of earlier steps of ``path``, by step."""
    named = ((re.fullmatch(r"\.\w+@([0-9]+)", f.name), f) for f in path.parent.glob(".*@*"))
    return {int(name[1]): f for name, f in named if name and f.name.startswith(f".{path.name}@")}


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _put_aside(path: Path, step: int) -> None:
    """Keep what is at ``path``, of this step, until no checkpoint names it any more."""
    place = path.with_name(f".{path.name}@{step}")
    if step < 0 or place.exists() or not path.is_dir():
        return
    part = place.with_name(f"{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(path, part, copy_function=_linked)
    os.replace(part, place)


def bring_back(path: Path, step: int, result: Path) -> None:
    """Put back at ``path`` what was saved at ``step``, which a checkpoint names as the best.

    Args:
        result: the file that describes what is at ``path``; it is removed with that.
    """
    aside = _aside(path)
    for later in (place for at, place in aside.items() if at > step):
        shutil.rmtree(later, ignore_errors=True)
    if step not in aside:
        return
    result.unlink(missing_ok=True)
    copy = lambda fresh: shutil.copytree(
        aside[step], fresh, copy_function=_linked, dirs_exist_ok=True
    )
    replace_directory(path, copy)
    shutil.rmtree(aside[step], ignore_errors=True)


def tidy(path: Path, step: int, oldest: int) -> None:
    """Remove what no checkpoint from ``oldest`` on names; ``path`` itself was saved at ``step``."""
    aside = _aside(path)
    steps = [*sorted(aside), step]
    for at, after in zip(steps, steps[1:], strict=False):
        if after <= oldest:
            shutil.rmtree(aside[at], ignore_errors=True)


def saved_best_steps(trials: Sequence[Trial], progress: Progress) -> dict[Path, int]:
    """The directories that hold a best prompt or model, and the step of each; -1: none yet."""
    steps = {
        trial.own_dir: progress.best_step[trial.number]
        for trial in trials
        if trial.own_dir is not None
    }
    for members in by_task(trials).values():
        best = best_trial(progress, slot_order(members))
        steps[best.task_dir] = progress.best_step[best.number]
    return steps


def restore_best(
    trials: Sequence[Trial], progress: Progress, result: Path, *, prompt: bool
) -> None:
    """Let every directory hold the best that a checkpoint names."""
    for folder, step in saved_best_steps(trials, progress).items():
        bring_back(tuned_in(folder, prompt), step, result)


def tidy_best(trials: Sequence[Trial], progress: Progress, oldest: int, *, prompt: bool) -> None:
    """Remove what was kept aside for checkpoints before ``oldest``."""
    for folder, step in saved_best_steps(trials, progress).items():
        tidy(tuned_in(folder, prompt), step, oldest)
