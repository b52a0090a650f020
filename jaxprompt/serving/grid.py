"""The shapes that programs are compiled for, and the compiled programs.

A grid has all shapes of one kind of work. They are compiled before the server is ready, so that no
request ever waits for the compiler. A program that is asked for later is counted and logged.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxprompt.data.layout import BatchBudget
from jaxprompt.models import registry
from jaxprompt.models.injection import Injection
from jaxprompt.models.label_tree import stack_trees
from jaxprompt.serving import programs
from jaxprompt.serving.features import MOST_TOKENS
from jaxprompt.serving.programs import Choice, Edges, Rows, Targets
from jaxprompt.serving.work import Kind

log = logging.getLogger(__name__)

KINDS: tuple[Kind, ...] = ("rank", "score", "generate", "echo", "features")


class Shape(NamedTuple):
    """The shape of a batch."""

    rows: int
    width: int  # of inputs, in tokens
    size: int = 0  # nodes of a tree, tokens of a target, or of an answer at most


@dataclasses.dataclass(frozen=True)
class Grid:
    """The shapes of one kind of work: all of these rows, widths and sizes that fit the budget."""

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    sizes: tuple[int, ...] = (0,)
    budget: BatchBudget = BatchBudget()
    scored: bool = True  # each of ``size`` positions has logits at once

    def shapes(self) -> list[Shape]:
        """All of them, largest first."""
        every = itertools.product(self.rows, self.widths, self.sizes)
        return [Shape(*each) for each in reversed(list(every)) if self._allows(Shape(*each))]

    def _allows(self, shape: Shape) -> bool:
        rows, width, size = shape
        logits = rows * size if self.scored else rows
        fits = rows * (width + size) <= self.budget.positions and logits <= self.budget.targets
        return fits or rows == self.rows[0]

    def holds(self, width: int, size: int) -> bool:
        """Whether a row of so many tokens has a shape."""
        return width <= self.widths[-1] and size <= self.sizes[-1]

    def fitting(self, rows: int, width: int, size: int) -> Shape | None:
        """The smallest shape that holds rows of so many tokens; None where none does."""
        if not self.holds(width, size):
            return None
        width = next(each for each in self.widths if each >= width)
        size = next(each for each in self.sizes if each >= size)
        shapes = (Shape(each, width, size) for each in self.rows if each >= rows)
        return next(filter(self._allows, shapes), None)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the engine can be asked: how much at once, and in which shapes."""

    grids: Mapping[Kind, Grid]  # a kind without a grid is refused
    attentions: tuple[str, ...] = ("causal",)  # of decoder-only models
    chunk: int = 16  # tokens of an answer between which no other batch runs

    @property
    def max_nodes(self) -> int:
        """Nodes of a tree of labels at most."""
        return self.grids["rank"].sizes[-1] if "rank" in self.grids else 0


class GridOptions(NamedTuple):
    """From which ``default_limits`` makes the grids.

    max_rows: of a batch.
    max_input_length: tokens of a text; virtual tokens come on top.
    max_target_length: tokens of a target that is scored.
    max_new_tokens: of an answer.
    max_label_nodes: beginnings of labels of one task, see ``models.label_tree``.
    kinds: None for all that the model can do.
    """

    max_rows: int = 32
    max_input_length: int = 512
    max_target_length: int = 64
    max_new_tokens: int = 256
    max_label_nodes: int = 16
    kinds: tuple[Kind, ...] | None = None
    attentions: tuple[str, ...] = ("causal",)


def default_limits(
    model: registry.Model, prompt_length: int, options: GridOptions = GridOptions()
) -> Limits:
    """The grids of a server.

    Ranking has many shapes, since it is asked most; of the others there are few. Its time grows
    with the rows and the width, so both have small steps. Widths are those that texts behind the
    longest prompt need, and a small one for shorter prompts.

    Args:
        model: of the backbone.
        prompt_length: virtual tokens of a slot.
        options: what is to be possible.
    """
    budget = registry.budget(model.config, 1, training=False)
    one_sequence = registry.one_sequence(model.config)
    longest = _multiple(options.max_input_length + prompt_length, 32)
    rows = _up_to((1, 2, 4, 8, 16, 32, 64, 128), options.max_rows)
    few_rows = _up_to((1, 4, 16), min(options.max_rows, 16))
    widths = _up_to(_widths(prompt_length), longest)
    few_widths = _up_to((_multiple(prompt_length + 32, 32), 1024), longest)
    # a decoder-only model reads each node as it reads a token; the decoder of others is short
    nodes = _up_to((4, 16, 64, 256) if one_sequence else (16, 256), options.max_label_nodes)
    grid = functools.partial(Grid, budget=budget)
    grids: dict[Kind, Grid] = {
        "rank": grid(rows, widths, nodes),
        "score": grid(few_rows, few_widths, _up_to((16, 64, 256), options.max_target_length)),
        "generate": grid(
            few_rows, few_widths, _up_to((64, 256), options.max_new_tokens), scored=False
        ),
        # texts are cut at this length, whatever the tasks' are
        "features": grid(few_rows, _up_to((64, 256), MOST_TOKENS)),
    }
    if one_sequence:
        texts = _up_to((64, 256, 1024), options.max_input_length + options.max_target_length)
        grids["echo"] = grid(few_rows, (_multiple(max(prompt_length, 1), 16),), texts)
    if options.kinds is not None:
        grids = {kind: grid for kind, grid in grids.items() if kind in options.kinds}
    return Limits(grids, options.attentions if one_sequence else ("causal",))


