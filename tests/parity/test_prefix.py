"""Prefixes of keys and values, against models that are written out and against real words.

One of these models is Hugging Face's T5 in torch, of make_goldens_prefix.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDENS
from method_goldens import FOLDER, backbone

from jaxprompt.config.errors import UserError
from jaxprompt.data.batches import Example, make_batch, pack_batch
from jaxprompt.data.layout import BatchLayout
from jaxprompt.methods.layers import joined, nested
from jaxprompt.models.base import Runtime
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.decoder.decoder import DecoderModel
from jaxprompt.models.injection import Injection, Prefix
from jaxprompt.models.label_tree import label_trees
from jaxprompt.models.t5.t5 import T5Config, T5Model

CONFIG = T5Config(
    vocab_size=24, d_model=12, num_heads=2, head_dim=8, d_ff=16, num_encoder_layers=2,
    num_decoder_layers=2, buckets=8, max_distance=12,
)  # fmt: skip
PLACES = {
    "encoder": ("encoder", "attention"),
    "decoder": ("decoder", "self_attention"),
    "cross": ("decoder", "cross_attention"),
}
LONGEST = 4
LENGTHS = (4, 1, 0)  # of the prefixes of the members


@functools.cache
def t5_params():
    params = jax.jit(T5Model(CONFIG).init_params)(jax.random.key(0))
    # positions matter more than at random, so that a wrong one is seen
    for stack in ("encoder", "decoder"):
        params[stack]["relative_bias"] *= 4
    return params


@functools.cache
def prefixes(depth=2, heads=2, width=8):
    """Keys and values [K, L, P, N, H] for each place."""
    rng = np.random.default_rng(1)
    draw = lambda: jnp.asarray(rng.normal(size=(len(LENGTHS), depth, LONGEST, heads, width)))
    return {place: (draw().astype("float32"), draw().astype("float32")) for place in PLACES}


def injected(trainables):
    """The injection of three members whose prefixes end the places."""
    used = jnp.arange(LONGEST)[None] >= LONGEST - jnp.asarray(LENGTHS)[:, None]
    used = jnp.broadcast_to(used[:, None], (len(LENGTHS), 2, LONGEST))
    tree = {"encoder": {"layers": {}}, "decoder": {"layers": {}}}
    for place, (key, value) in trainables.items():
        stack, module = PLACES[place]
        tree[stack]["layers"][module] = {"prefix": Prefix(key, value, used)}
    return Injection(layers=tree)


def examples(count, target_length):
    rng = np.random.default_rng(2)
    ids = lambda n: rng.integers(2, CONFIG.vocab_size, n).astype(np.int32)
    return [
        Example(ids(length), ids(target_length), member)
        for length, member in zip((5, 7, 3, 6)[:count], (0, 0, 1, 2)[:count], strict=True)
    ]


# A T5 written out for one example, with the keys of the prefix in front of those of the text.


def _norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def _bucket(offset, bidirectional):
    """Section 2.1 of the T5 paper, as mesh-tensorflow computes it, for one offset."""
    count, first = CONFIG.buckets, 0
    if bidirectional:
        count //= 2
        first = count if offset > 0 else 0
        distance = abs(offset)
    else:
        distance = max(-offset, 0)
    exact = count // 2
    if distance < exact:
        return first + distance
    far = math.log(distance / exact) / math.log(CONFIG.max_distance / exact) * (count - exact)
    return first + min(exact + int(far), count - 1)


def _bias(table, queries, keys, bidirectional):
    numbers = np.array([[_bucket(k - q, bidirectional) for k in keys] for q in queries])
    return table[numbers].transpose(2, 0, 1)


def _attend(weights, x, y, prefix, bias, causal=False):
    key = jnp.einsum("sd,dnh->snh", y, weights["key"])
    value = jnp.einsum("sd,dnh->snh", y, weights["value"])
    key, value = (jnp.concatenate([p, z]) for p, z in zip(prefix, (key, value), strict=True))
    logits = jnp.einsum("td,dnh,snh->nts", x, weights["query"], key) + bias
    if causal:
        far = np.arange(len(y))[None] > np.arange(len(x))[:, None]
        hidden = np.concatenate([np.zeros((len(x), len(prefix[0])), bool), far], axis=1)
        logits = jnp.where(hidden, -jnp.inf, logits)
    share = jnp.exp(logits) / jnp.exp(logits).sum(-1, keepdims=True)
    return jnp.einsum("nts,snh,nhd->td", share, value, weights["out"])


def _mlp(weights, x):
    return jax.nn.gelu(x @ weights["wi_0"]) * (x @ weights["wi_1"]) @ weights["wo"]


def written_out(params, trainables, example):
    """Logits [T, V] of one example."""
    size = LENGTHS[example.member]
    prefix = lambda place, layer: [
        x[example.member, layer, LONGEST - size :] for x in trainables[place]
    ]
    layer_of = lambda stack, i: jax.tree.map(lambda x: x[i], params[stack]["layers"])
    table = params["token_embedder"]["embedding"]
    x, before = table[example.inputs], range(-size, 0)
    spots = [*before, *range(len(x))]
    bias = _bias(params["encoder"]["relative_bias"], range(len(x)), spots, True)
    for i in range(2):
        layer = layer_of("encoder", i)
        y = _norm(x, layer["attention_norm"]["scale"])
        x = x + _attend(layer["attention"], y, y, prefix("encoder", i), bias)
        x = x + _mlp(layer["mlp"], _norm(x, layer["mlp_norm"]["scale"]))
    encoded = _norm(x, params["encoder"]["final_norm"]["scale"])
    x = table[np.array([0, *example.targets[:-1]])]
    spots = [*before, *range(len(x))]
    bias = _bias(params["decoder"]["relative_bias"], range(len(x)), spots, False)
    for i in range(2):
        layer = layer_of("decoder", i)
        y = _norm(x, layer["self_attention_norm"]["scale"])
        x = x + _attend(layer["self_attention"], y, y, prefix("decoder", i), bias, causal=True)
        y = _norm(x, layer["cross_attention_norm"]["scale"])
        x = x + _attend(layer["cross_attention"], y, encoded, prefix("cross", i), 0)
        x = x + _mlp(layer["mlp"], _norm(x, layer["mlp_norm"]["scale"]))
    return _norm(x, params["decoder"]["final_norm"]["scale"]) @ params["head"]


def weights_of(target_length):
    shape = (4, target_length, CONFIG.vocab_size)
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


@functools.cache
def expected(target_length):
    """Logits [4, T, V], and the gradient of their weighted sum by keys and values."""
    some, weights = examples(4, target_length), weights_of(target_length)

    @jax.jit
    def run(params, trainables):
        def total(trainables):
            logits = jnp.stack([written_out(params, trainables, e) for e in some])
            return jnp.sum(logits * weights), logits

        return jax.grad(total, has_aux=True)(trainables)

    gradient, logits = run(t5_params(), prefixes())
    return logits, gradient


def _batch(form, target_length):
    """The batch of four examples, and where the targets of each are: its row and first column."""
    some = examples(4, target_length)
    if form == "padded":
        return make_batch(some, target_length=target_length + 1, input_length=16), [
            (i, 0) for i in range(4)
        ]
    rows = [some[:2], some[2:3], some[3:]]
    at = [(0, 0), (0, target_length), (1, 0), (2, 0)]
    if form == "packed":
        return pack_batch(rows, target_length=2 * target_length, input_length=16), at
    answers = [[some[0]], [some[1]], [some[2]], [], [some[3]], []]  # two rows for each row
    inputs = pack_batch(rows, target_length=2 * target_length, input_length=16)
    targets = pack_batch(answers, target_length=target_length, input_length=16)
    batch = targets._replace(inputs=inputs.inputs, segments=inputs.segments)
    return batch, [(0, 0), (1, 0), (2, 0), (4, 0)]


FORMS = {
    # form of the batch, tokens of targets: of fewer than half a head has, none are projected
    "padded": ("padded", 4, {}),
    "padded, few queries": ("padded", 3, {"unroll": True}),
    "rows of several targets": ("packed", 4, {"remat": True}),
    "one example after another": ("each", 4, {"per_example_attention": True}),
    "one example after another, few queries": ("each", 3, {"per_example_attention": True}),
}


@pytest.mark.parametrize("name", FORMS)
def test_logits_and_gradients_are_those_of_keys_in_front_of_the_texts(name):
    form, target_length, settings = FORMS[name]
    batch, places = _batch(form, target_length)
    packed = {"packed_widths": (8, 16), "examples_per_row": 2} if form == "each" else {}
    model = T5Model(CONFIG, Runtime(**settings), BatchLayout(**packed))
    weights = weights_of(target_length)

    @jax.jit
    def run(params, trainables):
        def total(trainables):
            injection = injected(trainables).for_rows(len(batch.inputs), jnp.asarray(batch.member))
            logits = model.logits(params, injection, *batch[:4])
            each = jnp.stack([logits[row, at : at + target_length] for row, at in places])
            return jnp.sum(each * weights), each

        return jax.grad(total, has_aux=True)(trainables)

    gradient, logits = run(t5_params(), prefixes())
    wanted_logits, wanted = expected(target_length)
    np.testing.assert_allclose(
        logits, wanted_logits, rtol=0, atol=2e-5 * np.abs(wanted_logits).max()
    )
    for found, right in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, right, rtol=0, atol=2e-5 * np.abs(right).max())


SETS = ("encoder+decoder+cross", *PLACES)  # the places that have a prefix


def _in_places(trainables):
    """A member for each of ``SETS``; ``trainables`` has the keys and values of each by their names.

    They are not shared, so that each has a gradient of its own.
    """
    members = []
    for places in SETS:
        prefixes = {}
        for place in places.split("+"):
            stack, module = PLACES[place]
            pair = (trainables[f"{places}/{place}/{name}"][None] for name in ("key", "value"))
            prefixes[f"{stack}/layers/{module}/prefix"] = Prefix(*pair)
        members.append(Injection(layers=nested(prefixes)))
    return joined(members)


@pytest.mark.parametrize("name", ["t5_1_0", "t5_1_1"])
def test_logits_and_gradients_are_those_of_keys_that_torch_concatenates(name):
    with np.load(FOLDER / "concatenation" / f"{name}.npz") as file:
        golden = dict(file)
    with np.load(GOLDENS / name / "golden.npz") as file:
        texts = [(i[i > 0], t[t > 0]) for i, t in zip(file["inputs"], file["targets"], strict=True)]
    b, count = backbone(GOLDENS / name), len(texts)
    batch = make_batch([Example(*text, member) for member in range(len(SETS)) for text in texts])
    trainables = {
        f"{places}/{place}/{leaf}": golden[f"{place}/{leaf}"]
        for places in SETS for place in places.split("+") for leaf in ("key", "value")
    }  # fmt: skip

    @jax.jit
    def run(trainables):
        def loss(trainables):
            injection = _in_places(trainables).for_rows(
                len(batch.inputs), jnp.asarray(batch.member)
            )
            logits = b.model.logits(b.params, injection, *batch[:4])
            chosen = jnp.take_along_axis(
                jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1
            )
            return -jnp.sum(chosen[..., 0] * batch.weights), logits

        return jax.grad(loss, has_aux=True)(trainables)

    gradients, logits = run(trainables)
    logits = np.where(batch.weights[..., None] > 0, logits, 0)
    for member, places in enumerate(SETS):
        wanted = golden[f"{places}/logits"]
        found = logits[member * count : (member + 1) * count, : wanted.shape[1]]
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max(), places
    for leaf, found in gradients.items():
        places, place, field = leaf.split("/")
        right = golden[f"{places}/gradient/{place}/{field}"]
        assert np.linalg.norm(found - right) < 1e-4 * np.linalg.norm(right), leaf


def test_decoding_with_a_cache_and_beams_is_teacher_forcing():
    batch, _ = _batch("padded", 4)
    batch, model = jax.tree.map(jnp.asarray, batch), T5Model(CONFIG)
    injection = injected(prefixes()).for_rows(4, batch.member)
    prefill = jax.jit(lambda p, i, *x: model.prefill(p, i, *x))(
        t5_params(), injection, batch.inputs, batch.segments
    )
    _follow(model, t5_params(), injection, prefill, batch.targets[:, :4], expected(4)[0])


def _follow(model, params, injection, prefill, targets, wanted):
    """Check the logits of a cached answer, whose rows are twice there, against ``wanted``."""
    ids, cache = model.init_decode(params, injection, prefill, targets.shape[1] + 1)
    cache, ids = model.tile_cache(cache, 2), jnp.repeat(ids, 2)
    step = jax.jit(model.decode_step)
    scale = np.abs(wanted).max()
    for index in range(targets.shape[1]):
        logits, cache = step(params, injection, cache, ids, jnp.int32(index))
        right = np.repeat(wanted[:, index], 2, axis=0)
        np.testing.assert_allclose(logits, right, rtol=0, atol=2e-5 * scale)
        # beams of a row change places
        cache = model.gather_beams(cache, jnp.arange(len(ids)) ^ 1)
        ids = jnp.repeat(targets[:, index], 2)


def _tree_of(target):
    """A tree with a target among others, and the nodes at which its tokens are predicted."""
    other = target.copy()
    other[1] ^= 1
    trees = label_trees(np.stack([other, target]))
    return jax.tree.map(lambda x: x[0], trees.trees), trees.nodes[1]


def test_a_tree_of_labels_is_teacher_forcing():
    batch, _ = _batch("padded", 4)
    batch, model = jax.tree.map(jnp.asarray, batch), T5Model(CONFIG)
    tree, nodes = _tree_of(examples(4, 4)[1].targets)

    @jax.jit
    def run(params, trainables):
        injection = injected(trainables).for_rows(4, batch.member)
        prefill = model.prefill(params, injection, batch.inputs, batch.segments)
        return model.score_tree(params, injection, prefill, tree)

    wanted = expected(4)[0][1]
    logits = run(t5_params(), prefixes())[1, nodes]
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_words_are_a_prefix_of_the_decoder_and_keys_of_them_one_of_the_others():
    model, params, words = T5Model(CONFIG), t5_params(), np.array([5, 9, 3])
    targets = jnp.asarray([[4, 8, 11, 2]])

    @jax.jit
    def run(params):
        made, one = model.prefix_of_words(params, words), jnp.ones((1, 3), jnp.int32)
        encoded = model.prefill(params, Injection(), words[None], one)
        whole = jnp.concatenate([words[None], targets], axis=1)
        wanted = model.decode(params, Injection(), encoded, whole, jnp.ones_like(whole))[:, 3:]
        own = {"layers": {"self_attention": made["decoder"]["layers"]["self_attention"]}}
        behind = Injection(layers={"decoder": own})
        logits = model.decode(params, behind, encoded, targets, jnp.ones_like(targets))
        return made, encoded.hidden[0], wanted, logits

    made, hidden, wanted, logits = run(params)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    keys = lambda stack, module, i, x: jnp.einsum(
        "sd,dnh->snh", x, params[stack]["layers"][module]["key"][i]
    )
    nothing = [jnp.zeros((0, 2, 8))] * 2
    x, bias = params["token_embedder"]["embedding"][words], params["encoder"]["relative_bias"]
    for i in range(2):
        layer = jax.tree.map(lambda x, i=i: x[i], params["encoder"]["layers"])
        y = _norm(x, layer["attention_norm"]["scale"])
        for (stack, module), inputs in (PLACES["encoder"], y), (PLACES["cross"], hidden):
            right = keys(stack, module, i, inputs)
            key = made[stack]["layers"][module]["prefix"].key[0, i]
            np.testing.assert_allclose(key, right, rtol=0, atol=2e-5 * np.abs(right).max())
        offsets = _bias(bias, range(3), range(3), True)
        x = x + _attend(layer["attention"], y, y, nothing, offsets)
        x = x + _mlp(layer["mlp"], _norm(x, layer["mlp_norm"]["scale"]))


def test_a_prefix_and_flash_kernels_are_refused_in_one_sentence():
    model = T5Model(CONFIG, Runtime(flash="cudnn", dtype="bfloat16"))
    ids = jnp.ones((3, 8), jnp.int32)
    with pytest.raises(UserError, match=r"model.flash is on and prefix.places has encoder"):
        jax.eval_shape(model.prefill, t5_params(), injected(prefixes()), ids, ids)


# Decoder-only models: keys and values of real words are a prefix that is those words.

LLAMA = DecoderConfig(
    vocab_size=24, d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=24, num_layers=2
)
WORDS = np.array([[5, 9, 3], [0, 7, 11]])  # of two members; the second has two
START = np.array([0, 1])


@functools.cache
def llama_params():
    return jax.jit(DecoderModel(LLAMA).init_params)(jax.random.key(0))


@functools.cache
def of_words():
    """The prefixes [K, L, P, G, H] that the frozen model makes of the words of each member."""
    model = DecoderModel(LLAMA)
    keys, values = np.zeros((2, 2, 2, 3, 2, 8), np.float32)
    for member, start in enumerate(START):
        tree = model.prefix_of_words(llama_params(), WORDS[member, start:])
        made = tree["layers"]["attention"]["prefix"]
        keys[member, :, start:], values[member, :, start:] = made.key[0], made.value[0]
    used = np.broadcast_to(np.arange(3) >= START[:, None, None], (2, 2, 3))
    return Prefix(jnp.asarray(keys), jnp.asarray(values), jnp.asarray(used))


def _answered(model, params, injection, batch, tree):
    """Logits of targets by one pass, by a tree of labels, and what decoding needs."""
    injection = model.prepare(params, injection).for_rows(len(batch.inputs), batch.member)
    logits = model.logits(params, injection, *batch[:4])
    prefill = model.prefill(params, injection, batch.inputs, batch.segments)
    return logits, model.score_tree(params, injection, prefill, tree), prefill, injection


@pytest.mark.parametrize(("window", "prompt"), [(None, False), (7, True)])
def test_a_prefix_of_the_keys_of_words_is_those_words_in_front(window, prompt):
    rng = np.random.default_rng(5)
    ids = lambda n: rng.integers(2, 24, n).astype(np.int32)
    texts, targets = [ids(4), ids(6), ids(5)], [ids(4) for _ in range(3)]
    members, vectors = (1, 0, 1), 2 if prompt else 0
    bank = jnp.asarray(rng.normal(size=(2, 2, 16)), jnp.float32) if prompt else None
    plain = DecoderModel(LLAMA).with_config(window=window)
    rows = [np.concatenate([24 + vectors * m + np.arange(vectors), x]).astype(np.int32)
            for m, x in zip(members, texts, strict=True)]  # fmt: skip
    behind = [np.concatenate([WORDS[m, START[m] :], x]).astype(np.int32)
              for m, x in zip(members, rows, strict=True)]  # fmt: skip
    of = lambda inputs: jax.tree.map(jnp.asarray, make_batch(
        [Example(*x) for x in zip(inputs, targets, members, strict=True)],
        input_length=12, target_length=4,
    ))  # fmt: skip
    batch = of(behind)
    wanted = jax.jit(plain.logits)(llama_params(), Injection(bank), *batch[:4])

    model = plain.with_layout(shared_prefix_length=vectors)
    layers = {"layers": {"attention": {"prefix": of_words()}}}
    tree, nodes = _tree_of(targets[0])
    run = jax.jit(functools.partial(_answered, model))
    logits, of_tree, prefill, injection = run(
        llama_params(), Injection(bank, layers), of(rows), tree
    )
    bound = 2e-5 * np.abs(wanted).max()
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=bound)
    np.testing.assert_allclose(of_tree[0, nodes], wanted[0], rtol=0, atol=bound)
    _follow(model, llama_params(), injection, prefill, batch.targets, wanted)


def test_a_decoder_only_prefix_alone_is_like_one_among_others():
    """Without marks of what is used, and without other members."""
    words = of_words()
    alone = Prefix(words.key[:1], words.value[:1])
    model, ids = DecoderModel(LLAMA), jnp.asarray([[4, 8, 9], [7, 2, 3]])

    @jax.jit
    def run(prefix, member):
        injection = Injection(layers={"layers": {"attention": {"prefix": prefix}}})
        injection = injection.for_rows(2, member)
        return model.logits(llama_params(), injection, ids, jnp.ones_like(ids), ids, ids > 0)

    member = jnp.zeros(2, jnp.int32)
    found, right = run(alone, member), run(words, member)
    np.testing.assert_allclose(found, right, rtol=0, atol=2e-5 * np.abs(right).max())
