"""Names of settings: old spellings that are still read, and what other libraries call them."""

import warnings
from collections.abc import Mapping
from typing import TypeVar

from jaxprompt.config.errors import UserError

# old key -> new key; both in the same section
RENAMED = {
    "model.weights": "model.quantization",
    "train.eval_rows": "train.max_eval_examples",
    "train.halve_every": "train.successive_halving_every",
    "train.length_window": "train.length_bucketing_window",
    "train.micro_batch": "train.micro_batch_size",
}

# name in another library (PEFT, transformers, OpenPrompt, t5x) -> the setting here
ALIASES = {
    "lr": "train.learning_rate",
    "base_learning_rate": "train.learning_rate",
    "max_steps": "train.steps",
    "train_steps": "train.steps",
    "num_train_epochs": "train.steps",
    "epochs": "train.steps",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "train.eval_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "optim": "train.optimizer",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule",
    "num_warmup_steps": "train.warmup_steps",
    "warmup_ratio": "train.warmup_steps",
    "max_grad_norm": "train.clip",
    "eval_steps": "train.evaluate_every",
    "eval_period": "train.evaluate_every",
    "max_eval_samples": "train.max_eval_examples",
    "save_steps": "train.checkpoint_every",
    "checkpoint_period": "train.checkpoint_every",
    "report_to": "train.trackers",
    "save_total_limit": "train.keep",
    "early_stopping_patience": "train.patience",
    "num_virtual_tokens": "prompt.length",
    "num_tokens": "prompt.length",
    "soft_token_num": "prompt.length",
    "prompt_length": "prompt.length",
    "prompt_tuning_init": "prompt.init",
    "prompt_tuning_init_text": "prompt.text",
    "encoder_hidden_size": "p_tuning.width",
    "encoder_reparameterization_type": "p_tuning.encoder",
    "peft_type": "method",
    "torch_dtype": "model.dtype",
    "load_in_8bit": "model.quantization",
    "load_in_4bit": "model.quantization",
    "gradient_checkpointing": "model.remat",
    "dropout_rate": "model.dropout",
    "model_name_or_path": "backbone",
    "base_model_name_or_path": "backbone",
    "tokenizer_name_or_path": "tokenizer",
    "output_dir": "output",
    "dataset_name": "task.source",
    "train_file": "task.train",
    "validation_file": "task.validation",
    "test_file": "task.test",
    "max_source_length": "task.max_input_length",
    "max_seq_length": "task.max_input_length",
    "max_length": "task.max_input_length",
    "num_beams": "task.beams",
}

V = TypeVar("V")


def current_key(key: str) -> str:
    """The present spelling of a dotted key, such as ``train.eval_rows``; warns of an old one."""
    new = RENAMED.get(key)
    if new is None:
        return key
    # for users of a program, whom Python shows no DeprecationWarning
    warnings.warn(f"Config key {key!r} is now {new!r}; rename it", FutureWarning, stacklevel=3)
    return new


def current_section(values: Mapping[str, V], section: str) -> dict[str, V]:
    """The settings of one section (``train``, ``model``) under their present names.

    Raises:
        UserError: a setting is given under its old and its new name.
    """
    renamed: dict[str, V] = {}
    for name, value in values.items():
        key = f"{section}.{name}"
        if RENAMED.get(key, key).rpartition(".")[2] in values and key in RENAMED:
            raise UserError(
                f"{key!r} and {RENAMED[key]!r} are the old and the new name of one setting; leave "
                "out the old one"
            )
        renamed[current_key(key).removeprefix(f"{section}.")] = value
    return renamed


def current_names(values: Mapping[str, V]) -> dict[str, V | dict[str, V]]:
    """All settings of a config under their present names; other values are left as they are."""
    sections = {key.partition(".")[0] for key in RENAMED}
    return {
        name: current_section(value, name)
        if name in sections and isinstance(value, Mapping)
        else value
        for name, value in values.items()
    }


def recorded_names(values: Mapping[str, V]) -> dict[str, V | dict[str, V]]:
    """``current_names`` of a config that a run wrote: nobody can rename its keys, so no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return current_names(values)
