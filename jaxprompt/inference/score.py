"""Log-likelihoods of given targets."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.batches import Example
from jaxprompt.data.rows import Rows
from jaxprompt.data.templates import place_prompt, with_counts
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.data.truncation import Truncation
from jaxprompt.data.virtual_tokens import virtual_ids
from jaxprompt.inference.engine import Engine, Program, Progress, ignore_progress
from jaxprompt.models import registry
from jaxprompt.models.injection import Injection


def log_likelihoods(
    engine: Engine,
    examples: Sequence[Example],
    *,
    batch_size: int,
    progress: Progress = ignore_progress,
) -> Float[np.ndarray, " n"]:
    """log p(target | input) of each example, in nats, EOS included."""
    if not examples:
        return np.empty(0, np.float32)
    program = Program(log_likelihood, teacher_forced=True)
    return engine.run(program, examples, batch_size=batch_size, progress=progress)


@functools.partial(jax.jit, static_argnames=("model",))
def log_likelihood(
    params: registry.Params,
    injection: Injection,
    model: registry.Model,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    targets: Int[Array, "R T"],
    target_segments: Int[Array, "R T"],
) -> Float[Array, " R"]:
    """log p(target | input) of each row: the sum over its target ids, EOS included."""
    logits = model.logits(params, injection, inputs, segments, targets, target_segments)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    each = picked - jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum(each * (target_segments > 0), axis=-1)


class PairTokenizer(NamedTuple):
    """How pairs of texts, an input and a target, become ids."""

    tokenizer: Tokenizer
    vocabulary: int  # rows of the embedding table, above which virtual ids begin
    prompt_length: int
    task: TaskConfig | None = None  # that the prompt was tuned on
    raw: bool = False  # a decoder-only model gets both texts as they are
    max_input_length: int | None = None  # tokens of an input with its end; None: the task's, or 512

    @property
    def joined(self) -> bool:
        """Whether input and target are joined with the task's separator, as in tuning."""
        return self.task is not None and self.tokenizer.one_sequence and not self.raw

    @property
    def separator(self) -> str:
        """What stands between input and target."""
        return self.task.separator if self.task is not None and self.joined else ""

    @property
    def longest(self) -> int:
        """Tokens of an input with what begins and ends it, without the virtual ones."""
        default = 512 if self.task is None else self.task.max_input_length
        return self.max_input_length or default

    def encode(self, pairs: Rows) -> tuple[list[Example], list[str]]:
        """Examples of rows ``{"input": text, "target": text}``, and sentences of warning."""
        if self.tokenizer.masked:
            raise UserError(
                "The backbone is an encoder with a mask, which has no likelihood of a text after "
                "another; use eval or predict with labels."
            )
        warnings = [] if self.task is None or self.raw else self._template_warnings(self.task)
        end = self.tokenizer.input_end(self.separator)
        room = max(self.longest - len(self.tokenizer.start_ids) - len(end), 0)
        inputs = [pair["input"].removesuffix(self.separator) for pair in pairs]
        texts = [self.tokenizer.encode_start(text, room) for text in inputs]
        cut = Truncation(len(pairs), sum(len(words) > room for words in texts), {})
        warning = cut.sentence("inputs", f"max_input_length, {self.longest}")
        if warning is not None:
            warnings.append(f"{warning}; raise it")
        return [
            Example(self._input_ids(words[:room], end), self._target_ids(pair))
            for words, pair in zip(texts, pairs, strict=True)
        ], warnings

    def _input_ids(self, words: Sequence[int], end: Sequence[int]) -> Int[np.ndarray, " s"]:
        virtual = virtual_ids(self.vocabulary, self.prompt_length)
        ids = [*self.tokenizer.start_ids, *words, *end]
        # a sequence has at least one token; without a prompt and text it is the end of sequence
        ids = ids or ([] if len(virtual) else [self.tokenizer.eos_id])
        return np.concatenate([virtual, np.array(ids, np.int32)])

    def _target_ids(self, pair: Mapping[str, str]) -> Int[np.ndarray, " t"]:
        tokenizer = self.tokenizer
        if self.joined or not tokenizer.one_sequence:
            [ids] = tokenizer.encode_targets([pair["target"]], self.separator)
        else:
            ids = [*tokenizer.encode_rest(pair["input"], pair["target"]), tokenizer.eos_id]
        return np.array(ids, np.int32)

    def _template_warnings(self, task: TaskConfig) -> list[str]:
        """A sentence for each thing in the task's template that has no place in a pair's text."""
        counted = with_counts(task.template, self.tokenizer.encode)
        pieces = place_prompt(counted, self.prompt_length)
        inside = any(piece.virtual for piece in pieces[1:])
        [named] = self.tokenizer.encode_all([self.tokenizer.marked(task.template)], trusted=True)
        special = named != self.tokenizer.encode(task.template)
        findings = [
            ("places virtual tokens within the text; here all of them stand in front", inside),
            ("names special tokens; in an input they are text", special),
        ]
        return [
            f"the template {shown(task.template)} of the prompt's task {what}, so these are other "
            "likelihoods than those of eval and predict"
            for what, there in findings
            if there
        ]
