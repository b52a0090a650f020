"""The compiled engine: one backbone, an injection, and programs over batches of examples.

A ``Program`` says what is computed for each row. The engine compiles it once for each shape of
``buckets.py``, so that their number is bounded and a request of other rows compiles nothing new.
Rows of one batch may use different prompts of the bank: the ids say which (``virtual_tokens``).
"""

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxprompt.config.errors import UserError
from jaxprompt.data.batches import Batch, Example
from jaxprompt.data.layout import round_input_length, round_target_length
from jaxprompt.data.microbatches import packed_rows
from jaxprompt.inference.buckets import BatchLimits, inference_batches
from jaxprompt.models import registry
from jaxprompt.models.injection import Injection, prefix_length
from jaxprompt.models.ops import quantization
from jaxprompt.runtime import parallel, processes

# With fewer examples or fewer different lengths, rows are padded and not shared: padded batches
# have few shapes, which other requests have too.
FEWEST_PACKED, FEWEST_LENGTHS = 128, 5

Progress = Callable[[int], None]


def ignore_progress(rows: int) -> None:
    """The progress callback of callers that show none."""


class Program(NamedTuple):
    """What is computed for each row of a batch.

    ``function(params, injection, model, inputs, segments, *operands, **settings)`` returns one
    result a row; with ``teacher_forced`` it takes targets and their segments before ``operands``.
    """

    function: Callable[..., jax.Array]
    operands: tuple = ()  # pytrees of arrays that all rows share
    settings: tuple[tuple[str, Hashable], ...] = ()  # static
    teacher_forced: bool = False
    logits: int = 1  # positions per row whose logits are held at once
    answer: int = 1  # tokens of the longest answer that may take the place of a mask


