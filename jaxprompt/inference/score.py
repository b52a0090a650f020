"""From a model and tokenized examples to answers and figures.

A task with labels is answered by rank classification: the input is encoded once, every label is
scored by the likelihood of its whole token sequence (EOS included), the best one wins. A task
without labels is answered by generation, greedy or with beams, and so is one that sets
``decoding: greedy``, as in the paper: then what is written may be none of the labels.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.batches import Example, evaluation_batches, round_input_length, with_prompt
from jaxprompt.data.targets import label_of
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.inference import generate
from jaxprompt.models import registry
from jaxprompt.models.label_tree import label_trees
from jaxprompt.models.ops import quantization
from jaxprompt.runtime import parallel, processes

# else examples do not share rows: fewer shapes, and ones that other examples have too
_FEWEST_SHARING, _FEWEST_SHAPES = 128, 5
_NOTHING = np.zeros(0, np.int32)


class Model(NamedTuple):
    """What answers: parameters, prompts and the devices that rows go to."""

    params: registry.Params
    bank: Float[Array, "K P D"] | None
    config: registry.Config
    mesh: Mesh | None = None  # rows go over its data axis; None: to the default device

    def prepared(self, examples: Sequence[Example]) -> tuple[registry.Prompts, registry.Config]:
        """What the prompts come to, worked out once for all batches, and the config to use it."""
        length = 0 if self.bank is None else self.bank.shape[1]
        config = registry.with_shared_prefix(self.config, [e.inputs for e in examples], length)
        return _prepare(self.params, self.bank, config), config

    def ask(
        self,
        function: Callable[..., jax.Array],
        prompts: Any,
        config: registry.Config,
        *more: Any,
        **settings: Any,
    ) -> Callable[[Any], jax.Array]:
        """A ``function`` of inference/generate.py, with its settings, as one of batches.

        more: arguments that all rows share.
        """
        compiled = _compiled(self.mesh, function, config, tuple(settings.items()))
        params, shared = quantization.view_as_uint16(self.params), (prompts, *more)

        def run(batch):
            batch = batch if self.mesh is None else parallel.put_batch(batch, self.mesh)
            return compiled(params, shared, batch)

        return run


@functools.lru_cache(maxsize=64)
def _compiled(mesh, function, config, settings):
    def of_rows(params, shared, batch):
        prompts, *more = shared
        rows = batch.inputs, batch.segments
        if function is generate.log_likelihood:
            rows += batch.targets, batch.target_segments
        return function(params, prompts, config, *rows, *more, **dict(settings))

    axes = registry.model_for(config).logical_axes(config)
    return jax.jit(parallel.shard_over_batch(of_rows, mesh, axes))


@functools.partial(jax.jit, static_argnames=("config",))
def _prepare(params, bank, config):
    return registry.model_for(config).prepare(params, bank, config)


class Predictions(NamedTuple):
    """One prediction a row and, for rank classification, the log-likelihoods of all labels.

    lost: numbers of the rows for which the model's logits were no finite numbers. Their predictions
    mean nothing, see ``refuse_lost``.
    """

    predictions: list[str]
    scores: Float[np.ndarray, "n C"] | None
    lost: Sequence[int] = ()


def refuse_lost(lost: Sequence[int], count: int, source: str) -> None:
    """Raise a UserError where some of ``count`` rows were answered with what is no number.

    Finite logits give finite log-likelihoods, so minus infinity is refused like NaN.
    """
    if len(lost):
        raise UserError(
            f"{source} gives scores that are not finite numbers for {len(lost)} of {count} rows, "
            f"first for row {lost[0] + 1}: weights of the backbone or of the prompt are NaN or "
            "infinite, or too large for the dtype; use a sound checkpoint, or load it as float32."
        )


def predict(
    model: Model,
    task: TaskConfig,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    share: bool = False,
    progress: Callable[[int], None] = lambda rows: None,
) -> Predictions:
    """Answers in the order of ``examples``; ``progress`` hears how many rows a batch had.

    share: examples may share rows, as they do in training, where that is less to compile and to
    compute. Their batches then have one shape, but one that other examples will not have: it is for
    what is asked again and again, or once, not for one set of questions after another.
    """
    ranked = task.labels if task.decoding == "rank" else None
    if not examples:
        return Predictions([], None if ranked is None else np.empty((0, len(ranked)), np.float32))
    # only their number of tokens would matter, and make shapes differ
    examples = [example._replace(targets=_NOTHING) for example in examples]
    prompts, config = model.prepared(examples)
    config, rows = _cut(
        model.mesh, config, examples, batch_size, share=share and ranked is not None
    )
    if ranked is None:
        legal = label_of(task, tokenizer)
        # what ends a target where it was tuned: of several that a chat model's config names, one
        config = dataclasses.replace(config, eos_id=tokenizer.eos_id)

        length = task.max_target_length
        if task.decoding == "beam":
            how = {"length": length, "beams": task.beams, "alpha": task.length_penalty}
            run = model.ask(generate.beam, prompts, config, **how)
        else:
            run = model.ask(generate.greedy, prompts, config, length=length)
        ids = _in_order(model.mesh, config, examples, rows, run, progress)
        lost = np.flatnonzero((ids < 0).any(axis=1))
        ids[lost] = config.eos_id
        texts = map(tokenizer.decode, ids)
        return Predictions([legal.get(text, text) for text in texts], None, lost.tolist())
    labels = label_trees(label_ids(ranked, tokenizer, task.separator))
    run = model.ask(generate.label_log_likelihoods, prompts, config, labels)
    scores = _in_order(model.mesh, config, examples, rows, run, progress)
    lost = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    return Predictions([ranked[i] for i in scores.argmax(axis=1)], scores, lost.tolist())


def predict_per_prompt(
    model: Model,
    task: TaskConfig,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Predictions]:
    """The answers of every prompt of the bank (of the bare model, if it has none).

    All are asked in the same batches: an example is there once for each prompt.
    """
    count, length = (1, 0) if model.bank is None else model.bank.shape[:2]
    asked = [
        with_prompt(example, k, model.config.vocab_size, length)
        for k in range(count)
        for example in examples
    ]
    found = predict(
        model, task, asked, tokenizer, batch_size=batch_size, share=True, progress=progress
    )
    parts = [slice(k * len(examples), (k + 1) * len(examples)) for k in range(count)]
    return [
        Predictions(
            found.predictions[part],
            None if found.scores is None else found.scores[part],
            [i - part.start for i in found.lost if part.start <= i < part.stop],
        )
        for part in parts
    ]


def log_likelihoods(
    model: Model, examples: Sequence[Example], *, batch_size: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> Float[np.ndarray, " n"]:  # fmt: skip
    """log p(target | input) of each example, in nats, EOS included."""
    if not examples:
        return np.empty(0, np.float32)
    prompts, config = model.prepared(examples)
    config, rows = _cut(model.mesh, config, examples, batch_size, share=False)
    run = model.ask(generate.log_likelihood, prompts, config)
    return _in_order(model.mesh, config, examples, rows, run, progress)


def label_ids(
    labels: Sequence[str], tokenizer: Tokenizer, separator: str = ""
) -> Int[np.ndarray, "C T"]:
    """Ids of each label with EOS, padded with -1 to the longest."""
    rows = tokenizer.encode_targets(labels, separator)
    width = max(map(len, rows))
    return np.array([row + [-1] * (width - len(row)) for row in rows], np.int32)


def _cut(mesh, config, examples, batch_size, *, share: bool):
    """The config for batches of the examples, and how many rows one has at most.

    What is computed at a time follows from ``family.room``, but where examples share rows.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"The batch size is {batch_size!r}; give a whole number from 1 on.")
    devices = parallel.num_batch_shards(mesh)
    most = -(-batch_size // devices) * devices  # filled with empty rows
    lengths = [len(example.inputs) for example in examples]
    shapes = len(set(map(round_input_length, lengths)))
    if not share or len(examples) < _FEWEST_SHARING or shapes < _FEWEST_SHAPES:
        return config, most
    shared, rows = registry.plan_microbatches(
        config, lengths, batch_size=most, devices=devices,
        most_widths=6,  # without a gradient they compile in half the time
    )  # fmt: skip
    return (config, most) if shared is config else (shared, rows)


def _in_order(mesh, config, examples, rows, run, progress) -> np.ndarray:
    """``run`` over length-sorted batches, results back in the order of the examples.

    The next batch is dispatched before the last one's result is fetched.
    """
    results: list[np.ndarray] = [np.empty(0)] * len(examples)

    def collect(numbers, output):
        output = np.asarray(processes.fetch(output))
        for number, row in zip(numbers, output, strict=True):
            if number >= 0:
                results[number] = row
        progress(int((numbers >= 0).sum()))

    waiting, widths, devices = None, registry.widths(config), parallel.num_batch_shards(mesh)
    room = registry.room(config, devices, training=False)
    for batch, numbers in evaluation_batches(
        examples, batch_size=rows, widths=widths, devices=devices, room=room
    ):
        output = run(batch)
        if waiting is not None:
            collect(*waiting)
        waiting = numbers, output
    if waiting is not None:
        collect(*waiting)
    return np.stack(results)
