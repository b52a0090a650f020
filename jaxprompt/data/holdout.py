"""Cuts rows into parts for training, validation and test: the same in every call."""

import hashlib
import json
from collections.abc import Sequence

from jaxprompt.data.rows import Row, Rows

FEWEST_ROWS = 12  # that are cut
MOST_LABELS = 100  # different values of a target that is still taken for classes
HELD_OUT = 0.1  # share of the rows that go to validation, and to test
MOST_HELD_OUT = 1000  # rows of each


def hold_out(
    rows: Rows, text: Sequence[str], label: Sequence[str], names: Sequence[str]
) -> dict[str, list[Row]]:
    """Disjoint parts of the rows: most for training, a share of each label for the others.

    Rows of one text stay together, so that no text is in two parts. Which part a text goes to is
    decided by its SHA-256, so that the order of the rows and other rows hardly matter.

    Args:
        text: The columns of the text.
        label: The columns of the target.
        names: Of the parts. The first one is that for training.

    Returns:
        The rows of each part, in their order. A part is empty where each label has too few texts.
    """
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        words = json.dumps([str(row.get(name)) for name in text])
        digest = hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()
        groups.setdefault(digest, []).append(number)
    by_label: dict[tuple[str, ...], list[str]] = {}
    for digest in sorted(groups):
        first = rows[groups[digest][0]]
        by_label.setdefault(tuple(str(first.get(name)) for name in label), []).append(digest)
    if len(by_label) > MOST_LABELS:  # answers are written freely: shares of all rows
        by_label = {(): sorted(groups)}
    share = min(HELD_OUT, MOST_HELD_OUT / len(rows))
    part_of: dict[int, str] = {}
    for digests in by_label.values():
        held_out = max(1, round(share * len(digests)))
        if len(digests) < len(names):  # too few texts of this label
            held_out = 0
        for place, digest in enumerate(digests):
            turn = place // held_out + 1 if held_out else len(names)
            name = names[turn] if turn < len(names) else names[0]
            part_of |= dict.fromkeys(groups[digest], name)
    parts: dict[str, list[Row]] = {name: [] for name in names}
    for number, row in enumerate(rows):
        parts[part_of[number]].append(row)
    return parts
