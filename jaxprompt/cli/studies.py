"""The command that runs the paper's studies again and reports on them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from jaxprompt.cli.options import at_home
from jaxprompt.cli.output import say
from jaxprompt.config.errors import UserError
from jaxprompt.config.paths import is_count

if TYPE_CHECKING:
    from jaxprompt.studies.study import StudyPlan


class Options(NamedTuple):
    """What a study is of."""

    backbone: Annotated[
        list[str] | None, typer.Option(help="[NAME=]PATH; several for scale and adaptation")
    ] = None
    task: Annotated[
        list[str] | None, typer.Option(help="a name or a YAML file; may be repeated")
    ] = None
    seeds: Annotated[int | None, typer.Option(min=1, help="default 3, of ensemble 5")] = None
    length: Annotated[int | None, typer.Option(min=1, help="of prompts")] = None
    recipe: Annotated[
        str | None, typer.Option(help="paper, or miniature: the default of built-in backbones")
    ] = None
    span: Annotated[
        str | None, typer.Option(help="the backbone before LM adaptation, for objective")
    ] = None
    adapted: Annotated[
        list[str] | None, typer.Option(help="NAME=STEPS of a backbone, for adaptation")
    ] = None
    method: Annotated[
        list[str] | None,
        typer.Option(help="of methods, dept and few-shot; may be repeated; default all"),
    ] = None
    rows: Annotated[
        list[int] | None,
        typer.Option(
            min=0, help="of methods: few training rows; of few-shot: of each class; 0: none"
        ),
    ] = None


def reproduce(
    study: Annotated[str, typer.Argument(help="a study, all that the options allow, or report")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="settings of all runs, e.g. train.steps=100")
    ] = None,
    options: Options = Options(),
    output: Annotated[Path, typer.Option(callback=at_home, help="runs, results and report")] = Path(
        "runs/reproduce"
    ),
) -> None:
    """Run or resume a study of the paper or of the methods, and report on all in the output.

    \b
    jaxprompt reproduce length --seeds 1
    jaxprompt reproduce methods --method lora --method prompt-tuning
    jaxprompt reproduce report
    """
    from jaxprompt.studies.catalogue import STUDIES
    from jaxprompt.studies.report import write_report
    from jaxprompt.studies.reproduce import reproduce as run_study

    failed = 0
    if study == "report":
        page = write_report(output)
    else:
        page, plans = None, _plans(study, overrides or [], options)
        try:
            for plan in plans:
                say(f"== {plan.study}: {STUDIES[plan.study].title}")
                page, count = run_study(plan, output, say)
                failed += count
        except KeyboardInterrupt:
            say("interrupted; run the same command again to go on")
            raise typer.Exit(130) from None
    print(json.dumps({"report": str(page), "failed": failed}))
    if failed:
        raise typer.Exit(1)


# the backbone of a study that cannot have a built-in one
DEFAULTS = {"dept": "t5-base=google-t5/t5-base"}


def _plans(study: str, overrides: list[str], options: Options) -> list["StudyPlan"]:
    """The plan of a study; of "all" those of the studies that the options allow."""
    from jaxprompt.studies.catalogue import STUDIES
    from jaxprompt.studies.options import StudyOptions, named, read_overrides
    from jaxprompt.studies.reproduce import make_plan

    steps = named(options.adapted or [])
    wrong = [text for text in steps.values() if not is_count(text)]
    if wrong:
        raise UserError(f"--adapted has {wrong[0]!r}; give NAME=STEPS with a whole number.")
    plans = []
    for name in STUDIES if study == "all" else (study,):
        try:
            chosen = StudyOptions(
                backbones=named(options.backbone or [DEFAULTS.get(study, "builtin")]),
                tasks=options.task or (),
                seeds=options.seeds,
                length=options.length,
                recipe=options.recipe,
                settings=read_overrides(overrides),
                span=options.span,
                adapted={name: int(text) for name, text in steps.items()},
                methods=options.method or (),
                rows=None if options.rows is None else [n for n in options.rows if n],
            )
            plan = make_plan(name, chosen)
        except UserError as error:
            if study != "all":
                raise
            say(f"{name} is left out: {error}")
        else:
            plans.append(plan)
    return plans
