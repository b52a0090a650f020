"""The command that looks into prompts, and explains on rows why they answer as they do."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from jaxprompt.cli.compare import named_prompts
from jaxprompt.cli.options import BatchOption, Loading, TaskOption, at_home
from jaxprompt.cli.output import print_json, say, say_devices
from jaxprompt.cli.use import check_figure
from jaxprompt.config.errors import UserError
from jaxprompt.config.limits import SPLITS
from jaxprompt.config.values import Values

if TYPE_CHECKING:
    from jaxprompt.inference.session import Session
    from jaxprompt.studies.explain import Explained

ROWS = 240


class Explaining(NamedTuple):
    """What is explained, on which rows, and where the pages go. Any of these asks for it."""

    explain: Annotated[
        str | None,
        typer.Option(
            help="all, or some of importance, tokens, lens, probes and words, with commas between"
        ),
    ] = None
    data: Annotated[
        str | None, typer.Option(help="explain on the rows of a file with the task's columns")
    ] = None
    split: Annotated[
        str | None, typer.Option(help="explain on train, validation (the default) or test rows")
    ] = None
    task: TaskOption = None
    rows: Annotated[
        int | None, typer.Option(min=2, help=f"explain on so many, drawn at random [{ROWS}]")
    ] = None
    output: Annotated[
        Path | None,
        typer.Option(callback=at_home, help="directory for a page with figures of each prompt"),
    ] = None
    batch_size: BatchOption = 64


def inspect(
    prompts: Annotated[list[str], typer.Argument(help="[NAME=]PROMPT, one or more")],
    nearest: Annotated[int, typer.Option(min=1, help="words for each vector")] = 5,
    figure: Annotated[
        Path | None, typer.Option(callback=at_home, help="also draw a .png, .svg or .pdf")
    ] = None,
    explaining: Explaining = Explaining(),
    loading: Loading = Loading(),
) -> None:
    """Nearest words, norms and similarities of a prompt's vectors, as one JSON object.

    With rows it explains the prompt, too: which vectors matter (importance), which words of a row
    with the prompt and without it (tokens), what each layer would answer (lens), what can be read
    from the states (probes), and whether the nearest words do what the prompt does (words), each
    beside a random prompt. Of several prompts it says how alike they are.

    \b
    jaxprompt inspect runs/my/prompt --figure prompt.png
    jaxprompt inspect runs/my/prompt --data rows.csv --output runs/why
    jaxprompt inspect a=runs/a/prompt b=runs/b/prompt --explain lens,words --split test
    """
    named = named_prompts(prompts)
    wanted = explaining != Explaining(batch_size=explaining.batch_size)
    pages = _check(named, explaining, figure)
    from jaxprompt.runtime import devices

    devices.start()
    from jaxprompt import api
    from jaxprompt.studies import compare_prompts, explain

    sessions = compare_prompts.open_all(named, **loading._asdict())
    reports: dict[str, Values] = {}
    if wanted:
        for name, session in sessions.items():
            explain.check_explainable(name, session)
    kinship = explain.kin(sessions) if len(sessions) > 1 else None
    for name, session in sessions.items():
        reports[name] = dict(api.inspect(session, nearest=nearest, figure=figure))
        if wanted:
            explained = _explain(name, session, explaining)
            reports[name] |= {"explanation": explained.to_json()}
            reports[name] |= _page(pages.get(name), explained)
    if kinship is None:
        print_json(reports[next(iter(named))])
        return
    result: Values = {"similarity": explain.plain(kinship)}
    if explaining.output is not None:
        from jaxprompt.studies.explain_report import write_kinship

        result["report"] = str(write_kinship(explaining.output, kinship, result))
    print_json({"prompts": reports, **result})


def _check(
    named: Mapping[str, Path], explaining: Explaining, figure: Path | None
) -> dict[str, Path]:
    """The folder of each prompt's page. Refuses bad options before any work is done."""
    if len(named) > 1 and figure is not None:
        raise UserError("--figure is of one prompt; name one, or use --output for all.")
    check_figure(figure, list(named.values()))
    if explaining.split not in (None, *SPLITS):
        raise UserError(f"--split is {explaining.split!r}; allowed are train, validation and test.")
    if explaining.data is not None and explaining.split is not None:
        raise UserError("--data and --split both say which rows; give one of them.")
    if explaining.explain is not None:
        from jaxprompt.studies.explain import parts_of

        parts_of(explaining.explain)
    if explaining.output is None:
        return {}
    from jaxprompt.studies.explain_report import check_folder

    out = explaining.output
    folders = {name: out if len(named) == 1 else out / _folder(name) for name in named}
    if len({*folders.values()}) < len(folders):
        raise UserError(
            "Two prompts would have one folder in --output; give them names: NAME=PROMPT."
        )
    for folder in {out, *folders.values()}:
        check_folder(folder)
    return folders


def _folder(name: str) -> str:
    """The name of a folder for a prompt, which is often called by its path."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "prompt"


def _explain(name: str, session: "Session", explaining: Explaining) -> "Explained":
    from jaxprompt.cli.progress import Bar
    from jaxprompt.studies import compare_prompts, explain

    say_devices()
    asking = compare_prompts.Questions(
        explaining.task, explaining.data, explaining.split or "validation"
    )
    parts = explain.parts_of(explaining.explain or "all")
    with Bar(f"explaining {name}", None) as bar:
        how = compare_prompts.Answering(explaining.batch_size, bar.advance, bar.warn)
        return explain.explain(name, session, asking, parts, explaining.rows or ROWS, how)


def _page(folder: Path | None, explained: "Explained") -> dict[str, str]:
    """Say what could not be explained, and write the page where one is wanted."""
    for note in explained.notes:
        say(note)
    if folder is None:
        return {}
    from jaxprompt.studies.explain_report import write_explained

    return {"report": str(write_explained(folder, explained))}
