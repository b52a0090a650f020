"""Loading and saving backbones: formats agree, slices equal wholes, mistakes are one sentence."""

import contextlib
import dataclasses
import json
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDENS
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.numpy import load_file, save_file

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import MeshConfig
from jaxprompt.models.checkpoints import fingerprint as fingerprints
from jaxprompt.models.checkpoints import hf_t5, hub
from jaxprompt.models.checkpoints.fingerprint import fingerprint
from jaxprompt.models.checkpoints.leaf import DTYPES, Leaf, Piece, Tensor, fill, finite
from jaxprompt.models.checkpoints.load import load_backbone, same_model
from jaxprompt.models.checkpoints.metadata import damage_as_user_error
from jaxprompt.models.checkpoints.save import save_hf
from jaxprompt.models.injection import Injection
from jaxprompt.models.t5 import t5
from jaxprompt.runtime import parallel

NAMES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
CONFIG = json.loads((GOLDENS / "t5_1_1" / "config.json").read_text())


def copy(name, directory, *, weights="model.safetensors", **config):
    """A golden's config (with changes) and weights in a directory of their own."""
    directory.mkdir(exist_ok=True)
    raw = json.loads((GOLDENS / name / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, **config}))
    shutil.copy(GOLDENS / name / weights, directory / weights)
    return directory


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found, expected)))


@pytest.mark.parametrize("name", NAMES)
def test_the_tree_is_the_models(name):
    for dtype in ("float32", "bfloat16"):
        b = load_backbone(str(GOLDENS / name), dtype=dtype, dropout=0.1, unroll=True, remat=True)
        expected = t5.abstract_params(b.config, dtype)
        assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), b.params) == expected
        assert (b.model.runtime.dtype, b.model.runtime.dropout) == (dtype, 0.1)
        assert b.model.runtime.unroll and b.model.runtime.remat
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(b.params))


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_agree_and_share_a_fingerprint(name):
    full = load_backbone(str(GOLDENS / name))
    half = load_backbone(str(GOLDENS / name), dtype="bfloat16")
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), full.params)
    assert_same(half.params, cast)
    assert half.fingerprint == full.fingerprint == fingerprint(jax.device_get(full.params))
    trained = load_backbone(str(GOLDENS / name), dtype="mixed", trainable=True)
    assert_same(trained.params, full.params)
    assert trained.model.runtime.dtype == "mixed" and trained.model.runtime.activations == "float32"


@pytest.mark.parametrize("name", [NAMES[0], NAMES[-1]])
def test_frozen_operands_are_rounded_once_where_they_would_be_at_every_use(name):
    trained, frozen = (
        load_backbone(str(GOLDENS / name), dtype="mixed", trainable=trainable)
        for trainable in (True, False)
    )
    assert frozen.fingerprint == trained.fingerprint
    kinds = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(frozen.params):
        kinds.setdefault(path[-1].key, str(leaf.dtype))
    assert kinds["embedding"] == kinds["scale"] == kinds["relative_bias"] == "float32"
    assert kinds["query"] == kinds["wo"] == "bfloat16"
    ids = jnp.arange(3, 9).reshape(2, 3)
    one = jnp.ones_like(ids)
    given = Injection(), ids, one, ids, one
    a, b = (jax.jit(x.model.logits)(x.params, *given) for x in (trained, frozen))
    np.testing.assert_array_equal(a, b)


def test_formats_agree(tmp_path):
    for name, weights in (
        ("t5_1_0", "flax_model.msgpack"),
        ("t5_lm_adapt", "pytorch_model.bin"),
    ):
        found = load_backbone(str(copy(name, tmp_path / name, weights=weights)))
        expected = load_backbone(str(GOLDENS / name))
        assert found.config == expected.config
        assert_same(found.params, expected.params)
        assert found.fingerprint == expected.fingerprint


def test_fingerprints_tell_backbones_apart():
    params = load_backbone(str(GOLDENS / "t5_1_1")).params
    seen = {load_backbone(str(GOLDENS / name)).fingerprint for name in NAMES}
    assert len(seen) == len(NAMES) and all(len(f) == 16 for f in seen)
    changed = {**params, "head": params["head"].at[0, 0].add(1.0)}
    assert fingerprint(changed) != fingerprint(params)


