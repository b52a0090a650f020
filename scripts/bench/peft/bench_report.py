"""Tables and the figure of what bench_peft.py has measured (its OUT/bench.json).

python scripts/bench/peft/bench_report.py runs/bench/bench.json
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bench_tools import RANK
from matplotlib.figure import Figure

from jaxprompt.runtime.markdown import markdown_table

Result = dict[str, Any]


def tables(result: Result) -> str:
    """Everything that was measured, as Markdown."""
    parts = [about(result), markdown_table(times(result))]
    if result.get("ratios"):
        told = "PEFT's time divided by ours: median of the rounds (least to largest)."
        parts += [told, markdown_table(quotients(result))]
    if result.get("memory"):
        told = "Peak resident memory of a fresh process that loads and takes three steps, and what "
        parts += [f"{told}of it is beyond the bare imports.", markdown_table(memory(result))]
    return "\n\n".join(parts)


def about(result: Result) -> str:
    """Machine, versions and problem in words."""
    machine, settings = result["machine"], result["settings"]
    versions = {k: v for facts in result["workers"].values() for k, v in facts["versions"].items()}
    batches = "; ".join(
        f"batches of {size} are {found['longest']:.0f} positions wide with {found['useful']:.0%} "
        "useful on average"
        for size, found in result["typical"].items()
    )
    devices = "".join(
        f"{side} on {', '.join(facts['devices'])}; "
        for side, facts in result["workers"].items() if facts.get("devices")
    )  # fmt: skip
    outside = "".join(f", {key}={value}" for key, value in machine["environment"].items())
    others = [found["others"] for rounds in result["rounds"].values() for found in rounds]
    disturbed = sum(used > settings["idle"] for used in others)
    return (
        f"T5 1.1 {settings['size']}, random; {_method(settings)}; {settings['batches']} "
        f"batches of each size from BoolQ's lengths cut to {512 - settings['prompt']} (padded to "
        f"their longest row, {batches}); targets of 2 or 3 tokens; AdamW; {settings['rounds']} "
        f"rounds; seed {settings['seed']}. "
        f"{machine['processor']}, {machine['cores']} cores, {' '.join(machine['flags'])}; {devices}"
        f"{', '.join(f'{k} {v}' for k, v in versions.items())}; "
        f"{result['workers']['PEFT']['threads']} threads in torch{outside}; huge pages for "
        f"{' and '.join(settings['huge_pages']) or 'neither'}. "
        f"Others used more than {settings['idle']:g} cores during {disturbed} of {len(others)} "
        "measurements."
    )


def _method(settings: Result) -> str:
    if settings.get("method", "prompt") == "lora":
        return f"LoRA of rank {RANK} at queries and values"
    return f"P = {settings['prompt']}"


def times(result: Result) -> list[list[str]]:
    """A line for each job: what it was and how long it took."""
    lines = [[
        "job", "dtype", "dropout", "rows", "padded to", "rows x positions", "useful",
        "s a step or pass (least to largest)", "rows/s", "system time", "warm-up s",
        "others, cores",
    ]]  # fmt: skip
    for job in result["jobs"]:
        found, warm = result["rounds"][job["name"]], result["warm_up"][job["name"]]
        if not found:
            continue  # the benchmark ended before its turn
        seconds = [sum(f["seconds"]) / len(f["seconds"]) for f in found]
        training = job["kind"] == "train"
        rows = job["batch_size"] if training else result["settings"]["questions"]
        middle = statistics.median(seconds)
        lines.append([
            job["name"], job["dtype"], f"{job['dropout']:g}", str(job["batch_size"]),
            _padding(job, training),
            _widths(warm["shapes"]) if training else "",
            f"{warm['useful']:.0%}" if training else "",
            f"{middle:.3f} ({min(seconds):.3f} to {max(seconds):.3f})",
            f"{rows / middle:.1f}", f"{_system(found):.0%}", f"{sum(warm['seconds']):.1f}",
            f"{max(f['others'] for f in found):.2f}",
        ])  # fmt: skip
    return lines


def _system(found: list[dict[str, Any]]) -> float:
    """Share of the processor's time that went to the system, as page faults do."""
    system, user = (sum(f[key] for f in found) for key in ("system", "user"))
    return system / max(system + user, 1e-9)


def _padding(job: dict[str, Any], training: bool) -> str:
    """What a row's width follows from."""
    rounded = "fixed set of lengths" if job["side"] == "ours" else "longest"
    if training:
        return f"{rounded} of {'micro-batch' if job['micro'] else 'batch'}"
    return f"{rounded} of batch, {'sorted' if job['sorted'] else 'in order'}"


def _widths(shapes: list[list[list[int]]]) -> str:
    """Rows x width of the batches, or of the micro-batches of the first step."""
    if any(len(step) > 1 for step in shapes):
        return " + ".join(f"{rows}x{width}" for rows, width in shapes[0]) + "; ..."
    return f"{shapes[0][0][0]}x" + ", ".join(str(step[0][1]) for step in shapes)


def quotients(result: Result) -> list[list[str]]:
    lines = [["ours", "PEFT", "times faster"]]
    for pair in result["ratios"]:
        spread = f"{pair['median']:.2f} ({pair['min']:.2f} to {pair['max']:.2f})"
        lines.append([pair["ours"], pair["peft"], spread])
    return lines


def memory(result: Result) -> list[list[str]]:
    lines = [["job", "peak MiB", "bare MiB", "beyond MiB"]]
    for found in result["memory"]:
        sizes = (found[key] / 2**20 for key in ("peak", "bare", "beyond"))
        lines.append([found["job"], *(f"{size:.0f}" for size in sizes)])
    return lines


def draw(result: Result, path: Path) -> None:
    """A panel for each job of ours: the ratios to PEFT's with their spread."""
    pairs: dict[str, list[dict[str, Any]]] = {}
    for pair in result.get("ratios", ()):
        pairs.setdefault(pair["ours"], []).append(pair)
    if not pairs:
        return
    heights = [len(found) + 1 for found in pairs.values()]
    figure = Figure(figsize=(8, 1 + 0.35 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(pairs), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axis, (name, found) in zip(axes, pairs.items(), strict=True):
        middle = [pair["median"] for pair in found]
        reach = [[p["median"] - p["min"] for p in found], [p["max"] - p["median"] for p in found]]
        axis.barh(range(len(found)), middle, xerr=reach, color="C0", capsize=3)
        axis.set_yticks(range(len(found)), [p["peft"] for p in found], fontsize="small")
        axis.invert_yaxis()
        axis.axvline(1.0, color="gray", linestyle="--")
        axis.set_title(name, fontsize="medium", loc="left")
    axes[-1].set_xlabel("PEFT's time divided by ours (median, least and largest of the rounds)")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    measured = json.loads(source.read_text())
    print(tables(measured))
    draw(measured, source.with_name("ratios.png"))
