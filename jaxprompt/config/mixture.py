"""Several tasks that one set of trainables learns together."""

from pydantic import Field

from jaxprompt.config.schema import Positive, Schema, TaskConfig, Weight
from jaxprompt.config.values import Values


class MixtureConfig(Schema):
    """Keys of ``task`` where it is a mixture, see ``data.sampling.mixing_shares``."""

    name: str = Field(default="mixture", description="Name of the mixture, for logs and folders.")
    mixture: dict[str, Weight | Values] = Field(
        min_length=1,
        description=(
            "Several tasks that are learnt together: the name of each, with its weight (1 for as "
            "T5), or with keys of the task to change, of which `weight` may be one. Example: "
            "{boolq: 1, rte: 2, mine: {train: own.csv, validation: few.csv, template: '{text}'}}."
        ),
    )
    temperature: float | None = Field(
        default=1.0,
        gt=0,
        description=(
            "Mixture: a task's share is its weight times the number of its training rows to the "
            "power of 1 / temperature (Raffel et al. 2020, section 3.5.2). null: the weight alone."
        ),
    )
    cap: Positive | None = Field(
        default=None,
        description=(
            "Mixture: a task with more training rows counts as if it had so many; T5 tried "
            "2^16 to 2^21. null: all count."
        ),
    )


class Mixture(TaskConfig):
    """A mixture with its tasks resolved.

    It stands where a run has its task. Its own template is that of the first task and is not used.
    Its one metric is the mean of the first metrics of its tasks.
    """

    tasks: tuple[TaskConfig, ...]
    weights: tuple[float, ...]
    temperature: float | None = 1.0
    cap: int | None = None


def parts_of(task: TaskConfig) -> tuple[TaskConfig, ...]:
    """The tasks of a mixture, or the one task that it is."""
    return task.tasks if isinstance(task, Mixture) else (task,)