def test_the_fingerprint_is_taken_on_the_device_where_that_is_not_the_host(monkeypatch):
    b = load_backbone(str(GOLDENS / "umt5"))
    monkeypatch.setattr(fingerprints, "_on_host", lambda leaf: False)
    assert fingerprint(b.params) == b.fingerprint


def test_the_smallest_numbers_count_wherever_the_fingerprint_is_taken(tmp_path, monkeypatch):
    """Devices take them for 0 when they compute; the fingerprint is that of the host."""

    def change(tensors):
        tensors["shared.weight"][0, :6] = [1e-39, -1e-40, 1e-45, 9e-39, 2e-39, -3e-41]

    directory = rewrite(copy("t5_1_1", tmp_path / "x"), change)
    expected = load_backbone(directory).fingerprint
    assert expected != load_backbone(str(GOLDENS / "t5_1_1")).fingerprint
    assert (
        load_backbone(
            directory, mesh=parallel.make_mesh(MeshConfig(fsdp=len(jax.devices())))
        ).fingerprint
        == expected
    )
    monkeypatch.setattr(fingerprints, "_on_host", lambda leaf: False)
    for dtype in ("float32", "bfloat16", "mixed"):
        assert load_backbone(directory, dtype=dtype).fingerprint == expected


def test_copies_of_a_model_in_other_dtypes_are_the_same_model(tmp_path):
    """A fingerprint recorded for one copy is accepted for the other, in both directions."""
    copies = {}
    for dtype in (*DTYPES.values(), None):
        name = dtype.name if dtype else "other"

        def change(tensors, dtype=dtype):
            for key, value in tensors.items():
                tensors[key] = value.astype(dtype) if dtype else value * 1.01

        copies[name] = load_backbone(rewrite(copy("t5_1_1", tmp_path / name), change))
    other = copies.pop("other")
    exact = {copies[name].fingerprint for name in ("float64", "float32", "bfloat16")}
    assert len(exact) == 1 and copies["float16"].fingerprint not in exact

    def record(b):
        return {"fingerprint": b.fingerprint, "fingerprint_float16": b.float16}

    for a in ("float64", "float32", "float16"):
        for b in ("float64", "float32", "float16"):
            assert same_model(copies[a], record(copies[b]))
        assert not same_model(other, record(copies[a]))
        assert not same_model(copies[a], record(other))
    old = {"fingerprint": copies["float32"].fingerprint}  # of a prompt without the second one
    assert same_model(copies["float32"], old) and not same_model(other, old)
    assert not same_model(copies["float32"], {})


def mesh():
    devices = jax.devices()
    size = 2 if len(devices) > 1 else 1
    return parallel.make_mesh(MeshConfig(data=1, tensor=size), devices=devices[:size])


@pytest.mark.parametrize("axis", ["vocab", "heads", "embed", "mlp", "kv", "layers"])
def test_sharded_loading_equals_plain_loading(axis, monkeypatch):
    """Whatever axis is cut, merged with another in the file or not."""
    expected = load_backbone(str(GOLDENS / "t5_lm_adapt"))
    sizes = dict(vocab=96, heads=2, embed=24, mlp=32, kv=5, layers=3)
    monkeypatch.setattr(parallel, "RULES", {axis: "tensor"} if sizes[axis] % 2 == 0 else {})
    found = load_backbone(str(GOLDENS / "t5_lm_adapt"), mesh=mesh())
    assert_same(found.params, expected.params)
    assert found.fingerprint == expected.fingerprint
    assert len(found.params["head"].devices()) == mesh().size


