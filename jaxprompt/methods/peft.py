"""Adapters of PEFT, read. ``methods/peft_export.py`` writes them.

Formats: PEFT 0.21, and older ones, which have fewer keys. Virtual tokens need no backbone; what
changes layers becomes a tree of changes when the backbone is known (``peft_layers``).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.values import Values
from jaxprompt.data.batches import AnyArray
from jaxprompt.methods.adapter_file import (
    AdapterFile,
    Changes,
    check_all_read,
    check_complete,
    read_tensors,
)
from jaxprompt.methods.dora import of_lengths
from jaxprompt.methods.layers import PROJECTIONS
from jaxprompt.methods.tuned import (
    Metadata,
    Prompt,
    check_metadata,
    checked_vectors,
    read_object,
)
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.models.checkpoints.torch_modules import Path as TreePath
from jaxprompt.models.checkpoints.torch_modules import Place, decoder_attention
from jaxprompt.models.injection import Layers, Params, leaf_at
from jaxprompt.models.registry import one_sequence

PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"  # of PEFT before 0.7
PROMPT = "prompt_embeddings"

# what is tuned, by ``peft_type``
_VIRTUAL_TOKENS = {
    "PROMPT_TUNING": "prompt-tuning",
    "P_TUNING": "p-tuning",
    "MULTITASK_PROMPT_TUNING": "prompt-tuning",
}
_LAYERS = {
    "LORA": "lora",
    "IA3": "ia3",
    "LN_TUNING": "norm-tuning",
    "PREFIX_TUNING": "prefix-tuning",
}

# Keys that say nothing about what an adapter computes, or that are read below. Any other key must
# be null, false or empty: it is of something that this version does not know.
_KEYS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "jaxprompt", "peft_type"),
    *("peft_version", "revision", "task_type"),
    # which modules there are is known from the tensors
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    # LoRA
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout"),
    "use_dora",
    *("fan_in_fan_out", "init_lora_weights", "bias", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
    *("ensure_weight_tying", "merge_weights"),
    # IA3
    *("feedforward_modules", "init_ia3_weights"),
    # virtual tokens and prefixes
    *("num_virtual_tokens", "num_transformer_submodules", "token_dim", "num_attention_heads"),
    *("num_layers", "prefix_projection", "encoder_hidden_size", "init_weights"),
    *("encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "prompt_tuning_init_task"),
    *("prompt_tuning_init_state_dict_path", "tokenizer_name_or_path", "tokenizer_kwargs"),
    *("num_tasks", "num_ranks"),
}
# starts of LoRA that leave the frozen weights as they are; others move a part of them
_NEUTRAL_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_FOREIGN_TENSORS = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "LoRA of an embedding",
    "modules_to_save": "a module that was trained as a whole",
    ".bias": "a bias",
}


def read_peft(path: Path, task: int | None = None) -> Prompt:
    """The adapter in a folder.

    Args:
        task: the number of the task, of an adapter of multitask prompt tuning.

    Raises:
        UserError: it is damaged, or of a kind that cannot be represented.
    """
    config = read_object(path / PEFT_CONFIG)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in (_VIRTUAL_TOKENS | _LAYERS):
        raise UserError(
            f"The adapter {str(path)!r} is {shown(kind)}; this version reads "
            f"{listed(_VIRTUAL_TOKENS | _LAYERS)}."
        )
    _check_known(path, config)
    if task is not None and kind != "MULTITASK_PROMPT_TUNING":
        raise UserError(f"The adapter {str(path)!r} is {kind} and has no tasks; name no task.")
    metadata = check_metadata({"peft": config}, f"{path / PEFT_CONFIG}:")
    if isinstance(config.get("base_model_name_or_path"), str):
        metadata["backbone"] = {"source": config["base_model_name_or_path"]}
    file = AdapterFile("PEFT", str(path), config, read_tensors(path, (PEFT_TENSORS, PEFT_PICKLE)))
    if kind in _VIRTUAL_TOKENS:
        return _virtual_tokens(file, metadata, task)
    metadata["method"] = _LAYERS[kind]
    return Prompt(np.zeros((0, 0), np.float32), metadata, adapter_file=file)


def _check_known(path: Path, config: Values) -> None:
    """Refuse settings whose effect cannot be represented."""
    for key, value in config.items():
        if key not in _KEYS and value:
            raise UserError(
                f"The adapter {str(path)!r} has {key} {shown(value)}, which cannot be represented."
            )
    if config.get("bias", "none") != "none":
        raise UserError(
            f"The adapter {str(path)!r} has bias {shown(config['bias'])}: it trained biases, which "
            "cannot be represented; only 'none' is read."
        )
    start = config.get("init_lora_weights", True)
    if start not in _NEUTRAL_STARTS:
        raise UserError(
            f"The adapter {str(path)!r} has init_lora_weights {shown(start)}, which also changes "
            "the frozen weights; convert it to a plain LoRA with PEFT "
            "(path_initial_model_for_weight_conversion)."
        )


def _virtual_tokens(file: AdapterFile, metadata: Metadata, task: int | None) -> Prompt:
    config = file.config
    if PROMPT not in file.tensors:
        raise UserError(
            f"The adapter {file.path!r} holds {shown(sorted(file.tensors))} and no tensor "
            f"{PROMPT!r}."
        )
    rows = checked_vectors(np.asarray(file.tensors[PROMPT]), file.path)
    length = config.get("num_virtual_tokens")
    if type(length) is not int or not 0 < length <= len(rows):
        raise UserError(
            f"The config of {file.path!r} has num_virtual_tokens {shown(length)} and the adapter "
            f"holds {len(rows)} rows; save it again with PEFT."
        )
    used = {PROMPT}
    if config["peft_type"] == "MULTITASK_PROMPT_TUNING":
        rows = _of_task(file, rows, task)
        used |= {"prefix_task_cols", "prefix_task_rows"}
    check_all_read(file, used, _FOREIGN_TENSORS)
    # PEFT stores a second half of rows for T5 that it never uses: only the first n count
    return Prompt(rows[:length], metadata)


def _of_task(
    file: AdapterFile, rows: Float[np.ndarray, "P D"], task: int | None
) -> Float[np.ndarray, "P D"]:
    """The prompt of a task: the shared one times u v^T (Wang et al. 2023, arXiv 2303.02861)."""
    columns, task_rows = (file.tensors.get(f"prefix_task_{name}") for name in ("cols", "rows"))
    fits = (
        columns is not None
        and task_rows is not None
        and columns.ndim == task_rows.ndim == 3
        and columns.shape == (len(task_rows), len(rows), task_rows.shape[1])
        and task_rows.shape[2] == rows.shape[1]
    )
    if not fits or columns is None or task_rows is None:
        raise UserError(
            f"The adapter {file.path!r} has no prefix_task_cols and prefix_task_rows that fit its "
            "prompt; save it again with PEFT."
        )
    if file.config.get("num_transformer_submodules") == 2:
        raise UserError(
            f"The adapter {file.path!r} has num_transformer_submodules 2: PEFT trained a prompt of "
            "the decoder, too, and does not use it to generate; only 1 is read."
        )
    count = len(columns)
    if task is None and count > 1:
        raise UserError(
            f"The adapter {file.path!r} has prompts of {count} tasks; name one by its number, as "
            f"in '{file.path}#0'."
        )
    if task is not None and not 0 <= task < count:
        raise UserError(
            f"The adapter {file.path!r} has tasks 0 to {count - 1} and none of number {task}."
        )
    return rows * (columns[task or 0] @ task_rows[task or 0])


def peft_layers(file: AdapterFile, backbone: Backbone) -> Layers:
    """What an adapter changes in the layers of a backbone.

    Raises:
        UserError: it is of another backbone, is incomplete, or holds more than can be represented.
    """
    readers: dict[str, Callable[[AdapterFile, Backbone], Layers]] = {
        "LORA": _lora,
        "IA3": _ia3,
        "LN_TUNING": _norms,
        "PREFIX_TUNING": _prefix,
    }
    return readers[file.config["peft_type"]](file, backbone)


def _modules(file: AdapterFile, end: str) -> Iterator[tuple[str, str]]:
    """The modules that have a tensor with this end, and the beginnings of the tensors' names."""
    for name in file.tensors:
        match = re.fullmatch(rf"(base_model\.model\.(.+)\.){re.escape(end)}", name)
        if match:
            yield match[2], match[1]


