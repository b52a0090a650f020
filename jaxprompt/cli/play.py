"""A session in which a person changes the words around a prompt's vectors, and sees what happens.

It reads lines from standard input, from a terminal or a pipe, and writes answers to standard
output. A mistake is one sentence, and the session goes on.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxprompt.cli.errors import explain
from jaxprompt.cli.options import Loading, PromptArgument, TaskOption
from jaxprompt.cli.output import say_devices
from jaxprompt.config.errors import UserError, listed, shown

if TYPE_CHECKING:
    from jaxprompt.config.schema import TaskConfig
    from jaxprompt.data.rows import Row, Rows
    from jaxprompt.data.tokenizer import Tokenizer
    from jaxprompt.inference.predict import Predictions
    from jaxprompt.inference.wording import Wording
    from jaxprompt.methods.tuned import Metadata

WIDTH = 30  # characters of the longest bar
MOST_SHOWN = 12  # labels of an answer, the likeliest first
LABEL_ROOM = 16  # beginnings of labels; other labels with as many or fewer compile nothing
MOST_CHANGED = 5  # rows of a comparison that are shown

HELP = """\
TEXT                    the probability of each label for it
{"COLUMN": "TEXT"}      the same of a template with several columns
/set COLUMN TEXT        one column of the row that is asked
/row N                  row N of the loaded rows
/template TEMPLATE      other words around the vectors, as in: [prompt] {text} It was
/labels a, b            other label words; as many as before take the places of the old ones
/prompt on|off          with the vectors, or the bare backbone
/old                    the words of the prompt's own task again
/show                   template, labels, and whether the vectors are there
/compare [N]            old words against the present ones on the loaded rows (the first N)
/keep FILE.yaml         a config that `jaxprompt train` reads
/quit                   or the end of the input"""


def play(
    prompt: PromptArgument,
    data: Annotated[
        str | None, typer.Option(help="rows for /compare and /row: a file with the task's columns")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="or a split of the task: train, validation or test")
    ] = None,
    task: TaskOption = None,
    loading: Loading = Loading(),
) -> None:
    """Change the words around a prompt's vectors, and see the probabilities of labels move.

    \b
    jaxprompt play runs/quickstart/prompt --split validation
    """
    from jaxprompt.config.limits import SPLITS
    from jaxprompt.runtime import devices

    if split is not None and (split not in SPLITS or data is not None):
        raise UserError(
            f"--split is {split!r}; give train, validation or test, and not --data with it."
        )
    devices.start()
    from jaxprompt import api
    from jaxprompt.data.tasks.splits import read_split

    session = api.open_session(prompt, **loading._asdict())
    own = api.prompt_task(session.prompt, task)
    bare = api.open_session(None, session.backbone, tokenizer=loading.tokenizer)
    roomy = lambda engine: engine._replace(label_room=LABEL_ROOM)
    session = session._replace(engine=roomy(session.engine))
    bare = bare._replace(tokenizer=session.tokenizer, engine=roomy(bare.engine))
    wanted = data is not None or split is not None
    rows = read_split(own, split or "validation", data) if wanted else []
    say_devices()

    def ask(asked: "TaskConfig", some: "Rows", with_prompt: bool) -> "Predictions":
        options = api.PredictOptions(warn=lambda text: print(f"warning: {text}"))
        return api.predict_rows(session if with_prompt else bare, asked, some, options)

    metadata: Metadata = {} if session.prompt is None else session.prompt.metadata
    of_prompt = OfPrompt(own, session.tokenizer, session.length, metadata, str(prompt))
    game = Play(of_prompt, ask, rows)
    print(game.welcome(), flush=True)
    run(game, lines())


def lines() -> Iterator[str]:
    """What is typed; with a history and editing where it is a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401  # input() then has a history
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(" (type /quit to end)")


def run(game: "Play", typed: Iterable[str]) -> None:
    """Answer each line, until one ends the session."""
    for line in typed:
        try:
            told = game.answer(line.rstrip("\r\n"))
        except KeyboardInterrupt:
            told = "interrupted"
        except Exception as error:
            told = explain(error)
            if told is None:
                raise
            told = f"error: {told}"
        if told is None:
            return
        if told:
            print(told, flush=True)


@dataclasses.dataclass(frozen=True)
class OfPrompt:
    """What stays in a session: a prompt of ``length`` vectors with its own task."""

    task: "TaskConfig"
    tokenizer: "Tokenizer"
    length: int
    metadata: "Metadata"
    path: str


Ask = Callable[["TaskConfig", "Rows", bool], "Predictions"]


