"""What a run reads besides its settings, as digests: rows, texts, tokenizer and weights.

They stand in every checkpoint, so that a run goes on only with what it began with, and in
``result.json``. Paths say nothing: files at a path may change.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.references import references
from jaxprompt.data.rows import Rows
from jaxprompt.data.templates import to_text
from jaxprompt.models import registry
from jaxprompt.training.datasets import read_splits

Inputs = dict[str, object]  # "rows/TASK/train", "backbone/fingerprint" and so on -> JSON


def digest_of(parts: Iterable[object]) -> str:
    """How many ``parts`` (JSON) there are, and the SHA-256 of them in their order."""
    digest, count = hashlib.sha256(), 0
    for part in parts:
        digest.update(json.dumps(part, default=str).encode() + b"\n")
        count += 1
    return f"{count} with SHA-256 {digest.hexdigest()[:32]}"


def of_backbone(config: registry.ModelConfig, fingerprint: str) -> Inputs:
    """The weights, and all of the shape and the constants that change what they compute."""
    kept = {f"backbone/{name}": x for name, x in dataclasses.asdict(config).items()}
    kept["backbone/fingerprint"] = fingerprint
    return json.loads(json.dumps(kept))  # as it comes back from a file


def of_rows(task: TaskConfig, splits: Mapping[str, Rows]) -> Inputs:
    """Digests of the texts of each split; outside of training also of the accepted answers."""
    digests = {}
    for name, rows in splits.items():
        texts: Iterable[object] = (to_text(task, row) for row in rows)
        if name != "train":
            texts = zip(texts, references(task, rows, getattr(task, name)), strict=True)
        digests[f"rows/{task.name}/{name}"] = digest_of(texts)
    return digests


def of_files(task: TaskConfig, eval_rows: int | None) -> Inputs:
    """``of_rows`` if all splits are local files, where it is cheap; else nothing."""
    names = [name for name in (task.train, task.validation, task.test) if name is not None]
    if task.source is not None or not all(Path(name).is_file() for name in names):
        return {}
    return of_rows(task, read_splits(task, eval_rows))


def check_inputs(folder: Path, before: object, now: Inputs) -> None:
    """Refuse to go on in ``folder`` with other inputs than ``before``.

    Runs of earlier versions have recorded none, or fewer; what is not known may be anything.
    """
    if not isinstance(before, dict):
        return
    changed = [
        f"{key} was {shown(before[key])} and is {shown(now[key])}"
        for key in sorted(before.keys() & now.keys())
        if before[key] != now[key]
    ]
    if changed:
        raise UserError(
            f"{folder} holds a run with other data or weights ({'; '.join(changed)}); put those "
            "back, choose another output, or delete that directory to start again."
        )
