"""What a study is: variants, each of them one run over several seeds, and the paper's findings.

A study is planned from the options of ``jaxprompt reproduce`` alone. The plan is written beside the
results. So the report knows which runs were asked for and are missing.
"""

import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from pydantic import BaseModel

from jaxprompt.config.schema import TaskConfig
from jaxprompt.config.values import Value
from jaxprompt.studies.baselines import Record
from jaxprompt.studies.runs import Key, Measure, Run, Settings, of_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Mapping[Key, Record]
Table: TypeAlias = list[list[str]]  # the first line is the head


class StudyPlan(BaseModel):
    """The options of a study."""

    study: str
    backbones: dict[str, str]  # name -> path; the first one is meant where one is needed
    tasks: dict[str, TaskConfig]
    seeds: int = 3
    length: int = 100
    recipe: str = "paper"
    settings: Settings = {}  # of runs, over those of the recipe
    span: str | None = None  # the backbone before its LM adaptation
    adapted: dict[str, int] = {}  # names among the backbones -> steps of LM adaptation
    methods: list[str] = []  # that are compared; none: those of the study
    rows: list[int] = []  # training rows of few-shot runs

    def run(
        self,
        method: str,
        task: str,
        /,
        *,
        backbone: str | None = None,
        length: int | None = None,
        seed: int | None = None,
        variant: str | None = None,
        **settings: Value,
    ) -> Run:
        """A run with the plan's settings under its own (dots are written ``__``)."""
        given = {key.replace("__", "."): value for key, value in settings.items()}
        overrides = of_method(self.settings, method) | given
        name = backbone or next(iter(self.backbones))
        return Run(name, task, method, length, seed, variant, overrides)

    def prompts(self, task: str, *, length: int | None = None, **more: Value) -> list[Run]:
        """Prompt tuning over all seeds."""
        length = self.length if length is None else length
        return [self.run("prompt", task, length=length, seed=s, **more) for s in range(self.seeds)]

    def full(self, task: str, **more: Value) -> list[Run]:
        """Full fine-tuning over all seeds."""
        return [self.run("full", task, seed=seed, **more) for seed in range(self.seeds)]


def score(record: Record) -> float | None:
    """The main metric, on test rows where there are any."""
    return record["test"] if record.get("test") is not None else record.get("validation")


def illegal(record: Record) -> float | None:
    """Share of greedy outputs that are no label."""
    return record.get("illegal")


class Variant(NamedTuple):
    """A line of a table: one run over several seeds."""

    label: str
    group: str  # the table and the panel it belongs to
    runs: Sequence[Run]
    x: float | str | None = None  # the place on the axis, or a record's field; None: a bar
    series: str = "prompt tuning"
    read: Callable[[Record], float | None] = score
    paper: float | None = None  # what the paper reports, for its own model
    judged: bool = True  # whether the paper's findings apply to it

    def complete(self, records: Records) -> list[Record]:
        """The records of its runs that are complete."""
        return [records[run.key] for run in self.runs if run.key in records]

    def values(self, records: Records) -> list[float]:
        """One value for each complete run."""
        values = (self.read(record) for record in self.complete(records))
        return [value for value in values if value is not None]


def majority_of(variants: Iterable[Variant], records: Records) -> float | None:
    """The score of always answering the largest class, on the rows that ``score`` is of."""
    for variant in variants:
        for record in variant.complete(records):
            if record.get("majority") is not None:
                on_test = record.get("test") is not None
                return record["majority_test" if on_test else "majority"]
    return None


def seeds_text(count: int) -> str:
    """The number with its noun."""
    return f"{count} seed" if count == 1 else f"{count} seeds"


class Hypothesis(NamedTuple):
    """A finding of the paper: ``left`` is above (>), below (<) or about as good as (~) ``right``.

    Both are labels of variants in the same group.

    group: the one that it is said of; None: each that has both. A group whose smaller values are
    the better ones, such as forgetting, needs hypotheses of its own.
    """

    left: str
    sign: str
    right: str
    finding: str
    group: str | None = None

    def is_of(self, group: str, labels: Collection[str]) -> bool:
        """Whether it is said of a group with these labels."""
        return self.group in (None, group) and {self.left, self.right} <= {*labels}

    def verdict(self, left: Sequence[float], right: Sequence[float]) -> str:
        """Whether the finding holds in our runs.

        A difference counts if it is above twice its standard error, from the spread over seeds.
        """
        if not left or not right:
            return "not run"
        difference = statistics.mean(left) - statistics.mean(right)
        if min(len(left), len(right)) < 2:
            return f"cannot be told from one seed ({difference:+.3f})"
        error = sum(statistics.variance(v) / len(v) for v in (left, right)) ** 0.5
        seen = "~" if abs(difference) <= 2 * error else ">" if difference > 0 else "<"
        holds = "holds" if seen == self.sign else "does not hold"
        return f"{holds} here ({difference:+.3f}, standard error {error:.3f})"


class Study(NamedTuple):
    """Something to find out, how, and what the paper records."""

    title: str
    paper: str
    variants: Callable[[StudyPlan], list[Variant]]
    hypotheses: Sequence[Hypothesis] = ()
    axis: str = ""
    needs: str | None = None  # an option that the study cannot do without
    summary: Callable[[StudyPlan, Records], list[str]] = lambda plan, records: []
    # of studies whose tables are not those of their groups
    tables: Callable[[StudyPlan, Records], list[tuple[str, Table]]] | None = None
    notes: Callable[[StudyPlan], list[str]] = lambda plan: []
    # of studies whose figure is not one of their groups: draws into a path
    draw: Callable[[StudyPlan, Records, Path], Path | None] | None = None
    # panels of the figure behind those of the groups, by title
    panels: Callable[[StudyPlan, Records], Mapping[str, Callable[["Axes"], None]]] = (
        lambda plan, records: {}
    )
    # raises a UserError for a plan that the study cannot run
    check: Callable[[StudyPlan], None] = lambda plan: None
    # how its runs are measured, see ``Suite``
    measure: Measure | None = None
    source: str = "Paper"  # what ``paper`` is the record of


FULL = "full fine-tuning"


def fine_tuning(plan: StudyPlan, task: str) -> Variant:
    """Full fine-tuning, the reference of the column "recovery"."""
    return Variant(FULL, task, plan.full(task), series=FULL)
