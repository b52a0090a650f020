"""Frozen weights in 8 and 4 bits: errors within a step of theirs, the same on any mesh."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDENS, GOLDENS_CAUSAL, assert_same_sums, make_backbone
from helpers_step import P, V, examples, run

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import MeshConfig
from jaxprompt.data.batches import make_batch
from jaxprompt.models.base import Runtime
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.models.injection import Injection
from jaxprompt.models.ops import quantization
from jaxprompt.models.ops.matmul import dense
from jaxprompt.models.t5 import t5
from jaxprompt.models.work import Work
from jaxprompt.runtime import parallel
from jaxprompt.training import plan

CONFIG = t5.T5Config(
    vocab_size=64, d_model=64, num_heads=4, head_dim=32, d_ff=64,
    num_encoder_layers=2, num_decoder_layers=2,
)  # fmt: skip
AXES = {
    "query": ("layers", "embed", "heads", "kv"), "out": ("heads", "kv", "embed"),
    "wo": ("mlp", "embed"), "head": ("embed", "vocab"),
}  # fmt: skip
SHAPE = {"layers": 2, "embed": 64, "heads": 3, "kv": 32, "mlp": 96, "vocab": 50}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_backbone(tmp_path_factory.mktemp("backbone") / "wide", config=CONFIG)


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize(("kind", "steps"), [("int8", 127), ("int4", 7)])
def test_a_number_is_off_by_half_a_step_of_its_own_scale(name, kind, steps):
    axes = AXES[name]
    shape = [SHAPE[axis] for axis in axes]
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    stored = quantization.quantize(jnp.asarray(weight), axes, kind)
    found = np.asarray(quantization.dequantize(stored, jnp.float32))
    inputs = quantization._inputs(axes)
    if kind == "int8":
        largest = np.abs(weight).max(axis=tuple(inputs), keepdims=True)
    else:
        groups = [n for i, n in enumerate(shape) if i < inputs[-1]] + [-1, 32]
        groups += shape[inputs[-1] + 1 :]
        parts = np.abs(weight).reshape(groups).max(axis=inputs[-1] + 1, keepdims=True)
        largest = np.broadcast_to(parts, weight.reshape(groups).shape).reshape(shape)
    assert (np.abs(found - weight) <= largest / steps * 0.501).all()
    size = sum(x.size for x in jax.tree.leaves(stored)[1:]) * 4 + weight.size * (
        quantization.BITS[kind] / 8
    )
    assert size == quantization.bytes_each(kind, axes, tuple(shape)) * weight.size


@pytest.mark.parametrize("kind", quantization.BITS)
@pytest.mark.parametrize("mixed", [False, True])
def test_product_and_gradient_are_those_of_the_dequantised_weight(kind, mixed):
    rng = np.random.default_rng(1)
    weight = jnp.asarray(rng.normal(size=(64, 3, 32)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 5, 64)), jnp.float32)
    stored = quantization.quantize(weight, ("embed", "heads", "kv"), kind)
    plain = quantization.dequantize(stored, jnp.float32)

    runtime = Runtime(dtype="mixed" if mixed else "float32")

    def loss(x, weight):
        return jnp.sum(jnp.sin(dense("bsd,dnh->bsnh", x, weight, runtime)))

    for one, other in zip(
        jax.value_and_grad(loss)(x, stored), jax.value_and_grad(loss)(x, plain), strict=True
    ):
        assert_same_sums(one, other, 64 + 2 * 5 * 3 * 32)


def test_a_products_gradient_has_the_dtype_of_its_input():
    """So it adds up with that of a low-rank term, which reads the same input."""
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)), jnp.float32)
    stored, x = (
        quantization.quantize(weight, ("embed", "mlp"), "int8"),
        jnp.ones((1, 3, 6), "bfloat16"),
    )

    def loss(x):
        return dense("bsd,df->bsf", x, stored, Runtime(dtype="mixed")).sum() + (x * x).sum()

    plain = quantization.dequantize(stored, jnp.bfloat16).astype(np.float32)
    gradient = jax.grad(loss)(x)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient[0, 0].astype(np.float32), plain.sum(1) + 2, rtol=0.02)


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [("int8", (2, 2, 1)), ("int8", (1, 2, 2)), ("int4", (2, 1, 2)), ("nf4", (2, 1, 1))],
)
def test_a_backbone_in_few_bits_is_recognised_and_the_same_on_any_mesh(folder, kind, mesh):
    plain, small = load_backbone(str(folder)), load_backbone(str(folder), quantization=kind)
    placed = load_backbone(str(folder), quantization=kind, mesh=mesh_of(*mesh))
    assert plain.fingerprint == small.fingerprint == placed.fingerprint
    layer = small.params["encoder"]["layers"]["attention"]
    assert not any(isinstance(leaf, jax.Array) for leaf in layer.values())
    assert quantization.count(small.params) == quantization.count(plain.params)
    rows = [e._replace(inputs=np.where(e.inputs >= V, e.inputs + 64 - V, e.inputs))
            for e in examples(8)]  # fmt: skip
    start = np.random.default_rng(2).normal(size=(1, P, 64)).astype(np.float32)
    batches = [[make_batch(rows)]] * 2
    alone, losses = run((small.model, small.params), batches, start)
    spread, _ = run(
        (placed.model, placed.params), batches, start, mesh=placed.mesh,
        put=lambda batch: parallel.put_batch(batch, placed.mesh),
    )  # fmt: skip
    # two steps through four layers of width 64, forward and backward
    assert_same_sums(spread.trainables["prompt"], alone.trainables["prompt"], 64 * 4 * 2 * 2)
    exact, other = run((plain.model, plain.params), batches, start)
    assert 0 < abs(float(losses.loss[0] - other.loss[0])) < 0.3


def test_decoder_only_models_are_stored_so_too():
    ids = np.arange(5, 13, dtype=np.int32)[None]
    one, found = np.ones_like(ids), []
    for weights in (None, "int8"):
        b = load_backbone(str(GOLDENS_CAUSAL / "llama"), quantization=weights)
        injection = b.model.prepare(b.params, Injection())
        found.append(b.model.logits(b.params, injection, ids, one, ids[:, :3], one[:, :3]))
    error = np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0])
    assert 0 < error < 0.05


def mesh_of(data, fsdp, tensor):
    devices = jax.devices()[: data * fsdp * tensor]
    return parallel.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"quantization": "int3"},
            "quantization 'int3' is not supported, use one of int8, int4, nf4",
        ),
        ({"quantization": "int8", "trainable": True}, "the weights are to be trained"),
        ({"quantization": "int4", "mesh": (1, 2, 1)}, "groups of 32 mesh.fsdp, 2, would cut"),
    ],
)
def test_what_cannot_be_stored_so_is_told(folder, settings, words):
    if "mesh" in settings:
        settings = settings | {"mesh": mesh_of(*settings["mesh"])}
    with pytest.raises(UserError, match=words):
        load_backbone(str(folder), **settings)


def test_without_qwix_a_sentence_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"pip install 'jaxprompt\[small\]'"):
        load_backbone(str(folder), quantization="int8")


@pytest.mark.parametrize("kind", quantization.BITS)
def test_plan_counts_their_bytes(folder, kind):
    model = load_backbone(str(folder)).model
    parts, _ = plan.needs(model, Work(2, 1, 8, 4), plan.Layout(1, 1, 1, False), kind)
    params = load_backbone(str(folder), quantization=kind).params
    leaves = jax.tree.leaves(params, is_leaf=lambda x: not isinstance(x, dict))
    plain = sum(x.nbytes for x in leaves if isinstance(x, jax.Array))
    small = [x for x in leaves if not isinstance(x, jax.Array)]
    bits = quantization.BITS[kind]
    assert parts["weights"] == plain + sum(
        x.qvalue.size * bits // 8 + x.scale.nbytes for x in small
    )


@pytest.mark.parametrize("spread", [False, True])
def test_bits_are_the_same_memory_and_the_same_products(spread):
    mesh = parallel.make_mesh(MeshConfig(data=2), jax.devices()[:2])
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8)), jnp.bfloat16)
    if spread:
        weight = jax.device_put(weight, parallel.replicated(mesh))
    own = {"wi": weight, "scale": weight[0]}
    params = {"encoder": {"layers": own}, "head": weight}
    found = quantization.view_as_uint16(params)
    bits = found["encoder"]["layers"]["wi"]
    assert bits.dtype == jnp.uint16 and found["head"] is weight and bits.sharding == weight.sharding
    assert found["encoder"]["layers"]["scale"] is params["encoder"]["layers"]["scale"]
    where = lambda x: [s.data.unsafe_buffer_pointer() for s in x.addressable_shards]
    assert where(bits) == where(weight)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 6)), jnp.float32)
    for runtime in (Runtime(), Runtime(dtype="mixed")):
        product = lambda x, w, runtime=runtime: dense("bsd,df->bsf", x, w[1], runtime)
        of = lambda w, product=product: jax.value_and_grad(lambda x: (product(x, w) ** 2).sum())(x)
        jax.tree.map(np.testing.assert_array_equal, of(weight), of(bits))


@pytest.mark.parametrize("name", ["umt5", "llama"])
@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
def test_a_model_in_bits_is_that_model(name, dtype):
    """Norms, biases and all: the same logits, to the bit."""
    folder = GOLDENS_CAUSAL if name == "llama" else GOLDENS
    b = load_backbone(str(folder / name), dtype=dtype)
    bits = quantization.view_as_uint16(b.params)
    found = {str(x.dtype) for x in jax.tree.leaves(bits["encoder" if name == "umt5" else "layers"])}
    assert "uint16" in found and len(found) > 1
    ids = jnp.arange(1, 13).reshape(2, 6)
    ones, targets = jnp.ones_like(ids), ids[:, :3]

    def logits(params):
        injection = b.model.prepare(params, Injection())
        return b.model.logits(params, injection, ids, ones, targets, jnp.ones_like(targets))

    np.testing.assert_array_equal(logits(bits), logits(b.params))
