"""Scores of the tokens of labels: the inputs are read once, and trees hold all labels."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprompt.models import registry
from jaxprompt.models.injection import Injection
from jaxprompt.models.label_tree import AnyTree, LabelTrees

T = TypeVar("T")


class TokenScores(NamedTuple):
    """Of each token of C labels, in nats. What is after a label's end means nothing."""

    log_p: Float[Array, "R C T"]  # of the token, given the input and the tokens before it
    log_z: Float[Array, "R C T"]  # log of the sum of the exponentials of all logits
    is_argmax: Bool[Array, "R C T"]


def split_labels(labels: LabelTrees) -> tuple[AnyTree, Int[Array, "G c T"], Int[Array, "G c T"]]:
    """The trees, and nodes and tokens of their labels; the last tree is filled with empty ones."""
    (count, _), groups = labels.tokens.shape, len(labels.trees.ids)
    size = -(-count // groups)

    def in_groups(x):
        x = jnp.pad(x, ((0, groups * size - count), (0, 0)), constant_values=-1)
        return x.reshape(groups, size, -1)

    return labels.trees, in_groups(labels.nodes), in_groups(labels.tokens)


def map_trees(of_tree: Callable[..., T], labels: LabelTrees) -> T:
    """Results [R, C, ...] of results [R, c, ...] of ``of_tree(tree, nodes, tokens)``."""
    count, groups = len(labels.tokens), len(labels.trees.ids)
    results = jax.lax.map(lambda group: of_tree(*group), split_labels(labels))

    def joined(x):
        x = x.swapaxes(0, 1)
        return x.reshape(len(x), groups * x.shape[2], *x.shape[3:])[:, :count]

    return jax.tree.map(joined, results)


def token_scores(
    params: registry.Params,
    injection: Injection,
    model: registry.Model,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    labels: LabelTrees,
    dropout_seed: Int[Array, " R"] | None = None,
) -> TokenScores:
    """The scores of all labels for each row, with gradients.

    Of several trees the backward pass computes one after another again, so that no more logits than
    those of one tree are ever there.
    """
    prefill = model.prefill(params, injection, inputs, segments, dropout_seed)

    def of_tree(tree, nodes, tokens):
        logits = model.score_tree(params, injection, prefill, tree, dropout_seed)
        log_z, largest = jax.nn.logsumexp(logits, axis=-1), jnp.max(logits, axis=-1)
        picked = logits[:, nodes, jnp.maximum(tokens, 0)]
        log_z = log_z[:, nodes]
        return TokenScores(picked - log_z, log_z, picked >= largest[:, nodes])

    return map_trees(jax.checkpoint(of_tree) if len(labels.trees.ids) > 1 else of_tree, labels)
