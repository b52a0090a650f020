"""Measure the README's table: configurations x seeds, as Markdown with mean and spread.

    python scripts/results.py --seeds 0 1 2 --output runs/results

Complete runs are not repeated, so it can be stopped and started again.
"""

import argparse
import statistics
from pathlib import Path

from jaxprompt.config import load_config
from jaxprompt.progress import Bar
from jaxprompt.train.loop import train

ROWS = {
    "soft prompt, 20 vectors": ("configs/quickstart.yaml", []),
    "soft prompt, 100 vectors": ("configs/quickstart.yaml", ["prompt.length=100"]),
    "full fine-tuning": ("configs/full_finetuning.yaml", []),
}


def run(row: str, seed: int, folder: Path, overrides: list[str]) -> dict:
    """The result of one configuration with one seed."""
    file, settings = ROWS[row]
    name = row.replace(",", "").replace(" ", "-")
    output = f"output={folder / name}-{seed}"
    config = load_config(file, [*settings, f"train.seed={seed}", output, *overrides])
    with Bar(f"{row}, seed {seed}", config.train.steps) as bar:
        return train(config, bar)


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/results"))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("overrides", nargs="*", help="key=value for every run")
    options = parser.parse_args()
    print("| | trained parameters | validation | test | minutes |")
    print("|---|---|---|---|---|")
    for number, row in enumerate(options.rows):
        found = [run(row, seed, options.output, options.overrides) for seed in options.seeds]
        if number == 0:
            print(f"| majority class | 0 | {found[0]['majority']:.3f} | | |")
            print(f"| backbone without tuning | 0 | {found[0]['untuned']:.3f} | | |")
        size = found[0]["trainable_parameters"]
        values = spread([r["value"] for r in found])
        test = spread([r["test"][r["metric"]] for r in found])
        minutes = spread([r["seconds"] / 60 for r in found])
        print(f"| {row} | {size:,} | {values} | {test} | {minutes} |", flush=True)


if __name__ == "__main__":
    main()
