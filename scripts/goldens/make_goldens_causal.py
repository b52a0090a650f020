"""Make tests/parity/goldens_causal: tiny decoder-only models and what PyTorch computes with them.

Needs torch and transformers (never dependencies of the package itself):

    pip install torch transformers safetensors
    python scripts/goldens/make_goldens_causal.py

Each folder holds config.json, model.safetensors and golden.npz. Rows are computed one by one and
without padding, input and target as one sequence:

    inputs [B,S]  targets [B,T]    ids, padded with -1
    logits [B,T,V]                 of the target tokens, without a prompt
    generated [B,12]               greedy
    prompt [P,D]  prompt_logits [B,T,V]                      prompt in front of each input
    prompt_gradient [P,D]          of the cross-entropy summed over the target tokens
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

OUT = Path(__file__).parents[2] / "tests" / "parity" / "goldens_causal"
PROMPT, NEW = 5, 12
INPUTS, TARGETS = (40, 23, 1), (7, 4, 2)

COMMON = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# What the hub's config.json of each says, with small sizes
MODELS = {
    "llama": {**COMMON, "model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "llama3": {
        **COMMON,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "head_dim": 8,
        "rope_theta": 500.0,
        "rope_scaling": LLAMA3,
    },
    "smollm2": {
        **COMMON,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
    },
    "mistral": {
        **COMMON,
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "head_dim": 8,
        "sliding_window": 9,
    },
    "qwen2": {
        **COMMON,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "sliding_window": 131072,
        "max_window_layers": 21,
        "tie_word_embeddings": True,
    },
}


def random_weights(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Weights of realistic scale; queries and keys larger, so that attention is not uniform."""
    kind = getattr(transformers, config["architectures"][0])
    model = kind(transformers.AutoConfig.for_model(**config))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in sorted(model.state_dict().items()):
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        noise = torch.randn(value.shape, generator=generator)
        if "norm" in name:
            weights[name] = 1 + 0.3 * noise
        elif name.endswith("bias"):
            weights[name] = 0.5 * noise
        elif "embed_tokens" in name:
            weights[name] = noise
        else:
            large = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            weights[name] = large * value.shape[1] ** -0.5 * noise
    return weights


def golden(model, config: dict, seed: int) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(1000 + seed)
    vocab, batch = config["vocab_size"], len(INPUTS)
    prompt = torch.randn((PROMPT, config["hidden_size"]), generator=generator, requires_grad=True)
    found = {
        "inputs": np.full((batch, max(INPUTS)), -1, np.int32),
        "targets": np.full((batch, max(TARGETS)), -1, np.int32),
        "generated": np.full((batch, NEW), -1, np.int32),
        "logits": np.zeros((batch, max(TARGETS), vocab), np.float32),
        "prompt_logits": np.zeros((batch, max(TARGETS), vocab), np.float32),
    }
    for row, (s, t) in enumerate(zip(INPUTS, TARGETS, strict=True)):
        ids = torch.randint(3, vocab, (1, s + t), generator=generator)
        ids[0, -1] = config["eos_token_id"]
        found["inputs"][row, :s], found["targets"][row, :t] = ids[0, :s], ids[0, s:]
        with torch.no_grad():
            plain = model(input_ids=ids).logits[0, s - 1 : s + t - 1]
            made = model.generate(
                input_ids=ids[:, :s],
                attention_mask=torch.ones((1, s), dtype=torch.long),
                max_new_tokens=NEW,
                do_sample=False,
            )[0, s:]
        words = model.get_input_embeddings()(ids)
        logits = model(inputs_embeds=torch.cat([prompt[None], words], dim=1)).logits
        logits = logits[0, PROMPT + s - 1 : PROMPT + s + t - 1]
        torch.nn.functional.cross_entropy(logits, ids[0, s:], reduction="sum").backward()
        found["logits"][row, :t] = plain
        found["prompt_logits"][row, :t] = logits.detach()
        found["generated"][row, : len(made)] = made
    return found | {"prompt": prompt.detach().numpy(), "prompt_gradient": prompt.grad.numpy()}


def main() -> None:
    torch.set_num_threads(1)
    for seed, (name, config) in enumerate(MODELS.items()):
        folder = OUT / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(random_weights(config, seed), folder / "model.safetensors", {"format": "pt"})
        kind = getattr(transformers, config["architectures"][0])
        model = kind.from_pretrained(folder, attn_implementation="eager").eval()
        model.requires_grad_(False)
        values = golden(model, config, seed)
        np.savez_compressed(folder / "golden.npz", **values)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name}: {size / 1e3:.0f} kB, logits up to {np.abs(values['logits']).max():.1f}")


if __name__ == "__main__":
    main()
