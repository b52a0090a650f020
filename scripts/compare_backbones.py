"""Measure backbones x tasks: hard prompts, soft prompts of some lengths, full fine-tuning.

    python scripts/compare_backbones.py --out runs/compare --steps 400 --seeds 0 1 2 \\
        --backbones small=builtin-small large=runs/large/model --tasks spam data/tasks/boolq.yaml \\
        --only large seeds=0 lengths=20 --only 'large/b*' methods=prompt,full steps=200
    python scripts/compare_backbones.py --out runs/compare --report --adaptation a=0,b=1000

A task is a name or a YAML file, of a task or of a run that has one. `--only PATTERN key=value ...`
changes what matches BACKBONE or BACKBONE/TASK: lengths, seeds, methods (hard, few, prompt, full),
steps, batch_size, and any setting of a run, such as full.train.learning_rate=3e-4; the last one
wins.

A cell is one run in OUT/runs. A complete one has a line in OUT/cells.jsonl and never runs again; an
interrupted one goes on from its checkpoint. One that fails is noted in OUT/errors.jsonl and tried
again at the next start; the exit code is then 1. Checkpoints and fine-tuned models are deleted once
a cell is complete. `--report` runs nothing: it writes OUT/report.md, gap.png and adaptation.png.
"""

import argparse
import collections
import copy
import fcntl
import fnmatch
import itertools
import json
import re
import shutil
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from compare_report import KEY, Key, Record, read_records, report

from jaxprompt.api import Session, answer_rows, open_session
from jaxprompt.config import RunConfig, TaskConfig, UserError, parse, read_yaml
from jaxprompt.data.tasks import references, resolve_task, target_texts
from jaxprompt.data.templates import to_text
from jaxprompt.evaluate.metrics import majority
from jaxprompt.evaluate.score import measure
from jaxprompt.model.load import Backbone, load_backbone
from jaxprompt.prompts.artefact import load_prompt
from jaxprompt.train.logbook import write_atomically
from jaxprompt.train.loop import load_rows, train

# Hand-written prompts beside the task's own template. Instructions precede texts that may be cut;
# <> is a sentinel, and its template a cloze: the form that span corruption has taught T5 to answer
TEMPLATES = {
    "supersense": "What kind of thing is this? {gloss} | definition: {gloss} category:"
    " | {gloss} is a kind of <> | This <> is {gloss}",
    "spam": "Is this mail spam or ham? subject: {subject} text: {text}"
    " | classify as ham or spam: {subject} {text}"
    " | This mail is <> . subject: {subject} text: {text}"
    " | category: <> subject: {subject} text: {text}",
    "boolq": "{question}? {passage} | Answer yes or no. {question}? {passage}"
    " | {question}? <> , {passage} | question: {question}? answer: <> passage: {passage}",
    "sentiment": "{text} | Is this review positive or negative? {text}"
    " | {text} This was a <> review. | A <> opinion: {text}",
}
CLOZE = "<extra_id_0>"
# For models that go on writing; what follows || stands between input and answer
CONTINUED = {
    "supersense": "Definition: {gloss} || \nIs it an object, a person, an animal, a plant, a food"
    " or a place? It is a | {gloss} || \nThis is a kind of"
    " | What is meant by '{gloss}'? || \nA kind of",
    "spam": "Subject: {subject}\n{text} || \nIs this mail spam or ham? It is | Classify the mail as"
    " spam or ham.\n\nSubject: {subject}\n{text} || \nClass:",
    "boolq": "{passage}\nQuestion: {question}? || \nAnswer yes or no:"
    " | Question: {question}?\n{passage} || \nIs the answer yes or no? It is",
    "sentiment": "Review: {text} || \nSentiment: | {text} || \nThe review is"
    " | {text} || \nAll in all the reviewer was",
}


class Cell(NamedTuple):
    """One run of the table: what KEY names, and the settings that change its result."""

    backbone: str
    task: str
    method: str
    length: int | None
    seed: int | None
    settings: dict[str, Any]

    def folder(self, out: Path) -> Path:
        """Where it runs."""
        length = f"-P{self.length}" * (self.length is not None)
        seed = f"-seed{self.seed}" * (self.seed is not None)
        return out / "runs" / self.backbone / self.task / f"{self.method}{length}{seed}"


def say(text: str) -> None:
    """A line for the person who watches."""
    print(text, file=sys.stderr, flush=True)


def read_task(name: str) -> TaskConfig:
    """A task by name, or of a YAML file that is a task or a run."""
    if not name.endswith((".yaml", ".yml")):
        return resolve_task(name)
    values = read_yaml(Path(name).read_text(encoding="utf-8"), name)
    return resolve_task(values.get("task", values))


