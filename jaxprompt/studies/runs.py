"""The runs of a study. Each is measured once, and a study can be interrupted at any time.

A complete run has a line in OUT/cells.jsonl and never runs again. An interrupted run goes on from
its checkpoint in OUT/runs. A run that fails is noted in OUT/errors.jsonl, and the next start tries
it again. Checkpoints and fine-tuned models are deleted when a run is complete. Prompts stay.
"""

import json
import shutil
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import jax

from jaxprompt.api import (
    PredictOptions,
    Session,
    check_pair,
    evaluate,
    evaluate_ensemble,
    inspect,
    open_session,
    predict_rows,
)
from jaxprompt.config.errors import UserError
from jaxprompt.config.names import RENAMED
from jaxprompt.config.paths import as_folder
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.config.validation import parse
from jaxprompt.config.values import Values
from jaxprompt.data.targets import eval_references
from jaxprompt.data.tasks.splits import load_rows
from jaxprompt.evaluation.metrics import majority, measure
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.models.checkpoints.load import Backbone, load_backbone
from jaxprompt.models.ops import quantization
from jaxprompt.runtime.files import write_atomically
from jaxprompt.runtime.lock import locked
from jaxprompt.studies.baselines import Record, Rows, Shots, few_shot, free_generation, hard_prompt
from jaxprompt.training.loop import train
from jaxprompt.training.metric_log import NullReporter
from jaxprompt.training.run_dir import clear_run

KEY = ("backbone", "task", "method", "length", "seed", "variant")
Key = tuple[str | int | None, ...]
Settings = Values  # of a run: from "train.steps" and the like to a value
# Settings by recipe and method. A run's own settings override them.
RECIPES: dict[str, dict[str, Settings]] = {
    # Lester et al. 2021, section 3: 30,000 steps at a constant rate
    "paper": {
        "prompt": {"train.steps": 30_000, "train.schedule": "constant"},
        "full": {
            "train.steps": 30_000, "train.schedule": "constant", "train.optimizer": "adafactor",
            "train.learning_rate": 1e-3, "train.weight_decay": 0.0,
        },
    },
    # for the built-in backbones: a linear fall to 0 within hundreds of steps
    "miniature": {
        "prompt": {
            "train.steps": 400, "train.schedule": "linear", "train.length_bucketing_window": 16,
        },
        "full": {
            "train.steps": 400, "train.schedule": "linear", "train.length_bucketing_window": 16,
            "train.optimizer": "adamw", "train.learning_rate": 1e-3, "train.weight_decay": 0.0,
        },
    },
}  # fmt: skip


class Run(NamedTuple):
    """One run: the fields that KEY names, and the settings that override those of its recipe."""

    backbone: str
    task: str
    method: str
    length: int | None
    seed: int | None
    variant: str | None
    settings: Settings

    @property
    def numerics(self) -> Settings:
        """How the backbone is loaded, for training and for all measurements beside it."""
        return {key: self.settings.get(f"model.{key}") for key in ("dtype", "quantization")}

    @property
    def key(self) -> Key:
        """The fields that identify it among all runs."""
        return self.backbone, self.task, self.method, self.length, self.seed, self.variant

    @property
    def name(self) -> str:
        """The name of its folder and in messages.

        Raises:
            UserError: the name would lead out of the folder of runs.
        """
        parts = [f"{self.variant}-" * (self.variant is not None), self.method]
        parts += [f"-P{self.length}" * (self.length is not None)]
        parts += [f"-seed{self.seed}" * (self.seed is not None)]
        names = {"backbone": self.backbone, "task": self.task, "run": "".join(parts)}
        return "/".join(as_folder(name, what) for what, name in names.items())


class Suite(NamedTuple):
    """What the runs of a study share."""

    out: Path
    backbones: Mapping[str, str]  # name -> where its weights are
    tasks: Mapping[str, TaskConfig]
    recipe: str = "miniature"
    select_rows: int = 200  # validation rows to choose among hand-written prompts
    illegal_rows: int = 300  # rows to generate freely for
    shots: int = 6  # answered rows before a question
    also_eval_on: Mapping[str, Sequence[TaskConfig]] = {}  # task -> other tasks to evaluate on
    keep: frozenset[Key] = frozenset()  # runs whose prompts are needed later
    say: Callable[[str], None] = lambda text: None
    # how runs of the study are measured; None: as prompts, models, ensembles and baselines are
    measure: "Measure | None" = None

    def folder(self, run: Run) -> Path:
        """The run directory."""
        return self.out / "runs" / run.name


