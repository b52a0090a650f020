"""Which examples are in a batch. Batch k is a pure function of the seed and k.

So a resumed run needs no state of the data pipeline.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxprompt.data.batches import Batch, Example
from jaxprompt.data.layout import target_lengths
from jaxprompt.data.microbatches import Cut, micro_batches

EpochOrder = Callable[[int, int, int], Int[np.ndarray, " n"]]  # (count, seed, epoch) -> order


def epoch_order(count: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    """The order of an epoch: a permutation of ``count`` examples."""
    return _rng(seed, epoch, stream=0).permutation(count).astype(np.int32)


def order_cache(count: int) -> "functools._lru_cache_wrapper[Int[np.ndarray, ' n']]":
    """``epoch_order`` with a cache for so many sets of rows: of this epoch and of the next one."""
    return functools.lru_cache(maxsize=2 * count)(epoch_order)


def batch_indices(
    lengths: Int[np.ndarray, " n"],
    *,
    batch_size: int,
    seed: int,
    step: int,
    window: int,
    order_of: EpochOrder = epoch_order,
) -> Int[np.ndarray, " B"]:
    """The numbers of the examples in batch ``step``: a pure function of the arguments.

    An epoch is a permutation of the examples; those that do not fill a batch are left out. With a
    ``window``, the rows of so many batches are sorted by length and cut into batches again, and the
    order of these batches is shuffled.

    Args:
        lengths: of all examples. If there are fewer than a batch, they are repeated to fill it.
        window: 0 keeps the plain random batches of the paper.
        order_of: ``epoch_order`` or ``order_cache``. An order of many examples takes milliseconds.
    """
    count = len(lengths)
    per_epoch = max(count // batch_size, 1)
    epoch, position = divmod(step, per_epoch)
    order = np.resize(order_of(count, seed, epoch), per_epoch * batch_size)
    batches = order.reshape(per_epoch, batch_size)
    if window == 0:
        return batches[position]
    first = position - position % window
    chunk = batches[first : first + window].reshape(-1)
    # the sort is stable and the permutation breaks ties: equal lengths stay in random order
    chunk = chunk[np.argsort(lengths[chunk], kind="stable")].reshape(-1, batch_size)
    return chunk[_rng(seed, epoch, stream=first + 1).permutation(len(chunk))[position - first]]


def _rng(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """A counter-based generator: epochs and streams are independent in whatever order they come."""
    key = np.array([seed % 2**64, epoch], np.uint64)  # NumPy refuses a negative key
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))


def random_stream(seed: int, step: int) -> np.random.Generator:
    """The generator of batch ``step``, independent of those of all other batches."""
    return _rng(seed, step, stream=2**40)


def dropout_seeds(rng: np.random.Generator, size: int) -> Int[np.ndarray, " B"]:
    """The numbers from which the dropout of ``size`` examples is drawn."""
    return rng.integers(2**31, size=size, dtype=np.int32)


def with_dropout_seeds(examples: Sequence[Example], rng: np.random.Generator) -> list[Example]:
    """The examples, each with a ``dropout_seed`` from ``rng``."""
    seeds = dropout_seeds(rng, len(examples)).tolist()
    return [e._replace(dropout_seed=seed) for e, seed in zip(examples, seeds, strict=True)]


def mixing_shares(
    rows: Sequence[int],
    weights: Sequence[float] | None = None,
    *,
    temperature: float | None = 1.0,
    cap: int | None = None,
) -> Float[np.ndarray, " M"]:
    """The shares of M tasks in a mixture: examples-proportional mixing with a limit.

    Raffel et al. 2020 (arXiv 1910.10683), section 3.5.2: min(rows, cap) over its sum, to the power
    of 1 / temperature, times the weight, and normalized again.

    Args:
        rows: training rows of each task.
        temperature: 1 is proportional, more is more equal; None is equal but for the weights.
        cap: the artificial limit of rows, K in the paper; None for none.

    >>> mixing_shares([100, 300, 9000], cap=600).tolist()
    [0.1, 0.3, 0.6]
    """
    limited = np.minimum(np.array(rows, float), cap or np.inf)
    power = 0.0 if temperature is None else 1 / temperature
    shares = (limited / limited.sum()) ** power * (1.0 if weights is None else np.array(weights))
    return shares / shares.sum()


# Places of a mixture come in cycles in which each task has its share, in random order
_CYCLE = 2**14


class Part(NamedTuple):
    """The examples of a task among ``MixedExamples``: all of its rows for each template."""

    first: int  # number of its first example; the templates follow each other
    rows: int
    templates: int


class MixedExamples(Sequence[Example]):
    """Examples of several tasks, or of several templates, of which batches are drawn.

    It is a sequence of all examples. Each task goes through its rows in epochs of its own. Which
    template a row comes with is drawn for each place of each batch.
    """

    def __init__(
        self, tasks: Sequence[Sequence[Sequence[Example]]], shares: Sequence[float] = (1.0,)
    ):
        """Args:
        tasks: of each task the examples of its rows, for each of its templates.
        shares: of each task, with the sum 1.
        """
        self.tasks, self.shares = tasks, tuple(shares)
        self.parts: list[Part] = []  # of each task
        self._examples: list[Example] = []
        for number, templates in enumerate(tasks):
            self.parts.append(Part(len(self._examples), len(templates[0]), len(templates)))
            self._examples += [e._replace(task=number) for each in templates for e in each]
        self._counts = _counts(self.shares)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, number):
        return self._examples[number]

    def indices(
        self,
        lengths: Int[np.ndarray, " n"],
        *,
        batch_size: int,
        seed: int,
        step: int,
        window: int,
        order_of: EpochOrder = epoch_order,
    ) -> Int[np.ndarray, " B"]:
        """As ``batch_indices``, which it equals for one task with one template.

        Several tasks have no epoch in common, so every window has all of its batches.
        """
        if len(self.parts) == 1:
            rows = self.parts[0].rows
            numbers = batch_indices(
                lengths[:rows], batch_size=batch_size, seed=seed, step=step, window=window,
                order_of=order_of,
            )  # fmt: skip
            return self._with_templates(np.zeros(batch_size, int), numbers, seed, step)
        first = step - step % window if window else step
        batches = []
        for each in range(first, first + max(window, 1)):
            places = each * batch_size + np.arange(batch_size)
            rows_of = self._rows_at(places, seed, order_of)
            batches.append(self._with_templates(*rows_of, seed, each))
        chunk = np.concatenate(batches)
        if not window:
            return chunk
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")].reshape(-1, batch_size)
        return chunk[_rng(seed, first, stream=2**42).permutation(window)[step - first]]

    def _with_templates(
        self, tasks: Int[np.ndarray, " B"], numbers: Int[np.ndarray, " B"], seed: int, step: int
    ) -> Int[np.ndarray, " B"]:
        """The examples of rows of tasks, each with a template that is drawn for batch ``step``."""
        first, rows, templates = np.array(self.parts).T[:, tasks]
        chosen = 0
        if templates.max() > 1:
            drawn = _rng(seed, step, stream=2**41).random(len(tasks))
            chosen = (drawn * templates).astype(int)
        return first + chosen * rows + numbers

    def _rows_at(
        self, places: Int[np.ndarray, " B"], seed: int, order_of: EpochOrder
    ) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
        """The task, and the row of it, at these places of the run."""
        tasks, numbers = np.zeros((2, len(places)), int)
        for at, (cycle, place) in enumerate(zip(*divmod(places, _CYCLE), strict=True)):
            order, turns = _cycle(self._counts, seed, int(cycle))
            task = tasks[at] = order[place]
            rows = self.parts[task].rows
            epoch, turn = divmod(int(cycle) * self._counts[task] + int(turns[place]), rows)
            numbers[at] = order_of(rows, seed, epoch)[turn]
        return tasks, numbers


def _counts(shares: Sequence[float]) -> tuple[int, ...]:
    """How many places of a cycle each task has: its share, rounded, and at least one."""
    exact = np.array(shares) * _CYCLE
    counts = np.maximum(np.floor(exact), 1).astype(int)
    rest = _CYCLE - counts.sum()
    if rest > 0:
        counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    else:
        counts[counts.argmax()] += rest
    return tuple(counts.tolist())


@functools.lru_cache(maxsize=16)
def _cycle(
    counts: tuple[int, ...], seed: int, cycle: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The task of each place of a cycle, and how often the task was there before in it."""
    order = _rng(seed, cycle, stream=2**42).permutation(np.repeat(np.arange(len(counts)), counts))
    turns = np.zeros_like(order)
    for task, count in enumerate(counts):
        turns[order == task] = np.arange(count)
    return order, turns


