"""Methods against PEFT and AdapterHub: parity/goldens_methods/, of make_goldens_methods.py."""

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
from jaxprompt.methods.artefact import load_prompt, save_adapterhub, save_peft, save_prompt
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.models.injection import some_members
from jaxprompt.models.t5.config import T5Config

LOGITS, GRADIENT = 1e-5, 1e-4  # relative errors allowed
# AdapterHub's own golden has another relative position bias
MOVED = {name: "golden_before.npz" for name in names("adapterhub") if name.startswith("prefix")}
CASES = [
    *(("peft", name, "golden.npz") for name in names("peft")),
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


def test_a_file_is_read_as_what_the_libraries_compute_with():
    """``load_prompt`` of each folder; its injection is the one of the test of logits."""
    for library, name, _ in CASES:
        if name in MOVED:
            continue
        g, task = golden(library, name), 2 if name.startswith("multitask") else 0
        b, where = backbone(g.base), f"{FOLDER / library / name}"
        prompt = load_prompt(f"{where}#{task}" if task else where, b)
        wanted = some_members(injection_of(g, b, g.tensors), np.array([task]))
        ours, theirs = (
            (injection.embeddings, injection.layers) for injection in (prompt.injection, wanted)
        )
        assert jax.tree.structure(ours) == jax.tree.structure(theirs), name
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, err_msg=name)


def same(first, second):
    """Whether two prompts are the same to the bit."""
    trees = [(prompt.vectors, prompt.layers) for prompt in (first, second)]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
    return all(map(np.array_equal, *map(jax.tree.leaves, trees)))


TIED = {"prefix_t5", "prefix_default_t5", "prefix_mlp_t5_gated"}  # PEFT ties layers of a T5
WRITTEN = [
    *(("peft", name) for name in names("peft") if name not in TIED),
    *(("adapterhub", name) for name in names("adapterhub") if name not in MOVED),
]


@pytest.mark.parametrize(("library", "name"), WRITTEN)
def test_what_is_read_and_written_and_read_is_the_same_to_the_bit(library, name, tmp_path):
    where, b = f"{FOLDER / library / name}", backbone(golden(library, name).base)
    prompt = load_prompt(f"{where}#2" if name.startswith("multitask") else where, b)
    save_prompt(tmp_path / "ours", prompt)
    assert same(load_prompt(tmp_path / "ours"), prompt)
    if prompt.metadata.get("method") == "adapter":
        save_adapterhub(tmp_path / "theirs", prompt)
    else:
        save_peft(tmp_path / "theirs", prompt, backbone=b)
    again = load_prompt(tmp_path / "theirs", b)
    if library == "adapterhub" and prompt.metadata.get("method") in ("lora", "ia3"):
        save_adapterhub(tmp_path / "hub", prompt, backbone=b)
        assert same(load_prompt(tmp_path / "hub", b), prompt)
    if name == "seq_bn_few_t5":  # whose stacks have several widths, and now the widest
        assert same_but_for_zeros(again.layers, prompt.layers)
    else:
        assert same(again, prompt)


def same_but_for_zeros(wide, narrow):
    for x, y in zip(*map(jax.tree.leaves, (wide, narrow)), strict=True):
        inside = tuple(slice(0, n) for n in y.shape)
        assert np.array_equal(x[inside], y) and np.sum(x != 0) == np.sum(y != 0)
    return True


@pytest.mark.parametrize("name", MOVED)
def test_what_no_injection_computes_is_refused(name):
    with pytest.raises(UserError):
        load_prompt(FOLDER / "adapterhub" / name)
