"""Measure backbones x tasks: hard prompts, soft prompts of some lengths, full fine-tuning.

    python scripts/compare_backbones.py --out runs/compare --seeds 0 1 2 \\
        --backbones small=builtin-small large=runs/large/model --tasks spam data/tasks/boolq.yaml \\
        --only large seeds=0 lengths=20 --only 'large/b*' methods=prompt,full train.steps=200
    python scripts/compare_backbones.py --out runs/compare --report --adaptation a=0,b=1000

The runs are those of `jaxprompt reproduce` (jaxprompt/studies/cells.py: what is complete never
runs again), in a table of any shape. A task is a name or a YAML file, of a task or of a run.
`--only PATTERN key=value ...` changes what matches BACKBONE or BACKBONE/TASK: lengths, seeds,
methods (hard, few, prompt, full) and any setting of a run, such as train.steps=200, of one method
alone as full:train.learning_rate=3e-4; the last one wins.

`--report` runs nothing: it writes OUT/report.md, gap.png and adaptation.png.
"""

import argparse
import fnmatch
import itertools
import re
import sys
from pathlib import Path
from typing import Any

from compare_report import report

from jaxprompt.config.errors import UserError
from jaxprompt.config.overrides import override_value
from jaxprompt.config.schema import TaskConfig
from jaxprompt.studies.cells import RECIPES, Bench, Cell, of_method, run_cells
from jaxprompt.studies.plan import read_task


def plan(options: argparse.Namespace, tasks: dict[str, TaskConfig]) -> list[Cell]:
    """All cells, seed by seed: what is complete at any time is a table of fewer seeds."""
    cells = []
    for backbone, task in itertools.product(options.backbones, tasks):
        lists = {key: getattr(options, key) for key in ("methods", "lengths", "seeds")}
        settings = {"train.eval_rows": options.eval_rows} if options.eval_rows else {}
        for pattern, *changes in options.only:
            where = f"{backbone}/{task}" if "/" in pattern else backbone
            for key, _, value in (change.partition("=") for change in changes):
                if key not in lists and "." not in key:
                    raise UserError(f"--only {pattern}: {key!r} is no key of it; see --help.")
                if fnmatch.fnmatchcase(where, pattern):
                    parsed = override_value(f"[{value}]" if key in lists else value, key)
                    (lists if key in lists else settings)[key] = parsed
        for method in lists["methods"]:
            if method not in ("hard", "few", "prompt", "full"):
                raise UserError(f"Method {method!r} is not hard, few, prompt or full.")
            own = of_method(settings, method)
            lengths = lists["lengths"] if method == "prompt" else [None]
            seeds = [None] if method == "hard" else lists["seeds"]
            for length, seed in itertools.product(lengths, seeds):
                cells.append(Cell(backbone, task, method, length, seed, None, own))
    return sorted(cells, key=lambda cell: cell.seed or 0)  # stable: else in the order above


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
    add("--recipe", choices=list(RECIPES), default="miniature")
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
        tasks = {task.name: task for task in map(read_task, options.tasks)}
        bench = Bench(
            options.out, options.backbones, tasks, options.recipe, options.select_rows,
            options.illegal_rows, options.shots,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
        failed = run_cells(plan(options, tasks), bench)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
