"""Bottlenecks, LoRA and IA3, written as AdapterHub (the library ``adapters``) loads them."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save

from jaxprompt.config.errors import UserError, listed
from jaxprompt.config.paths import expanded
from jaxprompt.config.values import Values
from jaxprompt.methods.adapterhub import CONFIG, PARTS, TENSORS, adapter_path, module_with
from jaxprompt.methods.adapterhub_lora import KEYS, Written, lora_or_ia3
from jaxprompt.methods.contents import ADAPTERS, IA3, LORA, change_at, parts_in
from jaxprompt.methods.layers import to_tensors
from jaxprompt.methods.model_card import adapterhub_card
from jaxprompt.methods.tuned import (
    Prompt,
    as_json,
    fitted_prompt,
    read_object,
    record_of,
    refuse_encoder,
)
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.models.checkpoints.torch_modules import sublayers
from jaxprompt.models.injection import Adapter, Layers
from jaxprompt.runtime.files import replace_directory

CARD = "README.md"
VERSION = "adapters.1.3.0"  # of the format
# our names of activations -> those that AdapterHub knows
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_new", "gelu_exact": "gelu", "silu": "swish"}


def save_adapterhub(
    path: str | Path,
    prompt: Prompt,
    *,
    name: str | None = None,
    base_model: str | None = None,
    backbone: Backbone | None = None,
) -> None:
    """Write an adapter that ``model.load_adapter(path, use_safetensors=True)`` of AdapterHub loads.

    Args:
        prompt: of bottleneck adapters (``seq_bn``, ``double_seq_bn`` or ``par_bn`` there), of LoRA
            or of IA3.
        name: of the adapter in the model; by default the task's.
        base_model: where the backbone is; by default where it was in training.
        backbone: that the prompt was tuned on; only IA3 of a T5 needs it.

    Raises:
        UserError: ``path`` holds anything but an adapter that was written here, the prompt has
            several kinds of changes, or AdapterHub has none of its kind.
    """
    vectors, metadata, layers = fitted_prompt(prompt)
    refuse_encoder(metadata, "AdapterHub")
    kinds = [part.kind for part in parts_in(layers)]
    if len(vectors) or kinds not in ([ADAPTERS], [LORA], [IA3]) or layers is None:
        every = ["virtual tokens"] * bool(len(vectors)) + kinds
        raise UserError(
            f"The prompt has {listed(every)}, and only bottleneck adapters, LoRA or IA3 alone are "
            "written for AdapterHub; use save_peft or save_prompt."
        )
    (part,), name = parts_in(layers), _name(metadata, name)
    source = base_model or record_of(metadata, "backbone").get("source")
    if part.kind == ADAPTERS:
        adapters = {path: change_at(layers, path) for path in part.paths}
        written = Written(_settings(adapters), _tensors(adapters, name))
    else:
        written = lora_or_ia3(part, layers, name, metadata, backbone)
    width = _model_width(layers, metadata)
    config = _config(written.settings, name, source, "layers" in layers, width)
    tensors = {key: np.ascontiguousarray(value) for key, value in written.tensors.items()}
    text = as_json(config)
    card = adapterhub_card(metadata, config).encode("utf-8", "backslashreplace")

    def write(folder: Path) -> None:
        (folder / TENSORS).write_bytes(save(tensors, metadata={"format": "pt"}))
        (folder / CONFIG).write_bytes(text)
        (folder / CARD).write_bytes(card)

    replace_directory(Path(expanded(path)), write, _is_ours)


def _is_ours(folder: Path) -> bool:
    """Whether ``save_adapterhub`` made a folder: the library itself writes more settings."""
    try:
        config = read_object(folder / CONFIG)
    except UserError:
        return False
    return set(config) == _KEYS and set(record_of(config, "config")) in (_SETTINGS, KEYS)


_KEYS = {"model_type", "hidden_size", "model_name", "name", "model_class", "config", "version"}
_SETTINGS = {
    *("mh_adapter", "cross_adapter", "output_adapter", "reduction_factor", "non_linearity"),
    *("original_ln_before", "original_ln_after", "is_parallel", "scaling", "leave_out"),
}


def _name(metadata: Mapping[str, object], name: str | None) -> str:
    """A name without points, which part the names of tensors."""
    chosen = name or str(record_of(metadata, "task").get("name") or "task")
    return re.sub(r"[^\w-]+", "_", chosen)


def _model_width(layers: Layers, metadata: Mapping[str, object]) -> object:
    """d_model, as far as it is known."""
    for name, tensor in to_tensors(layers)[0].items():
        if name.endswith(("_adapter/down", "query/low_rank/a", "value/low_rank/a")):
            return tensor.shape[1]
    return record_of(metadata, "backbone").get("d_model")


def _config(
    settings: Values, name: str, source: object, decoder_only: bool, width: object
) -> Values:
    return {
        "model_type": "llama" if decoder_only else "t5",
        "hidden_size": width,
        "model_name": source,
        "name": name,
        "model_class": "LlamaForCausalLM" if decoder_only else "T5ForConditionalGeneration",
        "config": settings,
        "version": VERSION,
    }


def _settings(adapters: Mapping[tuple[str, ...], Adapter]) -> Values:
    first = next(iter(adapters.values()))
    reads = {adapter.reads for adapter in adapters.values()}
    if reads == {"normed"}:
        raise UserError(
            "The adapters read the residual stream behind the norm (adapter.reads: normed), and "
            "those of AdapterHub read it as it is; tune with adapter.reads: input."
        )
    width = first.down.shape[-2]
    kinds = {path[-1] for path in adapters}
    decoder_only = any(path[0] == "layers" for path in adapters)
    for kind in kinds:
        stacks = {path[0] for path in adapters if path[-1] == kind}
        if not decoder_only and kind != "cross_attention_adapter" and len(stacks) < 2:
            raise UserError(
                f"Only the {listed(stacks)} has {kind.replace('_', ' ')}s, and AdapterHub puts "
                "them into both stacks; keep it as an artefact of jaxprompt (save_prompt)."
            )
    if len(reads) > 1:
        raise UserError(
            f"The adapters read {listed(sorted(reads))}, and those of AdapterHub all read the same "
            "thing; keep them as an artefact of jaxprompt (save_prompt)."
        )
    return {
        "mh_adapter": "attention_adapter" in kinds,
        "cross_adapter": "cross_attention_adapter" in kinds,
        "output_adapter": "mlp_adapter" in kinds,
        "reduction_factor": _reduction(width, _widest(adapters)),
        "non_linearity": _ACTIVATIONS[first.activation],
        "original_ln_before": reads == {"sum"},
        "original_ln_after": True,
        "is_parallel": reads == {"input"},
        "scaling": float(first.scale),
        "leave_out": [],
    }


def _reduction(width: int, hidden: int) -> int | float:
    """The number that the width is divided by, and rounded down, for the size of a bottleneck."""
    return width // hidden if width % hidden == 0 else width / (hidden + 0.5)


def _widest(adapters: Mapping[tuple[str, ...], Adapter]) -> int:
    """The width of the widest bottleneck. Narrower ones get zeros, which change nothing."""
    return max(adapter.down.shape[-1] for adapter in adapters.values())


def _tensors(
    adapters: Mapping[tuple[str, ...], Adapter], name: str
) -> dict[str, Float[np.ndarray, "..."]]:
    depths = {path[0]: len(adapter.down) for path, adapter in adapters.items()}
    widest, tensors = _widest(adapters), {}
    for sublayer in sublayers(depths):
        adapter = adapters.get(adapter_path(sublayer.stack, sublayer.kind))
        if adapter is None:
            continue
        more = (0, widest - adapter.down.shape[-1])
        arrays = (
            np.pad(adapter.down[sublayer.layer], ((0, 0), more)),
            np.pad(adapter.down_bias[sublayer.layer], more),
            np.pad(adapter.up[sublayer.layer], (more, (0, 0))),
            adapter.up_bias[sublayer.layer],
        )
        for part, array in zip(PARTS, arrays, strict=True):
            key = f"{module_with(sublayer)}.adapters.{name}.{part}"
            tensors[key] = np.ascontiguousarray(np.asarray(array, np.float32).T)
    return tensors
