"""What a study compares: arms, each of them the same run over seeds, and what the paper says.

A study is planned from the options of ``jaxprompt reproduce`` alone; the plan is written beside the
results, so that the report knows what was asked for and not run.
"""

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from jaxprompt.config.errors import UserError
from jaxprompt.config.names import RENAMED
from jaxprompt.config.overrides import override_value, read_config, set_value
from jaxprompt.config.paths import as_folder
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.data.tasks.splits import load_rows
from jaxprompt.data.templates import to_text
from jaxprompt.runtime.files import write_atomically
from jaxprompt.studies.baselines import Record
from jaxprompt.studies.cells import RECIPES, Cell, Key, of_method


class Plan(BaseModel):
    """The options of a study."""

    study: str
    backbones: dict[str, str]  # name -> path; the first one is meant where one is needed
    tasks: dict[str, TaskConfig]
    seeds: int = 3
    length: int = 100
    recipe: str = "paper"
    settings: dict[str, Any] = {}  # of runs, over those of the recipe
    span: str | None = None  # the backbone before its LM adaptation
    adapted: dict[str, int] = {}  # names among the backbones -> steps of LM adaptation

    def cell(
        self,
        method: str,
        task: str,
        /,
        *,
        backbone: str | None = None,
        length: int | None = None,
        seed: int | None = None,
        variant: str | None = None,
        **settings: Any,
    ) -> Cell:
        """A cell with the plan's settings under its own (dots are written ``__``)."""
        own = {key.replace("__", "."): value for key, value in settings.items()}
        own = of_method(self.settings, method) | own
        name = backbone or next(iter(self.backbones))
        return Cell(name, task, method, length, seed, variant, own)

    def prompts(self, task: str, *, length: int | None = None, **more: Any) -> list[Cell]:
        """Prompt tuning over all seeds."""
        length = self.length if length is None else length
        return [self.cell("prompt", task, length=length, seed=s, **more) for s in range(self.seeds)]

    def full(self, task: str, **more: Any) -> list[Cell]:
        """Full fine-tuning over all seeds."""
        return [self.cell("full", task, seed=seed, **more) for seed in range(self.seeds)]


def score(record: Record) -> float | None:
    """On test rows where there are any."""
    return record["test"] if record.get("test") is not None else record.get("validation")


def illegal(record: Record) -> float | None:
    """Share of greedy outputs that are no label."""
    return record.get("illegal")


class Arm(NamedTuple):
    """A line of a table: one thing over seeds."""

    label: str
    group: str  # the table and the panel it belongs to
    cells: Sequence[Cell]
    x: float | str | None = None  # its place on the axis, or the field that says it; None: a bar
    series: str = "prompt tuning"
    read: Callable[[Record], float | None] = score
    paper: float | None = None  # what the paper reports, for its own model
    judged: bool = True  # whether the paper's findings are about it

    def records(self, found: dict[Key, Record]) -> list[Record]:
        """Those that are complete."""
        return [found[cell.key] for cell in self.cells if cell.key in found]

    def values(self, found: dict[Key, Record]) -> list[float]:
        """One for each complete cell."""
        values = (self.read(record) for record in self.records(found))
        return [value for value in values if value is not None]


class Claim(NamedTuple):
    """A finding of the paper: ``left`` is above (>), below (<) or about as good as (~) ``right``.

    Both are labels of arms in the same group.
    """

    left: str
    sign: str
    right: str
    finding: str

    def verdict(self, left: Sequence[float], right: Sequence[float]) -> str:
        """What our runs say of it.

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
    """Something to find out, how, and what the paper found."""

    title: str
    paper: str
    arms: Callable[[Plan], list[Arm]]
    claims: Sequence[Claim] = ()
    axis: str = ""
    needs: str | None = None  # an option without which there is nothing to run
    summary: Callable[[Plan, Mapping[Key, Record]], list[str]] = lambda plan, found: []


FULL = "full fine-tuning"


def full_arm(plan: Plan, task: str) -> Arm:
    """The reference that recovery is measured by."""
    return Arm(FULL, task, plan.full(task), series=FULL)


def read_task(name: str) -> TaskConfig:
    """A task by name, or of a YAML file that is a task or a run."""
    if not name.endswith((".yaml", ".yml")):
        return resolve_task(name)
    values = read_config(name)
    return resolve_task(values.get("task", values))


def named(texts: Sequence[str]) -> dict[str, str]:
    """["a=1", "b"] as a mapping; what has no name of its own is named by its last part."""
    found = {}
    for text in texts:
        name, equals, path = text.partition("=")
        name, path = (name, path) if equals else (re.split(r"[/\\]", text.rstrip("/\\"))[-1], text)
        if not name or not path or name in found:
            raise UserError(f"{text!r} must have the form name=path, each name once.")
        found[as_folder(name, "backbone")] = path
    return found


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``key=value`` settings of runs as a flat mapping, each checked to be one of their keys.

    ``prompt:key=value`` and ``full:key=value`` are settings of one method's runs.
    """
    found: dict[str, Any] = {}
    runs: dict[str, dict[str, Any]] = {"prompt": {}, "full": {}}
    for override in overrides:
        key, _, text = override.partition("=")
        method, _, setting = key.rpartition(":")
        if method not in ("", *runs):
            raise UserError(f"Setting {override!r}: {method!r} is neither prompt nor full.")
        for name in (method,) if method else runs:
            set_value(runs[name], override.removeprefix(f"{method}:"))
        found[key.removesuffix(setting) + RENAMED.get(setting, setting)] = override_value(text, key)
    for values in runs.values():
        parse(RunConfig, {"task": "any", "output": "any", **values})
    return found


def relabelled(target: TaskConfig, source: TaskConfig) -> TaskConfig:
    """``target`` in the label words of ``source``, by position, as the paper's transfer does."""
    if source.labels == target.labels or not source.labels or not target.labels:
        return target
    if len(source.labels) != len(target.labels):
        raise UserError(
            f"{source.name!r} has {len(source.labels)} labels and {target.name!r} "
            f"{len(target.labels)}; transfer needs as many."
        )
    words = dict(zip(target.labels, source.labels, strict=True))
    reached = {label: label for label in target.labels} | (target.label_map or {})
    mapped = {value: words[label] for value, label in reached.items()}
    return target.model_copy(update={"labels": list(source.labels), "label_map": mapped})


def mixture(tasks: Sequence[TaskConfig], folder: Path) -> tuple[TaskConfig, list[TaskConfig]]:
    """One task of all the training rows, with task names in front, and the tasks in that form.

    Multi-task model tuning, the paper's stronger baseline: rows in proportion to their number, up
    to 2^19 of a task (Raffel et al. 2020, section 3.5.2).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        rows = []
        for task in tasks:
            for row in list(load_rows(task, split))[: 2**19]:
                text, target = to_text(task, row)
                rows.append({"input": f"{task.name}: {text}", "target": target})
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(folder / f"{split}.jsonl", lines)
    prefixed = [
        task.model_copy(update={"template": f"{task.name}: {task.template}"}) for task in tasks
    ]
    values: dict[str, Any] = {"name": "multitask", "template": "{input}", "target": "{target}"}
    values |= {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}
    values |= {
        key: max(getattr(task, key) for task in tasks)
        for key in ("max_input_length", "max_target_length")
    }
    return TaskConfig(**values, metrics=["exact_match"]), prefixed


def check_recipe(name: str) -> None:
    """Refuse a recipe that does not exist."""
    if name not in RECIPES:
        raise UserError(f"--recipe is {name!r}; allowed are {', '.join(RECIPES)}.")
