"""From examples to batches. Batch k is a pure function of the seed and k, so resuming is exact."""

import functools
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxprompt.data.layout import BatchLayout

AnyArray = Any  # NumPy's until a batch is put on a mesh, then jax's

# Few shapes mean few compilations; beyond 384 the steps grow, so that at most a quarter is padding
INPUT_LENGTHS = (*range(32, 385, 32), 448, 512, 640, 768, 1024)
# Targets of one bucket share batches: up to 16 tokens (labels), up to 64, and so on times 4
SHORTEST_TARGET_BUCKET = 16
# ``shares`` compares at most so many pairs of examples: a few tenths of a second
_MOST_PAIRS = 2**25


class Example(NamedTuple):
    """One example: ids that may be virtual, EOS last."""

    inputs: Int[np.ndarray, " s"]
    targets: Int[np.ndarray, " t"]
    member: int = 0  # number of the member of the run (the prompt) that it belongs to
    dropout_seed: int | None = None  # a number that its dropout is drawn from


def with_member(example: Example, member: int, vocabulary: int, length: int) -> Example:
    """The example of member 0 as one of another member.

    Ids of member 0's ``length`` vectors become ids of the vectors of ``member``.
    """
    if member == 0:
        return example
    ids = example.inputs
    shifted = np.where(ids < vocabulary, ids, ids + member * length)
    return example._replace(inputs=shifted.astype(np.int32), member=member)


