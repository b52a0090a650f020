"""A tuned prompt in memory: float32 vectors, and the metadata that its artefact records."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypedDict, cast, get_origin, get_type_hints, is_typeddict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.values import Values
from jaxprompt.methods.adapter_file import AdapterFile
from jaxprompt.methods.layers import from_tensors, to_tensors
from jaxprompt.models.injection import Injection, Layers
from jaxprompt.runtime.json_file import read_json


class BackboneRecord(TypedDict, total=False):
    """What a prompt records of the model that it was tuned on."""

    source: str  # as the user named it
    fingerprint: str
    fingerprint_float16: str  # of a copy of the model in float16
    tokenizer: str
    family: str  # "decoder-only", "encoder" or "encoder-decoder"; the last may be absent
    d_model: int
    vocab_size: int
    num_layers: int
    num_heads: int


class TaskRecord(TypedDict, total=False):
    """The keys of a task that are read before it is validated; it has all of ``TaskConfig``."""

    name: str
    template: str


class PeftRecord(TypedDict, total=False):
    """The key of an adapter's config that is read; it has all that PEFT wrote."""

    task_type: str


class Metadata(TypedDict, total=False):
    """What is known about a prompt; files of others have little of it. Other keys are kept, too."""

    format: int
    length: int  # vectors; 0 for a method without any
    layers: dict[str, Values]  # settings of adapters, by their path in the tree
    changes: list[Values]  # of layers, see ``methods.contents.ChangeReport``
    width: int  # of a vector
    method: str
    backbone: BackboneRecord
    task: TaskRecord
    peft: PeftRecord
    adapterhub: Values  # the adapter's config
    rows: int  # validation rows
    step: int  # of the best checkpoint
    seed: int
    metrics: dict[str, float]  # on validation rows
    test: dict[str, float]  # metrics on test rows
    baselines: dict[str, float]  # "majority" and "untuned", of the first metric
    config: Values  # the run's settings
    versions: dict[str, str]
    words: Values  # of a search: text, ids, and whether the text survives reading


class Prompt(NamedTuple):
    """What was tuned: float32 vectors, changes of the layers, and what is known about it.

    Little is known of files of others. A method without virtual tokens has no vectors: P is 0.
    """

    vectors: Float[np.ndarray, "P D"]
    metadata: Metadata
    # arrays [L, ...] of one member, see ``jaxprompt.models.injection.Layers``
    layers: Layers | None = None
    # changes of layers that another library wrote; they become ``layers`` when the backbone is
    # known (``jaxprompt.methods.artefact.fitted``)
    adapter_file: AdapterFile | None = None

    @property
    def injection(self) -> Injection:
        """It as an injection of one member. Raises UserError where its backbone must be known."""
        check_fitted(self)
        bank = jnp.asarray(self.vectors)[None] if len(self.vectors) else None
        return Injection(bank, jax.tree.map(lambda x: jnp.asarray(x)[None], self.layers))

    @property
    def facts(self) -> Metadata:
        """The old name of ``metadata``."""
        note = "Prompt.facts is now Prompt.metadata; rename it"
        warnings.warn(note, DeprecationWarning, stacklevel=2)
        return self.metadata


def checked_prompt(prompt: Prompt) -> Prompt:
    """A prompt that Python made, checked as one that is read. Raises UserError."""
    if not isinstance(prompt, Prompt):
        raise UserError(f"A prompt is {shown(prompt)}; give a path, or Prompt(vectors, metadata).")
    changed = prompt.layers is not None or prompt.adapter_file is not None
    vectors = checked_vectors(np.asarray(prompt.vectors), "The prompt", changed)
    metadata = check_metadata(prompt.metadata, "The prompt's metadata:")
    return Prompt(vectors, metadata, _checked_layers(prompt.layers), prompt.adapter_file)


def fitted_prompt(
    prompt: Prompt,
) -> tuple[Float[np.ndarray, "P D"], Metadata, Layers | None]:
    """Vectors, metadata and changes of ``checked_prompt``, whose backbone must be known.

    Raises:
        UserError: it is no prompt, or no backbone has been given for its changes of layers yet.
    """
    vectors, metadata, layers, _ = checked_prompt(prompt)
    check_fitted(prompt)
    return vectors, metadata, layers


def check_fitted(prompt: Prompt) -> None:
    """Refuse changes of layers that no backbone has been given for yet."""
    if prompt.adapter_file is not None:
        raise UserError(
            f"The adapter {prompt.adapter_file.path!r} says nothing of the heads of its backbone; "
            "name the backbone (--backbone, or load_prompt(path, backbone))."
        )


def _checked_layers(layers: Layers | None) -> Layers | None:
    """Changes as NumPy arrays. Raises UserError where a number is not finite."""
    if layers is None:
        return None
    tensors, settings = to_tensors(jax.tree.map(np.asarray, layers))
    for name, tensor in tensors.items():
        check_finite(np.asarray(tensor), f"The tensor {name!r}")
    return from_tensors(tensors, settings)


