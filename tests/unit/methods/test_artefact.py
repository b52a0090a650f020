"""Prompts on disk: ours to the bit, those of others, and every way in which one can be bad."""

import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml
from helpers import ROOT
from safetensors.numpy import load_file, save_file

import jaxprompt as jp
from jaxprompt.config.errors import UserError
from jaxprompt.methods import artefact
from jaxprompt.methods.artefact import Prompt, load_prompt, save_peft, save_prompt
from jaxprompt.runtime.files import replace_directory

RELEASED = ROOT.parent / "shared" / "fixtures" / "released_prompts"
FACTS = {
    "backbone": {"source": "some/t5", "fingerprint": "0123", "num_layers": 2, "num_heads": 3},
    "task": {"name": "mine", "template": "é: {text}", "labels": ["yes", "no"]},
    "metrics": {"accuracy": 0.75},
    "step": 7,
}


def vectors(rows=5, width=4):
    values = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    values[0, :3] = [np.float32(1e-45), -0.0, np.nextafter(np.float32(1), np.float32(2))]
    return values


@pytest.fixture
def saved(tmp_path):
    save_prompt(tmp_path / "deep" / "prompt", Prompt(vectors(), FACTS))
    return tmp_path / "deep" / "prompt"


def refused(path, message):
    with pytest.raises(UserError, match=message) as caught:
        load_prompt(path)
    assert "\n" not in str(caught.value)


def test_an_artefact_comes_back_to_the_bit(saved):
    prompt = load_prompt(str(saved))
    assert prompt.vectors.tobytes() == vectors().tobytes() and prompt.vectors.dtype == np.float32
    assert prompt.metadata == {"format": 1, "length": 5, "width": 4} | FACTS
    assert sorted(os.listdir(saved)) == ["README.md", "prompt.json", "prompt.safetensors"]
    assert os.listdir(saved.parent) == ["prompt"]


def test_vectors_that_are_a_view_are_saved_as_they_look(tmp_path):
    view = vectors(6, 8)[::2, ::2].T
    save_prompt(tmp_path / "p", Prompt(view, {}))
    np.testing.assert_array_equal(load_prompt(tmp_path / "p").vectors, view)


def test_the_model_card_says_what_it_is_and_how_good(saved):
    card = (saved / "README.md").read_text(encoding="utf-8")
    for text in ("mine", "some/t5", "0123", "é: {text}", "yes, no", "0.7500", "jaxprompt eval"):
        assert text in card


HOSTILE = "<script>x</script> [a](b) *c*\n# d | `e`"


