"""Prompts on disk: a directory with vectors, facts and a model card. No pickle, ever.

Also reads what others write: ``.npy`` prompts (such as those released with the paper) and PEFT's
prompt-tuning adapters, and writes the latter.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxprompt.config import UserError

FORMAT = 1
TENSORS, FACTS, CARD = "prompt.safetensors", "prompt.json", "README.md"
PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"


class Prompt(NamedTuple):
    """A tuned prompt: float32 vectors and what is known about it (little for foreign files)."""

    vectors: Float[np.ndarray, "P D"]
    facts: dict[str, Any]


def replace_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new directory and put it at ``path``; an error leaves the old one.

    Two renames, for want of a portable exchange of directories: only a kill between them could
    leave the old directory beside its place, under a name with a dot and ``-old``.
    """
    if path.is_file():
        raise UserError(f"{str(path)!r} is a file and a directory is to be written; name another.")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    old = fresh.with_name(fresh.name + "-old")
    try:
        fresh.chmod(0o755)
        write(fresh)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(fresh, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def save_prompt(path: str | Path, prompt: Prompt) -> None:
    """Write the artefact: ``prompt.safetensors``, ``prompt.json`` and a model card."""
    facts = {"format": FORMAT, **prompt.facts}
    facts["length"], facts["width"] = prompt.vectors.shape

    def write(folder: Path) -> None:
        save_file({"prompt": np.ascontiguousarray(prompt.vectors, np.float32)}, folder / TENSORS)
        text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / FACTS).write_text(text + "\n", encoding="utf-8")
        (folder / CARD).write_text(model_card(facts), encoding="utf-8")

    replace_directory(Path(path), write)


