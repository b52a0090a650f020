"""Rank classification: the input is read once, and every label is scored as a whole sequence."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprompt.data.batches import Example
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.inference.engine import Engine, Program
from jaxprompt.models import registry
from jaxprompt.models.injection import VERBALIZER, Injection, LabelRows
from jaxprompt.models.label_scores import map_trees
from jaxprompt.models.label_tree import (
    LabelTrees,
    label_holes,
    label_trees,
    node_bucket,
    one_token_each,
)


def rank_program(
    labels: Sequence[str], tokenizer: Tokenizer, separator: str = "", room: int = 1
) -> Program:
    """The log-likelihoods of C labels, EOS included, for each row: [C or more].

    What is behind the first C means nothing: other labels of nearly as many tokens share a program.
    Labels with up to ``room`` beginnings share one (in place of a mask, they have shapes of their
    own). Where labels stand in place of a mask, they are pseudo-log-likelihoods (``encoder.py``).
    """
    ids = label_ids(labels, tokenizer, separator)
    trees = label_holes(ids) if tokenizer.masked else label_trees(_in_bucket(ids, room), room)
    return Program(
        label_log_likelihoods,
        operands=(trees,),
        logits=trees.trees.num_nodes,
        answer=ids.shape[1],
    )


def _in_bucket(ids: Int[np.ndarray, "C T"], room: int) -> Int[np.ndarray, "c t"]:
    """Labels among empty ones, so that there are few shapes."""
    (labels, tokens), least = ids.shape, (room // 2, room // 4)
    shape = [node_bucket(max(pair)) for pair in zip((labels, tokens), least, strict=True)]
    more = [(0, wide - size) for wide, size in zip(shape, ids.shape, strict=True)]
    return np.pad(ids, more, constant_values=-1)


def label_rows_program(count: int, masked: bool) -> Program:
    """The log of the softmax over C label rows, which the injection must have: [C]."""
    return Program(label_log_likelihoods, operands=(one_token_each(count, masked),))


def features(
    engine: Engine, examples: Sequence[Example], *, masked: bool, batch_size: int
) -> Float[np.ndarray, "n D"]:
    """What the head, or label rows, read at the first token of an answer.

    Label rows that are the unit vectors read it out. Examples have no targets.
    """
    injection, width = engine.injection, engine.model.config.d_model
    unit = LabelRows(jnp.eye(width)[None], jnp.zeros((1, width)))
    layers = {**(injection.layers or {}), VERBALIZER: unit}
    program = Program(_label_logits, operands=(one_token_each(1, masked),))
    reader = engine._replace(injection=injection._replace(layers=layers))
    return reader.run(program, examples, batch_size=batch_size)


@functools.partial(jax.jit, static_argnames=("model",))
def _label_logits(
    params: registry.Params,
    injection: Injection,
    model: registry.Model,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    labels: LabelTrees,
) -> Float[Array, "R C"]:
    prefill = model.prefill(params, injection, inputs, segments)
    tree = jax.tree.map(lambda leaf: leaf[0], labels.trees)
    return model.score_tree(params, injection, prefill, tree)[:, 0]


def label_ids(
    labels: Sequence[str], tokenizer: Tokenizer, separator: str = ""
) -> Int[np.ndarray, "C T"]:
    """Ids of each label with EOS, padded with -1 to the longest."""
    rows = tokenizer.encode_targets(labels, separator)
    width = max(map(len, rows))
    return np.array([row + [-1] * (width - len(row)) for row in rows], np.int32)


@functools.partial(jax.jit, static_argnames=("model",))
def label_log_likelihoods(
    params: registry.Params,
    injection: Injection,
    model: registry.Model,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    labels: LabelTrees,
) -> Float[Array, "R C"]:
    """log p(label | input) of C candidate targets, each ending in EOS, for each row.

    The input is read once, and what several labels begin with is read once for all of them. Where
    examples share rows, there are ``layout.examples_per_row`` times B results.
    """
    prefill = model.prefill(params, injection, inputs, segments)

    def score(tree, nodes, tokens):
        logits = model.score_tree(params, injection, prefill, tree)
        scores = logits[:, nodes, jnp.maximum(tokens, 0)]
        scores -= jax.nn.logsumexp(logits, axis=-1)[:, nodes]
        return jnp.sum(scores * (tokens >= 0), axis=-1)

    return map_trees(score, labels)
