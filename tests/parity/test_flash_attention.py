"""Flash kernels, of which no machine without an accelerator has one, as far as it can try them.

Pallas's is interpreted, and lowered for a TPU; what cuDNN's is asked for is computed by XLA.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_backbone
from jax.experimental import pallas as pl

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import MeshConfig
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.models.injection import Injection
from jaxprompt.models.ops.attention import flash_attention
from jaxprompt.models.ops.attention.dense import dense_mask
from jaxprompt.models.ops.attention.flash_attention import FlashMask, flash_mask
from jaxprompt.models.ops.segments import segment_mask
from jaxprompt.runtime import parallel

# lengths of the segments of each row, of 160 positions, which no block of a kernel divides
ALONE = [[160], [70], [1]]
SHARED = [[60, 90], [100], [1, 1, 130]]
ODD = [[51], [13]]
KERNELS = ["cudnn", "pallas"]


@pytest.fixture
def kernels(monkeypatch):
    by_xla = functools.partial(jax.nn.dot_product_attention)
    monkeypatch.setattr(
        jax.nn, "dot_product_attention",
        lambda *args, **given: by_xla(*args, **given | {"implementation": "xla"}),
    )  # fmt: skip
    interpreted = functools.partial(pl.pallas_call, interpret=True)
    monkeypatch.setattr(pl, "pallas_call", interpreted)


def width_of(rows):
    return 51 if rows is ODD else 160


def segments_of(rows):
    filled = [[i for i, n in enumerate(row, 1) for _ in range(n)] for row in rows]
    width = width_of(rows)
    return jnp.array([marks + [0] * (width - len(marks)) for marks in filled])


def inputs_of(rows, dtype="float32"):
    rng, width = np.random.default_rng(0), width_of(rows)
    three = [jnp.asarray(rng.normal(size=(len(rows), width, 2, 8)), dtype) for _ in range(3)]
    return [*three, jnp.asarray(rng.normal(size=(1, 2, width, width)), jnp.float32)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [ALONE, SHARED, ODD], ids=["alone", "shared", "odd"])
def test_values_and_gradients_are_those_of_plain_attention(kernels, rows, dtype, kernel):
    segments, inputs = segments_of(rows), inputs_of(rows, dtype)
    own = (segments > 0)[..., None, None]

    def plain(*args):
        return dense_mask(segment_mask(segments, segments)).attend(*args)

    def flash(*args):
        mask = flash_mask(segments, kernel, packed=rows is SHARED)
        return mask.attend(*args)

    results = []
    weights = jnp.cos(jnp.arange(8.0))
    for form in (plain, flash):
        total = lambda *args, form=form: jnp.sum(form(*args).astype("float32") * weights * own)
        y = form(*inputs)
        assert y.dtype == inputs[0].dtype and np.isfinite(y).all()
        results.append((jnp.where(own, y, 0), *jax.jit(jax.grad(total, (0, 1, 2, 3)))(*inputs)))
    for expected, found in zip(*results, strict=True):
        expected, found = (np.asarray(x, np.float32) for x in (expected, found))
        error = np.abs(expected - found).max()
        assert error < 0.02 * np.abs(expected).max() and (error > 0 or dtype == "bfloat16")


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_encoder_with_it_encodes_the_same(kernels, tmp_path, kernel, monkeypatch):
    b = load_backbone(str(make_backbone(tmp_path)), dtype="mixed")
    segments = segments_of(ALONE)
    ids = jnp.where(segments > 0, jnp.arange(160) % 20 + 3, 0)
    given = b.params, Injection(), ids, segments
    encode = lambda **changed: b.model.with_runtime(**changed).encode(*given)
    used, attend = [], FlashMask.attend
    monkeypatch.setattr(
        FlashMask, "attend",
        lambda mask, *args, **given: used.append(mask.kernel) or attend(mask, *args, **given),
    )  # fmt: skip
    plain = encode()
    assert not used
    flash, own = encode(flash=kernel), segments > 0
    assert {*used} == {kernel}
    assert np.abs(plain - flash)[own].max() < 0.02 * np.abs(plain[own]).max()


def test_rows_of_several_segments_are_never_taken_for_one(kernels):
    segments, inputs = segments_of(SHARED), inputs_of(SHARED)
    mask = flash_mask(segments, "cudnn", packed=False)
    assert np.isnan(mask.attend(*inputs)).all()


def test_the_bias_is_not_repeated_for_every_row_of_a_tpu():
    """What is lowered for it reads one bias [1, N, S, S] whatever B is."""
    segments, inputs = segments_of(ALONE), inputs_of(ALONE)

    def attend(*args):
        mask = flash_mask(segments, "pallas", packed=False)
        return mask.attend(*args).sum()

    traced = jax.jit(jax.grad(attend, (0, 1, 2))).trace(*inputs)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert len(calls) == 3  # forward, and two of the backward pass
    for call in calls:
        arguments = call.rpartition(" : (")[2].partition(") -> ")[0].split(", ")
        assert arguments[0] == "tensor<3x1x2x256x8xbf16>"
        assert arguments[3] == "tensor<1x2x256x256xf32>"


def test_it_is_lowered_where_several_tpus_share_the_rows():
    """Mosaic's kernels can be in no program with an axis that is the compiler's."""
    segments, inputs = segments_of([*ALONE, [7]]), inputs_of([*ALONE, [7]])
    *three, bias = inputs

    def attend(bias, three, segments):
        mask = flash_mask(segments, "pallas", packed=False)
        return jax.grad(lambda x: mask.attend(*x, bias).sum())(three)[0]

    mesh = parallel.make_mesh(MeshConfig(), jax.devices()[:2])
    work = lambda bias, _, rows: attend(bias, *rows)
    spread = jax.jit(parallel.shard_over_batch(work, mesh))
    text = spread.trace(bias, None, (three, segments)).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 3


def settings(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    return flash_attention.kernel


def test_each_accelerator_has_its_kernel(monkeypatch):
    whole, parts = (types.SimpleNamespace(shape={"tensor": n}) for n in (1, 2))
    for backend, name in (("gpu", "cudnn"), ("tpu", "pallas")):
        kernel = settings(backend, monkeypatch)
        assert kernel(True, "mixed", whole) == kernel(True, "bfloat16", None) == name
        assert kernel(False, "float32", parts) == ""
        with pytest.raises(UserError, match="set model.dtype to mixed or bfloat16"):
            kernel(True, "float32", None)
        with pytest.raises(UserError, match=r"mesh.tensor is 2"):
            kernel(True, "mixed", parts)


def test_a_cpu_has_none(tmp_path):
    with pytest.raises(UserError, match="JAX runs on cpu; there are flash kernels for gpu and tpu"):
        load_backbone(str(make_backbone(tmp_path)), dtype="mixed", flash=True)