Measure: TypeAlias = Callable[[Run, Suite, Backbone], Record]


def read_records(out: Path) -> dict[Key, Record]:
    """Complete runs by key. A line that a crash cut short is skipped."""
    records: dict[Key, Record] = {}
    path = out / "cells.jsonl"
    for line in path.read_text().split("\n") if path.is_file() else ():
        try:
            record = json.loads(line)
            settings = {RENAMED.get(k, k): x for k, x in record.get("settings", {}).items()}
            records[tuple(record.get(key) for key in KEY)] = record | {
                "metric": record["metric"], "settings": settings
            }  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return records


def run_suite(runs: Sequence[Run], suite: Suite) -> int:
    """Measure the runs that are not complete.

    Returns:
        The number of runs that failed.
    """
    suite.out.mkdir(parents=True, exist_ok=True)
    with locked(suite.out):
        return _run_suite(runs, suite)


def _run_suite(runs: Sequence[Run], suite: Suite) -> int:
    # seeds share their compiled code, and so do starts of this command
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(suite.out.absolute() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    records, backbones, failed = read_records(suite.out), _Backbones(suite), 0
    todo = _missing(runs, suite, records)
    for number, run in enumerate(todo):
        count = f"[{len(runs) - len(todo) + number + 1}/{len(runs)}]"
        suite.say(f"{count} {run.name}, {_time_left(todo[number:], records)}")
        try:
            record = _measure(run, suite, backbones)
        except Exception as error:  # whatever is wrong with one run, the others go on
            failed += 1
            suite.say(f"    FAILED: {type(error).__name__}: {str(error)[:500]}")
            note = {"run": run._asdict(), "error": str(error), "trace": traceback.format_exc()}
            append_line(suite.out / "errors.jsonl", note)
            continue
        append_line(suite.out / "cells.jsonl", record)
        records[run.key] = record
        shown = {key: record.get(key) for key in ("validation", "test", "illegal", "wall_seconds")}
        suite.say("    " + ", ".join(f"{k} {v:.3f}" for k, v in shown.items() if v is not None))
        for name in ("checkpoints", "model"):  # hundreds of megabytes of each fine-tuning
            shutil.rmtree(suite.folder(run) / name, ignore_errors=True)
    suite.say(f"{len(runs)} runs: {len(todo) - failed} measured now, {failed} failed")
    return failed


def _missing(runs: Sequence[Run], suite: Suite, records: Mapping[Key, Record]) -> list[Run]:
    """Runs without a record, and runs whose prompt is needed but gone."""
    todo = []
    for run in runs:
        prompt_is_gone = run.key in suite.keep and not (suite.folder(run) / "prompt").is_dir()
        if run.key not in records or prompt_is_gone:
            todo.append(run)
        elif records[run.key].get("settings", {}) != run.settings:
            suite.say(f"{run.name} is complete with other settings and stays as it is")
    return todo


def _measure(run: Run, suite: Suite, backbones: "_Backbones") -> Record:
    """The record of one run. Starts the run, or takes it up again."""
    start = time.monotonic()
    task, backbone = suite.tasks[run.task], backbones.load(run)
    record: Record = dict(zip(KEY, run, strict=False))
    record |= {"recipe": suite.recipe, "metric": task.metrics[0]}
    record |= {"parameters": quantization.count(backbone.params)}
    if suite.measure is not None:
        record |= suite.measure(run, suite, backbone) | {"fingerprint": backbone.fingerprint}
        record["wall_seconds"] = round(time.monotonic() - start, 3)
        return record | {"settings": run.settings}
    if run.method == "ensemble":
        record |= _ensemble(run, suite, task, backbone)
        return record | {"settings": run.settings}

    limit = run.settings.get("train.max_eval_examples")
    splits = [split for split in ("validation", "test") if getattr(task, split)]
    rows = {split: load_rows(task, split, limit if split != "test" else None) for split in splits}
    if run.method in ("hard", "few"):
        session = open_session(None, backbone)
        scores, task = _without_training(run, suite, task, session, rows)
    else:
        scores, session = _train(run, suite, task, backbone)
    record |= scores
    if task.labels and suite.illegal_rows:
        record |= free_generation(session, task, load_rows(task, "validation", suite.illegal_rows))
    for split, name in (("validation", "majority"), ("test", "majority_test")):
        judges = eval_references(task, rows.get(split, []), session.tokenizer)
        record[name] = majority(task.metrics[0], judges, task.labels) if judges else None
    others = suite.also_eval_on.get(run.task, ()) if run.method in ("prompt", "full") else ()
    if others:
        record["also"] = {other.name: _evaluate_on(session, other, limit) for other in others}
    record |= {"rows": len(rows["validation"]), "fingerprint": backbone.fingerprint}
    record["wall_seconds"] = round(time.monotonic() - start, 3)
    return record | {"settings": run.settings}


def _without_training(
    run: Run, suite: Suite, task: TaskConfig, session: Session, rows: dict[str, Rows]
) -> tuple[Record, TaskConfig]:
    """Scores of the best hand-written prompt, and the task in the form that was measured."""
    select = load_rows(task, "validation", suite.select_rows)
    if run.method == "hard":
        return hard_prompt(session, task, rows, select)
    # the shots stand before the template that is best without any
    _, task = hard_prompt(session, task, {"validation": select}, select)
    training = load_rows(task, "train")
    return few_shot(session, task, rows, training, Shots(suite.shots, run.seed or 0))


def _train(run: Run, suite: Suite, task: TaskConfig, backbone: Backbone) -> tuple[Record, Session]:
    """Train; return the scores and a session with the tuned prompt or model."""
    folder = suite.folder(run)
    if (folder / "config.yaml").is_file() and not any(folder.glob("checkpoints/*")):
        clear_run(folder)  # of a record that was lost: run it again
    config = run_config(run, suite.recipe, task, suite.backbones[run.backbone], folder)
    result = train(config, PassWarnings(suite.say))
    keys = ("untuned", "steps", "seconds", "best_step", "trainable_parameters")
    test = result.get("test", {}).get(task.metrics[0])
    scores = {"validation": result["value"], "test": test} | {key: result[key] for key in keys}
    if run.method == "full":
        attention = run.settings.get("model.attention", "causal")
        model = load_backbone(str(folder / "model"), attention=attention, **run.numerics)
        return scores, open_session(None, model)
    prompt = load_prompt(folder / "prompt")
    scores["metrics"] = prompt.metadata.get("metrics", {})
    session = open_session(prompt, backbone)
    seen = inspect(session)
    if "vectors" not in seen:  # of a method without virtual tokens
        return scores, session
    tightest = sorted(seen["vectors"], key=lambda v: -v["nearest"][-1]["cosine"])[:3]
    scores["inspection"] = {key: seen[key] for key in ("norm", "vocabulary_norm", "clusters")} | {
        "labels": {
            label: {"positions": len(facts["positions"]), "random": facts["random"]}
            for label, facts in seen["labels"].items()
        },
        "tightest": [[near["word"] for near in vector["nearest"]] for vector in tightest],
    }
    return scores, session


class PassWarnings(NullReporter):
    """Passes on a run's warnings, and nothing else."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def say(self, text: str) -> None:
        if text.startswith("warning:"):
            self._say(f"    {text}")


def _evaluate_on(session: Session, task: TaskConfig, limit: int | None) -> dict[str, float]:
    """All metrics of another task, on its test rows where it has any."""
    split = "test" if task.test else "validation"
    if limit is None or split == "test":
        return evaluate(session, task=task, split=split)["metrics"]
    rows = load_rows(task, split, limit)
    answers = predict_rows(session, task, rows, PredictOptions(pack=True))
    return measure(task, answers.predictions, eval_references(task, rows, session.tokenizer))


def _ensemble(run: Run, suite: Suite, task: TaskConfig, backbone: Backbone) -> Record:
    """Scores of joint answers by prompts of several seeds (Lester et al. 2021, section 6)."""
    begun = time.monotonic()
    members = [
        run._replace(method="prompt", seed=seed, settings={}) for seed in run.settings["seeds"]
    ]
    prompts = [load_prompt(suite.folder(member) / "prompt") for member in members]
    for prompt in prompts:
        check_pair(prompt, backbone)
    sessions = [open_session(prompt, backbone) for prompt in prompts]
    reports = {
        split: evaluate_ensemble(sessions, task=task, split=split)
        for split in ("validation", "test")
        if getattr(task, split)
    }
    main, metric = reports.get("test", reports["validation"]), task.metrics[0]
    joint = {way: main[way][metric] for way in ("vote", "likelihood") if way in main}
    return {
        "validation": reports["validation"]["vote"][metric],
        "test": reports["test"]["vote"][metric] if "test" in reports else None,
        "majority": reports["validation"]["majority"],
        "majority_test": reports["test"]["majority"] if "test" in reports else None,
        "prompts": [figures[metric] for figures in main["prompts"]],
        "mean": main["mean"], "best": main["best"], **joint,
        "rows": main["rows"], "fingerprint": backbone.fingerprint, "steps": 0,
        "wall_seconds": round(time.monotonic() - begun, 3),
    }  # fmt: skip


def of_method(settings: Settings, method: str) -> Settings:
    """The settings that apply to a run of this method.

    Args:
        settings: from ``key`` or ``method:key`` to a value.
        method: hard, few, prompt, full, or ensemble. An ensemble has the settings of its prompts.
            Of these, methods without training use only the number of rows and the backbone's
            numerics.
    """
    split = [(*key.rpartition(":")[::2], value) for key, value in settings.items()]
    trained = "prompt" if method == "ensemble" else method
    chosen = {key: value for whose, key, value in split if whose in ("", trained)}
    if method in ("hard", "few", "ensemble"):
        used = ("train.max_eval_examples", "model.dtype", "model.quantization")
        return {key: value for key, value in chosen.items() if key in used}
    return chosen


def run_config(run: Run, recipe: str, task: TaskConfig, path: str, output: Path) -> RunConfig:
    """The config to train with: the recipe's settings, and the run's own over them."""
    settings = {"train.keep": 1, "train.tensorboard": False} | RECIPES[recipe][run.method]
    settings |= run.settings
    every = max(1, settings["train.steps"] // 4) if recipe == "miniature" else 1000
    values: Record = {"backbone": path, "task": task.model_dump(), "output": str(output)}
    if run.method == "prompt":
        # class labels where there is room for them and more
        init = "class_labels" if (run.length or 0) >= 20 else "sampled_vocabulary"
        values |= {"method": "prompt-tuning", "prompt": {"length": run.length, "init": init}}
    else:
        values["method"] = "model-tuning"
    values["train"] = {"seed": run.seed, "evaluate_every": every, "checkpoint_every": every}
    for key, value in settings.items():
        *parents, last = key.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return parse(RunConfig, values)


class _Backbones:
    """Loads backbones and keeps the last one."""

    def __init__(self, suite: Suite) -> None:
        self._suite = suite
        self._loaded_as: tuple[str, Settings] | None = None
        self._backbone: Backbone | None = None

    def load(self, run: Run) -> Backbone:
        """The run's backbone.

        Raises:
            UserError: its weights are not those that earlier runs of the suite had.
        """
        name = as_folder(run.backbone, "backbone")
        path = self._suite.backbones[name]
        if self._backbone is None or self._loaded_as != (name, run.numerics):
            if self._backbone is not None:  # compiled code would keep the last weights alive
                self._backbone = None
                jax.clear_caches()
            self._backbone = load_backbone(path, **run.numerics)
            self._loaded_as = name, run.numerics
        file = self._suite.out / "runs" / name / "fingerprint"
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            write_atomically(file, self._backbone.fingerprint)
        if file.read_text() != self._backbone.fingerprint:
            raise UserError(f"{path} has changed since runs of {name!r} ran; give it a new name.")
        return self._backbone


def append_line(path: Path, record: Record) -> None:
    """Add a line of JSON to a file. If a crash cut the last line short, end that line first."""
    cut = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(record) + "\n")


def _time_left(runs: Sequence[Run], records: dict[Key, Record]) -> str:
    """An estimate from complete runs: of other seeds, else from runs that are less similar."""
    total = 0.0
    for run in runs:
        for same in ((0, 1, 2, 3), (0, 1, 2), (0, 2), (2,), ()):
            alike = [
                r["wall_seconds"] for k, r in records.items() if all(k[i] == run[i] for i in same)
            ]
            if alike:
                total += statistics.mean(alike)
                break
    return f"about {total / 60:.0f} min left" if records else "time left unknown"
