"""A server whose prompts are added, replaced and removed all the time: is its memory flat?

    python scripts/bench/serve/churn.py --artefact runs/quickstart/prompt --minutes 60

One client changes prompts through the interface and in the library's folder, and asks for answers
in between. Each answer has to be of a version that its name means. Writes OUT/churn.json with a
sample of the server's memory every 10 seconds, and OUT/churn.png.
"""

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from options import common_options, setup_of
from prompts import make_prompts, name_of
from servers import Server
from stages import Figures, Setup

import jaxprompt as jp
from jaxprompt.serving.artefacts import digest_of
from jaxprompt.serving.store import PathStore

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

SAMPLE_SECONDS = 10.0
SETTLE_SECONDS = 10.0  # after which a change in the library's folder must have been seen
CONTENTS = 200  # different prompts that are put in turns
MOST = 24  # prompts of each kind at a time


class Sample(NamedTuple):
    """A look at the server's process."""

    seconds: float  # from the start
    rss: float  # MiB
    threads: int
    files: int  # that are open
    requests: int


class Expected(NamedTuple):
    """What a request for a name must find."""

    digest: str | None  # None: it is removed
    since: float = 0.0  # when it was changed, where the server notices later; 0: at once


@dataclass
class Churn:
    """The client, and what it knows of the server's prompts."""

    server: Server
    library: Path
    contents: Sequence[Path]
    rows: Sequence[dict]
    rng: random.Random
    expected: dict[str, Expected] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    fresh: int = 0  # names that were given so far

    def __post_init__(self) -> None:
        self.digests = {path: digest_of(PathStore({"one": path}).read("one"))
                        for path in self.contents}  # fmt: skip

    def step(self) -> None:
        """One change or one request, drawn at random."""
        actions: Mapping[Callable[[], None], float] = {
            self.ask: 12, self.score: 1, self.complete: 1, self.inspect: 0.2, self.wrong: 0.3,
            self.add: 1, self.replace: 1, self.remove: 1,
            self.add_folder: 0.3, self.replace_folder: 0.3, self.remove_folder: 0.3,
        }  # fmt: skip
        [action] = self.rng.choices(list(actions), list(actions.values()))
        try:
            action()
        except (jp.ServerError, OSError) as error:
            self.failures.append(f"{action.__name__}: {error}"[:300])

    # ---- requests

    def ask(self) -> None:
        names = self.rng.choices(self.there(), k=self.rng.choice((1, 1, 2, 8)))
        answers = self.server.client.predict(names, self.rng.choices(self.rows, k=len(names)))
        for name, answer in zip(names, answers, strict=True):
            if answer["digest"] != self.expected[name].digest:
                self.failures.append(f"{name} answered as {answer['digest']}")
        self.counts["predict"] += 1

    def score(self) -> None:
        pair = {"input": next(iter(self.rng.choice(self.rows).values())), "target": "animal"}
        self.server.client.score(self.rng.choice(self.there()), [pair])
        self.counts["score"] += 1

    def complete(self) -> None:
        text = next(iter(self.rng.choice(self.rows).values()))
        name = self.rng.choice(self.there())
        self.server.client.complete(name, text, max_tokens=4, temperature=0.0)
        self.counts["complete"] += 1

    def inspect(self) -> None:
        self.server.client.inspect(self.rng.choice(self.there()))
        self.server.metrics()
        self.counts["inspect"] += 1

    def wrong(self) -> None:
        """A prompt that was removed, or never was."""
        name = self.rng.choice([*self.gone(), f"never-{self.rng.random()}"])
        try:
            self.server.client.predict(name, self.rows[:1])
        except jp.ServerError as error:
            if error.status != 404:
                raise
        else:
            self.failures.append(f"{name} answered, and is not there")
        self.counts["404"] += 1

    def there(self) -> list[str]:
        """Names that must answer."""
        return [name for name, known in self.expected.items() if known.digest and settled(known)]

    def gone(self) -> list[str]:
        """Names that must not answer."""
        return [name for name, known in self.expected.items()
                if known.digest is None and settled(known)]  # fmt: skip

    # ---- changes through the interface

    def add(self) -> None:
        if len(self.mine("put")) < MOST:
            self.put(self.next_name("put"))

    def replace(self) -> None:
        self.put(self.rng.choice(self.mine("put") or [self.next_name("put")]))

    def put(self, name: str) -> None:
        content = self.rng.choice(self.contents)
        found = self.server.client.put(name, content, replace=True)
        self.expected[name] = Expected(self.digests[content])
        if found["digest"] != self.digests[content]:
            self.failures.append(f"{name} was put as {found['digest']}")
        self.counts["put"] += 1

    def remove(self) -> None:
        for name in self.rng.sample(self.mine("put"), min(1, len(self.mine("put")))):
            self.server.client.delete(name)
            self.forget_old()
            self.expected[name] = Expected(None)
            self.counts["delete"] += 1

    # ---- changes in the folder

    def add_folder(self) -> None:
        if len(self.mine("copied")) < MOST:
            self.copy(self.next_name("copied"))

    def replace_folder(self) -> None:
        self.copy(self.rng.choice(self.mine("copied") or [self.next_name("copied")]))

    def copy(self, name: str) -> None:
        content = self.rng.choice(self.contents)
        shutil.copytree(content, self.library / name, dirs_exist_ok=True)
        self.expected[name] = Expected(self.digests[content], time.monotonic())
        self.counts["copied"] += 1

    def remove_folder(self) -> None:
        for name in self.rng.sample(self.mine("copied"), min(1, len(self.mine("copied")))):
            shutil.rmtree(self.library / name)
            self.forget_old()
            self.expected[name] = Expected(None, time.monotonic())
            self.counts["rmtree"] += 1

    def mine(self, kind: str) -> list[str]:
        return [name for name, known in self.expected.items()
                if name.startswith(kind) and known.digest]  # fmt: skip

    def next_name(self, kind: str) -> str:
        """Half of the names are new, so that nothing may be kept of each name."""
        self.fresh += self.rng.random() < 0.5
        return f"{kind}-{self.fresh if self.rng.random() < 0.5 else self.fresh % MOST}"

    def forget_old(self) -> None:
        """Keep few of the names that are gone."""
        for name in self.gone()[:-50]:
            del self.expected[name]


