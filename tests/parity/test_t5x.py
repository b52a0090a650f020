"""T5X checkpoints: small ones written here with gzip and msgpack, the genuine one if present."""

import functools
import gzip
import json
import os
from pathlib import Path

import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
from helpers import GOLDENS, ROOT

from jaxprompt.config.errors import UserError
from jaxprompt.models.checkpoints import hf_t5
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.models.checkpoints.safetensors import read_safetensors

FIXTURES = os.environ.get("JAXPROMPT_FIXTURES") or ROOT.parent / "shared" / "fixtures"
GENUINE = Path(FIXTURES) / "t5x_tiny" / "checkpoint_3"


def golden_tensors(name):
    """The golden's tensors under their torch names, and its config."""
    found = {}
    for key, tensor in read_safetensors(GOLDENS / name / "model.safetensors").items():
        found[key] = np.array(tensor.read(tuple(slice(0, n) for n in tensor.shape)))
    config = hf_t5.config_from_json(
        GOLDENS / name / "config.json", tied="lm_head.weight" not in found
    )
    return found, config


def t5x_names(torch_tensors):
    """The same tensors as an unscanned T5X model names and lays them out."""
    norms = {
        "encoder": ["pre_attention_layer_norm", "pre_mlp_layer_norm"],
        "decoder": ["pre_self_attention_layer_norm", "pre_cross_attention_layer_norm"],
    }
    norms["decoder"].append("pre_mlp_layer_norm")
    attentions = {
        "encoder SelfAttention": "attention",
        "decoder SelfAttention": "self_attention",
        "decoder EncDecAttention": "encoder_decoder_attention",
    }
    letters = {"q": "query", "k": "key", "v": "value", "o": "out"}
    found = {}
    for name, value in torch_tensors.items():
        stack, *parts, _ = name.split(".")
        if stack == "shared":
            found["token_embedder/embedding"] = value
        elif stack == "lm_head":
            found["decoder/logits_dense/kernel"] = value.T
        elif parts[-1] == "final_layer_norm":
            found[f"{stack}/{stack}_norm/scale"] = value
        elif parts[-1] == "layer_norm":
            found[f"{stack}/layers_{parts[1]}/{norms[stack][int(parts[3])]}/scale"] = value
        elif parts[-1] == "relative_attention_bias":
            found[f"{stack}/layers_{parts[1]}/relpos_bias/rel_embedding"] = value.T
        else:
            module = attentions.get(f"{stack} {parts[4]}", "mlp")
            last = letters.get(parts[5], parts[5])
            found[f"{stack}/layers_{parts[1]}/{module}/{last}/kernel"] = value.T
    return found


def shared_bias(tensors):
    """The first layer's relative bias is the stack's, as T5X keeps it."""
    old = "/layers_0/relpos_bias/"
    return {name.replace(old, "/relpos_bias/"): value for name, value in tensors.items()}


