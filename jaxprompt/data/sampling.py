"""Which examples are in a batch. Batch k is a pure function of the seed and k.

So a resumed run needs no state of the data pipeline.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxprompt.data.batches import Batch, Example
from jaxprompt.data.layout import target_lengths
from jaxprompt.data.microbatches import Cut, micro_batches

EpochOrder = Callable[[int, int, int], Int[np.ndarray, " n"]]  # (count, seed, epoch) -> order


def epoch_order(count: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    """The order of an epoch: a permutation of ``count`` examples."""
    return _rng(seed, epoch, stream=0).permutation(count).astype(np.int32)


def order_cache(members: int) -> "functools._lru_cache_wrapper[Int[np.ndarray, ' n']]":
    """``epoch_order`` with a cache of two orders a member: of this epoch and of the next one."""
    return functools.lru_cache(maxsize=2 * members)(epoch_order)


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
    order_of = order_cache(len(draw.seeds))

    def batch(step: int) -> list[Batch]:
        chosen: list[Example] = []
        for member, (seed, dataset) in enumerate(zip(draw.seeds, examples, strict=True)):
            numbers = batch_indices(
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
