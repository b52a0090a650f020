"""The engine of a server: rows of any tasks and prompts in, outcomes of each row out.

``work.Engine`` says what the batcher asks of it. All shapes are compiled by ``warm``; after it,
nothing compiles, whatever is asked together. A row never depends on the rows beside it: within one
shape its numbers are the same bits alone and in any mix.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jaxprompt.config.errors import UserError, listed
from jaxprompt.data.batches import Batch, Example, make_batch, with_member
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.models import registry
from jaxprompt.models.checkpoints.load import Backbone
from jaxprompt.models.label_tree import stack_trees
from jaxprompt.models.ops import quantization
from jaxprompt.serving import programs
from jaxprompt.serving.grid import Grid, Limits, Programs, Shape, blank_choice
from jaxprompt.serving.programs import Answers, Choice, Edges, Rows, Targets, TokenScores
from jaxprompt.serving.slots import SlotBank
from jaxprompt.serving.version import Version
from jaxprompt.serving.work import (
    Chunk,
    Echoed,
    Failed,
    Featured,
    Kind,
    Outcome,
    Ranked,
    Scored,
    Tokens,
    Work,
)

_NO_TARGET = np.zeros(0, np.int32)
_FINISHES: dict[int, Literal["stop", "length", "cancelled"]] = {
    programs.STOP: "stop",
    programs.LENGTH: "length",
    programs.CANCELLED: "cancelled",
}


class Lane(NamedTuple):
    """Rows of one lane may share a batch."""

    kind: Kind
    attention: str
    size: int = 0  # of answers: the longest that its program has room for


class _Need(NamedTuple):
    """What one row asks of a shape."""

    width: int
    size: int


class Compute:
    """A frozen backbone, a bank of prompts, and the compiled programs."""

    def __init__(self, backbone: Backbone, tokenizer: Tokenizer, bank: SlotBank, limits: Limits):
        """Nothing is compiled before ``warm``.

        Args:
            backbone: on one device.
            tokenizer: of the backbone.
            bank: whose slots hold prompts of this backbone.
            limits: which programs there are.

        Raises:
            UserError: the backbone is spread over several devices.
        """
        if backbone.mesh is not None:
            raise UserError(
                "A server computes on one device and the backbone is spread over "
                f"{backbone.mesh.size}; start one server for each device."
            )
        self.backbone, self.bank, self.limits = backbone, bank, limits
        self._eos_id, self._vocabulary = tokenizer.eos_id, backbone.config.vocab_size
        self._one_sequence = registry.one_sequence(backbone.config)
        self._params = quantization.view_as_uint16(backbone.params)
        models = {
            attention: registry.with_attention(backbone.model, attention)
            for attention in limits.attentions
        }
        self._programs = Programs(self._params, models, bank.injection, limits)

    @property
    def num_compilations(self) -> int:
        """Programs that were compiled after ``warm``: it should stay 0."""
        return self._programs.num_late

    @property
    def num_programs(self) -> int:
        """Programs that ``warm`` compiles."""
        return len(self._programs.keys())

    def warm(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compile all programs.

        progress: is called with the number of programs that are ready, and of all.
        """
        self._programs.compile_all(progress)

    def check_fits(self, version: Version) -> None:
        """Raise a UserError unless rows of the version can be answered. Any thread may call it."""
        self.bank.check_fits(version)
        if self._attention(version) not in self.limits.attentions:
            raise UserError(
                f"Prompt {version.name!r} was tuned with the attention {version.attention!r} and "
                f"this server has {listed(self.limits.attentions)}; name a prompt of its kind "
                "where the server is started."
            )
        most, plan = self.limits.max_nodes, version.labels
        if plan is not None and plan.nodes > most:
            raise UserError(
                f"The labels of prompt {version.name!r} have {plan.nodes} different beginnings and "
                f"the server has room for {most}; start it with --max-label-nodes {plan.nodes}."
            )

    def check(self, work: Work) -> None:
        """Refuse work that can never be answered. Raises UserError, with the limit and the fix."""
        grid = self._grid(work.kind)
        self._check_ids(work)
        if work.kind == "rank" and work.labels is None:
            raise UserError("There are no labels to rank; name a prompt whose task has labels.")
        if work.kind == "generate" and (work.settings is None or work.settings.max_tokens < 1):
            raise UserError("max_tokens is below 1; ask for one token or more.")
        width, size = self._need(work)
        virtual = int((work.example.inputs >= self._vocabulary).sum())
        if work.kind == "echo" and virtual > grid.widths[-1]:
            raise UserError(f"The prompt has {virtual} virtual tokens, more than a slot holds.")
        if width > grid.widths[-1]:
            raise UserError(
                f"The input has {width - virtual} tokens and there is room for "
                f"{grid.widths[-1] - virtual}; shorten it, or start the server with a larger "
                "--max-input-length."
            )
        if size > grid.sizes[-1]:
            what, option = _SIZES[work.kind]
            raise UserError(
                f"{what} {size} and there is room for {grid.sizes[-1]}; ask for less, or start the "
                f"server with a larger {option}."
            )

    def _grid(self, kind: Kind) -> Grid:
        grid = self.limits.grids.get(kind)
        if grid is not None:
            return grid
        if kind == "echo" and not self._one_sequence:
            raise UserError(
                "echo needs a decoder-only backbone, and this one has an encoder; ask /v1/score "
                "for the likelihood of a target."
            )
        raise UserError(f"This server does not answer {kind!r}; it answers "
                        f"{listed(self.limits.grids)}.")  # fmt: skip

    def _check_ids(self, work: Work) -> None:
        """An id beyond the vocabulary is a vector of the bank, so no client may choose it."""
        length = 0 if work.version is None or work.kind == "features" else work.version.length
        inputs, targets = work.example.inputs, work.example.targets
        if not len(inputs):
            raise UserError("The input is empty; give at least one token.")
        if inputs.min() < 0 or inputs.max() >= self._vocabulary + length:
            raise UserError(
                f"The input has ids outside of the vocabulary, 0 to {self._vocabulary - 1}."
            )
        if len(targets) and (targets.min() < 0 or targets.max() >= self._vocabulary):
            raise UserError(
                f"The target has ids outside of the vocabulary, 0 to {self._vocabulary - 1}."
            )
        if (
            work.kind == "echo"
            and (_after_lead(inputs, self._vocabulary) >= self._vocabulary).any()
        ):
            raise UserError("Virtual tokens stand within the text; echo needs them in front of it.")

    def lane(self, work: Work) -> Hashable:
        """Rows of one lane may share a batch: those of one kind and attention."""
        size = 0
        if work.kind == "generate":  # short answers do not wait for long ones
            size = next(each for each in self._grid("generate").sizes if each >= _max_tokens(work))
        attention = self.limits.attentions[0]
        if work.kind != "features" and work.version is not None:
            attention = self._attention(work.version)
        return Lane(work.kind, attention, size)

    def _attention(self, version: Version) -> str:
        return version.attention if self._one_sequence else "causal"

    def cost(self, work: Work) -> int:
        """Tokens of the row as the smallest program that fits it pads them."""
        shape = self._grid(work.kind).fitting(1, *self._need(work))
        assert shape is not None, "work that was not checked"
        return shape.width + shape.size

    def _need(self, work: Work) -> _Need:
        width = len(work.example.inputs)
        if work.kind == "rank":
            return _Need(width, 0 if work.labels is None else work.labels.nodes)
        if work.kind == "score":
            return _Need(width, len(work.example.targets))
        if work.kind == "generate":
            return _Need(width, _max_tokens(work))
        if work.kind == "echo":
            after = len(_after_lead(work.example.inputs, self._vocabulary))
            return _Need(width - after, after + 1)
        return _Need(width, 0)

    def run(self, batch: Sequence[Work]) -> Sequence[Outcome]:
        """The outcome of each row; of any kind but "generate", all of one lane.

        A batch that no program holds is cut. Each part is dispatched before any is fetched.
        """
        parts = self._parts(batch)
        outputs = [self._dispatch([batch[i] for i in part]) for part in parts]
        outcomes: list[Outcome] = [Failed("The row was not computed.")] * len(batch)
        for part, output in zip(parts, outputs, strict=True):
            arrays = jax.tree.map(np.asarray, output)
            for row, number in enumerate(part):
                mine = jax.tree.map(lambda leaf, row=row: leaf[row], arrays)
                outcomes[number] = self._outcome(batch[number], mine)
        return outcomes

    def _outcome(self, work: Work, result: np.ndarray | TokenScores) -> Outcome:
        if isinstance(result, TokenScores):
            if work.kind == "score":
                return _scored(work, result)
            inputs = work.example.inputs
            text = inputs[inputs < self._vocabulary]
            return _echoed(work, text, result)
        return _ranked(work, result) if work.kind == "rank" else _featured(work, result)

    def generate(self, batch: Sequence[Work]) -> Iterator[Sequence[Chunk | Failed | None]]:
        """The next chunk of each row, again and again until all rows have ended.

        The first chunk has one token, so that a stream begins early. None stands for a row that has
        ended before. Nothing is computed between two chunks. Slots are read before the first only.
        """
        parts = self._parts(batch)
        running = [self._start([batch[i] for i in part]) for part in parts]
        steps = 1
        while any(not all(each.ended) for each in running):
            chunks: list[Chunk | Failed | None] = [None] * len(batch)
            for part, each in zip(parts, running, strict=True):
                for number, chunk in zip(part, each.step(steps), strict=True):
                    chunks[number] = chunk
            yield chunks
            steps = self.limits.chunk

    def _parts(self, batch: Sequence[Work]) -> list[list[int]]:
        """The numbers of the rows that are computed together, widest first."""
        needs = [self._need(work) for work in batch]
        parts: list[list[int]] = []
        for number in sorted(range(len(batch)), key=lambda i: -needs[i].width):
            if parts and self._hold([*parts[-1], number], batch, needs):
                parts[-1].append(number)
            else:
                parts.append([number])
        return parts

    def _hold(self, part: Sequence[int], batch: Sequence[Work], needs: Sequence[_Need]) -> bool:
        versions = {batch[i].version for i in part} - {None}
        shape = self._shape([batch[i] for i in part], [needs[i] for i in part])
        return shape is not None and len(versions) <= self.bank.room

    def _shape(self, batch: Sequence[Work], needs: Sequence[_Need]) -> Shape | None:
        width, size = max(need.width for need in needs), max(need.size for need in needs)
        return self._grid(batch[0].kind).fitting(len(batch), width, size)

    def _dispatch(self, batch: Sequence[Work]) -> jax.Array | TokenScores:
        """Results of all rows on the device, before they are there."""
        kind, attention, _ = self._lane(batch)
        shape = self._shape(batch, list(map(self._need, batch)))
        assert shape is not None, "work that was not checked"
        program = self._programs.get(kind, attention, shape)
        padded = self._padded(batch, shape)
        rows = Rows(padded.inputs, padded.segments, padded.member)
        if kind == "features":
            return program(self._params, rows)
        if kind == "rank":
            return program(self._params, self.bank.injection, rows, _edges(batch, shape))
        targets = Targets(padded.targets, padded.target_segments)
        return program(self._params, self.bank.injection, rows, targets)

    def _lane(self, batch: Sequence[Work]) -> Lane:
        lane = self.lane(batch[0])
        assert isinstance(lane, Lane)
        return lane

    def _start(self, batch: Sequence[Work]) -> "_Generation":
        lane = self._lane(batch)
        shape = self._shape(batch, list(map(self._need, batch)))
        assert shape is not None, "work that was not checked"
        padded = self._padded(batch, shape)
        rows = Rows(padded.inputs, padded.segments, padded.member)
        read = self._programs.get("generate", lane.attention, shape)
        answers = read(self._params, self.bank.injection, rows)
        go_on = self._programs.get("decode", lane.attention, shape)
        step = lambda answers, choice, steps: go_on(self._params, answers, choice, np.int32(steps))
        return _Generation(batch, answers, step, _choice(batch, shape.rows, self._eos_id))

    def _padded(self, batch: Sequence[Work], shape: Shape) -> Batch:
        """The batch as arrays, with its versions in their slots; ``member`` has the slots."""
        slots = self.bank.place([_version(work) for work in batch])
        examples = [
            with_member(self._example(work), slot, self._vocabulary, self.bank.shape.length)
            for work, slot in zip(batch, slots, strict=True)
        ]
        length = shape.size if batch[0].kind in ("score", "echo") else None
        return make_batch(examples, rows=shape.rows, input_length=shape.width, target_length=length)

    def _example(self, work: Work) -> Example:
        inputs = work.example.inputs
        if work.kind == "score":
            return Example(inputs, work.example.targets)
        if work.kind != "echo":
            return Example(inputs, _NO_TARGET)
        # one more target, which is never looked at: what is likely in its place is
        text = _after_lead(inputs, self._vocabulary)
        return Example(inputs[: len(inputs) - len(text)], np.append(text, 0).astype(np.int32))


