"""Prompts on disk: a directory with vectors, facts and a model card. No pickle, ever.

Also reads what others write: ``.npy`` prompts (such as those released with the paper) and PEFT's
prompt-tuning adapters, and writes the latter.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file, save

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.paths import expanded, looked_in
from jaxprompt.models.checkpoints.hub import only_here
from jaxprompt.models.checkpoints.legacy.torch_pickle import read_torch
from jaxprompt.runtime.files import replace_directory
from jaxprompt.runtime.markdown import plain

FORMAT = 1
TENSORS, FACTS, CARD = "prompt.safetensors", "prompt.json", "README.md"
PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"  # of PEFT before 0.7


class Prompt(NamedTuple):
    """A tuned prompt: float32 vectors and what is known about it (little for foreign files)."""

    vectors: Float[np.ndarray, "P D"]
    facts: dict[str, Any]


def save_prompt(path: str | Path, prompt: Prompt) -> None:
    """Write the artefact: ``prompt.safetensors``, ``prompt.json`` and a model card.

    Raises:
        UserError: ``path`` holds anything but an artefact, the vectors are not finite numbers, or
            the facts are nothing that JSON can say.
    """
    vectors, facts = checked_prompt(prompt)
    facts = {"format": FORMAT, **facts}
    facts["length"], facts["width"] = vectors.shape
    text = _as_json(facts)

    def write(folder: Path) -> None:
        # bytes, so that a full disk is an OSError
        (folder / TENSORS).write_bytes(save({"prompt": np.ascontiguousarray(vectors)}))
        (folder / FACTS).write_bytes(text)
        # what has no UTF-8 form, half a surrogate, is shown as an escape
        (folder / CARD).write_bytes(
            model_card(json.loads(text)).encode("utf-8", "backslashreplace")
        )

    replace_directory(Path(expanded(path)), write, _is_artefact)


def checked_prompt(prompt: Prompt) -> Prompt:
    """A prompt that Python made, checked as one that is read. Raises UserError."""
    if not isinstance(prompt, Prompt):
        raise UserError(f"A prompt is {shown(prompt)}; give a path, or Prompt(vectors, facts).")
    vectors = _checked(np.asarray(prompt.vectors), "The prompt")
    return Prompt(vectors, check_facts(prompt.facts, "The prompt's facts:"))


def _as_json(facts: dict[str, Any]) -> bytes:
    """JSON in UTF-8. Half a surrogate becomes an escape, and is read back as it was."""

    def convert(value: Any) -> Any:
        if isinstance(value, np.generic | np.ndarray):
            return value.tolist()
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        raise TypeError(f"a {type(value).__name__} is not JSON")

    def dump(values: Any) -> str:
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False, default=convert)

    for key, value in facts.items():
        try:
            dump({key: value})
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise UserError(
                f"The prompt's {str(key)[:100]!r} is {shown(value)}, which JSON cannot hold "
                f"({str(error)[:100]}); leave it out of the facts, or make it numbers and text."
            ) from None
    return (dump(facts) + "\n").encode("utf-8", "backslashreplace")


def _is_artefact(folder: Path) -> bool:
    """Whether ``save_prompt`` made a folder, as far as its own files tell."""
    names = {entry.name for entry in folder.iterdir()}
    try:
        facts = _read_json(folder / FACTS)
    except UserError:
        return TENSORS in names and names <= {TENSORS, FACTS, CARD}
    return type(facts.get("format")) is int and (TENSORS in names or "width" in facts)


def load_prompt(path: str | Path) -> Prompt:
    """Read an artefact, a PEFT prompt-tuning adapter, or an ``.npy`` file of shape [P, D]."""
    path = Path(expanded(path))
    if not path.exists():
        raise UserError(
            f"There is no prompt at {shown(str(path))}{looked_in(path)}; give an artefact, adapter "
            "or .npy."
        )
    if path.is_dir() and (path / FACTS).is_file():
        return _read_artefact(path)
    if path.is_dir() and (path / PEFT_CONFIG).is_file():
        return _read_peft(path)
    if path.is_file():
        return Prompt(_checked(_read_npy(path), path), {})
    inner = path / "prompt"  # of a run
    hint = f"; did you mean {str(inner)!r}?" if (inner / FACTS).is_file() else "."
    raise UserError(
        f"{str(path)!r} holds neither {FACTS} nor {PEFT_CONFIG}; it is not a prompt{hint}"
    )


def save_peft(path: str | Path, prompt: Prompt, *, base_model: str | None = None) -> None:
    """Write a PEFT adapter (PROMPT_TUNING) that PEFT loads for the prompt's kind of model.

    Its README.md says what text the adapter expects, and how to get a backbone that only jaxprompt
    knows: ``save_backbone`` writes it as others load it.

    ``num_transformer_submodules`` is 1: with PEFT's default of 2 for T5 half of the rows would be
    dead. PEFT knows no task: an input must end with the task's separator where it has one.

    Args:
        base_model: Where PEFT finds the backbone; by default where it was in training.

    Raises:
        UserError: ``path`` holds anything but an adapter that was written here, or the vectors are
            not finite numbers.
    """
    vectors, facts = checked_prompt(prompt)
    config = _peft_config(vectors.shape, facts)
    if base_model is not None:
        config["base_model_name_or_path"] = base_model
    text = _as_json(config)
    card = adapter_card(facts, config).encode("utf-8", "backslashreplace")

    def write(folder: Path) -> None:
        tensors = {"prompt_embeddings": np.ascontiguousarray(vectors)}
        (folder / PEFT_TENSORS).write_bytes(save(tensors, metadata={"format": "pt"}))
        (folder / PEFT_CONFIG).write_bytes(text)
        (folder / CARD).write_bytes(card)

    replace_directory(Path(expanded(path)), write, _is_our_adapter)


def _peft_config(shape: tuple[int, ...], facts: dict[str, Any]) -> dict[str, Any]:
    backbone = facts.get("backbone") or {}
    return {
        "base_model_name_or_path": backbone.get("source"),
        "inference_mode": True,
        "num_attention_heads": backbone.get("num_heads"),
        "num_layers": backbone.get("num_layers"),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": shape[0],
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "task_type": "CAUSAL_LM" if _decoder_only(facts) else "SEQ_2_SEQ_LM",
        "token_dim": shape[1],
    }


def _is_our_adapter(folder: Path) -> bool:
    """Whether ``save_peft`` made a folder: PEFT itself writes more keys."""
    try:
        found = _read_json(folder / PEFT_CONFIG)
    except UserError:
        return False
    return set(found) == set(_peft_config((0, 0), {}))


def _decoder_only(facts: dict[str, Any]) -> bool:
    """Whether the prompt was tuned on a decoder-only model, as far as is known."""
    recorded = (facts.get("backbone") or {}).get("family")
    kind = (facts.get("peft") or {}).get("task_type")
    return recorded == "decoder-only" or kind == "CAUSAL_LM"


def _read_artefact(path: Path) -> Prompt:
    facts = _read_json(path / FACTS)
    if facts.get("format") != FORMAT:
        raise UserError(
            f"{path / FACTS} has format {shown(facts.get('format'))} and this version reads "
            f"{FORMAT}."
        )
    facts = check_facts(facts, f"{path / FACTS} is damaged:")
    vectors = _checked(_read_safetensors(path / TENSORS, "prompt"), path)
    for key, size in zip(("length", "width"), vectors.shape, strict=True):
        if facts.get(key, size) != size:
            raise UserError(
                f"{path / FACTS} says {key} {facts[key]} and {TENSORS} has {size}; the two files "
                "do not belong together."
            )
    return Prompt(vectors, facts)


# what known facts are, where they are there at all and not null; others may be anything
_KINDS = {
    dict: ("backbone", "task", "peft", "metrics", "config", "versions", "baselines", "test"),
    str: (
        *("method", "backbone.source", "backbone.fingerprint", "backbone.tokenizer"),
        *("backbone.family", "task.name", "task.template", "peft.task_type"),
    ),
    int: (
        *("length", "width", "rows", "step", "seed", "backbone.d_model", "backbone.vocab_size"),
        *("backbone.num_layers", "backbone.num_heads"),
    ),
}
_NAMES = {dict: "object", str: "text", int: "whole number"}


def check_facts(facts: Any, where: str) -> dict[str, Any]:
    """The facts of a prompt without those that are null. Raises UserError for a wrong type."""
    if not isinstance(facts, dict):
        raise UserError(f"{where} {shown(facts)} is no object; give a mapping.")
    kept = {key: value for key, value in facts.items() if value is not None}
    for kind, keys in _KINDS.items():
        for key in keys:
            outer, _, inner = key.partition(".")
            value = kept.get(outer)
            if inner:
                value = value.get(inner) if isinstance(value, dict) else None
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                raise UserError(f"{where} {key!r} is {shown(value)}, no {_NAMES[kind]}.")
    return kept


def _read_peft(path: Path) -> Prompt:
    config = _read_json(path / PEFT_CONFIG)
    kind = config.get("peft_type")
    if kind not in ("PROMPT_TUNING", "P_TUNING"):
        raise UserError(
            f"The adapter {str(path)!r} is {shown(kind)}; prompts are PROMPT_TUNING or P_TUNING."
        )
    name = "prompt_embeddings"
    if (path / PEFT_TENSORS).is_file():
        rows = _checked(_read_safetensors(path / PEFT_TENSORS, name), path)
    elif (path / PEFT_PICKLE).is_file():
        rows = _checked(_read_pickled(path / PEFT_PICKLE, name), path)
    else:
        raise UserError(f"The adapter {str(path)!r} has no {PEFT_TENSORS}; save it again.")
    length = config.get("num_virtual_tokens")
    if type(length) is not int or not 0 < length <= len(rows):
        raise UserError(
            f"{path / PEFT_CONFIG} has num_virtual_tokens {shown(length)} and the adapter holds "
            f"{len(rows)} rows; save it again with PEFT."
        )
    facts = check_facts({"peft": config}, f"{path / PEFT_CONFIG}:")
    if isinstance(config.get("base_model_name_or_path"), str):
        facts["backbone"] = {"source": config["base_model_name_or_path"]}
    # PEFT stores a second half of rows for T5 that it never uses: only the first n count
    return Prompt(rows[:length], facts)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(facts, dict):
        raise UserError(f"{path} must hold a JSON object.")
    return facts


def _read_safetensors(path: Path, name: str) -> np.ndarray:
    try:
        tensors = load_file(path)
    except Exception as error:  # the library's own, or NumPy's for a type or rank it does not know
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} is damaged or missing: {problem[:200]}.") from None
    if name not in tensors:
        raise UserError(f"{path} holds {shown(sorted(tensors))} and no tensor {name!r}.")
    return tensors[name]


def _read_pickled(path: Path, name: str) -> np.ndarray:
    """A tensor of a file that torch wrote, read by an interpreter that runs nothing."""
    tensors = read_torch(path)
    if name not in tensors:
        raise UserError(f"{path} holds {shown(sorted(tensors))} and no tensor {name!r}.")
    tensor, size = tensors[name], path.stat().st_size
    bytes_ = math.prod(tensor.shape) * tensor.dtype.itemsize
    if len(tensor.shape) != 2 or not 0 < bytes_ <= size:  # strides of 0 repeat what is there once
        raise UserError(
            f"{path} is damaged: {name!r} has shape {shown(list(tensor.shape))}; a prompt is a "
            f"float array [P, D], and the file has {size} bytes."
        )
    return tensor.read(tuple(slice(0, n) for n in tensor.shape))


def _read_npy(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise UserError(
                f"{str(path)!r} is not an .npy file; give an artefact, adapter or .npy."
            )
    try:
        # mapped, so that a header that promises terabytes is an error and not an allocation
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a broken header raises whatever NumPy's parser happens to meet
        problem = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as an array of numbers: {problem}.") from None


def _checked(vectors: np.ndarray, path: Path | str) -> Float[np.ndarray, "P D"]:
    number = vectors.dtype.kind == "f" or vectors.dtype.name == "bfloat16"  # of ml_dtypes
    if vectors.ndim != 2 or not number or 0 in vectors.shape:
        raise UserError(
            f"{path} holds {str(vectors.dtype)[:80]} of shape {list(vectors.shape)}; "
            "a prompt is a float array [P, D]."
        )
    with np.errstate(over="ignore"):  # of float64; found by the next line
        vectors = np.array(vectors, np.float32)
    if not np.isfinite(vectors).all():
        raise UserError(f"{path} holds values that are not finite; the prompt is unusable.")
    return vectors


def model_card(facts: dict[str, Any]) -> str:
    """Markdown that tells a stranger what the prompt does, how well, and how to use it."""
    task, backbone = facts.get("task") or {}, facts.get("backbone") or {}
    source = str(backbone.get("source", "unknown"))
    labels = ", ".join(plain(label) for label in _list(task.get("labels"))) or "free text"
    example = json.dumps({name: "..." for name in _columns(task)}, ensure_ascii=False)
    rows = f"Rows are objects with the columns that the template names, such as {_code(example)}."
    if task.get("rule"):
        rows = f"Rows are those of the task's own files, to which {_code(task['rule'])} is applied."
    return f"""---
{_front_matter(facts, source)}
---
# Soft prompt for {plain(task.get("name", "an unnamed task"))}