def check_finite(tensor: np.ndarray, where: str) -> None:
    """Raise a UserError unless all numbers are finite, or truth values."""
    if tensor.dtype.kind not in "fb" and tensor.dtype.name != "bfloat16":
        raise UserError(f"{where} holds {str(tensor.dtype)[:80]}; it must be of float numbers.")
    if tensor.dtype.kind != "b" and not np.isfinite(np.asarray(tensor, np.float32)).all():
        raise UserError(f"{where} holds values that are not finite; it is unusable.")


def as_json(metadata: Mapping[str, object]) -> bytes:
    """JSON in UTF-8. Half a surrogate becomes an escape, and is read back as it was."""

    def convert(value: object) -> object:
        if isinstance(value, np.generic | np.ndarray):
            return value.tolist()
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        raise TypeError(f"a {type(value).__name__} is not JSON")

    def dump(values: object) -> str:
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False, default=convert)

    for key, value in metadata.items():
        try:
            dump({key: value})
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise UserError(
                f"The prompt's {str(key)[:100]!r} is {shown(value)}, which JSON cannot hold "
                f"({str(error)[:100]}); leave it out of the metadata, or make it numbers and text."
            ) from None
    return (dump(metadata) + "\n").encode("utf-8", "backslashreplace")


def record_of(metadata: Mapping[str, object], key: str) -> Mapping[str, object]:
    """The record (``backbone``, ``task`` and the like) under a key; empty where there is none."""
    record = metadata.get(key)
    return record if isinstance(record, Mapping) else {}


def decoder_only(metadata: Mapping[str, object]) -> bool:
    """Whether the prompt was tuned on a decoder-only model, as far as is known."""
    recorded = record_of(metadata, "backbone").get("family")
    kind = record_of(metadata, "peft").get("task_type")
    return recorded == "decoder-only" or kind == "CAUSAL_LM"


def of_encoder(metadata: Mapping[str, object]) -> bool:
    """Whether the prompt was tuned on an encoder with a mask, as far as is known."""
    return record_of(metadata, "backbone").get("family") == "encoder"


def refuse_encoder(metadata: Mapping[str, object], library: str) -> None:
    """Raise UserError for what was tuned on an encoder with a mask, which is not exported."""
    if of_encoder(metadata):
        raise UserError(
            f"The prompt was tuned on an encoder with a mask, for which nothing is written for "
            f"{library}; use save_prompt."
        )


def _kinds(record: type, prefix: str = "") -> dict[str, type]:
    """The type of each key that is known, nested ones by dotted key."""
    kinds: dict[str, type] = {}
    for name, hint in get_type_hints(record).items():
        kinds[prefix + name] = dict if is_typeddict(hint) else get_origin(hint) or hint
        if is_typeddict(hint):
            kinds |= _kinds(hint, f"{prefix}{name}.")
    return kinds


_KINDS = _kinds(Metadata)
_NAMES = {dict: "object", list: "list", str: "text", int: "whole number"}


def check_metadata(values: object, where: str) -> Metadata:
    """The metadata of a prompt without those that are null; other keys may be anything.

    Args:
        where: How an error begins.

    Raises:
        UserError: ``values`` is not a mapping, or a known key has a value of another type.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} {shown(values)} is no object; give a mapping.")
    kept = {key: value for key, value in values.items() if value is not None}
    for key, kind in _KINDS.items():
        outer, _, inner = key.partition(".")
        value = kept.get(outer)
        if inner:
            value = value.get(inner) if isinstance(value, dict) else None
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UserError(f"{where} {key!r} is {shown(value)}, no {_NAMES[kind]}.")
    return cast(Metadata, kept)


def read_object(path: Path) -> Values:
    """The JSON object in a file. Raises UserError, which names the file."""
    try:
        return read_json(path)
    except UserError as error:
        raise UserError(f"{error}.") from None


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file. Raises UserError, which names the file."""
    try:
        return load_file(path)
    except Exception as error:  # the library's own, or NumPy's for a type or rank it does not know
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} is damaged or missing: {problem[:200]}.") from None


def read_tensor(path: Path, name: str) -> np.ndarray:
    tensors = read_tensors(path)
    if name not in tensors:
        raise UserError(f"{path} holds {shown(sorted(tensors))} and no tensor {name!r}.")
    return tensors[name]


def checked_vectors(
    vectors: np.ndarray, path: Path | str, may_be_none: bool = False
) -> Float[np.ndarray, "P D"]:
    number = vectors.dtype.kind == "f" or vectors.dtype.name == "bfloat16"  # of ml_dtypes
    if may_be_none and vectors.ndim == 2 and number and len(vectors) == 0:
        return np.zeros(vectors.shape, np.float32)
    if vectors.ndim != 2 or not number or 0 in vectors.shape:
        raise UserError(
            f"{path} holds {str(vectors.dtype)[:80]} of shape {list(vectors.shape)}; "
            "a prompt is a float array [P, D]."
        )
    with np.errstate(over="ignore"):  # of float64; found by the next line
        vectors = np.array(vectors, np.float32)
    if not np.isfinite(vectors).all():
        raise UserError(f"{path} holds values that are not finite; the prompt is unusable.")
    return vectors
