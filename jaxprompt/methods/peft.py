"""PEFT's prompt-tuning adapters: read into prompts, and written so that PEFT loads them."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.paths import expanded
from jaxprompt.methods.model_card import adapter_card
from jaxprompt.methods.tuned import (
    Prompt,
    as_json,
    check_metadata,
    checked_prompt,
    checked_vectors,
    decoder_only,
    read_object,
    read_tensor,
    record_of,
)
from jaxprompt.models.checkpoints.legacy.torch_pickle import read_torch
from jaxprompt.runtime.files import replace_directory

PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"  # of PEFT before 0.7
CARD = "README.md"


def save_peft(path: str | Path, prompt: Prompt, *, base_model: str | None = None) -> None:
    """Write a PEFT adapter (PROMPT_TUNING) that PEFT loads for the prompt's kind of model.

    Its README.md says what text the adapter expects, and how to get a backbone that only jaxprompt
    knows: ``save_backbone`` writes it as others load it.

    ``num_transformer_submodules`` is 1: with PEFT's default of 2 for T5 half of the rows would be
    dead. PEFT knows no task: an input must end with the task's separator where it has one.

    Args:
        base_model: Where PEFT finds the backbone; by default where it was in training.

    Raises:
        UserError: ``path`` holds anything but an adapter that was written here, or the vectors are
            not finite numbers.
    """
    vectors, metadata, layers = checked_prompt(prompt)
    if layers is not None:
        raise UserError(
            "The prompt changes layers of the model, and only vectors are written as a PEFT "
            "adapter yet; use a prompt of virtual tokens."
        )
    config = _peft_config(vectors.shape, metadata)
    if base_model is not None:
        config["base_model_name_or_path"] = base_model
    text = as_json(config)
    card = adapter_card(metadata, config).encode("utf-8", "backslashreplace")

    def write(folder: Path) -> None:
        tensors = {"prompt_embeddings": np.ascontiguousarray(vectors)}
        (folder / PEFT_TENSORS).write_bytes(save(tensors, metadata={"format": "pt"}))
        (folder / PEFT_CONFIG).write_bytes(text)
        (folder / CARD).write_bytes(card)

    replace_directory(Path(expanded(path)), write, _is_our_adapter)


def _peft_config(shape: tuple[int, ...], metadata: Mapping[str, object]) -> dict[str, object]:
    backbone = record_of(metadata, "backbone")
    return {
        "base_model_name_or_path": backbone.get("source"),
        "inference_mode": True,
        "num_attention_heads": backbone.get("num_heads"),
        "num_layers": backbone.get("num_layers"),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": shape[0],
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "task_type": "CAUSAL_LM" if decoder_only(metadata) else "SEQ_2_SEQ_LM",
        "token_dim": shape[1],
    }


def _is_our_adapter(folder: Path) -> bool:
    """Whether ``save_peft`` made a folder: PEFT itself writes more keys."""
    try:
        config = read_object(folder / PEFT_CONFIG)
    except UserError:
        return False
    return set(config) == set(_peft_config((0, 0), {}))


def read_peft(path: Path) -> Prompt:
    config = read_object(path / PEFT_CONFIG)
    kind = config.get("peft_type")
    if kind not in ("PROMPT_TUNING", "P_TUNING"):
        raise UserError(
            f"The adapter {str(path)!r} is {shown(kind)}; prompts are PROMPT_TUNING or P_TUNING."
        )
    name = "prompt_embeddings"
    if (path / PEFT_TENSORS).is_file():
        rows = checked_vectors(read_tensor(path / PEFT_TENSORS, name), path)
    elif (path / PEFT_PICKLE).is_file():
        rows = checked_vectors(_read_pickled(path / PEFT_PICKLE, name), path)
    else:
        raise UserError(f"The adapter {str(path)!r} has no {PEFT_TENSORS}; save it again.")
    length = config.get("num_virtual_tokens")
    if type(length) is not int or not 0 < length <= len(rows):
        raise UserError(
            f"{path / PEFT_CONFIG} has num_virtual_tokens {shown(length)} and the adapter holds "
            f"{len(rows)} rows; save it again with PEFT."
        )
    metadata = check_metadata({"peft": config}, f"{path / PEFT_CONFIG}:")
    if isinstance(config.get("base_model_name_or_path"), str):
        metadata["backbone"] = {"source": config["base_model_name_or_path"]}
    # PEFT stores a second half of rows for T5 that it never uses: only the first n count
    return Prompt(rows[:length], metadata)


def _read_pickled(path: Path, name: str) -> np.ndarray:
    """A tensor of a file that torch wrote, read by an interpreter that runs nothing."""
    tensors = read_torch(path)
    if name not in tensors:
        raise UserError(f"{path} holds {shown(sorted(tensors))} and no tensor {name!r}.")
    tensor, size = tensors[name], path.stat().st_size
    bytes_ = math.prod(tensor.shape) * tensor.dtype.itemsize
    if len(tensor.shape) != 2 or not 0 < bytes_ <= size:  # strides of 0 repeat what is there once
        raise UserError(
            f"{path} is damaged: {name!r} has shape {shown(list(tensor.shape))}; a prompt is a "
            f"float array [P, D], and the file has {size} bytes."
        )
    return tensor.read(tuple(slice(0, n) for n in tensor.shape))
