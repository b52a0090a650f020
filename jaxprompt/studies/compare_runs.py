"""Formulations of a task: trained with the same rows and seeds, then compared on the same rows.

Formulations that differ in keys of the task alone (template, labels, ...) train in one population,
all seeds of all of them in each step. Those with another method, length or other settings have a
population of their own. Each seed of a formulation has a line in OUT/cells.jsonl when it has
answered, and never answers again.
"""

import copy
import difflib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxprompt.config.compare import CompareConfig
from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.config.methods import recipe_of
from jaxprompt.config.names import current_key
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.config.values import Value, Values
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.inference.session import open_session
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.models import precision
from jaxprompt.models.checkpoints.load import Backbone, load_backbone
from jaxprompt.runtime import parallel
from jaxprompt.runtime.lock import locked
from jaxprompt.runtime.signals import Signals
from jaxprompt.studies.baselines import Record
from jaxprompt.studies.compare import Arm, Compared, Rules, compare_arms
from jaxprompt.studies.compare_prompts import (
    Answering,
    Asked,
    Questions,
    answer,
    ask,
    check_pairing,
    compared,
    row_metric,
    silent,
)
from jaxprompt.studies.runs import Key, append_line, read_records
from jaxprompt.training import loop
from jaxprompt.training.metric_log import Reporter

# keys of a task that say which rows there are and how answers are judged
OF_ALL = ("name", "source", "train", "validation", "test", "rule", "answers", "group", "metrics")


class Formulation(NamedTuple):
    """A way to put the task, and how it is trained.

    task: with the rows of all splits.
    config: of a run of it alone, whose seed and output mean nothing.
    """

    name: str
    task: TaskConfig
    config: RunConfig


class Member(NamedTuple):
    """One seed of a formulation after training.

    steps: how many it was trained; fewer than the run's where its formulation was stopped.
    value: the task's metric on validation rows.
    """

    formulation: Formulation
    seed: int
    prompt: Path
    value: float | None
    steps: int
    stopped: bool
    run: Path


class Watch(NamedTuple):
    """Who hears of the work, and what ends it."""

    reporter: Reporter
    signals: Signals
    say: Callable[[str], None]
    warn: Callable[[str], None]


# ---- what is compared


def formulations_of(values: Values, compare: CompareConfig) -> list[Formulation]:
    """The formulations of a config.

    Args:
        values: of the run, without ``compare``.

    Raises:
        UserError: one changes what all must have in common, or is no run.
    """
    base = parse(RunConfig, values)
    if base.prompt.population or base.users is not None:
        raise UserError(
            "compare.formulations are a population already; leave out prompt.population and users."
        )
    task = resolve_task(base.task)
    return [
        _formulation(name, changes, values, task) for name, changes in compare.formulations.items()
    ]


def _formulation(name: str, changes: Values, values: Values, base: TaskConfig) -> Formulation:
    where = f"compare.formulations.{name}"
    run, task = copy.deepcopy(values), base.model_dump()
    method = changes.get("method", run.get("method", "prompt-tuning"))
    if method != run.get("method", "prompt-tuning"):
        # what suits the file's method; the recipe of the other one takes its place
        for key in recipe_of(str(method)).get("train", {}):
            run.get("train", {}).pop(key, None)
    for key, value in changes.items():
        _check_key(key, where)
        if key in TaskConfig.model_fields:
            task[key] = value
        else:
            _set(run, current_key(key), value)
    task["name"] = f"{base.name}-{name}"
    try:
        config = parse(RunConfig, run | {"task": task})
        resolved = resolve_task(task)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if config.method == "model-tuning":
        raise UserError(
            f"{where} has method model-tuning, which trains no population; compare it by "
            "`jaxprompt reproduce methods`."
        )
    return Formulation(name, resolved, precision.resolve_config(config))