def lora_rank_and_scale(config: Mapping[str, object], module: str) -> tuple[int, float]:
    """The rank of a module's factors, and what their product is multiplied by.

    Args:
        config: of PEFT's LoRA.
        module: of the torch model.
    """
    rank = _of_pattern(config, "rank_pattern", module, config.get("r", 8))
    alpha = _of_pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(
            f"The adapter's config has r {shown(rank)} and lora_alpha {shown(alpha)}; both must be "
            "numbers."
        )
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _of_pattern(config: Mapping[str, object], key: str, module: str, default: object) -> object:
    """PEFT's value for a module: of the first pattern that its name ends with."""
    patterns = config.get(key)
    if isinstance(patterns, Mapping):
        for pattern, value in patterns.items():
            if _matches(rf"(.*\.)?({pattern})$", module):
                return value
    return default


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise UserError(
            f"The adapter's config has {shown(pattern)}, which is no regular expression ({error})."
        ) from None


def _lora(file: AdapterFile, backbone: Backbone) -> Layers:
    changes, read = Changes(file, backbone), []
    lengths: dict[TreePath, dict[int | None, AnyArray]] = {}
    for module, start in _modules(file, "lora_A.weight"):
        a, b = f"{start}lora_A.weight", f"{start}lora_B.weight"
        rank, scale = lora_rank_and_scale(file.config, module)
        if changes.rows(a) != rank:
            raise UserError(
                f"The adapter {file.path!r} has {a!r} of rank {changes.rows(a)} and its config "
                f"says {rank}; the two do not belong together."
            )
        changes.low_rank(module, a, b, scale)
        read += [a, b]
        if file.config.get("use_dora"):
            place, name = changes.place(module), f"{start}lora_magnitude_vector"
            length = changes.fitting(name, (int(np.prod(place.outputs)),))
            lengths.setdefault(place.path, {})[place.layer] = length.reshape(place.outputs)
            read.append(name)
    is_place = lambda place: place.path[-1] in PROJECTIONS
    layers = _complete(changes, read, "lora_A.weight", is_place)
    for path, of_layers in lengths.items():
        _put_lengths(layers, path, of_layers, backbone.params)
    return layers