_SIZES = {
    "rank": ("The labels have so many different beginnings:", "--max-label-nodes"),
    "score": ("The tokens of the target are", "--max-target-length"),
    "echo": ("The tokens of the text are", "--max-input-length"),
    "generate": ("max_tokens is", "--max-new-tokens"),
}


def _max_tokens(work: Work) -> int:
    return 1 if work.settings is None else work.settings.max_tokens


def _version(work: Work) -> Version | None:
    return None if work.kind == "features" else work.version


def _after_lead(inputs: Int[np.ndarray, " s"], vocabulary: int) -> Int[np.ndarray, " t"]:
    """The tokens behind the virtual ones in front, or behind the first where there are none."""
    words = np.flatnonzero(inputs < vocabulary)
    lead = int(words[0]) if len(words) else len(inputs)
    return inputs[max(lead, 1) :]


def _edges(batch: Sequence[Work], shape: Shape) -> Edges:
    plans = [work.labels for work in batch if work.labels is not None]
    parents, tokens = np.zeros((2, shape.rows, 2 * shape.size), np.int32)
    for row, plan in enumerate(plans):
        parents[row, : len(plan.parents)] = plan.parents
        tokens[row, : len(plan.tokens)] = plan.tokens
    tree = stack_trees([plan.tree for plan in plans], shape.rows, shape.size)
    return Edges(tree, parents, tokens)


