"""What a run leaves: the tuned prompt or model, and the facts about it."""

import json
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
from jaxtyping import Array, Float

import jaxprompt
from jaxprompt import parallel
from jaxprompt.config import RunConfig
from jaxprompt.data.tokenizer import copy_tokenizer
from jaxprompt.files import replace_directory
from jaxprompt.model.load import Backbone, save_hf
from jaxprompt.prompts.artefact import Prompt, load_prompt, save_prompt


def facts_of(config: RunConfig, task, backbone: Backbone, scores, step: int, rows: int) -> dict:
    """What an artefact says about itself."""
    shape = backbone.config
    return {
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
        "task": task.model_dump(),
        "method": config.method,
        "metrics": scores,
        "rows": rows,
        "step": step,
        "seed": config.train.seed,
        "config": config.model_dump(),
        "versions": {
            "jaxprompt": jaxprompt.__version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
        },
    }


def note_test(folder: Path, scores: dict[str, float]) -> None:
    """Add the metrics of the test split to the artefact of a finished run."""
    if jax.process_index() == 0:
        prompt = load_prompt(folder)
        save_prompt(folder, prompt._replace(facts=prompt.facts | {"test": scores}))


def save_tuned(
    folder: Path,
    tree: Any,
    bank: Float[Array, "1 P D"] | None,
    backbone: Backbone,
    facts: dict[str, Any],
) -> None:
    """Write what was tuned: the prompt artefact, or the whole model as a Hugging Face directory.

    All processes call it, and the first one writes. tree: what was trained, with axis K of size 1.
    """
    weights = parallel.to_first(tree) if bank is None else None
    if jax.process_index() != 0:
        return
    if bank is not None:
        save_prompt(folder / "prompt", Prompt(np.asarray(jax.device_get(bank))[0], facts))
        return

    def write(path: Path) -> None:
        save_hf(path, backbone.config, jax.tree.map(lambda x: x[0], weights))
        copy_tokenizer(backbone.path, path)
        (path / "tuning.json").write_text(json.dumps(facts, indent=2) + "\n")

    replace_directory(folder / "model", write, lambda old: (old / "tuning.json").is_file())
