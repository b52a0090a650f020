"""How alike several prompts are: the cosine of their means, and linear CKA of their vectors."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from jaxprompt.evaluation.explain.variants import random_like

Matrix = Float[np.ndarray, "N N"]


class Kinship(NamedTuple):
    """How alike N prompts are, in the order of a tree of clusters.

    random_cosine, random_cka: of each prompt and a random one with the norms of another; means.
    """

    names: list[str]
    cosine: Matrix
    cka: Matrix
    random_cosine: float
    random_cka: float


def mean_cosine(one: Float[np.ndarray, "P D"], other: Float[np.ndarray, "Q D"]) -> float:
    """The cosine of the two means over vectors (SPoT, Vu et al. 2021, section 3)."""
    a, b = one.mean(axis=0), other.mean(axis=0)
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else 0.0


def linear_cka(x: Float[np.ndarray, "n p"], y: Float[np.ndarray, "n q"]) -> float:
    """Linear centred kernel alignment of two sets of features of the same n things.

    Kornblith et al. 2019 (arXiv 1905.00414), section 3: 1 for features that are rotations and
    multiples of each other, 0 for orthogonal ones.
    """
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    size = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(x.T @ y) ** 2 / size) if size else 0.0


def prompt_cka(one: Float[np.ndarray, "P D"], other: Float[np.ndarray, "Q D"]) -> float:
    """Linear CKA of two prompts: the D dimensions are the things, the vectors their features.

    So neither the order of the vectors matters nor that prompts have one length.
    """
    return linear_cka(one.T.astype(np.float64), other.T.astype(np.float64))


def kinship(names: Sequence[str], prompts: Sequence[Float[np.ndarray, "_ D"]]) -> Kinship:
    """The similarities of prompts, like ones beside each other."""
    cosines = np.array([[mean_cosine(a, b) for b in prompts] for a in prompts])
    ckas = np.array([[prompt_cka(a, b) for b in prompts] for a in prompts])
    order = cluster_order(ckas)
    controls = [random_like(vectors, seed) for seed, vectors in enumerate(prompts)]
    pairs = [(a, b) for i, a in enumerate(prompts) for j, b in enumerate(controls) if i != j]
    square = np.ix_(order, order)
    return Kinship(
        [names[i] for i in order], cosines[square], ckas[square],
        float(np.mean([mean_cosine(a, b) for a, b in pairs])),
        float(np.mean([prompt_cka(a, b) for a, b in pairs])),
    )  # fmt: skip


def cluster_order(similarity: Matrix) -> list[int]:
    """An order in which like things are neighbours: the leaves of average linkage."""
    if len(similarity) < 3:
        return list(range(len(similarity)))
    distance = np.clip(1 - (similarity + similarity.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    return leaves_list(tree).tolist()
