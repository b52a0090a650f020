"""Who tells a person at a terminal or in a notebook how a run from Python goes on."""

import contextlib
import sys
from collections.abc import Iterator

from jaxprompt.training.metric_log import NullReporter, Reporter


class ProgressBar:
    """A line that shows steps, loss and speed; other lines stay above it."""

    def __init__(self, steps: int):
        from tqdm.auto import tqdm

        self._bar = tqdm(total=steps, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """A line of text."""
        self._bar.write(text, file=sys.stderr)

    def step(self, done: int, rates: dict[str, float]) -> None:
        """``done`` steps are complete."""
        self._bar.set_postfix({name: f"{x:.4g}" for name, x in rates.items()}, refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leave the line as it is."""
        self._bar.close()


@contextlib.contextmanager
def automatic(reporter: Reporter | None, steps: int) -> Iterator[Reporter]:
    """The reporter itself; where there is none, a bar if somebody can see it, else silence."""
    if reporter is not None:
        yield reporter
    elif watched():
        bar = ProgressBar(steps)
        try:
            yield bar
        finally:
            bar.close()
    else:
        yield NullReporter()


def watched() -> bool:
    """Whether standard error is a terminal, or this is a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules
