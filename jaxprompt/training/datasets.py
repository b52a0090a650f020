"""What prompts of a run learn: splits of a task, tokenized with as many virtual tokens in place."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprompt.config.errors import UserError
from jaxprompt.config.limits import SPLITS
from jaxprompt.config.paths import as_folder
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.data.batches import Example
from jaxprompt.data.examples import tokenize
from jaxprompt.data.references import Reference, references
from jaxprompt.data.rows import Rows as RowsOfSplit
from jaxprompt.data.targets import as_written, label_warnings, unknown_targets
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.data.tasks.splits import load_rows
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.data.truncation import Truncation, of_task
from jaxprompt.data.virtual_tokens import VirtualTokens
from jaxprompt.evaluation.metrics import check_metrics
from jaxprompt.training.label_losses import check_labels_to_compare

Rows = Mapping[str, RowsOfSplit]  # of each split


class Split(NamedTuple):
    """Tokenized rows and the answers to compare predictions with."""

    examples: Sequence[Example]
    references: list[Reference]
    truncation: Truncation
    warnings: Sequence[str] = ()  # of targets that no answer can equal

    def digest(self) -> str:
        """SHA-256 of all ids and of what predictions are compared with, in their order."""
        digest = hashlib.sha256()
        for example, reference in zip(self.examples, self.references, strict=True):
            for ids in (example.inputs, example.targets):
                digest.update(b"%d " % len(ids) + np.asarray(ids, np.int64).tobytes())
            digest.update(repr(reference).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


class TaskDataset(NamedTuple):
    """A task's splits for prompts of one length, which have number 0 in all examples."""

    task: TaskConfig
    length: int
    training: Split
    validation: Split
    test: Split | None

    @property
    def metric(self) -> str:
        """The one that selects prompts."""
        return self.task.metrics[0]

    def splits(self) -> list[Split]:
        """Those that there are."""
        return [self.training, self.validation, *([self.test] if self.test else [])]


def tasks_of(members: Sequence[RunConfig]) -> list[TaskConfig]:
    """The task of each prompt. Raises UserError where results of two could not be told apart."""
    tasks = [resolve_task(member.task) for member in members]
    by_name = {task.name: task for task in tasks}
    for member, task in zip(members, tasks, strict=True):
        check_metrics(task)
        check_labels_to_compare(member.train, task)
        if task != by_name[task.name]:
            raise UserError(
                f"prompt.population.task has different tasks of the name {task.name!r}; give each "
                "a name of its own."
            )
        if len(by_name) > 1:
            as_folder(task.name, "task")
    return tasks


def read_splits(task: TaskConfig, eval_rows: int | None, held: Rows | None = None) -> Rows:
    """The rows of all splits that the task has; of validation at most ``eval_rows``.

    A test figure is of all test rows. ``held`` has the rows of splits that are in memory.

    Raises UserError for a row that cannot be trained on or, of other splits, judged.
    """
    rows = {
        name: load_rows(
            task, name, eval_rows if name == "validation" else None, (held or {}).get(name)
        )
        for name in SPLITS
        if name != "test" or task.test
    }
    for name in rows.keys() - {"train"}:
        references(task, rows[name], getattr(task, name))
    return rows


def build_split(
    task: TaskConfig, name: str, rows: Rows, tokenizer: Tokenizer, length: int, vocabulary: int
) -> Split:
    """A split with ``length`` virtual tokens in each row, above a table of ``vocabulary`` rows."""
    origin = getattr(task, name)
    heard: list[Truncation] = []
    examples = tokenize(
        task,
        rows[name],
        tokenizer,
        VirtualTokens(vocabulary, length),
        origin=origin,
        note=heard.append,
    )
    known = references(task, rows[name], origin)
    what = f"{'training' if name == 'train' else name} targets of task {task.name!r}"
    if name == "train":  # nothing is compared with them
        odd = unknown_targets(task, known, examples, tokenizer, what)
        return Split(examples, known, heard[-1], odd)
    judged = as_written(task, known, tokenizer, what)
    return Split(examples, judged.references, heard[-1], judged.warnings)


def truncation_warnings(given: TaskDataset) -> list[str]:
    """A sentence for each split of which rows have been cut."""
    splits = {"training": given.training, "validation": given.validation, "test": given.test}
    warnings = (
        of_task(split.truncation, given.task, f"{name} rows of task {given.task.name!r}")
        for name, split in splits.items()
        if split is not None
    )
    return [text for text in warnings if text is not None]


def target_warnings(given: TaskDataset, tokenizer: Tokenizer) -> list[str]:
    """A sentence for each kind of target, or label, that answers cannot equal."""
    of_splits = [text for split in given.splits() for text in split.warnings]
    return [*label_warnings(given.task, tokenizer), *of_splits]


def build_dataset(
    task: TaskConfig, rows: Rows, tokenizer: Tokenizer, length: int, vocabulary: int
) -> TaskDataset:
    """All splits, so tokenized."""
    train, validation, *test = (
        build_split(task, name, rows, tokenizer, length, vocabulary) for name in rows
    )
    return TaskDataset(task, length, train, validation, *(test or [None]))