def plan(options: argparse.Namespace, tasks: dict[str, TaskConfig]) -> list[Cell]:
    """All cells, seed by seed: what is complete at any time is a table of fewer seeds."""
    cells = []
    for backbone, task in itertools.product(options.backbones, tasks):
        lists = {key: getattr(options, key) for key in ("methods", "lengths", "seeds")}
        settings = {key: getattr(options, key) for key in ("steps", "batch_size", "eval_rows")}
        for pattern, *changes in options.only:
            where = f"{backbone}/{task}" if "/" in pattern else backbone
            for key, _, value in (change.partition("=") for change in changes):
                if key not in lists | settings and key.split(".")[0] not in ("prompt", "full"):
                    raise UserError(f"--only {pattern}: {key!r} is no key of it; see --help.")
                if fnmatch.fnmatchcase(where, pattern):
                    parsed = read_yaml(f"[{value}]" if key in lists else value, key)
                    (lists if key in lists else settings)[key] = parsed
        for method in lists["methods"]:
            if method not in ("hard", "few", "prompt", "full"):
                raise UserError(f"Method {method!r} is not hard, few, prompt or full.")
            own = {k: v for k, v in settings.items() if "." not in k or k.startswith(f"{method}.")}
            lengths = lists["lengths"] if method == "prompt" else [None]
            seeds = [None] if method == "hard" else lists["seeds"]
            own = {"eval_rows": settings["eval_rows"]} if method in ("hard", "few") else own
            for length, seed in itertools.product(lengths, seeds):
                cells.append(Cell(backbone, task, method, length, seed, own))
    return sorted(cells, key=lambda cell: cell.seed or 0)  # stable: else in the order above


def append(path: Path, record: Record) -> None:
    """Add a line; if a crash cut the last one short, end that first."""
    cut = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(record) + "\n")