def _check_key(key: str, where: str) -> None:
    """Refuse what all formulations have in common, and what is no key."""
    if key in OF_ALL:
        raise UserError(
            f"{where} changes {key}, and all formulations have the same rows and are judged alike; "
            "change the task itself. Settings of training are written train.KEY."
        )
    known = [*TaskConfig.model_fields, *RunConfig.model_fields]
    if "." not in key and key not in known:
        close = difflib.get_close_matches(key[:80], [name for name in known if name not in OF_ALL])
        hint = f"did you mean {close[0]!r}?" if close else "`jaxprompt settings` lists them."
        raise UserError(
            f"{where} has {shown(key)}, no key of a task and no setting of a run; {hint}"
        )


def _set(values: Values, key: str, value: Value) -> None:
    """A setting, by its path; a mapping changes what is there."""
    *parents, last = key.split(".")
    inside = values
    for parent in parents:
        before = inside.get(parent)
        inner = dict(before) if isinstance(before, dict) else {}
        inside[parent] = inner
        inside = inner
    before = inside.get(last)
    if isinstance(before, dict) and isinstance(value, dict):
        value = {**before, **value}
    inside[last] = value


# ---- training


def populations_of(
    formulations: Sequence[Formulation], compare: CompareConfig, out: Path
) -> list[tuple[RunConfig, list[Formulation]]]:
    """The runs that train all formulations, and whom each of them trains."""
    groups: dict[str, list[Formulation]] = {}
    for one in formulations:
        settings = one.config.model_dump(exclude={"task", "output"})
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(one)
    runs = []
    for members in groups.values():
        values = members[0].config.model_dump()
        # test rows are answered once, at the end
        tasks = [one.task.model_dump() | {"test": None} for one in members]
        values["task"] = tasks[0]["name"]
        values["prompt"]["population"] = {"task": tasks, "seed": [*compare.seeds]}
        values["train"] |= {
            "successive_halving_every": compare.successive_halving_every,
            "successive_halving_of": "tasks",
        }
        known = json.dumps({**values, "output": ""}, sort_keys=True)
        digest = hashlib.sha256(known.encode()).hexdigest()[:8]
        values["output"] = str(out / "runs" / f"{members[0].config.method}-{digest}")
        runs.append((parse(RunConfig, values), members))
    return runs


def train_all(
    formulations: Sequence[Formulation], compare: CompareConfig, out: Path, watch: Watch
) -> list[Member]:
    """Train all seeds of all formulations, as far as they are not complete."""
    runs, seeds = populations_of(formulations, compare, out), compare.seeds
    for config, members in runs:
        names = listed(one.name for one in members)
        watch.say(f"{names}: {len(members) * len(seeds)} prompts in one run, {config.output}")
    found: list[Member] = []
    for config, members in runs:
        result = loop.train(config, watch.reporter, watch.signals)
        folder = Path(config.output)
        rows = result.get("population") or [{"value": result["value"], "steps": result["steps"]}]
        pairs = [(one, seed) for one in members for seed in seeds]
        for number, ((one, seed), row) in enumerate(zip(pairs, rows, strict=True)):
            own = folder if len(pairs) == 1 else folder / "population" / str(number)
            stopped = row["steps"] < result["steps"]
            found.append(
                Member(one, seed, own / "prompt", row["value"], row["steps"], stopped, folder)
            )
    # in the order of the config
    place = {one.name: number for number, one in enumerate(formulations)}
    return sorted(found, key=lambda member: place[member.formulation.name])


# ---- answers


class _Backbones:
    """Loads backbones and keeps the last one."""

    def __init__(self) -> None:
        self._key: object = None
        self._backbone: Backbone | None = None

    def load(self, config: RunConfig) -> Backbone:
        key = config.backbone, config.model.dtype, config.model.quantization
        if self._backbone is None or self._key != key:
            self._key, self._backbone = key, None
            self._backbone = load_backbone(
                config.backbone,
                dtype=config.model.dtype,
                quantization=config.model.quantization,
                mesh=parallel.make_mesh(),
            )
        return self._backbone


