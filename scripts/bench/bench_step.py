"""What a step of prompt tuning costs: time against work, share of the machine's peak, memory.

    python scripts/bench/bench_step.py --out runs/step [--dtype float32 mixed] [--rounds 5]

Random T5 1.1; one thing is varied at a time from the point of 4 rows of 128 text tokens with 100
vectors in front and 4 target tokens: tokens, rows, vectors, prompts trained at once (4 rows each),
and the model. Rows are full. All points take turns in every round, and between them stands a large
matrix product, which is the peak of that moment. FLOPs are counted by formula, for a frozen model:
a product with weights once forward and once backward, a product of activations once and twice;
what is computed again for the gradient is not counted. Memory is what the compiled step asks for
beside its arguments.

Prints Markdown tables: medians over the rounds, with the least and the largest. OUT/step.json has
everything, OUT/step.png the figure.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench_dtype import random_batch
from matplotlib.figure import Figure

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import TrainConfig
from jaxprompt.methods.registry import METHODS
from jaxprompt.models.checkpoints.load import Backbone, load_backbone
from jaxprompt.models.checkpoints.save import save_hf
from jaxprompt.models.ops import quantization
from jaxprompt.models.t5 import cost, t5
from jaxprompt.models.t5.config import released
from jaxprompt.runtime.files import replace_directory, write_atomically
from jaxprompt.runtime.markdown import markdown_table
from jaxprompt.runtime.memory import start_again_with_huge_pages
from jaxprompt.training.optimizer import per_member
from jaxprompt.training.step import init_state, make_train_step

sys.path.append(str(Path(__file__).parent / "peft"))
from bench_tools import machine  # noqa: E402

METHOD, SETTINGS, TARGETS = METHODS["prompt-tuning"], TrainConfig(), 4


class Point(NamedTuple):
    """One shape of a step."""

    model: str = "small"
    text: int = 128
    rows: int = 4  # of each prompt
    vectors: int = 100
    prompts: int = 1

    @property
    def positions(self) -> int:
        return (self.text + self.vectors) * self.rows * self.prompts


SWEEPS: dict[str, tuple[Any, ...]] = {
    "text": (32, 64, 128, 256, 384),
    "rows": (1, 2, 4, 8),
    "vectors": (1, 20, 50, 100, 150),
    "prompts": (1, 2, 4, 8),
    "model": ("builtin-small", "builtin", "small", "base"),
}
WORDS = {
    "text": "text tokens a row", "rows": "rows", "vectors": "vectors of the prompt",
    "prompts": "prompts in one step, 4 rows each", "model": "parameters of the model",
}  # fmt: skip


def flops(config: Any, point: Point) -> dict[str, float]:
    """Floating-point operations of a step by part, forward and backward."""
    rows, width = point.rows * point.prompts, point.text + point.vectors
    return cost.flops(config, rows, width, TARGETS)


def peak(dtype: str, size: int = 2048) -> Callable[[], float]:
    """A function that measures operations per second of one large product."""
    kind = jnp.float32 if dtype == "float32" else jnp.bfloat16
    a = jnp.ones((size, size), kind)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    product(a, a).block_until_ready()

    def run() -> float:
        began = time.perf_counter()
        for _ in range(4):
            product(a, a).block_until_ready()
        return 4 * 2 * size**3 / (time.perf_counter() - began)

    return run


def compiled(backbone: Backbone, point: Point) -> tuple[Callable[[], float], dict[str, int]]:
    """A function that takes a step and tells its seconds, and the memory that a step asks for."""
    vocabulary, width = backbone.params["token_embedder"]["embedding"].shape
    optimizer = per_member(SETTINGS)
    step = make_train_step(backbone.model, METHOD, optimizer)
    start = np.ones((point.prompts, point.vectors, width), np.float32)
    batch = random_batch(
        vocabulary, point.text + point.vectors, TARGETS, point.vectors,
        rows=point.rows, prompts=point.prompts,
    )  # fmt: skip
    state = init_state(METHOD, optimizer, backbone.params, start)
    params = quantization.view_as_uint16(backbone.params)  # as the step does where it is not traced
    program = jax.jit(step).lower(state, params, [batch]).compile()
    asked: Any = program.memory_analysis()

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(program(state, params, [batch]))
        return time.perf_counter() - began

    run()
    return run, {"temporary": asked.temp_size_in_bytes, "arguments": asked.argument_size_in_bytes}


def open_backbone(options: argparse.Namespace, name: str, dtype: str) -> Backbone:
    """A built-in backbone, or a random one in the shape of a released T5 1.1."""
    config = released(f"google/t5-v1_1-{name}")
    path = name if config is None else str(options.out / "weights" / f"{name}-seed{options.seed}")
    if config is not None and not Path(path).is_dir():
        print(f"writing random weights of T5 1.1 {name}", file=sys.stderr)
        params = jax.jit(t5.init_params, static_argnums=0)(config, jax.random.key(options.seed))
        replace_directory(Path(path), lambda folder: save_hf(folder, config, params))
    return load_backbone(path, dtype=dtype)


def points(options: argparse.Namespace) -> list[tuple[str, Point]]:
    """(what is varied, point) of all sweeps that were asked for."""
    return [
        (name, Point()._replace(**{name: value})) for name in options.vary for value in SWEEPS[name]
    ]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All points in turns; OUT/step.json is written again after every round."""
    found: list[dict[str, Any]] = []
    jobs: dict[tuple[str, Point], tuple[Callable[[], float], dict[str, Any]]] = {}
    backbones: dict[tuple[str, str], Backbone] = {}
    peaks = {dtype: peak(dtype) for dtype in options.dtype}
    for dtype in options.dtype:
        for name, point in points(options):
            if (dtype, point) not in jobs:
                print(f"compiling {dtype} {point}", file=sys.stderr)
                key = point.model, dtype
                if key not in backbones:
                    backbones[key] = open_backbone(options, *key)
                backbone = backbones[key]
                run, memory = compiled(backbone, point)
                facts = {
                    "dtype": dtype, "point": point._asdict(), "positions": point.positions,
                    "flops": flops(backbone.config, point), **memory,
                    "parameters": sum(x.size for x in jax.tree.leaves(backbone.params)),
                    "seconds": [], "peak": [], "varied": [],
                }  # fmt: skip
                jobs[dtype, point] = run, facts
                found.append(facts)
            jobs[dtype, point][1]["varied"].append(name)
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    result = {"machine": machine(), "jax": jax.__version__, "settings": settings, "points": found}
    for number in range(options.rounds):
        for (dtype, _), (run, facts) in jobs.items():
            facts["peak"].append(peaks[dtype]())
            facts["seconds"].append(run())
        print(f"round {number + 1}/{options.rounds}", file=sys.stderr)
        write_atomically(options.out / "step.json", json.dumps(result, indent=1) + "\n")
    return result


