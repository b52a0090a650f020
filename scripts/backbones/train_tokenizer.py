"""Train the built-in backbone's unigram tokenizer on the output of scripts/backbones/corpus.py.

8,192 rows, 100 of them sentinels. `jaxprompt pretrain` can train one as well (`tokenizer:` of its
config), from its own text sources; this adds the dictionaries, and start weights need it first.

    python scripts/backbones/train_tokenizer.py --corpus runs/corpus --out runs/tokenizer
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from jaxprompt.config.pretrain import TokenizerConfig
from jaxprompt.data.tokenizer_training import train_tokenizer

BYTES_PER_SOURCE = 3_000_000


def texts(corpus: Path) -> Iterator[str]:
    """An equal share of every prose source, and the dictionaries' definitions."""
    for path in sorted((corpus / "text").glob("*.txt")):
        lines = path.read_text().splitlines()
        step = max(1, path.stat().st_size // BYTES_PER_SOURCE)
        yield from lines[::step]
    for name in ("gcide", "foldoc"):
        rows = [json.loads(line) for line in open(corpus / f"{name}.jsonl")]
        yield from (f"{row['headword'].lower()}: {row['definition']}" for row in rows[::2])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(texts(args.corpus), TokenizerConfig(vocabulary=8192, sentinels=100), args.out)


if __name__ == "__main__":
    main()
