"""What lies at a location: a model's config, its tensors, and the map between them.

No values are read.
"""

from pathlib import Path
from typing import NamedTuple

from jaxprompt.config.errors import UserError
from jaxprompt.models.checkpoints import hf_decoder, hf_encoder, hf_t5, t5x
from jaxprompt.models.checkpoints.axes import axis_sizes
from jaxprompt.models.checkpoints.gguf import read_gguf
from jaxprompt.models.checkpoints.hf_files import open_weights
from jaxprompt.models.checkpoints.leaf import Leaf, Tensor, check, check_depth
from jaxprompt.models.checkpoints.metadata import damage_as_user_error
from jaxprompt.models.registry import Config
from jaxprompt.runtime.json_file import read_json


class Checkpoint(NamedTuple):
    """A checkpoint whose names and shapes fit its config."""

    config: Config
    tensors: dict[str, Tensor]
    leaves: list[Leaf]


def open_checkpoint(location: str, config_path: Path | None = None) -> Checkpoint:
    """The checkpoint at a location that ``hub.resolve`` gave.

    Args:
        location: a Hugging Face directory, a T5X checkpoint (also gs://) or a GGUF file.
        config_path: a config.json to use instead of the checkpoint's own.

    Raises:
        UserError: a file is damaged, or tensors do not fit the config.
    """
    with damage_as_user_error(location, "cannot be read as a model"):
        if location.endswith(".gguf"):
            checkpoint = _open_gguf(location)
        elif t5x.is_t5x(location):
            checkpoint = _open_t5x(location, config_path)
        else:
            checkpoint = _open_hf(Path(location), config_path)
        check(checkpoint.leaves, checkpoint.tensors, axis_sizes(checkpoint.config))
    return checkpoint


def _open_gguf(location: str) -> Checkpoint:
    config, tensors = read_gguf(Path(location))
    check_depth(location, config.num_layers, tensors)
    return Checkpoint(config, tensors, hf_decoder.leaves(config))


def _open_t5x(location: str, config_path: Path | None) -> Checkpoint:
    tensors = t5x.read_t5x(location)
    beside = None if location.startswith("gs://") else Path(location) / "config.json"
    if config_path is None and beside is not None and beside.is_file():
        config_path = beside
    if config_path is None:
        config = t5x.infer_config(location, tensors)
    else:
        tied = t5x.is_tied(tensors)
        hf_t5.check_head(config_path, tied=tied, head=t5x.HEAD)
        config = hf_t5.config_from_json(config_path, tied=tied)
    return Checkpoint(config, tensors, t5x.leaves(config, tensors))


def _open_hf(directory: Path, config_path: Path | None) -> Checkpoint:
    config_path = config_path or directory / "config.json"
    if not config_path.is_file():
        raise UserError(f"{config_path} is missing; a backbone needs its config.json")
    raw, flax = open_weights(directory)
    kind = read_json(config_path).get("model_type")
    if isinstance(kind, str) and kind in hf_encoder.MODEL_TYPES:
        if flax:
            raise UserError(
                f"{directory} has flax_model.msgpack alone, and encoders with a mask are read from "
                "model.safetensors or pytorch_model.bin; download one of them"
            )
        tensors = hf_encoder.tidy(raw, kind, directory)
        config = hf_encoder.config_from_json(config_path, hf_encoder.read_mask_id(directory))
        check_depth(config_path, config.num_layers, tensors)
        return Checkpoint(config, tensors, hf_encoder.leaves(config))
    if kind in hf_decoder.MODEL_TYPES:
        tensors, tied = hf_decoder.tidy(raw)
        config = hf_decoder.config_from_json(config_path, tied=tied)
        check_depth(config_path, config.num_layers, tensors)
        hf_t5.check_head(config_path, tied="lm_head.weight" not in raw)
        return Checkpoint(config, tensors, hf_decoder.leaves(config))
    tensors, tied = hf_t5.tidy(raw, flax)
    config = hf_t5.config_from_json(config_path, tied=tied)
    check_depth(config_path, max(config.num_encoder_layers, config.num_decoder_layers), tensors)
    head = "lm_head/kernel" if flax else "lm_head.weight"
    hf_t5.check_head(config_path, tied=head not in raw, head=head)  # a copy of the embedding is one
    leaves = hf_t5.leaves(config)
    return Checkpoint(config, tensors, [hf_t5.flax_leaf(x) for x in leaves] if flax else leaves)
