"""Tuned prompts and changes of layers, written as adapters that PEFT loads."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save

from jaxprompt.config.errors import UserError, listed
from jaxprompt.config.paths import expanded
from jaxprompt.data.batches import AnyArray
from jaxprompt.methods.adapterhub_lora import divided
from jaxprompt.methods.contents import (
    ADAPTERS,
    BIASES,
    DORA,
    IA3,
    LABEL_ROWS,
    LORA,
    NORMS,
    PREFIXES,
    change_at,
    parts_in,
)
from jaxprompt.methods.dora import lengths_in
from jaxprompt.methods.model_card import adapter_card
from jaxprompt.methods.peft import PEFT_CONFIG, PEFT_TENSORS, PROMPT, lora_rank_and_scale
from jaxprompt.methods.tuned import (
    Prompt,
    as_json,
    decoder_only,
    fitted_prompt,
    read_object,
    record_of,
    refuse_encoder,
)
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.models.checkpoints.torch_modules import Path as TreePath
from jaxprompt.models.checkpoints.torch_modules import module_of, paths_like
from jaxprompt.models.injection import Layers, LowRank, Params, leaf_at
from jaxprompt.runtime.files import replace_directory

CARD = "README.md"
Tensors = dict[str, Float[np.ndarray, "..."]]
Settings = dict[str, object]

_COMMON = {"base_model_name_or_path", "inference_mode", "peft_type", "task_type"}
_OF_PROMPTS = {
    *("num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens"),
    "token_dim",
}
# all keys that are written. PEFT itself writes more of them, so they tell whose a folder is
_KEYS: Mapping[str, set[str]] = {
    "PROMPT_TUNING": _COMMON | _OF_PROMPTS | {"prompt_tuning_init"},
    "PREFIX_TUNING": _COMMON | _OF_PROMPTS | {"prefix_projection"},
    "LORA": _COMMON
    | {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
    | {"bias", "lora_dropout", "use_dora"},
    "IA3": _COMMON | {"target_modules", "feedforward_modules"},
    "LN_TUNING": _COMMON | {"target_modules"},
}


class _Adapter(NamedTuple):
    """What is written: keys of the config, tensors, and a word for both."""

    kind: str  # peft_type
    settings: Settings
    tensors: Tensors
    size: str  # as in "5 vectors"


def save_peft(
    path: str | Path,
    prompt: Prompt,
    *,
    base_model: str | None = None,
    backbone: Backbone | None = None,
) -> None:
    """Write a PEFT adapter that PEFT loads for the prompt's kind of model.

    Virtual tokens become PROMPT_TUNING, low-rank changes LORA, scales IA3, norms LN_TUNING, and the
    keys and values of a decoder-only model PREFIX_TUNING. PEFT has no adapter of several kinds.
    Its README.md says what text the adapter expects, and how to get a backbone that only jaxprompt
    knows: ``save_backbone`` writes it as others load it.

    PEFT knows no task: an input must end with the task's separator where it has one.

    Args:
        base_model: Where PEFT finds the backbone; by default where it was in training.
        backbone: that the prompt was tuned on; only norms need it, as PEFT stores whole weights.

    Raises:
        UserError: ``path`` holds anything but an adapter that was written here, the numbers are not
            finite, or PEFT has no form for what was tuned.
    """
    vectors, metadata, layers = fitted_prompt(prompt)
    refuse_encoder(metadata, "PEFT")
    is_decoder = decoder_only(metadata) or "layers" in (layers or {})
    if layers is None:
        adapter = _virtual_tokens(vectors, metadata)
    else:
        adapter = _changes(len(vectors), layers, metadata, backbone)
    config: Settings = {
        "base_model_name_or_path": base_model or record_of(metadata, "backbone").get("source"),
        "inference_mode": True,
        "peft_type": adapter.kind,
        "task_type": "CAUSAL_LM" if is_decoder else "SEQ_2_SEQ_LM",
        **adapter.settings,
    }
    text = as_json(dict(sorted(config.items())))
    card = adapter_card(metadata, config, adapter.size).encode("utf-8", "backslashreplace")
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in adapter.tensors.items()}

    def write(folder: Path) -> None:
        (folder / PEFT_TENSORS).write_bytes(save(tensors, metadata={"format": "pt"}))
        (folder / PEFT_CONFIG).write_bytes(text)
        (folder / CARD).write_bytes(card)

    replace_directory(Path(expanded(path)), write, _is_our_adapter)


def _is_our_adapter(folder: Path) -> bool:
    """Whether ``save_peft`` made a folder: PEFT itself writes more keys."""
    try:
        config = read_object(folder / PEFT_CONFIG)
    except UserError:
        return False
    written = _KEYS.get(str(config.get("peft_type")), set())
    return set(config) in (written, written - {"use_dora"})  # which earlier versions left out


def _virtual_tokens(vectors: Float[np.ndarray, "P D"], metadata: Mapping[str, object]) -> _Adapter:
    """PROMPT_TUNING. With PEFT's default of 2 submodules for T5 half of the rows would be dead."""
    backbone = record_of(metadata, "backbone")
    settings: Settings = {
        "num_attention_heads": backbone.get("num_heads"),
        "num_layers": backbone.get("num_layers"),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": len(vectors),
        "prompt_tuning_init": "RANDOM",
        "token_dim": vectors.shape[1],
    }
    return _Adapter("PROMPT_TUNING", settings, {PROMPT: vectors}, f"{len(vectors)} vectors")