def load_prompt(path: str | Path) -> Prompt:
    """Read an artefact, a PEFT prompt-tuning adapter, or an ``.npy`` file of shape [P, D]."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no prompt at {str(path)!r}; give an artefact, adapter or .npy.")
    if path.is_dir() and (path / FACTS).is_file():
        return _read_artefact(path)
    if path.is_dir() and (path / PEFT_CONFIG).is_file():
        return _read_peft(path)
    if path.is_file():
        return Prompt(_checked(_read_npy(path), path), {})
    raise UserError(f"{str(path)!r} holds neither {FACTS} nor {PEFT_CONFIG}; it is not a prompt.")


def save_peft(path: str | Path, prompt: Prompt) -> None:
    """Write a PEFT adapter (PROMPT_TUNING) that PEFT loads for the prompt's kind of model.

    ``num_transformer_submodules`` is 1: with PEFT's default of 2 for T5 half of the rows would be
    dead. PEFT knows no task: an input must end with the task's separator where it has one.
    """
    length, width = prompt.vectors.shape
    backbone = prompt.facts.get("backbone", {})
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM" if _decoder_only(prompt.facts) else "SEQ_2_SEQ_LM",
        "base_model_name_or_path": backbone.get("source"),
        "inference_mode": True,
        "num_virtual_tokens": length,
        "num_transformer_submodules": 1,
        "token_dim": width,
        "num_layers": backbone.get("num_layers"),
        "num_attention_heads": backbone.get("num_heads"),
        "prompt_tuning_init": "RANDOM",
    }

    def write(folder: Path) -> None:
        tensors = {"prompt_embeddings": np.ascontiguousarray(prompt.vectors, np.float32)}
        save_file(tensors, folder / PEFT_TENSORS, metadata={"format": "pt"})
        (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    replace_directory(Path(path), write)


def _decoder_only(facts: dict[str, Any]) -> bool:
    """Whether the prompt was tuned on a decoder-only model, as far as is known."""
    recorded = facts.get("backbone", {}).get("family")
    return recorded == "decoder-only" or facts.get("peft", {}).get("task_type") == "CAUSAL_LM"


def _read_artefact(path: Path) -> Prompt:
    facts = _read_json(path / FACTS)
    if facts.get("format") != FORMAT:
        raise UserError(
            f"{path / FACTS} has format {facts.get('format')!r} and this version reads {FORMAT}."
        )
    for key in ("backbone", "task", "peft"):
        if not isinstance(facts.get(key, {}), dict):
            raise UserError(f"{path / FACTS} is damaged: {key!r} is {facts[key]!r}, no object.")
    return Prompt(_checked(_read_safetensors(path / TENSORS, "prompt"), path), facts)


def _read_peft(path: Path) -> Prompt:
    config = _read_json(path / PEFT_CONFIG)
    kind = config.get("peft_type")
    if kind not in ("PROMPT_TUNING", "P_TUNING"):
        raise UserError(
            f"The adapter {str(path)!r} is {kind!r}; prompts are PROMPT_TUNING or P_TUNING."
        )
    if not (path / PEFT_TENSORS).is_file():
        raise UserError(
            f"The adapter {str(path)!r} has no {PEFT_TENSORS}; save it again with a PEFT version "
            "that writes safetensors."
        )
    rows = _checked(_read_safetensors(path / PEFT_TENSORS, "prompt_embeddings"), path)
    length = config.get("num_virtual_tokens")
    if not isinstance(length, int) or not 0 < length <= len(rows):
        raise UserError(
            f"{path / PEFT_CONFIG} has num_virtual_tokens {length!r} and the adapter holds "
            f"{len(rows)} rows; save it again with PEFT."
        )
    facts: dict[str, Any] = {"peft": config}
    if isinstance(config.get("base_model_name_or_path"), str):
        facts["backbone"] = {"source": config["base_model_name_or_path"]}
    # PEFT stores a second half of rows for T5 that it never uses: only the first n count
    return Prompt(rows[:length], facts)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(facts, dict):
        raise UserError(f"{path} must hold a JSON object.")
    return facts


def _read_safetensors(path: Path, name: str) -> np.ndarray:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path} is damaged or missing: {problem}.") from None
    if name not in tensors:
        raise UserError(f"{path} holds {sorted(tensors)} and no tensor {name!r}.")
    return tensors[name]


def _read_npy(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise UserError(
                f"{str(path)!r} is not an .npy file; give an artefact, adapter or .npy."
            )
    try:
        # mapped, so that a header that promises terabytes is an error and not an allocation
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a broken header raises whatever NumPy's parser happens to meet
        problem = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as an array of numbers: {problem}.") from None


def _checked(vectors: np.ndarray, path: Path) -> Float[np.ndarray, "P D"]:
    number = vectors.dtype.kind == "f" or vectors.dtype.name == "bfloat16"  # of ml_dtypes
    if vectors.ndim != 2 or not number or 0 in vectors.shape:
        raise UserError(
            f"{path} holds {vectors.dtype} of shape {list(vectors.shape)}; "
            "a prompt is a float array [P, D]."
        )
    with np.errstate(over="ignore"):  # of float64; found by the next line
        vectors = np.array(vectors, np.float32)
    if not np.isfinite(vectors).all():
        raise UserError(f"{path} holds values that are not finite; the prompt is unusable.")
    return vectors


def model_card(facts: dict[str, Any]) -> str:
    """Markdown that tells a stranger what the prompt does, how well, and how to use it."""
    task, backbone = facts.get("task", {}), facts.get("backbone", {})
    metrics = facts.get("metrics", {})
    labels = ", ".join(task.get("labels") or []) or "free text"
    scores = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    example = {"input": "..."} if not task else {"<column>": "..."}
    return f"""---
library_name: jaxprompt
tags: [prompt-tuning, soft-prompt, {"causal-lm" if _decoder_only(facts) else "t5"}]
---
# Soft prompt for {task.get("name", "an unnamed task")}

{facts.get("length")} vectors of {facts.get("width")} numbers that go before the text of a frozen
`{backbone.get("source", "unknown")}` (fingerprint `{backbone.get("fingerprint", "unknown")}`).
It works with that backbone only.

- Input: `{task.get("template", "unknown")}`
- Output: {labels}
- Tuned for {facts.get("step", "?")} steps, seed {facts.get("seed", "?")}; see `prompt.json` for the
  whole configuration.

| metric (validation, {facts.get("rows", "?")} rows) | value |
|---|---|
{scores}

    jaxprompt eval PATH_OF_THIS_FOLDER
    jaxprompt predict PATH_OF_THIS_FOLDER --input in.jsonl --output out.jsonl

Rows of `in.jsonl` are objects with the columns that the template names, such as
`{json.dumps(example)}`.
"""