{facts.get("length")} vectors of {facts.get("width")} numbers that go before the text of a frozen
{_code(source)} (fingerprint {_code(backbone.get("fingerprint", "unknown"))}).
It works with that backbone only.

- Input: {_code(task.get("template", "unknown"))}
- Output: {labels}
- {_steps(facts)}; see `prompt.json` for the whole configuration.

{_figures(facts)}

    jaxprompt eval PATH_OF_THIS_FOLDER
    jaxprompt predict PATH_OF_THIS_FOLDER --input in.jsonl --output out.jsonl

In Python:

```python
import jaxprompt as jp

session = jp.open_session("PATH_OF_THIS_FOLDER")  # loads the backbone, too
print(jp.predict(session, [{example}]))
```

{rows}
"""


def adapter_card(facts: dict[str, Any], config: dict[str, Any]) -> str:
    """Markdown beside an adapter: how PEFT loads it, and what text it expects."""
    task, recorded = facts.get("task") or {}, (facts.get("backbone") or {}).get("source")
    base = config["base_model_name_or_path"]
    known = isinstance(base, str) and not only_here(base)
    values: dict[str, Any] = {"library_name": "peft"}
    if known and _is_hub_id(base):
        values["base_model"] = base
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items())
    end = ""
    if _decoder_only(facts):
        end = (
            f"An input ends with {_code(task.get('separator', ''))}; an answer begins with a space."
        )
    how = (
        ""
        if known
        else f"""