class Draw(NamedTuple):
    """Which examples the batches of a run have."""

    batch_size: int  # examples of each member
    seeds: Sequence[int]  # of each member
    window: int = 0  # see ``batch_indices``


def training_batches(
    examples: Sequence[Sequence[Example]],
    draw: Draw,
    cut: Cut = Cut(),
    *,
    start: int = 0,
    relabel: Callable[[Example, int], Example] = lambda example, member: example,
    complete: Callable[[Sequence[Example]], Sequence[Example]] = list,
) -> Iterator[list[Batch]]:
    """Batches ``start``, ``start + 1``, ... without end, made ahead of time by grain's threads.

    Args:
        examples: of each member; members may have the same sequence.
        draw: member k has the batches that its examples and ``draw.seeds[k]`` give, as if alone.
        cut: each batch comes as its micro-batches.
        start: the number of the first batch.
        relabel: ``relabel(example, k)`` makes an example one of member k.
        complete: is given all examples of a batch, before it is cut.
    """
    import grain

    unique = {id(each): each for each in examples}
    lengths = {key: np.array([len(e.inputs) for e in each]) for key, each in unique.items()}
    # one target length for each bucket: as few shapes as there are buckets
    depths = target_lengths([len(e.targets) for each in unique.values() for e in each])
    mixed = [len(each.tasks) if isinstance(each, MixedExamples) else 1 for each in examples]
    order_of = order_cache(sum(mixed))

    def batch(step: int) -> list[Batch]:
        chosen: list[Example] = []
        for member, (seed, dataset) in enumerate(zip(draw.seeds, examples, strict=True)):
            indices = dataset.indices if isinstance(dataset, MixedExamples) else batch_indices
            numbers = indices(
                lengths[id(dataset)], batch_size=draw.batch_size, seed=seed,
                step=start + int(step), window=draw.window, order_of=order_of,
            )  # fmt: skip
            members_own = [relabel(dataset[i], member) for i in numbers]
            chosen += with_dropout_seeds(members_own, random_stream(seed, start + int(step)))
        return micro_batches(
            complete(chosen), rows=cut.rows or len(chosen), target_length=depths, layout=cut.layout,
            devices=cut.devices, budget=cut.budget,
        )  # fmt: skip

    steps = grain.MapDataset.range(2**31 - 1 - start).map(batch)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(steps.to_iter_dataset(options))
