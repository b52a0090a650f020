"""Old names of modules, which still import, with a DeprecationWarning."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Iterable

# old package or module -> new one; what is inside moves with it, but for what is named itself
MOVED = {
    "jaxprompt.train": "jaxprompt.training",
    "jaxprompt.train.assignment": "jaxprompt.training.datasets",
    "jaxprompt.evaluate": "jaxprompt.evaluation",
    "jaxprompt.model": "jaxprompt.models",
    "jaxprompt.model.load": "jaxprompt.models.checkpoints.load",
    "jaxprompt.model.export": "jaxprompt.models.checkpoints.export",
    "jaxprompt.pretrain_config": "jaxprompt.config.pretrain",
    "jaxprompt.prompts": "jaxprompt.methods",
}


def new_name(name: str) -> str | None:
    """Where the module of this old name is now; None for a name that is not old.

    >>> new_name("jaxprompt.train.loop")
    'jaxprompt.training.loop'
    """
    for old in sorted(MOVED, key=len, reverse=True):
        if name == old or name.startswith(f"{old}."):
            return MOVED[old] + name.removeprefix(old)
    return None


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self,
        fullname: str,
        path: Iterable[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        new = new_name(fullname)
        if new is None:
            return None
        warnings.warn(f"{fullname} is now {new}", DeprecationWarning, stacklevel=2)
        return importlib.machinery.ModuleSpec(fullname, self, loader_state=new)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = importlib.import_module(str(spec.loader_state))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """The module has run already. Its own spec is put back, which the import has replaced."""
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Make the old names importable.

    The finder goes first: an old package has the path of the new one, so that Python would find
    the file of ``old.module`` there and load it a second time.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