def settled(known: Expected) -> bool:
    return not known.since or time.monotonic() - known.since > SETTLE_SECONDS


def sample(server: Server, begin: float, requests: int) -> Sample:
    process = Path(f"/proc/{server.process.pid}")
    lines = (line.split() for line in (process / "status").read_text().splitlines())
    status = {words[0]: words[1] for words in lines if len(words) > 1}
    return Sample(
        round(time.monotonic() - begin, 1), int(status["VmRSS:"]) / 1024, int(status["Threads:"]),
        len(list((process / "fd").iterdir())), requests,
    )  # fmt: skip


def slope(samples: Sequence[Sample], after: float) -> float | None:
    """MiB an hour by least squares, after so many seconds; None where that are too few samples."""
    late = [each for each in samples if each.seconds >= after]
    if len(late) < 3:
        return None
    hours = np.array([each.seconds for each in late]) / 3600
    return float(np.polyfit(hours, [each.rss for each in late], 1)[0])


def churn(setup: Setup, minutes: float, rate: float, warm_minutes: float) -> Figures:
    """Changes and requests at ``rate`` a second, evenly, for so many minutes."""
    make_prompts(setup.artefact, setup.out / "contents", CONTENTS)
    contents = [setup.out / "contents" / name_of(number) for number in range(CONTENTS)]
    library = setup.out / "library"
    shutil.rmtree(library, ignore_errors=True)
    shutil.copytree(contents[0], library / "first")
    with setup.served("--library", str(library)) as server:
        client = Churn(server, library, contents, setup.inputs(200), random.Random(0))
        client.expected["first"] = Expected(client.digests[contents[0]])
        begin, samples = time.monotonic(), []
        while (now := time.monotonic() - begin) < 60 * minutes:
            if not samples or now - samples[-1].seconds >= SAMPLE_SECONDS:
                samples.append(sample(server, begin, sum(client.counts.values())))
                keep(setup.out, figures(samples, client, warm_minutes))
            client.step()
            behind = time.monotonic() - begin - now
            time.sleep(max(1 / rate - behind, 0))
        found = figures(samples, client, warm_minutes)
        found["metrics"] = {
            name: value for name, value in server.metrics().items()
            if name.endswith(("compilations", "evictions", "in_memory", "prompts", "prompt_bytes"))
        }  # fmt: skip
    keep(setup.out, found)
    draw(samples, setup.out / "churn.png")
    return found


def figures(samples: Sequence[Sample], client: Churn, warm_minutes: float) -> Figures:
    return {
        "mib_an_hour": slope(samples, 60 * warm_minutes),
        "requests": sum(client.counts.values()),
        "counts": dict(client.counts),
        "failures": len(client.failures),
        "first_failures": client.failures[:20],
        "samples": [each._asdict() for each in samples],
    }


def keep(out: Path, found: Figures) -> None:
    fresh = out / "churn.new"
    fresh.write_text(json.dumps(found, indent=1))
    fresh.replace(out / "churn.json")


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Memory over time."""
    figure, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    axes.plot([each.seconds / 60 for each in samples], [each.rss for each in samples])
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, None))
    axes.set_title("A server while its prompts are added, replaced and removed")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = common_options(__doc__, "runs/churn", "--slots 9")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=5.0, help="changes and requests a second")
    parser.add_argument("--warm-minutes", type=float, default=10.0, help="before the slope begins")
    given = parser.parse_args()
    found = churn(setup_of(given), given.minutes, given.rate, given.warm_minutes)
    print(json.dumps({name: value for name, value in found.items() if name != "samples"}))


if __name__ == "__main__":
    main()
