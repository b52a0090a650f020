"""A soft verbalizer: trained rows for labels, in place of the rows of words in the head.

WARP (Hambardzumyan et al. 2021, arXiv 2101.00121, section 3.1) trains such a row for each class
along with a prompt. With class means as rows it is a prototypical network (Snell et al. 2017, arXiv
1703.05175, section 2.4): the nearest mean of what the head would read wins. ProtoVerb (Cui et al.
2022, arXiv 2203.09770) trains prototypes from such a start.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import PromptConfig, TaskConfig
from jaxprompt.config.values import Values
from jaxprompt.data.tasks.registry import resolve_learnt
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.data.verbalizers import words_of
from jaxprompt.methods.base import Method, Trainables, members_of, no_start_vectors
from jaxprompt.models.injection import VERBALIZER, Injection, LabelRows, Params
from jaxprompt.models.ops.quantization import dequantize

NAME = "soft-verbalizer"


def labels_of(task: str | Values) -> tuple[str, ...]:
    """The labels that rows stand for.

    Raises:
        UserError: the task has none, or answers in another way.
    """
    learnt = resolve_learnt(task)
    if learnt.labels is None or len(learnt.labels) < 2 or learnt.decoding != "rank":
        raise UserError(
            f"A soft verbalizer chooses among labels, and task {learnt.name!r} has fewer than two "
            "in task.labels, or writes its answers; use a task with labels and decoding=rank, or "
            "another method."
        )
    return tuple(learnt.labels)


def soft_verbalizer(labels: Sequence[str]) -> Method:
    """The method for these labels. Its rows start at 0; ``with_rows`` gives them a start."""

    def init(
        params: Params, start: Float[np.ndarray, "K R D"], prompt: PromptConfig, seed: int
    ) -> dict[str, Array]:
        shape = len(labels), params["token_embedder"]["embedding"].shape[1]
        leaves = {"rows": np.zeros(shape, np.float32), "bias": np.zeros(shape[:1], np.float32)}
        return members_of(leaves, start)

    def inject(trainables: dict[str, Array], params: Params) -> Injection:
        return Injection(layers={VERBALIZER: LabelRows(**trainables)})

    return Method(init, inject, num_start_vectors=no_start_vectors, uses_prompt=False)


def with_rows(trainables: Trainables, rows: LabelRows) -> Trainables:
    """The trainables of one member, of this method or of several parts, with a start of its rows.

    Args:
        rows: without an axis K.
    """
    start = {name: jnp.asarray(leaf, jnp.float32)[None] for name, leaf in rows._asdict().items()}
    return {**trainables, NAME: start} if NAME in trainables else start


def rows_of_words(params: Params, task: TaskConfig, tokenizer: Tokenizer) -> LabelRows:
    """For each label the mean row of the head over the pieces of its words.

    A label of one piece starts with the logit that the head gives this piece.
    """
    rows, biases = [], []
    for label in task.labels or ():
        words = tokenizer.encode_words(words_of(task, label), task.separator)
        ids = np.concatenate([np.asarray(each, np.int32) for each in words])
        of_pieces = _head_rows(params, ids[~np.isin(ids, tokenizer.special_ids)])
        rows.append(of_pieces.rows.mean(axis=0))
        biases.append(of_pieces.bias.mean(axis=0))
    return LabelRows(jnp.stack(rows), jnp.stack(biases))


def _head_rows(params: Params, ids: Int[np.ndarray, " n"]) -> LabelRows:
    """The rows of the head, and its biases, for some ids."""
    if "head" in params:
        rows = _columns(params["head"], ids)
    else:
        rows = params["token_embedder"]["embedding"][ids].astype(jnp.float32)
    bias = params["head_bias"][ids] if "head_bias" in params else jnp.zeros(len(ids))
    return LabelRows(rows, bias.astype(jnp.float32))


@jax.jit
def _columns(head: Float[Array, "D V"], ids: Int[Array, " n"]) -> Float[Array, "n D"]:
    return dequantize(head, jnp.float32)[:, ids].T


def rows_of_prototypes(
    features: Float[np.ndarray, "n D"], labels: Int[np.ndarray, " n"], count: int
) -> LabelRows:
    """The rows with which the label of the nearest mean has the highest logit.

    -|h - m|^2 / 2 is h m - |m|^2 / 2, less a term that all labels share.

    Args:
        features: h, what the head would read for each row.
        labels: the number of each row's label.
        count: C, the labels; each has a row at least.
    """
    means = np.stack([features[labels == label].mean(axis=0) for label in range(count)])
    return LabelRows(jnp.asarray(means), jnp.asarray(-0.5 * np.sum(means**2, axis=1)))
