"""Commands that train, and the one that says what training needs."""

import json
from typing import Annotated

import typer

from jaxprompt.cli.errors import interruptible
from jaxprompt.cli.options import ConfigArgument, OverridesArgument
from jaxprompt.cli.output import print_json


def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check all, say what would run, and write nothing")
    ] = False,
) -> None:
    """Tune a prompt, or go on with the run in its output directory.

    \b
    jaxprompt train my.yaml --dry-run
    jaxprompt train configs/quickstart.yaml
    jaxprompt train my.yaml train.steps=2000 output=runs/longer
    """
    from jaxprompt.config.overrides import load_config

    run = load_config(config, overrides or [])
    from jaxprompt.runtime import devices

    devices.start([run.train.batch_size, run.train.micro_batch_size or 0], run.mesh)
    from jaxprompt.cli.progress import Bar, show_dry_run, show_result

    if dry_run:
        from jaxprompt.training.dry_run import dry_run as prepare_run

        with Bar("checking", None) as bar:
            report = prepare_run(run, bar)
        show_dry_run(report)
        print_json(report)
        return
    from jaxprompt.training.loop import train as run_training

    with interruptible() as signals, Bar("training", run.train.steps) as bar:
        result = run_training(run, bar, signals)
    show_result(result)
    print(json.dumps(result))


def pretrain(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Pre-train a backbone on text, or adapt one; goes on with the run in its output directory.

    \b
    jaxprompt pretrain configs/pretrain/own_text.yaml text.0.train=own.txt
    """
    from jaxprompt.config.overrides import read_config
    from jaxprompt.config.pretrain import PretrainConfig
    from jaxprompt.config.validation import parse

    run = parse(PretrainConfig, read_config(config, overrides or []))
    from jaxprompt.runtime import devices

    devices.start([run.train.batch_size], run.mesh)
    from jaxprompt.cli.progress import Bar, show_pretraining
    from jaxprompt.training.pretrain import pretrain as run_pretraining

    with interruptible() as signals, Bar("pre-training", run.train.steps) as bar:
        result = run_pretraining(run, bar, signals)
    show_pretraining(result)
    print(json.dumps(result))


def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
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
    """Memory and time of a step before there is a run, and the cheapest mesh that fits.

    \b
    jaxprompt plan configs/paper/xxl.yaml --devices 8 --kind h100
    """
    from jaxprompt.config.overrides import load_config

    run = load_config(config, overrides or [])
    from jaxprompt.cli.progress import show_plan
    from jaxprompt.training.plan import plan_of

    report = plan_of(run, devices=devices, kind=kind, memory=memory, inputs=inputs)
    show_plan(report)
    print(json.dumps(report))
