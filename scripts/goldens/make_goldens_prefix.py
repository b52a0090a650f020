"""Make tests/parity/goldens_methods/concatenation: prefixes of a T5, concatenated in torch.

No library has prefixes in all three attentions of a T5 that are tokens before the text (PEFT ties
the layers and has none for the encoder; AdapterHub moves the text). So this script says what they
are: Hugging Face's T5 with an attention that is written out, in which the prefix stands in front of
the projected keys and values. The versions are those of make_goldens_methods.py:

    pip install torch peft==0.21.2 transformers==5.24.0
    python scripts/goldens/make_goldens_prefix.py

The base models and their inputs are those of goldens/. Each has a file with

    encoder/key [L,P,N,H]          and encoder/value, decoder/key, ..., cross/value: the prefixes
    PLACES/logits [B,T,V]          of the target tokens, 0 where a row has none
    PLACES/gradient/encoder/key    and so on, of the cross-entropy summed over the target tokens

PLACES names the attentions that have their prefix: encoder+decoder+cross, or one of the three. In
self-attention the prefix has the positions before the text. Cross-attention has no positions.
"""

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import numpy as np
import torch
from make_goldens_methods import PARITY, SEED, T5, T5_GATED, batch_of, load_base, target_logits
from transformers.models.t5.modeling_t5 import T5Attention

LENGTH, SCALE = 5, 0.7
STACKS = ("encoder", "decoder", "cross")
PLACES = ("+".join(STACKS), *STACKS)
Prefix = tuple[torch.Tensor, torch.Tensor]  # keys and values [P, N, H] of a layer


def attend(self: T5Attention, hidden_states, mask=None, key_value_states=None, **_):
    """T5's attention with ``self.prefix`` in front of the keys and values of the text."""
    text = hidden_states if key_value_states is None else key_value_states
    heads = lambda x: x.unflatten(-1, (self.n_heads, self.key_value_proj_dim)).transpose(1, 2)
    query, key, value = heads(self.q(hidden_states)), heads(self.k(text)), heads(self.v(text))
    prefix: Prefix | None = self.prefix
    size = 0
    if prefix is not None:
        front = [x.transpose(0, 1).expand(len(query), -1, -1, -1) for x in prefix]
        key, value = torch.cat([front[0], key], dim=2), torch.cat([front[1], value], dim=2)
        size = len(prefix[0])
    logits = query @ key.transpose(2, 3)
    if key_value_states is None:  # only the first layer of a stack has the table
        length = key.shape[2]
        logits = logits + self.first.compute_bias(length, length)[:, :, size:]
    if mask is not None:
        logits = logits + torch.nn.functional.pad(mask, (size, 0))
    y = torch.softmax(logits, dim=-1) @ value
    return self.o(y.transpose(1, 2).flatten(2)), None, None


def attentions(model: torch.nn.Module) -> dict[str, list[T5Attention]]:
    """The attentions of each kind, by layer."""
    encoder, decoder = model.encoder.block, model.decoder.block
    return {
        "encoder": [block.layer[0].SelfAttention for block in encoder],
        "decoder": [block.layer[0].SelfAttention for block in decoder],
        "cross": [block.layer[1].EncDecAttention for block in decoder],
    }


def golden_of(base: str) -> dict[str, np.ndarray]:
    """The arrays of a base model's file."""
    model, batch = load_base(base), batch_of(base)
    kinds, generator = attentions(model), torch.Generator().manual_seed(SEED)
    frozen = target_logits(model, batch)
    values, prefixes = {}, {}
    for kind, layers in kinds.items():
        shape = len(layers), LENGTH, layers[0].n_heads, layers[0].key_value_proj_dim
        for name in ("key", "value"):
            made = SCALE * torch.randn(shape, generator=generator)
            values[f"{kind}/{name}"] = prefixes[kind, name] = made.requires_grad_()
    T5Attention.forward = attend
    for layers in kinds.values():
        for attention in layers:
            attention.prefix, attention.__dict__["first"] = None, layers[0]
    # without a prefix it is the T5 that the library computes
    torch.testing.assert_close(target_logits(model, batch), frozen, rtol=0, atol=1e-6)
    for places in PLACES:
        chosen = places.split("+")
        for kind, layers in kinds.items():
            for i, attention in enumerate(layers):
                pair = prefixes[kind, "key"][i], prefixes[kind, "value"][i]
                attention.prefix = pair if kind in chosen else None
        logits = target_logits(model, batch)
        loss = torch.nn.functional.cross_entropy(
            logits[batch.valid], batch.targets[batch.valid], reduction="sum"
        )
        leaves = {name: leaf for name, leaf in prefixes.items() if name[0] in chosen}
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        values[f"{places}/logits"] = logits
        for (kind, name), gradient in zip(leaves, gradients, strict=True):
            values[f"{places}/gradient/{kind}/{name}"] = gradient
        change = (logits - frozen).abs().max() / frozen.abs().max()
        print(f"{base}, {places}: logits change by {change:.2f}")
    return {key: value.detach().numpy() for key, value in values.items()}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    os.chdir(PARITY)
    torch.set_num_threads(1)
    out = PARITY / "goldens_methods" / "concatenation"
    out.mkdir(exist_ok=True)
    forward = T5Attention.forward
    for base in (T5, T5_GATED):
        np.savez_compressed(out / f"{Path(base).name}.npz", **golden_of(base))
        T5Attention.forward = forward
    provenance = {
        "script": f"scripts/goldens/{Path(__file__).name}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "seed": SEED,
    }
    (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    main()