def _put_lengths(
    layers: Layers, path: TreePath, lengths: Mapping[int | None, AnyArray], params: Params
) -> None:
    """Give the low-rank change at a path the lengths of columns that DoRA has, by layer."""
    *modules, name = path
    inner = layers
    for module in modules:
        inner = inner[module]
    inner[name] = of_lengths(inner[name], lengths, params, path)


def _ia3(file: AdapterFile, backbone: Backbone) -> Layers:
    changes, read = Changes(file, backbone), []
    inputs = file.config.get("feedforward_modules") or []
    for module, start in _modules(file, "ia3_l"):
        name, place = f"{start}ia3_l", changes.place(module)
        read.append(name)
        if not _is_feedforward(inputs, module):
            scale = changes.fitting(name, (int(np.prod(place.outputs)), 1)) - 1
            changes.add((*place.path, "scale"), place.layer, scale.reshape(place.outputs))
        elif place.path[-1] == "wo":
            scale = changes.fitting(name, (1, *place.inputs))[0] - 1
            changes.add((*place.path[:-1], "hidden"), place.layer, scale)
        else:
            raise UserError(
                f"The adapter {file.path!r} scales what {module!r} reads, which cannot be "
                "represented; only that is read for the last matrix of an MLP."
            )
    return _complete(changes, read, "ia3_l", lambda place: place.path[-1] in PROJECTIONS)


def _is_feedforward(modules: object, module: str) -> bool:
    """Whether PEFT scales what a module reads; it compares the mere ends of names."""
    if isinstance(modules, list):
        return any(module.endswith(str(name)) for name in modules)
    return _is_target(modules, module)


