"""What methods cost on one machine: memory and time of a step, and the time of an answer.

All methods are measured in one process and take turns in every round, so that what else the
machine does falls on all of them alike. Nothing is trained: times do not depend on the values.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig, TaskConfig
from jaxprompt.data.batches import Batch, Example, with_member
from jaxprompt.data.examples import tokenize
from jaxprompt.data.layout import round_target_length
from jaxprompt.data.microbatches import micro_batches
from jaxprompt.data.rows import Rows
from jaxprompt.data.tasks.splits import load_rows
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.data.virtual_tokens import VirtualTokens
from jaxprompt.inference.engine import Engine, make_engine
from jaxprompt.inference.predict import predict
from jaxprompt.methods.layers import joined
from jaxprompt.methods.registry import method_of
from jaxprompt.models import registry
from jaxprompt.models.checkpoints.load import Backbone, load_backbone
from jaxprompt.models.injection import Injection
from jaxprompt.runtime import parallel
from jaxprompt.studies.baselines import Record
from jaxprompt.studies.method_runs import MODEL_TUNING, method_config, reason_against
from jaxprompt.studies.runs import Run, Suite
from jaxprompt.training.optimizer import per_member
from jaxprompt.training.population import init_trainables
from jaxprompt.training.step import TrainState, TrainStep, first_state, make_train_step

COSTS = "costs"  # the run that measures them
BARE = "bare"  # the backbone without anything
SEVERAL = "several methods"  # members of as many methods as fit in the same batch


class Workplace(NamedTuple):
    """What all methods are measured on."""

    backbone: Backbone
    tokenizer: Tokenizer
    task: TaskConfig
    training: Rows  # of a batch
    questions: Rows  # one for each member of a mixed batch

    def examples(self, rows: Rows, length: int, targets: bool = True) -> list[Example]:
        """Rows with ``length`` virtual tokens."""
        virtual = VirtualTokens(self.backbone.config.vocab_size, length)
        return tokenize(self.task, rows, self.tokenizer, virtual, need_targets=targets)


class MethodStep:
    """The training step of a method, on one batch again and again."""

    def __init__(self, config: RunConfig, place: Workplace) -> None:
        backbone, method = place.backbone, method_of(config)
        examples = place.examples(place.training, config.prompt_length)
        self.mesh = parallel.make_mesh()
        devices, lengths = parallel.num_batch_shards(self.mesh), [len(e.inputs) for e in examples]
        depth = round_target_length(max(len(e.targets) for e in examples))
        model, rows = registry.plan_microbatches(
            backbone.model, lengths, batch_size=len(examples), devices=devices, target_length=depth
        )
        batches = micro_batches(
            examples, rows=rows, target_length=depth, layout=model.layout, devices=devices
        )
        self.batches: Sequence[Batch] = parallel.put_batch(batches, self.mesh)
        several = len(config.parts) > 1
        optimizer = per_member(config.train, [config.learning_rates()] if several else None)
        self.trainables = init_trainables(config, place.task, backbone, place.tokenizer)
        self.injection = None if not method.frozen else method.inject(
            self.trainables, backbone.params
        )  # fmt: skip
        self.state: TrainState = first_state(
            jax.tree.map(jnp.copy, self.trainables), method, optimizer, backbone.model, self.mesh
        )
        self.params = backbone.params
        self.step: TrainStep = make_train_step(
            model, method, optimizer, mesh=self.mesh, z_loss=config.train.z_loss
        )

    def bytes(self) -> dict[str, int]:
        """Bytes of a device in a step, as XLA's compiler counts them; empty where it does not."""
        compiled = self.step.lower(self.state, self.params, self.batches).compile()
        found = compiled.memory_analysis()
        if found is None:
            return {}
        state = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        sizes = {"state": state, "temporaries": found.temp_size_in_bytes}
        sizes["arguments"] = found.argument_size_in_bytes
        # where a batch is cut, the optimizer's state is no argument of the gradient's program
        waiting = 0 if len(self.batches) == 1 else sum(
            leaf.nbytes for leaf in jax.tree.leaves(self.state.optimizer)
        )  # fmt: skip
        return sizes | {"total": found.temp_size_in_bytes + found.argument_size_in_bytes + waiting}

    def take(self) -> None:
        """One step; returns when it has ended."""
        self.state, losses = self.step(self.state, self.params, self.batches)
        jax.block_until_ready((self.state, losses))


class Answers(NamedTuple):
    """An engine and the examples that it answers in one batch."""

    engine: Engine
    place: Workplace
    examples: Sequence[Example]

    def give(self) -> None:
        """The answers to all examples, in one batch."""
        predict(
            self.engine,
            self.place.task,
            self.examples,
            self.place.tokenizer,
            batch_size=len(self.examples),
        )