def test_the_model_card_shows_what_users_wrote_and_is_not_shaped_by_it(tmp_path):
    task = {
        "name": HOSTILE,
        "template": "a {x}``\n{y y}{{z}}",
        "labels": [HOSTILE],
        "metrics": ["f1"],
    }
    facts = {
        "backbone": {"source": HOSTILE}, "task": task, "metrics": {HOSTILE: 0.5, "f1": 0.25},
        "baselines": {"majority": 0.125, "untuned": 0.0625}, "test": {"f1": 0.75}, "step": 100,
        "config": {"train": {"steps": 300}}, "rows": 8, "seed": 2,
    }  # fmt: skip
    save_prompt(tmp_path / "p", Prompt(vectors(), facts))
    front, card = (tmp_path / "p" / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
    known = yaml.safe_load(front)
    assert known["metrics"] == ["f1"] and "base_model" not in known
    prose = re.sub(r"(`+)( .*? |[^`].*?)\1", "CODE", card)
    assert "<script>" not in prose and "&lt;script&gt;" in prose and "\\*c\\*" in prose
    assert [line for line in card.splitlines() if line.startswith("# ")][1:] == []
    assert "```a {x}``\\n{y y}{{z}}```" in card  # one code span
    assert '`{"x": "...", "y y": "..."}`' in card and "<column>" not in card
    assert "| f1 | 0.2500 | 0.7500 |" in card
    assert "| f1 of the majority class | 0.1250 |" in card
    assert "| f1 of the backbone without a prompt | 0.0625 |" in card
    assert "Vectors of step 100 of 300, the best on validation rows; seed 2" in card


def test_a_hub_knows_the_base_model_from_the_card(saved):
    front = yaml.safe_load((saved / "README.md").read_text().split("---")[1])
    assert front["base_model"] == "some/t5" and front["library_name"] == "jaxprompt"
    assert front["metrics"] == ["accuracy"]


def test_a_save_that_fails_leaves_the_old_prompt_and_nothing_else(saved, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(artefact, "model_card", fail)
        with pytest.raises(OSError, match="disk full"):
            save_prompt(saved, Prompt(vectors() + 1, FACTS))
    with pytest.raises(ValueError):
        save_prompt(saved, Prompt(vectors() + 1, {"metrics": {"accuracy": float("nan")}}))
    real = os.replace

    def second_fails(source, target):
        if not str(target).endswith("-old") and not str(source).endswith("-old"):
            raise OSError("busy")
        real(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="busy"):
        save_prompt(saved, Prompt(vectors() + 1, FACTS))
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert os.listdir(saved.parent) == ["prompt"]


def test_a_directory_does_not_replace_a_file(tmp_path):
    (tmp_path / "p").write_text("precious")
    with pytest.raises(UserError, match="is a file"):
        replace_directory(tmp_path / "p", lambda folder: None)
    assert (tmp_path / "p").read_text() == "precious"


def test_missing_and_empty(tmp_path):
    refused(tmp_path / "none", "There is no prompt at .*give an artefact, adapter or .npy")
    refused(tmp_path, "holds neither prompt.json nor adapter_config.json; it is not a prompt")


@pytest.mark.parametrize("size", [0, 4, 8, 40, -1, -16])
def test_truncated_safetensors(saved, size):
    file = saved / "prompt.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    refused(saved, "prompt.safetensors is damaged or missing")


def test_a_header_that_lies(saved):
    file = saved / "prompt.safetensors"
    whole = bytearray(file.read_bytes())
    whole[:8] = (2**62).to_bytes(8, "little")
    file.write_bytes(whole)
    refused(saved, "prompt.safetensors is damaged or missing")


@pytest.mark.parametrize(
    "facts, message",
    [
        (b"{", "prompt.json is not valid JSON"),
        (b'"\xff"', "prompt.json is not valid JSON"),
        (b"[" * 100_000, "prompt.json is not valid JSON"),
        (b"[]", "prompt.json holds no JSON object"),
        (b"{}", "prompt.json has format None and this version reads 1, 2"),
        (b'{"format": 3}', "has format 3 and this version reads 1, 2"),
        (b'{"format": 1, "backbone": "t5"}', "'backbone' is 't5', no object"),
        (b'{"format": 1, "task": []}', "'task' is .., no object"),
        (b'{"format": 1, "peft": 3}', "'peft' is 3, no object"),
        (b'{"format": 1, "metrics": [1]}', r"'metrics' is \[1\], no object"),
        (b'{"format": 1, "backbone": {"source": 3}}', "'backbone.source' is 3, no text"),
        (b'{"format": 1, "backbone": {"tokenizer": ["x"]}}', "'backbone.tokenizer' is .*, no text"),
        (b'{"format": 1, "step": true}', "'step' is True, no whole number"),
        (b'{"format": 1, "length": 6, "width": 4}', "says length 6 and prompt.safetensors has 5"),
        (b'{"format": "' + b"x" * 10_000 + b'"}', "has format .{,300} and this version reads 1"),
    ],
)
def test_damaged_facts(saved, facts, message):
    (saved / "prompt.json").write_bytes(facts)
    refused(saved, message)


def test_null_is_as_good_as_nothing(saved):
    (saved / "prompt.json").write_text('{"format": 1, "task": null, "metrics": null, "peft": null}')
    prompt = load_prompt(saved)
    assert prompt.metadata == {"format": 1}
    save_prompt(saved, prompt)
    save_peft(saved.parent / "peft", prompt)


@pytest.mark.parametrize("code, shape", [("F8_E4M3", (5, 4)), ("F32", (1,) * 70), ("X", (5, 4))])
def test_tensors_of_types_and_ranks_that_numpy_lacks(saved, code, shape):
    size = int(np.prod(shape)) * (4 if code == "F32" else 1)
    header = {"prompt": {"dtype": code, "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    file = saved / "prompt.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"0" * size)
    refused(saved, "prompt.safetensors")


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object(), {("a", 1): 2}, 1j])
def test_facts_that_json_cannot_hold_are_refused(tmp_path, value):
    with pytest.raises(UserError, match="The prompt's 'note' is .*, which JSON cannot hold"):
        save_prompt(tmp_path / "p", Prompt(vectors(), {"note": value}))
    assert os.listdir(tmp_path) == []


def test_odd_facts_are_written_readably(tmp_path):
    deep = {
        "metrics": {"a|b": "high", "n": np.float32(0.5), "c": [1], "d": 10**400},
        "half": "\ud800",
    }
    facts = deep | {
        "task": {"name": "\ud800", "labels": [1], "template": "{x}"},
        "where": Path("a"),
    }
    save_prompt(tmp_path / "p", Prompt(vectors(), facts))
    found = load_prompt(tmp_path / "p").metadata
    assert found["metrics"] == deep["metrics"] | {"n": 0.5} and found["half"] == "\ud800"
    card = (tmp_path / "p" / "README.md").read_text()
    assert "| a\\|b | high |" in card and "| n | 0.5000 |" in card and "\\ud800" in card


@pytest.mark.parametrize("values", [np.full((2, 3), np.nan), np.ones(3), np.ones((0, 3))])
@pytest.mark.parametrize("save", [save_prompt, save_peft])
def test_vectors_that_are_no_prompt_are_not_saved(tmp_path, save, values):
    with pytest.raises(UserError, match="The prompt holds"):
        save(tmp_path / "p", Prompt(values, {}))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("facts", [[], {"backbone": 3}, {"task": {"name": 4}}, {"step": "x"}])
def test_prompts_that_python_made_are_checked_as_read_ones_are(tmp_path, facts):
    for use in (jp.open_session, lambda prompt: save_prompt(tmp_path / "p", prompt)):
        with pytest.raises(UserError, match="The prompt's metadata: .* no "):
            use(Prompt(vectors(), facts))
    assert os.listdir(tmp_path) == []


def test_a_run_is_not_its_prompt(saved):
    refused(saved.parent, f"it is not a prompt; did you mean '{saved}'?")


def test_artefact_without_its_tensors(saved):
    (saved / "prompt.safetensors").unlink()
    refused(saved, "prompt.safetensors is damaged or missing")
    save_file({"other": vectors()}, saved / "prompt.safetensors")
    refused(saved, r"holds \['other'\] and no tensor 'prompt'")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npy_prompts_become_float32(tmp_path, dtype):
    values = vectors().astype(dtype)
    np.save(tmp_path / "p.npy", values)
    prompt = load_prompt(tmp_path / "p.npy")
    np.testing.assert_array_equal(prompt.vectors, values.astype(np.float32))
    assert prompt.vectors.dtype == np.float32 and prompt.metadata == {}
    prompt.vectors[0, 0] = 1  # a copy, not a window into the file


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_pickle_is_ever_executed(tmp_path):
    trace = tmp_path / "executed"
    objects = np.empty((2, 2), object)
    objects[:] = Trap(trace)
    np.save(tmp_path / "p.npy", objects, allow_pickle=True)
    refused(tmp_path / "p.npy", "p.npy cannot be read as an array of numbers")
    (tmp_path / "q.npy").write_bytes(pickle.dumps(Trap(trace)))
    refused(tmp_path / "q.npy", "is not an .npy file")
    assert not trace.exists()


@pytest.mark.parametrize(
    "values, message",
    [
        (np.array([[1, np.nan]]), "values that are not finite"),
        (np.array([[1, np.inf]], np.float32), "values that are not finite"),
        (np.array([[1, 1e300]]), "values that are not finite"),  # is infinite as float32
        (np.ones((2, 3), np.int32), r"holds int32 of shape \[2, 3\]; a prompt is a float"),
        (np.ones((2, 3), complex), "holds complex128"),
        (np.array([["a"]]), "a prompt is a float array"),
        (np.ones(3), r"float64 of shape \[3\]"),
        (np.ones((1, 2, 3)), r"of shape \[1, 2, 3\]"),
        (np.ones((0, 3)), r"of shape \[0, 3\]"),
        (np.ones(()), r"of shape \[\]"),
    ],
)
def test_arrays_that_are_no_prompt(tmp_path, values, message):
    np.save(tmp_path / "p.npy", values)
    refused(tmp_path / "p.npy", message)


def test_npy_files_damaged_anywhere(tmp_path):
    path = tmp_path / "p.npy"
    np.save(path, vectors())
    whole = path.read_bytes()
    for size in (0, 5, 6, 8, 20, 60, 127, 130, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, "p.npy")
    path.write_bytes(whole.replace(b"(5, 4)", b"(9**9,"))
    refused(path, "cannot be read as an array")
    huge = whole.replace(b"(5, 4), }" + b" " * 12, b"(1000000000000, 4), }")
    assert len(huge) == len(whole) and huge != whole
    path.write_bytes(huge)
    refused(path, "cannot be read as an array")


def write_peft(folder, rows, **config):
    """The files that PEFT 0.21 writes for a T5."""
    folder.mkdir()
    known = {
        "auto_mapping": None, "base_model_name_or_path": "some/t5", "inference_mode": True,
        "num_attention_heads": 3, "num_layers": 2, "num_transformer_submodules": 2,
        "num_virtual_tokens": 3, "peft_type": "PROMPT_TUNING", "peft_version": "0.21.2",
        "prompt_tuning_init": "RANDOM", "task_type": "SEQ_2_SEQ_LM", "token_dim": 4,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(known | config))
    save_file(
        {"prompt_embeddings": rows}, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    return folder


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
def test_of_an_adapter_for_t5_only_the_first_half_counts(tmp_path, kind):
    rows = vectors(6)
    prompt = load_prompt(write_peft(tmp_path / "a", rows, peft_type=kind))
    np.testing.assert_array_equal(prompt.vectors, rows[:3])
    assert prompt.metadata["peft"]["peft_type"] == kind
    assert prompt.metadata["backbone"] == {"source": "some/t5"}
    single = write_peft(tmp_path / "b", rows[:3], num_transformer_submodules=1)
    np.testing.assert_array_equal(load_prompt(single).vectors, rows[:3])


def test_adapters_in_bfloat16(tmp_path):
    rows = vectors(6).astype(ml_dtypes.bfloat16)
    prompt = load_prompt(write_peft(tmp_path / "a", rows))
    np.testing.assert_array_equal(prompt.vectors, rows[:3].astype(np.float32))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"peft_type": "ADALORA"}, "is 'ADALORA'; this version reads PROMPT_TUNING, P_TUNING, "),
        ({"peft_type": None}, "is None; this version reads"),
        ({"peft_type": "CPT"}, "is 'CPT'; this version reads"),
        ({"num_virtual_tokens": 7}, "num_virtual_tokens 7 and the adapter holds 6 rows"),
        ({"num_virtual_tokens": "3"}, "num_virtual_tokens '3'"),
        ({"num_virtual_tokens": -1}, "num_virtual_tokens -1"),
    ],
)
def test_adapters_that_are_no_prompt(tmp_path, config, message):
    refused(write_peft(tmp_path / "a", vectors(6), **config), message)


