"""Weights as 8-bit integers: how far off they are, and that nobody else has to know."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import CONFIG, make_backbone
from safetensors.numpy import load_file, save_file

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import MeshConfig
from jaxprompt.models.checkpoints.int8 import quantised
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.models.checkpoints.safetensors import Output
from jaxprompt.models.checkpoints.save import save_hf
from jaxprompt.runtime import parallel


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return load_backbone(str(make_backbone(tmp_path_factory.mktemp("int8") / "plain")))


@pytest.fixture(scope="module")
def folder(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8") / "small"
    save_hf(folder, backbone.config, backbone.params, int8=True)
    return folder


@pytest.fixture(scope="module")
def stored(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def plain(backbone, tmp_path_factory):
    """The same weights unquantised, by their names in the file."""
    folder = tmp_path_factory.mktemp("int8") / "whole"
    save_hf(folder, backbone.config, backbone.params)
    return load_file(folder / "model.safetensors")


def rewrite(folder, to, change):
    to.mkdir()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_text((folder / "config.json").read_text())
    return str(to)


def one(values):
    values = np.asarray(values)
    outputs = quantised(Output("x", values.shape, values.dtype, lambda: values))
    return [(out.name, out.shape, out.dtype, out.values()) for out in outputs]


def test_a_matrix_is_off_by_at_most_half_a_scale():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 30)) * np.geomspace(1e-4, 1e4, 40)[:, None]
    values[3] = 0
    values = values.astype(np.float32)
    (_, shape, dtype, ints), (name, scale_shape, scale_dtype, scale) = one(values)
    assert (shape, dtype, ints.dtype) == ((40, 30), np.int8, np.int8)
    assert (name, scale_shape, scale_dtype) == ("x_scale", (40, 1), np.float32)
    again = ints.astype(np.float32) * scale
    assert (np.abs(again - values) <= scale * (0.5 + 1e-4)).all()
    np.testing.assert_allclose(scale[:, 0] * 127, np.maximum(np.abs(values).max(1), 127 * (
        np.arange(40) == 3)), rtol=1e-6)  # fmt: skip
    assert np.abs(ints).max(axis=1).tolist() == [0 if n == 3 else 127 for n in range(40)]
    assert (again[3] == 0).all()


def test_vectors_are_left_alone():
    values = np.array([1e-9, 3.3, -70000.5], np.float32)
    ((name, shape, dtype, found),) = one(values)
    assert (name, shape, dtype) == ("x", (3,), np.float32)
    np.testing.assert_array_equal(found, values)
    ((_, _, dtype, found),) = one(values.astype(ml_dtypes.bfloat16))
    assert dtype == found.dtype == np.float32


def test_the_file_holds_a_scale_a_row_and_a_quarter_of_the_bytes(stored, plain):
    for name, values in plain.items():
        if values.ndim == 1:
            np.testing.assert_array_equal(stored[name], values)
            assert f"{name}_scale" not in stored
        else:
            assert stored[name].dtype == np.int8 and stored[name].shape == values.shape
            assert stored[f"{name}_scale"].shape == (len(values), 1)
    matrices = [name for name, values in plain.items() if values.ndim == 2]
    assert len(stored) == len(plain) + len(matrices)
    assert sum(stored[n].nbytes for n in matrices) == sum(plain[n].nbytes for n in matrices) / 4


def test_loaded_it_equals_what_a_hand_makes_of_it(backbone, folder, stored, tmp_path):
    by_hand = {
        name: values.astype(np.float32) * stored[f"{name}_scale"] if values.ndim == 2 else values
        for name, values in stored.items()
        if not name.endswith("_scale")
    }
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(by_hand, tmp_path / "model.safetensors")
    found, expected = load_backbone(str(folder)), load_backbone(str(tmp_path))
    assert found.config == expected.config == backbone.config
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, expected.params))
    assert found.fingerprint == expected.fingerprint != backbone.fingerprint
    near = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), found.params, backbone.params
    )
    assert 0 < max(jax.tree.leaves(near)) < 0.5 / 127 + 1e-4


def test_it_loads_as_bfloat16_too(folder):
    full, half = (load_backbone(str(folder), dtype=dtype) for dtype in ("float32", "bfloat16"))
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), full.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, half.params, cast))
    assert half.fingerprint == full.fingerprint


def test_saved_and_loaded_again_it_stays_as_it_is(folder, stored, tmp_path):
    """No second loss: the largest of each row is 127 scales again."""
    b = load_backbone(str(folder))
    save_hf(tmp_path / "cut", b.config, b.params, int8=True, max_shard_bytes=2000)
    shards = sorted((tmp_path / "cut").glob("model-*.safetensors"))
    assert len(shards) > 3
    again = {name: value for shard in shards for name, value in load_file(shard).items()}
    assert again.keys() == stored.keys()
    assert all(np.array_equal(again[n], v) for n, v in stored.items() if v.dtype == np.int8)
    params = load_backbone(str(tmp_path / "cut")).params
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("axis", ["vocab", "heads", "embed", "mlp", "kv", "layers"])
def test_sharded_loading_equals_plain_loading(folder, axis, monkeypatch):
    monkeypatch.setattr(parallel, "RULES", {axis: "tensor"})
    mesh = parallel.make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
    expected, found = load_backbone(str(folder)), load_backbone(str(folder), mesh=mesh)
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, expected.params))
    assert found.fingerprint == expected.fingerprint
    assert len(found.params["head"].devices()) == 2


def test_scales_of_other_types_are_read(folder, tmp_path):
    """As other programs write them."""

    def halve(tensors):
        for name in tensors:
            if name.endswith("_scale"):
                tensors[name] = tensors[name].astype(np.float16)

    found = load_backbone(rewrite(folder, tmp_path / "x", halve))
    near = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), found.params, load_backbone(str(folder)).params
    )
    assert max(jax.tree.leaves(near)) < 0.01


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t, n: t.update({n + "_scale": t[n + "_scale"][:-1].copy()}), "one scale a row is"),
        (lambda t, n: t.update({n + "_scale": t[n + "_scale"][:, 0].copy()}), "one scale a row is"),
        (lambda t, n: t.update({n + "_scale": np.ones((1, 1), np.float32)}), "one scale a row is"),
        (lambda t, n: t.pop(n + "_scale"), "has dtype int8.*quantised checkpoints cannot"),
        (lambda t, n: t.pop(n), "missing .*shared.weight"),
        # scales beside weights that are no integers mean something that is not known here
        (lambda t, n: t.update({n: t[n].astype(np.float32)}), "no place .*shared.weight_scale"),
        (lambda t, n: t.update({n: t[n][:-1].copy(), n + "_scale": t[n + "_scale"][:-1].copy()}),
         "shared.weight .*has shape"),
    ],
)  # fmt: skip
def test_files_that_are_not_like_this(folder, tmp_path, change, words):
    name = rewrite(folder, tmp_path / "x", lambda tensors: change(tensors, "shared.weight"))
    with pytest.raises(UserError, match=words) as error:
        load_backbone(name)
    assert "\n" not in str(error.value) and "model.safetensors" in str(error.value)


def test_a_tied_head_stored_twice_is_one(tmp_path):
    """Copies of the embedding are recognised by their values, scales included."""
    import dataclasses

    tied = dataclasses.replace(CONFIG, tied=True)
    b = load_backbone(str(make_backbone(tmp_path / "plain", config=tied)))
    save_hf(tmp_path / "small", b.config, b.params, int8=True)

    def with_copy(tensors):
        for end in ("weight", "weight_scale"):
            tensors[f"lm_head.{end}"] = tensors[f"shared.{end}"].copy()

    found = load_backbone(rewrite(tmp_path / "small", tmp_path / "copy", with_copy))
    assert found.config.tied
    assert found.fingerprint == load_backbone(str(tmp_path / "small")).fingerprint
    assert json.loads((tmp_path / "small" / "config.json").read_text())["torch_dtype"] == "float32"
