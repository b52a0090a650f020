"""The losses of a run that compare labels, as its config asks for them."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.mixture import parts_of
from jaxprompt.config.schema import TaskConfig, TrainConfig
from jaxprompt.data.batches import Example
from jaxprompt.data.label_sets import label_sets, with_choices, with_class
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.data.verbalizers import first_words
from jaxprompt.losses import LabelLoss
from jaxprompt.models.label_tree import label_holes, label_trees, one_token_each


class LabelChoices(NamedTuple):
    """What a step minimises, and how the examples of a whole batch get what it reads."""

    loss: LabelLoss
    complete: Callable[[Sequence[Example]], list[Example]]

    @property
    def nodes(self) -> int:
        """Logits over the vocabulary that each example needs at once."""
        return self.loss.labels.trees.num_nodes


def compares_labels(settings: TrainConfig) -> bool:
    """Whether a run minimises more than cross-entropy."""
    return bool(settings.unlikelihood_loss or settings.length_normalized_loss)


def check_labels_to_compare(settings: TrainConfig, task: TaskConfig) -> None:
    """Raise a UserError where labels are to be compared and the task has none."""
    if not compares_labels(settings) or len(task.labels or ()) >= 2:
        return
    raise UserError(
        "train.unlikelihood_loss and train.length_normalized_loss compare labels, and task "
        f"{task.name!r} has {len(task.labels or ()) or 'none'}; leave them out, or name two or "
        "more labels in task.labels."
    )


def label_choices(
    settings: TrainConfig,
    tasks: Sequence[TaskConfig],
    tokenizer: Tokenizer,
    soft: bool = False,
) -> LabelChoices | None:
    """What compares the labels of members, or None where nothing does.

    Args:
        tasks: of each member, by slot; one may be a mixture.
        soft: label rows answer, those of all members for the same labels.

    Raises:
        UserError: labels cannot be compared, or members with label rows have other labels.
    """
    if not compares_labels(settings) and not soft:
        return None
    encoded = [
        tokenizer.encode_targets(first_words(part), part.separator)
        for task in tasks
        for part in parts_of(task)
    ]
    first = [0, *itertools.accumulate(len(parts_of(task)) for task in tasks)]
    set_of = lambda example: first[example.member] + example.task
    if soft:
        _check_same_labels(tasks)
        rows = LabelLoss(one_token_each(len(encoded[0]), tokenizer.masked), z_loss=settings.z_loss)
        return LabelChoices(rows, partial(with_class, sets=encoded, set_of=set_of))
    labels = label_sets(encoded)
    loss = LabelLoss(
        label_holes(labels.tokens) if tokenizer.masked else label_trees(labels.tokens),
        settings.unlikelihood_loss,
        settings.length_normalized_loss,
        settings.z_loss,
    )
    return LabelChoices(loss, partial(with_choices, labels=labels, set_of=set_of))


def _check_same_labels(tasks: Sequence[TaskConfig]) -> None:
    each = {tuple(task.labels or ()) for task in tasks}
    if len(each) > 1:
        raise UserError(
            f"Members of a run with method=soft-verbalizer have the labels "
            f"{' and '.join(map(shown, each))}, and their rows go together only for the same "
            "labels; train each task in a run of its own."
        )
