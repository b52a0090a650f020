"""``jaxprompt plan | pretrain | train | eval | predict | score | inspect | reproduce``.

Machine output goes to standard output or a file, everything a person watches to standard error.
A user's mistake is one sentence and exit code 2. Heavy libraries are imported by the command that
needs them, so that ``--help`` answers at once.
"""

import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxprompt import __version__
from jaxprompt.config.errors import UserError
from jaxprompt.config.overrides import load_config, read_config
from jaxprompt.config.paths import expanded, is_count
from jaxprompt.config.pretrain import PretrainConfig
from jaxprompt.config.schema import MOST_ROWS, RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.runtime.compilation import keep_compiled

if TYPE_CHECKING:
    from jaxprompt.runtime.signals import Signals

app = typer.Typer(
    help="Soft prompt tuning of frozen T5 and decoder-only models in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def at_home(path: Any) -> Any:
    """A path, or several, with ``~`` written out: shells do not do it behind ``--output=``."""
    if isinstance(path, list | tuple):
        return [Path(expanded(one)) for one in path]
    return None if path is None else Path(expanded(path))


BackboneOption = Annotated[
    str | None,
    typer.Option(
        help="hub id, directory, T5X or GGUF file, builtin, smollm2; default: the prompt's"
    ),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(help="hub id or directory; default: the prompt's, or beside the weights"),
]
TaskOption = Annotated[str | None, typer.Option(help="a built-in task; default: the prompt's own")]
BatchOption = Annotated[int, typer.Option(min=1, max=MOST_ROWS, help="rows in a batch")]
PromptArgument = Annotated[
    Path, typer.Argument(callback=at_home, help="artefact, PEFT adapter or .npy")
]
AnyBackbone = Annotated[bool, typer.Option(help="allow other weights of the same width")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"jaxprompt {__version__}")
        raise typer.Exit()


@app.callback()
def before_any_command(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="print it")
    ] = False,
) -> None:
    """Nothing is written where only help is wanted."""
    keep_compiled()


@app.command()
def train(
    config: Annotated[Path, typer.Argument(callback=at_home, help="YAML file of the run")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. train.steps=100")
    ] = None,
) -> None:
    """Tune a prompt, or go on with the run in its output directory."""
    run = load_config(config, overrides or [])
    from jaxprompt.runtime import devices

    devices.start([run.train.batch_size, run.train.micro_batch or 0], run.mesh)
    from jaxprompt.cli.progress import Bar, show_result
    from jaxprompt.training.loop import train as run_training

    with interruptible() as signals, Bar("training", run.train.steps) as bar:
        result = run_training(run, bar, signals)
    show_result(result)
    print(json.dumps(result))


@app.command()
def pretrain(
    config: Annotated[Path, typer.Argument(callback=at_home, help="YAML file of the run")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, e.g. train.steps=100")
    ] = None,
) -> None:
    """Pre-train a backbone on text, or adapt one; goes on with the run in its output directory."""
    run = parse(PretrainConfig, read_config(config, overrides or []))
    from jaxprompt.runtime import devices

    devices.start([run.train.batch_size], run.mesh)
    from jaxprompt.cli.progress import Bar, show_pretraining
    from jaxprompt.training.pretrain import pretrain as run_pretraining

    with interruptible() as signals, Bar("pre-training", run.train.steps) as bar:
        result = run_pretraining(run, bar, signals)
    show_pretraining(result)
    print(json.dumps(result))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(callback=at_home, help="YAML file of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
    devices: Annotated[int, typer.Option(min=1, max=2**16, help="number of devices")] = 1,
    kind: Annotated[
        str, typer.Option(help="cpu, tpu-v4, tpu-v5e, tpu-v5p, tpu-v6e, a100, h100 or h200")
    ] = "tpu-v4",
    memory: Annotated[
        float | None, typer.Option(help="GiB of a device, instead of the kind's")
    ] = None,
    inputs: Annotated[
        int | None, typer.Option(min=1, max=2**20, help="positions of a row, prompt included")
    ] = None,
) -> None:
    """Memory and time of a step before there is a run, and the cheapest mesh that fits."""
    run = load_config(config, overrides or [])
    from jaxprompt.cli.progress import show_plan
    from jaxprompt.training.plan import plan_of

    report = plan_of(run, devices=devices, kind=kind, memory=memory, inputs=inputs)
    show_plan(report)
    print(json.dumps(report))