def _changes(
    length: int, layers: Layers, metadata: Mapping[str, object], backbone: Backbone | None
) -> _Adapter:
    """Changes of layers as PEFT has them. Raises UserError where it has no form for them."""
    parts = parts_in(layers)
    kinds = [part.kind for part in parts]
    if length or len(parts) != 1:
        every = ["virtual tokens"] * bool(length) + kinds
        raise UserError(
            f"The prompt has {listed(every)}, and an adapter of PEFT has one kind of change; keep "
            "it as an artefact of jaxprompt (save_prompt), or export one that was tuned alone."
        )
    (part,) = parts
    if part.kind == LORA:
        return _lora(part.paths, layers, metadata)
    if part.kind == DORA:
        return _dora(part.paths, layers, metadata, backbone)
    if part.kind == IA3:
        return _ia3(part.paths, layers)
    if part.kind == NORMS:
        return _norms(part.paths, layers, backbone)
    if part.kind == PREFIXES and "layers" in layers:
        return _prefix(layers)
    why = {
        PREFIXES: "which PEFT has for decoder-only models alone: on a T5 it ties the layers and "
        "has none for the encoder",
        ADAPTERS: "which PEFT does not have; write them for AdapterHub (save_adapterhub)",
        BIASES: "which PEFT has only where the model has biases",
        LABEL_ROWS: "a soft verbalizer, which PEFT does not have; use save_prompt",
    }
    raise UserError(f"The prompt has {part.kind}, {why[part.kind]}.")


def _each_layer(
    path: TreePath, *leaves: AnyArray
) -> Iterator[tuple[str, list[Float[np.ndarray, "..."]]]]:
    """The torch module of each layer, and its part of each array [L, ...]; or of no layer."""
    module, arrays = module_of(path), [np.asarray(leaf) for leaf in leaves]
    if "{}" not in module:
        yield module, arrays
        return
    for layer in range(len(arrays[0])):
        yield module.format(layer), [array[layer] for array in arrays]


