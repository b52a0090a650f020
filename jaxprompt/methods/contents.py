"""What a tuned thing holds: which changes of which weights, of which rank, and how many numbers."""

import math
from collections.abc import Mapping
from typing import NamedTuple, TypedDict

import numpy as np
from jaxtyping import PyTree

from jaxprompt.methods.layers import PROJECTIONS, to_tensors
from jaxprompt.models.injection import VERBALIZER, Layers, leaf_at

Path = tuple[str, ...]  # in the tree of changes
# kinds of changes, as a person calls them
LORA, DORA, IA3, BIASES, NORMS, PREFIXES, ADAPTERS, LABEL_ROWS = (
    *("LoRA", "DoRA", "IA3", "biases", "norms", "prefixes", "adapters", "label rows"),
)


def change_at(layers: Layers, path: Path) -> PyTree:
    """The change at a path that ``parts_in`` gave."""
    change = leaf_at(layers, path)
    assert change is not None
    return change


class Part(NamedTuple):
    """All changes of one kind."""

    kind: str
    targets: tuple[str, ...]  # what is changed, by its name in the parameter tree
    size: int | None  # rank, length or width; None for scales and biases
    numbers: int  # that were trained, as far as the tensors tell
    paths: tuple[Path, ...]  # of the changes


class ChangeReport(TypedDict):
    """A ``Part``, JSON-ready."""

    kind: str
    targets: list[str]
    size: int | None
    numbers: int


def changes_in(layers: Layers | None) -> list[ChangeReport]:
    """What is changed, for people and for metadata."""
    return [
        {
            "kind": part.kind,
            "targets": list(part.targets),
            "size": part.size,
            "numbers": part.numbers,
        }
        for part in parts_in(layers)
    ]


def parts_in(layers: Layers | None) -> list[Part]:
    """The changes by their kind, in a fixed order."""
    tensors = {} if layers is None else to_tensors(layers)[0]
    kinds: dict[str, dict[Path, dict[str, tuple[int, ...]]]] = {}
    for name, tensor in tensors.items():
        kind, path, field = _kind_of(tuple(name.split("/")))
        kinds.setdefault(kind, {}).setdefault(path, {})[field] = np.shape(tensor)
    low_rank = kinds.get(LORA, {})
    if low_rank and low_rank.keys() == kinds.get(IA3, {}).keys():
        # a low-rank change and a scale of each result: a length of each column
        beside = kinds.pop(BIASES, {}) if {*kinds.get(BIASES, {})} <= {*low_rank} else {}
        scales = kinds.pop(IA3)
        del kinds[LORA]
        kinds[DORA] = {
            path: fields | scales[path] | beside.get(path, {}) for path, fields in low_rank.items()
        }
    order = (LORA, DORA, IA3, BIASES, NORMS, PREFIXES, ADAPTERS, LABEL_ROWS)
    return [_part(kind, kinds[kind]) for kind in order if kind in kinds]


def _kind_of(path: Path) -> tuple[str, Path, str]:
    """The kind of change that a tensor belongs to, the change's path, and what the tensor is."""
    *outer, field = path
    if outer == [VERBALIZER]:
        return LABEL_ROWS, tuple(outer), field
    if outer[-1] == "low_rank":
        return LORA, tuple(outer[:-1]), field
    if outer[-1] == "prefix":
        return PREFIXES, tuple(outer), field
    if outer[-1].endswith("_adapter"):
        return ADAPTERS, tuple(outer), field
    if outer[-1] in PROJECTIONS:
        return (IA3 if field == "scale" else BIASES), tuple(outer), field
    return (IA3 if field == "hidden" else NORMS), path, field


def _part(kind: str, changes: Mapping[Path, Mapping[str, tuple[int, ...]]]) -> Part:
    fields = [shapes for shapes in changes.values()]
    size = None
    if kind in (LORA, DORA):
        size = max(shapes["a"][-1] for shapes in fields)
    elif kind == PREFIXES:
        size = max(shapes["key"][-3] for shapes in fields)
    elif kind == ADAPTERS:
        size = max(shapes["down"][-1] for shapes in fields)
    elif kind == LABEL_ROWS:
        size = max(shapes["rows"][-2] for shapes in fields)
    names = {_target(path) for path in changes}
    untrained = ("used", "bias") if kind == DORA else ("used",)  # its bias undoes a scale
    numbers = sum(
        math.prod(shape)
        for shapes in fields
        for field, shape in shapes.items()
        if field not in untrained
    )
    return Part(kind, tuple(sorted(names)), size, numbers, tuple(changes))


def _target(path: Path) -> str:
    """What a change is of, such as "encoder query" or "mlp norm"."""
    *modules, name = [name for name in path if name != "layers"]
    if name in ("scale", "prefix"):  # of a norm, of an attention
        *modules, name = modules
    if name == "attention" or name.endswith(("_norm", "_adapter", "_attention")):
        return " ".join([*modules, name]).replace("_", " ")
    outer = [part for part in modules if part in ("encoder", "decoder")]
    cross = ["cross"] if "cross_attention" in modules else []
    return " ".join([*outer, *cross, name])
