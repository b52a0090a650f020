"""Tables of studies: a line for each variant."""

import statistics
from collections.abc import Sequence

from jaxprompt.studies.baselines import Record
from jaxprompt.studies.study import FULL, Records, Table, Variant, majority_of

NOTHING = "–"  # there is no value


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds as text."""
    if not values:
        return NOTHING
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


RECOVERY = "recovery"
RECOVERY_MEANS = (
    "Recovery is (score - majority class) / (full fine-tuning - majority class): 0% is no better"
    " than always answering the largest class, and 100% is as good as full fine-tuning."
)


def table(variants: list[Variant], records: Records) -> Table:
    """A line for each variant, and columns for which there is something to show.

    The columns: seeds, mean and spread of the score, trained parameters, recovery, the paper's
    score and the difference from it.
    """
    columns = [("", [variant.label for variant in variants])]
    values = [variant.values(records) for variant in variants]
    columns.append(("seeds", [str(len(some)) for some in values]))
    columns.append(("score", [mean_and_spread(some) for some in values]))
    counts = [_trained_parameters(variant.complete(records)) for variant in variants]
    if any(count not in ("0", NOTHING) for count in counts):
        columns.append(("trained parameters", counts))
    floor, room = majority_of(variants, records), 0.0
    full = next((some for v, some in zip(variants, values, strict=True) if v.label == FULL), [])
    if full and floor is not None:
        room = statistics.mean(full) - floor
    if room > 0.01 and floor is not None:
        shares = [f"{(statistics.mean(v) - floor) / room:.0%}" if v else NOTHING for v in values]
        columns.append((RECOVERY, shares))
    if any(variant.paper is not None for variant in variants):
        columns += _paper_columns(variants, values)
    lines = [list(line) for line in zip(*([head, *cells] for head, cells in columns), strict=True)]
    if room > 0.01:
        lines.append(["majority class", "", f"{floor:.3f}"] + [""] * (len(columns) - 3))
    return lines


def _trained_parameters(records: list[Record]) -> str:
    """How many numbers were trained, as text."""
    count = next((record.get("trainable_parameters") for record in records), None)
    return f"{count:,}" if count else "0" if records else NOTHING


def _paper_columns(
    variants: list[Variant], values: list[list[float]]
) -> list[tuple[str, list[str]]]:
    """The paper's scores, and how far ours are from them."""
    papers, differences = [], []
    for variant, some in zip(variants, values, strict=True):
        papers.append(NOTHING if variant.paper is None else f"{variant.paper:.3f}")
        if variant.paper is None or not some:
            differences.append(NOTHING)
        else:
            differences.append(f"{statistics.mean(some) - variant.paper:+.3f}")
    return [("paper", papers), ("difference", differences)]
