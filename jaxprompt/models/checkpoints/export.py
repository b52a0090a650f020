"""A backbone of any format as a directory that other libraries can load."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax

from jaxprompt.config.errors import UserError
from jaxprompt.config.paths import expanded
from jaxprompt.data.tokenizer import copy_tokenizer
from jaxprompt.models.checkpoints.load import Backbone, load_backbone
from jaxprompt.models.checkpoints.save import save_hf
from jaxprompt.runtime.files import check_replaceable, replace_directory

NOTE = "exported.json"  # marks a directory that was written here, and names its source


def save_backbone(
    path: str | Path, backbone: str | Backbone, *, note: Mapping[str, object] | None = None
) -> None:
    """Write a backbone, with its tokenizer, as a directory that transformers and PEFT load.

    Args:
        path: a new directory, or one that this function has written.
        backbone: what ``load_backbone`` returned, or a name that it takes. A name is loaded in
            float32.
        note: what else ``exported.json`` says of the weights.

    Raises:
        UserError: ``path`` has other contents, or the weights are quantized.
    """
    loaded = load_backbone(backbone) if isinstance(backbone, str) else backbone
    leaves = jax.tree.leaves(loaded.params, is_leaf=lambda x: not isinstance(x, dict))
    if not all(isinstance(leaf, jax.Array) for leaf in leaves):
        raise UserError(
            f"{loaded.source!r} was loaded with weights in few bits, which others do not read; "
            "load it without quantization=."
        )

    def write(folder: Path) -> None:
        save_hf(folder, loaded.config, loaded.params)
        copy_tokenizer(loaded.path, folder)
        made_of = {"source": loaded.source, "fingerprint": loaded.fingerprint, **(note or {})}
        (folder / NOTE).write_text(json.dumps(made_of, indent=2) + "\n")

    replace_directory(Path(expanded(path)), write, _was_exported)


def check_output(path: str | Path) -> None:
    """Raise a UserError if ``save_backbone`` would not write to ``path``."""
    check_replaceable(Path(expanded(path)), _was_exported)


def _was_exported(folder: Path) -> bool:
    return (folder / NOTE).is_file()
