"""Decoder-only models: PyTorch's values, and the invariants that every way of reading must keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDENS_CAUSAL

from jaxprompt.config.schema import MeshConfig
from jaxprompt.data.batches import Example, make_batch, pack_batch
from jaxprompt.data.virtual_tokens import virtual_ids
from jaxprompt.inference import generate, rank, score
from jaxprompt.inference.engine import make_engine, num_compilations
from jaxprompt.inference.generate import BeamSearch
from jaxprompt.models import registry
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.models.checkpoints.save import save_hf
from jaxprompt.models.injection import Injection
from jaxprompt.models.label_tree import label_trees
from jaxprompt.runtime import parallel
from jaxprompt.training.step import batch_losses

NAMES = sorted(path.name for path in GOLDENS_CAUSAL.iterdir() if path.is_dir())
LOGITS, GRADIENT = 1e-5, 1e-4  # relative errors allowed


@functools.cache
def golden(name):
    with np.load(GOLDENS_CAUSAL / name / "golden.npz") as file:
        return dict(file)


@functools.cache
def backbone(name, unroll=True, attention="causal"):
    return load_backbone(str(GOLDENS_CAUSAL / name), unroll=unroll, attention=attention)


def examples_of(g, virtual=()):
    return [
        Example(np.concatenate([np.array(virtual, np.int32), i[i >= 0]]), t[t >= 0])
        for i, t in zip(g["inputs"], g["targets"], strict=True)
    ]


@functools.partial(jax.jit, static_argnums=2)
def logits_of(params, bank, model, batch):
    injection = model.prepare(params, Injection(bank))
    return model.logits(
        params, injection, batch.inputs, batch.segments, batch.targets,
        batch.target_segments,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=2)
def gradient_of(params, bank, model, batch):
    """Of the cross-entropy summed over the target tokens."""

    def loss(bank):
        scores = jax.nn.log_softmax(logits_of(params, bank, model, batch))
        chosen = jnp.take_along_axis(scores, batch.targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(chosen * batch.weights)

    return jax.grad(loss)(bank)


def relative(found, expected):
    return np.max(np.abs(np.asarray(found) - expected)) / np.max(np.abs(expected))


def compared(found, g, key):
    valid = g["targets"] >= 0
    return relative(np.asarray(found)[:, : valid.shape[1]][valid], g[key][valid])


def with_prompt(b, g):
    """A batch with the prompt in front of every row, its bank, and the config that knows it."""
    virtual = virtual_ids(b.config.vocab_size, len(g["prompt"]))
    examples = examples_of(g, virtual)
    model = registry.with_shared_prefix(b.model, [e.inputs for e in examples], len(virtual))
    return make_batch(examples), jnp.asarray(g["prompt"])[None], model


def test_all_layouts_are_there():
    assert NAMES == ["llama", "llama3", "mistral", "qwen2", "smollm2"]


@pytest.mark.parametrize("unroll", [False, True], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_pytorch(name, unroll):
    b, g = backbone(name, unroll), golden(name)
    found = logits_of(b.params, None, b.model, make_batch(examples_of(g)))
    assert found.dtype == jnp.float32
    assert compared(found, g, "logits") < LOGITS


@pytest.mark.parametrize("shared", [False, True], ids=["in each row", "once for all rows"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradient_with_a_prompt_equal_pytorch(name, shared):
    b, g = backbone(name), golden(name)
    batch, bank, model = with_prompt(b, g)
    assert model.layout.shared_prefix_length == len(g["prompt"])
    model = model if shared else b.model
    found = logits_of(b.params, bank, model, batch)
    assert compared(found, g, "prompt_logits") < LOGITS
    gradient = np.asarray(gradient_of(b.params, bank, model, batch))[0]
    expected = g["prompt_gradient"]
    assert np.linalg.norm(gradient - expected) < GRADIENT * np.linalg.norm(expected)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_pytorch(name):
    b, g = backbone(name), golden(name)
    batch = make_batch(examples_of(g))
    arguments = b.params, Injection(), b.model, batch.inputs, batch.segments
    found = np.asarray(generate.greedy(*arguments, g["generated"].shape[1]))
    expected = np.where(g["generated"] < 0, b.config.pad_id, g["generated"])
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", ["smollm2", "mistral"])
def test_beams_of_a_batch_are_those_of_its_rows(name):
    b, g = backbone(name), golden(name)
    batch = make_batch(examples_of(g))

    def search(rows, beams):
        ids, segments = batch.inputs[rows], batch.segments[rows]
        arguments = b.params, Injection(), b.model, ids, segments
        return np.asarray(generate.beam(*arguments, BeamSearch(6, beams, 0.0)))

    together, count = search(slice(None), 3), len(batch.inputs)
    alone = [search(slice(row, row + 1), 3)[0] for row in range(count)]
    np.testing.assert_array_equal(together, np.stack(alone))
    arguments = b.params, Injection(), b.model, batch.inputs, batch.segments
    np.testing.assert_array_equal(search(slice(None), 1), generate.greedy(*arguments, 6))


@pytest.mark.parametrize("shared", [False, True], ids=["in each row", "once for all rows"])
@pytest.mark.parametrize("attention", ["causal", "prompt", "prefix"])
@pytest.mark.parametrize("name", ["smollm2", "mistral"])
def test_reading_then_answering_equals_one_pass(name, attention, shared):
    """One pass, answers to what was read, and the cached loop give the same logits."""
    b, g = backbone(name, attention=attention), golden(name)
    batch, bank, model = with_prompt(b, g)
    assert (model.layout.shared_prefix_length > 0) == (attention != "prefix")
    model = model if shared else b.model
    whole = logits_of(b.params, bank, model, batch)

    valid = batch.target_segments > 0
    labels = label_trees(np.where(valid, batch.targets, -1))  # those of all rows, for each
    tree = jax.tree.map(lambda x: x[0], labels.trees)

    @jax.jit
    def in_two():
        injection = model.prepare(b.params, Injection(bank))
        prefill = model.prefill(b.params, injection, batch.inputs, batch.segments)
        answered = model.score_tree(b.params, injection, prefill, tree)
        ids, cache = model.init_decode(b.params, injection, prefill, batch.targets.shape[1])
        steps = []
        for index in range(batch.targets.shape[1]):
            scores, cache = model.decode_step(b.params, injection, cache, ids, jnp.int32(index))
            steps.append(scores)
            ids = jnp.asarray(batch.targets)[:, index]
        return answered, jnp.stack(steps, axis=1)

    answered, stepped = in_two()
    answered = np.take_along_axis(np.asarray(answered), labels.nodes[..., None], axis=1)
    for found in (answered, np.asarray(stepped)):
        assert relative(found[valid], np.asarray(whole)[valid]) < LOGITS


def test_attention_over_the_prompt_and_the_input_is_a_choice():
    """Each choice is another function, and "prefix" lets an early token see a later one."""
    g = golden("smollm2")
    found = {}
    for attention in ("causal", "prompt", "prefix"):
        b = backbone("smollm2", attention=attention)
        batch, bank, model = with_prompt(b, g)
        found[attention] = np.asarray(logits_of(b.params, bank, model, batch))
    valid = batch.target_segments > 0
    for one, other in (("causal", "prompt"), ("causal", "prefix"), ("prompt", "prefix")):
        assert relative(found[one][valid], found[other][valid]) > 1e-3


def test_packed_rows_equal_rows_of_their_own():
    b, g = backbone("llama"), golden("llama")
    virtual = virtual_ids(b.config.vocab_size, len(g["prompt"]))
    examples = examples_of(g, virtual)
    bank = jnp.asarray(g["prompt"])[None]
    alone = logits_of(b.params, bank, b.model, make_batch(examples))
    packed = pack_batch([examples])
    found = np.asarray(logits_of(b.params, bank, b.model, packed))[0]
    start = 0
    for row, example in enumerate(examples):
        size = len(example.targets)
        assert relative(found[start : start + size], np.asarray(alone)[row, :size]) < LOGITS
        start += size


def test_a_batch_may_mix_prompts_that_lead_their_rows():
    """K prompts in one batch, each computed once, equal K batches of one prompt."""
    b, g = backbone("qwen2"), golden("qwen2")
    length = len(g["prompt"])
    banks = np.random.default_rng(0).normal(size=(3, length, b.config.d_model)).astype("float32")
    texts = examples_of(g)
    owners = [2, 0, 1]
    rows = [
        Example(np.concatenate([virtual_ids(b.config.vocab_size, length, k), e.inputs]), e.targets)
        for k, e in zip(owners, texts, strict=True)
    ]
    model = registry.with_shared_prefix(b.model, [e.inputs for e in rows], length)
    assert model.layout.shared_prefix_length == length
    mixed = np.asarray(logits_of(b.params, jnp.asarray(banks), model, make_batch(rows)))
    front = virtual_ids(b.config.vocab_size, length)
    for row, (owner, example) in enumerate(zip(owners, texts, strict=True)):
        single = make_batch([example._replace(inputs=np.concatenate([front, example.inputs]))])
        alone = logits_of(b.params, jnp.asarray(banks[owner : owner + 1]), model, single)
        size = len(example.targets)
        assert relative(mixed[row, :size], np.asarray(alone)[0, :size]) < LOGITS


def test_what_leads_is_looked_up_in_the_ids():
    model = backbone("llama").model
    front, other = (virtual_ids(model.config.vocab_size, 4, prompt=k) for k in (0, 1))
    text = np.array([7, 8], np.int32)

    def leading(*inputs):
        return registry.with_shared_prefix(
            model, [np.concatenate(i) for i in inputs], 4
        ).layout.shared_prefix_length

    assert leading((front, text), (other, text)) == 4
    assert leading((front, text), (text, front)) == 0  # not in front
    assert leading((front, text), (front,)) == 0  # no text to answer from
    assert leading((front[1:], other[:1], text)) == 0  # parts of two prompts
    assert leading((front, text, front[:1])) == 0  # and one more vector later
    assert registry.with_shared_prefix(model, [], 4).layout.shared_prefix_length == 0
    prefix = model.with_runtime(attention="prefix")
    assert registry.with_shared_prefix(prefix, [np.concatenate([front, text])], 4) == prefix


def test_which_program_answers_a_row_does_not_depend_on_the_other_rows():
    """Other texts compile nothing new, and a row without text leaves the others as they are."""
    b, g = backbone("llama"), golden("llama")
    front = virtual_ids(b.config.vocab_size, len(g["prompt"]))
    engine = make_engine(b.params, Injection(jnp.asarray(g["prompt"])[None]), b.model)

    def scores(*texts):
        rows = [
            Example(np.concatenate([front, np.array(text, np.int32)]), np.array([5, 2], np.int32))
            for text in texts
        ]
        return score.log_likelihoods(engine, rows, batch_size=2)

    alone = scores([7, 8, 9], [3])
    compiled = num_compilations()
    scores([4, 4], [6, 7, 8, 9])
    assert num_compilations() == compiled
    with_empty = scores([7, 8, 9], [], [3])
    assert num_compilations() == compiled + 1  # the program of rows that do not share a prefix
    np.testing.assert_array_equal(with_empty[[0, 2]], alone)
    scores([8], [4, 5, 6], [])
    np.testing.assert_array_equal(with_empty[1], scores([])[0])
    assert num_compilations() == compiled + 1


def test_labels_are_scored_as_if_each_were_the_target():
    b, g = backbone("smollm2"), golden("smollm2")
    batch, bank, model = with_prompt(b, g)
    labels = np.array([[5, 2, -1], [9, 6, 2], [0, 2, -1]], np.int32)  # 0 is a word here
    injection = model.prepare(b.params, Injection(bank))
    where = b.params, injection, model, batch.inputs, batch.segments
    found = np.asarray(rank.label_log_likelihoods(*where, label_trees(labels)))
    for column, label in enumerate(labels):
        targets = np.tile(np.maximum(label, 0), (len(found), 1))
        segments = np.tile((label >= 0).astype(np.int32), (len(found), 1))
        alone = score.log_likelihood(*where, targets, segments)
        assert np.allclose(found[:, column], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_saved_weights_are_read_back_bit_by_bit(name, tmp_path):
    b = backbone(name, unroll=False)
    save_hf(tmp_path, b.config, b.params)
    again = load_backbone(str(tmp_path))
    assert again.config == b.config
    assert again.fingerprint == b.fingerprint
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), again.params, b.params))


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
def test_lower_precision_stays_near(dtype):
    g = golden("llama")
    b = load_backbone(str(GOLDENS_CAUSAL / "llama"), dtype=dtype, unroll=True)
    batch, bank, model = with_prompt(b, g)
    found = logits_of(b.params, bank, model, batch)
    assert found.dtype == jnp.float32
    assert 1e-5 < compared(found, g, "prompt_logits") < 0.05
    assert np.isfinite(np.asarray(gradient_of(b.params, bank, model, batch))).all()


def test_logical_axes_name_every_axis():
    for name in NAMES:
        model = backbone(name).model
        shapes, axes = model.abstract_params(), model.logical_axes()
        jax.tree.map(lambda s, a: (_ for _ in ()).throw(AssertionError) if len(s.shape) != len(a)
                     else None, shapes, axes, is_leaf=lambda x: isinstance(x, tuple))  # fmt: skip


def test_the_train_objective_is_the_same_whether_the_prompt_is_shared():
    b, g = backbone("smollm2"), golden("smollm2")
    batch, bank, model = with_prompt(b, g)

    @functools.partial(jax.jit, static_argnums=1)
    def objective(bank, model):
        return jax.value_and_grad(
            lambda x: batch_losses(
                b.params, Injection(x), model, batch, num_members=1, z_loss=1e-4
            )[0]
        )(bank)

    (one, grad_one), (other, grad_other) = objective(bank, model), objective(bank, b.model)
    assert np.isclose(one, other, rtol=1e-5)
    assert np.linalg.norm(grad_one - grad_other) < GRADIENT * np.linalg.norm(grad_one)


@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 1, 2), (1, 4, 1), (1, 2, 2)])
def test_sharded_over_devices_it_is_the_same_function(shape):
    """Rows over data and fsdp, heads (not those of keys) and MLP over tensor."""
    mesh = parallel.make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    b, g = backbone("llama"), golden("llama")
    placed = load_backbone(str(GOLDENS_CAUSAL / "llama"), unroll=True, mesh=mesh)
    assert placed.fingerprint == b.fingerprint
    batch, bank, model = with_prompt(b, g)
    batch = jax.tree.map(lambda x: np.concatenate([x, x[:1]]), batch)  # four rows
    alone = np.asarray(gradient_of(b.params, bank, model, batch))
    spread = gradient_of(placed.params, bank, model, parallel.put_batch(batch, mesh))
    assert np.linalg.norm(np.asarray(spread) - alone) < GRADIENT * np.linalg.norm(alone)