@pytest.mark.parametrize("file_axes", ["NH D", "D NH", "D N H", "H D N", "HDN", "DNH"])
def test_any_slice_of_a_leaf_equals_the_slice_of_the_whole(file_axes):
    rng = np.random.default_rng(0)
    sizes = {"D": 4, "N": 3, "H": 5, "encoder": 3}
    letters = file_axes.replace(" ", "")
    leaf = Leaf(("encoder", "x"), "LDNH", tuple(Piece(f"t{i}", file_axes) for i in range(3)))
    whole, tensors, read_sizes = np.empty((3, 4, 3, 5), np.float32), {}, []
    for i in range(3):
        value = rng.normal(size=[sizes[a] for a in letters]).astype(np.float32)
        whole[i] = value.transpose([letters.index(a) for a in "DNH"])
        flat = value.reshape([np.prod([sizes[a] for a in g]) for g in file_axes.split()])

        def read(index, flat=flat):
            read_sizes.append(flat[index].size)
            return flat[index]

        tensors[f"t{i}"] = Tensor(f"t{i}", "file", flat.shape, flat.dtype, read)
    for _ in range(50):
        bounds = [sorted(rng.integers(0, n + 1, 2)) for n in whole.shape]
        index = tuple(slice(int(a), int(b)) for a, b in bounds)
        out = np.empty_like(whole[index])
        read_sizes.clear()
        fill(leaf, tensors, sizes, index, out)
        assert np.array_equal(out, whole[index])
        assert len(read_sizes) == index[0].stop - index[0].start  # layers outside are never opened


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_again(name, tmp_path):
    b = load_backbone(str(GOLDENS / name))
    save_hf(tmp_path / "whole", b.config, b.params)
    save_hf(tmp_path / "cut", b.config, b.params, max_shard_bytes=20_000)
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) > 2
    for form in ("whole", "cut"):
        again = load_backbone(str(tmp_path / form))
        assert again.config == b.config
        assert_same(again.params, b.params)
    original = load_file(GOLDENS / name / "model.safetensors")
    saved = load_file(tmp_path / "whole" / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(np.array_equal(saved[key], original[key]) for key in saved)
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {"config.json", "model.safetensors"}


def test_bfloat16_is_saved_as_bfloat16(tmp_path):
    b = load_backbone(str(GOLDENS / "umt5"), dtype="bfloat16")
    save_hf(tmp_path, b.config, b.params)
    again = load_backbone(str(tmp_path), dtype="bfloat16")
    assert_same(again.params, b.params)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "changes, scaled",
    [
        ({"model_type": "t5"}, True),  # T5 1.0 says nothing
        ({"model_type": "t5", "tie_word_embeddings": True}, True),
        ({"model_type": "t5", "tie_word_embeddings": False}, False),
        # what transformers 5 writes for T5 1.1 and 1.0
        ({"model_type": "t5", "tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ({"model_type": "t5", "tie_word_embeddings": True, "scale_decoder_outputs": True}, True),
        ({"model_type": "mt5", "tie_word_embeddings": False}, False),
        ({"model_type": "mt5", "tie_word_embeddings": True}, False),  # as transformers 5 saves it
        ({"model_type": "umt5", "tie_word_embeddings": False}, False),
    ],
)
def test_when_the_output_is_scaled(changes, scaled, tmp_path):
    raw = {key: value for key, value in CONFIG.items() if key != "tie_word_embeddings"}
    (tmp_path / "config.json").write_text(json.dumps({**raw, **changes}))
    for tied in (False, True):
        config = hf_t5.config_from_json(tmp_path / "config.json", tied=tied)
        assert (config.scale_output, config.tied) == (scaled, tied)
        assert config.per_layer_bias == (changes["model_type"] == "umt5")


@pytest.mark.parametrize(
    "projection, expected",
    [
        (None, (False, "relu")),
        ("relu", (False, "relu")),
        ("gated-gelu", (True, "gelu")),
        ("gated-gelu_new", (True, "gelu")),
        ("gated-silu", (True, "silu")),
        ("gated-relu", (True, "relu")),
    ],
)
def test_feed_forward_projections(projection, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "feed_forward_proj": projection}))
    config = hf_t5.config_from_json(tmp_path / "config.json", tied=False)
    assert (config.gated, config.activation) == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "bart"}, "model_type 'bart' is not supported, only t5, mt5, umt5"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"feed_forward_proj": "gelu"}, "feed_forward_proj 'gelu' is not supported"),
        ({"d_model": "16"}, "d_model is '16', expected a whole number"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"d_ff": 33}, r"wi_0.* has shape \(32, 16\), the config expects \(33, 16\)"),
        ({"num_layers": 4}, "of .* tensors are missing .encoder.block.3"),
        ({"num_layers": 2}, "tensors have no place .*encoder.block.2"),
        ({"model_type": "umt5"}, "missing .encoder.block.1.*relative_attention_bias"),
        ({"vocab_size": 100}, r"shared.weight .*has shape \(96, 16\), .* expects \(100, 16\)"),
    ],
)
def test_a_config_that_does_not_fit(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_backbone(str(copy("t5_1_1", tmp_path / "x", **changes)))


def rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return str(directory)


def test_copies_of_the_embedding_are_dropped(tmp_path):
    def with_copies(tensors):
        for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
            tensors[f"{name}.weight"] = tensors["shared.weight"].copy()

    def renamed(tensors):
        tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")

    expected = load_backbone(str(GOLDENS / "t5_1_0"))
    for i, change in enumerate((with_copies, renamed)):
        found = load_backbone(rewrite(copy("t5_1_0", tmp_path / str(i)), change))
        assert found.config.tied and found.fingerprint == expected.fingerprint


def test_a_head_of_its_own_unties_whatever_the_config_says(tmp_path):
    b = load_backbone(str(copy("t5_1_1", tmp_path / "x", tie_word_embeddings=True)))
    assert not b.config.tied and b.config.scale_output


def test_tensors_that_are_missing_unknown_or_quantised(tmp_path):
    norm = "decoder.final_layer_norm.weight"
    for change, message in (
        (lambda t: t.pop(norm), f"1 of 61 tensors are missing .{norm}"),
        (lambda t: t.update(extra=t[norm]), "1 tensors have no place .*extra"),
        (lambda t: t.update({norm: t[norm].astype(np.int8)}), f"{norm} has dtype int8"),
    ):
        with pytest.raises(UserError, match=message):
            load_backbone(rewrite(copy("t5_1_1", tmp_path / "x"), change))


@pytest.mark.parametrize(
    "name, weights",
    [
        ("t5_1_1", "model.safetensors"),
        ("t5_1_0", "flax_model.msgpack"),
        ("t5_lm_adapt", "pytorch_model.bin"),
    ],
)
def test_truncated_files_are_one_sentence(name, weights, tmp_path):
    directory = copy(name, tmp_path / "x", weights=weights)
    raw = (directory / weights).read_bytes()
    for length in (1, 7, 8, 100, 5000, len(raw) // 2, len(raw) - 1):
        (directory / weights).write_bytes(raw[:length])
        with pytest.raises(UserError, match=f"{weights} is (truncated|damaged)") as error:
            load_backbone(str(directory))
        assert "\n" not in str(error.value)


def test_damaged_safetensors_headers(tmp_path):
    directory = copy("t5_1_1", tmp_path / "x")
    path = directory / "model.safetensors"
    for header in (
        b"not json",
        b"[1]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [99], "data_offsets": [0, 396]}}',
    ):
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
        with pytest.raises(UserError, match="model.safetensors is truncated or not a safetensors"):
            load_backbone(str(directory))
    header = b'{"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(UserError, match="dtype F8_E4M3; weights must be one of"):
        load_backbone(str(directory))


def test_indexes_that_lie(tmp_path):
    b = load_backbone(str(GOLDENS / "t5_1_1"))
    save_hf(tmp_path, b.config, b.params, max_shard_bytes=20_000)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for change, message in (
        ({"weight_map": {**good["weight_map"], "shared.weight": "../x"}}, "names '../x'"),
        (
            {"weight_map": {**good["weight_map"], "ghost": "model-00001-of-00004.safetensors"}},
            "1 t",
        ),
        ({"weight_map": 3}, "has no weight_map"),
    ):
        first = sorted(set(good["weight_map"].values()))[0]
        text = json.dumps({**good, **change}).replace("model-00001-of-00004.safetensors", first)
        index.write_text(text)
        with pytest.raises(UserError, match=message):
            load_backbone(str(tmp_path))
    index.write_text(json.dumps(good))
    sorted(tmp_path.glob("model-*"))[1].unlink()
    with pytest.raises(UserError, match="names 'model-00002.*download all shards"):
        load_backbone(str(tmp_path))


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OfflineModeIsEnabled("offline")

    def uncached(*args, **kwargs):
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", uncached)
    (tmp_path / "file").touch()
    for name, message in (
        ("google/no-such-t5", "no directory google/no-such-t5, and as a hub id it cannot be downl"),
        (str(tmp_path / "none"), "there is no directory .*none; a backbone is"),
        ("./none", "there is no directory ./none"),
        (str(tmp_path / "file"), "is a file; name the directory"),
        (str(tmp_path), "config.json is missing"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_backbone(name)
        assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match="holds no weights: expected model.safetensors"):
        load_backbone(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "flax_model.msgpack").write_bytes(
        (GOLDENS / "t5_1_0/flax_model.msgpack").read_bytes()
    )
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        load_backbone(str(tmp_path))
    with pytest.raises(UserError, match="dtype 'int8' is not supported"):
        load_backbone(str(GOLDENS / "t5_1_1"), dtype="int8")


@pytest.mark.parametrize(
    "files, expected",
    [
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5"], {"model.safetensors"}),
        (["pytorch_model.bin", "flax_model.msgpack", "tf_model.h5"], {"pytorch_model.bin"}),
        (["pytorch_model.bin.index.json"], {"pytorch_model.bin.index.json", "pytorch_model-*.bin"}),
        (["flax_model.msgpack"], {"flax_model.msgpack"}),
    ],
)
def test_the_hub_is_asked_for_one_format_only(files, expected, monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked.update(name=name, patterns=set(allow_patterns))
        return str(GOLDENS / "t5_1_1")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    b = load_backbone("someone/some-t5")
    assert (b.source, b.path) == ("someone/some-t5", GOLDENS / "t5_1_1")
    assert asked["name"] == "someone/some-t5" and expected < asked["patterns"]
    assert {p for p in asked["patterns"] if "model" in p.split(".")[0]} - {"spiece.model"} <= {
        *expected,
        "sentencepiece.model",
    }
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: ["tf_model.h5"])
    with pytest.raises(UserError, match="holds no weights"):
        hub.resolve("someone/some-t5")


@pytest.mark.parametrize("name", ["builtin-large", "builtin/base"])
def test_an_unknown_built_in_backbone_is_refused_with_the_names(name):
    with pytest.raises(UserError, match="builtin, builtin-span, builtin-small"):
        hub.resolve(name)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_layers": 10**7}, "num_layers is 10000000, expected a whole number up to 10,000"),
        ({"num_decoder_layers": 10**7}, "num_decoder_layers is 10000000"),
        ({"num_layers": 9_999}, "the config has 9,999 layers, and the checkpoint has 61 tensors"),
        ({"d_model": 10**30}, "d_model is 10+, expected a whole number up to 2,147,483,647"),
        ({"vocab_size": True}, "vocab_size is True, expected a whole number"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan, expected a number"),
        ({"layer_norm_epsilon": -1e-6}, "layer_norm_epsilon is -1e-06, expected a number of at l"),
        ({"layer_norm_epsilon": "1e-6"}, "layer_norm_epsilon is '1e-6'"),
        ({"decoder_start_token_id": -5}, "decoder_start_token_id is -5, .* from 0 to 95"),
        ({"decoder_start_token_id": 96}, "decoder_start_token_id is 96, .* from 0 to 95"),
        ({"pad_token_id": "0"}, "pad_token_id is '0', expected the id of a token"),
        ({"eos_token_id": [10**30, 1]}, "eos_token_id is 10+, expected the id of a token"),
        ({"relative_attention_max_distance": 4}, "relative_attention_max_distance is 4; "),
        ({"relative_attention_num_buckets": 1}, "relative_attention_num_buckets is 1 and"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ({"feed_forward_proj": ["relu"]}, r"feed_forward_proj \['relu'\] is not supported"),
        ({"model_type": ["t5"]}, r"model_type \['t5'\] is not supported"),
        ({"model_type": "x" * 10**6}, "model_type 'xx.* is not supported"),
    ],
)
def test_values_of_a_config_that_no_model_has(changes, message, tmp_path, monkeypatch):
    directory = copy("t5_1_1", tmp_path / "x", **changes)
    monkeypatch.setattr(hf_t5, "leaves", None)  # the files are looked at before names are made
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(str(directory))
    assert len(str(caught.value)) < 1000


def test_a_config_says_nothing_with_null_and_the_first_with_a_list(tmp_path):
    nothing = {"layer_norm_epsilon": None, "pad_token_id": None, "decoder_start_token_id": None}
    found = load_backbone(str(copy("t5_1_1", tmp_path / "x", **nothing, eos_token_id=[7, 8])))
    expected = load_backbone(str(GOLDENS / "t5_1_1")).config
    assert found.config == dataclasses.replace(expected, eos_id=7, pad_id=0, decoder_start_id=0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "config.json is not valid JSON: it nests too deep"),
        ('{"d_model": 1, "d_model": 2}', "config.json names the key 'd_model' twice"),
        ('{"d_model": 1' + "0" * 5000 + "}", "config.json is not valid JSON"),
        ("\ud800", "config.json is not valid JSON"),
    ],
)
def test_a_config_that_is_no_json_is_one_sentence(text, message, tmp_path):
    directory = copy("t5_1_1", tmp_path / "x")
    (directory / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=message):
        load_backbone(str(directory))


@pytest.mark.parametrize(
    "name, weights, head",
    [
        ("t5_1_0", "flax_model.msgpack", "lm_head/kernel"),
        ("t5_1_0", "model.safetensors", "lm_head.weight"),
    ],
)
def test_a_head_that_the_config_promises_and_the_checkpoint_lacks(name, weights, head, tmp_path):
    """Those files have no head; T5's own config of them says that the embedding is one."""
    directory = copy(name, tmp_path / "x", weights=weights, tie_word_embeddings=False)
    with pytest.raises(UserError, match=f"is false, and 1 tensor is missing .{head}.: "):
        load_backbone(str(directory))
    shutil.rmtree(directory)
    assert load_backbone(str(copy(name, directory, weights=weights))).config.tied


def test_a_decoder_only_config_promises_a_head_unless_it_says_otherwise(tmp_path):
    source = GOLDENS.parent / "goldens_causal" / "llama"
    shutil.copytree(source, tmp_path / "x")
    directory = rewrite(tmp_path / "x", lambda tensors: tensors.pop("lm_head.weight"))
    raw = json.loads((source / "config.json").read_text())
    for said, message in ((False, "is false"), (None, "is absent, which means false")):
        raw.pop("tie_word_embeddings", None)
        raw |= {} if said is None else {"tie_word_embeddings": said}
        (tmp_path / "x" / "config.json").write_text(json.dumps(raw))
        with pytest.raises(UserError, match=rf"{message}, and 1 tensor is missing \(lm_head"):
            load_backbone(directory)
    (tmp_path / "x" / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": True}))
    assert load_backbone(directory).config.tied


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_heads_and_scales_of_every_kind_are_saved_and_loaded_again(scaled, tied, tmp_path):
    b = load_backbone(str(GOLDENS / "t5_1_1"))
    config = dataclasses.replace(b.config, tied=tied, scale_output=scaled)
    params = {name: leaf for name, leaf in b.params.items() if name != "head" or not tied}
    save_hf(tmp_path, config, params)
    found = load_backbone(str(tmp_path))
    assert (found.config.tied, found.config.scale_output) == (tied, scaled)
    assert_same(found.params, params)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
def test_weights_that_are_not_numbers_end_the_load(value, dtype, tmp_path):
    name = "decoder.block.1.layer.2.DenseReluDense.wo.weight"

    def spoil(tensors):
        tensors[name][3, 5] = value

    directory = rewrite(copy("t5_1_1", tmp_path / "x"), spoil)
    with pytest.raises(UserError, match=f"tensor {name} has values that are not finite"):
        load_backbone(directory, dtype=dtype)


def test_a_part_of_a_sharded_tensor_that_is_not_a_number_ends_the_load(tmp_path):
    def spoil(tensors):
        tensors["shared.weight"][-1, -1] = np.nan

    directory = rewrite(copy("t5_1_1", tmp_path / "x"), spoil)
    with pytest.raises(UserError, match="tensor shared.weight has values that are not finite"):
        load_backbone(directory, mesh=parallel.make_mesh(MeshConfig(fsdp=len(jax.devices()))))


def test_scales_and_overflows_that_are_not_numbers_end_the_load(tmp_path):
    b = load_backbone(str(GOLDENS / "t5_1_1"))
    save_hf(tmp_path / "int8", b.config, b.params, int8=True)

    def spoil(tensors):
        tensors["lm_head.weight_scale"][7] = np.inf

    def overflow(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float64) + 1e300

    for directory, change in (
        (tmp_path / "int8", spoil),
        (copy("t5_1_1", tmp_path / "x"), overflow),
    ):
        with pytest.raises(UserError, match="lm_head.weight has values that are not finite"):
            load_backbone(rewrite(directory, change))


def test_finite_means_every_value_and_nothing_but_that():
    big = np.full(100, 3e38, np.float32)  # whose sum is infinite
    for dtype in DTYPES.values():
        for bad in (np.nan, np.inf, -np.inf):
            values = np.linspace(-2, 2, 1000).astype(dtype).reshape(10, 100)
            assert finite(values) and finite(values[:, ::3]) and finite(values[:0])
            values[7, 99] = bad
            assert not finite(values) and not finite(values[:, ::3]) and finite(values[:, :99])
    assert finite(big) and finite(big.astype(DTYPES["bfloat16"]))


def test_two_embeddings_are_not_one_model(tmp_path):
    def change(tensors):
        tensors["decoder.embed_tokens.weight"] = tensors["shared.weight"] + 1

    with pytest.raises(UserError, match="shared.weight and decoder.embed_tokens.weight are two"):
        load_backbone(rewrite(copy("t5_1_0", tmp_path / "x"), change))


def test_an_index_says_which_shard_holds_a_tensor_and_forgets_none(tmp_path):
    b = load_backbone(str(GOLDENS / "t5_1_1"))
    save_hf(tmp_path, b.config, b.params, max_shard_bytes=20_000)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    names = dict(good["weight_map"])
    del names["lm_head.weight"]  # which its shard holds all the same
    index.write_text(json.dumps({**good, "weight_map": names}))
    found = load_backbone(str(tmp_path))
    assert not found.config.tied and found.fingerprint == b.fingerprint
    wrong = min(set(names.values()) - {names["shared.weight"]})
    index.write_text(json.dumps({**good, "weight_map": {**names, "shared.weight": wrong}}))
    with pytest.raises(UserError, match="1 tensors that no shard holds, e.g. shared.weight"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "entry for .* is malformed"),
        ({"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}, "entry for .* is malformed"),
        ({"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, r"has shape \(\), the config"),
        ({"dtype": "F32", "shape": [0, 16], "data_offsets": [0, 0]}, r"has shape \(0, 16\)"),
    ],
)
def test_embedding_and_head_of_no_shape(entry, message, tmp_path):
    directory = copy("t5_1_1", tmp_path / "x")
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header |= {"shared.weight": entry, "lm_head.weight": entry}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])
    with pytest.raises(UserError, match=message):
        load_backbone(str(directory))


def test_a_safetensors_header_that_nests_is_one_sentence(tmp_path):
    directory = copy("t5_1_1", tmp_path / "x")
    header = b"[" * 100_000
    path = directory / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="model.safetensors is truncated or .* nests too deep"):
        load_backbone(str(directory))


def test_what_no_reader_foresaw_is_one_sentence():
    for error in (RecursionError("x" * 9999), OverflowError("a\nb"), MemoryError(), KeyError(3)):
        with (
            pytest.raises(UserError, match="^m.bin cannot be read") as caught,
            damage_as_user_error("m.bin", "cannot be read"),
        ):
            raise error
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "name, weights, limit",
    [
        ("t5_1_1", "model.safetensors", 8000),
        ("t5_1_0", "flax_model.msgpack", None),
        ("t5_lm_adapt", "pytorch_model.bin", None),
    ],
)
def test_damaged_bytes_never_escape(name, weights, limit, tmp_path):
    """Each load ends with a backbone or a sentence."""
    rng = np.random.default_rng(0)
    directory = copy(name, tmp_path / "x", weights=weights)
    raw = (directory / weights).read_bytes()
    for _ in range(30):
        bad = bytearray(raw)
        for at in rng.integers(0, limit or len(raw), rng.integers(1, 4)):
            bad[at] = rng.choice([0, 127, 128, 255, bad[at] ^ 1])
        (directory / weights).write_bytes(bad)
        with contextlib.suppress(UserError):
            load_backbone(str(directory))


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_equals_the_embedding_is_a_head(tmp_path, equal):
    """A config may promise a head of its own, and the file have one with the same values."""
    folder = copy("t5_1_1", tmp_path / "model", tie_word_embeddings=False)
    tensors = dict(load_file(folder / "model.safetensors"))
    del tensors["lm_head.weight"]
    if equal:
        tensors["lm_head.weight"] = tensors["shared.weight"].copy()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if not equal:
        with pytest.raises(UserError, match="lost its head"):
            load_backbone(str(folder))
        return
    found = load_backbone(str(folder)).config
    assert found.tied and not found.scale_output
