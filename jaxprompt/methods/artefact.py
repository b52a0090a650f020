"""Prompts on disk: a directory with tensors, metadata and a model card. No pickle, ever.

``load_prompt`` also reads what others write: ``.npy`` prompts (such as those released with the
paper), adapters of PEFT (``methods/peft.py``) and of AdapterHub (``methods/adapterhub.py``).
"""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.paths import expanded, looked_in
from jaxprompt.methods.adapterhub import adapterhub_layers, read_adapterhub
from jaxprompt.methods.adapterhub_export import save_adapterhub
from jaxprompt.methods.contents import changes_in
from jaxprompt.methods.layers import from_tensors, to_tensors
from jaxprompt.methods.model_card import model_card
from jaxprompt.methods.peft import PEFT_CONFIG, peft_layers, read_peft
from jaxprompt.methods.peft_export import save_peft
from jaxprompt.methods.tuned import (
    Prompt,
    as_json,
    check_metadata,
    checked_prompt,
    checked_vectors,
    fitted_prompt,
    read_object,
    read_tensor,
    read_tensors,
)
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.models.registry import masked
from jaxprompt.runtime.files import replace_directory

__all__ = ["Prompt", "fitted", "load_prompt", "save_adapterhub", "save_peft", "save_prompt"]

# 1 holds vectors alone, 2 also changes of the layers
FORMATS = (1, 2)
TENSORS, METADATA, CARD = "prompt.safetensors", "prompt.json", "README.md"


def save_prompt(path: str | Path, prompt: Prompt) -> None:
    """Write the artefact: ``prompt.safetensors``, ``prompt.json`` and a model card.

    Raises:
        UserError: ``path`` holds anything but an artefact, the vectors are not finite numbers, or
            the metadata holds values that JSON cannot say.
    """
    vectors, metadata, layers = fitted_prompt(prompt)
    length, width = vectors.shape
    known: dict[str, object] = {**metadata, "length": length, "width": width}
    tensors = {"prompt": np.ascontiguousarray(vectors)} if length else {}
    known["format"] = 1
    if layers is not None:
        changes, settings = to_tensors(layers)
        tensors |= {name: np.ascontiguousarray(array) for name, array in changes.items()}
        known |= {"format": 2, "layers": settings, "changes": changes_in(layers)}
    text = as_json(known)

    def write(folder: Path) -> None:
        # bytes, so that a full disk is an OSError
        (folder / TENSORS).write_bytes(save(tensors))
        (folder / METADATA).write_bytes(text)
        # what has no UTF-8 form, half a surrogate, is shown as an escape
        (folder / CARD).write_bytes(
            model_card(json.loads(text)).encode("utf-8", "backslashreplace")
        )

    replace_directory(Path(expanded(path)), write, _is_artefact)


def _is_artefact(folder: Path) -> bool:
    """Whether ``save_prompt`` made a folder, as far as its own files tell."""
    names = {entry.name for entry in folder.iterdir()}
    try:
        metadata = read_object(folder / METADATA)
    except UserError:
        return TENSORS in names and names <= {TENSORS, METADATA, CARD}
    return type(metadata.get("format")) is int and (TENSORS in names or "width" in metadata)


def load_prompt(path: str | Path, backbone: Backbone | None = None) -> Prompt:
    """Read an artefact, an adapter of PEFT or AdapterHub, or an ``.npy`` file of shape [P, D].

    Args:
        path: a folder or a file. FOLDER#2 is the prompt of task 2 in an adapter of PEFT's
            multitask prompt tuning.
        backbone: that an adapter was tuned on. An adapter that changes layers can be used with a
            session without it, as a session has a backbone, and be saved only with it.

    Raises:
        UserError: nothing is there, it is damaged, or it cannot be represented.
    """
    prompt = _read(Path(expanded(path)))
    return prompt if backbone is None else fitted(prompt, backbone)


def fitted(prompt: Prompt, backbone: Backbone) -> Prompt:
    """The prompt with what another library's adapter changes in the layers of a backbone.

    Raises:
        UserError: the adapter is of another backbone, is incomplete, or cannot be represented.
    """
    file = prompt.adapter_file
    if file is None:
        return prompt
    if masked(backbone.config):
        raise UserError(
            f"The adapter of {file.library} changes layers, and such adapters are not read for "
            "encoders with a mask; use an artefact."
        )
    read = peft_layers if file.library == "PEFT" else adapterhub_layers
    layers = jax.tree.map(np.asarray, read(file, backbone))
    nothing = np.zeros((0, backbone.config.d_model), np.float32)
    return Prompt(nothing, prompt.metadata, layers)


def _read(path: Path) -> Prompt:
    task = None
    if not path.exists():
        folder, _, number = str(path).rpartition("#")
        if folder and number.isdecimal() and Path(folder).is_dir():
            path, task = Path(folder), int(number)
    if not path.exists():
        raise UserError(
            f"There is no prompt at {shown(str(path))}{looked_in(path)}; give an artefact, adapter "
            "or .npy."
        )
    if path.is_dir() and (path / METADATA).is_file():
        return _read_artefact(path)
    if path.is_dir() and (path / PEFT_CONFIG).is_file():
        if "config" in read_object(path / PEFT_CONFIG):
            return read_adapterhub(path)
        return read_peft(path, task)
    if path.is_file():
        return Prompt(checked_vectors(_read_npy(path), path), {})
    inner = path / "prompt"  # of a run
    hint = f"; did you mean {str(inner)!r}?" if (inner / METADATA).is_file() else "."
    raise UserError(
        f"{str(path)!r} holds neither {METADATA} nor {PEFT_CONFIG}; it is not a prompt{hint}"
    )


def _read_artefact(path: Path) -> Prompt:
    values = read_object(path / METADATA)
    if values.get("format") not in FORMATS:
        raise UserError(
            f"{path / METADATA} has format {shown(values.get('format'))} and this version reads "
            f"{listed(FORMATS)}."
        )
    metadata = check_metadata(values, f"{path / METADATA} is damaged:")
    layers = None
    if values["format"] == 1:
        vectors = checked_vectors(read_tensor(path / TENSORS, "prompt"), path)
    else:
        tensors = read_tensors(path / TENSORS)
        nothing = np.zeros((0, metadata.get("width", 0)), np.float32)
        vectors = checked_vectors(tensors.pop("prompt", nothing), path, True)
        layers = from_tensors(tensors, metadata.get("layers"))
    for key, size in zip(("length", "width"), vectors.shape, strict=True):
        if metadata.get(key, size) != size:
            raise UserError(
                f"{path / METADATA} says {key} {values[key]} and {TENSORS} has {size}; the two "
                "files do not belong together."
            )
    return checked_prompt(Prompt(vectors, metadata, layers))


def _read_npy(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise UserError(
                f"{str(path)!r} is not an .npy file; give an artefact, adapter or .npy."
            )
    try:
        # mapped, so that a header that promises terabytes is an error and not an allocation
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a broken header raises whatever NumPy's parser happens to meet
        problem = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as an array of numbers: {problem}.") from None
