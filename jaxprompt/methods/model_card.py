"""Model cards: what a prompt or an adapter does, how well, and how to use it, in Markdown."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from jaxprompt.config.schema import JinjaConfig
from jaxprompt.data.jinja_templates import INPUT, columns_of_jinja
from jaxprompt.methods.tuned import decoder_only, of_encoder, record_of
from jaxprompt.models.checkpoints.hub import only_here
from jaxprompt.runtime.markdown import plain


def model_card(metadata: Mapping[str, object]) -> str:
    """Markdown that tells a stranger what the prompt does, how well, and how to use it."""
    task, backbone = record_of(metadata, "task"), record_of(metadata, "backbone")
    source = str(backbone.get("source", "unknown"))
    labels = ", ".join(plain(label) for label in _list(task.get("labels"))) or "free text"
    example = json.dumps({name: "..." for name in _columns(task)}, ensure_ascii=False)
    rows = f"Rows are objects with the columns that the template names, such as {_code(example)}."
    if task.get("rule"):
        rows = f"Rows are those of the task's own files, to which {_code(task['rule'])} is applied."
    return f"""---
{_front_matter(metadata, source)}
---
# {_title(metadata)} for {plain(task.get("name", "an unnamed task"))}

{_size(metadata)} a frozen
{_code(source)} (fingerprint {_code(backbone.get("fingerprint", "unknown"))}).
It works with that backbone only.
{_changes(metadata)}
- Input: {_input(task)}
- Output: {labels}
- {_steps(metadata)}; see `prompt.json` for the whole configuration.

{_figures(metadata)}

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


def _title(metadata: Mapping[str, object]) -> str:
    kinds = [str(change.get("kind")) for change in _changes_of(metadata)]
    if not kinds:
        return "Soft prompt"
    names = ["Soft prompt"] * bool(metadata.get("length")) + kinds
    text = " and ".join(plain(name) for name in names)
    return text[0].upper() + text[1:]


def _size(metadata: Mapping[str, object]) -> str:
    """What there is and where it acts, up to "a frozen BACKBONE"."""
    length, changes = metadata.get("length"), _changes_of(metadata)
    vectors = f"{length} vectors of {metadata.get('width')} numbers that go before the text of"
    numbers = sum(n for n in (change.get("numbers") for change in changes) if isinstance(n, int))
    weights = f"{numbers:,} numbers that change the layers of"
    if not changes:
        return vectors
    return f"{vectors.removesuffix(' of')}, and {weights}" if length else weights


def _changes_of(metadata: Mapping[str, object]) -> list[Mapping[str, object]]:
    return [change for change in _list(metadata.get("changes")) if isinstance(change, Mapping)]


def _changes(metadata: Mapping[str, object]) -> str:
    """A line for each kind of change: its rank or width, what is changed, how many numbers."""
    words = {"LoRA": "of rank", "prefixes": "of length", "adapters": "of width"}
    lines = []
    for change in _changes_of(metadata):
        kind, size = str(change.get("kind")), change.get("size")
        of = f" {words[kind]} {size}" if kind in words else ""
        targets = ", ".join(plain(target) for target in _list(change.get("targets")))
        lines.append(f"- {plain(kind)}{of}: {targets}; {change.get('numbers')} numbers")
    return "\n".join(["", *lines, ""]) if lines else ""


def adapter_card(metadata: Mapping[str, object], config: Mapping[str, object], size: str) -> str:
    """Markdown beside an adapter: how PEFT loads it, and what text it expects.

    Args:
        config: ``adapter_config.json``.
        size: what the adapter has, such as "5 vectors".
    """
    task, recorded = record_of(metadata, "task"), record_of(metadata, "backbone").get("source")
    base = config["base_model_name_or_path"]
    known = isinstance(base, str) and not only_here(base)
    values: dict[str, object] = {"library_name": "peft"}
    if isinstance(base, str) and known and _is_hub_id(base):
        values["base_model"] = base
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items())
    end = ""
    if decoder_only(metadata):
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
    kind = "CausalLM" if decoder_only(metadata) else "Seq2SeqLM"
    return f"""---
{front}
---
# {plain(config["peft_type"])} adapter for {plain(task.get("name", "an unnamed task"))}

{size[0].upper()}{size[1:]} for {_code(base or "an unnamed backbone")}, written by
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


def adapterhub_card(metadata: Mapping[str, object], config: Mapping[str, object]) -> str:
    """Markdown beside an adapter for AdapterHub: how it is loaded, and what text it expects.

    Args:
        config: ``adapter_config.json``.
    """
    task = record_of(metadata, "task")
    base, kind = config["model_name"], config["model_class"]
    return f"""---
