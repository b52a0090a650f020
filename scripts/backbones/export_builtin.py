"""Put a pre-training run's backbone into the package, its matrices as int8 with a scale a row.

Prints the largest change of any held-out loss that the rounding makes, from the run's own held-out
batches; refuses where that is above --limit.

    python scripts/backbones/export_builtin.py runs/backbones/base jaxprompt/builtin/backbones/base
"""

import argparse
import json
import shutil
from pathlib import Path

from jaxprompt.config.overrides import read_config
from jaxprompt.config.pretrain import PretrainConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.text import open_streams
from jaxprompt.data.tokenizer import copy_tokenizer, load_tokenizer
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.models.checkpoints.save import save_hf
from jaxprompt.training.pretrain import held_out_batches, held_out_scores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("to", type=Path)
    parser.add_argument("--limit", type=float, default=0.01, help="nats a token")
    args = parser.parse_args()

    config = parse(PretrainConfig, read_config(args.run / "config.yaml"))
    backbone = load_backbone(str(args.run / "model"), unroll=True)
    part = args.to.with_name(f".{args.to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    save_hf(part, backbone.config, backbone.params, int8=True)
    copy_tokenizer(backbone.path, part)
    rounded = load_backbone(str(part), unroll=True)

    tokenizer = load_tokenizer(backbone.path)
    streams = open_streams(config, tokenizer, backbone.config.vocab_size, args.run / "tokens")
    text = {n: b for n, b in held_out_batches(config, streams).items() if "pairs/" not in n}
    before, after = (held_out_scores(b.params, None, text, b.model) for b in (backbone, rounded))
    changes = {name: after[name]["loss"] - before[name]["loss"] for name in before}
    worst = max(changes.values(), key=abs)
    print(json.dumps({"fingerprint": rounded.fingerprint, "largest_change_of_loss": worst}))
    if abs(worst) > args.limit:
        raise SystemExit(f"rounding to int8 costs {worst:.4f} nats; ship bfloat16 instead")
    shutil.rmtree(args.to, ignore_errors=True)
    part.rename(args.to)


if __name__ == "__main__":
    main()
