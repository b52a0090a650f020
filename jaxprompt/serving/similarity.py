"""How alike prompts are, by their vectors alone."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np


class SimilarityMap(TypedDict):
    """Prompts against prompts, in the order of ``names``."""

    names: list[str]
    cosine: list[list[float]]  # of mean vectors
    best_match: list[list[float]]  # the mean over a prompt's vectors of the nearest of the other


def similarity_map(names: Sequence[str], prompts: Sequence[np.ndarray]) -> SimilarityMap:
    """Compare prompts of one backbone, each ``[P, D]`` with at least one vector."""
    units = [_directions(np.asarray(vectors, np.float32)) for vectors in prompts]
    means = _directions(np.stack([np.mean(vectors, axis=0) for vectors in prompts]))
    best = [[float((one @ two.T).max(axis=1).mean()) for two in units] for one in units]
    return {"names": list(names), "cosine": (means @ means.T).tolist(), "best_match": best}


def _directions(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