def write_pickled(path, name, rows, *, shape=None, strides=None, functions=()):
    """What ``torch.save`` writes for a dictionary of one float32 tensor, opcode by opcode."""
    text = lambda s: b"X" + len(s).to_bytes(4, "little") + s.encode()
    number = lambda n: b"J" + n.to_bytes(4, "little")
    shape, strides = shape or rows.shape, strides or (rows.shape[1], 1)
    storage = text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage + number(rows.size) + b"tQ"
    tensor += number(0) + b"(" + b"".join(map(number, shape)) + b"t"
    tensor += b"(" + b"".join(map(number, strides)) + b"t\x89NtR"
    data = b"\x80\x02}" + b"".join(functions) + text(name) + tensor + b"s."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("adapter_model/data.pkl", data)
        archive.writestr("adapter_model/data/0", rows.tobytes())
        archive.writestr("adapter_model/version", "3\n")


def test_adapters_of_old_with_a_pickle_are_read_and_nothing_is_run(tmp_path):
    folder = write_peft(tmp_path / "a", vectors(6))
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "has no adapter_model.safetensors; save it again")
    file = folder / "adapter_model.bin"
    write_pickled(file, "prompt_embeddings", vectors(6))
    np.testing.assert_array_equal(load_prompt(folder).vectors, vectors(6)[:3])
    transposed = np.ascontiguousarray(vectors(6).T)  # as a view of it
    write_pickled(file, "prompt_embeddings", transposed, shape=(6, 4), strides=(1, 6))
    np.testing.assert_array_equal(load_prompt(folder).vectors, vectors(6)[:3])
    write_pickled(file, "prompt_embeddings", vectors(6), shape=(2**30, 2**30), strides=(0, 0))
    refused(folder, "is damaged .* more values than its storage")
    write_pickled(file, "other", vectors(6))
    refused(folder, r"holds \['other'\] and no tensor 'prompt_embeddings'")
    trace = tmp_path / "executed"
    call = b"cbuiltins\nopen\n(X" + len(str(trace)).to_bytes(4, "little") + str(trace).encode()
    write_pickled(file, "prompt_embeddings", vectors(6), functions=[call + b"X\x01\0\0\0wtR0"])
    refused(folder, "'builtins.open', which has no place .* nothing was executed")
    file.write_bytes(pickle.dumps(Trap(trace)))
    refused(folder, "adapter_model.bin was written by torch before 1.6")
    assert not trace.exists()


