"""The command that says which prompts, or which formulations of a task, are better."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from jaxprompt.cli.options import BatchOption, Loading, TaskOption, at_home
from jaxprompt.cli.output import print_json, say, say_devices
from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.limits import SPLITS
from jaxprompt.config.paths import expanded

if TYPE_CHECKING:
    from jaxprompt.studies.compare import Compared, Rules


class Questions(NamedTuple):
    """Which rows finished prompts are compared on."""

    data: Annotated[
        str | None, typer.Option(help="a file with the columns that the prompts' tasks name")
    ] = None
    task: TaskOption = None
    split: Annotated[str, typer.Option(help="without --data: train, validation or test")] = (
        "validation"
    )
    batch_size: BatchOption = 64


class Judging(NamedTuple):
    """How verdicts are reached."""

    margin: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="also say which is not worse by more than this"),
    ] = None
    level: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="of intervals; 1 - level is that of errors")
    ] = 0.95
    sequential: Annotated[
        bool, typer.Option("--sequential", help="stop answering as soon as each pair is decided")
    ] = False


def compare(
    what: Annotated[
        list[str],
        typer.Argument(help="[NAME=]PROMPT, two or more; or CONFIG.yaml [key=value ...]"),
    ],
    questions: Questions = Questions(),
    judging: Judging = Judging(),
    output: Annotated[
        Path | None,
        typer.Option(callback=at_home, help="directory for a report; of a config the runs', too"),
    ] = None,
    loading: Loading = Loading(),
) -> None:
    """Say which of several prompts is better on the same rows, or that nobody can tell.

    Of a config it trains each formulation in its section `compare` with the same rows and seeds.
    Prints one JSON object: the score of each, and of each pair the difference, its interval, p
    (corrected by Holm) and a verdict.

    \b
    jaxprompt compare runs/a/prompt runs/b/prompt --data rows.csv --output runs/a-or-b
    jaxprompt compare short=runs/a/prompt long=runs/b/prompt --split test --margin 0.02
    jaxprompt compare formulations.yaml train.steps=200
    """
    if what[0].lower().endswith((".yaml", ".yml")):
        if (questions, loading) != (Questions(), Loading()) or judging.sequential:
            raise UserError(
                "--data, --task, --split, --batch-size, --backbone, --tokenizer, --any-backbone "
                "and --sequential are for finished prompts; say it in the config, or leave it out."
            )
        compared, page = _formulations(what, judging, output)
    else:
        compared, page = _prompts(what, questions, judging, loading, output), output
    from jaxprompt.runtime.processes import on_process_zero

    on_process_zero(lambda: _finish(compared, page))


def _prompts(
    what: list[str],
    questions: Questions,
    judging: Judging,
    loading: Loading,
    output: Path | None,
) -> "Compared":
    """Finished prompts on the same rows."""
    named = named_paths(what)
    if questions.split not in SPLITS:
        raise UserError(f"--split is {questions.split!r}; allowed are train, validation and test.")
    from jaxprompt.runtime import devices

    devices.start()
    from jaxprompt.cli.progress import Bar
    from jaxprompt.studies import compare_prompts
    from jaxprompt.studies.compare_report import check_folder

    if output is not None:
        check_folder(output)
    sessions = compare_prompts.open_all(named, **loading._asdict())
    say_devices()
    asking = compare_prompts.Questions(questions.task, questions.data, questions.split)
    with Bar("answering", None) as bar:
        how = compare_prompts.Answering(questions.batch_size, bar.advance, bar.warn)
        return compare_prompts.compare_prompts(sessions, asking, _rules(judging), how)


def _rules(judging: Judging) -> "Rules":
    from jaxprompt.studies.compare import Rules

    return Rules(judging.level, judging.margin, judging.sequential)


def _formulations(
    what: list[str], judging: Judging, output: Path | None
) -> "tuple[Compared, Path]":
    """Formulations of a config, which are trained first; and where the report goes."""
    from jaxprompt.config.compare import CompareConfig
    from jaxprompt.config.overrides import read_config
    from jaxprompt.config.schema import RunConfig
    from jaxprompt.config.validation import parse

    values = read_config(what[0], what[1:])
    section = values.pop("compare", None)
    if section is None:
        raise UserError(
            f"{what[0]} has no section compare; give compare.formulations, or name prompts to "
            "compare."
        )
    if output is not None:
        values["output"] = str(output)
    compare, run = parse(CompareConfig, section, "compare."), parse(RunConfig, values)
    from jaxprompt.runtime import devices

    devices.start([run.train.batch_size, run.train.micro_batch_size or 0], run.mesh)
    from jaxprompt.cli.errors import interruptible
    from jaxprompt.cli.progress import Bar
    from jaxprompt.studies import compare_runs
    from jaxprompt.studies.compare_report import check_folder

    formulations = compare_runs.formulations_of(values, compare)
    out = Path(run.output)
    check_folder(out)
    with interruptible() as signals, Bar("training", run.train.steps) as bar:
        watch = compare_runs.Watch(bar, signals, bar.say, bar.warn)
        rules = _rules(judging)
        return compare_runs.compare_formulations(formulations, compare, rules, out, watch), out


def _finish(compared: "Compared", output: Path | None) -> None:
    """Print the verdicts, and write the report where one is wanted."""
    from jaxprompt.studies.compare_report import write_comparison

    for pair in compared.pairs:
        say(pair.sentence())
    page = None if output is None else str(write_comparison(output, compared))
    print_json(compared.to_json() | {"report": page})


def named_paths(texts: list[str]) -> dict[str, Path]:
    """``named_prompts`` of two texts or more. Raises UserError where there are fewer."""
    named = named_prompts(texts)
    if len(named) < 2:
        raise UserError(
            f"{shown(texts[0])} alone is compared with nothing; name two prompts or more."
        )
    return named


def named_prompts(texts: list[str]) -> dict[str, Path]:
    """Prompts by name, from texts [NAME=]PROMPT; without a name a prompt is called by its path.

    Raises:
        UserError: two have one name.
    """
    named: dict[str, Path] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if not equals or Path(text).exists():
            name, place = text, text
        if name in named:
            raise UserError(f"Two prompts are named {shown(name)}; give one a name: NAME={place}.")
        named[name] = Path(expanded(place))
    return named