def scanned(tensors, heads=None):
    """Layers stacked on axis 1 under encoder/encoder and decoder/decoder; 4-D with ``heads``."""
    found, stacks = {}, {}
    for name, value in tensors.items():
        stack, layer, *rest = name.split("/")
        if not layer.startswith("layers_"):
            found[name] = value
            continue
        stacks.setdefault("/".join([stack, stack, *rest]), {})[int(layer[7:])] = value
    for name, layers in stacks.items():
        value = np.stack([layers[i] for i in sorted(layers)], axis=1)
        if heads and "attention/" in name and name.endswith("kernel"):
            d, depth, width = value.shape
            if "/out/" in name:
                value = value.reshape(heads, d // heads, depth, width).swapaxes(1, 2)
            else:
                value = value.reshape(d, depth, heads, width // heads)
        found[name] = value
    return found


def write_zarr(folder, value, chunks, dtype):
    """One zarr v2 array with gzip chunks, those at the edges full size like T5X's."""
    folder.mkdir(parents=True)
    meta = {"chunks": chunks, "compressor": {"id": "gzip", "level": 1}, "dtype": dtype}
    meta |= {"fill_value": None, "filters": None, "order": "C", "shape": value.shape}
    (folder / ".zarray").write_text(json.dumps({**meta, "zarr_format": 2}))
    for at in np.ndindex(*(-(-n // c) for n, c in zip(value.shape, chunks, strict=True))):
        block = np.zeros(chunks, value.dtype)
        cut = tuple(slice(i * c, (i + 1) * c) for i, c in zip(at, chunks, strict=True))
        part = value[cut]
        block[tuple(slice(0, n) for n in part.shape)] = part
        (folder / ".".join(map(str, at))).write_bytes(gzip.compress(block.tobytes(), 1))


def write_t5x(folder, tensors, *, bfloat16=False, path_at_top=False, version=3):
    """A version-3 checkpoint: vectors and tables of biases inline, kernels as zarr."""
    folder.mkdir(parents=True)
    target: dict = {}
    for name, value in tensors.items():
        *parents, last = name.split("/")
        node = target
        for parent in parents:
            node = node.setdefault(parent, {})
        if bfloat16:
            value = value.astype(ml_dtypes.bfloat16)
        if last in ("scale", "rel_embedding"):
            triple = (value.shape, value.dtype.name, value.tobytes())
            node[last] = msgpack.ExtType(1, msgpack.packb(triple))
            continue
        array = "target." + name.replace("/", ".")
        chunks = [max(1, -(-value.shape[0] * 2 // 3)), *value.shape[1:]]
        dtype = "bfloat16" if bfloat16 else "<f4"
        write_zarr(folder / array, value, chunks, dtype)
        node[last] = {"driver": "zarr", "kvstore": {"driver": "gfile", "path": array}}
        node[last]["metadata"] = {"shape": value.shape, "chunks": chunks}
        if path_at_top:
            del node[last]["kvstore"]["path"]
            node[last] |= {"path": array, "kvstore": {"driver": "gcs", "bucket": "t5x-dummy"}}
    step = msgpack.ExtType(3, msgpack.packb(((), "int32", b"\1\0\0\0")))
    optimizer = {"target": target, "state": {"step": step, "param_states": {}}}
    raw = msgpack.packb({"version": version, "optimizer": optimizer})
    (folder / "checkpoint").write_bytes(raw)
    return str(folder)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found, expected)))


@pytest.mark.parametrize("path_at_top", [False, True])
@pytest.mark.parametrize("name", ["t5_1_0", "t5_1_1", "t5_lm_adapt"])
def test_unscanned_equals_the_hugging_face_form(name, path_at_top, tmp_path):
    tensors, config = golden_tensors(name)
    folder = write_t5x(tmp_path / "c", shared_bias(t5x_names(tensors)), path_at_top=path_at_top)
    found, expected = load_backbone(folder), load_backbone(str(GOLDENS / name))
    assert found.config == expected.config == config
    assert_same(found.params, expected.params)
    assert found.fingerprint == expected.fingerprint


@pytest.mark.parametrize("heads", [None, 3])
def test_scanned_equals_the_hugging_face_form(heads, tmp_path):
    tensors, _ = golden_tensors("umt5")
    folder = write_t5x(tmp_path / "c", scanned(t5x_names(tensors), heads))
    found, expected = load_backbone(folder), load_backbone(str(GOLDENS / "umt5"))
    assert found.config == expected.config
    assert_same(found.params, expected.params)


def test_bfloat16_arrays(tmp_path):
    tensors, _ = golden_tensors("t5_1_1")
    folder = write_t5x(tmp_path / "c", shared_bias(t5x_names(tensors)), bfloat16=True)
    expected = load_backbone(str(GOLDENS / "t5_1_1"), dtype="bfloat16")
    assert_same(load_backbone(folder, dtype="bfloat16").params, expected.params)
    assert load_backbone(folder).fingerprint == expected.fingerprint


def test_a_config_beside_or_given_replaces_the_inferred_one(tmp_path):
    tensors, _ = golden_tensors("t5_1_1")
    folder = write_t5x(tmp_path / "c", shared_bias(t5x_names(tensors)))
    raw = json.loads((GOLDENS / "t5_1_1" / "config.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**raw, "feed_forward_proj": "gated-silu"}))
    assert load_backbone(folder, config=tmp_path / "other.json").config.activation == "silu"
    (tmp_path / "c" / "config.json").write_text(json.dumps({**raw, "layer_norm_epsilon": 1e-5}))
    assert load_backbone(folder).config.norm_eps == 1e-5
    (tmp_path / "other.json").write_text(json.dumps({**raw, "d_ff": 31}))
    with pytest.raises(UserError, match=r"wi_0.*has shape \(16, 32\), .* expects \(16, 31\)"):
        load_backbone(folder, config=tmp_path / "other.json")


def test_damage_is_one_sentence(tmp_path):
    tensors, _ = golden_tensors("t5_1_1")
    tensors = shared_bias(t5x_names(tensors))
    with pytest.raises(UserError, match="T5X version 2"):
        load_backbone(write_t5x(tmp_path / "old", tensors, version=2))
    folder = Path(write_t5x(tmp_path / "cut", tensors))
    chunk = folder / "target.encoder.layers_1.mlp.wo.kernel" / "1.0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(UserError, match=r"layers_1\.mlp\.wo\.kernel cannot be read"):
        load_backbone(str(folder))
    (folder / "target.encoder.layers_0.mlp.wo.kernel" / ".zarray").unlink()
    with pytest.raises(UserError, match=r"layers_0\.mlp\.wo\.kernel cannot be read"):
        load_backbone(str(folder))
    raw = (folder / "checkpoint").read_bytes()
    for length in (0, 10, len(raw) // 2, len(raw) - 1):
        (folder / "checkpoint").write_bytes(raw[:length])
        with pytest.raises(UserError, match="truncated"):
            load_backbone(str(folder))
    with pytest.raises(UserError, match="outside the checkpoint"):
        leaf = {"driver": "zarr", "kvstore": {"driver": "file", "path": "../../secret"}}
        index = {"version": 3, "optimizer": {"target": {"token_embedder": {"embedding": leaf}}}}
        (folder / "checkpoint").write_bytes(msgpack.packb(index))
        load_backbone(str(folder))


def test_missing_tensors_and_the_parent_folder(tmp_path):
    tensors, _ = golden_tensors("t5_1_1")
    tensors = shared_bias(t5x_names(tensors))
    write_t5x(tmp_path / "checkpoint_10", tensors)
    with pytest.raises(UserError, match=r"holds checkpoints \(checkpoint_10\); name one"):
        load_backbone(str(tmp_path))
    del tensors["decoder/layers_1/mlp/wi_1/kernel"]
    with pytest.raises(UserError, match="1 of .* missing .decoder/layers_1/mlp/wi_1/kernel"):
        load_backbone(write_t5x(tmp_path / "a", tensors))
    del tensors["encoder/relpos_bias/rel_embedding"]
    with pytest.raises(UserError, match="no tensor encoder/relpos_bias/rel_embedding"):
        load_backbone(write_t5x(tmp_path / "b", tensors))


def genuine_index():
    """The tree of the genuine checkpoint: small arrays, and where the blocks of others are."""

    def extension(code, data):
        shape, dtype, values = msgpack.unpackb(data)
        return np.frombuffer(values, dtype).reshape(shape)

    content = msgpack.unpackb((GENUINE / "checkpoint").read_bytes(), ext_hook=extension)
    return content["optimizer"]["target"]


def read_by_hand(index, name):
    """An array of the genuine checkpoint by its path, put together from its blocks."""
    node = index
    for part in name.split("/"):
        node = node[part]
    if isinstance(node, np.ndarray):
        return node
    folder = GENUINE / node["kvstore"]["path"]
    shape, (rows, columns) = node["metadata"]["shape"], node["metadata"]["chunks"]
    down, across = -(-shape[0] // rows), -(-shape[1] // columns)
    blocks = [
        [
            np.frombuffer(gzip.decompress((folder / f"{i}.{j}").read_bytes()), "<f4")
            for j in range(across)
        ]
        for i in range(down)
    ]
    whole = np.block([[block.reshape(rows, columns) for block in row] for row in blocks])
    return whole[: shape[0], : shape[1]]


@pytest.mark.skipif(not GENUINE.exists(), reason="the genuine checkpoint is not at hand")
def test_the_genuine_checkpoint_equals_a_hand_check():
    """Every value against the files, read with msgpack, gzip and NumPy alone."""
    b = load_backbone(str(GENUINE))
    c = b.config
    assert (c.vocab_size, c.d_model, c.num_heads, c.head_dim, c.d_ff) == (32128, 4, 2, 2, 8)
    assert (c.num_encoder_layers, c.num_decoder_layers, c.buckets) == (2, 2, 4)
    assert c.gated and not c.tied and not c.scale_output
    by_hand = functools.partial(read_by_hand, genuine_index())
    p = b.params
    assert np.array_equal(p["token_embedder"]["embedding"], by_hand("token_embedder/embedding"))
    assert np.array_equal(p["head"], by_hand("decoder/logits_dense/kernel"))
    modules = {
        "encoder": {"attention": "attention"},
        "decoder": {
            "self_attention": "self_attention",
            "cross_attention": "encoder_decoder_attention",
        },
    }
    for stack, attentions in modules.items():
        table = by_hand(f"{stack}/relpos_bias/rel_embedding")
        assert np.array_equal(p[stack]["relative_bias"], table.T)
        norm = by_hand(f"{stack}/{stack}_norm/scale")
        assert np.array_equal(p[stack]["final_norm"]["scale"], norm)
        for i in range(2):
            layers, prefix = p[stack]["layers"], f"{stack}/layers_{i}"
            for ours, theirs in attentions.items():
                for name in ("query", "key", "value"):
                    kernel = by_hand(f"{prefix}/{theirs}/{name}/kernel").reshape(4, 2, 2)
                    assert np.array_equal(layers[ours][name][i], kernel)
                kernel = by_hand(f"{prefix}/{theirs}/out/kernel").reshape(2, 2, 4)
                assert np.array_equal(layers[ours]["out"][i], kernel)
                norm = by_hand(f"{prefix}/pre_{ours}_layer_norm/scale")
                assert np.array_equal(layers[f"{ours}_norm"]["scale"][i], norm)
            for name in ("wi_0", "wi_1", "wo"):
                assert np.array_equal(
                    layers["mlp"][name][i], by_hand(f"{prefix}/mlp/{name}/kernel")
                )
            norm = by_hand(f"{prefix}/pre_mlp_layer_norm/scale")
            assert np.array_equal(layers["mlp_norm"]["scale"][i], norm)


def small(folder):
    tensors, _ = golden_tensors("t5_1_1")
    return Path(write_t5x(folder, shared_bias(t5x_names(tensors))))


ARRAY = "target.encoder.layers_1.mlp.wo.kernel"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"chunks": [10**6, 10**6]}, r"chunks of \(1000000, 1000000\) do not suit an array of"),
        ({"chunks": [10**12, 10**12], "shape": [10**12, 10**12]}, "bytes for a chunk of"),
        ({"chunks": [10**30, 1]}, "chunks is .* expected whole numbers above 0"),
        ({"chunks": [0, 1]}, "chunks is .* expected whole numbers above 0"),
        ({"chunks": [1.5, 1]}, "chunks is .* expected whole numbers above 0"),
        ({"chunks": [1] * 65}, "chunks is .* expected whole numbers above 0"),
        ({"chunks": [8]}, "do not suit an array of shape"),
        ({"shape": "12"}, "shape is '12', expected whole numbers above 0"),
        ({"shape": [10**9, 16]}, "is missing; the checkpoint is incomplete"),
        ({"dtype": "|O"}, "cannot be read"),
    ],
)
def test_arrays_that_declare_what_is_not_there(changes, message, tmp_path):
    """tensorstore would end the process for want of memory, or make zeros of missing chunks."""
    folder = small(tmp_path / "x")
    path = folder / ARRAY / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        load_backbone(str(folder))


@pytest.mark.parametrize("chunk", ["0.0", "1.0"])
def test_a_chunk_that_is_missing_is_not_zero(chunk, tmp_path):
    folder = small(tmp_path / "x")
    (folder / ARRAY / chunk).unlink()
    with pytest.raises(UserError, match=f"{ARRAY}/.* is missing"):
        load_backbone(str(folder))


def test_a_chunk_in_the_middle_that_is_missing_is_not_zero(tmp_path):
    folder = small(tmp_path / "x")
    shape = json.loads((folder / ARRAY / ".zarray").read_text())["shape"]
    for file in (folder / ARRAY).iterdir():
        file.unlink()
    (folder / ARRAY).rmdir()
    write_zarr(folder / ARRAY, np.ones(shape, np.float32), [8, shape[1]], "<f4")
    load_backbone(str(folder))
    (folder / ARRAY / "1.0").unlink()
    with pytest.raises(UserError, match="chunk .1, 0. .* is missing"):
        load_backbone(str(folder))


def edited(folder, change):
    """The same checkpoint after ``change`` to the tree of its weights."""

    def kept(code, data):
        return msgpack.ExtType(code, data)

    path = folder / "checkpoint"
    index = msgpack.unpackb(path.read_bytes(), ext_hook=kept)
    change(index["optimizer"]["target"])
    path.write_bytes(msgpack.packb(index))
    return str(folder)


def inline(shape, dtype="float32", size=None):
    raw = b"\0" * (4 * int(np.prod(shape)) if size is None else size)
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, raw)))


def deep(depth):
    tree = 5
    for _ in range(depth):
        tree = {"a": tree}
    return tree


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t["encoder"].update(layers_9999999=t["encoder"]["layers_0"]),
            "the config has 10,000,000 layers, and the checkpoint has",
        ),
        (
            lambda t: t["encoder"].update({"layers_" + "9" * 4400: t["encoder"]["layers_0"]}),
            "tensors have no place",
        ),
        (
            lambda t: t["encoder"]["relpos_bias"].update(rel_embedding=inline((0, 32))),
            "has the shapes of no T5: .* 0 heads",
        ),
        (
            lambda t: t["encoder"]["layers_0"]["attention"]["query"].update(kernel=inline((16,))),
            "does not suit . heads",
        ),
        (
            lambda t: t["encoder"]["layers_0"]["attention"]["query"].update(kernel=inline(())),
            "does not suit . heads",
        ),
        (
            lambda t: t["encoder"]["layers_0"]["mlp"]["wo"]["kernel"]["kvstore"].update(path=5),
            "lies at 5, outside the checkpoint",
        ),
        (
            lambda t: t["token_embedder"]["embedding"]["metadata"].update(shape=[2, 3]),
            r"token_embedder/embedding has shape \(2, 3\), and",
        ),
        (
            lambda t: t["encoder"]["encoder_norm"].update(scale=inline((-1,), size=64)),
            "truncated or not a T5X index",
        ),
        (
            lambda t: t["encoder"]["encoder_norm"].update(scale=inline((16,), ["float32"])),
            r"of dtype \['float32'\]",
        ),
        (lambda t: t.update(deep(depth=900)), "T5X index|cannot be read|neither an array"),
    ],
)
def test_an_index_that_no_writer_makes(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_backbone(edited(small(tmp_path / "x"), change))


def test_a_config_that_promises_a_head_of_its_own(tmp_path):
    folder = small(tmp_path / "x")
    (folder / "config.json").write_bytes((GOLDENS / "t5_1_1" / "config.json").read_bytes())
    edited(folder, lambda target: target["decoder"].pop("logits_dense"))
    with pytest.raises(UserError, match="1 tensor is missing .decoder/logits_dense/kernel"):
        load_backbone(str(folder))
