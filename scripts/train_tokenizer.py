"""Train the built-in backbone's unigram tokenizer on the output of scripts/corpus.py.

8,192 rows in T5's order: pad 0, eos 1, unk 2, pieces, and at the very end `<extra_id_99>` ...
`<extra_id_0>` (the last id). Case is kept; every text gets an EOS from the post-processor.

    python scripts/train_tokenizer.py --corpus corpus --out jaxprompt/builtin/backbone
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import TemplateProcessing

ROWS, SENTINELS, BYTES_PER_SOURCE = 8192, 100, 3_000_000


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

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("\n", " "), normalizers.Replace("\t", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=ROWS - SENTINELS,
        special_tokens=special,
        unk_token="<unk>",
        max_piece_length=16,
        initial_alphabet=[chr(c) for c in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(args.corpus), trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    missing = ROWS - SENTINELS - tokenizer.get_vocab_size()
    if missing:
        raise ValueError(f"the trainer returned {missing} pieces too few; give it more text")
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(SENTINELS))]
    tokenizer.add_special_tokens(
        [AddedToken(s, special=True, normalized=False, lstrip=True) for s in sentinels]
    )

    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    extra = {"additional_special_tokens": sentinels[::-1]}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "extra_ids": SENTINELS,
        **names,
        **extra,
    }
    (args.out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (args.out / "special_tokens_map.json").write_text(json.dumps(names | extra, indent=1) + "\n")


if __name__ == "__main__":
    main()
