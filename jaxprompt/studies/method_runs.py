"""Runs of the studies of methods: seeds and learning rates of a method are one population.

The first seed of a method that is measured trains all of them, and the others take their members
from the same run. A learning rate is chosen by its mean over seeds on validation rows. If the best
rate of a sweep is its highest or its lowest, rates beyond it are tried in a population of their
own. Full fine-tuning has no population: its seeds and rates are trained one after the other.
"""

import itertools
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxprompt import api
from jaxprompt.config.errors import UserError
from jaxprompt.config.methods import SECTIONS_OF
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.config.values import Values
from jaxprompt.data.rows import Rows
from jaxprompt.data.sources import read_rows
from jaxprompt.data.tasks.few_shot import in_turn
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.data.tasks.splits import load_rows
from jaxprompt.data.templates import to_text
from jaxprompt.inference.session import Session, open_session
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.methods.registry import method_of
from jaxprompt.models import registry
from jaxprompt.models.checkpoints.load import Backbone, load_backbone
from jaxprompt.studies.baselines import Record
from jaxprompt.studies.runs import PassWarnings, Run, Settings, Suite
from jaxprompt.training import loop
from jaxprompt.training.run_dir import Result, clear_run

MODEL_TUNING = "model-tuning"
TEXTS = 64  # held-out texts, whose loss says what a model has forgotten


class Sweep(NamedTuple):
    """The settings of a run that are none of its config."""

    seeds: int
    factors: Sequence[float]  # the learning rates that are tried, times the usual one
    extensions: int  # how often two more rates are tried beyond a best one at an edge
    rows: int | None  # training rows; None: all

    @classmethod
    def of(cls, settings: Settings) -> "Sweep":
        extensions = settings.get("extensions", 0)
        return cls(settings["seeds"], settings["factors"], extensions, settings.get("rows"))


