"""Adapters of AdapterHub (the library ``adapters``), read and written.

Its names: ``seq_bn`` is Pfeiffer's bottleneck, ``double_seq_bn`` Houlsby's, ``par_bn`` He's. They
read the residual stream as it is, without a norm. The adapter's name is in those of its tensors.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.values import Values
from jaxprompt.methods.adapter_file import (
    AdapterFile,
    Changes,
    TreePath,
    check_all_read,
    number_in,
    read_tensors,
)
from jaxprompt.methods.tuned import Prompt, check_metadata, read_object
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.models.checkpoints.torch_modules import Sublayer, sublayers
from jaxprompt.models.injection import Layers
from jaxprompt.models.ops.activations import HUGGING_FACE_NAMES
from jaxprompt.models.ops.quantization import QuantizedArray

CONFIG = "adapter_config.json"
TENSORS, PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
HEAD = "lm_head.weight"

# settings that say nothing about what an adapter computes, or that are read below; any other must
# be null, false or empty
_KEYS = {
    *("architecture", "leave_out", "dropout", "init_weights", "init_weights_seed"),
    # bottlenecks
    *("mh_adapter", "output_adapter", "cross_adapter", "reduction_factor", "non_linearity"),
    *("original_ln_before", "original_ln_after", "residual_before_ln", "is_parallel", "scaling"),
    "adapter_residual_before_ln",  # of a norm of the adapter, which is refused
    "inv_adapter_reduction_factor",
    # of PHM layers, which are refused
    *("factorized_phm_W", "factorized_phm_rule", "hypercomplex_nonlinearity", "learn_phm"),
    *("phm_bias", "phm_c_init", "phm_dim", "phm_init_range", "phm_rank", "shared_W_phm"),
    "shared_phm_rule",
    # LoRA and IA3
    *("alpha", "r", "attn_matrices", "selfattn_lora", "intermediate_lora", "output_lora"),
    *("composition_mode", "dtype"),
}
_FOREIGN_TENSORS = {
    ".gate.": "a gate",
    "adapter_norm": "a norm of the adapter",
    "invertible_adapters": "an invertible adapter",
    "prefix": "a prefix",
    "heads.": "a head that was trained",
}


def read_adapterhub(path: Path) -> Prompt:
    """The adapter in a folder.

    Raises:
        UserError: it is damaged, or of a kind that cannot be represented.
    """
    whole = read_object(path / CONFIG)
    config, name = whole.get("config"), whole.get("name")
    if not isinstance(config, dict) or not isinstance(name, str):
        raise UserError(
            f"{path / CONFIG} has neither peft_type, as an adapter of PEFT, nor config and name, "
            "as one of AdapterHub; give an adapter of one of them."
        )
    method = _method(path, config)
    for key, value in config.items():
        if key not in _KEYS and value:
            raise UserError(
                f"The adapter {str(path)!r} has {key} {shown(value)}, which cannot be represented."
            )
    metadata = check_metadata({"adapterhub": whole, "method": method}, f"{path / CONFIG}:")
    if isinstance(whole.get("model_name"), str):
        metadata["backbone"] = {"source": whole["model_name"]}
    tensors = read_tensors(path, (TENSORS, PICKLE)) | _head(path)
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    file = AdapterFile("AdapterHub", str(path), whole, tensors)
    return Prompt(np.zeros((0, 0), np.float32), metadata, adapter_file=file)


def _method(path: Path, config: Values) -> str:
    """What the adapter is here. Raises UserError where it cannot be represented."""
    kind, mode = config.get("architecture"), config.get("composition_mode")
    if kind == "prefix_tuning":
        raise UserError(
            f"The adapter {str(path)!r} is prefix_tuning: AdapterHub counts the positions of a "
            "text's tokens as if they stood prefix_length places further to the right of each "
            "other, which cannot be represented; tune the prefix here."
        )
    if kind is None:
        if config.get("is_parallel") is not True and config.get("original_ln_after") is False:
            raise UserError(
                f"The adapter {str(path)!r} has original_ln_after False, so it takes the residual "
                "stream away, which cannot be represented."
            )
        if config.get("original_ln_before") and config.get("residual_before_ln", True) is not True:
            raise UserError(
                f"The adapter {str(path)!r} has residual_before_ln "
                f"{shown(config['residual_before_ln'])}, which cannot be represented."
            )
        return "adapter"
    if kind == "lora" and mode in ("add", "scale"):
        return "lora" if mode == "add" else "ia3"
    raise UserError(
        f"The adapter {str(path)!r} is of architecture {shown(kind)}; this version reads "
        "bottlenecks (seq_bn, double_seq_bn, par_bn), lora and ia3."
    )


def _head(path: Path) -> dict[str, Float[np.ndarray, "..."]]:
    """The head that was saved beside the adapter, if one was."""
    if not any((path / name).is_file() for name in HEADS):
        return {}
    heads = read_tensors(path, HEADS)
    return {name: tensor for name, tensor in heads.items() if "prefix_tuning" not in name}


def adapterhub_layers(file: AdapterFile, backbone: Backbone) -> Layers:
    """What an adapter changes in the layers of a backbone.

    Raises:
        UserError: it is of another backbone, is incomplete, or holds more than can be represented.
    """
    config, changes = file.config["config"], Changes(file, backbone)
    if config.get("architecture") is None:
        read = _bottlenecks(changes)
    elif config["composition_mode"] == "add":
        read = _low_rank(changes)
    else:
        read = _scales(changes)
    if HEAD in file.tensors and _is_frozen_head(file, backbone):
        read.append(HEAD)
    check_all_read(file, read, _FOREIGN_TENSORS | {HEAD: "a head that was trained"})
    _check_layers(changes)
    return changes.tree()


def _is_frozen_head(file: AdapterFile, backbone: Backbone) -> bool:
    """Whether the head that was saved is the backbone's own, in the backbone's precision."""
    head, params = file.tensors[HEAD], backbone.params
    own = params.get("head")
    if isinstance(own, QuantizedArray):
        raise UserError(
            f"The adapter {file.path!r} has a head beside it, which cannot be compared with that "
            f"of {backbone.source} in few bits; load the backbone without quantization."
        )
    own = params["token_embedder"]["embedding"] if own is None else own.T
    return own.shape == head.shape and bool(np.array_equal(own, head.astype(own.dtype)))


def _names(file: AdapterFile, pattern: str) -> Iterator[str]:
    """What stands before the adapter's name in tensors of a kind."""
    name = re.escape(file.config["name"])
    for key in file.tensors:
        match = re.fullmatch(pattern.format(name=name), key)
        if match:
            yield match[1]


