"""What a person is told where a command cannot go on, and the exit code: 2, or 1 for our faults."""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

import typer

from jaxprompt import __version__
from jaxprompt.config.errors import UserError

if TYPE_CHECKING:
    from jaxprompt.runtime.signals import Signals


def check_form(arguments: list[str]) -> None:
    """Refuse settings that are typed as options, with the form that they have."""
    command = next(iter(arguments), None)
    if command not in ("train", "pretrain", "plan", "reproduce", "compare"):
        return
    from jaxprompt.config.schema import RunConfig

    own = () if command in ("reproduce", "compare") else RunConfig.model_fields
    for argument in arguments[1:]:
        key, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and (re.fullmatch(r"\w+(\.\w+)+", key) or key in own):
            given = f"{key}={value}" if equals else f"{key}=VALUE"
            raise UserError(
                f"No such option: --{key[:80]}; settings are written key=value, without dashes: "
                f"{given[:100]}."
            )


def explain(error: BaseException) -> str | None:
    """A sentence for an error of the machine or of a library that a user can mend, else None."""
    if isinstance(error, UserError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text:
        return (
            f"The memory ran out ({text[:160] or 'of this machine'}); lower train.micro_batch_size "
            "of a run or --batch-size of a command, or see what a run needs with `jaxprompt plan`."
        )
    if isinstance(error, OSError):  # a full disk, a file without permission
        return f"{error.strerror or text}: {error.filename or ''}"
    if type(error).__name__ == "SafetensorError":  # not imported for this
        return f"A safetensors file cannot be read or written: {text[:300]}."
    return None


def end_command(error: Exception) -> NoReturn:
    """End the process: exit code 2 and one sentence, or 1 and a traceback for a fault of ours."""
    sentence = explain(error)
    if sentence is None:
        traceback.print_exc()
        print(
            f"This is a fault of jaxprompt ({versions()}); report it with the lines above.",
            file=sys.stderr,
        )
        sys.exit(1)
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(2)


def versions() -> str:
    """What the report of a fault should name."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    names = [f"version {__version__}", f"Python {platform.python_version()}"]
    for name in ("jax", "flax", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            names.append(f"{name} {version(name)}")
    return ", ".join([*names, platform.platform()])


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
            file=sys.stderr,
            flush=True,
        )
        if several:
            os._exit(130)
        raise typer.Exit(130) from None
    except BaseException as error:
        if several:
            _end_one_of_several(error)
        raise


def _end_one_of_several(error: BaseException) -> NoReturn:
    """End this process without waiting for the others, which will not come."""
    import jax

    sentence = explain(error)
    if sentence is None:
        traceback.print_exc()
    else:
        print(f"error: {sentence}", file=sys.stderr)
    print(
        f"process {jax.process_index()} of {jax.process_count()} ends ({error!r}), perhaps because "
        "another one did: see what the others say, then start all of them again to go on from the "
        "last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object
) -> None:
    """Print a warning to standard error: for a user, a renamed key has no place in our code."""
    text = str(message)
    if not issubclass(category, FutureWarning):
        text = f"{filename}:{lineno}: {category.__name__}: {text}"
    print(f"warning: {text}", file=sys.stderr)
