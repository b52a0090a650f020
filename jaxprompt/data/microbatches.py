"""Micro-batches: a batch is cut into rows of similar lengths, or into rows that examples share."""

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxprompt.data.batches import Batch, Example, fill_rows, make_batch
from jaxprompt.data.layout import BatchBudget, BatchLayout, round_input_length, round_target_length

# ``balance_rows`` compares at most so many pairs of examples: a few tenths of a second
_MOST_PAIRS = 2**25


class Cut(NamedTuple):
    """How a batch is cut into micro-batches, see ``micro_batches``."""

    rows: int | None = None  # of a micro-batch; None: the batch is one
    layout: BatchLayout = BatchLayout()
    devices: int = 1
    budget: BatchBudget = BatchBudget()


def micro_rows(
    lengths: Int[np.ndarray, " n"], *, batch_size: int, positions: int, multiple: int = 1
) -> int:
    """How many rows a micro-batch has: the largest divisor of the batch size that fits.

    Rows of the mean length must fit ``positions``. So the work is bounded on average, and every
    micro-batch is full.

    Args:
        lengths: of all inputs.
        positions: rows times their mean length, at most.
        multiple: devices that share the rows; the answer is a multiple of it.
    """
    divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0 and n % multiple == 0]
    mean = max(float(np.mean(lengths)), 1.0)
    return max([n for n in divisors if n * mean <= positions], default=divisors[0])


def micro_batches(
    examples: Sequence[Example],
    *,
    rows: int,
    target_length: int | Sequence[int] | None = None,
    layout: BatchLayout = BatchLayout(),
    devices: int = 1,
    budget: BatchBudget = BatchBudget(),
) -> list[Batch]:
    """A batch as micro-batches of ``rows`` rows of similar length, the longest rows first.

    Their gradients add up to the gradient of the whole batch, and few positions are padding: rows
    of 9, 70, 12 and 95 tokens are two micro-batches of 2 rows, 96 and 32 wide, instead of one, 96
    wide.

    Args:
        target_length: of all micro-batches. Of several lengths each micro-batch has the least that
            holds its targets, and rows are sorted by that first. So one target of 200 tokens makes
            one micro-batch 200 wide.
        layout: if it lets examples share rows, each of ``devices`` gets one row that holds as many
            examples as the device would else have rows.
        budget: a micro-batch that is too large for it is cut once more. The shapes of the parts
            follow from its lengths alone, so no more shapes are compiled.
    """
    lengths = target_length or round_target_length(max(len(e.targets) for e in examples))
    if layout.examples_per_row > 1:
        parts = len(examples) // rows
        batches = packed_rows(
            examples, parts=parts, devices=devices, layout=layout, target_length=lengths
        )
        return [batch for batch, _ in batches]
    padded_lengths = [_shortest_that_holds(lengths, [example]) for example in examples]
    sizes = [
        (padded_length, len(e.inputs))
        for padded_length, e in zip(padded_lengths, examples, strict=True)
    ]
    batches = []
    for part in length_sorted_microbatches(sizes, rows):
        padded_length = padded_lengths[part[0]]
        width = round_input_length(max(len(examples[i].inputs) for i in part), layout)
        fitting = budget.rows(rows, width, padded_length, devices)
        batches += [
            make_batch(
                [examples[i] for i in part[first : first + fitting]],
                rows=fitting, input_length=width, target_length=padded_length,
            )
            for first in range(0, len(part), fitting)
        ]  # fmt: skip
    return batches


