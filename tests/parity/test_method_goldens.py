"""Methods against PEFT and AdapterHub: parity/goldens_methods/, of make_goldens_methods.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_goldens import (
    FOLDER,
    MethodGolden,
    backbone,
    golden,
    injection_of,
    names,
    peft_network,
)

from jaxprompt.config.errors import UserError
from jaxprompt.data.batches import Batch, Example, make_batch
from jaxprompt.data.virtual_tokens import virtual_ids
from jaxprompt.methods.adapterhub import adapterhub_layers, read_adapterhub
from jaxprompt.methods.peft import peft_layers, read_peft
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.models.injection import Adapter
from jaxprompt.models.t5.config import T5Config

LOGITS, GRADIENT = 1e-5, 1e-4  # relative errors allowed
REFUSED = {"dora_t5_gated"}
READ = {"peft": (read_peft, peft_layers), "adapterhub": (read_adapterhub, adapterhub_layers)}
# AdapterHub's own golden has another relative position bias
MOVED = {name: "golden_before.npz" for name in names("adapterhub") if name.startswith("prefix")}
CASES = [
    *(("peft", name, "golden.npz") for name in names("peft") if name not in REFUSED),
    *(("adapterhub", name, MOVED.get(name, "golden.npz")) for name in names("adapterhub")),
]


def batch_of(g: MethodGolden, b: Backbone, prompt: int) -> Batch:
    """The inputs and targets of the base model's golden, each row behind its own prompt."""
    with np.load(g.base / "golden.npz") as file:
        inputs, targets = file["inputs"], file["targets"]
    first = 1 if isinstance(b.config, T5Config) else 0  # of the ids that are no padding
    tasks = g.values.get("task_ids", np.zeros(len(inputs), int))
    return make_batch(
        [
            Example(
                np.concatenate([virtual_ids(b.config.vocab_size, prompt, task), i[i >= first]]),
                t[t >= first],
            )
            for i, t, task in zip(inputs, targets, tasks, strict=True)
        ]
    )


def computed(g: MethodGolden, tensors: dict[str, np.ndarray]):
    """Logits of the target tokens, and gradients of the loss summed over them."""
    b = backbone(g.base)
    prompt = jax.eval_shape(lambda tensors: injection_of(g, b, tensors).embeddings, tensors)
    batch = batch_of(g, b, 0 if prompt is None else prompt.shape[1])

    def loss(tensors):
        injection = b.model.prepare(b.params, injection_of(g, b, tensors))
        logits = b.model.logits(
            b.params, injection, batch.inputs, batch.segments, batch.targets, batch.target_segments
        )
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)
        return -jnp.sum(chosen[..., 0] * batch.weights), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(tensors)
    width = g.values["logits"].shape[1]
    return np.where(batch.weights[..., None] > 0, logits, 0)[:, :width], gradients


def relative(ours, expected):
    return np.max(np.abs(np.asarray(ours) - expected)) / np.max(np.abs(expected))


def worst(ours, expected):
    """The largest relative error of a tensor's gradient."""
    assert set(ours) == set(expected)
    floor = 1e-4 * max(np.linalg.norm(g) for g in expected.values())
    return max(
        np.linalg.norm(np.asarray(ours[name]) - expected[name])
        / (np.linalg.norm(expected[name]) + floor)
        for name in expected
    )


def used(g: MethodGolden, names):
    """The tensors of the file that were trained; AdapterHub's has copies of some."""
    return {name: tensor for name, tensor in g.tensors.items() if name in names}


@pytest.mark.parametrize(("library", "name", "values"), CASES)
def test_logits_and_gradients_equal_the_librarys(library, name, values):
    g = golden(library, name, values)
    expected, trained = g.group("gradient"), g.group("value")
    tensors = used(g, expected)
    logits, gradients = computed(g, tensors)
    assert relative(logits, g.values["logits"]) < LOGITS
    assert worst(gradients, {name: expected[name] for name in tensors}) < GRADIENT
    if trained:
        prompts, pull = jax.vjp(lambda values: peft_network(g.config, values), trained)
        assert relative(prompts, g.tensors["prompt_embeddings"]) < LOGITS
        (through,) = pull(gradients["prompt_embeddings"])
        assert worst(through, {name: expected[name] for name in trained}) < GRADIENT


@pytest.mark.parametrize("name", MOVED)
def test_adapterhub_takes_keys_of_the_text_for_later_ones_beside_a_prefix(name):
    as_it_is, before = golden("adapterhub", name), golden("adapterhub", name, MOVED[name])
    assert relative(as_it_is.values["logits"], before.values["logits"]) > 0.01


def test_every_adapter_changes_what_its_base_model_computes():
    for library, name, values in CASES:
        g = golden(library, name, values)
        with np.load(g.base / "golden.npz") as file:
            frozen = np.where(g.values["logits"] == 0, 0, file["logits"])
        assert relative(g.values["logits"], frozen) > 0.01
        assert all(np.any(gradient) for gradient in g.group("gradient").values())


def with_scale_in_weights(adapter):
    if not isinstance(adapter, Adapter):
        return adapter
    up, bias = adapter.scale * adapter.up, adapter.scale * adapter.up_bias
    return dataclasses.replace(adapter, up=up, up_bias=bias, scale=1.0)


@pytest.mark.parametrize(("library", "name"), [c[:2] for c in CASES if c[1] not in MOVED])
def test_each_file_is_read_as_the_injection_that_computes_the_same(library, name):
    read, layers_of = READ[library]
    task = {"task": 2} if name.startswith("multitask") else {}
    g, adapter = golden(library, name), read(FOLDER / library / name, **task)
    b = backbone(g.base)
    expected = injection_of(g, b, g.tensors)
    if expected.embeddings is not None:
        np.testing.assert_allclose(adapter.vectors, expected.embeddings[task.get("task", 0)], 1e-6)
        return
    of_member = jax.tree.map(lambda leaf: leaf[0], expected.layers)
    layers, of_member = (
        jax.tree.map(with_scale_in_weights, tree, is_leaf=lambda node: isinstance(node, Adapter))
        for tree in (layers_of(adapter.adapter_file, b), of_member)
    )
    assert jax.tree.structure(layers) == jax.tree.structure(of_member)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-6), layers, of_member)


@pytest.mark.parametrize(
    ("library", "name"), [("peft", "dora_t5_gated"), *(("adapterhub", name) for name in MOVED)]
)
def test_what_no_injection_computes_is_refused(library, name):
    with pytest.raises(UserError):
        READ[library][0](FOLDER / library / name)