@app.command("eval")
def evaluate(
    prompts: Annotated[
        list[Path] | None,
        typer.Argument(
            callback=at_home,
            help="prompt; none: the bare backbone; several: alone and as an ensemble",
        ),
    ] = None,
    task: TaskOption = None,
    data: Annotated[str | None, typer.Option(help="a file with the task's columns")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "validation",
    backbone: BackboneOption = None,
    tokenizer: TokenizerOption = None,
    batch_size: BatchOption = 64,
    any_backbone: AnyBackbone = False,
) -> None:
    """Metrics of a prompt, or of several and of their joint answers, as one JSON object."""
    if split not in ("train", "validation", "test"):
        raise UserError(f"--split is {split!r}; allowed are train, validation and test.")
    from jaxprompt.runtime import devices

    devices.start()
    from jaxprompt import api
    from jaxprompt.cli.progress import Bar
    from jaxprompt.runtime.processes import on_process_zero

    first, *others = prompts or [None]
    more: dict[str, Any] = {"tokenizer": tokenizer, "any_backbone": any_backbone}
    session = api.open_session(first, backbone, **more)
    sessions = [session] + [api.open_session(p, session.backbone, **more) for p in others]
    options: dict[str, Any] = {"task": task, "data": data, "split": split, "batch_size": batch_size}
    say_devices()
    with Bar("evaluating", None) as bar:
        options |= {"progress": bar.advance, "warn": bar.warn}
        if others:
            report = api.evaluate_ensemble(sessions, **options)
        else:
            report = api.evaluate(session, **options)
    on_process_zero(lambda: print(json.dumps(report)))


@app.command()
def predict(
    prompt: PromptArgument,
    input: Annotated[
        Path, typer.Option(callback=at_home, help="rows with the task's columns (.jsonl .csv ...)")
    ],
    output: Annotated[
        Path,
        typer.Option(
            callback=at_home,
            help="rows with a prediction each (.jsonl .csv .tsv .parquet, /dev/stdout)",
        ),
    ],
    task: TaskOption = None,
    backbone: BackboneOption = None,
    tokenizer: TokenizerOption = None,
    batch_size: BatchOption = 64,
    any_backbone: AnyBackbone = False,
) -> None:
    """Answer every row of a file. The columns of the input are kept; none may have the name of an
    answer's. Where the output cannot be written, the answers are kept elsewhere, and it says where.
    """
    from jaxprompt.runtime import devices

    devices.start()
    from jaxprompt import api
    from jaxprompt.cli.progress import Bar
    from jaxprompt.data.sources import read_rows
    from jaxprompt.data.tasks.rules import apply_rule
    from jaxprompt.data.writers import Answered, check_rows, write_rows
    from jaxprompt.runtime.processes import on_process_zero

    held = on_process_zero(lambda: check_rows_output(output, [input, *files_of(prompt)]))
    rows = read_rows(None, str(input), empty=True)
    session = api.open_session(prompt, backbone, tokenizer=tokenizer, any_backbone=any_backbone)
    chosen = api.prompt_task(session.prompt, task)
    rows = apply_rule(chosen, rows, training=False, origin=str(input))
    check_rows(output, rows, api.answer_form(chosen))
    say_devices()
    with Bar("predicting", len(rows)) as bar:
        answers = api.answer_rows(
            session, chosen, rows, batch_size=batch_size, progress=bar.advance, origin=str(input),
            warn=bar.warn,
        )  # fmt: skip
    found = Answered(rows, api.rows_of(chosen, answers))
    on_process_zero(lambda: write_rows(output, found, held))


@app.command()
def score(
    input: Annotated[
        Path, typer.Option(callback=at_home, help='rows {"input": ..., "target": ...}')
    ],
    output: Annotated[
        Path,
        typer.Option(
            callback=at_home,
            help="rows with log_likelihood and tokens (.jsonl .csv .tsv .parquet, /dev/stdout)",
        ),
    ],
    prompt: Annotated[
        Path | None, typer.Option(callback=at_home, help="artefact, PEFT adapter or .npy")
    ] = None,
    backbone: BackboneOption = None,
    tokenizer: TokenizerOption = None,
    max_input_length: Annotated[
        int | None,
        typer.Option(min=1, help="text tokens with EOS; default: the prompt's task's, or 512"),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="decoder-only: no separator, no space before targets")
    ] = False,
    batch_size: BatchOption = 64,
    any_backbone: AnyBackbone = False,
) -> None:
    """Log-likelihood of targets given inputs, which are filled templates.

    With a decoder-only backbone, and a prompt that records its task, the task's separator stands
    between input and target, and a space before the target, as in eval and predict. Text is taken
    as it is with --raw, without a prompt, and with a prompt that records no task.
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
    session = api.open_session(prompt, backbone, tokenizer=tokenizer, any_backbone=any_backbone)
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


@app.command()
def inspect(
    prompt: PromptArgument,
    backbone: BackboneOption = None,
    tokenizer: TokenizerOption = None,
    nearest: Annotated[int, typer.Option(min=1, help="words for each vector")] = 5,
    figure: Annotated[
        Path | None, typer.Option(callback=at_home, help="also draw a .png, .svg or .pdf")
    ] = None,
    any_backbone: AnyBackbone = False,
) -> None:
    """Nearest words, norms and similarities of a prompt's vectors, as one JSON object."""
    from jaxprompt import api

    if figure is not None:
        from jaxprompt.evaluation.analysis import figure_format
        from jaxprompt.runtime.files import check_output

        figure_format(figure)
        check_output(figure, files_of(prompt))
    session = api.open_session(prompt, backbone, tokenizer=tokenizer, any_backbone=any_backbone)
    print_json(api.inspect(session, nearest=nearest, figure=figure))


