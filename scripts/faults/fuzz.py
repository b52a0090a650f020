"""Damaged configs, rows, weights, prompts and checkpoints: each is read, or refused in a sentence.

    python scripts/faults/fuzz.py                       # 2,000 inputs, some minutes on 2 cores
    python scripts/faults/fuzz.py --inputs 200 --seed 7 --only weights

Input k of a kind is a pure function of the seed and k. Each is opened by the package's own
functions in a worker process, with a limit of time and memory. What is counted:

    accepted     it was read
    refused      UserError or OSError with a message of at most 3,000 characters
    traceback    any other exception, or a longer message
    hang         it took longer than the limit; the worker was stopped
    abort        the worker died
    executed     code of the input ran: a file that only such code writes is there
    lost         a value was read that was not written, or a file that is not ours is gone

Prints a table on standard error and one JSON object on standard output. Exit code 1 if anything but
``accepted`` and ``refused`` was counted; ``--keep DIR`` keeps those inputs.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(HERE.parents[1] / x) for x in ("tests", "tests/parity"))]

# inputs of each kind in 2,000
SHARES = {"configs": 500, "rows": 450, "weights": 450, "prompts": 350, "checkpoints": 250}
OUTCOMES = ("accepted", "refused", "traceback", "hang", "abort", "executed", "lost")
LONGEST_MESSAGE = 3000


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(SHARES), help="one kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of a kind")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for an input")
    parser.add_argument("--memory", type=float, default=12.0, help="GiB of address space")
    parser.add_argument("--keep", type=Path, help="a directory for the inputs that went wrong")
    return parser.parse_args()


def attempt(kind: str, seed: int, number: int, folder: Path) -> tuple[str, str]:
    """Make an input in ``folder`` and open it: the outcome, and what was said of it."""
    import kinds

    from jaxprompt.config.errors import UserError

    rng = random.Random(f"{kind} {seed} {number}")
    what = ""
    try:
        what, open_it = kinds.KINDS[kind](rng, folder)
        open_it()
        outcome, said = "accepted", ""
    except kinds.Lost as error:
        outcome, said = "lost", str(error)
    except (UserError, OSError) as error:
        outcome, said = "refused", str(error)
        if len(said) > LONGEST_MESSAGE:
            outcome, said = "traceback", f"a message of {len(said)} characters: {said[:300]}"
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        last = ([f for f in frames if "jaxprompt/" in f.filename] or frames)[-1]
        place = f"{last.filename.rpartition('jaxprompt/')[2]}:{last.lineno}"
        outcome, said = "traceback", f"{type(error).__name__} at {place}: {str(error)[:300]}"
    if (folder / kinds.MARK).exists():
        outcome = "executed"
    return outcome, f"{what}: {said}" if said else what


def work(connection, seed: int, memory: float) -> None:
    """A worker: answers (kind, number, folder) until it is told to stop."""
    import resource

    os.environ.update(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.stdin = open(os.devnull)  # noqa: SIM115
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    while (job := connection.recv()) is not None:
        kind, number, folder = job
        os.chdir(folder)
        connection.send(attempt(kind, seed, number, Path(folder)))


class Worker:
    """A worker process that is started anew when an input has stopped it."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=work, args=(theirs, self.arguments.seed, self.arguments.memory), daemon=True
        )
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def run(self, kind: str, number: int, folder: Path) -> tuple[str, str]:
        first = 60.0  # for imports
        try:
            self.connection.send((kind, number, str(folder)))
            if not self.connection.poll(self.arguments.limit + first):
                self.stop()
                self.start()
                return "hang", f"no answer in {self.arguments.limit:g} s"
            return self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            self.stop()
            self.start()
            return "abort", f"the process ended with {code}"


def main() -> int:
    arguments = read_arguments()
    shares = {arguments.only: 1} if arguments.only else SHARES
    total = sum(shares.values())
    counts = {kind: dict.fromkeys(OUTCOMES, 0) for kind in shares}
    wrong, slowest = [], []
    began, worker = time.monotonic(), Worker(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as base:
        for kind, share in shares.items():
            count = arguments.inputs * share // total
            for number in range(arguments.first, arguments.first + count):
                folder = Path(base) / f"{kind}-{number}"
                folder.mkdir()
                start = time.monotonic()
                outcome, said = worker.run(kind, number, folder)
                slowest.append((round(time.monotonic() - start, 1), kind, number))
                counts[kind][outcome] += 1
                if outcome not in ("accepted", "refused"):
                    wrong.append({"kind": kind, "number": number, "outcome": outcome, "said": said})
                    print(f"{kind} {number}: {outcome}: {said[:600]}", file=sys.stderr, flush=True)
                    if arguments.keep:
                        kept = arguments.keep / folder.name
                        shutil.copytree(folder, kept, dirs_exist_ok=True, symlinks=True)
                shutil.rmtree(folder, ignore_errors=True)
            print(f"{kind}: {counts[kind]}", file=sys.stderr, flush=True)
    worker.stop()
    head = ["kind", "inputs", *OUTCOMES]
    print(" | ".join(head), file=sys.stderr)
    for kind, found in counts.items():
        row = [kind, sum(found.values()), *found.values()]
        print(" | ".join(map(str, row)), file=sys.stderr)
    print(
        json.dumps(
            {
                "seed": arguments.seed,
                "inputs": sum(sum(c.values()) for c in counts.values()),
                "seconds": round(time.monotonic() - began, 1),
                "counts": counts,
                "wrong": wrong,
                "slowest": sorted(slowest, reverse=True)[:5],
            }
        )
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
