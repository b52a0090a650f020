"""What prompts of a run learn: splits of a task, tokenized with as many virtual tokens in place."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

from jaxprompt.config.errors import UserError
from jaxprompt.config.limits import SPLITS
from jaxprompt.config.mixture import Mixture, parts_of
from jaxprompt.config.paths import as_folder
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.data.batches import Example
from jaxprompt.data.examples import tokenize
from jaxprompt.data.references import Reference, references
from jaxprompt.data.rows import Rows as RowsOfSplit
from jaxprompt.data.sampling import MixedExamples, mixing_shares
from jaxprompt.data.targets import as_written, label_warnings, unknown_targets
from jaxprompt.data.tasks.registry import MEAN, resolve_learnt
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

    @property
    def num_rows(self) -> int:
        """How many rows there are, each once however many templates it comes with."""
        if isinstance(self.examples, MixedExamples):
            return sum(len(templates[0]) for templates in self.examples.tasks)
        return len(self.examples)

    def digest(self) -> str:
        """SHA-256 of all ids and of what predictions are compared with, in their order."""
        digest = hashlib.sha256()
        for example, reference in zip(self.examples, self.references, strict=True):
            for ids in (example.inputs, example.targets):
                digest.update(b"%d " % len(ids) + np.asarray(ids, np.int64).tobytes())
            digest.update(repr(reference).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


class TaskDataset(NamedTuple):
    """A task's splits for prompts of one length, which have number 0 in all examples.

    parts: of a mixture the datasets of its tasks, by which it is judged. Its own splits hold the
        rows of all of them.
    """

    task: TaskConfig
    length: int
    training: Split
    validation: Split
    test: Split | None
    parts: tuple["TaskDataset", ...] = ()

    @property
    def metric(self) -> str:
        """The one that selects prompts."""
        return self.task.metrics[0]

    def splits(self) -> list[Split]:
        """Those that there are."""
        return [self.training, self.validation, *([self.test] if self.test else [])]

    def tasks(self) -> tuple["TaskDataset", ...]:
        """The datasets of the tasks that are mixed, or this one."""
        return self.parts or (self,)


def tasks_of(members: Sequence[RunConfig]) -> list[TaskConfig]:
    """What each member learns. Raises UserError where results of two could not be told apart."""
    tasks = _numbered([resolve_learnt(member.task) for member in members])
    for member, task in zip(members, tasks, strict=True):
        for part in parts_of(task):
            check_metrics(part)
            check_labels_to_compare(member.train, part)
    several = len({task.name for task in tasks}) > 1
    by_name: dict[str, TaskConfig] = {}
    for task in (*tasks, *single_tasks(tasks)):
        if task != by_name.setdefault(task.name, task):
            raise UserError(
                f"The run has different tasks of the name {task.name!r}; give each a name of its "
                "own."
            )
        if several:
            as_folder(task.name, "task")
    return tasks


def _numbered(tasks: Sequence[TaskConfig]) -> list[TaskConfig]:
    """The tasks; those of one name that differ in nothing but the template get numbers."""
    forms: dict[str, list[str]] = {}
    for task in tasks:
        known = forms.setdefault(task.model_dump_json(exclude={"template"}), [])
        known += [task.template] * (task.template not in known)
    found = []
    for task in tasks:
        known = forms[task.model_dump_json(exclude={"template"})]
        name = f"{task.name}-{known.index(task.template)}"
        found.append(task.model_copy(update={"name": name}) if len(known) > 1 else task)
    return found


def single_tasks(tasks: Sequence[TaskConfig]) -> list[TaskConfig]:
    """The tasks whose rows are read, each once: mixtures are taken apart."""
    return list({part.name: part for task in tasks for part in parts_of(task)}.values())


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
    if name == "train" and task.templates:
        forms = [
            task.model_copy(update={"template": each, "templates": []}) for each in task.templates
        ]
        each = [build_split(form, name, rows, tokenizer, length, vocabulary) for form in forms]
        return _mixed(each, MixedExamples([[split.examples for split in each]]))
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
    warnings = []
    for part in given.tasks():
        splits = {"training": part.training, "validation": part.validation, "test": part.test}
        warnings += [
            of_task(split.truncation, part.task, f"{name} rows of task {part.task.name!r}")
            for name, split in splits.items()
            if split is not None
        ]
    return [text for text in warnings if text is not None]


def target_warnings(given: TaskDataset, tokenizer: Tokenizer) -> list[str]:
    """A sentence for each kind of target, or label, that answers cannot equal."""
    of_labels = [text for part in given.tasks() for text in label_warnings(part.task, tokenizer)]
    return [*of_labels, *(text for split in given.splits() for text in split.warnings)]


def build_dataset(
    task: TaskConfig, rows: Mapping[str, Rows], tokenizer: Tokenizer, length: int, vocabulary: int
) -> TaskDataset:
    """All splits, so tokenized.

    Args:
        rows: of the splits of each task, by its name.
    """
    if isinstance(task, Mixture):
        parts = [build_dataset(part, rows, tokenizer, length, vocabulary) for part in task.tasks]
        return _mixture(task, length, parts)
    train, validation, *test = (
        build_split(task, name, rows[task.name], tokenizer, length, vocabulary)
        for name in rows[task.name]
    )
    return TaskDataset(task, length, train, validation, test[0] if test else None)


def _mixture(task: Mixture, length: int, parts: Sequence[TaskDataset]) -> TaskDataset:
    """The dataset of a mixture, from those of its tasks."""
    training = [part.training for part in parts]
    forms = [
        split.examples.tasks[0] if isinstance(split.examples, MixedExamples) else [split.examples]
        for split in training
    ]
    shares = mixing_shares(
        [len(templates[0]) for templates in forms],
        task.weights,
        temperature=task.temperature,
        cap=task.cap,
    )
    tests = [part.test for part in parts if part.test is not None]
    validation = [part.validation for part in parts]
    return TaskDataset(
        task,
        length,
        _mixed(training, MixedExamples(forms, shares.tolist())),
        _mixed(validation, [e for split in validation for e in split.examples]),
        _mixed(tests, [e for split in tests for e in split.examples]) if tests else None,
        tuple(parts),
    )


def _mixed(splits: Sequence[Split], examples: Sequence[Example]) -> Split:
    """The rows of several splits as one, of which ``examples`` are all examples in their order."""
    lost: Counter[str] = Counter()
    for split in splits:
        lost.update(split.truncation.lost)
    rows, cut = (
        sum(getattr(split.truncation, name) for split in splits) for name in ("rows", "cut")
    )
    return Split(
        examples,
        [reference for split in splits for reference in split.references],
        Truncation(rows, cut, dict(lost)),
        list(dict.fromkeys(text for split in splits for text in split.warnings)),
    )


def shares_of(given: TaskDataset) -> str | None:
    """A sentence on the shares of the tasks of a mixture; None for a task alone."""
    examples = given.training.examples
    if not given.parts or not isinstance(examples, MixedExamples):
        return None
    names = [part.task.name for part in given.parts]
    shares = zip(names, examples.shares, strict=True)
    return f"mixture {given.task.name}: " + ", ".join(
        f"{share:.1%} {name}" for name, share in shares
    )


def mixture_metrics(measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The metrics of a mixture, from those of each task by its name; the mean comes first."""
    firsts = [next(iter(metrics.values())) for metrics in measured.values()]
    each = {f"{name}/{k}": x for name, metrics in measured.items() for k, x in metrics.items()}
    return {MEAN: fmean(firsts), **each}
