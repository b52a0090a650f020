"""What the layers make of the rows: the logit lens at the answer, and states for probes."""

import functools
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxprompt.data.batches import AnyArray, Example, with_member
from jaxprompt.data.verbalizers import first_words
from jaxprompt.evaluation.explain.variants import RANDOM, TUNED, Subject, batches, without
from jaxprompt.inference.rank import label_ids

FORMS = ("prompt", "bare", "random")  # with the prompt, without, with a random one


class Seen(NamedTuple):
    """What the layers make of n rows in one form.

    text: mean over the words of each layer that reads them.
    answer: where the answer's first token is predicted, behind each layer.
    label_logits: of the first token of each label, behind each layer.
    rank: how many tokens are likelier there than the first token of the right label.
    best: the likeliest token there.
    """

    text: Float[AnyArray, "n L D"]
    answer: Float[AnyArray, "n M D"]
    label_logits: Float[AnyArray, "n M C"]
    rank: Int[AnyArray, "n M"]
    best: Int[AnyArray, "n M"]


@functools.partial(jax.jit, static_argnames=("model",))
def _see(params, injection, model, batch, first, right):
    injection = injection.for_rows(len(batch.inputs), batch.member)
    text, answer = model.states(params, injection, batch.inputs, batch.segments)
    is_word = (batch.segments > 0) & (batch.inputs < model.config.vocab_size)
    share = is_word / jnp.maximum(is_word.sum(axis=1, keepdims=True), 1)
    text = jnp.einsum("blsd,bs->bld", text.astype(jnp.float32), share)

    def of_layer(state):
        logits = model.read_out(params, injection, state[:, None])[:, 0]
        of_right = jnp.take_along_axis(logits, first[right][:, None], axis=1)
        return logits[:, first], jnp.sum(logits > of_right, axis=1), jnp.argmax(logits, axis=1)

    found = jax.lax.map(of_layer, answer.swapaxes(0, 1))
    return Seen(text, answer.astype(jnp.float32), *(x.swapaxes(0, 1) for x in found))


def first_tokens(subject: Subject) -> Int[np.ndarray, " C"]:
    """The first token of the first word of each label."""
    words = first_words(subject.task)
    return label_ids(words, subject.tokenizer, subject.task.separator)[:, 0]


def see(subject: Subject, examples: list[Example]) -> Seen:
    """What the layers make of the rows of a subject in one form."""
    found: list[list[np.ndarray]] = [[np.empty(0)] * len(examples) for _ in Seen._fields]
    first, engine = jnp.asarray(first_tokens(subject)), subject.engine
    for numbers, batch in batches(examples, subject.batch_size):
        right = np.zeros(len(batch.inputs), np.int32)
        right[: len(numbers)] = subject.right[numbers]
        batch = jax.tree.map(jnp.asarray, batch)
        seen = _see(engine.params, engine.injection, engine.model, batch, first, right)
        for results, values in zip(found, seen, strict=True):
            for row, number in enumerate(numbers):
                results[number] = np.asarray(values[row])
        subject.progress(len(numbers))
    return Seen(*map(np.stack, found))


def see_forms(subject: Subject) -> dict[str, Seen]:
    """What the layers make of all rows in each of ``FORMS``."""
    vocabulary, length = subject.vocabulary, subject.length
    everything = np.ones(length, bool)
    forms = (
        [with_member(example, TUNED, vocabulary, length) for example in subject.examples],
        [without(example, vocabulary, length, everything) for example in subject.examples],
        [with_member(example, RANDOM, vocabulary, length) for example in subject.examples],
    )
    return {name: see(subject, form) for name, form in zip(FORMS, forms, strict=True)}


class Lens(NamedTuple):
    """What would be answered behind each of M layers, by the first token of the labels.

    accuracy: share of rows in which no label's first token is likelier than the right one's.
    rank: median number of tokens of the vocabulary that are likelier than the right one.
    top: the likeliest tokens, each with the share of rows in which it is the likeliest.
    """

    accuracy: list[float]
    rank: list[float]
    top: list[list[tuple[str, float]]]


def lens_of(subject: Subject, seen: Seen) -> Lens:
    """The logit lens at the answer (nostalgebraist 2020)."""
    own = np.take_along_axis(seen.label_logits, subject.right[:, None, None], axis=2)
    right = (seen.label_logits <= own).all(axis=2)
    tops = []
    for layer in range(seen.best.shape[1]):
        counts = Counter(seen.best[:, layer].tolist()).most_common(3)
        name = lambda id: subject.tokenizer.token_text(id).strip() or "(blank)"
        tops.append([(name(id), count / len(seen.best)) for id, count in counts])
    return Lens(right.mean(axis=0).tolist(), np.median(seen.rank, axis=0).tolist(), tops)
