"""A Markdown table and a figure of what ``bench_serve.py`` has measured."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

Results = dict[str, Any]


def write_report(out: Path) -> None:
    """Write ``report.md`` and ``report.png`` beside ``results.json``."""
    results: Results = json.loads((out / "results.json").read_text())
    sections = [
        lines
        for make in (
            _load, _burst, _distinct, _changes, _replace, _mixed, _peft, _memory, _starts,
        )
        if (lines := list(make(results)))
    ]  # fmt: skip
    (out / "report.md").write_text("\n\n".join("\n".join(lines) for lines in sections) + "\n")
    if "throughput" in results:
        draw(results["throughput"], out / "report.png")
    print(out / "report.md")


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}"


def _table(head: str, rows: list[str]) -> Iterator[str]:
    yield f"| {head} |"
    yield "|" + "---|" * (head.count("|") + 1)
    yield from (f"| {row} |" for row in rows)


def _load(results: Results) -> Iterator[str]:
    rows = [
        f"{count} | {level['share']:g} | {level['offered']:.1f} | {level['throughput']:.1f} | "
        f"{_ms(level['p50'])} | {_ms(level['p99'])} | {level['rejected']:.1%} | {level['lost']}"
        for count, found in results.get("throughput", {}).items()
        for level in found["levels"]
    ]
    if rows:
        head = "prompts | of capacity | offered/s | answered/s | p50 ms | p99 ms | rejected | lost"
        yield from _table(head, rows)


def _burst(results: Results) -> Iterator[str]:
    rows = [
        f"{count} | {found['rate']:.1f} | {_ms(found['before']['p99'])} | "
        f"{found['burst']['rejected']:.1%} | {found['burst']['lost']} | "
        f"{found['recovery_seconds']}"
        for count, found in results.get("burst", {}).items()
    ]
    if rows:
        head = "prompts | requests/s | p99 ms before | rejected in the burst | lost | recovery s"
        yield from _table(head, rows)


def _distinct(results: Results) -> Iterator[str]:
    for count, found in results.get("distinct", {}).items():
        each = [entry["ratio"] for entry in found["rounds"]]
        yield (
            f"Throughput of {count} prompts in turn divided by that of one: {found['ratio']:.3f} "
            f"({min(each):.3f} to {max(each):.3f})."
        )


def _changes(results: Results) -> Iterator[str]:
    rows = [
        f"{count} | "
        + " | ".join(
            f"{_ms(found[what]['p50'])} ({_ms(found[what]['p99'])})"
            for what in ("add", "first", "second", "replace", "remove")
        )
        for count, found in results.get("changes", {}).items()
    ]
    if rows:
        head = (
            "prompts | add, median ms (p99) | its first request | its second one | replace | remove"
        )
        yield from _table(head, rows)


def _replace(results: Results) -> Iterator[str]:
    for found in results.get("replace", {}).values():
        yield (
            f"{found['replacements']} replacements under load, {_ms(found['seconds_each'])} ms "
            f"each: {found['answers']} answers of {found['versions_seen']} versions, "
            f"{found['wrong_version']} not of the version that they name, {found['failed']} failed."
        )


def _mixed(results: Results) -> Iterator[str]:
    for found in results.get("mixed", {}).values():
        rows = [
            f"{cell['distinct']} | {_ms(cell['mixed_seconds'])} | {_ms(cell['apart_seconds'])} | "
            f"{cell['ratio']:.2f} ({cell['ratio_low']:.2f} to {cell['ratio_high']:.2f})"
            for cell in found["cells"]
        ]
        head = "prompts of 32 rows | one batch, ms | a batch a prompt, ms | ratio"
        yield from _table(head, rows)


def _peft(results: Results) -> Iterator[str]:
    for found in results.get("peft", {}).values():
        rows = [
            f"{cell['distinct']} | {_ms(cell['ours_seconds'])} | {cell['rank_ratio']:.2f} | "
            f"{cell['generate_ratio']:.2f} | {cell['largest_difference']:.1e}"
            for cell in found["cells"]
        ]
        head = (
            "prompts of 32 rows | ours, ms | PEFT's likelihoods / ours | PEFT's generate / ours | "
            "largest difference of log-likelihoods"
        )
        yield from _table(head, rows)


def _memory(results: Results) -> Iterator[str]:
    for found in results.get("processes", {}).values():
        rows = [
            f"{cell['processes']} | {cell['prompts']} | {cell['memory_mib']:.0f}"
            for cell in found["cells"]
        ]
        yield from _table("processes | prompts | MiB", rows)


def _starts(results: Results) -> Iterator[str]:
    for found in results.get("starts", {}).values():
        later = " and ".join(f"{seconds:.0f}" for seconds in found["full_cache"])
        yield (
            f"Ready after {found['empty_cache']:.0f} s where nothing was compiled before, and "
            f"after {later} s later."
        )


def draw(measured: Results, path: Path) -> None:
    """Answered against offered, and latency against offered, for each number of prompts."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for count, found in measured.items():
        offered = [level["offered"] for level in found["levels"]]
        left.plot(offered, [level["throughput"] for level in found["levels"]], "o-", label=count)
        for what, style in (("p50", "o--"), ("p99", "o-")):
            latencies = [1000 * (level[what] or float("nan")) for level in found["levels"]]
            right.plot(offered, latencies, style, label=f"{count}, {what}")
    left.set(xlabel="offered requests a second", ylabel="answered requests a second")
    right.set(xlabel="offered requests a second", ylabel="latency, ms", yscale="log")
    left.legend(title="prompts")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
