"""Pre-train the built-in backbone on packed rows (scripts/mixture.py) with jaxprompt's own model.

AdamW with float32 parameters, warm-up, then linear decay to zero over `--steps`, or over
`--minutes` of wall time where the hardware's speed should decide how many steps are taken. Run
the same command again to resume from the last checkpoint in OUT. OUT/hf is always a Hugging Face
directory of the last checkpoint; OUT/log.jsonl has the loss of every objective.

    python scripts/pretrain.py --rows rows.npz --embeddings embeddings.npy \\
        --tokenizer jaxprompt/builtin/backbone --out runs/backbone --minutes 65
"""

import argparse
import functools
import json
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprompt.model import t5
from jaxprompt.model.layers import shift_right
from jaxprompt.model.load import save_hf

OBJECTIVES = (
    "span", "prefix", "define_span", "headword", "definition", "genus", "field", "topic", "part",
    "source", "options", "yes_no", "renamed", "unscramble", "occurs", "micro",
)  # fmt: skip
PROMPTS, PROMPT = len(OBJECTIVES) + 96, 50  # the bank of scripts/mixture.py
COPY_GAIN = 3.0  # RMS of a copied word in the decoder, whose own vectors have RMS 1 to 4
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def start(config: t5.T5Config, embeddings: np.ndarray | None, seed: int) -> dict:
    """Model parameters and the bank of virtual tokens, whose vectors start as sampled words."""
    model = t5.init_params(config, jax.random.key(seed))
    if embeddings is not None:
        model["token_embedder"]["embedding"] = jnp.asarray(embeddings)
        model["head"] = jnp.asarray(embeddings.T * config.d_model**-0.5)
    words = np.random.default_rng(seed).integers(100, config.vocab_size - 100, (PROMPTS, PROMPT))
    return {"model": model, "bank": model["token_embedder"]["embedding"][words]}


def losses(params: dict, batch: dict, config: t5.T5Config) -> tuple[jax.Array, jax.Array]:
    """Weighted mean cross-entropy, and per objective the sums of (loss, tokens)."""
    segments, target_segments = batch["input_segments"], batch["target_segments"]
    encoded = t5.encode(params["model"], params["bank"], config, batch["inputs"], segments)
    shifted = shift_right(batch["targets"], target_segments, config.decoder_start_id)
    logits = t5.decode(params["model"], None, config, encoded, segments, shifted, target_segments)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    weights = batch["weights"]
    real = (weights > 0).astype(jnp.float32)
    kinds = jax.nn.one_hot(batch["objectives"], len(OBJECTIVES))
    sums = jnp.einsum("bto,btc->oc", kinds, jnp.stack([each * real, real], -1))
    return jnp.sum(each * weights) / jnp.sum(weights), sums


def open_copy_path(params: dict, config: t5.T5Config, rows: dict) -> dict:
    """Turn half of the heads of the last cross-attention into a path that copies input words.

    Values and output are set so that what the encoder says about a position becomes, as well as the
    half rank allows, the vector of the word that stands there (least squares over 64 rows), which
    the head maps to that word; queries start again small, so that all positions count alike. From
    random values it takes T5 many millions of tokens to discover that inputs can be copied.
    """
    model = params["model"]
    ids, segments = (rows[n][:64].astype(np.int32) for n in ("inputs", "input_segments"))
    encoded = np.asarray(t5.encode(model, params["bank"], config, ids, segments))
    words = (segments > 0) & (ids < config.vocab_size)
    table = np.asarray(model["token_embedder"]["embedding"])
    x, y = encoded[words], np.asarray(model["head"]).T[ids[words]]
    linear = np.linalg.lstsq(x, y - y.mean(0), rcond=None)[0]
    u, s, v = np.linalg.svd(linear)
    heads = config.num_heads // 2
    rank = heads * config.head_dim
    gain = COPY_GAIN / np.std(x @ linear)
    value = (u[:, :rank] * np.sqrt(s[:rank] * gain)).reshape(-1, heads, config.head_dim)
    out = (np.sqrt(s[:rank] * gain)[:, None] * v[:rank]).reshape(heads, config.head_dim, -1)
    fit = 1 - np.var(y - y.mean(0) - x @ linear) / np.var(y)
    print(f"copy path: {fit:.2f} of the words' variance explained, {table.shape[1]} dimensions")
    attention = model["decoder"]["layers"]["cross_attention"]
    small = (
        jax.random.normal(jax.random.key(1), value.shape)
        * (config.d_model * config.head_dim) ** -0.5
    )
    attention["value"] = attention["value"].at[-1, :, heads:].set(value)
    attention["out"] = attention["out"].at[-1, heads:].set(out)
    attention["query"] = attention["query"].at[-1, :, heads:].set(small)
    return params


def transform() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.98))


def factor(name: str, config: t5.T5Config) -> float:
    """Multiple of the learning rate for a leaf, because Adam's steps do not know a leaf's scale.

    Embedding and bank have elements of RMS 1, and T5's query kernels start at (d H)^-0.5, as the
    attention logits are not divided by H^0.5. At the full rate they double in a few steps,
    attention saturates and the decoder does not learn to read.
    """
    if "bank" in name:
        return 10.0
    if "embedding" in name:
        return 2.0
    return config.head_dim**-0.5 if "query" in name else 1.0


