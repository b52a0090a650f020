"""From an engine and tokenized examples to predictions.

A task with labels is answered by rank classification: the label with the highest likelihood wins.
A task without labels is answered by generation, greedy or with beams. So is a task that sets
``decoding: greedy``, as in the paper; then the generated text may be none of the labels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.batches import Example, with_member
from jaxprompt.data.examples import tokenize
from jaxprompt.data.targets import label_of
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.data.verbalizers import (
    content_free_rows,
    label_words,
    prior_of,
    wants_content_free,
)
from jaxprompt.data.virtual_tokens import VirtualTokens
from jaxprompt.inference.engine import Engine, Progress, ignore_progress
from jaxprompt.inference.generate import generation_program
from jaxprompt.inference.rank import label_rows_program, rank_program
from jaxprompt.models.injection import label_rows

_NO_TARGET = np.zeros(0, np.int32)


class Predictions(NamedTuple):
    """One prediction a row and, for rank classification, the scores of all labels.

    They are log-likelihoods. Where the task is ``length_normalized``, they are means over a label's
    tokens instead of sums. Where it is calibrated, the log prior of each label is subtracted.

    non_finite_rows: numbers of the rows for which the model's logits were not finite. Their
    predictions mean nothing, see ``check_finite_scores``.
    """

    predictions: list[str]
    scores: Float[np.ndarray, "n C"] | None
    non_finite_rows: Sequence[int] = ()
    log_prior: Float[np.ndarray, " C"] | None = None  # that the scores are calibrated by


def check_finite_scores(non_finite_rows: Sequence[int], count: int, source: str) -> None:
    """Raise a UserError where the scores of some of ``count`` rows are not finite.

    Finite logits give finite log-likelihoods, so minus infinity is refused like NaN.
    """
    if len(non_finite_rows):
        raise UserError(
            f"{source} gives scores that are not finite numbers for {len(non_finite_rows)} of "
            f"{count} rows, first for row {non_finite_rows[0] + 1}: weights of the backbone or of "
            "the prompt are NaN or infinite, or too large for the dtype; use a sound checkpoint, "
            "or load it as float32."
        )


def predict(
    engine: Engine,
    task: TaskConfig,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    pack: bool = False,
    progress: Progress = ignore_progress,
) -> Predictions:
    """Predictions in the order of ``examples``.

    Args:
        engine: the backbone with its prompts.
        task: says how rows are answered.
        examples: their targets are not read.
        tokenizer: of the backbone.
        batch_size: rows at a time, at most.
        pack: examples may share rows, see ``Engine.run``; only for rank classification.
        progress: is called with the number of examples of each batch.
    """
    labels = task.labels if task.decoding == "rank" else None
    if not examples:
        return Predictions([], None if labels is None else np.empty((0, len(labels)), np.float32))
    # without targets, shapes follow from the inputs alone
    examples = [example._replace(targets=_NO_TARGET) for example in examples]
    if labels is None:
        return _generate(engine, task, examples, tokenizer, batch_size, progress)
    scores = _label_scores(engine, task, examples, tokenizer, batch_size, pack, progress)
    free = _content_free(engine, task, tokenizer)
    return _ranked(task, scores, _scores_of_free(engine, task, free, tokenizer, batch_size))


def _label_scores(
    engine: Engine,
    task: TaskConfig,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    batch_size: int,
    pack: bool = False,
    progress: Progress = ignore_progress,
) -> Float[np.ndarray, "n C"]:
    """The score of each label for each example, not calibrated."""
    rows = label_rows(engine.injection)
    if rows is not None:
        count, labels = rows.bias.shape[1], task.labels or ()
        if len(labels) != count:
            raise UserError(
                f"The prompt has a row for each of its {count} labels, and the task has "
                f"{len(labels)}; give as many, in the order of those that it was tuned with."
            )
        program = label_rows_program(count, tokenizer.masked)
        return engine.run(program, examples, batch_size=batch_size, pack=pack, progress=progress)
    words = label_words(task)
    program = rank_program(words.texts, tokenizer, task.separator, engine.label_room)
    scores = engine.run(program, examples, batch_size=batch_size, pack=pack, progress=progress)
    scores = scores[:, : len(words.texts)]
    if task.length_normalized:
        encoded = tokenizer.encode_targets(words.texts, task.separator)
        scores = scores / np.array([len(ids) for ids in encoded], np.float32)
    return words.pooled(scores)


def _content_free(engine: Engine, task: TaskConfig, tokenizer: Tokenizer) -> list[Example]:
    """Examples that say nothing, where the task is calibrated by them."""
    if not wants_content_free(task):
        return []
    virtual = VirtualTokens(engine.model.config.vocab_size, engine.prompt_length)
    return tokenize(task, content_free_rows(task), tokenizer, virtual, need_targets=False)


def _scores_of_free(
    engine: Engine,
    task: TaskConfig,
    free: Sequence[Example],
    tokenizer: Tokenizer,
    batch_size: int,
) -> Float[np.ndarray, "m C"]:
    if not free:
        return np.empty((0, len(task.labels or ())), np.float32)
    return _label_scores(engine, task, free, tokenizer, batch_size)


def _ranked(
    task: TaskConfig, scores: Float[np.ndarray, "n C"], free: Float[np.ndarray, "m C"]
) -> Predictions:
    """The likeliest labels, by scores that are calibrated where the task says so."""
    labels, prior = task.labels or [], prior_of(task, scores, free)
    scores = scores if prior is None else scores - prior
    non_finite_rows = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    best = [labels[i] for i in scores.argmax(axis=1)]
    return Predictions(best, scores, non_finite_rows.tolist(), prior)


def _generate(
    engine: Engine,
    task: TaskConfig,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    batch_size: int,
    progress: Progress,
) -> Predictions:
    """Generated texts. A text that spells a label is that label."""
    legal = label_of(task, tokenizer)
    # the id that ended targets in tuning; a chat model's config may name several
    engine = engine._replace(model=engine.model.with_config(eos_id=tokenizer.eos_id))
    program = generation_program(task)
    ids = engine.run(program, examples, batch_size=batch_size, progress=progress)
    non_finite_rows = np.flatnonzero((ids < 0).any(axis=1))
    ids[non_finite_rows] = engine.model.config.eos_id
    texts = map(tokenizer.decode, ids)
    return Predictions([legal.get(text, text) for text in texts], None, non_finite_rows.tolist())


def predict_per_member(
    engine: Engine,
    task: TaskConfig,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    progress: Progress = ignore_progress,
) -> list[Predictions]:
    """The predictions of every member of the injection (of the bare backbone, if it has none).

    All members share the same batches: an example is there once for each.
    """
    bare = [example._replace(targets=_NO_TARGET) for example in examples]
    repeated, count, members = _for_each_member(engine, bare), len(examples), engine.num_members
    if task.labels is None or task.decoding != "rank" or not examples:
        together = predict(
            engine, task, repeated, tokenizer, batch_size=batch_size, pack=True, progress=progress
        )
        return [_part(together, k * count, (k + 1) * count) for k in range(members)]
    scores = _label_scores(engine, task, repeated, tokenizer, batch_size, True, progress)
    asked = _for_each_member(engine, _content_free(engine, task, tokenizer))
    free = _scores_of_free(engine, task, asked, tokenizer, batch_size)
    parts = zip(np.split(scores, members), np.split(free, members), strict=True)
    return [_ranked(task, *each) for each in parts]


def _for_each_member(engine: Engine, examples: Sequence[Example]) -> list[Example]:
    """The examples once for each member, those of a member together."""
    vocabulary, length = engine.model.config.vocab_size, engine.prompt_length
    return [
        with_member(example, k, vocabulary, length)
        for k in range(engine.num_members)
        for example in examples
    ]


def _part(together: Predictions, start: int, stop: int) -> Predictions:
    scores = None if together.scores is None else together.scores[start:stop]
    non_finite_rows = [i - start for i in together.non_finite_rows if start <= i < stop]
    return Predictions(together.predictions[start:stop], scores, non_finite_rows)
