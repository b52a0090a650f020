"""Weights as a Hugging Face directory, which transformers reads."""

import json
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxprompt.config.paths import expanded
from jaxprompt.data.batches import AnyArray
from jaxprompt.models.checkpoints import hf_decoder, hf_encoder, hf_t5
from jaxprompt.models.checkpoints.axes import axis_sizes, leaf_at
from jaxprompt.models.checkpoints.int8 import quantised
from jaxprompt.models.checkpoints.leaf import Leaf, file_shape, layer_sizes
from jaxprompt.models.checkpoints.safetensors import Output, write_sharded
from jaxprompt.models.checkpoints.torch_modules import leaves
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.encoder.config import EncoderConfig
from jaxprompt.models.registry import Config, Params


def save_hf(
    path: str | Path,
    config: Config,
    params: Params,
    *,
    int8: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    dropout: float = 0.0,
) -> None:
    """Write config.json and safetensors that transformers reads, in the dtype of ``params``.

    The tokenizer is not part of the parameters: copy its files beside them. An mT5 is saved as the
    T5 1.1 that it is. transformers 5 scales the output of every umT5; there its logits are ours
    times d_model**-0.5.

    Args:
        path: the directory, which is made where it does not exist.
        int8: whether matrices are stored as in ``int8.py``, which transformers does not read.
        max_shard_bytes: larger weights are split over several files with an index.
        dropout: the rate that a T5's config.json names, for those who train it further.
    """
    directory = Path(expanded(path))
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(config, DecoderConfig):
        describe = partial(hf_decoder.config_to_json, config)
    elif isinstance(config, EncoderConfig):
        describe = partial(hf_encoder.config_to_json, config)
    else:
        describe = partial(hf_t5.config_to_json, config, dropout=dropout)
    outputs = [out for leaf in leaves(config) for out in _outputs(leaf, config, params)]
    dtype = outputs[0].dtype.name
    if int8:
        outputs = [part for out in outputs for part in quantised(out)]
    write_sharded(directory, outputs, max_bytes=max_shard_bytes)
    (directory / "config.json").write_text(json.dumps(describe(dtype), indent=2) + "\n")


def _outputs(leaf: Leaf, config: Config, params: Params) -> list[Output]:
    """The tensors of the file that a leaf becomes, one for each of its pieces."""
    array = leaf_at(params, leaf.path)
    sizes = layer_sizes(leaf, axis_sizes(config))
    layered = leaf.axes[0] == "L"
    axes = leaf.axes[1:] if layered else leaf.axes
    outputs = []
    for layer, piece in enumerate(leaf.pieces):
        shape = file_shape(piece, sizes)
        order = [axes.index(letter) for letter in piece.axes if letter != " "]
        values = partial(_values, array, layer if layered else None, order, shape)
        outputs.append(Output(piece.name, shape, np.dtype(array.dtype), values))
    return outputs


def _values(
    array: Float[AnyArray, "..."], layer: int | None, order: list[int], shape: tuple[int, ...]
) -> Float[np.ndarray, "..."]:
    """One layer of an array, or all of it, with its axes as in the file."""
    part = np.asarray(array if layer is None else array[layer])
    return part.transpose(order).reshape(shape)