def _lora(paths: Iterable[TreePath], layers: Layers, metadata: Mapping[str, object]) -> _Adapter:
    pairs = {path: change_at(layers, path).low_rank for path in paths}
    settings = _lora_settings(pairs, metadata)
    tensors: Tensors = {}
    for path, (a, b) in pairs.items():
        inputs = math.prod(a.shape[1:-1])
        for module, (first, second) in _each_layer(path, a, b):
            rank, scale = lora_rank_and_scale(settings, module)
            first = first.reshape(inputs, -1)[:, :rank]
            second = second.reshape(len(second), -1)[:rank]
            tensors[f"base_model.model.{module}.lora_A.weight"] = first.T
            tensors[f"base_model.model.{module}.lora_B.weight"] = divided(second, scale).T
    ranks = {len(a) for name, a in tensors.items() if name.endswith("lora_A.weight")}
    more: Settings = {
        "target_modules": _targets(paths), "bias": "none", "lora_dropout": _dropout(metadata),
        "use_dora": False,
    }  # fmt: skip
    return _Adapter("LORA", settings | more, tensors, f"LoRA of rank {max(ranks)}")


def _dropout(metadata: Mapping[str, object]) -> object:
    """The dropout that the changes were trained with; it matters to those who train on."""
    ours = record_of(record_of(metadata, "config"), "lora").get("dropout")
    theirs = record_of(metadata, "peft").get("lora_dropout")
    return ours or theirs or 0.0


def _dora(
    paths: Iterable[TreePath],
    layers: Layers,
    metadata: Mapping[str, object],
    backbone: Backbone | None,
) -> _Adapter:
    """LoRA, and the length of each column of the changed weights."""
    if backbone is None:
        raise UserError(
            "DoRA of PEFT stores the lengths of whole weights, and the prompt has the scales of "
            "their results; give save_peft the backbone."
        )
    adapter = _lora(paths, layers, metadata)
    for path in paths:
        lengths = lengths_in(change_at(layers, path), backbone.params, path)
        for module, (one,) in _each_layer(path, lengths):
            name = f"base_model.model.{module}.lora_magnitude_vector"
            adapter.tensors[name] = one.reshape(-1)
    rank = adapter.size.rpartition(" ")[2]
    return adapter._replace(
        settings=adapter.settings | {"use_dora": True}, size=f"DoRA of rank {rank}"
    )


def _lora_settings(pairs: Mapping[TreePath, LowRank], metadata: Mapping[str, object]) -> Settings:
    """Rank and alpha as they were set, if the factors are of that rank; else a scale of 1."""
    stored = max(pair.a.shape[-1] for pair in pairs.values())
    ours = record_of(record_of(metadata, "config"), "lora")
    theirs, hub = record_of(metadata, "peft"), record_of(metadata, "adapterhub")
    hub = record_of(hub, "config")
    none: Settings = {"r": stored, "lora_alpha": stored}
    if theirs.get("peft_type") == "LORA":
        chosen: Settings = {"r": theirs.get("r", 8), "lora_alpha": theirs.get("lora_alpha", 8)}
        for key in ("use_rslora", "rank_pattern", "alpha_pattern"):
            chosen[key] = theirs.get(key)
    elif "rank" in ours and "alpha" in ours:
        chosen = {"r": ours["rank"], "lora_alpha": ours["alpha"]}
        chosen["use_rslora"] = ours.get("rank_stabilized", False)
    elif "r" in hub and "alpha" in hub:
        chosen = {"r": hub["r"], "lora_alpha": hub["alpha"]}
    else:
        chosen = none
    if not all(_fits(path, pair, chosen) for path, pair in pairs.items()):
        chosen = none
    alpha = chosen["lora_alpha"]
    if isinstance(alpha, float) and alpha.is_integer():
        chosen["lora_alpha"] = int(alpha)
    return {
        **chosen,
        "use_rslora": bool(chosen.get("use_rslora")),
        "rank_pattern": chosen.get("rank_pattern") or {},
        "alpha_pattern": chosen.get("alpha_pattern") or {},
    }


