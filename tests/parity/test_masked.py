"""Encoders with a mask: PyTorch's values, labels of several tokens, files that others have."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDENS_MASKED
from safetensors.numpy import load_file, save_file

from jaxprompt.config.errors import UserError
from jaxprompt.data.batches import Example, make_batch
from jaxprompt.data.virtual_tokens import virtual_ids
from jaxprompt.inference.rank import label_log_likelihoods
from jaxprompt.inference.score import log_likelihood
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.models.checkpoints.save import save_hf
from jaxprompt.models.injection import Injection, Prefix
from jaxprompt.models.label_tree import label_holes

NAMES = ["bert", "distilbert", "roberta"]
LOGITS, GRADIENT = 1e-5, 1e-4  # relative errors allowed
layouts = pytest.mark.parametrize("name", NAMES)


@functools.cache
def golden(name):
    with np.load(GOLDENS_MASKED / name / "golden.npz") as file:
        return dict(file)


@functools.cache
def backbone(name):
    return load_backbone(str(GOLDENS_MASKED / name))


def batch_of(g, virtual=()):
    front = np.array(virtual, np.int32)
    rows = [
        Example(np.concatenate([front, i[i >= 0]]), t[t >= 0])
        for i, t in zip(g["inputs"], g["targets"], strict=True)
    ]
    return make_batch(rows, input_length=32, target_length=g["targets"].shape[1])


@functools.partial(jax.jit, static_argnums=2)
def values_of(params, injection, model, batch):
    """The logits of the target tokens, and the gradient of their cross-entropy."""

    def loss(injection):
        logits = model.logits(
            params, injection, batch.inputs, batch.segments, batch.targets, batch.target_segments
        )
        scores = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(scores, batch.targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(chosen * batch.weights), logits

    gradient, logits = jax.grad(loss, has_aux=True)(injection)
    return logits, gradient


def close(found, g, key):
    valid = g["targets"] >= 0
    found, expected = np.asarray(found)[valid], g[key][valid]
    assert np.max(np.abs(found - expected)) < LOGITS * np.max(np.abs(expected)), key


def same_gradient(found, expected):
    assert np.linalg.norm(found[0] - expected) < GRADIENT * np.linalg.norm(expected)


@layouts
def test_logits_and_the_gradient_of_a_prompt_equal_pytorch(name):
    b, g = backbone(name), golden(name)
    logits, gradient = values_of(b.params, Injection(), b.model, batch_of(g))
    close(logits, g, "logits")
    batch = batch_of(g, virtual_ids(b.config.vocab_size, len(g["prompt"])))
    bank = Injection(jnp.asarray(g["prompt"])[None])
    logits, gradient = values_of(b.params, bank, b.model, batch)
    close(logits, g, "prompt_logits")
    same_gradient(np.asarray(gradient.embeddings), g["prompt_gradient"])


@layouts
def test_logits_and_the_gradient_of_a_prefix_equal_pytorch(name):
    b, g = backbone(name), golden(name)
    prefix = Prefix(jnp.asarray(g["key"])[None], jnp.asarray(g["value"])[None])
    layers = {"encoder": {"layers": {"attention": {"prefix": prefix}}}}
    logits, gradient = values_of(b.params, Injection(layers=layers), b.model, batch_of(g))
    close(logits, g, "prefix_logits")
    found = gradient.layers["encoder"]["layers"]["attention"]["prefix"]
    same_gradient(np.asarray(found.key), g["key_gradient"])
    same_gradient(np.asarray(found.value), g["value_gradient"])


def test_labels_together_have_the_likelihoods_of_each_alone():
    b, g = backbone("bert"), golden("bert")
    labels = [[7], [9, 11, 7], [8], [9, 12], [30, 11, 7]]
    padded = np.array([[*ids, *[-1] * (3 - len(ids))] for ids in labels], np.int32)
    batch = batch_of(g)
    together = label_log_likelihoods(
        b.params, Injection(), b.model, batch.inputs, batch.segments, label_holes(padded)
    )
    for number, ids in enumerate(labels):
        targets = np.tile(np.array([*ids, 0, 0], np.int32)[:3], (len(batch.inputs), 1))
        marks = np.tile(np.arange(3) < len(ids), (len(batch.inputs), 1)).astype(np.int32)
        each = log_likelihood(
            b.params, Injection(), b.model, batch.inputs, batch.segments, targets, marks
        )
        np.testing.assert_allclose(together[:, number], each, rtol=1e-5)


def test_a_row_with_several_masks_predicts_all_of_them_in_one_pass():
    b = backbone("roberta")
    model = dataclasses.replace(b.model, mask_each_target=True)
    ids = np.array([[0, 9, 4, 12, 4, 2, 0, 4, 17, 2]], np.int32)
    segments = np.array([[1] * 6 + [2] * 4], np.int32)  # two texts that share a row
    targets = np.array([[5, 6, 7]], np.int32)
    read = jax.jit(functools.partial(model.logits, b.params, Injection()))
    packed = read(ids, segments, targets, targets)
    first = read(ids[:, :6], segments[:, :6], targets[:, :2], targets[:, :2])
    # an input with one mask is read as that of a task
    one = np.ones((1, 1), np.int32)
    alone = jax.jit(functools.partial(b.model.logits, b.params, Injection()))
    second = alone(ids[:, 6:], segments[:, 6:], one, one)
    np.testing.assert_allclose(packed[:, :2], first, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(packed[:, 2:], second, rtol=1e-4, atol=1e-4)


@layouts
def test_a_saved_model_has_the_names_of_the_layout_and_is_read_back(name, tmp_path):
    b = backbone(name)
    save_hf(tmp_path, b.config, b.params)
    again = load_backbone(str(tmp_path))
    assert again.config == b.config and again.fingerprint == b.fingerprint
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == set(load_file(GOLDENS_MASKED / name / "model.safetensors"))


def changed(tmp_path, name, change, **config):
    """A copy of a golden's model with other tensors or keys."""
    folder = tmp_path / "changed"
    shutil.copytree(GOLDENS_MASKED / name, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | config))
    return str(folder)