The backbone {_code(base or recorded or "unknown")} is one that only jaxprompt knows. Write it as
transformers reads it, and name that folder in `adapter_config.json`, or load it yourself:

```python
import jaxprompt as jp

jp.save_backbone("backbone", {json.dumps(base or "...")})
```
"""
    )
    kind = "CausalLM" if _decoder_only(facts) else "Seq2SeqLM"
    return f"""---
{front}
---
# Prompt-tuning adapter for {plain(task.get("name", "an unnamed task"))}

{config["num_virtual_tokens"]} vectors for {_code(base or "an unnamed backbone")}, written by
jaxprompt. PEFT knows no task: give it text of the form {_code(task.get("template", "unknown"))}.
{end}
{how}
```python
from peft import PeftModel
from transformers import AutoModelFor{kind}

base = AutoModelFor{kind}.from_pretrained({json.dumps(base if known else "backbone")})
model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")
```
"""


def _is_hub_id(source: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source)) and not Path(source).exists()


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _columns(task: dict[str, Any]) -> list[str]:
    """The columns that a task's template names."""
    found = re.findall(r"\{\{|\}\}|\{([^{}]*)\}", str(task.get("template", "")))
    return list(dict.fromkeys(filter(None, found))) or ["input"]


def _steps(facts: dict[str, Any]) -> str:
    config = facts.get("config") or {}
    settings: Any = config.get("train")
    settings = settings if isinstance(settings, dict) else {}
    total, step = settings.get("steps"), facts.get("step", "?")
    of = f" of {total}, the best on validation rows" if type(total) is int else ""
    return f"Vectors of step {step}{of}; seed {facts.get('seed', '?')}"