def _choice(batch: Sequence[Work], rows: int, eos_id: int) -> Choice:
    choice = blank_choice(rows)
    for row, work in enumerate(batch):
        assert work.settings is not None
        choice.temperature[row], choice.top_p[row] = work.settings.temperature, work.settings.top_p
        choice.seed[row] = work.settings.seed % 2**32
        choice.limit[row] = work.settings.max_tokens
        choice.eos[row] = -1 if work.settings.ignore_eos else eos_id
    return choice


def _failed(work: Work) -> Failed:
    prompt = "the backbone" if work.version is None else f"prompt {work.version.name!r}"
    return Failed(
        f"The scores of this row are not finite numbers: {prompt} holds values that are not "
        "finite, or too large for the dtype."
    )


def _ranked(work: Work, log_p: np.ndarray) -> Outcome:
    assert work.labels is not None
    scores = work.labels.scores(log_p)
    return Ranked(scores) if np.isfinite(scores).all() else _failed(work)


def _scored(work: Work, scores: TokenScores) -> Outcome:
    count = len(work.example.targets)
    total = float(np.asarray(scores.log_probs)[:count].sum(dtype=np.float32))
    return Scored(total, count) if np.isfinite(total) else _failed(work)


def _echoed(work: Work, text: Int[np.ndarray, " t"], scores: TokenScores) -> Outcome:
    """The text's tokens and the likeliest after them.

    Where no virtual token is in front, the first token has no likelihood: the scores begin behind.
    """
    log_probs, top_ids, top = map(np.asarray, scores)
    count, missing = len(text), int(len(text) == len(work.example.inputs))
    log_probs, top_ids, top = (x[: count + 1 - missing] for x in (log_probs, top_ids, top))
    if not np.isfinite(top).all():
        return _failed(work)
    ids = np.append(text, top_ids[-1, 0]).astype(np.int32)
    log_probs = np.append(log_probs[:-1], top[-1, 0])
    if missing:
        log_probs = np.append(np.float32(np.nan), log_probs)
        top_ids = np.concatenate([np.zeros_like(top_ids[:1]), top_ids])
        top = np.concatenate([np.full_like(top[:1], np.nan), top])
    return Echoed(Tokens(ids, log_probs, top_ids, top))