def _norms(file: AdapterFile, backbone: Backbone) -> Layers:
    """PEFT stores new weights, and here the differences to the frozen ones are kept."""
    changes, read = Changes(file, backbone), []
    for module, start in _modules(file, "ln_tuning_layers.weight"):
        name, place = f"{start}ln_tuning_layers.weight", changes.place(module, weight=False)
        read.append(name)
        frozen = np.asarray(leaf_at(backbone.params, place.path), np.float32)
        frozen = frozen if place.layer is None else frozen[place.layer]
        changes.add(place.path, place.layer, changes.fitting(name, frozen.shape) - frozen)
    end = "ln_tuning_layers.weight"
    return _complete(changes, read, end, lambda place: place.path[-1] == "scale")


def _complete(
    changes: Changes, read: list[str], end: str, can_be: Callable[[Place], bool]
) -> Layers:
    """The tree, if the file has all that its config names, and nothing else.

    Args:
        read: names of the tensors that were read.
        end: of the name of one tensor of each module.
        can_be: whether this kind of adapter can change a place.
    """
    file, config = changes.file, changes.file.config
    check_all_read(file, read, _FOREIGN_TENSORS)
    if not changes.parts:
        raise UserError(f"The adapter {file.path!r} holds no tensors {end!r}; save it again.")
    targets = config.get("target_modules")
    some_layers = any(config.get(key) for key in ("exclude_modules", "layers_to_transform"))
    if targets and not some_layers:
        expected = [
            module
            for module, place in changes.places.items()
            if can_be(place) and _is_target(targets, module)
        ]
        check_complete(file, [module for module, _ in _modules(file, end)], expected)
    return changes.tree()


def _is_target(targets: object, module: str) -> bool:
    """Whether PEFT takes a module for one of its targets: names, or a regular expression."""
    if isinstance(targets, str):
        return targets == "all-linear" or _matches(rf"(?:{targets})\Z", module)
    if isinstance(targets, list):
        return any(module == name or module.endswith(f".{name}") for name in targets)
    return False


def _prefix(file: AdapterFile, backbone: Backbone) -> Layers:
    """Keys and values [P, 2 L, heads, H]; slot 2 l has the keys of layer l, 2 l + 1 its values.

    On T5 PEFT gives decoder layer l those of its layer 2 l mod L, and has no others: it puts the
    slots beside themselves and cuts them in four (get_prompt in peft_model.py), for self-attention
    and for cross-attention, whose part it drops.
    """
    config, c = file.config, backbone.config
    changes, stored = Changes(file, backbone), config.get("num_layers")
    layers, heads, where = decoder_attention(c)
    tied = not one_sequence(c)
    if not isinstance(stored, int) or not (stored == layers or tied and stored > layers):
        raise UserError(
            f"The adapter {file.path!r} has a prefix of {shown(stored)} layers and "
            f"{backbone.source} has {layers}; use the backbone that it was tuned on."
        )
    if tied and config.get("num_transformer_submodules", 2) != 2:
        raise UserError(
            f"The adapter {file.path!r} has num_transformer_submodules "
            f"{shown(config['num_transformer_submodules'])}: on a T5 PEFT then lets the prefix "
            "take the place of the encoder's output, which cannot be represented."
        )
    length = config.get("num_virtual_tokens")
    if type(length) is not int or length < 1 or config.get("num_attention_heads", heads) != heads:
        raise UserError(
            f"The adapter {file.path!r} has num_virtual_tokens {shown(length)} and "
            f"num_attention_heads {shown(config.get('num_attention_heads'))}, and "
            f"{backbone.source} has {heads} heads; use the backbone that it was tuned on."
        )
    table = changes.fitting(PROMPT, (length, 2 * stored * heads * c.head_dim))
    check_all_read(file, [PROMPT], _FOREIGN_TENSORS)
    slots = table.reshape(length, 2 * stored, heads, c.head_dim)
    for layer in range(layers):
        source = 2 * layer % stored if tied else layer
        changes.add((*where, "prefix", "key"), layer, slots[:, 2 * source])
        changes.add((*where, "prefix", "value"), layer, slots[:, 2 * source + 1])
    return changes.tree()
