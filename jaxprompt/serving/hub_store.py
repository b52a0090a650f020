"""Prompts in a repository of the Hugging Face hub, at one commit. They can only be read."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from jaxprompt.config.errors import UserError, shown
from jaxprompt.serving.artefacts import CONFIGS, MAX_BYTES, NAMES, Files, digest_of
from jaxprompt.serving.store import ReadOnlyStore, Store, UnknownPrompt, check_name


class HubStore(Store):
    """A repository that is one prompt, or has a folder for each.

    What a branch names may change at any time, and with it what the server answers. So the revision
    is resolved once, and the store stays at that commit until the server is started again.
    """

    writable = False
    interval = 3600.0  # a commit does not change

    def __init__(self, repository: str) -> None:
        """``repository`` is OWNER/NAME or OWNER/NAME@REVISION. Raises UserError."""
        from huggingface_hub import HfApi

        self.repository, _, revision = repository.partition("@")
        self.place = f"The hub's {shown(self.repository)}"
        try:
            facts = HfApi().model_info(self.repository, revision=revision or None)
        except Exception as error:  # those of the package, and of its HTTP client
            problem = " ".join(str(error).split())[:200]
            raise UserError(
                f"The hub's {shown(repository)} cannot be read ({type(error).__name__}: {problem});"
                " check the name, the network, and HF_TOKEN if it is private."
            ) from None
        self.commit = facts.sha or ""
        self._folders = _prompts_in([file.rfilename for file in facts.siblings or ()])
        if "" in self._folders:  # the repository is the prompt
            name = self.repository.rpartition("/")[2].lower()
            self._folders = {check_name(name): self._folders[""]}
        if not self._folders:
            raise UserError(f"The hub's {shown(repository)} holds no prompt.")

    def _list(self) -> Mapping[str, str]:
        return dict.fromkeys(self._folders, self.commit)

    def _read(self, name: str, digest: str | None) -> Files:
        from huggingface_hub import hf_hub_download

        if name not in self._folders:
            raise UnknownPrompt(f"There is no prompt {shown(name)}.")
        files: dict[str, bytes] = {}
        for path in self._folders[name]:
            place = Path(hf_hub_download(self.repository, path, revision=self.commit))
            if place.stat().st_size > MAX_BYTES:
                raise UserError(f"{name}: {path} has more than {MAX_BYTES:,} bytes.")
            files[PurePosixPath(path).name] = place.read_bytes()
        if digest is not None and digest != digest_of(files):
            raise UnknownPrompt(f"The prompt {shown(name)} has no version sha256:{digest}.")
        return files

    def _write(self, name: str, files: Files) -> str:
        raise ReadOnlyStore(
            f"The prompt {shown(name)} is of the hub's {self.repository}, which is only read; push "
            "to it and start the server with the new commit."
        )

    def _delete(self, name: str) -> None:
        self._write(name, {})


def _prompts_in(paths: list[str]) -> dict[str, list[str]]:
    """The files of each folder that is a prompt, by the folder's path; "" is the repository."""
    folders: dict[str, list[str]] = {}
    for text in paths:
        path = PurePosixPath(text)
        if path.name in NAMES:
            folder = "" if str(path.parent) == "." else str(path.parent)
            folders.setdefault(folder, []).append(text)
    return {
        folder: files
        for folder, files in folders.items()
        if {PurePosixPath(file).name for file in files} & set(CONFIGS)
        and (not folder or _fits(folder))
    }


def _fits(folder: str) -> bool:
    try:
        check_name(folder)
    except UserError:
        return False
    return True
