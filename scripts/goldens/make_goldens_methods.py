"""Make tests/parity/goldens_methods: adapters of PEFT and of AdapterHub, and what they compute.

Needs torch and one of two libraries (never dependencies of the package itself). They ask for
different versions of transformers, so each has an environment of its own:

    pip install torch peft==0.21.2 transformers==5.24.0
    python scripts/goldens/make_goldens_methods.py peft

    pip install torch adapters==1.3.0
    python scripts/goldens/make_goldens_methods.py adapterhub

The base models and their inputs are those of goldens/ and goldens_causal/. Each folder has what
the library saves for an adapter with random weights, without PEFT's README.md, and golden.npz:

    logits [B,T,V]       of the target tokens, 0 where a row has none
    gradient/NAME        of the cross-entropy summed over the target tokens. NAME is that of the
                         tensor in the adapter's file, or else of a trained parameter
    value/NAME           parameters that are trained but not saved: networks that make a prompt
    task_ids [B]         of multitask prompt tuning

Where AdapterHub has prefixes, golden_before.npz is the same with another relative position bias:
that of prefixes as tokens before the text. AdapterHub itself counts the positions of keys from the
start of the prefix and those of queries from the start of the text. So its bias takes every key of
the text for one that is as many places further to the right as the prefix is long.

Rows have several lengths. They are padded on the right, with an attention mask; a decoder-only
model reads input and target as one sequence. provenance.json has the base model of each folder,
the versions of the libraries, and the errors of what does not run.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers

PARITY = Path(__file__).parents[2] / "tests" / "parity"
SEED, PROMPT, NAME = 24, 5, "task"
T5, T5_GATED, MT5 = "goldens/t5_1_0", "goldens/t5_1_1", "goldens/mt5"
LLAMA, QWEN2 = "goldens_causal/llama", "goldens_causal/qwen2"
PACKAGES = {"peft": ("peft", "transformers"), "adapterhub": ("adapters", "transformers")}


class Case(NamedTuple):
    """A base model, an adapter's configuration, and options of saving that AdapterHub has."""

    base: str
    config: object
    safetensors: bool = False
    head: bool = False


class Batch(NamedTuple):
    """What a model reads, and where the logits of the targets are."""

    arguments: dict[str, torch.Tensor]
    targets: torch.Tensor  # [B, T]
    valid: torch.Tensor  # [B, T] bool
    first: torch.Tensor | None  # [B], of the logits that a decoder-only model gives; None for T5


class Tuned(NamedTuple):
    """A model with an adapter, and how its parameters are called in the adapter's file."""

    model: torch.nn.Module
    trained: dict[str, torch.nn.Parameter]
    save: Callable[[Path], None]
    load: Callable[[Path], torch.nn.Module]  # into another model
    makes: tuple[str, torch.nn.Module] | None = None  # a network whose output is saved as a tensor
    arguments: dict[str, torch.Tensor | None] = {}  # of the model, besides those of a batch


def is_causal(base: str) -> bool:
    return base.startswith("goldens_causal")


