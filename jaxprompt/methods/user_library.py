"""The prompts of users on disk: a folder with an ordinary artefact for each, and the shared one.

    LIBRARY/shared/           the prompt of all who have none of their own
    LIBRARY/u-5f1c.../        the prompt of one user, and all that is kept of him
    LIBRARY/users.json        the key of names, and how the prompts were trained
    LIBRARY/basis.safetensors what users have in common, where there is something

A user's id comes from data or from a client, so it is never a path. The name of his folder is a
keyed hash of it (HMAC-SHA-256), and the key is in ``users.json``: who has names alone, from logs or
requests, cannot try out ids.
"""

import hashlib
import hmac
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.paths import expanded
from jaxprompt.config.schema import RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.methods.artefact import METADATA, load_prompt, save_prompt
from jaxprompt.methods.tuned import Prompt, as_json, read_object, read_tensor
from jaxprompt.runtime.files import write_atomically

USERS, BASIS_FILE, SHARED_PROMPT = "users.json", "basis.safetensors", "shared"


class UserLibrary(NamedTuple):
    """A folder of users' prompts.

    visits: the steps that each user had.
    """

    folder: Path
    key: str
    config: RunConfig
    visits: int

    def name_of(self, user: str) -> str:
        """The name of a user's prompt, for a server too; it tells nothing about ``user``."""
        text = user.encode("utf-8", "surrogatepass")
        digest = hmac.new(bytes.fromhex(self.key), text, hashlib.sha256).hexdigest()
        return f"u-{digest[:32]}"

    def own_prompt(self, user: str) -> Path:
        """Where the user's own prompt is, if he has one."""
        return self.folder / self.name_of(user)

    @property
    def shared_prompt(self) -> Path:
        return self.folder / SHARED_PROMPT

    def prompt_of(self, user: str) -> Path:
        """The user's own prompt, or the shared one where he has none."""
        own = self.own_prompt(user)
        return own if (own / METADATA).is_file() else self.shared_prompt

    def basis(self) -> Float[np.ndarray, "r P D"] | None:
        """The vectors that users have in common; None where their prompts are free."""
        path = self.folder / BASIS_FILE
        if self.config.users is None or self.config.users.freedom == "full":
            return None
        return read_tensor(path, "basis")

    def remove(self, user: str) -> bool:
        """Delete all that is kept of a user; False if he has no prompt of his own."""
        own = self.own_prompt(user)
        if not own.is_dir():
            return False
        # not readable as a prompt any more from the first moment on
        gone = own.with_name(f".{own.name}-{secrets.token_hex(4)}")
        own.rename(gone)
        shutil.rmtree(gone)
        return True


def new_library(
    folder: Path, config: RunConfig, visits: int, shared: Prompt,
    basis: Float[np.ndarray, "r P D"] | None,
) -> UserLibrary:  # fmt: skip
    """A library without users' own prompts; one that is there keeps its key, and so its names."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / USERS
    key = secrets.token_hex(32)
    if path.is_file():
        key = _key_in(read_object(path), path)
    save_prompt(folder / SHARED_PROMPT, shared)
    if basis is not None:
        write_atomically(folder / BASIS_FILE, save({"basis": np.ascontiguousarray(basis)}))
    values = {"format": 1, "key": key, "visits": visits, "config": config.model_dump()}
    write_atomically(path, as_json(values))
    path.chmod(0o600)
    return UserLibrary(folder, key, config, visits)


def open_library(folder: str | Path) -> UserLibrary:
    """The library in a folder. Raises UserError where there is none, or it is damaged."""
    folder = Path(expanded(folder))
    path = folder / USERS
    if not path.is_file():
        inner = folder / "users" / USERS
        hint = f"; did you mean {str(inner.parent)!r}?" if inner.is_file() else "."
        raise UserError(
            f"{shown(str(folder))} holds no {USERS}, so it is no library of users' prompts, as "
            f"`jaxprompt train` writes it for a config with users{hint}"
        )
    values = read_object(path)
    if values.get("format") != 1:
        raise UserError(f"{path} has format {shown(values.get('format'))}; this version reads 1.")
    config = parse(RunConfig, values.get("config"), f"{path}: config.")
    visits = values.get("visits")
    if not isinstance(visits, int) or visits < 1 or config.users is None:
        raise UserError(f"{path} is damaged: it does not say how users were trained.")
    return UserLibrary(folder, _key_in(values, path), config, visits)


def _key_in(values: Mapping[str, object], path: Path) -> str:
    key = values.get("key")
    if not isinstance(key, str) or len(key) != 64 or not set(key) <= set("0123456789abcdef"):
        raise UserError(f"{path} is damaged: its key is no text of 64 hexadecimal digits.")
    return key


def load_user_prompt(library: str | Path, user: str) -> Prompt:
    """The prompt of a user, or the shared one. Raises UserError."""
    return load_prompt(open_library(library).prompt_of(user))