def test_what_hub_checkpoints_have_beside_the_model_is_left_out(tmp_path):
    def as_on_the_hub(tensors):
        table = tensors["bert.embeddings.word_embeddings.weight"]
        bias = tensors.pop("cls.predictions.bias")
        norm = "bert.embeddings.LayerNorm"
        return tensors | {
            "bert.pooler.dense.weight": np.zeros((24, 24), np.float32),
            "cls.seq_relationship.bias": np.zeros(2, np.float32),
            "bert.embeddings.position_ids": np.arange(40)[None],
            "cls.predictions.decoder.weight": table,
            "cls.predictions.decoder.bias": bias,
            f"{norm}.gamma": tensors.pop(f"{norm}.weight"),
            f"{norm}.beta": tensors.pop(f"{norm}.bias"),
        }

    path = changed(tmp_path, "bert", as_on_the_hub)
    assert load_backbone(path).fingerprint == backbone("bert").fingerprint


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True; only False is supported"),
        ({"num_attention_heads": 5}, "5 heads cannot share a width of 24"),
        ({"hidden_act": "tanh"}, "hidden_act 'tanh' is not supported"),
        ({"max_position_embeddings": 41}, "position_embeddings.weight .* has shape"),
        ({"model_type": "electra"}, "electra"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(config, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        load_backbone(changed(tmp_path, "bert", lambda tensors: tensors, **config))


def test_a_checkpoint_without_a_head_or_without_a_mask_is_refused(tmp_path):
    def headless(tensors):
        return {k: v for k, v in tensors.items() if not k.startswith("cls.")}

    path = changed(tmp_path, "bert", headless)
    with pytest.raises(UserError, match="has no head that predicts a mask"):
        load_backbone(path)
    shutil.rmtree(path)
    path = changed(tmp_path, "bert", lambda tensors: tensors)
    (tmp_path / "changed" / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"no tokenizer beside it has \[MASK\]"):
        load_backbone(path)
    (tmp_path / "changed" / "config.json").write_text(
        json.dumps(json.loads((GOLDENS_MASKED / "bert/config.json").read_text())
                   | {"mask_token_id": 4})
    )  # fmt: skip
    assert load_backbone(path).config.mask_id == 4


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"dropout": 0.1}, "model.dropout is 0.1, and .* is an encoder with a mask"),
        ({"flash": True}, "model.flash is True"),
        ({"attention": "prefix"}, "model.attention is 'prefix'"),
    ],
)
def test_choices_of_other_families_are_refused(choice, sentence):
    with pytest.raises(UserError, match=sentence):
        load_backbone(str(GOLDENS_MASKED / "bert"), **choice)
