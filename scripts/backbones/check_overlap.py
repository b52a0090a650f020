"""Count evaluation rows whose words occur in the pre-training text, by shingles of 8 words.

    python scripts/backbones/check_overlap.py --corpus runs/corpus runs/mixture \
        --rows jaxprompt/builtin/data/spam/test.parquet data/boolq/validation.jsonl

Text is every line of the .txt and .jsonl files in the folders. For each file of rows it
prints how many rows have any shingle in the text, and how many have more than half of theirs.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from corpus import shingles

from jaxprompt.config.errors import UserError
from jaxprompt.data.sources import read_rows

SIZE = 8


def lines(folder: Path) -> Iterator[str]:
    """All running text below a folder."""
    files = sorted(folder.rglob("*.txt")) + sorted(folder.rglob("*.jsonl"))
    if not files:
        raise UserError(f"{folder} holds no .txt or .jsonl file; name a folder of text.")
    for path in files:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if path.suffix == ".txt":
                    yield line
                else:
                    yield " ".join(v for v in json.loads(line).values() if isinstance(v, str))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, nargs="+", required=True)
    parser.add_argument("--rows", nargs="+", required=True)
    args = parser.parse_args()

    owners: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    sizes: list[list[int]] = []
    for number, name in enumerate(args.rows):
        sizes.append([])
        for row in read_rows(None, name):
            text = " ".join(v for k, v in row.items() if k != "label" and isinstance(v, str))
            own = {s for s in shingles(text, SIZE) if len(s) == SIZE}  # shorter texts have none
            for shingle in own:
                owners.setdefault(shingle, []).append((number, len(sizes[number])))
            sizes[number].append(len(own))
    found: set[tuple[str, ...]] = set()
    for folder in args.corpus:
        for line in lines(folder):
            found |= owners.keys() & shingles(line, SIZE)
    hits = [[0] * len(rows) for rows in sizes]
    for shingle in found:
        for number, row in owners[shingle]:
            hits[number][row] += 1
    for name, counts, whole in zip(args.rows, hits, sizes, strict=True):
        any_of = sum(count > 0 for count in counts)
        half = sum(2 * count > size for count, size in zip(counts, whole, strict=True))
        print(f"{name}: {len(whole)} rows, {any_of} share {SIZE} words, {half} more than half")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
