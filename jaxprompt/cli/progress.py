"""What a person watches: a bar on standard error, or plain lines where it is no terminal."""

import time
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from jaxprompt.training.dry_run import DryRun

LINES_EVERY = 10.0  # seconds between lines where there is no terminal


class Bar:
    """Progress of a known amount of work; use it as a context manager."""

    def __init__(self, title: str, total: int | None):
        self.console = Console(stderr=True)
        self.live = self.console.is_terminal
        self.title, self.total, self.last, self.done = title, total, time.monotonic(), 0
        self.begin: tuple[float, int] | None = None
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TimeRemainingColumn(), TextColumn("{task.fields[rates]}")]  # fmt: skip
        self.progress = Progress(*columns, console=self.console, disable=not self.live)
        self.task = self.progress.add_task(title, total=total, rates="")

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *_):
        self.progress.stop()

    def say(self, text: str) -> None:
        """A line that stays above the bar, unbroken: a path in it can be copied."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line on what may not be as the person thinks."""
        self.say(f"warning: {text}")

    def step(self, done: int, rates: dict[str, float]) -> None:
        """``done`` units in all are complete."""
        self.done = done
        now = time.monotonic()
        if self.begin is None:
            self.begin = now, done
        text = "  ".join(f"{_short(name)} {_number(value)}" for name, value in rates.items())
        self.progress.update(self.task, completed=done, rates=text)
        if not self.live and (now - self.last >= LINES_EVERY or done == self.total):
            self.last = now
            speed = (done - self.begin[1]) / max(now - self.begin[0], 1e-9)
            if self.total is None:
                self.say(f"{self.title} {done}  {text}")
                return
            left = f"  {(self.total - done) / speed:.0f} s left" if speed > 0 else ""
            self.say(f"{self.title} {done}/{self.total}  {text}{left}")

    def advance(self, units: int) -> None:
        """``units`` more are complete."""
        self.step(self.done + units, {})


