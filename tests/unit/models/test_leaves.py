"""The maps from checkpoints to parameter trees: every leaf of the model, with its axes."""

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxprompt.models.checkpoints import hf_decoder, hf_t5, t5x
from jaxprompt.models.checkpoints.axes import axis_sizes
from jaxprompt.models.checkpoints.leaf import Tensor, layer_sizes
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.registry import model_for
from jaxprompt.models.t5.config import T5Config

T5 = T5Config(
    vocab_size=61, d_model=16, num_heads=3, head_dim=4, d_ff=24,
    num_encoder_layers=3, num_decoder_layers=2,
)  # fmt: skip
DECODER = DecoderConfig(
    vocab_size=61, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24, num_layers=3
)
VARIANTS = [
    *(replace(T5, gated=gated, tied=tied, per_layer_bias=bias)
      for gated, tied, bias in itertools.product((False, True), repeat=3)),
    *(replace(DECODER, tied=tied, qkv_bias=bias)
      for tied, bias in itertools.product((False, True), repeat=2)),
]  # fmt: skip


def shapes_of(config):
    """Path -> shape of every parameter of the model."""
    flat, _ = jax.tree_util.tree_flatten_with_path(model_for(config).abstract_params())
    return {tuple(key.key for key in path): leaf.shape for path, leaf in flat}


def maps_of(config):
    """The leaves in each format that has the family; no tensors are needed but for their ranks."""
    if isinstance(config, DecoderConfig):
        return [hf_decoder.leaves(config)]
    names = [f"{stack}/{stack}/mlp/wo/kernel" for stack in ("encoder", "decoder")]
    scanned = {
        name: Tensor(name, "x", (24, 2, 16), np.dtype(np.float32), np.zeros) for name in names
    }
    torch = hf_t5.leaves(config)
    return [torch, [hf_t5.flax_leaf(leaf) for leaf in torch], t5x.leaves(config, scanned)]


@pytest.mark.parametrize("config", VARIANTS)
def test_leaves_are_the_parameters_of_the_model(config):
    sizes, expected = axis_sizes(config), shapes_of(config)
    for leaves in maps_of(config):
        letters = [(leaf.path, leaf.axes, layer_sizes(leaf, sizes)) for leaf in leaves]
        shapes = {path: tuple(here[a] for a in axes) for path, axes, here in letters}
        assert shapes == expected and len(shapes) == len(leaves)


@pytest.mark.parametrize("config", VARIANTS)
def test_a_piece_has_the_axes_of_its_leaf_and_no_two_pieces_have_one_name(config):
    for leaves in maps_of(config):
        for leaf in leaves:
            for piece in leaf.pieces:
                here = set(piece.axes.replace(" ", ""))
                assert here | {"L"} == set(leaf.axes) | {"L"}
        names = [piece.name for leaf in leaves for piece in leaf.pieces]
        assert len(set(names)) == len(names)
