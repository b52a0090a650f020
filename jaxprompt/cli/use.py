"""Commands that use prompts: judge, answer, score, look inside."""

import json
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from jaxprompt.cli.options import (
    BatchOption,
    Loading,
    PromptArgument,
    RowsOutput,
    TaskOption,
    at_home,
)
from jaxprompt.cli.output import check_rows_output, files_of, print_json, say, say_devices
from jaxprompt.config.errors import UserError
from jaxprompt.config.limits import SPLITS


class Questions(NamedTuple):
    """What prompts are judged on."""

    task: TaskOption = None
    data: Annotated[str | None, typer.Option(help="a file with the task's columns")] = None
    split: Annotated[str, typer.Option(help="train, validation or test")] = "validation"
    batch_size: BatchOption = 64


def evaluate(
    prompts: Annotated[
        list[Path] | None,
        typer.Argument(
            callback=at_home,
            help="prompt; none: the bare backbone; several: alone and as an ensemble",
        ),
    ] = None,
    questions: Questions = Questions(),
    report: Annotated[
        bool, typer.Option("--report", help="also show precision and recall of each label")
    ] = False,
    figure: Annotated[
        Path | None,
        typer.Option(callback=at_home, help="draw the confusion matrix (.png .svg .pdf)"),
    ] = None,
    loading: Loading = Loading(),
) -> None:
    """Metrics of a prompt, or of several and of their joint answers, as one JSON object.

    \b
    jaxprompt eval runs/my/prompt --split test --report --figure confusion.png
    jaxprompt eval runs/a/prompt runs/b/prompt
    jaxprompt eval --backbone builtin --task supersense
    """
    if questions.split not in SPLITS:
        raise UserError(f"--split is {questions.split!r}; allowed are train, validation and test.")
    first, *others = prompts or [None]
    if others and (report or figure is not None):
        raise UserError(
            "--report and --figure are of one prompt; name one, or leave these options out."
        )
    check_figure(figure, prompts or [])
    from jaxprompt.runtime import devices

    devices.start()
    from jaxprompt import api
    from jaxprompt.cli.progress import Bar, show_classes
    from jaxprompt.runtime.processes import on_process_zero

    more = loading._asdict()
    session = api.open_session(first, **more)
    more["backbone"] = session.backbone
    sessions = [session, *(api.open_session(prompt, **more) for prompt in others)]
    options = questions._asdict()
    say_devices()
    with Bar("evaluating", None) as bar:
        options |= {"progress": bar.advance, "warn": bar.warn}
        if others:
            result = api.evaluate_ensemble(sessions, **options)
        else:
            result = api.evaluate(session, figure=figure, **options)
    if report:
        show_classes(result)
    on_process_zero(lambda: print(json.dumps(result)))


def check_figure(figure: Path | None, prompts: list[Path]) -> None:
    """Refuse a figure that cannot be written, before any work is done."""
    if figure is None:
        return
    from jaxprompt.evaluation.plots import figure_format
    from jaxprompt.runtime.files import check_output

    figure_format(figure)
    check_output(figure, [file for prompt in prompts for file in files_of(prompt)])


def predict(
    prompt: PromptArgument,
    input: Annotated[
        Path, typer.Option(callback=at_home, help="rows with the task's columns (.jsonl .csv ...)")
    ],
    output: RowsOutput,
    task: TaskOption = None,
    batch_size: BatchOption = 64,
    user: Annotated[
        str | None,
        typer.Option(help="of a library of users' prompts: whose prompt; else the shared one"),
    ] = None,
    loading: Loading = Loading(),
) -> None:
    """Answer every row of a file. The columns of the input are kept; none may have the name of an
    answer's. Where the output cannot be written, the answers are kept elsewhere, and it says where.

    \b
    jaxprompt predict runs/my/prompt --input rows.csv --output answers.csv
    jaxprompt predict runs/my/users --user 4711 --input rows.csv --output answers.csv
    """
    from jaxprompt.runtime import devices

    if user is not None:
        from jaxprompt.methods.user_library import open_library

        prompt = open_library(prompt).prompt_of(user)

    devices.start()
    from jaxprompt import api
    from jaxprompt.cli.progress import Bar
    from jaxprompt.data.sources import read_rows
    from jaxprompt.data.tasks.rules import apply_rule
    from jaxprompt.data.writers import Answered, check_rows, write_rows
    from jaxprompt.runtime.processes import on_process_zero

    held = on_process_zero(lambda: check_rows_output(output, [input, *files_of(prompt)]))
    rows = read_rows(None, str(input), empty=True)
    session = api.open_session(prompt, **loading._asdict())
    chosen = api.prompt_task(session.prompt, task)
    rows = apply_rule(chosen, rows, training=False, origin=str(input))
    check_rows(output, rows, api.answer_form(chosen))
    say_devices()
    with Bar("predicting", len(rows)) as bar:
        options = api.PredictOptions(
            batch_size, progress=bar.advance, origin=str(input), warn=bar.warn
        )
        answers = api.predict_rows(session, chosen, rows, options)
    answered = Answered(rows, api.rows_of(chosen, answers))
    on_process_zero(lambda: write_rows(output, answered, held))