def share(facts: dict[str, Any]) -> list[float]:
    """Of the peak, round by round."""
    total = sum(facts["flops"].values())
    return [total / s / p for s, p in zip(facts["seconds"], facts["peak"], strict=True)]


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def swept(result: dict[str, Any], name: str, dtype: str) -> list[dict[str, Any]]:
    """The points at which one thing was varied, in its order."""
    own = [f for f in result["points"] if name in f["varied"] and f["dtype"] == dtype]
    return sorted(own, key=lambda facts: SWEEPS[name].index(facts["point"][name]))


def tables(result: dict[str, Any]) -> str:
    """A table for each thing that was varied."""
    told = result["machine"]
    parts = [
        f"T5 1.1, random weights, {told['processor']}, {told['cores']} cores, "
        f"{' '.join(told['flags'])}; jax {result['jax']}; {result['settings']['rounds']} rounds."
    ]
    for name in result["settings"]["vary"]:
        lines = [["dtype", WORDS[name], "seconds a step", "positions/s", "of the peak",
                  "attention, of the FLOPs", "temporary MiB", "KiB a position"]]  # fmt: skip
        every = [swept(result, name, dtype) for dtype in result["settings"]["dtype"]]
        for facts in itertools.chain(*every):
            total, seconds = sum(facts["flops"].values()), facts["seconds"]
            value = facts["point"][name]
            value = f"{value} ({facts['parameters'] / 1e6:.1f}M)" if name == "model" else str(value)
            lines.append([
                facts["dtype"], value, spread(seconds, ".3f"),
                f"{facts['positions'] / statistics.median(seconds):,.0f}",
                spread(share(facts), ".0%"), f"{facts['flops']['encoder, attention'] / total:.0%}",
                f"{facts['temporary'] / 2**20:,.0f}",
                f"{facts['temporary'] / 2**10 / facts['positions']:.0f}",
            ])  # fmt: skip
        parts.append(markdown_table(lines))
    return "\n\n".join(parts)


def draw(result: dict[str, Any], path: Path) -> None:
    """Seconds above, memory below; a column for each thing that was varied."""
    names = result["settings"]["vary"]
    figure = Figure(figsize=(3 * len(names) + 1, 6), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False, sharex="col")
    for column, name in enumerate(names):
        for number, dtype in enumerate(result["settings"]["dtype"]):
            own = swept(result, name, dtype)
            at = [f["parameters"] / 1e6 if name == "model" else f["point"][name] for f in own]
            middle = [statistics.median(f["seconds"]) for f in own]
            reach = [
                [m - min(f["seconds"]) for f, m in zip(own, middle, strict=True)],
                [max(f["seconds"]) - m for f, m in zip(own, middle, strict=True)],
            ]
            look = {"color": f"C{number}", "marker": "o", "markersize": 4}
            axes[0, column].errorbar(at, middle, yerr=reach, label=dtype, capsize=3, **look)
            axes[1, column].plot(at, [f["temporary"] / 2**20 for f in own], label=dtype, **look)
        for row in range(2):
            axes[row, column].set_ylim(bottom=0)
            axes[row, column].grid(alpha=0.3)
        words = WORDS[name] + (", millions" if name == "model" else "")
        axes[1, column].set_xlabel(words)
    axes[0, 0].set_ylabel("seconds a step (median, least, largest)")
    axes[1, 0].set_ylabel("temporary memory of a step, MiB")
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--dtype", nargs="+", choices=("float32", "mixed", "bfloat16"),
        default=["float32", "mixed"])  # fmt: skip
    add("--vary", nargs="+", choices=tuple(SWEEPS), default=list(SWEEPS))
    add("--rounds", type=int, default=5)
    add("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.rounds < 1:
        raise UserError(f"--rounds is {options.rounds}; at least 1 is needed.")
    options.out.mkdir(parents=True, exist_ok=True)
    result = measure(options)
    print(tables(result))
    draw(result, options.out / "step.png")


if __name__ == "__main__":
    start_again_with_huge_pages()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # --out cannot be written
        print(f"error: {error.strerror or error}: {error.filename or ''}", file=sys.stderr)
        sys.exit(2)