class Room(NamedTuple):
    """How much one batch, or one micro-batch, may hold, whatever its examples are like."""

    positions: float = math.inf  # rows times the wider of inputs and targets
    targets: float = math.inf  # rows times the length of targets: each position has V logits

    def rows(self, most: int, width: int, depth: int, devices: int = 1) -> int:
        """``most`` rows, halved until rows of these lengths fit; a multiple of ``devices``.

        >>> Room(positions=2048).rows(32, width=200, depth=4), Room().rows(32, 200, 4)
        (8, 32)
        """
        rows = most
        while rows > devices and (
            rows * max(width, depth) > self.positions or rows * depth > self.targets
        ):
            rows = -(-rows // (2 * devices)) * devices
        return rows


class Batch(NamedTuple):
    """What the model is trained and evaluated on; NumPy until the mesh. Segment 0 is padding.

    Positions are not carried: segments are contiguous, so offsets in the row are enough for
    relative positions, and the offset from a segment's start can be had from the segments.
    Targets may have G times as many rows as inputs: those from b G on then answer, as their segment
    1, segments 1, 2, ... of row b of the inputs, in order (``packed_rows``).

    ``member`` says which member of the run owns each row of targets, R of them: R is B or G B.
    Where examples of several members share a row of targets it is [R, G], one number for each
    segment 1, 2, ... of the row.
    """

    inputs: Int[AnyArray, "B S"]
    segments: Int[AnyArray, "B S"]
    targets: Int[AnyArray, "R T"]
    target_segments: Int[AnyArray, "R T"]
    member: Int[AnyArray, " R *G"]
    weights: Float[AnyArray, "R T"]
    dropout_seed: Int[AnyArray, " R"] | None = None  # of each row of targets; None: no dropout


def round_input_length(length: int, widths: BatchLayout = BatchLayout()) -> int:
    """The smallest length of the fixed set that holds ``length`` (multiples of 512 at the top)."""
    length -= widths.shared_prefix_length
    fine = range(16, 257, 16) if widths.fine_buckets else ()
    for size in (*fine, *INPUT_LENGTHS):
        if length <= size:
            return widths.shared_prefix_length + size
    return widths.shared_prefix_length + -(-length // 512) * 512


def round_target_length(length: int) -> int:
    """The next power of two, at least 4."""
    return max(4, 1 << (max(length, 1) - 1).bit_length())


def target_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """The longest target of each bucket that is not empty, shortest first.

    Buckets end at 16, 64, 256, ... tokens, so that labels are always in one.

    >>> target_lengths([2, 4, 3, 200, 150]), target_lengths([2, 5])
    ((4, 200), (5,))
    """
    longest: dict[int, int] = {}
    for length in set(lengths):
        bucket = SHORTEST_TARGET_BUCKET
        while bucket < length:
            bucket *= 4
        longest[bucket] = max(length, longest.get(bucket, 0))
    return tuple(longest[bucket] for bucket in sorted(longest))


def make_batch(
    examples: Sequence[Example],
    *,
    rows: int | None = None,
    input_length: int | None = None,
    target_length: int | None = None,
    widths: BatchLayout = BatchLayout(),
) -> Batch:
    """One example a row, padded; rows after the last example are empty.

    Examples ([9 8 1], [5 1]) and ([7 1], [6 1]) with input_length 4 and target_length 3 give
    inputs [[9 8 1 0] [7 1 0 0]], segments [[1 1 1 0] [1 1 0 0]],
    targets [[5 1 0] [6 1 0]], weights [[1 1 0] [1 1 0]].
    """
    return pack_batch(
        [[example] for example in examples],
        rows=rows, input_length=input_length, target_length=target_length, widths=widths,
    )  # fmt: skip


def pack_batch(
    rows_of_examples: Sequence[Sequence[Example]],
    *,
    rows: int | None = None,
    input_length: int | None = None,
    target_length: int | None = None,
    widths: BatchLayout = BatchLayout(),
) -> Batch:
    """Several examples a row, as segments 1, 2, ... that do not see each other.

    One row of ([9 8 1], [5 1]) and ([7 1], [6 1]) gives inputs [[9 8 1 7 1 0 ...]],
    segments [[1 1 1 2 2 0 ...]], targets [[5 1 6 1]], target_segments [[1 1 2 2]].
    """
    inputs = [[example.inputs for example in row] for row in rows_of_examples]
    targets = [[example.targets for example in row] for row in rows_of_examples]
    width = input_length or round_input_length(_longest(inputs), widths)
    depth = target_length or round_target_length(_longest(targets))
    count = rows or len(rows_of_examples)
    input_ids, input_segments = _fill(inputs, count, width)
    target_ids, target_segments = _fill(targets, count, depth)
    drawn = [row[0].dropout_seed if row else None for row in rows_of_examples]
    drawn += [None] * (count - len(drawn))
    return Batch(
        input_ids,
        input_segments,
        target_ids,
        target_segments,
        _members(rows_of_examples, count),
        (target_segments > 0).astype(np.float32),
        None if set(drawn) == {None} else np.array([n or 0 for n in drawn], np.int32),
    )


def _members(rows_of_examples: Sequence[Sequence[Example]], count: int) -> Int[np.ndarray, " R *G"]:
    """``Batch.member`` of ``count`` rows; rows without an example belong to member 0."""
    rows = [[example.member for example in row] for row in rows_of_examples]
    if all(len(set(row)) <= 1 for row in rows):
        members = np.zeros(count, np.int32)
        members[: len(rows)] = [row[0] if row else 0 for row in rows]
        return members
    members = np.zeros((count, max(map(len, rows))), np.int32)
    for number, row in enumerate(rows):
        members[number, : len(row)] = row
    return members


def _longest(rows: Sequence[Sequence[np.ndarray]]) -> int:
    return max((sum(map(len, row)) for row in rows), default=1)


def _fill(rows: Sequence[Sequence[np.ndarray]], count: int, width: int):
    ids, segments = np.zeros((2, count, width), np.int32)
    for number, row in enumerate(rows):
        if not row:
            continue
        flat = np.concatenate(row)
        ids[number, : len(flat)] = flat
        marks = np.repeat(np.arange(1, len(row) + 1), [len(part) for part in row])
        segments[number, : len(flat)] = marks
    return ids, segments


def epoch_order(count: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    """The permutation of ``count`` examples that an epoch is."""
    return _random(seed, epoch, stream=0).permutation(count).astype(np.int32)


def order_cache(prompts: int) -> Any:
    """``epoch_order`` that keeps what steps ask for: of each prompt this epoch and the next one."""
    return functools.lru_cache(maxsize=2 * prompts)(epoch_order)


def batch_indices(
    lengths: Int[np.ndarray, " n"],
    *,
    batch_size: int,
    seed: int,
    step: int,
    window: int,
    order_of: Callable[[int, int, int], Int[np.ndarray, " n"]] = epoch_order,
) -> Int[np.ndarray, " B"]:
    """Which examples make up batch ``step``: a pure function of its arguments.

    An epoch is a permutation without its ragged tail. Within each ``window`` batches of it rows are
    sorted by length and cut into batches, whose order is shuffled again; window 0 keeps the plain
    random batches of the paper. Fewer examples than a batch are repeated to fill it.
    order_of: ``epoch_order``, or ``order_cache``: an order of many examples takes milliseconds.
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
    # stable, and the permutation breaks ties: equal lengths stay in random order
    chunk = chunk[np.argsort(lengths[chunk], kind="stable")].reshape(-1, batch_size)
    return chunk[_random(seed, epoch, stream=first + 1).permutation(len(chunk))[position - first]]


def _random(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """Counter-based, so that epochs and streams are independent without being drawn in order."""
    key = np.array([seed % 2**64, epoch], np.uint64)  # numpy wants no negative key
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))


def random_stream(seed: int, step: int) -> np.random.Generator:
    """The random numbers of batch ``step``, independent of those of every other batch."""
    return _random(seed, step, stream=2**40)


def dropout_seeds(rng: np.random.Generator, size: int) -> Int[np.ndarray, " B"]:
    """What dropout of so many examples is drawn from."""
    return rng.integers(2**31, size=size, dtype=np.int32)


def with_noise(examples: Sequence[Example], rng: np.random.Generator) -> list[Example]:
    """The examples with what their dropout is drawn from."""
    drawn = dropout_seeds(rng, len(examples)).tolist()
    return [e._replace(dropout_seed=number) for e, number in zip(examples, drawn, strict=True)]


def length_sorted_microbatches(lengths: Sequence[Any], rows: int) -> list[list[int]]:
    """Numbers of the rows of each micro-batch: ``rows`` of similar lengths, the longest first.

    lengths: numbers, or tuples of them of which the first counts most.

    >>> sorted_parts([3, 9, 4, 8], rows=2)
    [[1, 3], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)  # stable
    return [order[first : first + rows] for first in range(0, len(order), rows)]


def balance_rows(lengths: Sequence[int], count: int, most: int) -> list[list[int]]:
    """Numbers of the examples of each of ``count`` rows that are about equally long.

    No row has more than ``most``. The longest are placed first, each in the row that is shortest;
    then the longest row swaps examples with others as long as that makes it shorter. For many
    thousands of examples, whose rows are about equally long without swaps, ``_MOST_PAIRS`` ends
    this early.

    >>> shares([3, 9, 4, 8], count=2, most=2)
    [[0, 1], [2, 3]]
    """
    sizes = np.array(lengths)
    row_of, total = np.zeros(len(sizes), int), np.zeros(count, int)
    room = [(0, row, 0) for row in range(count)]  # a heap: the shortest row, and how many it has
    for i in np.argsort(-sizes, kind="stable"):
        length, row, held = heapq.heappop(room)
        row_of[i], total[row] = row, length + sizes[i]
        if held + 1 < most:
            heapq.heappush(room, (int(total[row]), row, held + 1))
    pairs = 0
    while pairs < _MOST_PAIRS:
        longest = total.argmax()
        own = np.flatnonzero(row_of == longest)
        pairs += len(own) * len(sizes)
        less = sizes[own, None] - sizes
        worst = np.maximum(total[longest] - less, total[row_of] + less)
        worst[(less <= 0) | (row_of == longest)] = total[longest]
        i, j = np.unravel_index(worst.argmin(), worst.shape)
        if worst[i, j] >= total[longest]:
            break
        total[longest] -= less[i, j]
        total[row_of[j]] += less[i, j]
        row_of[own[i]], row_of[j] = row_of[j], longest
    rows: list[list[int]] = [[] for _ in range(count)]
    for i, row in enumerate(row_of.tolist()):
        rows[row].append(i)
    return rows


def packed_rows(
    examples: Sequence[Example],
    *,
    parts: int,
    devices: int,
    widths: BatchLayout,
    target_length: int | Sequence[int],
) -> Iterator[tuple[Batch, Int[np.ndarray, " R"]]]:
    """``parts`` batches of a row for each of ``devices``, which are filled with examples.

    With each batch, the numbers of the examples that its rows of targets answer, -1 where none.
    All rows are as wide, so that hardly a position is wasted and one shape is compiled. Of several
    target lengths each batch has the least that holds its targets. Raises ValueError for an example
    that ``widths`` does not allow.
    """
    lengths = [len(example.inputs) for example in examples]
    if max(lengths) > widths.max_packed_length:
        raise ValueError(
            f"An example has {max(lengths)} ids, more than {widths.max_packed_length}."
        )
    most = widths.examples_per_row
    groups = balance_rows(lengths, parts * devices, most)
    width = max(sum(lengths[i] for i in group) for group in groups)
    width = -(-width // 64) * 64
    none = Example(np.zeros(0, np.int32), np.zeros(0, np.int32))
    for first in range(0, len(groups), devices):
        own = groups[first : first + devices]
        numbers = np.array([[*group, *[-1] * (most - len(group))] for group in own])
        answers = [none if i < 0 else examples[i]._replace(inputs=none.inputs)
                   for i in numbers.flat]  # fmt: skip
        depth = _least(target_length, answers)
        batch = make_batch(answers, input_length=1, target_length=depth)
        inputs = [[examples[i].inputs for i in group] for group in own]
        ids, segments = _fill(inputs, devices, width)
        yield batch._replace(inputs=ids, segments=segments), numbers.reshape(-1)


def _least(lengths: int | Sequence[int], examples: Sequence[Example]) -> int:
    """The least of the target lengths that holds all targets; a lone one is not looked at."""
    if isinstance(lengths, int):
        return lengths
    if len(lengths) == 1:
        return lengths[0]
    longest = max(len(e.targets) for e in examples)
    return min(length for length in lengths if length >= longest)


def micro_batches(
    examples: Sequence[Example],
    *,
    rows: int,
    target_length: int | Sequence[int] | None = None,
    widths: BatchLayout = BatchLayout(),
    devices: int = 1,
    room: Room = Room(),
) -> list[Batch]:
    """A batch as micro-batches of ``rows`` rows of similar length, the longest rows first.

    Their gradients add up to the whole batch's, and few positions are padding: rows of 9, 70, 12
    and 95 tokens are two micro-batches of 2 rows, 96 and 32 wide, instead of one, 96 wide.
    target_length: of all micro-batches. Of several lengths each has the least that holds its
    targets, and rows are sorted by that first: one target of 200 tokens makes one of them 200 deep.
    room: those that are too large for it are cut once more. Their shapes follow from their lengths
    alone, so that there are no more of them to compile.
    Where ``widths`` wants rows to be shared, each of ``devices`` has one with as many examples as
    would else be its rows.
    """
    lengths = target_length or round_target_length(max(len(e.targets) for e in examples))
    if widths.examples_per_row > 1:
        parts = len(examples) // rows
        batches = packed_rows(
            examples, parts=parts, devices=devices, widths=widths, target_length=lengths
        )
        return [batch for batch, _ in batches]
    depth_of = [_least(lengths, [example]) for example in examples]
    sizes = [(depth, len(e.inputs)) for depth, e in zip(depth_of, examples, strict=True)]
    batches = []
    for part in length_sorted_microbatches(sizes, rows):
        depth = depth_of[part[0]]
        width = round_input_length(max(len(examples[i].inputs) for i in part), widths)
        fitting = room.rows(rows, width, depth, devices)
        batches += [
            make_batch(
                [examples[i] for i in part[first : first + fitting]],
                rows=fitting, input_length=width, target_length=depth,
            )
            for first in range(0, len(part), fitting)
        ]  # fmt: skip
    return batches


def micro_rows(
    lengths: Int[np.ndarray, " n"], *, batch_size: int, positions: int, multiple: int = 1
) -> int:
    """Rows of a micro-batch: of the divisors of the batch size, the most that fit ``positions``.

    Those of the mean length, that is: what is computed is bounded, and every micro-batch is full.
    ``multiple``: devices that share the rows.
    """
    divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0 and n % multiple == 0]
    mean = max(float(np.mean(lengths)), 1.0)
    return max([n for n in divisors if n * mean <= positions], default=divisors[0])


class Draw(NamedTuple):
    """Which examples the batches of a run have."""

    batch_size: int  # examples of each member
    seeds: Sequence[int]  # of each member
    window: int = 0  # see ``batch_indices``


class Cut(NamedTuple):
    """How a batch is cut into micro-batches, see ``micro_batches``."""

    rows: int | None = None  # of a micro-batch; None: the batch is one
    layout: BatchLayout = BatchLayout()
    devices: int = 1
    room: Room = Room()


def training_batches(
    examples: Sequence[Sequence[Example]],
    draw: Draw,
    cut: Cut = Cut(),
    *,
    start: int = 0,
    relabel: Callable[[Example, int], Example] = lambda example, member: example,
) -> Iterator[list[Batch]]:
    """Batches ``start``, ``start + 1``, ... without end, made ahead of time by grain's threads.

    Args:
        examples: those of each member; members may have the same sequence.
        draw: member k has the batches that its examples and ``draw.seeds[k]`` give, as if alone.
        cut: each batch comes as its micro-batches.
        start: the number of the first batch.
        relabel: ``relabel(example, k)`` makes an example one of member k.
    """
    import grain

    unique = {id(each): each for each in examples}
    lengths = {key: np.array([len(e.inputs) for e in each]) for key, each in unique.items()}
    # as long as the longest of all in a bucket: as few shapes as there are buckets
    depths = target_lengths([len(e.targets) for each in unique.values() for e in each])
    order_of = order_cache(len(draw.seeds))

    def batch(step: int) -> list[Batch]:
        chosen: list[Example] = []
        for member, (seed, own) in enumerate(zip(draw.seeds, examples, strict=True)):
            numbers = batch_indices(
                lengths[id(own)], batch_size=draw.batch_size, seed=seed, step=start + int(step),
                window=draw.window, order_of=order_of,
            )  # fmt: skip
            drawn = [relabel(own[i], member) for i in numbers]
            chosen += with_noise(drawn, random_stream(seed, start + int(step)))
        return micro_batches(
            chosen, rows=cut.rows or len(chosen), target_length=depths, widths=cut.layout,
            devices=cut.devices, room=cut.room,
        )  # fmt: skip

    steps = grain.MapDataset.range(2**31 - 1 - start).map(batch)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(steps.to_iter_dataset(options))