class Play:
    """The state of a session: the present words, and the row that is asked."""

    def __init__(self, prompt: OfPrompt, ask: Ask, rows: "Rows" = ()):
        """Start with the prompt's own words.

        Args:
            prompt: what stays.
            ask: answers rows by a task, with the prompt's vectors or without.
            rows: for comparisons, in the form that the task's template wants.
        """
        from jaxprompt.inference.wording import Wording

        self.prompt, self.ask, self.rows = prompt, ask, rows
        self.task, self.with_prompt = prompt.task, True
        self.wording: Wording = Wording()
        self.row: Row | None = None
        self.fits = False  # whether the row has what the present template needs
        self.before: dict[str, float] = {}  # probabilities of the last answer to the same row
        self.commands: dict[str, Callable[[str], str | None]] = {
            "set": self._set, "row": self._row, "template": self._template,
            "labels": self._labels, "prompt": self._prompt, "old": self._old, "show": self._show,
            "compare": self._compare, "keep": self._keep, "help": lambda _: HELP,
            "quit": lambda _: None,
        }  # fmt: skip

    def welcome(self) -> str:
        """What a session begins with."""
        loaded = f"\n{len(self.rows)} rows are loaded" if len(self.rows) else ""
        return f"{self._show('')}{loaded}\nType a text, or /help."

    def answer(self, line: str) -> str | None:
        """What a line is answered with; None: it ends the session.

        Raises:
            UserError: the line is a mistake. All is as it was before.
        """
        if not line.strip():
            return ""
        if not line.startswith("/"):
            from jaxprompt.inference.wording import row_of

            return self._ask_anew(row_of(self.task, line))
        name, _, rest = line[1:].partition(" ")
        if name not in self.commands:
            known = listed(f"/{each}" for each in self.commands)
            raise UserError(f"{shown('/' + name)} is no command; there are {known}.")
        return self.commands[name](rest.strip())

    # ---- rows

    def _ask_anew(self, row: "Row") -> str:
        told, self.before = self._told(self.task, self.with_prompt, row, {})
        self.row, self.fits = row, True
        return told

    def _set(self, rest: str) -> str:
        from jaxprompt.data.templates import input_columns

        column, _, text = rest.partition(" ")
        columns = input_columns(self.task)
        if column not in columns:
            raise UserError(f"/set {shown(column)} names none of the columns {listed(columns)}.")
        row = {**(self.row or {}), column: text}
        missing = [name for name in columns if name not in row]
        if missing:
            self.row, self.fits = row, False
            return f"{listed(missing)} still missing: /set {missing[0]} TEXT"
        return self._ask_anew(row)

    def _row(self, rest: str) -> str:
        self._need_rows()
        if not rest.isdecimal() or not 1 <= int(rest) <= len(self.rows):
            raise UserError(f"/row {shown(rest)}: give a number from 1 to {len(self.rows)}.")
        row = self.rows[int(rest) - 1]
        texts = [f"{name}: {row[name]}" for name in row if isinstance(row[name], str)]
        return "\n".join([*texts, self._ask_anew(row)])

    def _need_rows(self) -> None:
        if not len(self.rows):
            raise UserError("No rows are loaded; start with --data FILE or --split validation.")

    def _told(
        self, task: "TaskConfig", with_prompt: bool, row: "Row", before: dict[str, float]
    ) -> tuple[str, dict[str, float]]:
        from jaxprompt.inference.wording import probabilities

        begin = time.perf_counter()
        found = self.ask(task, [row], with_prompt)
        took = f"{1000 * (time.perf_counter() - begin):.0f} ms"
        if found.scores is None or task.labels is None:
            return f"{found.predictions[0]}\n({took})", {}
        now = dict(zip(task.labels, probabilities(found.scores[0]).tolist(), strict=True))
        return f"{bars(now, before)}\n({took})", now

    # ---- words

    def _change(self, wording: "Wording", with_prompt: bool) -> str:
        """Ask the same row in other words. They are kept only where they can be used."""
        from jaxprompt.inference.wording import reworded

        prompt, told, now = self.prompt, "", {}
        task = reworded(prompt.task, wording, prompt.tokenizer, prompt.length)
        other, fits = wording.template != self.wording.template, self.fits
        if self.row is not None and (fits or other):
            try:
                (told, now), fits = self._told(task, with_prompt, self.row, self.before), True
            except UserError as error:
                if not other:
                    raise
                told, fits = f"The words are changed, and the last row does not fit: {error}", False
        self.wording, self.task, self.with_prompt = wording, task, with_prompt
        self.before, self.fits = now, fits
        return told or self._show("")

    def _template(self, rest: str) -> str:
        if not rest:
            raise UserError("/template needs a text with columns in braces, as in: It was {text}")
        return self._change(self.wording._replace(template=rest), self.with_prompt)

    def _labels(self, rest: str) -> str:
        from jaxprompt.inference.wording import labels_in

        return self._change(self.wording._replace(labels=labels_in(rest)), self.with_prompt)

    def _prompt(self, rest: str) -> str:
        if rest not in ("on", "off"):
            raise UserError(f"/prompt {shown(rest)}: give on or off.")
        return self._change(self.wording, rest == "on")

    def _old(self, _: str) -> str:
        from jaxprompt.inference.wording import Wording

        return self._change(Wording(), True)

    def _show(self, _: str) -> str:
        labels = "none: the answer is generated"
        if self.task.labels is not None:
            labels = listed(self.task.labels, max_names=64)
        vectors = f"{self.prompt.length} vectors" if self.with_prompt else "off: the bare backbone"
        return f"template: {self.task.template}\nlabels: {labels}\nprompt: {vectors}"

    # ---- what is it worth

    def _compare(self, rest: str) -> str:
        import numpy as np

        from jaxprompt.data.references import references
        from jaxprompt.studies.compare import Arm, Rules, compare_arms
        from jaxprompt.studies.compare_prompts import row_metric, score_rows, silent

        self._need_rows()
        if rest and not (rest.isdecimal() and 2 <= int(rest) <= len(self.rows)):
            raise UserError(f"/compare {shown(rest)}: give a number from 2 to {len(self.rows)}.")
        rows = [self.rows[number] for number in range(int(rest or len(self.rows)))]
        metric = row_metric(self.prompt.task, silent)
        arms = []
        for name, task, on in (
            ("old", self.prompt.task, True),
            ("new", self.task, self.with_prompt),
        ):
            answers = self.ask(task, rows, on).predictions
            scores = score_rows(metric, answers, references(task, rows))
            arms.append(Arm(name, np.asarray(scores, np.float64)[None], answers, 0.0))
        old, new = arms
        pair = compare_arms([new, old], Rules())[0]
        told = [
            f"{metric} of {len(rows)} rows: old {old.score:.4f}, new {new.score:.4f}",
            f"new words win {pair.wins} rows and lose {pair.losses}",
            pair.sentence(),
        ]
        changed = np.flatnonzero(old.scores[0] != new.scores[0])
        for number in changed[:MOST_CHANGED]:
            mark = "won " if new.scores[0, number] > old.scores[0, number] else "lost"
            told.append(
                f"  {mark} /row {number + 1}: {shown(old.answers[number])} became "
                f"{shown(new.answers[number])}"
            )
        return "\n".join(told)

    def _keep(self, rest: str) -> str:
        from jaxprompt.config.paths import expanded
        from jaxprompt.data.templates import unnamed_counts
        from jaxprompt.inference.wording import kept_config
        from jaxprompt.runtime.files import check_output, write_atomically

        file = Path(expanded(rest))
        if file.suffix not in (".yaml", ".yml"):
            raise UserError(f"/keep {shown(rest)}: give the name of a .yaml file.")
        if file.exists():
            raise UserError(f"{file} is there already; give another name.")
        check_output(file, [])
        output = str(Path("runs") / file.stem)
        vectors = self.prompt.path if self.with_prompt and self.prompt.length else None
        task = self.task
        if vectors is not None:  # the words are those that the vectors have become
            template = unnamed_counts(task.template, self.prompt.tokenizer.encode)
            task = task.model_copy(update={"template": template})
        text = kept_config(self.prompt.metadata, task, output, vectors)
        write_atomically(file, text)
        return f"{file} has these words; run jaxprompt train {file}"


def bars(now: dict[str, float], before: dict[str, float]) -> str:
    """A line for each label, the likeliest first, and how much it has changed in points."""
    full = "█"
    try:
        full.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        full = "#"
    ranked = sorted(now, key=lambda label: -now[label])[:MOST_SHOWN]
    width = max(map(len, ranked))
    told = []
    for label in ranked:
        change = f"  {100 * (now[label] - before[label]):+.1f}" if label in before else ""
        bar = full * round(WIDTH * now[label])
        told.append(f"{label:<{width}}  {bar:<{WIDTH}} {now[label]:6.1%}{change}")
    if len(now) > len(ranked):
        told.append(f"and {len(now) - len(ranked)} more labels")
    return "\n".join(told)