def _widths(prompt_length: int) -> tuple[int, ...]:
    """Widths of texts of up to 16, 32, 64, ... tokens behind a prompt, and one of short prompts."""
    behind = [_multiple(prompt_length + text, 32) for text in (16, 32, 64, 128, 256, 512, 1024)]
    short = [64] if behind[0] > 64 else []
    return tuple(dict.fromkeys([*short, *behind]))


def _multiple(value: int, of: int) -> int:
    return -(-value // of) * of


def _up_to(values: Sequence[int], most: int) -> tuple[int, ...]:
    """The values below ``most``, and ``most`` itself."""
    return (*(value for value in values if value < most), most)


class Key(NamedTuple):
    """Which program: "generate" has two, one that reads and one that goes on."""

    kind: str
    attention: str
    shape: Shape


class Programs:
    """The compiled programs. Any thread may compile; one may ask for them."""

    def __init__(
        self,
        params: registry.Params,
        models: Mapping[str, registry.Model],
        bank: Injection,
        limits: Limits,
    ):
        """Nothing is compiled yet.

        Args:
            params: as compiled programs take them, see ``quantization.view_as_uint16``.
            models: by attention.
            bank: whose shapes all later ones have.
            limits: which programs there are.
        """
        self._params, self._models, self._limits = params, models, limits
        self._bank = jax.eval_shape(lambda bank: bank, bank)
        self._compiled: dict[Key, Callable] = {}
        self._at_ready: int | None = None

    @property
    def num_late(self) -> int:
        """How many programs were compiled after ``compile_all``: it should stay 0."""
        return 0 if self._at_ready is None else len(self._compiled) - self._at_ready

    def get(self, kind: str, attention: str, shape: Shape) -> Callable:
        """The program, compiled now if it is not yet."""
        key = Key(kind, attention, shape)
        if key not in self._compiled:
            if self._at_ready is not None:
                log.error("a program was compiled while serving: %s", key)
            self._compiled[key] = self._compile(key)
        return self._compiled[key]

    def keys(self) -> list[Key]:
        """All programs of the limits, largest shapes first."""
        return list(self._keys())

    def _keys(self) -> Iterator[Key]:
        for attention, (kind, grid) in itertools.product(
            self._limits.attentions, self._limits.grids.items()
        ):
            if kind == "features" and attention != self._limits.attentions[0]:
                continue
            for shape in grid.shapes():
                yield Key(kind, attention, shape)
                if kind == "generate":
                    yield Key("decode", attention, shape)

    def compile_all(self, progress: Callable[[int, int], None]) -> None:
        """Compile every program, several at a time.

        progress: is called with the number of those that are ready, and of all.
        """
        keys = [key for key in self.keys() if key not in self._compiled]
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            jobs = {pool.submit(self._compile, key): key for key in keys}
            for done, job in enumerate(concurrent.futures.as_completed(jobs), 1):
                self._compiled[jobs[job]] = job.result()
                progress(done, len(keys))
        self._at_ready = len(self._compiled)

    def _compile(self, key: Key) -> Callable:
        kind, _, shape = key
        model, params, bank = self._models[key.attention], self._params, self._bank
        rows, size = _blank_rows(shape), shape.size
        if kind == "rank":
            lowered = _rank.lower(params, bank, model, rows, _blank_edges(shape.rows, size))
        elif kind in ("score", "echo"):
            lowered = _score.lower(params, bank, model, rows, _blank_targets(shape.rows, size))
        elif kind == "features":
            lowered = _features.lower(params, model, rows)
        elif kind == "generate":
            lowered = _prefill.lower(params, bank, model, rows, size)
        else:
            read = functools.partial(programs.prefill, model=model, rows=rows, length=size)
            answers = jax.eval_shape(lambda params, bank: read(params, bank), params, bank)
            choice, most = blank_choice(shape.rows), self._limits.chunk
            lowered = _decode.lower(params, model, answers, choice, np.int32(1), most)
        return lowered.compile()


_rank = jax.jit(programs.rank, static_argnames="model")
_score = jax.jit(programs.score, static_argnames="model")
_features = jax.jit(programs.features, static_argnames="model")
_prefill = jax.jit(programs.prefill, static_argnames=("model", "length"))
_decode = jax.jit(programs.decode, static_argnames=("model", "most"), donate_argnames="answers")


def _blank_rows(shape: Shape) -> Rows:
    ids = np.zeros((shape.rows, shape.width), np.int32)
    return Rows(ids, ids, np.zeros(shape.rows, np.int32))


def _blank_edges(rows: int, nodes: int) -> Edges:
    edges = np.zeros((rows, 2 * nodes), np.int32)
    return Edges(stack_trees([], rows, nodes), edges, edges)


def _blank_targets(rows: int, length: int) -> Targets:
    ids = np.zeros((rows, length), np.int32)
    return Targets(ids, ids)


def blank_choice(rows: int) -> Choice:
    """Choices for rows without an answer."""
    return Choice(
        temperature=np.zeros(rows, np.float32),
        top_p=np.ones(rows, np.float32),
        seed=np.zeros(rows, np.uint32),
        limit=np.ones(rows, np.int32),
        eos=np.full(rows, -1, np.int32),
        cancelled=np.zeros(rows, bool),
    )
