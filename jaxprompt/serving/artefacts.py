"""Artefacts in memory: the files of a prompt, their digest, and how they become a prompt.

What a store reads and what a client uploads is the same mapping from names of files to bytes. So
there is one way to check it, and the same content has the same digest wherever it lies.
"""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.methods.adapterhub import TENSORS as ADAPTERHUB_TENSORS
from jaxprompt.methods.artefact import CARD, METADATA, TENSORS, load_prompt, save_prompt
from jaxprompt.methods.peft import PEFT_CONFIG, PEFT_TENSORS
from jaxprompt.methods.tuned import Prompt
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.models.checkpoints.safetensors import read_safetensors
from jaxprompt.models.injection import VERBALIZER

Files = Mapping[str, bytes]

# what tells that a folder is a prompt: of this package, of PEFT or of AdapterHub
CONFIGS = (METADATA, PEFT_CONFIG)
VALUES = (TENSORS, PEFT_TENSORS, ADAPTERHUB_TENSORS)
# all that is read of a folder; pickles are not among them
NAMES = (*CONFIGS, *VALUES, CARD)
MAX_BYTES = 256 << 20  # of one artefact


def digest_of(files: Files) -> str:
    """SHA-256 of the content. The model card is left out: it is for people.

    >>> digest_of({"prompt.json": b"{}"}) == digest_of({"prompt.json": b"{}", "README.md": b"x"})
    True
    """
    content = hashlib.sha256()
    for name in sorted(set(files) - {CARD}):
        content.update(f"{name}\0{len(files[name])}\0".encode())
        content.update(files[name])
    return content.hexdigest()


def check_files(files: Files, max_bytes: int = MAX_BYTES) -> None:
    """Raise a UserError unless these can be the files of one artefact."""
    unknown = sorted(set(files) - set(NAMES))
    if unknown:
        raise UserError(
            f"{shown(unknown[0])} is no file of a prompt; allowed are {listed(sorted(NAMES))}."
        )
    if not set(files) & set(CONFIGS) or not set(files) & set(VALUES):
        raise UserError(
            f"The files are {listed(sorted(files)) or 'none'}; a prompt has {METADATA} and "
            f"{TENSORS}, an adapter of PEFT {PEFT_CONFIG} and {PEFT_TENSORS}."
        )
    total = sum(map(len, files.values()))
    if total > max_bytes:
        raise UserError(f"The files have {total:,} bytes; a prompt may have {max_bytes:,}.")


def read_artefact(files: Files, name: str, backbone: Backbone | None = None) -> Prompt:
    """The prompt that the files hold, checked as one that ``load_prompt`` reads.

    The header of a tensor file has to agree with the file's size before an array is made.

    Args:
        files: of one artefact.
        name: the prompt's, for errors.
        backbone: that an adapter of another library was tuned on.

    Raises:
        UserError: the files are damaged, are no prompt, or are one that is not served.
    """
    check_files(files)
    with tempfile.TemporaryDirectory(prefix="jaxprompt-") as place:
        folder = Path(place) / "prompt"
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
        try:
            for file in set(files) & set(VALUES):
                read_safetensors(folder / file)
            prompt = load_prompt(folder, backbone)
            refuse_soft_verbalizer(prompt)
            return prompt
        except UserError as error:
            # who reads this knows the prompt's name, and not where it lay for a moment
            text = str(error).replace(f"{folder}/", f"{name}: ").replace(str(folder), name)
            raise UserError(text) from None


def refuse_soft_verbalizer(prompt: Prompt) -> None:
    """Raise a UserError for a prompt that answers with label rows."""
    if VERBALIZER in (prompt.layers or {}):
        raise UserError(
            "A prompt with a soft verbalizer is not served; use predict or eval, or serve one that "
            "was tuned without it."
        )


def files_of(prompt: Prompt) -> dict[str, bytes]:
    """The files that ``save_prompt`` writes. Raises UserError as it does."""
    with tempfile.TemporaryDirectory(prefix="jaxprompt-") as place:
        folder = Path(place) / "prompt"
        save_prompt(folder, prompt)
        return {file.name: file.read_bytes() for file in folder.iterdir()}