class Engine(NamedTuple):
    """A frozen backbone with an injection of K members, and the devices that rows go to.

    ``make_engine`` makes it.
    """

    params: registry.Params  # as compiled programs take them, see ``quantization.view_as_uint16``
    injection: Injection
    model: registry.Model
    mesh: Mesh | None = None  # rows go over its data axes; None: to the default device
    label_room: int = 1  # labels of up to so many beginnings share a program, see ``rank_program``

    @property
    def prompt_length(self) -> int:
        """P, the virtual tokens of each prompt; 0 without a bank."""
        bank = self.injection.embeddings
        return 0 if bank is None else bank.shape[1]

    @property
    def num_members(self) -> int:
        """K, or 1 for the backbone as it is."""
        return self.injection.num_members

    def run(
        self,
        program: Program,
        examples: Sequence[Example],
        *,
        batch_size: int,
        pack: bool = False,
        progress: Progress = ignore_progress,
    ) -> np.ndarray:
        """The program's result for each example, in the order of the examples.

        The next batch is dispatched before the result of the last one is fetched.

        Args:
            program: what is computed.
            examples: at least one.
            batch_size: rows at a time, at most.
            pack: examples may share rows where the device computes that faster. Batches then have
                a shape that fits these examples and hardly any others: it suits a large evaluation,
                not one small request after another.
            progress: is called with the number of examples of each batch.

        Raises:
            UserError: the batch size is no positive whole number.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"The batch size is {batch_size!r}; give a whole number from 1 on.")
        longest = max(len(example.inputs) for example in examples)
        prefix = prefix_length(self.injection)
        registry.check_positions(self.model.config, longest, program.answer, prefix)
        results: list[np.ndarray] = [np.empty(0)] * len(examples)

        def collect(numbers, output):
            for number, row in zip(numbers, np.asarray(processes.fetch(output)), strict=True):
                if number >= 0:
                    results[number] = row
            progress(int((numbers >= 0).sum()))

        waiting = None
        for numbers, output in self._outputs(program, examples, batch_size, pack):
            if waiting is not None:
                collect(*waiting)
            waiting = numbers, output
        if waiting is not None:
            collect(*waiting)
        return np.stack(results)

    def compile(
        self, program: Program, injection: Injection, model: registry.Model
    ) -> Callable[[Batch], jax.Array]:
        """The program as a function of a batch; a new shape is compiled at its first call."""
        compiled = _compiled(
            self.mesh, program.function, program.teacher_forced, model, program.settings
        )
        shared = (injection, *program.operands)

        def run(batch: Batch) -> jax.Array:
            placed = batch if self.mesh is None else parallel.put_batch(batch, self.mesh)
            return compiled(self.params, shared, placed)

        return run

    def _outputs(
        self, program: Program, examples: Sequence[Example], batch_size: int, pack: bool
    ) -> Iterator[tuple[np.ndarray, jax.Array]]:
        """The numbers of the examples of each batch, and its results on the devices."""
        inputs = [example.inputs for example in examples]
        for model, chosen in registry.by_shared_prefix(self.model, inputs, self.prompt_length):
            injection = _prepare(self.params, self.injection, model)
            group = [examples[number] for number in chosen]
            placed, batches = self._batches(model, program.logits, group, batch_size, pack)
            compiled = self.compile(program, injection, placed)
            for batch, numbers in batches:
                yield np.where(numbers < 0, -1, chosen[numbers]), compiled(batch)

    def _batches(
        self, model: registry.Model, logits: int, examples: Sequence[Example], max_rows: int,
        pack: bool,
    ) -> tuple[registry.Model, Iterator[tuple[Batch, np.ndarray]]]:  # fmt: skip
        devices = parallel.num_batch_shards(self.mesh)
        rows = -(-max_rows // devices) * devices  # filled with empty rows
        if pack:
            mixed = self.injection.layers is not None and self.num_members > 1
            model = model.with_layout(one_member_per_row=True) if mixed else model
            lengths = [len(example.inputs) for example in examples]
            if len(examples) >= FEWEST_PACKED and _count_widths(lengths) >= FEWEST_LENGTHS:
                packed, per_batch = registry.plan_microbatches(
                    model, lengths, batch_size=rows, devices=devices, target_length=logits,
                    max_widths=6,  # without a gradient they compile in half the time
                )  # fmt: skip
                if packed is not model:
                    target_length = round_target_length(max(len(e.targets) for e in examples))
                    return packed, packed_rows(
                        examples, parts=-(-len(examples) // per_batch), devices=devices,
                        layout=packed.layout, target_length=target_length,
                    )  # fmt: skip
        budget = registry.budget(model.config, devices, training=False)
        limits = BatchLimits(rows, devices, budget, logits)
        return model, inference_batches(examples, limits, model.layout)


def make_engine(
    params: registry.Params,
    injection: Injection,
    model: registry.Model,
    mesh: Mesh | None = None,
) -> Engine:
    """The engine of these weights. What programs ask of the weights is done here, once."""
    return Engine(quantization.view_as_uint16(params), injection, model, mesh)


def _count_widths(lengths: Sequence[int]) -> int:
    return len(set(map(round_input_length, lengths)))


_traces: list[object] = []  # one entry for each program; it only grows


def num_compilations() -> int:
    """How many programs this process has compiled for engines and servers.

    It stays the same while requests only ask for shapes that were there before.
    """
    return len(_traces)


def count_compilation(function: object) -> None:
    """Count a program. A function that is compiled calls it while jax traces it, which is once."""
    _traces.append(function)


@functools.lru_cache(maxsize=256)
def _compiled(mesh, function, teacher_forced, model, settings):
    placed = model.on(parallel.place_in(mesh))

    def apply_to_rows(params, shared, batch):
        count_compilation(function)
        injection, *operands = shared
        injection = injection.for_rows(len(batch.inputs), batch.member)
        rows = batch.inputs, batch.segments
        if teacher_forced:
            rows += batch.targets, batch.target_segments
        return function(params, injection, placed, *rows, *operands, **dict(settings))

    return jax.jit(parallel.shard_over_batch(apply_to_rows, mesh, model.logical_axes()))


@functools.partial(jax.jit, static_argnames=("model",))
def _prepare(params, injection, model):
    return model.prepare(params, injection)
