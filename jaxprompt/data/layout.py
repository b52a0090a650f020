"""The shapes of batches: how wide rows are, how many there are, and which examples share them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Few shapes mean few compilations. Beyond 384 the steps grow, so that at most a quarter is padding.
INPUT_LENGTHS = (*range(32, 385, 32), 448, 512, 640, 768, 1024)
# Targets of one bucket share batches: up to 16 tokens (labels), up to 64, and so on times 4
SHORTEST_TARGET_BUCKET = 16


@dataclass(frozen=True)
class BatchLayout:
    """Which examples share a row of a batch, and how wide rows are. Frozen and hashable.

    The caller that makes batches chooses the layout, and gives the same one to the model. The
    compiled program depends on the layout, and on nothing else of what a batch contains.
    """

    # Every row starts with the vectors of one prompt, in order; this is their number. A
    # decoder-only model then computes their keys and values once for all rows. 0: no promise.
    shared_prefix_length: int = 0
    fine_buckets: bool = False  # lengths in steps of 16 up to 256: more shapes, less padding
    # Examples that share a row are computed at the least of these widths that holds them. No
    # example is longer than the last. Empty: each example has a row of its own.
    packed_widths: tuple[int, ...] = ()
    examples_per_row: int = 1  # at most; each is then answered in a row of its own
    # Examples of several members never share a row. Needed where members change the layers.
    one_member_per_row: bool = False

    @property
    def max_packed_length(self) -> int:
        """The longest example that may share a row; 0 where none do."""
        return max(self.packed_widths, default=0)


class BatchBudget(NamedTuple):
    """How much one batch or micro-batch may hold, whatever the lengths of its examples."""

    positions: float = math.inf  # rows times the wider of inputs and targets
    targets: float = math.inf  # rows times the length of targets: each position has V logits

    def rows(self, max_rows: int, width: int, target_length: int, devices: int = 1) -> int:
        """``max_rows`` rows, halved until rows of these lengths fit.

        Args:
            max_rows: rows to start from.
            width: length of the inputs.
            target_length: length of the targets.
            devices: the answer is a multiple of it.

        >>> BatchBudget(positions=2048).rows(32, width=200, target_length=4)
        8
        >>> BatchBudget().rows(32, width=200, target_length=4)
        32
        """
        rows = max_rows
        while rows > devices and (
            rows * max(width, target_length) > self.positions or rows * target_length > self.targets
        ):
            rows = -(-rows // (2 * devices)) * devices
        return rows


def round_input_length(length: int, layout: BatchLayout = BatchLayout()) -> int:
    """The smallest width of the fixed set that holds ``length`` (multiples of 512 at the top)."""
    length -= layout.shared_prefix_length
    fine = range(16, 257, 16) if layout.fine_buckets else ()
    for size in (*fine, *INPUT_LENGTHS):
        if length <= size:
            return layout.shared_prefix_length + size
    return layout.shared_prefix_length + -(-length // 512) * 512


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