library_name: adapters
---
# Adapter for {plain(task.get("name", "an unnamed task"))}

Bottlenecks for {_code(base or "an unnamed backbone")}, written by jaxprompt. The adapter knows no
task: give it text of the form {_code(task.get("template", "unknown"))}.

```python
import adapters
from transformers import {kind}

model = {kind}.from_pretrained({json.dumps(base or "...")})
adapters.init(model)
model.load_adapter("PATH_OF_THIS_FOLDER", set_active=True, use_safetensors=True)
```
"""


def _is_hub_id(source: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source)) and not Path(source).exists()


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _input(task: Mapping[str, object]) -> str:
    jinja = record_of(task, "jinja").get("text")
    template = _code(task.get("template", "unknown"))
    return template if jinja is None else f"{template}, which the Jinja {_code(jinja)} makes"


def _columns(task: Mapping[str, object]) -> list[str]:
    """The columns that a task's template names, or its Jinja template for its input."""
    names = re.findall(r"\{\{|\}\}|\{([^{}]*)\}", str(task.get("template", "")))
    jinja = record_of(task, "jinja")
    if isinstance(jinja.get("text"), str):
        own = columns_of_jinja(JinjaConfig.model_validate(jinja))
        names = [name for each in names for name in (own if each == INPUT else [each])]
    return list(dict.fromkeys(filter(None, names))) or ["input"]


def _steps(metadata: Mapping[str, object]) -> str:
    settings = record_of(record_of(metadata, "config"), "train")
    total, step = settings.get("steps"), metadata.get("step", "?")
    of = f" of {total}, the best on validation rows" if type(total) is int else ""
    what = "Numbers" if _changes_of(metadata) else "Vectors"
    return f"{what} of step {step}{of}; seed {metadata.get('seed', '?')}"


def _front_matter(metadata: Mapping[str, object], source: str) -> str:
    """What the Hugging Face hub reads: names in JSON, which is YAML."""
    kind = "causal-lm" if decoder_only(metadata) else "t5"
    kind = "masked-lm" if of_encoder(metadata) else kind
    values: dict[str, object] = {"library_name": "jaxprompt"}
    if _is_hub_id(source):
        values["base_model"] = source
    changes = [str(change.get("kind")).lower() for change in _changes_of(metadata)]
    tags = ["prompt-tuning", "soft-prompt"] if metadata.get("length") or not changes else []
    values["tags"] = [*tags, *changes, kind]
    names = [name for name in record_of(metadata, "metrics") if re.fullmatch(r"\w+", str(name))]
    if names:
        values["metrics"] = names
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items())


def _figures(metadata: Mapping[str, object]) -> str:
    """A table of the metrics on validation and test rows, with what is there without tuning."""
    metrics, test = record_of(metadata, "metrics"), record_of(metadata, "test")
    first = next(iter(_list(record_of(metadata, "task").get("metrics")) or metrics), "")
    named = {"majority": "of the majority class", "untuned": "of the backbone without a prompt"}
    baselines = record_of(metadata, "baselines")
    lines = [(plain(name), value, test.get(name, "")) for name, value in metrics.items()]
    lines += [
        (f"{plain(first)} {words}", baselines[key], "")
        for key, words in named.items()
        if key in baselines
    ]
    head = [f"| metric | validation, {metadata.get('rows', '?')} rows | test |", "|---|---|---|"]
    return "\n".join([*head, *(f"| {n} | {_number(v)} | {_number(t)} |" for n, v, t in lines)])


def _number(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9:
        return f"{value:.4f}"
    return plain(value)


def _code(value: object) -> str:
    """A value as a code span, in which nothing is markup; line breaks are shown as ``\\n``."""
    text = str(value).replace("\r", "\\r").replace("\n", "\\n")
    fence = "`" * (1 + max(map(len, re.findall(r"`+", text)), default=0))
    space = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) or not text else ""
    return f"{fence}{space}{text}{space}{fence}"
