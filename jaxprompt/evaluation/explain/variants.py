"""Variants of a prompt, answered in the same batches.

A variant is another vector in the bank (a random prompt, words), or a choice of ids: a row without
a vector is a row without its id. So hundreds of variants share the batches of one engine.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.batches import Batch, Example, make_batch, with_member
from jaxprompt.data.layout import round_input_length
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.inference.engine import Engine, Progress, ignore_progress, make_engine
from jaxprompt.inference.predict import predict
from jaxprompt.inference.session import Session
from jaxprompt.methods.hard_prompt import table_of
from jaxprompt.methods.layers import joined
from jaxprompt.models.injection import Injection

TUNED, RANDOM = 0, 1  # the members of the engine of a ``Subject``


class Subject(NamedTuple):
    """A prompt with the rows that explain it; its engine has a random prompt as member 1.

    task: without calibration, which would mix the variants that are answered together.
    right: the number of each row's right label.
    """

    session: Session
    engine: Engine
    task: TaskConfig
    examples: Sequence[Example]
    right: Int[np.ndarray, " n"]
    progress: Progress = ignore_progress
    batch_size: int = 64

    @property
    def tokenizer(self) -> Tokenizer:
        """The backbone's."""
        return self.session.tokenizer

    @property
    def vocabulary(self) -> int:
        """The first virtual id."""
        return self.engine.model.config.vocab_size

    @property
    def length(self) -> int:
        """P."""
        return self.engine.prompt_length

    def part(self, numbers: Sequence[int] | Int[np.ndarray, " m"]) -> "Subject":
        """The subject with some of the rows."""
        chosen = [self.examples[i] for i in numbers]
        return self._replace(examples=chosen, right=self.right[np.asarray(numbers, int)])


def random_like(vectors: Float[np.ndarray, "P D"], seed: int = 0) -> Float[np.ndarray, "P D"]:
    """Random directions with the norms of the vectors."""
    # of a stream of its own: the prompt may have started from the generator of the bare seed
    drawn = np.random.default_rng([seed, *b"control"]).normal(size=vectors.shape)
    norms = np.linalg.norm(vectors, axis=1) / np.linalg.norm(drawn, axis=1)
    return (drawn * norms[:, None]).astype(np.float32)


def engine_of(session: Session, banks: Sequence[Float[np.ndarray, "P D"]]) -> Engine:
    """An engine whose members have these vectors, and all the prompt's changes of layers."""
    assert session.prompt is not None
    own = session.prompt.injection
    members = [Injection(jnp.asarray(vectors)[None], own.layers) for vectors in banks]
    backbone = session.backbone
    return make_engine(backbone.params, joined(members), session.engine.model, backbone.mesh)


def without(
    example: Example, vocabulary: int, length: int, dropped: Bool[np.ndarray, " P"]
) -> Example:
    """The example without some of its prompt's vectors."""
    ids = example.inputs
    virtual = ids >= vocabulary
    gone = virtual & dropped[np.where(virtual, (ids - vocabulary) % max(length, 1), 0)]
    return example._replace(inputs=ids[~gone])


class Answers(NamedTuple):
    """What V variants answer to n rows."""

    log_p: Float[np.ndarray, "V n"]  # of the right label among all labels, in nats
    correct: Bool[np.ndarray, "V n"]


def answer(subject: Subject, variants: Sequence[tuple[int, Bool[np.ndarray, " P"]]]) -> Answers:
    """The answers of variants: a member of the engine, and the vectors that it lacks."""
    of_members = {member for member, _ in variants}
    moved = {
        member: [
            with_member(example, member, subject.vocabulary, subject.length)
            for example in subject.examples
        ]
        for member in of_members
    }
    examples = [
        without(example, subject.vocabulary, subject.length, dropped)
        for member, dropped in variants
        for example in moved[member]
    ]
    found = predict(
        subject.engine, subject.task, examples, subject.tokenizer,
        batch_size=subject.batch_size, pack=True, progress=subject.progress,
    )  # fmt: skip
    assert found.scores is not None
    scores = found.scores.reshape(len(variants), len(subject.examples), -1)
    return judged(scores, subject.right)


def judged(scores: Float[np.ndarray, "V n C"], right: Int[np.ndarray, " n"]) -> Answers:
    """Answers from the log-likelihoods of labels."""
    highest = scores.max(axis=-1, keepdims=True)
    log_sum = highest + np.log(np.exp(scores - highest).sum(axis=-1, keepdims=True))
    log_p = np.take_along_axis(scores - log_sum, right[None, :, None], axis=2)[..., 0]
    return Answers(log_p, scores.argmax(axis=-1) == right)


def batches(
    examples: Sequence[Example], rows: int
) -> Iterator[tuple[Int[np.ndarray, " m"], Batch]]:
    """Batches of ``rows`` rows, the longest examples first, and the numbers of their examples."""
    order = np.argsort([-len(example.inputs) for example in examples], kind="stable")
    for start in range(0, len(order), rows):
        numbers = order[start : start + rows]
        chosen = [examples[i] for i in numbers]
        width = round_input_length(len(chosen[0].inputs))
        yield numbers, make_batch(chosen, rows=min(rows, len(order)), input_length=width)


def mean_word(subject: Subject) -> Float[np.ndarray, " D"]:
    """The mean row of the embedding table, of the tokenizer's pieces alone."""
    pieces = min(subject.tokenizer.size, subject.vocabulary)
    return np.asarray(table_of(subject.session.backbone.params)[:pieces], np.float32).mean(axis=0)