def length_sorted_microbatches(
    lengths: Sequence[int] | Sequence[tuple[int, ...]], rows: int
) -> list[list[int]]:
    """The row numbers of each micro-batch: ``rows`` of similar lengths, the longest first.

    Args:
        lengths: numbers, or tuples of numbers of which the first counts most.

    >>> length_sorted_microbatches([3, 9, 4, 8], rows=2)
    [[1, 3], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)  # stable
    return [order[first : first + rows] for first in range(0, len(order), rows)]


def balance_rows(lengths: Sequence[int], count: int, max_per_row: int) -> list[list[int]]:
    """Distribute examples over ``count`` rows that are about equally long.

    The longest examples are placed first, each in the row that is shortest. Then the longest row
    swaps examples with others as long as that makes it shorter. Rows of many thousands of examples
    are about equally long without swaps, so ``_MOST_PAIRS`` ends the swaps early.

    Args:
        lengths: of the examples.
        max_per_row: examples in a row.

    Returns:
        The numbers of the examples in each row.

    >>> balance_rows([3, 9, 4, 8], count=2, max_per_row=2)
    [[0, 1], [2, 3]]
    """
    sizes = np.array(lengths)
    row_of, total = np.zeros(len(sizes), int), np.zeros(count, int)
    shortest = [(0, row, 0) for row in range(count)]  # a heap: length of a row, its number, held
    for i in np.argsort(-sizes, kind="stable"):
        length, row, held = heapq.heappop(shortest)
        row_of[i], total[row] = row, length + sizes[i]
        if held + 1 < max_per_row:
            heapq.heappush(shortest, (int(total[row]), row, held + 1))
    pairs = 0
    while pairs < _MOST_PAIRS:
        longest = total.argmax()
        inside = np.flatnonzero(row_of == longest)
        pairs += len(inside) * len(sizes)
        less = sizes[inside, None] - sizes
        worst = np.maximum(total[longest] - less, total[row_of] + less)
        worst[(less <= 0) | (row_of == longest)] = total[longest]
        i, j = np.unravel_index(worst.argmin(), worst.shape)
        if worst[i, j] >= total[longest]:
            break
        total[longest] -= less[i, j]
        total[row_of[j]] += less[i, j]
        row_of[inside[i]], row_of[j] = row_of[j], longest
    rows: list[list[int]] = [[] for _ in range(count)]
    for i, row in enumerate(row_of.tolist()):
        rows[row].append(i)
    return rows


def _rows_of_members(
    members: Sequence[int], lengths: Sequence[int], count: int, layout: BatchLayout
) -> list[list[int]]:
    """``balance_rows`` for each member apart, of which each gets its share of ``count`` rows."""
    groups = []
    for member in dict.fromkeys(members):
        own = [i for i, each in enumerate(members) if each == member]
        needed = -(-len(own) // layout.examples_per_row)
        rows = max(needed, count * len(own) // len(members))
        parts = balance_rows([lengths[i] for i in own], rows, layout.examples_per_row)
        groups += [[own[i] for i in part] for part in parts]
    return groups


def packed_rows(
    examples: Sequence[Example],
    *,
    parts: int,
    devices: int,
    layout: BatchLayout,
    target_length: int | Sequence[int],
) -> Iterator[tuple[Batch, Int[np.ndarray, " R"]]]:
    """``parts`` batches of one row for each of ``devices``; examples share the rows.

    All rows have the same width, so that hardly a position is padding and one shape is compiled.

    Args:
        layout: how many examples may share a row, and how long each may be.
        target_length: of all batches. Of several lengths each batch has the least that holds its
            targets.

    Yields:
        A batch, and for each row of its targets the number of the example that it answers, or -1.

    Raises:
        ValueError: an example is longer than ``layout`` allows.
    """
    lengths = [len(example.inputs) for example in examples]
    if max(lengths) > layout.max_packed_length:
        raise ValueError(
            f"An example has {max(lengths)} ids, more than {layout.max_packed_length}."
        )
    max_per_row, rows = layout.examples_per_row, parts * devices
    if layout.one_member_per_row:
        groups = _rows_of_members([example.member for example in examples], lengths, rows, layout)
        groups += [[] for _ in range(-len(groups) % devices)]
    else:
        groups = balance_rows(lengths, rows, max_per_row)
    width = max(sum(lengths[i] for i in group) for group in groups)
    width = -(-width // 64) * 64
    empty = Example(np.zeros(0, np.int32), np.zeros(0, np.int32))
    for first in range(0, len(groups), devices):
        rows = groups[first : first + devices]
        numbers = np.array([[*g, *[-1] * (max_per_row - len(g))] for g in rows], int)
        answers = [empty if i < 0 else examples[i]._replace(inputs=empty.inputs)
                   for i in numbers.flat]  # fmt: skip
        padded_length = _shortest_that_holds(target_length, answers)
        batch = make_batch(answers, input_length=1, target_length=padded_length)
        inputs = [[examples[i].inputs for i in group] for group in rows]
        ids, segments = fill_rows(inputs, devices, width)
        yield batch._replace(inputs=ids, segments=segments), numbers.reshape(-1)


def _shortest_that_holds(lengths: int | Sequence[int], examples: Sequence[Example]) -> int:
    """The least of the target lengths that holds all targets; a single length is not checked."""
    if isinstance(lengths, int):
        return lengths
    if len(lengths) == 1:
        return lengths[0]
    longest = max(len(e.targets) for e in examples)
    return min(length for length in lengths if length >= longest)