def load_base(base: str) -> torch.nn.Module:
    """The frozen model; it computes what its own golden says."""
    config = json.loads((PARITY / base / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model = kind.from_pretrained(base, attn_implementation="eager").eval()
    model.requires_grad_(False)
    batch, golden = batch_of(base), np.load(PARITY / base / "golden.npz")
    logits = target_logits(model, batch)
    np.testing.assert_allclose(
        logits[batch.valid], golden["logits"][batch.valid], rtol=0, atol=2e-5 * logits.abs().max()
    )
    return model


def batch_of(base: str) -> Batch:
    with np.load(PARITY / base / "golden.npz") as file:
        golden = {name: torch.from_numpy(file[name]).long() for name in ("inputs", "targets")}
        inputs, targets = golden["inputs"], golden["targets"]
        if not is_causal(base):
            ids = {
                "input_ids": inputs,
                "attention_mask": torch.from_numpy(file["mask"]).long(),
                "decoder_input_ids": torch.from_numpy(file["decoder_inputs"]).long(),
            }
            return Batch(ids, targets, targets > 0, None)
    lengths = (inputs >= 0).sum(1)
    rows = torch.nn.utils.rnn.pad_sequence(
        [torch.cat([i[i >= 0], t[t >= 0]]) for i, t in zip(inputs, targets, strict=True)],
        batch_first=True,
        padding_value=-1,
    )
    ids = {"input_ids": rows.clamp(min=0), "attention_mask": (rows >= 0).long()}
    return Batch(ids, targets, targets >= 0, lengths - 1)


def target_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits of the target tokens [B, T, V], 0 where a row has none."""
    logits = model(**batch.arguments).logits
    if batch.first is not None:
        prompt = logits.shape[1] - batch.arguments["input_ids"].shape[1]
        at = prompt + batch.first[:, None] + torch.arange(batch.targets.shape[1])
        at = at.clamp(max=logits.shape[1] - 1)
        logits = logits[torch.arange(len(at))[:, None], at]
    return logits * batch.valid[..., None]


def arguments_of(tuned: Tuned, base: str) -> Batch:
    batch = batch_of(base)
    return batch._replace(arguments=batch.arguments | tuned.arguments)


def golden_of(tuned: Tuned, base: str) -> dict[str, np.ndarray]:
    """The arrays of golden.npz."""
    made: list[torch.Tensor] = []
    for parameter in tuned.trained.values():
        parameter.grad = None
    if tuned.makes is not None:
        name, network = tuned.makes

        def keep(module, inputs, output):
            output.retain_grad()
            made.append(output)

        hook = network.register_forward_hook(keep)
    batch = arguments_of(tuned, base)
    logits = target_logits(tuned.model, batch)
    torch.nn.functional.cross_entropy(
        logits[batch.valid], batch.targets[batch.valid], reduction="sum"
    ).backward()
    values = {"logits": logits}
    if "task_ids" in tuned.arguments:
        values["task_ids"] = tuned.arguments["task_ids"]
    gradients = {key: parameter.grad for key, parameter in tuned.trained.items()}
    if tuned.makes is not None:
        hook.remove()
        (output,) = made
        gradients[name] = output.grad.sum(0)  # each row of a batch has a copy of the prompt
        values |= {f"value/{key}": parameter for key, parameter in tuned.trained.items()}
    values |= {f"gradient/{key}": value for key, value in gradients.items()}
    return {key: value.detach().numpy() for key, value in values.items()}


def randomize(trained: dict[str, torch.nn.Parameter], scale_of: Callable[[str], float]) -> None:
    """Random values around 1 for scales and norms, else around 0."""
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in sorted(trained.items()):
        scale = scale_of(name)
        mean = 1.0 if scale < 0 else 0.0
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = mean + abs(scale) * noise


# Standard deviations of random values by the end of a name; below 0 is around 1
PEFT_SCALES = {
    "lora_A.weight": 0.3,
    "lora_B.weight": 0.2,
    "lora_magnitude_vector": -0.3,
    "ia3_l": -0.5,
    "ln_tuning_layers.weight": -0.3,
    "prompt_embeddings": 1.0,
    "prefix_task_cols": 1.0,
    "prefix_task_rows": 1.0,
    "embedding.weight": 1.0,
    "weight": 0.3,
    "bias": 0.2,
    "": 0.3,  # an LSTM's
}


def peft_cases() -> dict[str, Case]:
    """Name of a folder -> what is made there."""
    import peft

    def case(kind, base, **options):
        return Case(base, kind(task_type=task_of(base), **options))

    lora, ia3, norms = peft.LoraConfig, peft.IA3Config, peft.LNTuningConfig
    patterns = {
        "rank_pattern": {r"encoder.block.0.layer.0.SelfAttention.q": 5, "wo": 2},
        "alpha_pattern": {"wo": 5, r"decoder.block.1.layer.1.EncDecAttention.v": 1},
    }
    linear = {"target_modules": "all-linear"}
    return {
        "lora_t5": case(lora, T5, r=4, lora_alpha=6),
        "lora_linear_t5": case(lora, T5, r=2, lora_alpha=5, use_rslora=True, **linear),
        "lora_linear_t5_gated": case(lora, T5_GATED, r=2, lora_alpha=5, **linear),
        "lora_patterns_t5_gated": case(
            lora, T5_GATED, r=3, lora_alpha=4, target_modules=["q", "v", "wo"], **patterns
        ),
        "lora_llama": case(lora, LLAMA, r=4, lora_alpha=6),
        "lora_linear_llama": case(lora, LLAMA, r=3, lora_alpha=1, use_rslora=True, **linear),
        "lora_linear_qwen2": case(lora, QWEN2, r=2, lora_alpha=4, **linear),
        "dora_t5_gated": case(lora, T5_GATED, r=2, use_dora=True),
        "ia3_t5": case(ia3, T5),
        "ia3_t5_gated": case(ia3, T5_GATED),
        "ia3_mt5": case(ia3, MT5),
        "ia3_llama": case(ia3, LLAMA),
        "ia3_qwen2": case(ia3, QWEN2),
        "norms_t5": case(norms, T5),
        "norms_llama": case(norms, LLAMA),
        **prompt_cases(case),
    }


def prompt_cases(case: Callable[..., Case]) -> dict[str, Case]:
    """The cases of PEFT that have virtual tokens."""
    import peft

    lstm = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 4}
    mlp = {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 12}
    projected = {"prefix_projection": True, "encoder_hidden_size": 8}
    heads = {"num_attention_heads": 3}  # PEFT takes a head for d_model / heads, so d_kv is told
    length = {"num_virtual_tokens": PROMPT}
    p_tuning, prefix = peft.PromptEncoderConfig, peft.PrefixTuningConfig
    mpt = peft.MultitaskPromptTuningConfig
    return {
        "prompt_t5": case(peft.PromptTuningConfig, T5, **length),
        "p_tuning_mlp_t5_gated": case(p_tuning, T5_GATED, **length, **mlp),
        "p_tuning_lstm_t5": case(p_tuning, T5, **length, **lstm),
        "p_tuning_mlp_llama": case(p_tuning, LLAMA, **length, **mlp),
        "p_tuning_lstm_llama": case(p_tuning, LLAMA, **length, **lstm),
        "multitask_t5": case(
            mpt, T5, num_tasks=3, num_ranks=2, num_transformer_submodules=1, **length
        ),
        "multitask_llama": case(mpt, LLAMA, num_tasks=3, **length),
        "prefix_llama": case(prefix, LLAMA, **length),
        "prefix_mlp_llama": case(prefix, LLAMA, **length, **projected),
        "prefix_t5": case(prefix, T5, token_dim=18, **heads, **length),
        "prefix_default_t5": case(prefix, T5, **length),
        "prefix_mlp_t5_gated": case(prefix, T5_GATED, token_dim=24, **heads, **length, **projected),
    }


def task_of(base: str) -> str:
    return "CAUSAL_LM" if is_causal(base) else "SEQ_2_SEQ_LM"


def tuned_by_peft(case: Case) -> Tuned:
    import peft

    config = case.config
    model = peft.get_peft_model(load_base(case.base), config).eval()
    trained = {
        name.replace(".default", "")
        .removeprefix("prompt_encoder.")
        .replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        (folder / "README.md").unlink()

    def load(folder: Path) -> torch.nn.Module:
        return peft.PeftModel.from_pretrained(load_base(case.base), str(folder)).eval()

    makes, arguments, kind = None, {}, config.peft_type
    if kind == "P_TUNING" or (kind == "PREFIX_TUNING" and config.prefix_projection):
        makes = "prompt_embeddings", model.prompt_encoder["default"]
    elif config.is_prompt_learning:
        trained["prompt_embeddings"] = trained.pop("embedding.weight")
    if kind == "MULTITASK_PROMPT_TUNING":
        arguments["task_ids"] = torch.tensor([2, 0, 1])
        if not is_causal(case.base):  # PEFT makes the decoder's inputs of the labels
            targets = batch_of(case.base).targets
            arguments |= {"labels": targets.masked_fill(targets == 0, -100)}
            arguments |= {"decoder_input_ids": None}
    randomize(trained, scale_in(PEFT_SCALES))
    return Tuned(model, trained, save, load, makes, arguments)


def scale_in(scales: dict[str, float]) -> Callable[[str], float]:
    """The scale of the first end of a name that is listed."""
    return lambda name: next(scale for end, scale in scales.items() if name.endswith(end))


ADAPTERHUB_SCALES = {
    "wte.weight": 1.0,
    "control_trans": 0.7,
    "control_trans.2.weight": 0.3,
    "lora_A": 0.3,
    "scaling": -0.3,
    "bias": 0.2,
    "": 0.2,  # lora_B and the weights of bottlenecks
}
# some below 0, for which it matters whether a relu comes before or after the scale
IA3_SCALES = {"lora_B": -0.6}


def adapterhub_cases() -> dict[str, Case]:
    """Name of a folder -> what is made there."""
    import adapters

    double, prefix = adapters.DoubleSeqBnConfig, adapters.PrefixTuningConfig
    few = adapters.SeqBnConfig(reduction_factor={"default": 6, "0": 3, "4": 8}, leave_out=[1])
    linear = adapters.LoRAConfig(
        r=2, alpha=5, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True
    )
    learned = adapters.ParBnConfig(reduction_factor=4, scaling="learned")
    flat = prefix(flat=True, prefix_length=PROMPT)
    in_safetensors = {"safetensors": True}
    return {
        "seq_bn_t5": Case(T5, adapters.SeqBnConfig(reduction_factor=6), head=True),
        "seq_bn_t5_gated": Case(
            T5_GATED, adapters.SeqBnConfig(reduction_factor=4), head=True, **in_safetensors
        ),
        "seq_bn_few_t5": Case(T5, few),
        "double_seq_bn_t5": Case(T5, double(reduction_factor=6)),
        "double_seq_bn_cross_t5_gated": Case(
            T5_GATED, double(reduction_factor=4, cross_adapter=True), **in_safetensors
        ),
        "par_bn_t5": Case(T5, adapters.ParBnConfig(reduction_factor=4)),
        "par_bn_learned_t5_gated": Case(T5_GATED, learned, **in_safetensors),
        "lora_t5": Case(T5, adapters.LoRAConfig(r=4, alpha=6)),
        "lora_linear_t5_gated": Case(T5_GATED, linear, **in_safetensors),
        "ia3_t5": Case(T5, adapters.IA3Config()),
        "ia3_t5_gated": Case(T5_GATED, adapters.IA3Config(), **in_safetensors),
        "prefix_flat_t5": Case(T5, flat, head=True),
        "prefix_flat_t5_gated": Case(T5_GATED, flat),
        "prefix_safetensors_t5": Case(T5, flat, **in_safetensors),
        "prefix_mlp_t5": Case(T5, prefix(prefix_length=PROMPT, bottleneck_size=7)),
        "seq_bn_llama": Case(LLAMA, adapters.SeqBnConfig(reduction_factor=6)),
        "lora_llama": Case(LLAMA, adapters.LoRAConfig(r=4, alpha=6)),
    }


def tuned_by_adapterhub(case: Case) -> Tuned:
    import adapters

    model = load_base(case.base)
    adapters.init(model)
    model.add_adapter(NAME, config=case.config)
    model.train_adapter(NAME)
    model.eval()
    trained = {
        re.sub(r".*\.pool\.", "prefix_tuning.", name): value  # each attention has the same pool
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    is_ia3 = isinstance(case.config, adapters.IA3Config)
    randomize(trained, scale_in(IA3_SCALES if is_ia3 else ADAPTERHUB_SCALES))

    def save(folder: Path) -> None:
        model.save_adapter(str(folder), NAME, with_head=case.head, use_safetensors=case.safetensors)

    def load(folder: Path) -> torch.nn.Module:
        other = load_base(case.base)
        adapters.init(other)
        other.load_adapter(str(folder), set_active=True, use_safetensors=case.safetensors)
        return other.eval()

    return Tuned(model, trained, save, load)


LIBRARIES = {
    "peft": (peft_cases, tuned_by_peft),
    "adapterhub": (adapterhub_cases, tuned_by_adapterhub),
}


def prefixes_before_the_text(make_bias: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """T5's ``compute_bias`` with the positions of keys counted from the text on."""

    def compute_bias(self, query_length, key_length, device=None, cache_position=None):
        moved = cache_position + key_length - query_length
        return make_bias(self, query_length, key_length, device, moved)

    return compute_bias


def make(folder: Path, tuned: Tuned, base: str) -> None:
    """Write the folder of a case. The library reads the adapter again and computes the same."""
    folder.mkdir(parents=True)
    tuned.save(folder)
    values = golden_of(tuned, base)
    np.savez_compressed(folder / "golden.npz", **values)
    batch = arguments_of(tuned, base)
    with torch.no_grad():
        logits = target_logits(tuned.load(folder), batch)
    np.testing.assert_allclose(logits, values["logits"], rtol=0, atol=1e-5 * logits.abs().max())
    if folder.name.startswith("prefix") and folder.parent.name == "adapterhub":
        t5 = transformers.models.t5.modeling_t5.T5Attention
        with unittest.mock.patch.object(
            t5, "compute_bias", prefixes_before_the_text(t5.compute_bias)
        ):
            np.savez_compressed(folder / "golden_before.npz", **golden_of(tuned, base))
    with np.load(PARITY / base / "golden.npz") as file:
        before = file["logits"]
    change = np.abs((values["logits"] - before)[batch.valid]).max() / np.abs(before).max()
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder.name}: {size / 1e3:.0f} kB, logits change by {change:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("library", choices=sorted(LIBRARIES))
    parser.add_argument("cases", nargs="*", help="only these; then provenance.json stays")
    arguments = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # PEFT writes sets in the order of their hashes
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    script = Path(__file__).resolve()
    os.chdir(PARITY)  # the paths of base models, which adapters have, are relative
    torch.set_num_threads(1)
    cases, tune = LIBRARIES[arguments.library]
    bases, errors = {}, {}
    out = PARITY / "goldens_methods" / arguments.library
    for name, case in cases().items():
        if arguments.cases and name not in arguments.cases:
            continue
        shutil.rmtree(out / name, ignore_errors=True)
        try:
            make(out / name, tune(case), case.base)
            bases[name] = case.base
        except (ValueError, RuntimeError) as error:
            shutil.rmtree(out / name, ignore_errors=True)
            text = " ".join(str(error).split())[:300]
            errors[name] = {"base": case.base, "error": f"{type(error).__name__}: {text}"}
            print(f"{name}: {errors[name]['error']}")
    packages = ("torch", "safetensors", "numpy", *PACKAGES[arguments.library])
    provenance = {
        "script": f"scripts/goldens/{script.name}",
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "seed": SEED,
        "bases": bases,
        "errors": errors,
    }
    if not arguments.cases:
        (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    main()
