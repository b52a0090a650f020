"""Make tests/parity/goldens_masked: tiny encoders with a mask and what PyTorch computes with them.

Needs torch and transformers (never dependencies of the package itself):

    pip install torch transformers safetensors
    python scripts/goldens/make_goldens_masked.py

Each folder holds config.json, model.safetensors, the vocabulary that names the mask and golden.npz.
Rows are computed one by one and without padding. An answer of n tokens takes the place of the one
mask of its row, and each token is predicted with the mask in its own place:

    inputs [B,S]  targets [B,T]    ids, padded with -1
    logits [B,T,V]                 of the target tokens, without a prompt
    prompt [P,D]  prompt_logits [B,T,V]                      prompt in front of each input
    prompt_gradient [P,D]          of the cross-entropy summed over the target tokens
    key, value [L,p,N,H]           a prefix in front of the keys and values of each layer
    prefix_logits [B,T,V]  key_gradient, value_gradient [L,p,N,H]
"""

import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

OUT = Path(__file__).parents[2] / "tests" / "parity" / "goldens_masked"
PROMPT, PREFIX, LAYERS, HEADS, WIDTH, WORDS = 5, 3, 3, 4, 24, 96
INPUTS, TARGETS = (23, 14, 3), (3, 1, 2)

BERT = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": WORDS,
    "hidden_act": "gelu",
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
# What the hub's config.json of each says, with small sizes
MODELS = {
    "bert": {**BERT, "model_type": "bert", "architectures": ["BertForMaskedLM"]},
    "roberta": {
        **BERT,
        "model_type": "roberta",
        "architectures": ["RobertaForMaskedLM"],
        "max_position_embeddings": 42,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    },
    "distilbert": {
        "model_type": "distilbert",
        "architectures": ["DistilBertForMaskedLM"],
        "activation": "gelu",
        "dim": WIDTH,
        "hidden_dim": 40,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "vocab_size": WORDS,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
    },
}
SPECIAL = {
    "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
}
MASK = 4


def random_weights(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Weights of realistic scale; queries and keys larger, so that attention is not uniform."""
    kind = getattr(transformers, config["architectures"][0])
    model = kind(transformers.AutoConfig.for_model(**config))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in sorted(model.state_dict().items()):
        if name.endswith(("decoder.weight", "vocab_projector.weight", "decoder.bias")):
            continue
        noise = torch.randn(value.shape, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            weights[name] = 1 + 0.3 * noise
        elif name.endswith("bias"):
            weights[name] = 0.5 * noise
        elif "embeddings" in name:
            weights[name] = noise
        else:
            large = 2.0 if any(x in name for x in ("query", "key", "q_lin", "k_lin")) else 1.0
            weights[name] = large * value.shape[1] ** -0.5 * noise
    return weights


def with_prefix(module, query, key, value, mask, scaling=None, **_):
    """Attention [B,T,N,H] to a module's ``prefix``, if it has one, and to keys and values."""
    if module.prefix is not None:
        front = [x.transpose(0, 1)[None] for x in module.prefix]
        key, value = torch.cat([front[0], key], dim=2), torch.cat([front[1], value], dim=2)
    weights = torch.softmax(query @ key.transpose(2, 3) * query.shape[-1] ** -0.5, dim=-1)
    return (weights @ value).transpose(1, 2), weights


def attentions(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in model.modules() if hasattr(m, "query") or hasattr(m, "q_lin")]


def answer_logits(model, ids: torch.Tensor, answer: torch.Tensor, prompt, start: int):
    """Logits [n,V] of an answer's tokens; ``start`` positions are before the row."""
    at = int((ids == MASK).nonzero()[0, 0])
    rows = []
    for number in range(len(answer)):
        words = answer.clone()
        words[number] = MASK
        row = torch.cat([ids[:at], words, ids[at + 1 :]])
        embedded = model.get_input_embeddings()(row)[None]
        embedded = embedded if prompt is None else torch.cat([prompt[None], embedded], dim=1)
        first = model.config.pad_token_id + 1 if model.config.model_type == "roberta" else 0
        places = torch.arange(embedded.shape[1])[None] + first + start
        logits = model(inputs_embeds=embedded, position_ids=places).logits
        rows.append(logits[0, (0 if prompt is None else len(prompt)) + at + number])
    return torch.stack(rows)


def golden(model, seed: int) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(1000 + seed)
    batch = len(INPUTS)
    shape = LAYERS, PREFIX, HEADS, WIDTH // HEADS
    prompt = torch.randn((PROMPT, WIDTH), generator=generator, requires_grad=True)
    key, value = (torch.randn(shape, generator=generator, requires_grad=True) for _ in range(2))
    found = {
        "inputs": np.full((batch, max(INPUTS)), -1, np.int32),
        "targets": np.full((batch, max(TARGETS)), -1, np.int32),
        **{
            name: np.zeros((batch, max(TARGETS), WORDS), np.float32)
            for name in ("logits", "prompt_logits", "prefix_logits")
        },
    }
    for row, (s, t) in enumerate(zip(INPUTS, TARGETS, strict=True)):
        ids = torch.randint(5, WORDS, (s,), generator=generator)
        ids[(s // 2, 0, s - 1)[row]] = MASK
        answer = torch.randint(5, WORDS, (t,), generator=generator)
        found["inputs"][row, :s], found["targets"][row, :t] = ids, answer
        prefixes = [None, None, list(zip(key, value, strict=True))]
        names = ("logits", "prompt_logits", "prefix_logits")
        for name, front, prefix in zip(names, (None, prompt, None), prefixes, strict=True):
            for number, module in enumerate(attentions(model)):
                module.prefix = None if prefix is None else prefix[number]
            start = 0 if prefix is None else PREFIX
            logits = answer_logits(model, ids, answer, front, start)
            if logits.requires_grad:
                torch.nn.functional.cross_entropy(logits, answer, reduction="sum").backward()
            found[name][row, :t] = logits.detach()
    return found | {
        "prompt": prompt.detach().numpy(), "prompt_gradient": prompt.grad.numpy(),
        "key": key.detach().numpy(), "key_gradient": key.grad.numpy(),
        "value": value.detach().numpy(), "value_gradient": value.grad.numpy(),
    }  # fmt: skip


def write_vocabulary(folder: Path, kind: str) -> None:
    """The file of the layout's tokenizer, in which the mask is token 4."""
    if kind == "roberta":
        words = {w: i for i, w in enumerate([*SPECIAL[kind], *map(str, range(5, WORDS))])}
        (folder / "vocab.json").write_text(json.dumps(words) + "\n")
    else:
        words = [*SPECIAL["bert"], *map(str, range(5, WORDS))]
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")


def main() -> None:
    torch.set_num_threads(1)
    transformers.AttentionInterface.register("prefixed", with_prefix)
    for seed, (name, config) in enumerate(MODELS.items()):
        folder = OUT / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(random_weights(config, seed), folder / "model.safetensors", {"format": "pt"})
        write_vocabulary(folder, name)
        kind = getattr(transformers, config["architectures"][0])
        model = kind.from_pretrained(folder, attn_implementation="eager").eval()
        model.requires_grad_(False)
        ids = torch.arange(5, 12)[None]
        plain = model(input_ids=ids).logits
        model.set_attn_implementation("prefixed")
        for module in attentions(model):
            module.prefix = None
        assert torch.allclose(model(input_ids=ids).logits, plain, atol=1e-4)
        values = golden(model, seed)
        np.savez_compressed(folder / "golden.npz", **values)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name}: {size / 1e3:.0f} kB, logits up to {np.abs(values['logits']).max():.1f}")


if __name__ == "__main__":
    main()