def _short(name: str) -> str:
    return {"examples_per_second": "examples/s", "tokens_per_second": "tokens/s"}.get(name, name)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def show_result(result: dict) -> None:
    """A short table of a finished run, or of each of its tasks, on standard error."""
    if "tasks" in result:
        for of_task in result["tasks"].values():
            show_result(of_task | {key: result[key] for key in ("steps", "seconds")})
        return
    name = f"{result['task']}: {result['metric']}"
    table = Table(title=f"{name} on {result['rows']} validation rows")
    table.add_column("")
    table.add_column(result["metric"], justify="right")
    tuned = result["method"] if result["prompt"] else "full fine-tuning"
    size = f"{result['trainable_parameters']:,} trained parameters"
    table.add_row("majority class", f"{result['majority']:.3f}")
    table.add_row("backbone without tuning", f"{result['untuned']:.3f}")
    table.add_row(f"{tuned} ({size})", f"{result['value']:.3f}")
    if "test" in result:
        table.add_row(f"{tuned}, test split", f"{result['test'][result['metric']]:.3f}")
    Console(stderr=True).print(table)
    where = result["prompt"] or result["model"]
    Console(stderr=True).print(
        f"{result['steps']} steps in {result['seconds']:.0f} s; tuned weights: {where}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def show_dry_run(report: "DryRun") -> None:
    """What a run would be, on standard error."""
    lines = [f"devices: {report['devices']}; backbone: {report['backbone']}"]
    for name, task in report["tasks"].items():
        counts = ", ".join(
            f"{split['rows']:,} {part} ({split['truncated']:,} cut)"
            for part, split in task["splits"].items()
        )
        lines.append(f"task {name}: {counts} rows")
        labels = task["labels"]
        answers = f"labels {', '.join(labels)}" if labels else "answers are written freely"
        lines.append(f"  {answers}; always the commonest: {task['metric']} {task['majority']:.3f}")
    lines.append(f"trained parameters: {report['trained_parameters']:,}; {report['steps']:,} steps")
    if report["memory_gib"] is not None:
        lines.append(f"memory of a device in a step: about {report['memory_gib']:.2f} GiB")
    lines.append(f"nothing was written; a run would write to {report['output']}")
    console = Console(stderr=True)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def show_classes(result: dict) -> None:
    """Precision, recall and F1 of each label, and what is confused, on standard error."""
    console = Console(stderr=True)
    if "report" not in result:
        console.print("the task has no labels, so there is no report of them", markup=False)
        return
    report = result["report"]
    table = Table(title=f"{result['task']}: {result['rows']} rows of {result['data']}")
    for name in ("label", "precision", "recall", "F1", "rows"):
        table.add_column(name, justify="left" if name == "label" else "right")
    for name, own in report["classes"].items():
        figures = (f"{own[key]:.3f}" for key in ("precision", "recall", "f1"))
        table.add_row(name, *figures, str(own["support"]))
    mean = (f"{report['macro'][key]:.3f}" for key in ("precision", "recall", "f1"))
    table.add_row("mean of labels", *mean, str(result["rows"]), style="bold")
    console.print(table)
    console.print("rows: the right label; columns: the prediction", markup=False, soft_wrap=True)
    matrix = Table()
    for name in ("", *report["confusion"]["columns"]):
        matrix.add_column(name, justify="right" if name else "left")
    confusion = report["confusion"]
    for name, counts in zip(confusion["rows"], confusion["counts"], strict=True):
        matrix.add_row(name, *map(str, counts))
    console.print(matrix)


SHOWN = 8  # layouts of a plan, of those that fit and of those that do not


def show_plan(report: dict) -> None:
    """The layouts of a plan and what each needs, on standard error; 80 columns suffice."""
    gib = lambda count: f"{count / 2**30:,.1f}" if count >= 2**30 else f"{count / 2**30:,.2f}"
    head = f"{report['backbone']} on {report['devices']} x {report['kind']}, GiB a device"
    title = f"{head} of {report['memory_gib']:g}\nmesh: data x fsdp x tensor"
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, collapse_padding=True)
    names = ("weights", "state", "saved_activations", "workspace", "total", "sent")
    heads = {"saved_activations": "saved"}
    for name in ("mesh", "remat", "rows", *names, "fits", "ms"):
        table.add_column(heads.get(name, name), justify="right", no_wrap=True)
    fitting = [row for row in report["layouts"] if row["fits"]]
    some = [row for row in report["layouts"][:SHOWN] if row not in fitting[:SHOWN]]
    for row in [*some, *fitting[:SHOWN]]:
        style = "bold" if row == report["best"] else ""
        table.add_row(
            f"{row['data']}x{row['fsdp']}x{row['tensor']}", "yes" if row["remat"] else "no",
            f"{row['rows at a time']} of {row['rows at a time'] * row['parts']}",
            *(gib(row[name]) for name in names), "yes" if row["fits"] else "no",
            f"{1e3 * sum(row['seconds'].values()):,.1f}" if row["seconds"] else "", style=style,
        )  # fmt: skip
    console = Console(stderr=True)
    console.print(table)
    stored, count = report["stored_bytes"], len(report.get("members", [1]))
    each = f" for {count} members" if count > 1 else ""
    console.print(
        f"{report['method']}: {report['trained_parameters']:,} trained parameters, "
        f"{stored / 1e6:,.1f} MB stored{each}", highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    operations = f"{sum(report['flops'].values()) / 1e12:,.2f} TFLOP a step"
    rows = f"rows of {report['inputs']} + {report['targets']} positions"
    if report["best"] is None:
        words = f"{operations} ({rows}); nothing fits: use more devices or smaller micro-batches"
    else:
        floor = (
            "time not known"
            if "floor_seconds" not in report
            else f"at least {1e3 * report['floor_seconds']:,.1f} ms, bound by {report['bound_by']}"
        )
        words = f"{operations} ({rows}), {floor}; use: {' '.join(report['overrides'])}"
    console.print(words, highlight=False, markup=False, soft_wrap=True)


def show_pretraining(result: dict) -> None:
    """Held-out quality of a pre-trained backbone by source, on standard error."""
    table = Table(title="Held-out text, a target token")
    for name in ("objective and source", "loss", "perplexity", "right", "tokens"):
        table.add_column(name, justify="left" if name.startswith("objective") else "right")
    for name, score in result["held_out"].items():
        table.add_row(
            name, f"{score['loss']:.3f}", f"{score['perplexity']:,.1f}",
            f"{score['token_accuracy']:.1%}", f"{score['tokens']:,}",
        )  # fmt: skip
    Console(stderr=True).print(table)
    Console(stderr=True).print(
        f"{result['steps']} steps, {result['tokens']:,} tokens in {result['seconds']:.0f} s; "
        f"backbone: {result['model']}", highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
