"""Which prompt of a library may help another task: the most similar one.

SPoT (Vu et al. 2021, arXiv 2110.07904, section 3): tune a prompt on the new task for a few steps,
find the prompt of another task that is most similar to it, and tune again from that one
(``prompt.init: nearest``).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.paths import expanded, looked_in
from jaxprompt.methods.artefact import METADATA, load_prompt
from jaxprompt.methods.peft import PEFT_CONFIG
from jaxprompt.methods.tuned import Prompt, record_of


class Similar(NamedTuple):
    """A prompt of a library, and how similar it is to the one in question; 1 at most."""

    prompt: str  # its path
    task: str | None  # that it was tuned on
    cosine: float  # of the two means over tokens
    per_token: float  # mean cosine of a vector of one prompt and a vector of the other


class Ranking(NamedTuple):
    """The prompts of a library, the most similar one first."""

    similar: list[Similar]
    left_out: dict[str, str]  # the path of a prompt that cannot be compared -> why


def similar_prompts(path: str | Path, library: str | Path, any_backbone: bool = False) -> Ranking:
    """How similar the prompts of a library are to a prompt, by the cosine of their means.

    Args:
        path: the prompt in question, which is left out where it is in the library.
        library: a folder with artefacts, PEFT adapters and .npy files, at any depth: a folder of
            runs, too.
        any_backbone: compare prompts of other backbones with vectors of the same width, too.

    Raises:
        UserError: the prompt cannot be read or has no vectors, or no other can be compared with it.
    """
    path, library = Path(expanded(path)), Path(expanded(library))
    prompt = load_prompt(path)
    if not len(prompt.vectors):
        raise UserError(
            f"{shown(str(path))} has no virtual tokens (its method is "
            f"{shown(prompt.metadata.get('method'))}); give a prompt that has some."
        )
    if not library.is_dir():
        raise UserError(
            f"There is no folder {shown(str(library))}{looked_in(library)}; give one with prompts."
        )
    similar, left_out = [], {}
    for other in prompts_in(library):
        if other.resolve() == path.resolve():
            continue
        try:
            loaded = load_prompt(other)
        except UserError as error:
            left_out[str(other)] = str(error)
            continue
        reason = _not_comparable(prompt, loaded, any_backbone)
        if reason is not None:
            left_out[str(other)] = reason
            continue
        task = record_of(loaded.metadata, "task").get("name")
        cosines = _cosines(prompt.vectors, loaded.vectors)
        similar.append(Similar(str(other), None if task is None else str(task), *cosines))
    if not similar:
        raise UserError(_nothing_to_compare(library, left_out))
    return Ranking(sorted(similar, key=lambda one: (-one.cosine, one.prompt)), left_out)


def prompts_in(library: Path) -> list[Path]:
    """The artefacts, PEFT adapters and .npy files in a folder, at any depth, by path."""
    folders = {file.parent for name in (METADATA, PEFT_CONFIG) for file in library.rglob(name)}
    return sorted({*folders, *library.rglob("*.npy")})


def _nothing_to_compare(library: Path, left_out: dict[str, str]) -> str:
    if not left_out:
        return (
            f"{shown(str(library))} holds no other prompt; give a folder with artefacts, PEFT "
            "adapters or .npy files."
        )
    other, reason = next(iter(left_out.items()))
    return (
        f"None of the {len(left_out)} prompts in {shown(str(library))} can be compared; the first "
        f"is {shown(other)}: {reason.rstrip('.')}."
    )


def _not_comparable(one: Prompt, other: Prompt, any_backbone: bool) -> str | None:
    """Why the vectors of two prompts cannot be compared; None where they can."""
    if not len(other.vectors):
        return f"its method, {shown(other.metadata.get('method'))}, has no virtual tokens"
    width, needed = other.vectors.shape[1], one.vectors.shape[1]
    if width != needed:
        return f"its vectors have {width} numbers, and {needed} are needed"
    prints = [_fingerprints(prompt) for prompt in (one, other)]
    if not any_backbone and all(prints) and not prints[0] & prints[1]:
        source = record_of(other.metadata, "backbone").get("source")
        return f"it was tuned on another backbone, {shown(source)}"
    return None


def _fingerprints(prompt: Prompt) -> set[object]:
    """The fingerprint of the prompt's backbone, and of its copy in float16, as far as known."""
    backbone = record_of(prompt.metadata, "backbone")
    return {backbone.get("fingerprint"), backbone.get("fingerprint_float16")} - {None, ""}


def _cosines(one: Float[np.ndarray, "P D"], other: Float[np.ndarray, "Q D"]) -> tuple[float, float]:
    """The two measures of SPoT: the cosine of mean vectors, and the mean cosine of vectors."""
    pair = [np.asarray(vectors, np.float64) for vectors in (one, other)]
    means = [_unit(vectors.mean(axis=0)) for vectors in pair]
    tokens = [_unit(vectors).mean(axis=0) for vectors in pair]
    return float(means[0] @ means[1]), float(tokens[0] @ tokens[1])


def _unit(vectors: Float[np.ndarray, "*n D"]) -> Float[np.ndarray, "*n D"]:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(norms, np.finfo(np.float64).tiny)
