"""Held-out loss of pre-training runs against tokens read and against time: what a size buys.

    python scripts/backbones/scaling_curve.py runs/backbones/small-span runs/backbones/base-span \
        --out scaling.png

Sets that all runs share are averaged. Runs must have stood on the same kind of machine for the
right-hand panel to mean something.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """result.json, or what is known of an unfinished run, and the rows of metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = folder / "result.json"
    return json.loads(result.read_text()) if result.is_file() else {}, rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    runs = {folder.name: read_run(folder) for folder in args.runs}
    keys = set.intersection(
        *(
            {k for row in rows for k in row if k.startswith("held_out/")}
            for _, rows in runs.values()
        )
    )
    if not keys:
        raise SystemExit("the runs have no held-out set in common")
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    table = []
    for name, (result, rows) in runs.items():
        checks = [row for row in rows if keys <= set(row) and row["tokens"] > 0]
        tokens = [row["tokens"] / 1e6 for row in checks]
        losses = [sum(row[k] for k in keys) / len(keys) for row in checks]
        label = f"{name}, {result['parameters'] / 1e6:.1f}M" if result else name
        left.plot(tokens, losses, marker=".", label=label)
        speed = result.get("tokens_per_second") or rows[-2].get("tokens_per_second", 0)
        if speed:
            right.plot([t * 1e6 / speed / 60 for t in tokens], losses, marker=".", label=label)
        table.append((label, tokens[-1], losses[-1], speed))
    left.set(xlabel="million tokens read", ylabel="held-out loss, nats a target token")
    right.set(xlabel="minutes of training at the run's mean speed")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"Mean of {len(keys)} held-out sets")
    figure.savefig(args.out, dpi=120)
    print("| run | million tokens | held-out loss | tokens a second |\n|---|---|---|---|")
    for label, tokens, loss, speed in table:
        print(f"| {label} | {tokens:.2f} | {loss:.3f} | {speed:,.0f} |")


if __name__ == "__main__":
    main()