def measure_costs(run: Run, suite: Suite, backbone: Backbone) -> Record:
    """The record of all methods: what each step and answer takes, round by round, in seconds."""
    settings = run.settings
    mesh = parallel.make_mesh()
    whole = load_backbone(suite.backbones[run.backbone], mesh=mesh, **run.numerics)
    task = suite.tasks[run.task]
    place = Workplace(
        whole,
        registry.tokenizer_for(whole.config, whole.path),
        task,
        load_rows(task, "train", settings["batch_size"]),
        load_rows(task, "validation", settings["members"]),
    )
    configs: dict[str, RunConfig] = {}
    skipped: dict[str, str] = {}
    for name, own in settings["methods"].items():
        each = run._replace(method=name, settings=own)
        config = method_config(each, suite, whole, suite.folder(run))
        reason = reason_against(config, whole)
        if reason is None:
            configs[name] = config
        else:
            skipped[name] = reason
    steps: dict[str, MethodStep] = {}
    memory: dict[str, dict[str, int]] = {}
    for name, config in configs.items():
        suite.say(f"    compiling {name}")
        steps[name] = MethodStep(config, place)
        memory[name] = steps[name].bytes()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(whole.params))
    record: Record = {"skipped_methods": skipped, "memory": memory, "weights_bytes": weights}
    rounds = settings["rounds"]
    record["step_seconds"] = in_turns({name: step.take for name, step in steps.items()}, rounds)
    injections = {
        name: step.injection for name, step in steps.items() if step.injection is not None
    }
    suite.say("    answers")
    record |= answer_seconds(place, injections, configs, rounds)
    return record | {"members": len(place.questions), "batch_rows": len(place.training)}


Name = TypeVar("Name", bound=Hashable)


def in_turns(
    work: Mapping[Name, Callable[[], None]], rounds: int, least: int = 1
) -> dict[Name, list[float]]:
    """The seconds of each work in each round, after a first time that does not count.

    Each round begins with another one. A time is the least of ``least`` in a row.
    """
    for do in work.values():
        do()
    names = list(work)
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            times = []
            for _ in range(least):
                begun = time.perf_counter()
                work[name]()
                times.append(time.perf_counter() - begun)
            seconds[name].append(min(times))
    return seconds


def answer_seconds(
    place: Workplace,
    injections: Mapping[str, Injection],
    configs: Mapping[str, RunConfig],
    rounds: int,
) -> Record:
    """The seconds of an answer alone, and of a batch in which each row has another member."""
    count = len(place.questions)
    lengths = {name: configs[name].prompt_length for name in injections}
    bare = place.examples(place.questions, 0, targets=False)
    alone = {BARE: Answers(_engine(place, Injection()), place, bare[:1])}
    mixed = {BARE: Answers(_engine(place, Injection()), place, bare)}
    for name, injection in injections.items():
        examples = place.examples(place.questions, lengths[name], targets=False)
        alone[name] = Answers(_engine(place, injection), place, examples[:1])
        mixed[name] = _mixed(place, [injection] * count, [lengths[name]] * count)
    together, left_out = _joinable(injections)
    together = together[:count]
    if len(together) > 1:
        names = [together[k % len(together)] for k in range(count)]
        mixed[SEVERAL] = _mixed(place, [injections[n] for n in names], [lengths[n] for n in names])
    kinds = {"alone_seconds": alone, "mixed_seconds": mixed}
    work = {(kind, name): some[name].give for kind, some in kinds.items() for name in some}
    seconds = in_turns(work, rounds, least=3)
    return {
        **{kind: {name: seconds[kind, name] for name in some} for kind, some in kinds.items()},
        "mixed_methods": together,
        "not_mixed": left_out,
    }


def _engine(place: Workplace, injection: Injection) -> Engine:
    backbone = place.backbone
    return make_engine(backbone.params, injection, backbone.model, backbone.mesh)


def _mixed(place: Workplace, injections: Sequence[Injection], lengths: Sequence[int]) -> Answers:
    """Question k is answered by member k."""
    engine = _engine(place, joined(injections))
    vocabulary = place.backbone.config.vocab_size
    examples = [
        with_member(
            place.examples([place.questions[k]], length, targets=False)[0],
            k,
            vocabulary,
            engine.prompt_length,
        )
        for k, length in enumerate(lengths)
    ]
    return Answers(engine, place, examples)


def _joinable(injections: Mapping[str, Injection]) -> tuple[list[str], list[str]]:
    """The methods of which members fit in one batch with those before them, and the others."""
    fitting: list[str] = []
    others: list[str] = []
    for name in injections:
        try:
            joined([injections[each] for each in (*fitting, name)])
        except UserError:
            others.append(name)
        else:
            fitting.append(name)
    return fitting, others


def median_ratio(seconds: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """How many times as long as the others: median, least and largest of the rounds' ratios."""
    ratios = [mine / other for mine, other in zip(seconds, others, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def is_frozen(method: str) -> bool:
    """Whether a method leaves the backbone as it is."""
    return method != MODEL_TUNING