def _low_rank(changes: Changes) -> list[str]:
    file, read = changes.file, []
    config, name = file.config["config"], file.config["name"]
    rank, alpha = (number_in(config, key, 8, file.path) for key in ("r", "alpha"))
    scale = 1.0 if _was_scaled_wrongly(file.config) else alpha / rank
    for module in _names(file, r"(.+)\.loras\.{name}\.lora_A"):
        a, b = (f"{module}.loras.{name}.lora_{letter}" for letter in "AB")
        changes.low_rank(module, a, b, scale)
        read += [a, b]
    return read


def _was_scaled_wrongly(config: Values) -> bool:
    """Whether the adapter was trained without alpha / r, as ``adapters`` before 1.1.0 did.

    https://github.com/adapter-hub/adapters/pull/770
    """
    version = re.match(r"adapters\.(\d+)\.(\d+)", str(config.get("version")))
    return version is not None and (int(version[1]), int(version[2])) < (1, 1)


def _scales(changes: Changes) -> list[str]:
    """IA3: scales of results; of the MLP's before its activation."""
    file, read = changes.file, []
    alpha = number_in(file.config["config"], "alpha", 1, file.path)
    alpha = 1.0 if _was_scaled_wrongly(file.config) else alpha
    for module in _names(file, r"(.+)\.loras\.{name}\.lora_B"):
        key = f"{module}.loras.{file.config['name']}.lora_B"
        place = changes.place(module)
        scale = np.float32(alpha) * changes.fitting(key, (math.prod(place.outputs), 1)) - 1
        changes.add((*place.path, "scale"), place.layer, scale.reshape(place.outputs))
        read.append(key)
    return read


