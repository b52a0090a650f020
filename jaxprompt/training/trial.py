"""A trial: one member of a run, with the task that it learns."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

from jaxprompt.config.methods import SECTIONS, SETTINGS_OF
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.training.datasets import TaskDataset

# what members must have in common to share one pytree
Structure: TypeAlias = tuple[int, str]  # virtual tokens, and the settings of the method's parts


class MetricName(NamedTuple):
    """How the metric of a trial is named in logs."""

    prefix: str  # of all names of its task: "TASK/", or "" where a run has one task
    metric: str


@dataclass(frozen=True)
class Trial:
    """One prompt, or one whole model, that a run trains. It knows nothing of other trials.

    number: its place among the members of the run, which never changes. Its slot, the place in the
    arrays of the state, changes when other trials stop: see ``Progress.active``.
    task_dir: where the best of all trials of its task is kept.
    own_dir: where its own best is kept; None for the only trial of a run.
    """

    number: int
    config: RunConfig
    dataset: TaskDataset
    prefix: str
    task_dir: Path
    own_dir: Path | None

    @property
    def task(self) -> TaskConfig:
        return self.dataset.task

    @property
    def length(self) -> int:
        """Virtual tokens of its prompt; 0 for a whole model."""
        return self.dataset.length

    @property
    def structure(self) -> Structure:
        """What decides the shapes of its trainables, and what they do to the model."""
        return structure_of(self.config, self.length)

    @property
    def metric(self) -> str:
        """The metric that selects its best step."""
        return self.dataset.metric

    @property
    def name(self) -> MetricName:
        return MetricName(self.prefix, self.metric)


def structure_of(config: RunConfig, length: int) -> Structure:
    """The structure of a member with so many virtual tokens."""
    sections = {SETTINGS_OF[part] for part in config.parts} & {*SECTIONS}
    settings = [
        getattr(config, section).model_dump_json(exclude={"learning_rate"})
        for section in sorted(sections)
    ]
    if "low-rank-prompt" in config.parts:
        settings.append(f"rank {config.prompt.rank}")
    return length, ";".join(settings)


def make_trials(config: RunConfig, datasets: Sequence[TaskDataset]) -> tuple[Trial, ...]:
    """The trials of a run, in the order of its members.

    Args:
        datasets: the dataset of each member.
    """
    folder, members = Path(config.output), config.members()
    one_task = len({dataset.task.name for dataset in datasets}) == 1
    return tuple(
        Trial(
            number=number,
            config=member,
            dataset=dataset,
            prefix="" if one_task else f"{dataset.task.name}/",
            task_dir=folder if one_task else folder / "tasks" / dataset.task.name,
            own_dir=folder / "population" / str(number) if len(members) > 1 else None,
        )
        for number, (member, dataset) in enumerate(zip(members, datasets, strict=True))
    )


def by_task(trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    """The trials of each task, by its name, in their order."""
    tasks: dict[str, list[Trial]] = {}
    for trial in trials:
        tasks.setdefault(trial.task.name, []).append(trial)
    return tasks


def slot_order(trials: Iterable[Trial]) -> list[Trial]:
    """The trials as they follow each other in the state: those of one structure stand together."""
    return sorted(trials, key=lambda trial: (trial.structure, trial.number))