def score(
    input: Annotated[
        Path, typer.Option(callback=at_home, help='rows {"input": ..., "target": ...}')
    ],
    output: RowsOutput,
    prompt: Annotated[
        Path | None, typer.Option(callback=at_home, help="artefact, PEFT adapter or .npy")
    ] = None,
    max_input_length: Annotated[
        int | None,
        typer.Option(min=1, help="text tokens with EOS; default: the prompt's task's, or 512"),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="decoder-only: no separator, no space before targets")
    ] = False,
    batch_size: BatchOption = 64,
    loading: Loading = Loading(),
) -> None:
    """Log-likelihood of targets given inputs, which are filled templates.

    With a decoder-only backbone, and a prompt that records its task, the task's separator stands
    between input and target, and a space before the target, as in eval and predict. Text is taken
    as it is with --raw, without a prompt, and with a prompt that records no task.

    \b
    jaxprompt score --prompt runs/my/prompt --input pairs.jsonl --output scores.jsonl
    """
    from jaxprompt.runtime import devices

    devices.start()
    from jaxprompt import api
    from jaxprompt.cli.progress import Bar
    from jaxprompt.data.sources import read_rows
    from jaxprompt.data.writers import write_rows
    from jaxprompt.runtime.processes import on_process_zero

    held = on_process_zero(lambda: check_rows_output(output, [input, *files_of(prompt)]))
    pairs = read_rows(None, str(input), empty=True)
    api.check_pairs(pairs, str(input))
    session = api.open_session(prompt, **loading._asdict())
    say_devices()
    with Bar("scoring", len(pairs)) as bar:
        rows = api.score(
            session,
            pairs,
            raw=raw,
            max_input_length=max_input_length,
            batch_size=batch_size,
            progress=bar.advance,
            warn=bar.warn,
        )
    on_process_zero(lambda: write_rows(output, rows, held))


def similar(
    prompt: PromptArgument,
    library: Annotated[
        Path, typer.Argument(callback=at_home, help="a folder with prompts, at any depth")
    ],
    any_backbone: Annotated[
        bool, typer.Option("--any-backbone", help="compare prompts of other backbones, too")
    ] = False,
) -> None:
    """The prompts of a library by their similarity to a prompt, as one JSON object and a table.

    To start from the most similar one (SPoT, arXiv 2110.07904), tune PROMPT for a few steps, then
    tune anew with prompt.init=nearest, prompt.file=PROMPT and prompt.library=LIBRARY. The
    similarity is the cosine of the vectors' means; per_token is the mean cosine of single vectors.

    \b
    jaxprompt similar runs/brief/prompt runs
    """
    from jaxprompt.methods.library import similar_prompts

    ranking = similar_prompts(prompt, library, any_backbone)
    say(f"{'cosine':>7}  {'per token':>9}  prompt")
    for one in ranking.similar:
        task = "" if one.task is None else f" ({one.task})"
        say(f"{one.cosine:7.4f}  {one.per_token:9.4f}  {one.prompt}{task}")
    for path, reason in ranking.left_out.items():
        say(f"left out: {path}: {reason}")
    print_json({
        "prompt": str(prompt),
        "similar": [one._asdict() for one in ranking.similar],
        "left_out": [{"prompt": path, "reason": why} for path, why in ranking.left_out.items()],
    })  # fmt: skip
