"""Adapters of PEFT and AdapterHub (parity/goldens_methods/) as injections.

``injection_of`` is differentiable, so that gradients have the names and shapes of the library's.
What changes layers is read by the package. Virtual tokens are mapped here, and so are the prefixes
of AdapterHub, which the package refuses.
"""

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import GOLDENS

from jaxprompt.methods import p_tuning
from jaxprompt.methods.adapter_file import AdapterFile
from jaxprompt.methods.adapterhub import adapterhub_layers
from jaxprompt.methods.layers import nested
from jaxprompt.methods.peft import peft_layers
from jaxprompt.models.checkpoints.legacy.torch_pickle import read_torch
from jaxprompt.models.checkpoints.load import Backbone, load_backbone
from jaxprompt.models.checkpoints.safetensors import read_safetensors
from jaxprompt.models.injection import Injection, Layers, Prefix

FOLDER = GOLDENS.parent / "goldens_methods"
PICKLED = "pytorch_adapter"  # the name of AdapterHub's file that is no safetensors
Tensors = dict[str, jax.Array]


class MethodGolden(NamedTuple):
    """An adapter that a library saved, and what the library computed with it."""

    library: str  # peft | adapterhub
    base: Path
    config: dict
    tensors: dict[str, np.ndarray]  # in the adapter's file
    values: dict[str, np.ndarray]  # see scripts/goldens/make_goldens_methods.py

    def group(self, name: str) -> dict[str, np.ndarray]:
        """The values whose names begin so, such as "gradient"."""
        prefix = f"{name}/"
        return {
            key.removeprefix(prefix): value
            for key, value in self.values.items()
            if key.startswith(prefix)
        }


def names(library: str) -> list[str]:
    return sorted(path.name for path in (FOLDER / library).iterdir() if path.is_dir())


@functools.cache
def golden(library: str, name: str, values: str = "golden.npz") -> MethodGolden:
    folder = FOLDER / library / name
    provenance = json.loads((FOLDER / library / "provenance.json").read_text())
    with np.load(folder / values) as file:
        arrays = dict(file)
    (path,) = (p for p in folder.iterdir() if p.stem in ("adapter_model", "adapter", PICKLED))
    read = read_torch if path.stem == PICKLED else read_safetensors
    tensors = {
        key: np.array(tensor.read(tuple(slice(0, size) for size in tensor.shape)))
        for key, tensor in read(path).items()
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    base = GOLDENS.parent / provenance["bases"][name]
    return MethodGolden(library, base, config, tensors, arrays)


@functools.cache
def backbone(base: Path) -> Backbone:
    return load_backbone(str(base), unroll=False)


def injection_of(golden: MethodGolden, backbone: Backbone, tensors: Tensors) -> Injection:
    """The injection that an adapter's tensors are; of multitask prompts, one member a task."""
    config = golden.config
    kind = config.get("peft_type")
    if kind in ("PROMPT_TUNING", "P_TUNING"):
        # only the first rows count: a file for T5 has as many again for its decoder
        return Injection(tensors["prompt_embeddings"][None, : config["num_virtual_tokens"]])
    if kind == "MULTITASK_PROMPT_TUNING":
        tasks = tensors["prefix_task_cols"] @ tensors["prefix_task_rows"]
        return Injection(tensors["prompt_embeddings"] * tasks)
    if golden.library == "peft":
        file = AdapterFile("PEFT", str(golden.base), config, tensors)
        layers = peft_layers(file, backbone)
    elif config["config"].get("architecture") == "prefix_tuning":
        layers = _hub_prefix(config["config"], backbone, tensors)
    else:
        file = AdapterFile("AdapterHub", str(golden.base), config, tensors)
        layers = adapterhub_layers(file, backbone)
    return Injection(layers=jax.tree.map(lambda leaf: leaf[None], layers))


def peft_network(config: dict, values: Tensors) -> jax.Array:
    """The prompt, or prefix, that a network of PEFT makes; only its output is saved."""
    x = values["embedding.weight"]
    if config["peft_type"] == "PREFIX_TUNING":
        return _linear(values, "transform.2", jnp.tanh(_linear(values, "transform.0", x)))
    return p_tuning.inject(_p_tuning_leaves(values), {}).embeddings[0]


def _linear(values: Tensors, name: str, x: jax.Array) -> jax.Array:
    return x @ values[f"{name}.weight"].T + values[f"{name}.bias"]


def _p_tuning_leaves(values: Tensors) -> Tensors:
    """The weights of PEFT's PromptEncoder as the trainables of p-tuning, of one member."""
    leaves = {"prompt": values["embedding.weight"]}
    stored = lambda weight: weight.T * weight.shape[1] ** 0.5  # see methods/p_tuning.py
    for name, value in values.items():
        if match := re.fullmatch(r"mlp_head\.(\d)\.(weight|bias)", name):
            place = f"mlp/{int(match[1]) // 2}"
            if match[2] == "weight":
                leaves[f"{place}/kernel"] = stored(value)
            else:
                leaves[f"{place}/bias"] = value
        elif match := re.fullmatch(r"lstm_head\.weight_ih_(l(\d)(_reverse)?)", name):
            end, place = match[1], f"lstm/{match[2]}/{'backward' if match[3] else 'forward'}"
            leaves[f"{place}/input"] = stored(value)
            leaves[f"{place}/hidden"] = stored(values[f"lstm_head.weight_hh_{end}"])
            leaves[f"{place}/bias"] = sum(values[f"lstm_head.bias_{k}_{end}"] for k in ("ih", "hh"))
    return {name: leaf[None] for name, leaf in leaves.items()}


PREFIXES = {
    "encoder_prefix": ("encoder", "layers", "attention"),
    "self_prefix": ("decoder", "layers", "self_attention"),
    "cross_prefix": ("decoder", "layers", "cross_attention"),
}


def _hub_prefix(config: dict, backbone: Backbone, tensors: Tensors) -> Layers:
    c, length, layers = backbone.config, config["prefix_length"], {}
    for place, attention in PREFIXES.items():
        start = f"prefix_tuning.prefix_tunings.task.{place}."
        values = {
            name.removeprefix(start): tensor
            for name, tensor in tensors.items()
            if name.startswith(start)
        }
        if config["flat"]:
            made = values["control_trans"]
        else:
            x = jnp.tanh(_linear(values, "control_trans.0", values["wte.weight"]))
            made = _linear(values, "control_trans.2", x)
        key, value = jnp.moveaxis(made.reshape(length, -1, 2, c.num_heads, c.head_dim), 2, 0)
        prefix = Prefix(key.swapaxes(0, 1), value.swapaxes(0, 1))
        layers["/".join((*attention, "prefix"))] = prefix
    return nested(layers)
