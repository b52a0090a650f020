"""Adapters of PEFT and AdapterHub (parity/goldens_methods/) as injections, mapped by hand.

``injection_of`` is differentiable, so that gradients have the names and shapes of the library's.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import GOLDENS

from jaxprompt.methods import p_tuning
from jaxprompt.models.checkpoints import hf_decoder, hf_t5
from jaxprompt.models.checkpoints.legacy.torch_pickle import read_torch
from jaxprompt.models.checkpoints.load import Backbone, load_backbone
from jaxprompt.models.checkpoints.safetensors import read_safetensors
from jaxprompt.models.injection import (
    Adapter,
    Injection,
    Layers,
    LowRank,
    Prefix,
    Projection,
    leaf_at,
)
from jaxprompt.models.ops.activations import HUGGING_FACE_NAMES
from jaxprompt.models.t5.config import T5Config

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


class Place(NamedTuple):
    """A module of the torch model, and the weight that it is here."""

    path: tuple[str, ...]
    layer: int | None  # None: of no layer
    out: tuple[int, ...]
    into: tuple[int, ...]


def places_of(backbone: Backbone) -> dict[str, Place]:
    """Name of a torch module -> its place."""
    c, places = backbone.config, {}
    for leaf in hf_t5.leaves(c) if isinstance(c, T5Config) else hf_decoder.leaves(c):
        shape = leaf_at(backbone.params, leaf.path).shape
        sizes = dict(zip(leaf.axes, shape, strict=True))
        for number, piece in enumerate(leaf.pieces):
            out, into = (*piece.axes.split(), "")[:2]
            places[piece.name.removesuffix(".weight")] = Place(
                leaf.path,
                number if "layers" in leaf.path else None,
                tuple(sizes[letter] for letter in out),
                tuple(sizes[letter] for letter in into),
            )
    return places


# --- trees of layers


class Changes:
    """What changes the layers, gathered from tensors of one layer each."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.parts: dict[tuple[str, ...], dict[int | None, object]] = {}

    def add(self, path: tuple[str, ...], layer: int | None, part: object) -> None:
        self.parts.setdefault(path, {})[layer] = part

    def tree(self) -> Layers:
        """The tree of an injection of one member."""
        tree: Layers = {}
        for (*modules, name), parts in self.parts.items():
            node = tree
            for module in modules:
                node = node.setdefault(module, {})
            node[name] = self._stacked(tuple(modules), parts)
        return tree

    def _stacked(self, modules: tuple[str, ...], parts: dict[int | None, object]) -> object:
        if None in parts:
            return jax.tree.map(lambda leaf: leaf[None], parts[None])
        layers = leaf_at(self.backbone.params, modules[: modules.index("layers") + 1])
        nothing = jax.tree.map(jnp.zeros_like, next(iter(parts.values())))
        depth = len(jax.tree.leaves(layers)[0])
        each = [parts.get(layer, nothing) for layer in range(depth)]
        return jax.tree.map(lambda *leaves: _padded(leaves)[None], *each)


def _padded(leaves: tuple[jax.Array, ...]) -> jax.Array:
    """Arrays of several sizes, as large as the largest, on a new first axis."""
    shape = np.max([leaf.shape for leaf in leaves], axis=0)
    pads = [[(0, s - own) for s, own in zip(shape, x.shape, strict=True)] for x in leaves]
    return jnp.stack([jnp.pad(x, pad) for x, pad in zip(leaves, pads, strict=True)])


def _low_rank(place: Place, a: jax.Array, b: jax.Array, scale: float) -> Projection:
    a, b = a.T.reshape(*place.into, -1), scale * b.T.reshape(-1, *place.out)
    return Projection(LowRank(a, b))


def _modules(tensors: Tensors, pattern: str) -> Iterator[tuple[re.Match, jax.Array]]:
    """The tensors whose whole name matches, with the match."""
    for name, tensor in tensors.items():
        match = re.fullmatch(pattern, name)
        if match:
            yield match, tensor


# --- PEFT


def peft_injection(golden: MethodGolden, backbone: Backbone, tensors: Tensors) -> Injection:
    return PEFT[golden.config["peft_type"]](golden.config, backbone, tensors)