def _featured(work: Work, vector: np.ndarray) -> Outcome:
    return Featured(vector) if np.isfinite(vector).all() else _failed(work)


class _Generation:
    """Rows whose answers are being generated together."""

    def __init__(
        self,
        batch: Sequence[Work],
        answers: Answers,
        go_on: Callable[[Answers, Choice, int], tuple[Answers, programs.Tokens]],
        choice: Choice,
    ):
        self._batch, self._answers, self._go_on, self._choice = batch, answers, go_on, choice
        self.ended = [False] * len(batch)

    def step(self, steps: int) -> list[Chunk | Failed | None]:
        """The next chunk of each row."""
        if all(self.ended):
            return [None] * len(self._batch)
        for row, work in enumerate(self._batch):
            self._choice.cancelled[row] = work.cancelled
        self._answers, tokens = self._go_on(self._answers, self._choice, steps)
        tokens = jax.tree.map(np.asarray, tokens)
        finish = tokens.finish
        chunks = [self._chunk(row, tokens, int(finish[row])) for row in range(len(self._batch))]
        self.ended = [code != programs.GOING for code in finish[: len(self._batch)].tolist()]
        return chunks

    def _chunk(self, row: int, tokens: programs.Tokens, finish: int) -> Chunk | Failed | None:
        if self.ended[row]:
            return None
        if finish == programs.NON_FINITE:
            return _failed(self._batch[row])
        ids = tokens.ids[row]
        count = int((ids >= 0).sum())
        scores = [np.asarray(leaf[row, :count]) for leaf in tokens.scores]
        return Chunk(Tokens(np.asarray(ids[:count]), *scores), _FINISHES.get(finish))