SETTINGS = {
    "attention": "mh_adapter",
    "cross_attention": "cross_adapter",
    "mlp": "output_adapter",
}


def adapter_path(stack: str, kind: str) -> TreePath:
    """Where the bottlenecks of a kind of sublayer are in the tree of changes."""
    outer = (stack,) if stack == "layers" else (stack, "layers")
    return (*outer, f"{kind}_adapter")


def module_with(sublayer: Sublayer) -> str:
    """The module of a torch model that has a sublayer's bottlenecks."""
    if sublayer.stack != "layers":
        return sublayer.module
    name = {"attention": "attention_adapters", "mlp": "output_adapters"}[sublayer.kind]
    return f"{sublayer.module.rpartition('.')[0]}.{name}"


PARTS = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")


def _bottlenecks(changes: Changes) -> list[str]:
    file, read, width = changes.file, [], changes.backbone.config.d_model
    config = file.config["config"]
    activation = _activation(file)
    scaling = config.get("scaling", 1.0)
    learned = scaling in ("learned", "channel")
    fixed = 1.0 if learned else number_in(config, "scaling", 1.0, file.path)
    for sublayer in sublayers(changes.depths):
        start = f"{module_with(sublayer)}.adapters.{file.config['name']}."
        if start + PARTS[0] not in file.tensors:
            continue
        size = changes.rows(start + PARTS[0])
        shapes = ((size, width), (size,), (width, size), (width,))
        down, down_bias, up, up_bias = (
            changes.fitting(start + part, shape) for part, shape in zip(PARTS, shapes, strict=True)
        )
        read += [start + part for part in PARTS]
        if learned:  # for all numbers, or one for each
            factor = changes.fitting(f"{start}scaling", (width,) if scaling == "channel" else (1,))
            read.append(f"{start}scaling")
            up, up_bias = up * factor[:, None], up_bias * factor
        arrays = {"down": down.T, "down_bias": down_bias, "up": up.T, "up_bias": up_bias}
        path = adapter_path(sublayer.stack, sublayer.kind)
        for field, array in arrays.items():
            changes.add((*path, field), sublayer.layer, array)
        changes.settings["/".join(path)] = {
            "activation": activation, "reads": _reads(config), "scale": fixed
        }  # fmt: skip
    return read


def _activation(file: AdapterFile) -> str:
    name = str(file.config["config"].get("non_linearity")).lower()
    if name not in HUGGING_FACE_NAMES:
        raise UserError(
            f"The adapter {file.path!r} has non_linearity {shown(name)}; this version has "
            f"{listed(HUGGING_FACE_NAMES)}."
        )
    return HUGGING_FACE_NAMES[name]


def _reads(config: Values) -> str:
    if config.get("is_parallel"):
        return "input"
    return "sum" if config.get("original_ln_before") else "output"


def _check_layers(changes: Changes) -> None:
    """Refuse a file that lacks layers which are not left out."""
    file, config = changes.file, changes.file.config["config"]
    if not changes.parts:
        raise UserError(
            f"The adapter {file.path!r} holds no tensors of the name {file.config['name']!r}; save "
            "it again."
        )
    left_out = config.get("leave_out") or []
    for name, parts in changes.parts.items():
        stack = name.partition("/")[0]
        first = changes.depths["encoder"] if stack == "decoder" else 0  # layers count on
        lacking = [
            layer
            for layer in range(changes.depths[stack])
            if layer not in parts and first + layer not in left_out
        ]
        if lacking:
            raise UserError(
                f"The adapter {file.path!r} lacks layers {listed(lacking, 3)} of {name!r}; it is "
                "incomplete, or of another backbone."
            )
