"""Adapters of PEFT and AdapterHub: what is refused, and by which sentence. Goldens: parity/."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import CONFIG
from safetensors.numpy import load_file, save_file

from jaxprompt.config.errors import UserError
from jaxprompt.inference.session import check_pair
from jaxprompt.methods.artefact import (
    Prompt,
    fitted,
    load_prompt,
    save_adapterhub,
    save_peft,
    save_prompt,
)
from jaxprompt.methods.layers import to_tensors
from jaxprompt.models import registry
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.injection import Adapter, LowRank, Prefix, Projection

LLAMA = DecoderConfig(
    vocab_size=32, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24, num_layers=2
)


def make_backbone(config) -> Backbone:
    model, rng = registry.model_for(config), np.random.default_rng(0)
    shapes = model.abstract_params()
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    return Backbone(model, params, "tiny", "0", "tiny")


@pytest.fixture(scope="module")
def t5():
    return make_backbone(CONFIG)


@pytest.fixture(scope="module")
def llama():
    return make_backbone(LLAMA)


def random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


Q = [
    f"{stack}.block.{layer}.layer.{number}.{module}.q"
    for stack, number, module in (
        ("encoder", 0, "SelfAttention"), ("decoder", 0, "SelfAttention"),
        ("decoder", 1, "EncDecAttention"),
    )
    for layer in range(2)
]  # fmt: skip


def lora_tensors(rank=2):
    tensors = {}
    for module in Q:
        tensors[f"base_model.model.{module}.lora_A.weight"] = random(rank, 16)
        tensors[f"base_model.model.{module}.lora_B.weight"] = random(8, rank)
    return tensors


def write_adapter(folder, config, tensors, name="adapter_model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / name)
    return folder


def lora(folder, tensors=None, **config):
    known = {
        "peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "r": 2, "lora_alpha": 3, "bias": "none",
        "base_model_name_or_path": "some/t5", "target_modules": ["q"], "use_dora": False,
        "layer_replication": None, "loftq_config": {},
    }  # fmt: skip
    return write_adapter(folder, known | config, lora_tensors() if tensors is None else tensors)


def refused(path, backbone, message):
    with pytest.raises(UserError, match=message) as caught:
        load_prompt(path, backbone)
    assert "\n" not in str(caught.value)


def same(first, second):
    leaves = [to_tensors(prompt.layers) for prompt in (first, second)]
    assert leaves[0][0].keys() == leaves[1][0].keys() and leaves[0][1] == leaves[1][1]
    for name, tensor in leaves[0][0].items():
        np.testing.assert_array_equal(tensor, leaves[1][0][name], err_msg=name)


def test_a_low_rank_change_is_the_product_that_peft_adds(tmp_path, t5):
    prompt = load_prompt(lora(tmp_path / "a"), t5)
    low_rank = prompt.layers["decoder"]["layers"]["cross_attention"]["query"].low_rank
    tensors = lora_tensors()
    for layer, module in enumerate(Q[4:]):
        a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        ours = low_rank.a[layer] @ low_rank.b[layer].reshape(2, 8)
        np.testing.assert_allclose(ours, 1.5 * (b @ a).T, rtol=1e-5)
    assert prompt.metadata["method"] == "lora" and prompt.vectors.shape == (0, 16)
    check_pair(prompt, t5)


def test_an_adapter_waits_for_its_backbone(tmp_path, t5):
    prompt = load_prompt(lora(tmp_path / "a"))
    assert prompt.layers is None and prompt.metadata["backbone"] == {"source": "some/t5"}
    for use in (lambda: prompt.injection, lambda: save_prompt(tmp_path / "p", prompt)):
        with pytest.raises(UserError, match="says nothing of the heads .*; name the backbone"):
            use()
    same(fitted(prompt, t5), load_prompt(tmp_path / "a", t5))
    save_prompt(tmp_path / "p", fitted(prompt, t5))
    same(fitted(prompt, t5), load_prompt(tmp_path / "p"))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"use_dora": True}, "lacks the tensor .*lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save \['lm_head'\], which cannot"),
        ({"bias": "lora_only"}, "has bias 'lora_only': it trained biases"),
        ({"lora_bias": True}, "has lora_bias True"),
        ({"layer_replication": [[0, 1]]}, "has layer_replication"),
        ({"trainable_token_indices": [3]}, "has trainable_token_indices"),
        ({"use_qalora": True}, "has use_qalora True"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which also changes the frozen"),
        ({"something_new": 1}, "has something_new 1, which cannot be represented"),
        ({"r": 3}, "of rank 2 and its config says 3"),
        ({"r": "2"}, "has r '2' and lora_alpha 3"),
        ({"rank_pattern": {"(": 2}}, "which is no regular expression"),
        ({"target_modules": ["q", "v"]}, "lacks .*SelfAttention.v.* which its config names"),
        ({"target_modules": r".*Attention\.(q|o)"}, "lacks .*Attention.o"),
        ({"task_type": 3}, "'peft.task_type' is 3, no text"),
    ],
)
def test_settings_that_cannot_be_represented_are_named(tmp_path, t5, config, message):
    refused(lora(tmp_path / "a", **config), t5, message)


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        (f"base_model.model.{Q[0]}.lora_magnitude_vector", random(8), "this is DoRA"),
        ("base_model.model.shared.lora_embedding_A", random(2, 9), "this is LoRA of an embedding"),
        ("base_model.model.lm_head.modules_to_save.weight", random(2, 9), "trained as a whole"),
        (f"base_model.model.{Q[0]}.base_layer.bias", random(8), "this is a bias"),
        (f"base_model.model.{Q[0]}.lora_A.weight", random(2, 17), r"\[2, 17\] and tiny needs"),
        (f"base_model.model.{Q[0]}.lora_A.weight", random(2), r"shape \[2\], which is no matrix"),
        (f"base_model.model.{Q[0]}.lora_B.weight", random(9, 2), r"shape \[9, 2\] and tiny needs"),
        (f"base_model.model.{Q[0]}.lora_B.weight", None, "lacks the tensor"),
        (f"base_model.model.{Q[0]}.lora_B.weight", np.full((8, 2), np.nan), "not finite"),
        ("base_model.model.encoder.block.2.layer.0.SelfAttention.q.lora_A.weight", random(2, 16),
         "'encoder.block.2.layer.0.SelfAttention.q', and tiny has no such module"),
        ("base_model.model.shared.lora_A.weight", random(2, 16), "changes 'shared'; only weights"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_belong_are_named(tmp_path, t5, name, tensor, message):
    tensors = lora_tensors()
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    refused(lora(tmp_path / "a", tensors), t5, message)


def test_an_adapter_of_another_family_is_refused(tmp_path, llama):
    refused(lora(tmp_path / "a"), llama, "and tiny has no such module; use the backbone")


def test_ranks_and_scales_follow_the_patterns_of_peft(tmp_path, t5):
    tensors = lora_tensors()
    tensors[f"base_model.model.{Q[1]}.lora_A.weight"] = random(5, 16)
    tensors[f"base_model.model.{Q[1]}.lora_B.weight"] = random(8, 5)
    patterns = {"rank_pattern": {Q[1]: 5}, "alpha_pattern": {r"encoder\..*\.q": 10}}
    prompt = load_prompt(lora(tmp_path / "a", tensors, use_rslora=True, **patterns), t5)
    a, b = prompt.layers["encoder"]["layers"]["attention"]["query"].low_rank
    assert a.shape == (2, 16, 5) and not a[0, :, 2:].any() and not b[0, 2:].any()
    for layer, rank in ((0, 2), (1, 5)):
        second = tensors[f"base_model.model.{Q[layer]}.lora_B.weight"]
        np.testing.assert_allclose(
            b[layer, :rank].reshape(rank, 8), 10 / rank**0.5 * second.T, rtol=1e-6
        )
    save_peft(tmp_path / "b", prompt)
    written = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert written[f"base_model.model.{Q[1]}.lora_A.weight"].shape == (5, 16)
    assert written[f"base_model.model.{Q[0]}.lora_A.weight"].shape == (2, 16)
    same(prompt, load_prompt(tmp_path / "b", t5))
    save_peft(tmp_path / "b", prompt)  # replaces what it has written


def changed(layers, **metadata):
    return Prompt(np.zeros((0, 16), np.float32), metadata, layers)


def at_query(change, where="attention"):
    return {"encoder": {"layers": {where: {"query": change}}}}


def test_what_was_trained_here_has_its_own_rank_and_alpha_in_pefts_file(tmp_path, t5):
    a, b = random(2, 16, 2), random(2, 2, 2, 4)
    trained = {"lora": {"rank": 2, "alpha": 6.0, "rank_stabilized": False}}
    prompt = changed(at_query(Projection(LowRank(a, np.float32(3) * b))), config=trained)
    save_peft(tmp_path / "a", prompt, base_model="my/t5")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (2, 6, "SEQ_2_SEQ_LM")
    assert config["target_modules"] == r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.q"
    written = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = f"base_model.model.{Q[1]}.lora_B.weight"
    np.testing.assert_allclose(written[name], b[1].reshape(2, 8).T, rtol=1e-6)
    same(prompt, load_prompt(tmp_path / "a", t5))


SCALES = {"encoder": {"layers": {"attention": {"key": Projection(scale=random(2, 2, 4))}}}}
ADAPTER = Adapter(random(2, 16, 3), random(2, 3), random(2, 3, 16), random(2, 16), "silu", "sum", 2)


@pytest.mark.parametrize(
    "prompt, message",
    [
        (Prompt(random(3, 16), {}, SCALES), "has virtual tokens, IA3, and an adapter of PEFT has"),
        (
            changed(SCALES | {"decoder": {"final_norm": {"scale": random(16)}}}),
            "has IA3, norms, and an adapter of PEFT has one kind of change",
        ),
        (changed(at_query(Projection(bias=random(2, 2, 4)))), "has biases, which PEFT has only"),
        (
            changed({"decoder": {"layers": {"mlp_adapter": ADAPTER}}}),
            "has adapters, which PEFT does not have; .*save_adapterhub",
        ),
        (
            changed({"encoder": {"layers": {"attention": {
                "prefix": Prefix(random(2, 3, 2, 4), random(2, 3, 2, 4))}}}}),
            "has prefixes, which PEFT has for decoder-only models alone",
        ),
        (
            changed({"encoder": {"final_norm": {"scale": random(16)}}}),
            "PEFT stores the weights of norms as a whole.*give save_peft the backbone",
        ),
        (
            changed({"encoder": {"layers": {"mlp": {
                "hidden": random(2, 24), "wo": Projection(scale=random(2, 16))}}}}),
            "scales both what 'encoder/layers/mlp/wo' reads and what it gives",
        ),
    ],
)  # fmt: skip
def test_what_peft_has_no_form_for_is_named(tmp_path, prompt, message):
    with pytest.raises(UserError, match=message):
        save_peft(tmp_path / "a", prompt)
    assert not (tmp_path / "a").exists()


def test_scales_of_results_and_of_inputs_come_back_to_the_bit(tmp_path, t5):
    mlp = {"mlp": {"hidden": random(2, 24), "wi_1": Projection(scale=random(2, 24))}}
    layers = {"encoder": {"layers": SCALES["encoder"]["layers"] | mlp}}
    save_peft(tmp_path / "a", changed(layers))
    first = load_prompt(tmp_path / "a", t5)
    save_peft(tmp_path / "b", first)
    same(first, load_prompt(tmp_path / "b", t5))
    for name, tensor in to_tensors(layers)[0].items():
        np.testing.assert_allclose(to_tensors(first.layers)[0][name], tensor, atol=1e-6)


def test_a_prefix_of_a_decoder_is_in_rows_of_keys_and_values(tmp_path, llama, t5):
    prefix = Prefix(random(2, 3, 2, 4), random(2, 3, 2, 4) + 1)
    prompt = changed({"layers": {"attention": {"prefix": prefix}}})
    save_peft(tmp_path / "a", prompt)
    rows = load_file(tmp_path / "a" / "adapter_model.safetensors")["prompt_embeddings"]
    np.testing.assert_array_equal(rows[1].reshape(4, 2, 4)[2], prefix.key[1, 1])
    np.testing.assert_array_equal(rows[2].reshape(4, 2, 4)[1], prefix.value[0, 2])
    same(prompt, load_prompt(tmp_path / "a", llama))
    refused(tmp_path / "a", t5, "num_transformer_submodules 1: on a T5 PEFT then lets the prefix")


def test_each_task_of_a_multitask_prompt_is_a_prompt(tmp_path):
    tensors = {
        "prompt_embeddings": random(3, 16),
        "prefix_task_cols": random(2, 3, 1),
        "prefix_task_rows": random(2, 1, 16),
    }
    config = {
        "peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 3, "num_tasks": 2,
        "num_transformer_submodules": 1, "num_ranks": 1,
    }  # fmt: skip
    folder = write_adapter(tmp_path / "a", config, tensors)
    scale = tensors["prefix_task_cols"][1] @ tensors["prefix_task_rows"][1]
    np.testing.assert_array_equal(
        load_prompt(f"{folder}#1").vectors, tensors["prompt_embeddings"] * scale
    )
    refused(folder, None, "has prompts of 2 tasks; name one by its number, as in '.*a#0'")
    refused(f"{folder}#2", None, "has tasks 0 to 1 and none of number 2")
    refused(f"{lora(tmp_path / 'b')}#1", None, "is LORA and has no tasks")
    write_adapter(folder, config | {"num_transformer_submodules": 2}, tensors)
    refused(f"{folder}#1", None, "num_transformer_submodules 2")


def bottleneck(folder, tensors=None, settings=(), **whole):
    """What ``seq_bn`` of AdapterHub is on disk."""
    made = {}
    for stack, number in (("encoder", 1), ("decoder", 2)):
        for layer in range(2):
            start = f"transformer.{stack}.block.{layer}.layer.{number}.adapters.mine."
            made[start + "adapter_down.0.weight"] = random(3, 16)
            made[start + "adapter_down.0.bias"] = random(3)
            made[start + "adapter_up.weight"] = random(16, 3)
            made[start + "adapter_up.bias"] = random(16)
    config = {
        "mh_adapter": False, "output_adapter": True, "reduction_factor": 5, "leave_out": [],
        "non_linearity": "relu", "original_ln_before": True, "original_ln_after": True,
        "is_parallel": False, "scaling": 1.0, "phm_layer": False, "phm_dim": 4,
    } | dict(settings)  # fmt: skip
    known = {"config": config, "name": "mine", "model_name": "some/t5", "version": "adapters.1.3.0"}
    return write_adapter(folder, known | whole, (tensors or {}) | made, "adapter.safetensors")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"phm_layer": True}, "has phm_layer True, which cannot be represented"),
        ({"use_gating": True}, "has use_gating True"),
        ({"stochastic_depth": 0.1}, "has stochastic_depth 0.1"),
        ({"ln_before": True}, "has ln_before True"),
        ({"inv_adapter": "nice"}, "has inv_adapter 'nice'"),
        ({"original_ln_after": False}, "has original_ln_after False"),
        ({"residual_before_ln": "post_add"}, "has residual_before_ln 'post_add'"),
        ({"non_linearity": "tanh"}, "has non_linearity 'tanh'; this version has relu"),
        ({"scaling": "odd"}, "has scaling 'odd'"),
        ({"architecture": "prefix_tuning"}, "is prefix_tuning: AdapterHub counts the positions"),
        ({"architecture": "reft"}, "is of architecture 'reft'; this version reads"),
        ({"architecture": "lora", "composition_mode": "add", "use_dora": True}, "has use_dora"),
    ],
)
def test_settings_of_adapterhub_that_cannot_be_represented_are_named(
    tmp_path, t5, settings, message
):
    refused(bottleneck(tmp_path / "a", settings=settings), t5, message)


def test_tensors_of_adapterhub_that_do_not_belong_are_named(tmp_path, t5):
    start = "encoder.block.0.layer.1.adapters.mine."
    refused(
        bottleneck(tmp_path / "a", {start + "gate.weight": random(1, 16)}), t5, "this is a gate"
    )
    refused(bottleneck(tmp_path / "a", name="yours"), t5, "holds .* not known here")
    folder = bottleneck(tmp_path / "b")
    save_file({"heads.mine.weight": random(2, 2)}, folder / "model_head.safetensors")
    refused(folder, t5, "'?heads.mine.weight'?: this is a head that was trained")
    head = {"lm_head.weight": np.ascontiguousarray(t5.params["head"].T)}
    save_file(head, folder / "model_head.safetensors")
    load_prompt(folder, t5)
    save_file({"lm_head.weight": head["lm_head.weight"] + 1}, folder / "model_head.safetensors")
    refused(folder, t5, "lm_head.weight: this is a head that was trained")


def test_layers_that_are_left_out_are_as_they_were(tmp_path, t5):
    folder = bottleneck(tmp_path / "a", settings={"leave_out": [0, 3]})
    tensors = {
        name: tensor
        for name, tensor in load_file(folder / "adapter.safetensors").items()
        if "encoder.block.0" not in name and "decoder.block.1" not in name
    }
    save_file(tensors, folder / "adapter.safetensors")
    adapter = load_prompt(folder, t5).layers["decoder"]["layers"]["mlp_adapter"]
    assert not adapter.up[1].any() and not adapter.up_bias[1].any() and adapter.up[0].any()
    config = json.loads((folder / "adapter_config.json").read_text())
    config["config"]["leave_out"] = [0]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    refused(folder, t5, "lacks layers 1 of 'decoder/layers/mlp_adapter/down'")


@pytest.mark.parametrize("version, scale", [("adapters.1.0.1", 1), ("adapters.1.1.0", 2)])
def test_lora_of_adapterhub_before_its_mended_scale_has_none(tmp_path, t5, version, scale):
    tensors = {}
    for module in Q:
        tensors[f"{module}.loras.mine.lora_A"] = random(2, 16)
        tensors[f"{module}.loras.mine.lora_B"] = random(8, 2)
    config = {"architecture": "lora", "composition_mode": "add", "r": 2, "alpha": 4}
    whole = {"config": config, "name": "mine", "version": version}
    folder = write_adapter(tmp_path / "a", whole, tensors, "adapter.safetensors")
    factors = load_prompt(folder, t5).layers["encoder"]["layers"]["attention"]["query"].low_rank
    np.testing.assert_allclose(factors.b[0].reshape(2, 8), scale * random(8, 2).T, rtol=1e-6)


@pytest.mark.parametrize(
    "reads, config", [("sum", (True, False)), ("output", (False, False)), ("input", (False, True))]
)
def test_bottlenecks_are_written_for_adapterhub(tmp_path, t5, reads, config):
    adapter = replace(ADAPTER, reads=reads)
    layers = {stack: {"layers": {"mlp_adapter": adapter}} for stack in ("encoder", "decoder")}
    save_adapterhub(tmp_path / "a", changed(layers, task={"name": "a.b"}))
    save_adapterhub(tmp_path / "a", changed(layers, task={"name": "a.b"}))
    whole = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    inner = whole["config"]
    assert whole["name"] == "a_b" and 16 // inner["reduction_factor"] == 3
    assert (inner["original_ln_before"], inner["is_parallel"]) == config
    same(changed(layers), load_prompt(tmp_path / "a", t5))


@pytest.mark.parametrize(
    "prompt, message",
    [
        (changed({"encoder": {"layers": {"mlp_adapter": ADAPTER}}}), "Only the encoder has mlp"),
        (changed(SCALES), "does not change decoder.*and AdapterHub changes all weights"),
        (Prompt(random(3, 16), {}), "has virtual tokens, and only .* LoRA or IA3 alone"),
        (changed({"layers": {"mlp_adapter": replace(ADAPTER, reads="normed")}}), "behind the norm"),
    ],
)  # fmt: skip
def test_what_adapterhub_has_no_form_for_is_named(tmp_path, prompt, message):
    with pytest.raises(UserError, match=message):
        save_adapterhub(tmp_path / "a", prompt)
    assert not (tmp_path / "a").exists()