@app.command()
def export(
    prompt: PromptArgument,
    output: Annotated[Path, typer.Option(callback=at_home, help="a folder for the result")],
    backbone: BackboneOption = None,
) -> None:
    """Write OUTPUT/adapter for PEFT and, of a backbone that only jaxprompt knows, OUTPUT/backbone
    for transformers. Prints where they are, as one JSON object."""
    from jaxprompt.methods.artefact import load_prompt, save_peft
    from jaxprompt.models.checkpoints.export import save_backbone
    from jaxprompt.models.checkpoints.hub import only_here

    found = load_prompt(prompt)
    base = backbone or found.facts.get("backbone", {}).get("source")
    if base is not None and only_here(base):
        from jaxprompt.runtime import devices

        devices.start()
        save_backbone(output / "backbone", base)
        base = str((output / "backbone").absolute())
    save_peft(output / "adapter", found, base_model=base)
    print_json({"adapter": str(output / "adapter"), "backbone": base})


@app.command()
def reproduce(
    study: Annotated[str, typer.Argument(help="a study of Lester et al. (2021), all, or report")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="settings of all runs, e.g. train.eval_rows=600")
    ] = None,
    backbone: Annotated[
        list[str] | None, typer.Option(help="[NAME=]PATH; several for scale and adaptation")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="a name or a YAML file; may be repeated")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="default 3, of ensemble 5")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="of prompts")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="paper, or miniature: the default of built-in backbones")
    ] = None,
    span: Annotated[
        str | None, typer.Option(help="the backbone before LM adaptation, for objective")
    ] = None,
    adapted: Annotated[
        list[str] | None, typer.Option(help="NAME=STEPS of a backbone, for adaptation")
    ] = None,
    output: Annotated[Path, typer.Option(callback=at_home, help="runs, results and report")] = Path(
        "runs/reproduce"
    ),
) -> None:
    """Run or resume a study of the paper, and write a report of all studies in the output."""
    from jaxprompt.studies.catalogue import STUDIES
    from jaxprompt.studies.plan import named, read_overrides
    from jaxprompt.studies.report import write_report
    from jaxprompt.studies.reproduce import make_plan
    from jaxprompt.studies.reproduce import reproduce as run_study

    say = lambda text: print(text, file=sys.stderr, flush=True)
    failed = 0
    if study == "report":
        page = write_report(output)
    else:
        steps = named(adapted or [])
        wrong = [text for text in steps.values() if not is_count(text)]
        if wrong:
            raise UserError(f"--adapted has {wrong[0]!r}; give NAME=STEPS with a whole number.")
        chosen: dict[str, Any] = {
            "backbones": named(backbone or ["builtin"]), "tasks": task or (), "seeds": seeds,
            "length": length, "recipe": recipe, "settings": read_overrides(overrides or []),
            "span": span, "adapted": {name: int(text) for name, text in steps.items()},
        }  # fmt: skip
        plans = []
        for name in STUDIES if study == "all" else (study,):
            try:
                plans.append(make_plan(name, **chosen))
            except UserError as error:
                if study != "all":
                    raise
                say(f"{name} is left out: {error}")
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