def _front_matter(facts: dict[str, Any], source: str) -> str:
    """What the Hugging Face hub reads: names in JSON, which is YAML."""
    kind = "causal-lm" if _decoder_only(facts) else "t5"
    values: dict[str, Any] = {"library_name": "jaxprompt"}
    if _is_hub_id(source):
        values["base_model"] = source
    values["tags"] = ["prompt-tuning", "soft-prompt", kind]
    names = [name for name in facts.get("metrics") or {} if re.fullmatch(r"\w+", str(name))]
    if names:
        values["metrics"] = names
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items())


def _figures(facts: dict[str, Any]) -> str:
    """A table of the metrics on validation and test rows, with what is there without tuning."""
    metrics, test = facts.get("metrics") or {}, facts.get("test") or {}
    first = next(iter(_list((facts.get("task") or {}).get("metrics")) or metrics), "")
    named = {"majority": "of the majority class", "untuned": "of the backbone without a prompt"}
    baselines = facts.get("baselines") or {}
    lines = [(plain(name), value, test.get(name, "")) for name, value in metrics.items()]
    lines += [
        (f"{plain(first)} {words}", baselines[key], "")
        for key, words in named.items()
        if key in baselines
    ]
    head = [f"| metric | validation, {facts.get('rows', '?')} rows | test |", "|---|---|---|"]
    return "\n".join([*head, *(f"| {n} | {_number(v)} | {_number(t)} |" for n, v, t in lines)])


def _number(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.4f}" if number and abs(value) < 1e9 else plain(str(value))


def _code(value: Any) -> str:
    """A value as a code span, in which nothing is markup; line breaks are shown as ``\\n``."""
    text = str(value).replace("\r", "\\r").replace("\n", "\\n")
    fence = "`" * (1 + max(map(len, re.findall(r"`+", text)), default=0))
    space = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) or not text else ""
    return f"{fence}{space}{text}{space}{fence}"
