"""What the bare backbone makes of texts: the features that a router chooses by."""

import json
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprompt.data.batches import AnyArray, Example
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.inference.engine import Program
from jaxprompt.inference.session import Session
from jaxprompt.models import registry
from jaxprompt.models.injection import Injection

MOST_TOKENS = 512  # of a text with what begins and ends it


def text_of(row: Mapping[str, object], columns: Sequence[str] | None = None) -> str:
    """The text of a row without any template, which would tell which task it is.

    Args:
        row: of a task, or the input of a request.
        columns: those that the text is made of; None: all, in their order.

    >>> text_of({"subject": "hello", "words": 3})
    'hello\\n3'
    """
    values = [row[name] for name in columns if name in row] if columns else row.values()
    return "\n".join(
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for value in values
    )


def feature_ids(tokenizer: Tokenizer, text: str) -> Int[np.ndarray, " s"]:
    """The ids of a text as they are read for its features; long texts are cut."""
    end = [] if tokenizer.one_sequence else [tokenizer.eos_id]
    room = MOST_TOKENS - len(tokenizer.start_ids) - len(end)
    ids = [*tokenizer.start_ids, *tokenizer.encode_start(text, room)[:room], *end]
    return np.array(ids or [tokenizer.eos_id], np.int32)


def text_features(
    session: Session, texts: Sequence[str], *, batch_size: int = 32
) -> Float[np.ndarray, "N D"]:
    """The mean hidden state of each text in the backbone of a session without a prompt."""
    nothing = np.array([], np.int32)
    examples = [Example(feature_ids(session.tokenizer, text), nothing) for text in texts]
    if not examples:
        return np.zeros((0, session.backbone.config.d_model), np.float32)
    return session.engine.run(Program(_of_batch), examples, batch_size=batch_size)


def mean_hidden(
    params: registry.Params,
    model: registry.Model,
    inputs: Int[AnyArray, "B S"],
    segments: Int[AnyArray, "B S"],
) -> Float[Array, "B D"]:
    """The mean of ``Model.hidden`` over the tokens of each row, in float32."""
    hidden = model.hidden(params, inputs, segments).astype(jnp.float32)
    there = (jnp.asarray(segments) > 0)[..., None]
    total = jnp.sum(jnp.where(there, hidden, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(there, axis=1), 1)


def _of_batch(
    params: registry.Params,
    injection: Injection,
    model: registry.Model,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
) -> Float[Array, "B D"]:
    del injection  # the backbone is bare
    return mean_hidden(params, model, inputs, segments)
