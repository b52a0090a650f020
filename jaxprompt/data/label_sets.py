"""The labels of a run's tasks, and which of them each example of a batch chooses from."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxprompt.config.errors import UserError
from jaxprompt.data.batches import Choices, Example


class LabelSets(NamedTuple):
    """C different labels of S sets, of which two may have labels in common."""

    tokens: Int[np.ndarray, "C T"]  # ids with EOS, -1 after a label's end
    included: Bool[np.ndarray, "S C"]  # which labels each set has
    numbers: dict[tuple[int, ...], int]  # of a label's ids, the number of the label

    @property
    def lengths(self) -> Int[np.ndarray, " C"]:
        """The tokens of each label."""
        return (self.tokens >= 0).sum(axis=1)


def label_sets(sets: Sequence[Sequence[Sequence[int]]]) -> LabelSets:
    """The labels of all sets, each once, in the order in which they come.

    Args:
        sets: of each set the ids of its labels, each with EOS.

    >>> label_sets([[[5, 1], [6, 1]], [[6, 1], [5, 7, 1]]]).included.astype(int).tolist()
    [[1, 1, 0], [0, 1, 1]]
    """
    labels = list(dict.fromkeys(tuple(ids) for each in sets for ids in each))
    numbers = {ids: number for number, ids in enumerate(labels)}
    tokens = np.full((len(labels), max(map(len, labels))), -1, np.int32)
    for row, ids in zip(tokens, labels, strict=True):
        row[: len(ids)] = ids
    included = np.zeros((len(sets), len(labels)), bool)
    for row, each in zip(included, sets, strict=True):
        row[[numbers[tuple(ids)] for ids in each]] = True
    return LabelSets(tokens, included, numbers)


def with_choices(
    examples: Sequence[Example], labels: LabelSets, set_of: Callable[[Example], int]
) -> list[Example]:
    """The examples of a whole batch, each with the labels that it is asked to choose from.

    A step divides sums by the number of target tokens of a member. Each weight here has that number
    as its numerator, so that terms become means over what they have in the batch: over the tokens
    of all wrong labels, and over the examples. They are known before a batch is cut.

    Args:
        examples: of all members.
        set_of: the number of the set that an example chooses from.

    Raises:
        UserError: a target is no label of its set.
    """
    lengths, chosen = labels.lengths, []
    totals: dict[int, np.ndarray] = {}  # of each member: target tokens, wrong tokens, examples
    for example in examples:
        wrong = labels.included[set_of(example)].copy()
        right = labels.numbers.get(tuple(example.targets.tolist()))
        if right is None or not wrong[right]:
            raise UserError(
                f"A target with the ids {example.targets.tolist()} is no label of its task, and "
                "train.unlikelihood_loss and train.length_normalized_loss compare labels; leave "
                "them out, or name all targets in task.labels."
            )
        wrong[right] = False
        chosen.append((right, wrong))
        counts = np.array([lengths[right], lengths[wrong].sum(), 1])
        totals[example.member] = totals.get(example.member, 0) + counts
    return [
        example._replace(choices=_weighted(right, wrong, totals[example.member]))
        for example, (right, wrong) in zip(examples, chosen, strict=True)
    ]


def with_class(
    examples: Sequence[Example],
    sets: Sequence[Sequence[Sequence[int]]],
    set_of: Callable[[Example], int],
) -> list[Example]:
    """The examples, each with the number of its target among the labels of its set.

    Args:
        examples: of a batch.
        sets: of each set the ids of its labels, each with EOS; all have as many labels.
        set_of: the number of the set that an example chooses from.

    Raises:
        UserError: a target is no label of its set.
    """
    numbers = [{tuple(ids): number for number, ids in enumerate(each)} for each in sets]
    nothing = np.zeros((), np.float32)
    chosen = []
    for example in examples:
        right = numbers[set_of(example)].get(tuple(example.targets.tolist()))
        if right is None:
            raise UserError(
                f"A target with the ids {example.targets.tolist()} is no label of its task, and "
                "method=soft-verbalizer chooses among labels; name all targets in task.labels."
            )
        wrong = np.arange(len(sets[0])) != right
        choices = Choices(np.array(right, np.int32), wrong, nothing, nothing)
        chosen.append(example._replace(choices=choices))
    return chosen


def _weighted(right: int, wrong: Bool[np.ndarray, " C"], totals: Int[np.ndarray, "3"]) -> Choices:
    tokens, wrong_tokens, count = totals.tolist()
    weights = np.array([tokens / max(wrong_tokens, 1), tokens / count], np.float32)
    return Choices(np.array(right, np.int32), wrong, weights[0, ...], weights[1, ...])