def _pattern_value(patterns: dict[str, int], module: str, default: int) -> int:
    """PEFT's value for a module: of the first pattern that ends its name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _peft_lora(config: dict, backbone: Backbone, tensors: Tensors) -> Injection:
    changes, places = Changes(backbone), places_of(backbone)
    for match, a in _modules(tensors, r"base_model\.model\.(.*)\.lora_A\.weight"):
        module = match[1]
        rank = _pattern_value(config["rank_pattern"], module, config["r"])
        alpha = _pattern_value(config["alpha_pattern"], module, config["lora_alpha"])
        assert len(a) == rank
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        b, place = tensors[f"base_model.model.{module}.lora_B.weight"], places[module]
        changes.add(place.path, place.layer, _low_rank(place, a, b, scale))
    return Injection(layers=changes.tree())


def _peft_ia3(config: dict, backbone: Backbone, tensors: Tensors) -> Injection:
    changes, places = Changes(backbone), places_of(backbone)
    for match, scale in _modules(tensors, r"base_model\.model\.(.*)\.ia3_l"):
        place, delta = places[match[1]], scale.reshape(-1) - 1
        if match[1].split(".")[-1] in config["feedforward_modules"]:
            changes.add((*place.path[:-1], "hidden"), place.layer, delta)
        else:
            changes.add(place.path, place.layer, Projection(scale=delta.reshape(place.out)))
    return Injection(layers=changes.tree())


def _peft_norms(config: dict, backbone: Backbone, tensors: Tensors) -> Injection:
    changes, places = Changes(backbone), places_of(backbone)
    for match, weight in _modules(tensors, r"base_model\.model\.(.*)\.ln_tuning_layers\.weight"):
        place = places[match[1]]
        frozen = leaf_at(backbone.params, place.path)
        if place.layer is not None:
            frozen = frozen[place.layer]
        changes.add(place.path, place.layer, weight - frozen)
    return Injection(layers=changes.tree())


def _peft_prompt(config: dict, backbone: Backbone, tensors: Tensors) -> Injection:
    """Only the first rows count: a file for T5 has as many again for its decoder."""
    return Injection(tensors["prompt_embeddings"][None, : config["num_virtual_tokens"]])


def _peft_multitask(config: dict, backbone: Backbone, tensors: Tensors) -> Injection:
    """One member for each task."""
    tasks = tensors["prefix_task_cols"] @ tensors["prefix_task_rows"]
    return Injection(tensors["prompt_embeddings"] * tasks)


def _peft_prefix(config: dict, backbone: Backbone, tensors: Tensors) -> Injection:
    """In T5, of decoder self-attention only, where layer l uses the stored layer 2 l mod L."""
    c, changes = backbone.config, Changes(backbone)
    stored, prompts = config["num_layers"], tensors["prompt_embeddings"]
    is_t5 = isinstance(c, T5Config)
    heads = c.num_heads if is_t5 else c.num_kv_heads
    slots = prompts.reshape(len(prompts), 2 * stored, heads, c.head_dim)
    attention = ("decoder", "layers", "self_attention") if is_t5 else ("layers", "attention")
    for layer in range(c.num_decoder_layers if is_t5 else c.num_layers):
        source = 2 * layer % stored if is_t5 else layer
        prefix = Prefix(slots[:, 2 * source], slots[:, 2 * source + 1])
        changes.add((*attention, "prefix"), layer, prefix)
    return Injection(layers=changes.tree())


Mapping = Callable[[dict, Backbone, Tensors], Injection]
PEFT: dict[str, Mapping] = {
    "LORA": _peft_lora,
    "IA3": _peft_ia3,
    "LN_TUNING": _peft_norms,
    "PROMPT_TUNING": _peft_prompt,
    "P_TUNING": _peft_prompt,
    "MULTITASK_PROMPT_TUNING": _peft_multitask,
    "PREFIX_TUNING": _peft_prefix,
}


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


# --- AdapterHub


def adapterhub_injection(golden: MethodGolden, backbone: Backbone, tensors: Tensors) -> Injection:
    config = golden.config["config"]
    mapping = ADAPTERHUB[config.get("architecture"), config.get("composition_mode")]
    return mapping(config, backbone, tensors)


def _hub_lora(config: dict, backbone: Backbone, tensors: Tensors) -> Injection:
    changes, places = Changes(backbone), places_of(backbone)
    for match, a in _modules(tensors, r"(.*)\.loras\.task\.lora_A"):
        b, place = tensors[f"{match[1]}.loras.task.lora_B"], places[match[1]]
        changes.add(place.path, place.layer, _low_rank(place, a, b, config["alpha"] / config["r"]))
    return Injection(layers=changes.tree())


def _hub_ia3(config: dict, backbone: Backbone, tensors: Tensors) -> Injection:
    """All scales are of outputs; in T5 1.0, of the MLP's before the relu."""
    changes, places = Changes(backbone), places_of(backbone)
    for match, scale in _modules(tensors, r"(.*)\.loras\.task\.lora_B"):
        place = places[match[1]]
        delta = (config["alpha"] * scale - 1).reshape(place.out)
        changes.add(place.path, place.layer, Projection(scale=delta))
    return Injection(layers=changes.tree())