def run_config(cell: Cell, task: TaskConfig, path: str, output: Path) -> RunConfig:
    """The recipes of the paper's prompt tuning and of configs/full_finetuning.yaml."""
    train = {key: cell.settings[key] for key in ("steps", "batch_size", "eval_rows")}
    every = max(1, train["steps"] // 4)
    train |= {"seed": cell.seed, "evaluate_every": every, "checkpoint_every": every}
    train |= {"schedule": "linear", "keep": 1, "tensorboard": False}
    values: Record = {"backbone": path, "task": task.model_dump(), "output": str(output)}
    if cell.length is not None:
        # class labels where there is room for them and more
        init = "class_labels" if cell.length >= 20 else "sampled_vocabulary"
        values["prompt"] = {"length": cell.length, "init": init}
        train |= {"optimizer": "adafactor-t5x", "learning_rate": 0.3}
    else:
        values["method"] = "model-tuning"
        train |= {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0}
    values["train"] = train
    for key in (key for key in cell.settings if "." in key):
        _, *parents, last = key.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = cell.settings[key]
    return parse(RunConfig, values)


def with_template(task: TaskConfig, template: str) -> TaskConfig:
    """The task in another form; where that is a cloze, answers begin with the sentinel."""
    if "||" in template:
        template, separator = template.split(" || ")
        return task.model_copy(update={"template": template, "separator": separator.rstrip(" ")})
    changed: Record = {"template": template.replace("<>", CLOZE)}
    labels = task.labels or []
    if "<>" in template:
        words = {label: label for label in labels} | (task.label_map or {})
        changed["labels"] = [f"{CLOZE} {label}" for label in labels]
        changed["label_map"] = {value: f"{CLOZE} {label}" for value, label in words.items()}
    return task.model_copy(update=changed)


def quality(session: Session, task: TaskConfig, rows) -> float:
    """The task's first metric, by rank classification."""
    predictions = answer_rows(session, task, rows).predictions
    return measure(task, predictions, references(task, rows))[task.metrics[0]]


def hard_prompt(session: Session, task: TaskConfig, rows: dict, few) -> tuple[Record, TaskConfig]:
    """The template that is best on the validation rows `few`, measured on all of `rows`."""
    start = time.monotonic()
    known = CONTINUED if session.tokenizer.one_sequence else TEMPLATES
    others = [text for text in known.get(task.name, "").split(" | ") if text]
    forms = [with_template(task, template) for template in (task.template, *others)]
    scores = [quality(session, form, few) for form in forms]
    best = forms[int(np.argmax(scores))]
    found: Record = {"test": None, **{name: quality(session, best, rows[name]) for name in rows}}
    found |= {
        "template": best.template,
        "separator": best.separator,
        "templates": len(forms),
        "template_scores": scores,
    }
    return found | {"steps": 0, "seconds": round(time.monotonic() - start, 3)}, best


def with_shots(task: TaskConfig, rows, count: int, seed: int, words) -> TaskConfig:
    """The task with ``count`` answered training rows in front, labels in turn.

    Rows are drawn from those of at most 48 tokens where there are any, since each is read again
    with every question.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    texts = [to_text(task, rows[i]) for i in order[:2000]]
    short = [pair for pair in texts if len(words.encode(pair[0])) <= 48] or texts
    chosen = []
    for label in itertools.islice(itertools.cycle(task.labels or []), count):
        found = next((p for p in short if p[1] == label and p not in chosen), None)
        if found is None:
            raise UserError(
                f"--shots {count}: too few short rows of label {label!r}; ask for fewer."
            )
        chosen.append(found)
    space = "" if task.separator[-1:].isspace() else " "
    shots = "".join(f"{text}{task.separator}{space}{label}\n\n" for text, label in chosen)
    room = task.max_input_length + len(words.encode(shots))
    escaped = shots.replace("{", "{{").replace("}", "}}")
    return task.model_copy(update={"template": escaped + task.template, "max_input_length": room})


def free_generation(session: Session, task: TaskConfig, rows) -> Record:
    """Greedy generation without labels: the share of outputs that are none of the labels.

    Sentinels count, although the package's decoding drops them: "<extra_id_0> food" is not "food".
    """
    words, labels = copy.copy(session.tokenizer), task.labels or []
    encoded = [ids[:-1] for ids in words.encode_targets(labels, task.separator)]
    legal = {words.show(ids): label for ids, label in zip(encoded, labels, strict=True)}
    shown = lambda ids: words.show(list(itertools.takewhile(lambda id: id != words.eos_id, ids)))
    words.decode = shown
    # a few tokens more than the longest label settle whether an output is one
    free = {"labels": None, "max_target_length": max(map(len, encoded)) + 4}
    session = session._replace(tokenizer=words)
    outputs = answer_rows(session, task.model_copy(update=free), rows).predictions
    illegal = [output for output in outputs if output not in legal]
    right = [legal.get(o) == t for o, t in zip(outputs, target_texts(task, rows), strict=True)]
    common = collections.Counter(illegal).most_common(5)
    found = {"illegal": len(illegal) / len(rows), "illegal_rows": len(rows)}
    return found | {"illegal_examples": common, "generated_accuracy": sum(right) / len(rows)}


def measure_cell(cell: Cell, task: TaskConfig, path: str, held: Record, options) -> Record:
    """The record of one cell, whose run is started or taken up again."""
    start = time.monotonic()
    folder, backbone = cell.folder(options.out), load(cell.backbone, path, held, options.out)
    size, fingerprint = sum(x.size for x in jax.tree.leaves(backbone.params)), backbone.fingerprint
    splits = [split for split in ("validation", "test") if getattr(task, split)]
    rows = {split: load_rows(task, split, cell.settings["eval_rows"]) for split in splits}
    metric, limit = task.metrics[0], options.illegal_rows

    if cell.method in ("hard", "few"):
        session = open_session(None, backbone)
        few = load_rows(task, "validation", options.select_rows)
        if cell.method == "few":
            # the shots stand before the template that is best without any
            held_out = {name: few for name in ("validation",)}
            _, task = hard_prompt(session, task, held_out, few)
            drawn = cell.seed or 0
            training = load_rows(task, "train")
            task = with_shots(task, training, options.shots, drawn, session.tokenizer)
            begun = time.monotonic()
            scores: Record = {"test": None, "steps": 0, "shots": options.shots}
            scores |= {name: quality(session, task, rows[name]) for name in rows}
            scores["seconds"] = round(time.monotonic() - begun, 3)
        else:
            scores, task = hard_prompt(session, task, rows, few)
    else:
        if folder.is_dir() and not (folder / "config.yaml").is_file():
            shutil.rmtree(folder)  # killed before anything was written
        config = run_config(cell, task, path, folder)
        result = train(config)
        keys = ("untuned", "steps", "seconds", "best_step", "trainable_parameters")
        scores = {"validation": result["value"], "test": result.get("test", {}).get(metric)}
        scores |= {key: result[key] for key in keys}
        prompt = load_prompt(folder / "prompt") if cell.method == "prompt" else None
        model = load_backbone(str(folder / "model"), unroll=None) if prompt is None else backbone
        session = open_session(prompt, model)
    record = dict(zip(KEY, cell, strict=False)) | {"parameters": size, "metric": metric} | scores
    if task.labels:
        record |= free_generation(session, task, load_rows(task, "validation", limit))
    for split, name in (("validation", "majority"), ("test", "majority_test")):
        judged_by = references(task, rows.get(split, []))
        record[name] = majority(metric, judged_by, task.labels) if judged_by else None
    record |= {"rows": len(rows["validation"]), "fingerprint": fingerprint}
    record["wall_seconds"] = round(time.monotonic() - start, 3)
    return record | {"settings": cell.settings}


def load(name: str, path: str, held: Record, out: Path) -> Backbone:
    """The backbone, kept until the next one; refused if its weights are not those of before."""
    if held.get("name") != name:
        held.clear()
        jax.clear_caches()
        held.update(backbone=load_backbone(path, unroll=None), name=name)
    backbone, file = held["backbone"], out / "runs" / name / "fingerprint"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        write_atomically(file, backbone.fingerprint)
    if file.read_text() != backbone.fingerprint:
        raise UserError(f"{path} has changed since cells of {name!r} ran; give it a new name.")
    return backbone


def time_left(cells: list[Cell], found: dict[Key, Record]) -> str:
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


def measure_all(options: argparse.Namespace) -> int:
    """Run what is missing; the number of cells that failed."""
    out = options.out
    # seeds share their compiled code, and so do starts of this script
    jax.config.update("jax_compilation_cache_dir", str(out.absolute() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    tasks = {task.name: task for task in map(read_task, options.tasks)}
    cells, found, held, failed = plan(options, tasks), read_records(out), {}, 0
    todo = [cell for cell in cells if cell[: len(KEY)] not in found]
    for cell in (cell for cell in cells if cell not in todo):
        if found[cell[: len(KEY)]]["settings"] != cell.settings:
            say(f"{cell.folder(out)} is complete with other settings and stays as it is")
    for number, cell in enumerate(todo):
        count = f"[{len(cells) - len(todo) + number + 1}/{len(cells)}]"
        say(f"{count} {'/'.join(cell.folder(out).parts[-3:])}, {time_left(todo[number:], found)}")
        try:
            path = options.backbones[cell.backbone]
            record = measure_cell(cell, tasks[cell.task], path, held, options)
        except Exception as error:  # whatever is wrong with one cell, the others go on
            failed += 1
            say(f"    FAILED: {type(error).__name__}: {str(error)[:500]}")
            note = {"cell": cell._asdict(), "error": str(error), "trace": traceback.format_exc()}
            append(out / "errors.jsonl", note)
            continue
        append(out / "cells.jsonl", record)
        found[cell[: len(KEY)]] = record
        shown = {key: record.get(key) for key in ("validation", "test", "illegal", "wall_seconds")}
        say("    " + ", ".join(f"{k} {v:.3f}" for k, v in shown.items() if v is not None))
        for name in ("checkpoints", "model"):  # hundreds of megabytes of each fine-tuning
            shutil.rmtree(cell.folder(out) / name, ignore_errors=True)
    say(f"{len(cells)} cells: {len(todo) - failed} measured now, {failed} failed")
    return failed


def named(texts: list[str], kind: Any = str) -> dict[str, Any]:
    """["a=1", "b=2"] as a mapping."""
    wrong = [text for text in texts if not re.fullmatch(r"[\w.-]+=.+", text)]
    if wrong:
        raise UserError(f"{wrong[0]!r} must have the form name=value.")
    return {name: kind(value) for name, _, value in (text.partition("=") for text in texts)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--backbones", nargs="+", default=[], metavar="NAME=PATH")
    add("--tasks", nargs="+", default=["supersense", "spam"])
    add("--methods", nargs="+", default=["hard", "prompt", "full"])
    add("--lengths", nargs="+", type=int, default=[1, 20, 100])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=400)
    add("--batch-size", type=int, default=32)
    add("--eval-rows", type=int, help="at most, of validation and of test (default: all)")
    add("--select-rows", type=int, default=200, help="that choose among hard prompts")
    add("--shots", type=int, default=6, help="answered rows before the question, for few")
    add("--illegal-rows", type=int, default=300, help="that are generated for")
    add("--only", nargs="+", action="append", default=[], metavar=("PATTERN", "KEY=VALUE"))
    add("--report", action="store_true", help="only tables and figures of what is complete")
    add("--split", choices=["test", "validation"], default="test", help="of the report")
    add("--adaptation", default="", metavar="NAME=STEPS,...", help="backbones by adaptation")
    options = parser.parse_args()
    try:
        options.backbones = named(options.backbones)
        options.adaptation = named(list(filter(None, options.adaptation.split(","))), int)
        if options.report:
            report(options)
            return
        if not options.backbones:
            raise UserError("Name at least one backbone: --backbones name=path.")
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"Another process measures in {options.out}.") from None
            failed = measure_all(options)
    except UserError as error:
        sys.exit(f"{error}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
