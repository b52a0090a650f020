"""Cells: the runs of a study, each of them measured once, in an order that can be interrupted.

A complete cell has a line in OUT/cells.jsonl and never runs again; an interrupted one goes on from
its checkpoint in OUT/runs. One that fails is noted in OUT/errors.jsonl and tried again at the next
start. Checkpoints and fine-tuned models are deleted once a cell is complete, prompts stay.
"""

import json
import shutil
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from jaxprompt.data.targets import judged_by
from jaxprompt.data.tasks.splits import load_rows
from jaxprompt.evaluation.metrics import majority, measure
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.models.checkpoints.load import Backbone, load_backbone
from jaxprompt.models.ops import quantization
from jaxprompt.runtime.files import write_atomically
from jaxprompt.runtime.lock import locked
from jaxprompt.studies.baselines import Record, few_shot, free_generation, hard_prompt
from jaxprompt.training.loop import train
from jaxprompt.training.metric_log import NullReporter
from jaxprompt.training.run_dir import clear_run

KEY = ("backbone", "task", "method", "length", "seed", "variant")
Key = tuple[Any, ...]
METHODS = ("hard", "few", "prompt", "full", "ensemble")

# Settings of a run by recipe and method; those of a cell go over them
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
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


class Cell(NamedTuple):
    """One run: what KEY names, and the settings of a run that it has beside its recipe's."""

    backbone: str
    task: str
    method: str
    length: int | None
    seed: int | None
    variant: str | None
    settings: dict[str, Any]

    @property
    def numerics(self) -> dict[str, Any]:
        """How its backbone is loaded for all that is measured: as for its run."""
        return {key: self.settings.get(f"model.{key}") for key in ("dtype", "quantization")}

    @property
    def key(self) -> Key:
        """What tells it from others."""
        return self[: len(KEY)]

    @property
    def name(self) -> str:
        """For folders and people. Raises UserError where it would leave the folder of runs."""
        parts = [f"{self.variant}-" * (self.variant is not None), self.method]
        parts += [f"-P{self.length}" * (self.length is not None)]
        parts += [f"-seed{self.seed}" * (self.seed is not None)]
        names = {"backbone": self.backbone, "task": self.task, "run": "".join(parts)}
        return "/".join(as_folder(name, what) for what, name in names.items())


class Bench(NamedTuple):
    """What the cells of a study share."""

    out: Path
    backbones: Mapping[str, str]  # name -> where its weights are
    tasks: Mapping[str, TaskConfig]
    recipe: str = "miniature"
    select_rows: int = 200  # validation rows that choose among hard prompts
    illegal_rows: int = 300  # rows that are generated for
    shots: int = 6
    also: Mapping[str, Sequence[TaskConfig]] = {}  # task -> others that its cells are judged on
    keep: frozenset[Key] = frozenset()  # cells whose prompts are needed later
    say: Callable[[str], None] = lambda text: None

    def folder(self, cell: Cell) -> Path:
        """Where a cell runs."""
        return self.out / "runs" / cell.name


def read_records(out: Path) -> dict[Key, Record]:
    """Complete cells by key; a line that a crash cut short is none."""
    found: dict[Key, Record] = {}
    path = out / "cells.jsonl"
    for line in path.read_text().split("\n") if path.is_file() else ():
        try:
            record = json.loads(line)
            settings = {RENAMED.get(k, k): x for k, x in record.get("settings", {}).items()}
            found[tuple(record.get(key) for key in KEY)] = record | {
                "metric": record["metric"], "settings": settings
            }  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def run_cells(cells: Sequence[Cell], bench: Bench) -> int:
    """Measure what is missing; the number of cells that failed."""
    bench.out.mkdir(parents=True, exist_ok=True)
    with locked(bench.out):
        return _run_cells(cells, bench)


