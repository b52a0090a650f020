"""Make tests/parity/goldens: seven tiny random T5s and what PyTorch computes with them.

Needs torch and transformers (never dependencies of the package itself):

    pip install torch transformers safetensors
    python scripts/goldens/make_goldens.py

Each folder holds a checkpoint as a hub repository has it (config.json in the hub's spelling,
model.safetensors, for one model also the torch and the Flax form) and golden.npz:

    inputs [B,S]  mask [B,S]  targets [B,T]  decoder_inputs [B,T]      ids, padded with 0
    logits [B,T,V]                 without a prompt
    generated [B,21]               greedy, starting with the start id
    prompt [P,D]  prompt_logits [B,T,V]                                prompt in front of each input
    prompt_gradient [P,D]          of the cross-entropy summed over the target tokens
"""

import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import msgpack
import numpy as np
import torch
import transformers
from safetensors.torch import save_file

OUT = Path(__file__).parents[2] / "tests" / "parity" / "goldens"
PROMPT, BATCH, INPUT, TARGET, NEW = 5, 3, 40, 7, 20

COMMON = {
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 32,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "vocab_size": 96,
    "relative_attention_num_buckets": 32,
    "layer_norm_epsilon": 1e-06,
    "dropout_rate": 0.1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "use_cache": True,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
T5 = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
# What the hub's config.json of each family says, with small sizes; T5 1.0 leaves out defaults.
MODELS = {
    "t5_1_0": {**COMMON, **T5, "n_positions": 512},
    "t5_1_1": {**COMMON, **T5, **GATED, "d_model": 16, "d_kv": 8},
    "t5_lm_adapt": {**COMMON, **T5, **GATED, "num_heads": 2, "d_kv": 5},
    "flan_t5": {
        **COMMON,
        **T5,
        **GATED,
        "relative_attention_max_distance": 128,
        "n_positions": 512,
    },
    "mt5": {
        **COMMON,
        **GATED,
        "architectures": ["MT5ForConditionalGeneration"],
        "model_type": "mt5",
        "vocab_size": 128,
        "d_model": 16,
        "relative_attention_max_distance": 128,
        "tokenizer_class": "T5Tokenizer",
    },
    "byt5": {
        **COMMON,
        **T5,
        **GATED,
        "num_decoder_layers": 1,
        "vocab_size": 160,
        "d_model": 16,
        "gradient_checkpointing": False,
        "tokenizer_class": "ByT5Tokenizer",
    },
    "umt5": {
        **COMMON,
        **GATED,
        "architectures": ["UMT5ForConditionalGeneration"],
        "model_type": "umt5",
        "d_model": 16,
        "scalable_attention": True,
        "relative_attention_max_distance": 128,
    },
}


def random_weights(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Weights of realistic scale under the hub's names; a head only where the hub has one."""
    kind = getattr(transformers, config["architectures"][0])
    model = kind(transformers.AutoConfig.for_model(**config))
    generator = torch.Generator().manual_seed(seed)
    scales = {"q": (config["d_model"] * config["d_kv"]) ** -0.5, "wo": config["d_ff"] ** -0.5}
    scales["o"] = (config["num_heads"] * config["d_kv"]) ** -0.5
    weights = {}
    for name, value in sorted(model.state_dict().items()):
        *_, module, _ = name.split(".")
        if module == "embed_tokens" or (
            name == "lm_head.weight" and "tie_word_embeddings" not in config
        ):
            continue
        noise = torch.randn(value.shape, generator=generator)
        if module.endswith("layer_norm"):
            weights[name] = 1 + 0.3 * noise
        elif module == "shared":
            weights[name] = 2 * noise
        elif module == "relative_attention_bias":
            weights[name] = 1.5 * noise
        else:  # queries a little larger than at initialisation, so that attention is not uniform
            weights[name] = scales.get(module, config["d_model"] ** -0.5) * noise
            weights[name] *= 2.0 if module == "q" else 1.0
    return weights


def load_as_the_hub_would(folder: Path, config: dict, weights: dict[str, torch.Tensor]):
    """The torch model of a folder, with the head and the scaling that its checkpoint means.

    transformers 5 declares every T5 tied. From a checkpoint with a head of its own it loads that
    head all the same, which is asserted here. It also scales the output of every umT5, although no
    umT5 was trained so (and version 4 does not): the flag is put back to what the hub's file says.
    """
    kind = getattr(transformers, config["architectures"][0])
    model = kind.from_pretrained(folder, attn_implementation="eager").eval()
    untied = "lm_head.weight" in weights
    assert untied == (config.get("tie_word_embeddings") is False)
    head = weights["lm_head.weight" if untied else "shared.weight"]
    assert torch.equal(model.lm_head.weight, head)
    assert untied != torch.equal(model.lm_head.weight, model.shared.weight)
    if config["model_type"] == "umt5":
        model.config.tie_word_embeddings = False
    if config["model_type"] == "t5":
        assert model.config.scale_decoder_outputs == (not untied)
    return model


def check_head(model, config: dict, inputs, mask, decoder_inputs, logits) -> None:
    """The logits are the decoder output times the head, scaled in T5 1.0 alone."""
    encoded = model.encoder(input_ids=inputs, attention_mask=mask)[0]
    hidden = model.decoder(
        input_ids=decoder_inputs, encoder_hidden_states=encoded, encoder_attention_mask=mask
    )[0]
    scale = 1.0 if config.get("tie_word_embeddings") is False else config["d_model"] ** -0.5
    torch.testing.assert_close(hidden * scale @ model.lm_head.weight.T, logits)


def golden(model, config: dict, seed: int) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(1000 + seed)
    vocab, d_model = config["vocab_size"], config["d_model"]
    inputs = torch.randint(2, vocab, (BATCH, INPUT), generator=generator)
    lengths = torch.tensor([INPUT, 23, 9])
    inputs[torch.arange(INPUT)[None] >= lengths[:, None]] = 0
    inputs[torch.arange(BATCH), lengths - 1] = 1
    mask = (inputs != 0).long()
    targets = torch.randint(2, vocab, (BATCH, TARGET), generator=generator)
    target_lengths = torch.tensor([TARGET, 4, 2])
    targets[torch.arange(TARGET)[None] >= target_lengths[:, None]] = 0
    targets[torch.arange(BATCH), target_lengths - 1] = 1
    decoder_inputs = torch.nn.functional.pad(targets[:, :-1], (1, 0))
    prompt = torch.randn((PROMPT, d_model), generator=generator, requires_grad=True)

    with torch.no_grad():
        logits = model(
            input_ids=inputs, attention_mask=mask, decoder_input_ids=decoder_inputs
        ).logits
        check_head(model, config, inputs, mask, decoder_inputs, logits)
        generated = model.generate(
            input_ids=inputs, attention_mask=mask, max_new_tokens=NEW, do_sample=False, num_beams=1
        )
    embedded = torch.cat([prompt.expand(BATCH, -1, -1), model.shared(inputs)], dim=1)
    longer = torch.cat([torch.ones((BATCH, PROMPT), dtype=mask.dtype), mask], dim=1)
    prompt_logits = model(
        inputs_embeds=embedded, attention_mask=longer, decoder_input_ids=decoder_inputs
    ).logits
    loss = torch.nn.functional.cross_entropy(
        prompt_logits.flatten(0, 1), targets.flatten(), ignore_index=0, reduction="sum"
    )
    loss.backward()
    ids = {"inputs": inputs, "mask": mask, "targets": targets, "decoder_inputs": decoder_inputs}
    values = {"logits": logits, "prompt": prompt, "prompt_logits": prompt_logits}
    padded = torch.zeros((BATCH, NEW + 1), dtype=generated.dtype)
    padded[:, : generated.shape[1]] = generated
    return {
        **{name: x.numpy().astype(np.int32) for name, x in ids.items()},
        **{name: x.detach().numpy() for name, x in values.items()},
        "generated": padded.numpy().astype(np.int32),
        "prompt_gradient": prompt.grad.numpy(),
    }


def write_flax(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """flax_model.msgpack as transformers' former Flax T5 saved it (kernels transposed)."""
    tree: dict = {}
    for name, value in weights.items():
        *module, _ = name.split(".")
        array = value.numpy()
        if module[-1] in ("shared", "relative_attention_bias"):
            leaf = "embedding"
        elif module[-1].endswith("layer_norm"):
            leaf = "weight"
        else:
            leaf, array = "kernel", array.T
        node = tree
        for part in module:
            node = node.setdefault(part, {})
        triple = (array.shape, array.dtype.name, array.tobytes())
        node[leaf] = msgpack.ExtType(1, msgpack.packb(triple))
    path.write_bytes(msgpack.packb(tree))


def main() -> None:
    torch.set_num_threads(1)
    for seed, (name, config) in enumerate(MODELS.items()):
        folder = OUT / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = random_weights(config, seed)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        if name == "t5_lm_adapt":  # what the hub has for these models: a torch file
            torch.save(weights, folder / "pytorch_model.bin")
        if name == "t5_1_0":
            write_flax(folder / "flax_model.msgpack", weights)
        model = load_as_the_hub_would(folder, config, weights)
        values = golden(model, config, seed)
        np.savez_compressed(folder / "golden.npz", **values)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name}: {size / 1e3:.0f} kB, logits up to {np.abs(values['logits']).max():.1f}")


if __name__ == "__main__":
    main()
