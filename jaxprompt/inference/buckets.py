"""Batches of inference: shapes come from fixed buckets, so that few programs are compiled.

A batch has rows from ``row_buckets``, inputs from the fixed set of lengths
(``round_input_length``) and targets of a power of two. A bucket is chosen by how many rows there
are and how long they are, never by which tokens they hold.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxprompt.data.batches import Batch, Example, make_batch
from jaxprompt.data.layout import (
    BatchBudget,
    BatchLayout,
    round_input_length,
    round_target_length,
    target_lengths,
)


class BatchLimits(NamedTuple):
    """What bounds one batch, whatever its examples are like."""

    rows: int  # at most, a multiple of ``devices``
    devices: int = 1  # that rows go over
    budget: BatchBudget = BatchBudget()
    logits: int = 1  # positions per row whose logits a program holds at once


def row_buckets(max_rows: int, devices: int = 1) -> tuple[int, ...]:
    """The numbers of rows that a batch may have, smallest first, each a multiple of ``devices``.

    >>> row_buckets(64), row_buckets(12, devices=2)
    ((1, 2, 4, 8, 16, 32, 64), (2, 4, 8, 12))
    """
    buckets, rows = [], devices
    while rows < max_rows:
        buckets.append(rows)
        rows *= 2
    return (*buckets, max(max_rows, devices))


def fitting_rows(count: int, width: int, target_length: int, limits: BatchLimits) -> int:
    """The smallest bucket that holds ``count`` rows, or the largest that fits the budget.

    Args:
        count: rows that are left to compute.
        width: length of the inputs, in tokens.
        target_length: length of the targets, in tokens.
        limits: of the batch; a row counts ``max(target_length, limits.logits)`` positions of
            logits.
    """
    buckets = row_buckets(limits.rows, limits.devices)
    deep = max(target_length, limits.logits)
    fits = lambda rows: (
        rows * max(width, target_length) <= limits.budget.positions
        and rows * deep <= limits.budget.targets
    )
    largest = max((rows for rows in buckets if fits(rows)), default=buckets[0])
    return next(rows for rows in buckets if rows >= min(count, largest))


def inference_batches(
    examples: Sequence[Example], limits: BatchLimits, widths: BatchLayout = BatchLayout()
) -> Iterator[tuple[Batch, Int[np.ndarray, " R"]]]:
    """Batches of examples of similar lengths, longest first.

    All batches of a call have the rows that the call's number of examples asks for, or fewer where
    the budget is small, so that a last batch of few examples needs no program of its own. Targets
    of one batch are of one bucket (``target_lengths``).

    Returns:
        Pairs of a batch and the number of the example in each of its rows; -1 for empty rows.
    """
    targets = [len(example.targets) for example in examples]
    inputs = np.array([len(example.inputs) for example in examples])
    lengths = target_lengths(targets)
    bucket = np.searchsorted(lengths, targets)
    for number in reversed(range(len(lengths))):
        members = np.flatnonzero(bucket == number)
        order = members[np.argsort(-inputs[members], kind="stable")]
        target_length, count = round_target_length(lengths[number]), len(order)
        while len(order):
            width = round_input_length(int(inputs[order[0]]), widths)
            rows = fitting_rows(count, width, target_length, limits)
            numbers, order = order[:rows], order[rows:]
            chosen = [examples[i] for i in numbers]
            batch = make_batch(chosen, rows=rows, input_length=width, target_length=target_length)
            yield batch, np.pad(numbers, (0, rows - len(numbers)), constant_values=-1)
