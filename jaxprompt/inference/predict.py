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
from jaxprompt.data.targets import label_of
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.inference.engine import Engine, Progress, ignore_progress
from jaxprompt.inference.generate import generation_program
from jaxprompt.inference.rank import rank_program

_NO_TARGET = np.zeros(0, np.int32)


class Predictions(NamedTuple):
    """One prediction a row and, for rank classification, the log-likelihoods of all labels.

    Where the task is ``length_normalized``, they are means over a label's tokens instead of sums.

    non_finite_rows: numbers of the rows for which the model's logits were not finite. Their
    predictions mean nothing, see ``check_finite_scores``.
    """

    predictions: list[str]
    scores: Float[np.ndarray, "n C"] | None
    non_finite_rows: Sequence[int] = ()


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
    program = rank_program(labels, tokenizer, task.separator)
    scores = engine.run(program, examples, batch_size=batch_size, pack=pack, progress=progress)
    if task.length_normalized:
        encoded = tokenizer.encode_targets(labels, task.separator)
        scores = scores / np.array([len(ids) for ids in encoded], np.float32)
    non_finite_rows = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    return Predictions([labels[i] for i in scores.argmax(axis=1)], scores, non_finite_rows.tolist())


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
    vocabulary, length = engine.model.config.vocab_size, engine.prompt_length
    repeated = [
        with_member(example, k, vocabulary, length)
        for k in range(engine.num_members)
        for example in examples
    ]
    together = predict(
        engine, task, repeated, tokenizer, batch_size=batch_size, pack=True, progress=progress
    )
    count = len(examples)
    return [_part(together, k * count, (k + 1) * count) for k in range(engine.num_members)]


def _part(together: Predictions, start: int, stop: int) -> Predictions:
    scores = None if together.scores is None else together.scores[start:stop]
    non_finite_rows = [i - start for i in together.non_finite_rows if start <= i < stop]
    return Predictions(together.predictions[start:stop], scores, non_finite_rows)