def filled(folder):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "thesis.tex").write_text("months of work")
    (folder / "checkpoints" / "1").write_text("x")
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("save, other", [(save_prompt, save_peft), (save_peft, save_prompt)])
def test_a_folder_of_other_things_is_never_replaced(tmp_path, save, other):
    prompt, home = Prompt(vectors(), FACTS), filled(tmp_path / "home")
    other(tmp_path / "other", prompt)
    # a stranger's files of the same names: a collection of prompts, an adapter that PEFT wrote
    write_peft(tmp_path / "stranger", vectors(), peft_type="LORA")
    (tmp_path / "stranger" / "prompt.json").write_text('{"system": "You are"}')
    (tmp_path / "link").symlink_to("home")
    for name in ("home", "other", "stranger", "link"):
        before = contents(tmp_path / name)
        with pytest.raises(UserError, match="holds other things .* name a new or an empty"):
            save(tmp_path / name, prompt)
        assert contents(tmp_path / name) == before and before
    assert sorted(os.listdir(tmp_path)) == ["home", "link", "other", "stranger"]
    assert contents(home)["thesis.tex"] == b"months of work"


@pytest.mark.parametrize("save", [save_prompt, save_peft])
def test_a_prompt_is_replaced_and_what_was_put_beside_it_stays(tmp_path, save):
    (tmp_path / "p").mkdir()
    for add in (0, 1):
        save(tmp_path / "p", Prompt(vectors() + add, FACTS))
        np.testing.assert_array_equal(load_prompt(tmp_path / "p").vectors, vectors() + add)
    (tmp_path / "p" / "notes.txt").write_text("mine")
    save(tmp_path / "p", Prompt(vectors() + 2, FACTS))
    np.testing.assert_array_equal(load_prompt(tmp_path / "p").vectors, vectors() + 2)
    assert (tmp_path / "p" / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["p"]


def test_an_exported_adapter_is_what_peft_reads(tmp_path):
    save_peft(tmp_path / "a", Prompt(vectors(), FACTS))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    # without the task type PEFT ignores the prompt, with two submodules half of it would be dead
    assert config["task_type"] == "SEQ_2_SEQ_LM" and config["num_transformer_submodules"] == 1
    assert config["num_virtual_tokens"] == 5 and config["token_dim"] == 4
    assert (config["num_layers"], config["num_attention_heads"]) == (2, 3)
    assert config["base_model_name_or_path"] == "some/t5"
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert list(stored) == ["prompt_embeddings"]
    assert load_prompt(tmp_path / "a").vectors.tobytes() == vectors().tobytes()
    save_peft(tmp_path / "b", Prompt(vectors(), {}))
    assert load_prompt(tmp_path / "b").vectors.tobytes() == vectors().tobytes()


@pytest.mark.parametrize(
    ("source", "known"), [("some/t5", True), ("builtin", False), ("m.gguf", False), (None, False)]
)
def test_an_adapter_says_how_its_backbone_is_had(tmp_path, source, known):
    facts = FACTS | {"backbone": FACTS["backbone"] | {"source": source}}
    save_peft(tmp_path / "a", Prompt(vectors(), facts))
    card = (tmp_path / "a" / "README.md").read_text()
    assert ("jp.save_backbone(" in card) != known and "`é: {text}`" in card
    save_peft(tmp_path / "a", Prompt(vectors(), facts), base_model="elsewhere/t5")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "elsewhere/t5"
    assert load_prompt(tmp_path / "a").metadata["backbone"] == {"source": "elsewhere/t5"}


@pytest.mark.skipif(not RELEASED.is_dir(), reason="the released prompts are not at hand")
@pytest.mark.parametrize("name", ["sst2", "mrpc", "rte"])
def test_the_released_prompts_import(name):
    file = RELEASED / f"{name}.npy"
    prompt = load_prompt(file)
    assert prompt.vectors.shape == (100, 768) and prompt.vectors.dtype == np.float32
    assert prompt.vectors.tobytes() == file.read_bytes()[-100 * 768 * 4 :]


def test_weights_beside_a_prompt_stay(tmp_path):
    """A prompt that is saved again replaces its own files, not those of others with its ending."""
    prompt = Prompt(np.zeros((2, 4), np.float32), {})
    save_prompt(tmp_path / "prompt", prompt)
    others = ("model.safetensors", "backup.safetensors", "model-00001-of-00002.safetensors")
    for name in others:
        (tmp_path / "prompt" / name).write_text("mine")
    save_prompt(tmp_path / "prompt", prompt)
    assert all((tmp_path / "prompt" / name).read_text() == "mine" for name in others)


def test_facts_is_the_old_name_of_metadata(saved):
    prompt = load_prompt(saved)
    with pytest.warns(DeprecationWarning, match="Prompt.facts is now Prompt.metadata"):
        assert prompt.facts is prompt.metadata


@pytest.mark.no_type_check
@pytest.mark.parametrize("use", [save_prompt, save_peft])
def test_a_path_that_is_none_is_refused(tmp_path, monkeypatch, use):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="None is not the name of a file; give text or a pathlib"):
        use(None, Prompt(vectors(), {}))
    assert not os.listdir(tmp_path)