def _fits(path: TreePath, pair: LowRank, settings: Mapping[str, object]) -> bool:
    """Whether the factors of each layer have the rank of the settings, and zeros beyond it."""
    for module, (a, b) in _each_layer(path, pair.a, pair.b):
        rank, _ = lora_rank_and_scale(settings, module)
        if rank > a.shape[-1] or np.any(a[..., rank:]) or np.any(b[rank:]):
            return False
    return True


def _ia3(paths: Iterable[TreePath], layers: Layers) -> _Adapter:
    """Scales of results [out, 1], and of what the last matrix of an MLP reads [1, in]."""
    tensors: Tensors = {}
    modules: dict[TreePath, TreePath] = {}
    for path in paths:
        is_input = path[-1] == "hidden"
        scale = change_at(layers, path) if is_input else change_at(layers, path).scale
        weight = (*path[:-1], "wo") if is_input else path
        if weight in modules:
            raise UserError(
                f"The prompt scales both what {'/'.join(weight)!r} reads and what it gives, and "
                "PEFT has one scale of a module; it stays an artefact of jaxprompt."
            )
        modules[weight] = path
        for module, (one,) in _each_layer(weight, 1 + scale):
            flat = one.reshape(1, -1) if is_input else one.reshape(-1, 1)
            tensors[f"base_model.model.{module}.ia3_l"] = flat
    inputs = [weight for weight, path in modules.items() if path[-1] == "hidden"]
    settings: Settings = {
        "target_modules": _targets(modules),
        "feedforward_modules": _targets(inputs),
    }
    return _Adapter("IA3", settings, tensors, "scales (IA3)")


def _norms(paths: Iterable[TreePath], layers: Layers, backbone: Backbone | None) -> _Adapter:
    if backbone is None:
        raise UserError(
            "PEFT stores the weights of norms as a whole, and the prompt has what was added to "
            "them; give save_peft the backbone."
        )
    tensors: Tensors = {}
    for path in paths:
        whole = _weight(backbone.params, path) + change_at(layers, path)
        for module, (one,) in _each_layer(path, whole):
            tensors[f"base_model.model.{module}.ln_tuning_layers.weight"] = one
    settings: Settings = {"target_modules": _targets(paths)}
    return _Adapter("LN_TUNING", settings, tensors, "weights of norms")


def _weight(params: Params, path: TreePath) -> Float[np.ndarray, "..."]:
    return np.asarray(leaf_at(params, path), np.float32)


def _prefix(layers: Layers) -> _Adapter:
    """Rows of 2 L keys and values, for each layer its keys and then its values."""
    prefix = layers["layers"]["attention"]["prefix"]
    if prefix.used is not None and not np.all(prefix.used):
        raise UserError("The prefix has places that are not used, which PEFT has no form for.")
    depth, length, heads, size = prefix.key.shape
    slots = np.stack([prefix.key, prefix.value], axis=1)  # [L, 2, P, G, H]
    table = slots.transpose(2, 0, 1, 3, 4).reshape(length, -1)
    settings: Settings = {
        "num_attention_heads": heads,
        "num_layers": depth,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "prefix_projection": False,
        "token_dim": heads * size,
    }
    return _Adapter("PREFIX_TUNING", settings, {PROMPT: table}, f"a prefix of {length} keys")


def _targets(paths: Iterable[TreePath]) -> list[str] | str:
    """``target_modules``: names, if all modules of these names are changed; else a pattern.

    A decoder-only model has one module of each name in a layer.
    """
    chosen = set(paths)
    names = {path: module_of(path).rpartition(".")[2] for path in chosen}
    others = {
        module_of(other).rpartition(".")[2]
        for path in chosen
        for other in paths_like(path)
        if other not in chosen
    }
    if not others & set(names.values()):
        return sorted(set(names.values()))
    wholes = (re.escape(module_of(path)).replace(r"\{\}", r"\d+") for path in chosen)
    return "|".join(sorted(wholes))
