"""The model against PyTorch: goldens/ was made by scripts/goldens/make_goldens.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDENS

from jaxprompt.data.virtual_tokens import virtual_ids
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.models.injection import Injection

NAMES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
LOGITS, GRADIENT = 1e-5, 1e-4  # relative errors allowed


@functools.cache
def golden(name):
    with np.load(GOLDENS / name / "golden.npz") as file:
        return dict(file)


@functools.cache
def backbone(name, unroll):
    return load_backbone(str(GOLDENS / name), unroll=unroll)


@functools.partial(jax.jit, static_argnums=2)
def logits_of(params, bank, model, inputs, segments, decoder_inputs):
    injection = Injection(bank)
    encoded = model.prefill(params, injection, inputs, segments)
    ones = jnp.ones_like(decoder_inputs)
    return model.decode(params, injection, encoded, decoder_inputs, ones)


@functools.partial(jax.jit, static_argnums=2)
def gradient_of(bank, params, model, inputs, segments, decoder_inputs, targets):
    """Gradient of the cross-entropy summed over the target tokens."""

    def loss(bank):
        logits = logits_of(params, bank, model, inputs, segments, decoder_inputs)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
        return -jnp.sum(chosen[..., 0] * (targets > 0))

    return jax.grad(loss)(bank)


def with_prompt(config, g):
    """Inputs with the prompt's virtual ids in front of every row."""
    ids = virtual_ids(config.vocab_size, g["prompt"].shape[0])
    front = np.broadcast_to(ids, (g["inputs"].shape[0], ids.size))
    inputs = np.concatenate([front, g["inputs"]], axis=1)
    return inputs, np.concatenate([np.ones_like(front), g["mask"]], axis=1)


def relative(found, expected):
    return np.max(np.abs(np.asarray(found) - expected)) / np.max(np.abs(expected))


def test_all_seven_families_are_there():
    assert NAMES == ["byt5", "flan_t5", "mt5", "t5_1_0", "t5_1_1", "t5_lm_adapt", "umt5"]


@pytest.mark.parametrize("unroll", [False, True], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_pytorch(name, unroll):
    b, g = backbone(name, unroll), golden(name)
    found = logits_of(b.params, None, b.model, g["inputs"], g["mask"], g["decoder_inputs"])
    assert found.dtype == jnp.float32
    assert relative(found, g["logits"]) < LOGITS


@pytest.mark.parametrize("unroll", [False, True], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", NAMES)
def test_prompt_gradient_equals_pytorch(name, unroll):
    b, g = backbone(name, unroll), golden(name)
    inputs, segments = with_prompt(b.config, g)
    bank = jnp.asarray(g["prompt"])[None]
    found = logits_of(b.params, bank, b.model, inputs, segments, g["decoder_inputs"])
    assert relative(found, g["prompt_logits"]) < LOGITS
    arguments = b.params, b.model, inputs, segments, g["decoder_inputs"], g["targets"]
    gradient, expected = np.asarray(gradient_of(bank, *arguments))[0], g["prompt_gradient"]
    assert np.linalg.norm(gradient - expected) < GRADIENT * np.linalg.norm(expected)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_pytorch(name):
    """Teacher forcing on the generated ids predicts each next one, up to the end of the row."""
    b, g = backbone(name, False), golden(name)
    before, after = g["generated"][:, :-1], g["generated"][:, 1:]
    logits = logits_of(b.params, None, b.model, g["inputs"], g["mask"], before)
    ended = np.cumsum(before == b.config.eos_id, axis=1) > 0
    assert np.array_equal(np.where(ended, 0, np.argmax(logits, axis=-1)), after)


def test_the_prompt_matters_and_the_heads_are_as_the_hub_has_them():
    for name in NAMES:
        b, g = backbone(name, False), golden(name)
        assert relative(g["prompt_logits"], g["logits"]) > 0.01
        assert ("head" in b.params) == (name != "t5_1_0") == (not b.config.scale_output)
