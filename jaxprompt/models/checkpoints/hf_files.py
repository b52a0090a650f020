"""The weights of a Hugging Face directory: which of its files hold them, and shards."""

from collections.abc import Callable
from pathlib import Path

from jaxprompt.config.errors import UserError, listed, shown
from jaxprompt.models.checkpoints.leaf import Tensor
from jaxprompt.models.checkpoints.legacy.flax_msgpack import read_msgpack
from jaxprompt.models.checkpoints.legacy.torch_pickle import read_torch
from jaxprompt.models.checkpoints.safetensors import read_safetensors
from jaxprompt.runtime.json_file import read_json


def open_weights(directory: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a directory, no values read; safetensors are preferred.

    Returns:
        The tensors by name, and whether the names are those of transformers' Flax models.

    Raises:
        UserError: there are no weights, or a file is damaged.
    """
    for stem, suffix, read in (
        ("model", "safetensors", read_safetensors),
        ("pytorch_model", "bin", read_torch),
    ):
        whole, index = directory / f"{stem}.{suffix}", directory / f"{stem}.{suffix}.index.json"
        if whole.is_file():
            return read(whole), False
        if index.is_file():
            return _sharded(index, read), False
    flax = directory / "flax_model.msgpack"
    if flax.is_file():
        return read_msgpack(flax), True
    raise UserError(
        f"{directory} holds no weights: expected model.safetensors, pytorch_model.bin (either of "
        "them single or with its .index.json) or flax_model.msgpack"
    )


def _sharded(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all shards: each from the one that the index names, and those it forgets."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise UserError(f"{index} has no weight_map from tensor names to files")
    shards: dict[str, dict[str, Tensor]] = {}
    for file in sorted(set(names.values())):
        path = index.parent / file
        if Path(file).name != file or "\0" in file or not path.is_file():
            raise UserError(
                f"{index} names {shown(file)}, which is not beside it; download all shards"
            )
        shards[file] = read(path)
    lost = [name for name, file in names.items() if name not in shards[file]]
    if lost:
        raise UserError(
            f"{index} promises {len(lost)} tensors that no shard holds, e.g. {listed(lost, 1)}"
        )
    return {
        name: shards[names.get(name, file)][name]
        for file, shard in shards.items()
        for name in shard
    }