# what is in a layer of T5 by the number of its part, and in others by the name of the module
PARTS = {
    "encoder": {"0": "attention_adapter", "1": "mlp_adapter"},
    "decoder": {"0": "attention_adapter", "1": "cross_attention_adapter", "2": "mlp_adapter"},
    "model": {"attention_adapters": "attention_adapter", "output_adapters": "mlp_adapter"},
}


def _hub_bottlenecks(config: dict, backbone: Backbone, tensors: Tensors) -> Injection:
    changes = Changes(backbone)
    pattern = r"(encoder|decoder|model)\.\w+\.(\d+)\.(?:layer\.)?(\w+)\.adapters\.task\."
    for match, down in _modules(tensors, pattern + r"adapter_down\.0\.weight"):
        stack, layer, part = match.groups()
        base = match[0].removesuffix("adapter_down.0.weight")
        up, up_bias = tensors[f"{base}adapter_up.weight"], tensors[f"{base}adapter_up.bias"]
        scale = tensors.get(f"{base}scaling", config["scaling"])
        adapter = Adapter(
            down.T,
            tensors[f"{base}adapter_down.0.bias"],
            scale * up.T,
            scale * up_bias,
            HUGGING_FACE_NAMES[config["non_linearity"]],
            _reads(config),
        )
        where = ("layers",) if stack == "model" else (stack, "layers")
        changes.add((*where, PARTS[stack][part]), int(layer), adapter)
    return Injection(layers=changes.tree())


def _reads(config: dict) -> str:
    if config["is_parallel"]:
        return "input"
    return "sum" if config["original_ln_before"] else "output"


PREFIXES = {
    "encoder_prefix": ("encoder", "layers", "attention"),
    "self_prefix": ("decoder", "layers", "self_attention"),
    "cross_prefix": ("decoder", "layers", "cross_attention"),
}


def _hub_prefix(config: dict, backbone: Backbone, tensors: Tensors) -> Injection:
    c, changes, length = backbone.config, Changes(backbone), config["prefix_length"]
    for place, attention in PREFIXES.items():
        values = {
            match[1]: tensor
            for match, tensor in _modules(
                tensors, rf"prefix_tuning\.prefix_tunings\.task\.{place}\.(.*)"
            )
        }
        if config["flat"]:
            made = values["control_trans"]
        else:
            x = jnp.tanh(_linear(values, "control_trans.0", values["wte.weight"]))
            made = _linear(values, "control_trans.2", x)
        slots = made.reshape(length, -1, 2, c.num_heads, c.head_dim)
        for layer in range(slots.shape[1]):
            prefix = Prefix(slots[:, layer, 0], slots[:, layer, 1])
            changes.add((*attention, "prefix"), layer, prefix)
    return Injection(layers=changes.tree())


ADAPTERHUB: dict[tuple[str | None, str | None], Mapping] = {
    ("lora", "add"): _hub_lora,
    ("lora", "scale"): _hub_ia3,
    ("prefix_tuning", None): _hub_prefix,
    (None, None): _hub_bottlenecks,
}

LIBRARIES = {"peft": peft_injection, "adapterhub": adapterhub_injection}


def injection_of(golden: MethodGolden, backbone: Backbone, tensors: Tensors) -> Injection:
    """The injection that an adapter's tensors are."""
    return LIBRARIES[golden.library](golden, backbone, tensors)