def _run_cells(cells: Sequence[Cell], bench: Bench) -> int:
    # seeds share their compiled code, and so do starts of this command
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(bench.out.absolute() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    found, held, failed = read_records(bench.out), {}, 0
    lost = {key for key in bench.keep if key in found}
    lost = {c.key for c in cells if c.key in lost and not (bench.folder(c) / "prompt").is_dir()}
    todo = [cell for cell in cells if cell.key not in found or cell.key in lost]
    for cell in (cell for cell in cells if cell.key in found and cell.key not in lost):
        if found[cell.key].get("settings", {}) != cell.settings:
            bench.say(f"{cell.name} is complete with other settings and stays as it is")
    for number, cell in enumerate(todo):
        count = f"[{len(cells) - len(todo) + number + 1}/{len(cells)}]"
        bench.say(f"{count} {cell.name}, {_time_left(todo[number:], found)}")
        try:
            record = _measure(cell, bench, held)
        except Exception as error:  # whatever is wrong with one cell, the others go on
            failed += 1
            bench.say(f"    FAILED: {type(error).__name__}: {str(error)[:500]}")
            note = {"cell": cell._asdict(), "error": str(error), "trace": traceback.format_exc()}
            _append(bench.out / "errors.jsonl", note)
            continue
        _append(bench.out / "cells.jsonl", record)
        found[cell.key] = record
        shown = {key: record.get(key) for key in ("validation", "test", "illegal", "wall_seconds")}
        bench.say("    " + ", ".join(f"{k} {v:.3f}" for k, v in shown.items() if v is not None))
        for name in ("checkpoints", "model"):  # hundreds of megabytes of each fine-tuning
            shutil.rmtree(bench.folder(cell) / name, ignore_errors=True)
    bench.say(f"{len(cells)} cells: {len(todo) - failed} measured now, {failed} failed")
    return failed


def _measure(cell: Cell, bench: Bench, held: Record) -> Record:
    """The record of one cell, whose run is started or taken up again."""
    start = time.monotonic()
    task, backbone = bench.tasks[cell.task], _load(cell, bench, held)
    limit = cell.settings.get("train.max_eval_examples")
    splits = [split for split in ("validation", "test") if getattr(task, split)]
    rows = {split: load_rows(task, split, limit if split != "test" else None) for split in splits}
    metric = task.metrics[0]
    record: Record = dict(zip(KEY, cell, strict=False))
    record |= {"recipe": bench.recipe, "metric": metric}
    record |= {"parameters": quantization.count(backbone.params)}

    if cell.method == "ensemble":
        record |= _ensemble(cell, bench, task, backbone)
        return record | {"settings": cell.settings}
    if cell.method in ("hard", "few"):
        session = open_session(None, backbone)
        few = load_rows(task, "validation", bench.select_rows)
        if cell.method == "hard":
            scores, task = hard_prompt(session, task, rows, few)
        else:
            # the shots stand before the template that is best without any
            _, task = hard_prompt(session, task, {"validation": few}, few)
            training, seed = load_rows(task, "train"), cell.seed or 0
            scores, task = few_shot(session, task, rows, training, bench.shots, seed)
    else:
        scores, session = _train(cell, bench, task, backbone)
    record |= scores
    if task.labels and bench.illegal_rows:
        record |= free_generation(session, task, load_rows(task, "validation", bench.illegal_rows))
    for split, name in (("validation", "majority"), ("test", "majority_test")):
        judges = judged_by(task, rows.get(split, []), session.tokenizer)
        record[name] = majority(metric, judges, task.labels) if judges else None
    for other in bench.also.get(cell.task, ()) if cell.method in ("prompt", "full") else ():
        record.setdefault("also", {})[other.name] = _judged_on(session, other, limit)
    record |= {"rows": len(rows["validation"]), "fingerprint": backbone.fingerprint}
    record["wall_seconds"] = round(time.monotonic() - start, 3)
    return record | {"settings": cell.settings}


def _train(
    cell: Cell, bench: Bench, task: TaskConfig, backbone: Backbone
) -> tuple[Record, Session]:
    """Scores of a trained cell, and what answers with its prompt or its model."""
    folder = bench.folder(cell)
    if (folder / "config.yaml").is_file() and not any(folder.glob("checkpoints/*")):
        clear_run(folder)  # of a record that was lost: run it again
    config = run_config(cell, bench.recipe, task, bench.backbones[cell.backbone], folder)
    result = train(config, _Warnings(bench.say))
    keys = ("untuned", "steps", "seconds", "best_step", "trainable_parameters")
    test = result.get("test", {}).get(task.metrics[0])
    scores = {"validation": result["value"], "test": test} | {key: result[key] for key in keys}
    if cell.method == "full":
        attention = cell.settings.get("model.attention", "causal")
        model = load_backbone(str(folder / "model"), attention=attention, **cell.numerics)
        return scores, open_session(None, model)
    prompt = load_prompt(folder / "prompt")
    scores["metrics"] = prompt.metadata.get("metrics", {})
    session = open_session(prompt, backbone)
    seen = inspect(session)
    tightest = sorted(seen["vectors"], key=lambda v: -v["nearest"][-1]["cosine"])[:3]
    scores["inspection"] = {key: seen[key] for key in ("norm", "vocabulary_norm", "clusters")} | {
        "labels": {
            label: {"positions": len(facts["positions"]), "random": facts["random"]}
            for label, facts in seen["labels"].items()
        },
        "tightest": [[near["word"] for near in vector["nearest"]] for vector in tightest],
    }
    return scores, session


class _Warnings(NullReporter):
    """Of what a run says the warnings alone."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def say(self, text: str) -> None:
        if text.startswith("warning:"):
            self._say(f"    {text}")


def _judged_on(session: Session, task: TaskConfig, limit: int | None) -> dict[str, float]:
    """All metrics of another task, on its test rows where it has any."""
    split = "test" if task.test else "validation"
    if limit is None or split == "test":
        return evaluate(session, task=task, split=split)["metrics"]
    rows = load_rows(task, split, limit)
    answers = predict_rows(session, task, rows, PredictOptions(pack=True))
    return measure(task, answers.predictions, judged_by(task, rows, session.tokenizer))


def _ensemble(cell: Cell, bench: Bench, task: TaskConfig, backbone: Backbone) -> Record:
    """Joint answers of prompts that differ in their seed (Lester et al. 2021, section 6)."""
    begun = time.monotonic()
    members = [
        cell._replace(method="prompt", seed=seed, settings={}) for seed in cell.settings["seeds"]
    ]
    prompts = [load_prompt(bench.folder(member) / "prompt") for member in members]
    for prompt in prompts:
        check_pair(prompt, backbone)
    sessions = [open_session(prompt, backbone) for prompt in prompts]
    found = {}
    for split in ("validation", "test"):
        if getattr(task, split):
            found[split] = evaluate_ensemble(sessions, task=task, split=split)
    main, metric = found.get("test", found["validation"]), task.metrics[0]
    joint = {way: main[way][metric] for way in ("vote", "likelihood") if way in main}
    return {
        "validation": found["validation"]["vote"][metric],
        "test": found["test"]["vote"][metric] if "test" in found else None,
        "majority": found["validation"]["majority"],
        "majority_test": found["test"]["majority"] if "test" in found else None,
        "prompts": [figures[metric] for figures in main["prompts"]],
        "mean": main["mean"], "best": main["best"], **joint,
        "rows": main["rows"], "fingerprint": backbone.fingerprint, "steps": 0,
        "wall_seconds": round(time.monotonic() - begun, 3),
    }  # fmt: skip


def of_method(settings: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Those that a cell of this method has, of ``key`` or ``method:key`` -> value.

    Prompts without training know the number of rows and the numerics of the backbone alone; an
    ensemble has those of its prompts.
    """
    split = [(*key.rpartition(":")[::2], value) for key, value in settings.items()]
    trained = "prompt" if method == "ensemble" else method
    own = {key: value for whose, key, value in split if whose in ("", trained)}
    if method in ("hard", "few", "ensemble"):
        kept = ("train.max_eval_examples", "model.dtype", "model.quantization")
        return {key: value for key, value in own.items() if key in kept}
    return own


def run_config(cell: Cell, recipe: str, task: TaskConfig, path: str, output: Path) -> RunConfig:
    """The run of a cell: its recipe's settings and, over them, its own."""
    settings = {"train.keep": 1, "train.tensorboard": False} | RECIPES[recipe][cell.method]
    settings |= cell.settings
    every = max(1, settings["train.steps"] // 4) if recipe == "miniature" else 1000
    values: Record = {"backbone": path, "task": task.model_dump(), "output": str(output)}
    if cell.method == "prompt":
        # class labels where there is room for them and more
        init = "class_labels" if (cell.length or 0) >= 20 else "sampled_vocabulary"
        values |= {"method": "prompt-tuning", "prompt": {"length": cell.length, "init": init}}
    else:
        values["method"] = "model-tuning"
    values["train"] = {"seed": cell.seed, "evaluate_every": every, "checkpoint_every": every}
    for key, value in settings.items():
        *parents, last = key.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return parse(RunConfig, values)


def _load(cell: Cell, bench: Bench, held: Record) -> Backbone:
    """The backbone, kept until another one; refused if its weights are not those of before."""
    name = as_folder(cell.backbone, "backbone")
    path, how = bench.backbones[name], {"name": name, **cell.numerics}
    if held.get("how") != how:
        if held:  # the last one's weights would stay in compiled code
            held.clear()
            jax.clear_caches()
        held.update(backbone=load_backbone(path, **cell.numerics), how=how)
    backbone, file = held["backbone"], bench.out / "runs" / name / "fingerprint"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        write_atomically(file, backbone.fingerprint)
    if file.read_text() != backbone.fingerprint:
        raise UserError(f"{path} has changed since cells of {name!r} ran; give it a new name.")
    return backbone


def _append(path: Path, record: Record) -> None:
    """Add a line; if a crash cut the last one short, end that first."""
    cut = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(record) + "\n")


def _time_left(cells: Sequence[Cell], found: dict[Key, Record]) -> str:
    """Estimated from the complete cells that are most alike: but for the seed, ..., of any kind."""
    total = 0.0
    for cell in cells:
        for same in ((0, 1, 2, 3), (0, 1, 2), (0, 2), (2,), ()):
            alike = [
                r["wall_seconds"] for k, r in found.items() if all(k[i] == cell[i] for i in same)
            ]
            if alike:
                total += statistics.mean(alike)
                break
    return f"about {total / 60:.0f} min left" if found else "time left unknown"