def _key_of(member: Member) -> Key:
    """As in the records of studies (``runs.KEY``); the variant is the formulation."""
    config, name = member.formulation.config, member.formulation.name
    task = member.formulation.task.name.removesuffix(f"-{name}")
    return config.backbone, task, config.method, config.prompt_length, member.seed, name


def answer_members(
    members: Sequence[Member], questions: Questions, out: Path, how: Answering
) -> tuple[list[Record], list[Asked]]:
    """The record of each member, and who asked: the first seed of each formulation."""
    records, backbones = read_records(out), _Backbones()
    metric = row_metric(members[0].formulation.task, how.warn)
    found: list[Record] = []
    asked: list[Asked] = []
    for member in members:
        one, begun = member.formulation, time.monotonic()
        stamp = {"run": member.run.name, "split": questions.split}
        record = records.get(_key_of(member), {})
        complete = record.get("settings") == stamp
        first = not asked or asked[-1].name != one.name
        if first or not complete:
            prompt, backbone = load_prompt(member.prompt), backbones.load(one.config)
            session = open_session(prompt, backbone, tokenizer=one.config.tokenizer)
            warn = how.warn if first else silent
            mine = ask(one.name, session, questions._replace(task=one.task), warn)
            asked += [mine] * first
            if not complete:
                record = _record(member, mine, *answer(mine, metric, how))
                seconds = round(time.monotonic() - begun, 3)
                record |= {"settings": stamp, "wall_seconds": seconds}
                append_line(out / "cells.jsonl", record)
        found.append(record)
    return found, asked


def _record(member: Member, asked: Asked, scores: np.ndarray, texts: Sequence[str]) -> Record:
    fields = ("backbone", "task", "method", "length", "seed", "variant")
    return dict(zip(fields, _key_of(member), strict=True)) | {
        "metric": asked.task.metrics[0],
        "validation": member.value,
        "score": float(scores.mean()),
        "steps": member.steps,
        "tokens": asked.tokens,
        "scores": scores.tolist(),
        "answers": list(texts),
        "prompt": str(member.prompt),
        "fingerprint": asked.session.backbone.fingerprint,
    }


# ---- the whole


def compare_formulations(
    formulations: Sequence[Formulation], compare: CompareConfig, rules: Rules, out: Path,
    watch: Watch,
) -> Compared:  # fmt: skip
    """Train, answer and judge; goes on with what is in ``out``.

    Formulations that successive halving has stopped are told of, and are in no pair.
    """
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        members = train_all(formulations, compare, out, watch)
        split = "test" if formulations[0].task.test else "validation"
        how = Answering(formulations[0].config.train.eval_batch_size, warn=watch.warn)
        questions = Questions(split=split)
        records, asked = answer_members(members, questions, out, how)
        check_pairing(asked, questions)
    if split == "validation":
        watch.warn(
            "the task has no test rows: scores are of the validation rows, which chose each "
            "prompt's best step, so they are too good"
        )
    pairs = list(zip(members, records, strict=True))
    arms = [_arm(one, [p for p in pairs if p[0].formulation is one]) for one in formulations]
    stopped = {member.formulation.name for member in members if member.stopped}
    going = [arm for arm in arms if arm.name not in stopped]
    for member in members:
        shutil.rmtree(member.run / "checkpoints", ignore_errors=True)
    order = range(len(asked[0].rows))
    return compared(arms, compare_arms(going, rules), rules, asked[0], order)


def _arm(one: Formulation, pairs: Sequence[tuple[Member, Record]]) -> Arm:
    members, records = zip(*pairs, strict=True)
    note = f"best validation {_mean([member.value for member in members]):.3f}"
    if members[0].stopped:
        note += f", stopped at step {members[0].steps}"
    scores = np.array([record["scores"] for record in records])
    return Arm(one.name, scores, records[0]["answers"], records[0]["tokens"], note)


def _mean(values: Sequence[float | None]) -> float:
    """Over seeds; a seed that never had a finite metric counts as 0."""
    return float(np.mean([value or 0.0 for value in values]))
