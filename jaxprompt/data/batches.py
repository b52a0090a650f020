"""Examples and batches: examples are padded, or packed several to a row."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxprompt.data.layout import BatchLayout, round_input_length, round_target_length

AnyArray = np.ndarray | jax.Array  # NumPy's until a batch is put on a mesh, then jax's


class Choices(NamedTuple):
    """Which of the C labels of a run an example is asked to choose from, see ``label_sets.py``.

    Of one example, or of R rows of targets. Rows without an example have weight 0.
    """

    right: Int[AnyArray, "*R"]  # the number of the label that is its target
    wrong: Bool[AnyArray, "*R C"]  # the other labels that its task has
    token_weight: Float[AnyArray, "*R"]  # of each token of a wrong label
    example_weight: Float[AnyArray, "*R"]  # of the choice itself


class Example(NamedTuple):
    """One example: ids of tokens and virtual tokens, with EOS at the end."""

    inputs: Int[np.ndarray, " s"]
    targets: Int[np.ndarray, " t"]
    member: int = 0  # the number of the member of the run (the prompt) that it belongs to
    dropout_seed: int | None = None  # its dropout is drawn from this number
    choices: Choices | None = None  # for losses that compare labels
    task: int = 0  # the number of its task in a mixture


def with_member(example: Example, member: int, vocabulary: int, length: int) -> Example:
    """The example of member 0 as one of another member.

    Args:
        member: the other member.
        vocabulary: the first virtual id.
        length: vectors of each member. Ids of member 0's vectors become ids of ``member``'s.
    """
    if member == 0:
        return example
    ids = example.inputs
    shifted = np.where(ids < vocabulary, ids, ids + member * length)
    return example._replace(inputs=shifted.astype(np.int32), member=member)


class Batch(NamedTuple):
    """What the model is trained and evaluated on. Segment 0 is padding.

    A batch has no positions. Segments are contiguous, so offsets in the row are enough for
    relative positions, and the offset from a segment's start follows from the segments.

    Targets may have G times as many rows as inputs (``packed_rows``). Rows b G to b G + G - 1 of
    the targets then answer segments 1, 2, ... of row b of the inputs, in order, and each is
    segment 1 of its own row.

    ``member`` says which member of the run owns each of the R rows of targets; R is B or G B.
    Where examples of several members share a row of targets it is [R, G]: one number for each
    segment 1, 2, ... of the row.
    """

    inputs: Int[AnyArray, "B S"]
    segments: Int[AnyArray, "B S"]
    targets: Int[AnyArray, "R T"]
    target_segments: Int[AnyArray, "R T"]
    member: Int[AnyArray, " R *G"]
    weights: Float[AnyArray, "R T"]
    dropout_seed: Int[AnyArray, " R"] | None = None  # of each row of targets; None: no dropout
    choices: Choices | None = None  # of each row of targets; None where the loss compares no labels


def make_batch(
    examples: Sequence[Example],
    *,
    rows: int | None = None,
    input_length: int | None = None,
    target_length: int | None = None,
    layout: BatchLayout = BatchLayout(),
) -> Batch:
    """One example a row, padded.

    Examples ([9 8 1], [5 1]) and ([7 1], [6 1]) with input_length 4 and target_length 3 give
    inputs [[9 8 1 0] [7 1 0 0]], segments [[1 1 1 0] [1 1 0 0]],
    targets [[5 1 0] [6 1 0]], weights [[1 1 0] [1 1 0]].

    Args:
        rows: B; rows after the last example are empty. Default: one for each example.
        input_length: S. Default: the longest input, rounded up as ``layout`` says.
        target_length: T. Default: the longest target, rounded up.
    """
    return pack_batch(
        [[example] for example in examples],
        rows=rows, input_length=input_length, target_length=target_length, layout=layout,
    )  # fmt: skip


def pack_batch(
    rows_of_examples: Sequence[Sequence[Example]],
    *,
    rows: int | None = None,
    input_length: int | None = None,
    target_length: int | None = None,
    layout: BatchLayout = BatchLayout(),
) -> Batch:
    """Several examples a row, as segments 1, 2, ... that do not see each other.

    One row of ([9 8 1], [5 1]) and ([7 1], [6 1]) gives inputs [[9 8 1 7 1 0 ...]],
    segments [[1 1 1 2 2 0 ...]], targets [[5 1 6 1]], target_segments [[1 1 2 2]].
    The other arguments are those of ``make_batch``.
    """
    inputs = [[example.inputs for example in row] for row in rows_of_examples]
    targets = [[example.targets for example in row] for row in rows_of_examples]
    width = input_length or round_input_length(_longest(inputs), layout)
    target_length = target_length or round_target_length(_longest(targets))
    count = rows or len(rows_of_examples)
    input_ids, input_segments = fill_rows(inputs, count, width)
    target_ids, target_segments = fill_rows(targets, count, target_length)
    seeds = [row[0].dropout_seed if row else None for row in rows_of_examples]
    seeds += [None] * (count - len(seeds))
    return Batch(
        input_ids,
        input_segments,
        target_ids,
        target_segments,
        _members(rows_of_examples, count),
        (target_segments > 0).astype(np.float32),
        None if set(seeds) == {None} else np.array([n or 0 for n in seeds], np.int32),
        _choices(rows_of_examples, count),
    )


def _choices(rows_of_examples: Sequence[Sequence[Example]], count: int) -> Choices | None:
    """``Batch.choices`` of ``count`` rows."""
    each = [row[0].choices if row else None for row in rows_of_examples]
    some = next((choices for choices in each if choices is not None), None)
    if some is None:
        return None
    if any(len(row) > 1 for row in rows_of_examples):
        raise ValueError("Examples with labels to choose from have rows of targets of their own.")
    empty = Choices(*map(np.zeros_like, some))
    each += [None] * (count - len(each))
    return Choices(*map(np.stack, zip(*(choices or empty for choices in each), strict=True)))


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


def fill_rows(
    rows: Sequence[Sequence[np.ndarray]], count: int, width: int
) -> tuple[Int[np.ndarray, "B S"], Int[np.ndarray, "B S"]]:
    """Ids and segments of ``count`` rows; the arrays of a row follow each other without a gap."""
    ids, segments = np.zeros((2, count, width), np.int32)
    for number, row in enumerate(rows):
        if not row:
            continue
        flat = np.concatenate(row)
        ids[number, : len(flat)] = flat
        marks = np.repeat(np.arange(1, len(row) + 1), [len(part) for part in row])
        segments[number, : len(flat)] = marks
    return ids, segments
