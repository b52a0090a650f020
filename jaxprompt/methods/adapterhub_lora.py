"""LoRA and IA3 as AdapterHub (the library ``adapters``) has them: its settings and tensors.

It knows q, k and v of all attentions of a model, and two of the MLP's matrices, which its settings
call intermediate and output. Each is changed in every layer or in none.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxprompt.config.errors import UserError, listed
from jaxprompt.config.values import Values
from jaxprompt.methods.contents import IA3, LORA, Part, change_at
from jaxprompt.methods.tuned import record_of
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.models.checkpoints.torch_modules import Path, module_of, paths_like
from jaxprompt.models.injection import Layers

Tensors = dict[str, Float[np.ndarray, "..."]]
_ATTENTION = {"query": "q", "key": "k", "value": "v"}
# in the library's Llama they are the other way round
_MLP_OF_T5 = {"wi": "intermediate_lora", "wi_1": "intermediate_lora", "wo": "output_lora"}
_MLP_OF_LLAMA = {"wo": "intermediate_lora", "wi_1": "output_lora"}


class Written(NamedTuple):
    """The adapter's own settings, and its tensors."""

    settings: Values
    tensors: Tensors


def lora_or_ia3(
    part: Part,
    layers: Layers,
    name: str,
    metadata: Mapping[str, object],
    backbone: Backbone | None,
) -> Written:
    """The settings and tensors of LoRA or IA3.

    Args:
        part: what the changes are.
        name: of the adapter, which is in those of the tensors.
        backbone: only IA3 of an MLP's activations on a T5 needs it.

    Raises:
        UserError: the library has no form for what is changed.
    """
    if part.kind == LORA:
        return _lora(part.paths, layers, name, metadata)
    return _ia3(part.paths, layers, name, backbone)


def _settings(paths: list[Path], **own: object) -> Values:
    """What the library calls the changed weights. Raises UserError where it has no name."""
    llama = paths[0][0] == "layers"
    mlp = _MLP_OF_LLAMA if llama else _MLP_OF_T5
    names = {path[-1] for path in paths}
    unknown = sorted(names - {*_ATTENTION, *mlp})
    if unknown:
        raise UserError(
            f"The prompt changes {listed(unknown)}, and AdapterHub changes only "
            f"{listed([*_ATTENTION, *mlp])}; write it for PEFT (save_peft)."
        )
    lacking = [
        "/".join(other)
        for path in paths
        for other in paths_like(path)
        if other[-1] == path[-1] and other not in paths
    ]
    if lacking:
        raise UserError(
            f"The prompt does not change {listed(sorted(set(lacking)), 3)}, and AdapterHub changes "
            "all weights of a name or none; write it for PEFT (save_peft)."
        )
    chosen = {mlp[name] for name in names if name in mlp}
    attention = [letter for ours, letter in _ATTENTION.items() if ours in names]
    return {
        "architecture": "lora",
        "selfattn_lora": bool(attention),
        "intermediate_lora": "intermediate_lora" in chosen,
        "output_lora": "output_lora" in chosen,
        "attn_matrices": attention,
        "leave_out": [],
        "use_gating": False,
        **own,
    }  # type: ignore[return-value]


def _each_layer(path: Path, *leaves: np.ndarray) -> Iterator[tuple[str, list[np.ndarray]]]:
    for layer in range(len(leaves[0])):
        yield module_of(path).format(layer), [np.asarray(leaf)[layer] for leaf in leaves]


def _lora(
    paths: tuple[Path, ...], layers: Layers, name: str, metadata: Mapping[str, object]
) -> Written:
    """Factors of the largest rank; lower ones are filled up with zeros, which change nothing."""
    pairs = {path: change_at(layers, path).low_rank for path in paths}
    rank = max(pair.a.shape[-1] for pair in pairs.values())
    ours = record_of(record_of(metadata, "config"), "lora")
    hub = record_of(record_of(metadata, "adapterhub"), "config")
    alpha = float(rank)
    for known, rank_key in ((ours, "rank"), (hub, "r")):
        if known.get(rank_key) == rank and isinstance(known.get("alpha"), int | float):
            if not known.get("rank_stabilized"):
                alpha = float(known["alpha"])  # type: ignore[arg-type]
    scale, tensors = alpha / rank, {}
    for path, (a, b) in pairs.items():
        inputs = math.prod(a.shape[1:-1])
        for module, (first, second) in _each_layer(path, a, b):
            missing = rank - first.shape[-1]
            first = np.pad(first.reshape(inputs, -1), ((0, 0), (0, missing)))
            second = np.pad(second.reshape(len(second), -1), ((0, missing), (0, 0)))
            tensors[f"{module}.loras.{name}.lora_A"] = first.T
            tensors[f"{module}.loras.{name}.lora_B"] = divided(second, scale).T
    number = int(alpha) if alpha.is_integer() else alpha
    settings = _settings(
        list(paths), composition_mode="add", r=rank, alpha=number, init_weights="lora"
    )
    return Written(settings, tensors)


def divided(b: Float[np.ndarray, "r out"], scale: float) -> Float[np.ndarray, "r out"]:
    """The numbers whose products with the scale are ``b``, to the bit where there are such."""
    factor = np.float32(scale)
    numbers = b / factor
    for nearby in (np.nextafter(numbers, np.float32(limit)) for limit in (-np.inf, np.inf)):
        better = (factor * numbers != b) & (factor * nearby == b)
        numbers = np.where(better, nearby, numbers)
    return numbers


def _ia3(paths: tuple[Path, ...], layers: Layers, name: str, backbone: Backbone | None) -> Written:
    """Scales of results [out, 1]; those of an MLP's activations are of the matrix before them."""
    scales: dict[Path, np.ndarray] = {}
    for path in paths:
        if path[-1] != "hidden":
            scales[path] = np.asarray(change_at(layers, path).scale)
            continue
        change = np.asarray(change_at(layers, path))
        where = (*path[:-1], _before_the_activation(path, change, backbone))
        if where in paths:
            raise UserError(
                f"The prompt scales both what {'/'.join(where)!r} gives and the activations behind "
                "it, and AdapterHub has one scale of a matrix; keep it as an artefact of jaxprompt."
            )
        scales[where] = change
    tensors = {}
    for path, scale in scales.items():
        for module, (one,) in _each_layer(path, 1 + scale):
            tensors[f"{module}.loras.{name}.lora_B"] = one.reshape(-1, 1)
    settings = _settings(list(scales), composition_mode="scale", r=1, alpha=1, init_weights="ia3")
    return Written(settings, tensors)


def _before_the_activation(path: Path, scale: np.ndarray, backbone: Backbone | None) -> str:
    """The matrix whose scaled result gives the scaled activations."""
    if path[0] == "layers":
        return "wi_1"
    if backbone is None:
        raise UserError(
            "AdapterHub scales what the matrix before an MLP's activation gives, whose name the "
            "prompt does not know; give save_adapterhub the backbone."
        )
    if backbone.config.gated:
        return "wi_1"
    if backbone.config.activation != "relu" or np.any(scale < -1):
        raise UserError(
            f"The prompt scales activations ({'/'.join(path)}) by numbers below 0, and AdapterHub "
            "scales what comes before the activation, which is not the same; write it for PEFT."
        )
    return "wi"


KINDS = (LORA, IA3)
KEYS = {
    *("architecture", "selfattn_lora", "intermediate_lora", "output_lora", "attn_matrices"),
    *("leave_out", "use_gating", "composition_mode", "r", "alpha", "init_weights"),
}