def method_config(run: Run, suite: Suite, backbone: Backbone, output: Path) -> RunConfig:
    """The config of a run before its population: the usual recipe, and the run's settings."""
    settings: Settings = {key: value for key, value in run.settings.items() if "." in key}
    if run.method == "p-tuning-v2" and registry.one_sequence(backbone.config):
        settings = {"prefix.places": ["decoder"]} | settings  # there is no encoder
    steps: int = settings["train.steps"]
    every = max(1, min(steps // 4, 1000))
    task, path = suite.tasks[run.task], suite.backbones[run.backbone]
    values: Values = {"backbone": path, "task": task.model_dump(), "method": run.method}
    values["output"] = str(output)
    values["train"] = {"keep": 1, "tensorboard": False, "seed": run.seed or 0}
    values["train"] |= {"evaluate_every": every, "checkpoint_every": every}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        values.setdefault(section, {})[name] = value
    return parse(RunConfig, values)


def swept_rate(config: RunConfig) -> tuple[str, float]:
    """The learning rate that is varied, by its key in a population, and its usual value.

    Where every part of a method has a rate of its own, that of the last part is varied.
    """
    section = SECTIONS_OF[config.parts[-1]]
    own = {part: getattr(config, SECTIONS_OF[part]).learning_rate for part in config.parts}
    if config.method == MODEL_TUNING or None in own.values():
        return "learning_rate", config.train.learning_rate
    return f"{section}.learning_rate", own[config.parts[-1]]


def reason_against(config: RunConfig, backbone: Backbone) -> str | None:
    """Why the backbone cannot be tuned with this method; None where it can."""
    try:
        method = method_of(config)
        count = method.num_start_vectors(config.prompt)
        start = np.zeros((1, count, backbone.config.d_model), np.float32)
        jax.eval_shape(lambda p: method.init(p, start, config.prompt, 0), backbone.params)
    except UserError as error:
        return str(error)
    return None


def measure(run: Run, suite: Suite, backbone: Backbone) -> Record:
    """The record of one seed of a method: scores, sizes, and what it has forgotten."""
    sweep, task, seed = Sweep.of(run.settings), suite.tasks[run.task], run.seed or 0
    few = sweep.rows is not None or task.few_shot is not None
    # few rows are drawn by the seed; seeds that learn from the same rows share a run
    shared = run if few else run._replace(seed=None)
    config = method_config(shared, suite, backbone, suite.folder(shared))
    reason = reason_against(config, backbone)
    if reason is not None:
        return {"skipped": reason, "steps": 0}
    seeds = [seed] if few else list(range(sweep.seeds))
    members = train_members(config, Plan(sweep, seeds, drawn_data(task, sweep.rows, seed)), suite)
    rate = chosen_rate(members)
    mine = next(m for m in members if m.rate == rate and m.seed == seed)
    record: Record = {
        "validation": mine.value,
        "test": None,
        "rate": rate,
        "rates": {f"{rate:g}": mean for rate, mean in means_of(members).items()},
        "train_rows": sweep.rows,
    }
    for key in ("untuned", "majority", "trainable_parameters", "steps", "seconds", "rows"):
        record[key] = mine.result[key]
    begun = time.monotonic()
    session = _open(mine, config, backbone)
    record["load_seconds"] = round(time.monotonic() - begun, 4)
    record["bytes"] = sum(file.stat().st_size for file in mine.tuned.rglob("*") if file.is_file())
    if task.test:
        report = api.evaluate(session, task=task, split="test", warn=_silent)
        record |= {"test": report["metrics"][task.metrics[0]], "majority_test": report["majority"]}
    if not few:
        record |= _held_out_losses(session, run, suite, backbone)
    for member in members:
        shutil.rmtree(member.run / "checkpoints", ignore_errors=True)
    if config.method == MODEL_TUNING:
        shutil.rmtree(mine.tuned, ignore_errors=True)
    return record


# ---- training


class Plan(NamedTuple):
    """What is trained for one method."""

    sweep: Sweep
    seeds: Sequence[int]
    data: Mapping[str, Rows] | None  # rows in memory instead of the task's


class Member(NamedTuple):
    """What came of one seed and one learning rate."""

    seed: int
    rate: float
    value: float | None  # on validation rows; None: it was never finite
    tuned: Path  # the artefact, or the model
    run: Path
    result: Result  # of the run, which several members may share


def means_of(members: Sequence[Member]) -> dict[float, float | None]:
    """The mean over seeds of each learning rate; None where a seed was never finite."""
    by_rate: dict[float, list[float | None]] = {}
    for member in members:
        by_rate.setdefault(member.rate, []).append(member.value)
    finite = {rate: [v for v in values if v is not None] for rate, values in by_rate.items()}
    return {
        rate: statistics.mean(values) if len(values) == len(by_rate[rate]) else None
        for rate, values in finite.items()
    }


def chosen_rate(members: Sequence[Member]) -> float:
    """The learning rate with the best mean; the lowest of equal ones.

    Raises:
        UserError: no rate gave finite scores with every seed.
    """
    means = {rate: mean for rate, mean in means_of(members).items() if mean is not None}
    if not means:
        raise UserError("No learning rate gave finite scores with every seed; give lower ones.")
    return max(means, key=lambda rate: (means[rate], -rate))


def drawn_data(task: TaskConfig, count: int | None, seed: int) -> Mapping[str, Rows] | None:
    """``count`` training rows with all validation rows, or None for those of the task.

    Rows are drawn anew with each seed, in turn from each answer where answers are labels.
    """
    if count is None:
        return None
    rows = {name: read_rows(task.source, getattr(task, name)) for name in ("train", "validation")}
    return rows | {"train": draw_rows(task, rows["train"], count, seed)}


def draw_rows(task: TaskConfig, rows: Rows, count: int, seed: int) -> Rows:
    """See ``drawn_data``. Raises a UserError where there are fewer rows."""
    if count > len(rows):
        raise UserError(
            f"Task {task.name!r} has {len(rows)} training rows, and {count} are to be drawn; leave "
            "that number out."
        )
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    if task.labels is None or task.rule is not None:
        return [rows[i] for i in order[:count]]
    answers = [to_text(task, row)[1] for row in rows]
    return [rows[i] for i in in_turn(answers, order)[:count]]


def rates_beyond(members: Sequence[Member]) -> list[float]:
    """Two rates beyond the best one if it is the highest or the lowest that was tried, else none.

    The best of a sweep says little where it lies at an edge: a rate beyond it may be better.
    """
    best, tried = chosen_rate(members), {member.rate for member in members}
    if len(tried) == 1 or min(tried) < best < max(tried):
        return []
    factors = (3.0, 10.0) if best == max(tried) else (1 / 3, 1 / 10)
    return [float(f"{best * factor:.3g}") for factor in factors]


def train_members(config: RunConfig, plan: Plan, suite: Suite) -> list[Member]:
    """Train all seeds and rates of a method, as far as they are not complete."""
    key, usual = swept_rate(config)
    train = _models if config.method == MODEL_TUNING else _population
    rates = [float(f"{usual * factor:.3g}") for factor in plan.sweep.factors]
    members = train(config, plan, {key: rates}, suite)
    for number in range(1, plan.sweep.extensions + 1):
        rates = rates_beyond(members)
        if not rates:
            break
        suite.say(f"the best rate is {chosen_rate(members):g}, at an edge; tries {rates} too")
        beyond = Path(f"{config.output}-beyond{number}")
        members += train(_at(config, beyond), plan, {key: rates}, suite)
    if config.method != MODEL_TUNING:
        return members
    _keep_best(members)
    best = chosen_rate(members)
    return [
        # it was measured and removed, and the record of that is gone
        _model(_at(config, member.run.parent), plan, member[:2], suite, again=True)
        if member.rate == best and not member.tuned.is_dir()
        else member
        for member in members
    ]


def _at(config: RunConfig, folder: Path) -> RunConfig:
    return config.model_copy(update={"output": str(folder)})


def _models(
    config: RunConfig, plan: Plan, rates: Mapping[str, list[float]], suite: Suite
) -> list[Member]:
    """Full fine-tuning with each seed and rate, one after the other."""
    members: list[Member] = []
    for rate in next(iter(rates.values())):
        for seed in plan.seeds:
            members.append(_model(config, plan, (seed, rate), suite))
        _keep_best(members)
    return members


def _keep_best(members: Sequence[Member]) -> None:
    """Remove the models of all rates but the best: each is hundreds of megabytes."""
    if None in means_of(members).values():
        return
    best = chosen_rate(members)
    for member in members:
        if member.rate != best:
            shutil.rmtree(member.tuned, ignore_errors=True)


def _population(
    config: RunConfig, plan: Plan, rates: Mapping[str, list[float]], suite: Suite
) -> list[Member]:
    folder, (key, choices) = Path(config.output), next(iter(rates.items()))
    values = config.model_dump()
    values["prompt"]["population"] = {"seed": list(plan.seeds), key: choices}
    result = _train(parse(RunConfig, values), plan, suite)
    pairs = list(itertools.product(plan.seeds, choices))
    if len(pairs) == 1:
        return [Member(*pairs[0], result["value"], folder / "prompt", folder, result)]
    places = [folder / "population" / str(number) / "prompt" for number in range(len(pairs))]
    return [
        Member(*pair, row["value"], place, folder, result)
        for pair, row, place in zip(pairs, result["population"], places, strict=True)
    ]


def _model(
    config: RunConfig, plan: Plan, member: tuple[int, float], suite: Suite, again: bool = False
) -> Member:
    """Full fine-tuning with one seed and one rate."""
    seed, rate = member
    folder = Path(config.output) / f"seed{seed}-rate{rate:g}"
    if again:
        clear_run(folder)
    train = config.train.model_copy(update={"seed": seed, "learning_rate": rate})
    alone = config.model_copy(update={"train": train, "output": str(folder)})
    result = _train(alone, plan, suite)
    return Member(seed, rate, result["value"], folder / "model", folder, result)


def _train(config: RunConfig, plan: Plan, suite: Suite) -> Result:
    """Train, or read the result of a run that is complete; test rows are left alone."""
    # the chosen members alone are tested, see ``measure``
    task = {**resolve_task(config.task).model_dump(), "test": None}
    config = config.model_copy(update={"task": task})
    reporter = PassWarnings(suite.say)
    if plan.data is None:
        return loop.train(config, reporter)
    return api.train(config, reporter, data=plan.data)


# ---- measuring


def _silent(text: str) -> None:
    pass


def _open(member: Member, config: RunConfig, backbone: Backbone) -> Session:
    """A session with what was tuned, loaded from its directory."""
    if config.method != MODEL_TUNING:
        return open_session(load_prompt(member.tuned), backbone)
    loaded = load_backbone(
        str(member.tuned), dtype=config.model.dtype, attention=config.model.attention
    )
    return open_session(None, loaded)


def _held_out_losses(session: Session, run: Run, suite: Suite, backbone: Backbone) -> Record:
    """The loss on text of other tasks, of what was tuned and of the backbone, in nats a token.

    Each text is cut in half, and the second half is to be told from the first.
    """
    pairs = held_out_pairs([task for name, task in suite.tasks.items() if name != run.task] or [
        resolve_task("spam" if run.task == "supersense" else "supersense")
    ])  # fmt: skip
    sessions = {"text_loss": session, "untuned_text_loss": open_session(None, backbone)}
    return {name: text_loss(each, pairs) for name, each in sessions.items()}


def held_out_pairs(tasks: Sequence[TaskConfig]) -> list[dict[str, str]]:
    """Halves of the inputs of validation rows."""
    pairs = []
    for task in tasks:
        for row in load_rows(task, "validation", TEXTS):
            words = to_text(task, row)[0].replace("[prompt]", " ").split()[:80]
            if len(words) >= 4:
                half = len(words) // 2
                pairs.append({"input": " ".join(words[:half]), "target": " ".join(words[half:])})
    return pairs[:TEXTS]


def text_loss(session: Session, pairs: Rows) -> float:
    """The mean loss of a token of the targets, in nats."""
    scores = api.score(session, pairs, raw=True, max_input_length=256, warn=_silent)
    total = sum(score["log_likelihood"] for score in scores)
    return -total / sum(score["tokens"] for score in scores)
