"""From the options of ``jaxprompt serve`` to the parts of a server. Nothing listens yet."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxprompt.config.errors import UserError, shown
from jaxprompt.data.tokenizer import Tokenizer, load_tokenizer
from jaxprompt.inference.session import attention_of
from jaxprompt.methods.artefact import Prompt, fitted, load_prompt
from jaxprompt.methods.user_library import USERS, UserLibrary, open_library
from jaxprompt.models import registry
from jaxprompt.models.checkpoints.load import Backbone, load_backbone
from jaxprompt.serving.admission import Admission, task_of
from jaxprompt.serving.artefacts import read_artefact, refuse_soft_verbalizer
from jaxprompt.serving.catalogue import Catalogue
from jaxprompt.serving.compute import Compute
from jaxprompt.serving.fair_queue import Limits
from jaxprompt.serving.grid import KINDS, GridOptions, default_limits
from jaxprompt.serving.library import LibraryRouter
from jaxprompt.serving.router import TENSORS
from jaxprompt.serving.slots import SlotBank, slot_shape
from jaxprompt.serving.store import PathStore, Store, open_store
from jaxprompt.serving.version import Version, label_plan

_BANK_BYTES = 512 << 20  # of slots, unless their number is given
_MOST_SLOTS, _FEWEST_SLOTS = 1025, 9
_MOST_KNOWN = 1000  # prompts of a library that are read at the start


class Sources(NamedTuple):
    """Where prompts and backbone come from."""

    prompts: Mapping[str, Path]
    library: str | None = None
    backbone: str | None = None
    tokenizer: str | None = None
    any_backbone: bool = False


class Sizes(NamedTuple):
    """What a server has room for. 0: what the prompts that are known at the start need."""

    slots: int = 0
    max_prompt_length: int = 0
    max_input_length: int = 0
    max_target_length: int = 64
    max_new_tokens: int = 64
    max_label_nodes: int = 0
    max_rows: int = 32


class Parts(NamedTuple):
    """What computes and what it answers with."""

    backbone: Backbone
    tokenizer: Tokenizer
    compute: Compute
    catalogue: Catalogue
    router: LibraryRouter | None
    users: UserLibrary | None


def make_parts(sources: Sources, sizes: Sizes = Sizes()) -> Parts:
    """Load the backbone, make room for the prompts that are known, and open their stores.

    Raises:
        UserError: a prompt cannot be served, or there is no backbone to serve it with.
    """
    stores: list[Store] = [PathStore(sources.prompts)] if sources.prompts else []
    library = None if sources.library is None else open_store(sources.library)
    given = [load_prompt(path) for path in sources.prompts.values()]
    backbone = _backbone(sources, given, library)
    if registry.masked(backbone.config):
        raise UserError(
            f"{backbone.source} is an encoder with a mask, which is not served; use predict or "
            "eval."
        )
    one_sequence = registry.one_sequence(backbone.config)
    recorded = given[0].metadata.get("backbone", {}).get("tokenizer") if given else None
    words = load_tokenizer(
        sources.tokenizer or recorded or backbone.path, one_sequence=one_sequence
    )
    words = words.for_table(backbone.config.vocab_size)
    known = [fitted(prompt, backbone) for prompt in given]
    for prompt in known:
        refuse_soft_verbalizer(prompt)
    if library is not None:
        stores.append(library)
        known += _known(library, backbone)
    router = _router(sources.library, backbone)
    compute = _compute(backbone, words, known, sizes, routed=router is not None)
    admission = Admission(backbone, words, compute.check_fits, sources.any_backbone)
    catalogue = Catalogue(stores, admission)
    catalogue.scan()
    catalogue.warm(sources.prompts)
    return Parts(backbone, words, compute, catalogue, router, _users(sources.library))


def _backbone(sources: Sources, given: Sequence[Prompt], library: Store | None) -> Backbone:
    name = sources.backbone
    if name is None and given:
        name = given[0].metadata.get("backbone", {}).get("source")
    if name is None and library is not None:
        first = next(iter(sorted(library.list())), None)
        if first is not None:
            recorded = read_artefact(library.read(first), first).metadata.get("backbone", {})
            name = recorded.get("source")
    if name is None:
        raise UserError(
            "No prompt says which backbone it is for; name the backbone with --backbone."
        )
    return load_backbone(name, dtype=None)


def _known(library: Store, backbone: Backbone) -> list[Prompt]:
    """The prompts of a library, as far as they can be read; the catalogue tells of others."""
    found = []
    for name in sorted(library.list())[:_MOST_KNOWN]:
        try:
            found.append(read_artefact(library.read(name), name, backbone))
        except UserError:
            continue
    return [prompt for prompt in found if prompt.vectors.shape[1] == backbone.config.d_model]


def _compute(
    backbone: Backbone, words: Tokenizer, known: Sequence[Prompt], sizes: Sizes, routed: bool
) -> Compute:
    """The engine, with room for each prompt that is known.

    routed: whether a router asks for features; else no program for them is compiled.
    """
    width, dtype = backbone.config.d_model, backbone.model.runtime.activations
    shape = slot_shape(known, width, dtype, sizes.max_prompt_length)
    fitting = min(_BANK_BYTES // max(shape.bytes, 1), _MOST_SLOTS)
    bank = SlotBank(shape, sizes.slots or max(fitting, _FEWEST_SLOTS))
    tasks = [task for task in map(task_of, known) if task is not None]
    plans = [label_plan(task, words) for task in tasks]
    nodes = sizes.max_label_nodes or max([16, *(plan.nodes for plan in plans if plan is not None)])
    longest = sizes.max_input_length or max([128, *(task.max_input_length for task in tasks)])
    pairs = zip(tasks, plans, strict=True)
    answers = [task.max_target_length for task, plan in pairs if plan is None]
    attentions = tuple(sorted({attention_of(prompt) for prompt in known})) or ("causal",)
    options = GridOptions(
        sizes.max_rows, longest, sizes.max_target_length, max([sizes.max_new_tokens, *answers]),
        nodes, None if routed else tuple(kind for kind in KINDS if kind != "features"), attentions,
    )  # fmt: skip
    return Compute(backbone, words, bank, default_limits(backbone.model, shape.length, options))


def _router(library: str | None, backbone: Backbone) -> LibraryRouter | None:
    if library is None or "://" in library or not (Path(library) / TENSORS).is_file():
        return None
    return LibraryRouter(Path(library), backbone)


def _users(library: str | None) -> UserLibrary | None:
    """What tells names of users apart, where the library is one of users."""
    if library is None or "://" in library or not (Path(library) / USERS).is_file():
        return None
    return open_library(library)


def queue_limits(compute: Compute, queued_rows: int) -> Limits:
    """What the batcher keeps to, so that batches fit the programs."""
    grids = compute.limits.grids
    rows = grids["rank"].rows if "rank" in grids else next(iter(grids.values())).rows
    widest = max(grid.widths[-1] + grid.sizes[-1] for grid in grids.values())
    budget = min(grid.budget.positions for grid in grids.values())
    tokens = max(min(budget, 1 << 20), widest)
    return Limits(
        queued_rows, rows[-1], int(tokens), max(compute.bank.slots - 1, 1), row_sizes=rows
    )


class Slots:
    """What the HTTP layer is told of the bank."""

    def __init__(self, compute: Compute):
        self._compute = compute

    def holds(self, version: Version) -> bool:
        """Whether a version is in a slot."""
        return self._compute.bank.holds(version)

    def pin(self, version: Version, pinned: bool) -> None:
        """Keep a version in its slot. Only the compute thread may call it."""
        self._compute.bank.pin(version, pinned)

    def facts(self) -> Mapping[str, float]:
        """Figures of the bank and of the compiler."""
        bank = self._compute.bank
        return {
            "slots": bank.slots,
            "slots_used": bank.used,
            "max_prompt_length": bank.shape.length,
            "slot_bytes": bank.shape.bytes,
            "evictions": bank.evictions,
            "compilations": self._compute.num_compilations,
        }


def name_of(sources: Sources, backbone: Backbone) -> str:
    """The backbone's name among the models: no prompt may have it."""
    name = str(backbone.source).rstrip("/").rpartition("/")[2] or "backbone"
    if name in sources.prompts:
        raise UserError(
            f"A prompt is called {shown(name)} as the backbone is; give it another name: "
            "NAME=PROMPT."
        )
    return name