@contextlib.contextmanager
def interruptible() -> Iterator["Signals"]:
    """Ends the command with exit code 0 and a word on how to go on, where a signal asks for it.

    Of several processes, each hears of a signal from JAX's runtime, and none outlives another.
    """
    import jax

    from jaxprompt.runtime.signals import Interrupted, Signals

    several = jax.process_count() > 1
    try:
        with Signals(install=not several) as signals:
            yield signals
    except Interrupted as why:
        print(f"{why}; run the same command again to go on", file=sys.stderr)
        raise typer.Exit(0) from None
    except (UserError, OSError):
        raise
    except KeyboardInterrupt:  # typer would end without a word
        print(
            "interrupted; run the same command again to go on from the last checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        if several:
            os._exit(130)
        raise typer.Exit(130) from None
    except BaseException as error:
        if not several:
            raise
        sentence = explain(error) if isinstance(error, Exception) else None
        if sentence is None:
            traceback.print_exc()
        else:
            print(f"error: {sentence}", file=sys.stderr)
        print(
            f"process {jax.process_index()} of {jax.process_count()} ends ({error!r}), perhaps "
            "because another one did: see what the others say, then start all of them again to go "
            "on from the last checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(1)  # without waiting for those that will not come


def files_of(prompt: Path | None) -> list[Path]:
    """The files of a prompt, none of which may be an output."""
    if prompt is None:
        return []
    return [prompt, *prompt.iterdir()] if prompt.is_dir() else [prompt]


def check_rows_output(path: Path, inputs: list[Path]) -> int | None:
    """``files.check_output`` for a file of rows, whose name says a format."""
    from jaxprompt.data.writers import format_of
    from jaxprompt.runtime.files import check_output

    format_of(path)
    return check_output(path, inputs)


def print_json(value: Any) -> None:
    """Print a value readably, with escapes where standard output cannot show a character."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(text)


def say_devices() -> None:
    """A line on what computes, so that a GPU that is not used is noticed."""
    import jax

    from jaxprompt.runtime import devices

    if jax.process_index() == 0:
        print(f"computing on {devices.describe()}", file=sys.stderr, flush=True)


def check_form(arguments: list[str]) -> None:
    """Refuse settings that are typed as options, with the form that they have."""
    command = next(iter(arguments), None)
    if command not in ("train", "pretrain", "plan", "reproduce"):
        return
    own = () if command == "reproduce" else RunConfig.model_fields
    for argument in arguments[1:]:
        key, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and (re.fullmatch(r"\w+(\.\w+)+", key) or key in own):
            given = f"{key}={value}" if equals else f"{key}=VALUE"
            raise UserError(
                f"No such option: --{key[:80]}; settings are written key=value, without dashes: "
                f"{given[:100]}."
            )


def explain(error: Exception) -> str | None:
    """A sentence for an error of the machine or of a library that a user can mend."""
    if isinstance(error, UserError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text:
        return (
            f"The memory ran out ({text[:160] or 'of this machine'}); lower train.micro_batch of a "
            "run or --batch-size of a command, or see what a run needs with `jaxprompt plan`."
        )
    if isinstance(error, OSError):  # a full disk, a file without permission
        return f"{error.strerror or text}: {error.filename or ''}"
    if type(error).__name__ == "SafetensorError":  # not imported for this
        return f"A safetensors file cannot be read or written: {text[:300]}."
    return None


def main() -> None:
    """Runs a command; turns a user's mistake into one sentence and exit code 2."""
    try:
        check_form(sys.argv[1:])
        try:
            app(standalone_mode=True)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python will flush what is left
        sys.exit(2)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            traceback.print_exc()
            print(f"This is a fault of jaxprompt ({versions()}); report it with the lines above.",
                  file=sys.stderr)  # fmt: skip
            sys.exit(1)
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        sys.exit(2)


def versions() -> str:
    """What a report of a fault should name."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = [f"version {__version__}", f"Python {platform.python_version()}"]
    for name in ("jax", "flax", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join([*found, platform.platform()])


if __name__ == "__main__":
    main()