@functools.partial(jax.jit, static_argnames="config", donate_argnums=(0, 1))
def step(params, state, batch, rate, *, config: t5.T5Config):
    """One update; every leaf's rate is relative to its scale (see `factor`)."""
    (_, sums), grads = jax.value_and_grad(losses, has_aux=True)(params, batch, config)
    updates, state = transform().update(grads, state, params)

    def apply(path, p, u):
        return p - rate * factor(jax.tree_util.keystr(path), config) * u

    return jax.tree_util.tree_map_with_path(apply, params, updates), state, sums


def save(out: Path, tokenizer: Path, config: t5.T5Config, params, state, progress: dict) -> None:
    """Write the resumable checkpoint and the HF directory, each moved into place when complete."""
    leaves = [np.asarray(x) for x in jax.tree.leaves((params, state))]
    part = out / "checkpoint.part.npz"
    np.savez(part, progress=json.dumps(progress), **{f"leaf{i}": x for i, x in enumerate(leaves)})
    part.rename(out / "checkpoint.npz")
    part = out / "hf.part"
    shutil.rmtree(part, ignore_errors=True)
    save_hf(part, config, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["model"]))
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, part)
    shutil.rmtree(out / "hf", ignore_errors=True)
    part.rename(out / "hf")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument(
        "--embeddings", type=Path, help="[V, D] start vectors (scripts/init_embeddings.py)"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="checkpoint.npz of an earlier part")
    parser.add_argument("--copy-path", action="store_true", help="see open_copy_path")
    parser.add_argument("--steps", type=int, help="length of the schedule in steps")
    parser.add_argument("--minutes", type=float, help="or in minutes of training")
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--d-ff", type=int, default=512)
    parser.add_argument("--layers", type=int, nargs=2, default=(4, 2), help="encoder, decoder")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--unroll", action="store_true")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.steps is None) == (args.minutes is None):
        raise ValueError("give either --steps or --minutes")

    config = t5.T5Config(
        vocab_size=8192,
        d_model=args.d_model,
        num_heads=args.d_model // 64,
        head_dim=64,
        d_ff=args.d_ff,
        num_encoder_layers=args.layers[0],
        num_decoder_layers=args.layers[1],
        dtype=args.dtype,
        unroll=args.unroll,
    )
    rows = dict(np.load(args.rows))
    order = np.random.default_rng(args.seed).permutation(len(rows["inputs"]))
    per_epoch = len(order) // args.batch_rows
    embeddings = np.load(args.embeddings) if args.embeddings else None
    params = start(config, embeddings, args.seed)
    state = transform().init(params)
    progress = {"step": 0, "tokens": 0, "seconds": 0.0}
    args.out.mkdir(parents=True, exist_ok=True)
    resumed = args.out / "checkpoint.npz"
    for path in (resumed, args.start):
        if path is not None and path.exists():
            with np.load(path) as saved:
                count = len(jax.tree.leaves((params, state)))
                leaves = [jnp.asarray(saved[f"leaf{i}"]) for i in range(count)]
                progress = json.loads(str(saved["progress"])) if path == resumed else progress
            params, state = jax.tree.unflatten(jax.tree.structure((params, state)), leaves)
            break
    if args.copy_path and not resumed.exists():
        params = open_copy_path(params, config, rows)
    size = sum(x.size for x in jax.tree.leaves(params["model"]))
    print(f"{size:,} parameters, {len(order):,} rows, from step {progress['step']}", flush=True)

    before, began, last_save = progress["seconds"], time.monotonic(), time.monotonic()
    sums, since, since_tokens = np.zeros((len(OBJECTIVES), 2)), time.monotonic(), 0
    while True:
        k = progress["step"]
        done = k / args.steps if args.steps else progress["seconds"] / 60 / args.minutes
        if done >= 1:
            break
        rate = args.rate * min(1.0, (k + 1) / args.warmup) * (1 - done)
        at = (k % per_epoch) * args.batch_rows
        chosen = order[at : at + args.batch_rows]
        wide = {"weights": np.float32}
        batch = {n: v[chosen].astype(wide.get(n, np.int32)) for n, v in rows.items()}
        params, state, out = step(params, state, batch, np.float32(rate), config=config)
        out = np.asarray(out)
        sums += out
        tokens = int((batch["input_segments"] > 0).sum() + (batch["target_segments"] > 0).sum())
        since_tokens += tokens
        progress = {
            "step": k + 1,
            "tokens": progress["tokens"] + tokens,
            "seconds": before + time.monotonic() - began,
        }
        if k % 50 == 49 or k < 3:
            mean = sums[:, 0] / np.maximum(sums[:, 1], 1)
            line = {
                "step": k + 1,
                "tokens": progress["tokens"],
                "minutes": round(progress["seconds"] / 60, 2),
                "rate": round(rate, 6),
                "loss": round(float(sums[:, 0].sum() / sums[:, 1].sum()), 4),
                "tokens_per_second": round(since_tokens / (time.monotonic() - since)),
                **{n: round(float(m), 3) for n, m in zip(OBJECTIVES, mean, strict=True)},
            }
            with open(args.out / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            sums, since, since_tokens = np.zeros_like(sums), time.monotonic(), 0
        if time.monotonic() - last_save > 60 * args.save_minutes:
            save(args.out, args.tokenizer, config, params, state, progress)
            last_save = time.monotonic()
    save(args.out, args.tokenizer, config, params, state, progress)


if __name__ == "__main__":
    main()
