"""Tuning: what ``fit`` needs to train the prompts, or the whole models, of a run."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, TypedDict

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxprompt.config.errors import UserError
from jaxprompt.config.methods import rate_warnings
from jaxprompt.config.mixture import Mixture, parts_of
from jaxprompt.config.schema import RunConfig, TaskConfig, TrainConfig
from jaxprompt.data.batches import Example, with_member
from jaxprompt.data.layout import BatchBudget
from jaxprompt.data.microbatches import Cut
from jaxprompt.data.sampling import Draw, training_batches
from jaxprompt.data.tasks.registry import class_words
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.evaluation.plots import draw_curves
from jaxprompt.losses import LabelLoss, Loss, cross_entropy
from jaxprompt.methods import soft_verbalizer
from jaxprompt.methods.artefact import load_prompt
from jaxprompt.methods.base import (
    Method,
    Trainables,
    grouped,
    member_groups,
    without_member_axis,
)
from jaxprompt.methods.hard_prompt import (
    Words,
    allowed_words,
    as_template,
    table_of,
    words_of,
)
from jaxprompt.methods.layers import joined
from jaxprompt.methods.registry import method_of
from jaxprompt.models import registry
from jaxprompt.models.checkpoints.load import Backbone, load_backbone
from jaxprompt.models.injection import Injection, some_members, without_dropout
from jaxprompt.models.ops import quantization
from jaxprompt.runtime import parallel, processes
from jaxprompt.runtime.devices import describe, oversubscription_warning
from jaxprompt.runtime.files import write_atomically
from jaxprompt.runtime.signals import Signals
from jaxprompt.training import inputs
from jaxprompt.training.datasets import (
    Rows,
    TaskDataset,
    build_dataset,
    build_split,
    read_splits,
    shares_of,
    single_tasks,
    target_warnings,
    tasks_of,
    truncation_warnings,
)
from jaxprompt.training.evaluator import Evaluator
from jaxprompt.training.label_losses import label_choices
from jaxprompt.training.metric_log import (
    MetricName,
    Metrics,
    Reporter,
    Row,
    StepLog,
    log_scores,
)
from jaxprompt.training.optimizer import per_member, schedule_warnings
from jaxprompt.training.population import (
    as_markdown,
    init_trainables,
    keep_members,
    length_warnings,
    nearest_notes,
    population_table,
    stack_trainables,
    start_warnings,
    survivors,
)
from jaxprompt.training.progress import Judgement, Progress, Rules, best_trial, judge
from jaxprompt.training.results import (
    metadata_for,
    note_test,
    restore_best,
    save_tuned,
    saved_best_steps,
    tidy_best,
)
from jaxprompt.training.run_dir import Result, RunDir
from jaxprompt.training.search import Search, check_search, of_vectors, search_step
from jaxprompt.training.step import (
    Step,
    TrainState,
    all_finite,
    first_state,
    make_train_step,
    shardings,
)
from jaxprompt.training.steps import Steps
from jaxprompt.training.trial import Trial, by_task, make_trials, slot_order


def inputs_of_files(config: RunConfig) -> inputs.Inputs:
    """Digests of the rows of a run, as far as they are in files that are there."""
    digests: inputs.Inputs = {}
    for task in single_tasks(tasks_of(config.members())):
        digests |= inputs.of_files(task, config.train.max_eval_examples)
    return digests


def _by_name(tasks: Sequence[TaskConfig]) -> dict[str, TaskConfig]:
    return {task.name: task for task in tasks}


def prepare(
    config: RunConfig, run: RunDir, reporter: Reporter, signals: Signals, held: Rows | None = None
) -> "Tuning":
    """Load the backbone and tokenize the rows of all trials. Nothing is written.

    Args:
        held: the rows of each split of the one task, where they are in memory.

    Raises:
        UserError: rows, labels, words of a start or devices that a run cannot have.
    """
    method, mesh = method_of(config), _make_mesh(config)
    # data first, where most mistakes are: the backbone may take minutes to load
    limit, member_tasks = config.train.max_eval_examples, tasks_of(config.members())
    tasks = single_tasks(member_tasks)
    rows = {task.name: read_splits(task, limit, held) for task in tasks}
    backbone, tokenizer = _load(config, mesh, reporter)
    if config.searches:
        check_search(config.search, backbone.config)
    datasets = _build_datasets(config, member_tasks, rows, tokenizer, backbone.config.vocab_size)
    digests = [
        split.digest()
        for dataset in {id(dataset): dataset for dataset in datasets}.values()
        for split in dataset.splits()
    ]
    processes.assert_equal_across_processes("backbone or data", [backbone.fingerprint, *digests])
    _describe_rows(rows, reporter)
    for text in dict.fromkeys(map(shares_of, datasets)):
        if text is not None:
            reporter.say(text)
    reads = inputs.of_backbone(backbone.config, backbone.fingerprint)
    reads["tokenizer"] = tokenizer.fingerprint()
    for task in tasks:
        reads |= inputs.of_rows(task, rows[task.name])
    trials = make_trials(config, datasets)
    _check_positions(backbone.config, trials)
    for warning in _warnings(config, trials, tokenizer, mesh):
        reporter.say(f"warning: {warning}")
    for note in nearest_notes([trial.config for trial in trials]):
        reporter.say(note)
    starts = partial(_starts, backbone, trials, tokenizer)
    # prompts start before anything is written: their words may have no token. A whole model is
    # copied only when the loaded one is no longer needed
    prompts = starts(backbone.params) if method.frozen else None
    return Tuning(
        config=config,
        method=method,
        run=run,
        reporter=reporter,
        signals=signals,
        mesh=mesh,
        backbone=backbone,
        tokenizer=tokenizer,
        rows=rows,
        trials=trials,
        evaluator=Evaluator(backbone.model, mesh, tokenizer, config.train.eval_batch_size, signals),
        all_inputs=reads,
        starts=prompts,
        shapes=jax.eval_shape(lambda: prompts or starts(backbone.params)),
    )


def _make_mesh(config: RunConfig) -> Mesh:
    mesh, settings = parallel.make_mesh(config.mesh), config.train
    parallel.check_batch_size(settings.batch_size, mesh, "train.batch_size")
    if settings.micro_batch_size:
        parallel.check_batch_size(settings.micro_batch_size, mesh, "train.micro_batch_size")
    dora = any(one.lora.dora for one in config.members() if "lora" in one.parts)
    if dora and mesh.shape["fsdp"] > 1:
        raise UserError(
            f"lora.dora is true and mesh.fsdp is {mesh.shape['fsdp']}: the length of a column "
            "needs the whole weight, of which each device holds a part; use mesh.data or "
            "mesh.tensor."
        )
    return mesh


def _load(config: RunConfig, mesh: Mesh, reporter: Reporter) -> tuple[Backbone, Tokenizer]:
    model = config.model
    reporter.say(f"loading {config.backbone}, {model.dtype}, on {describe()}")
    backbone = load_backbone(
        config.backbone,
        dtype=model.dtype,
        quantization=model.quantization,
        mesh=mesh,
        dropout=model.dropout,
        unroll=model.unroll,
        remat=model.remat,
        attention=model.attention,
        trainable=not method_of(config).frozen,
        flash=model.flash,
    )
    source = config.tokenizer or backbone.path
    return backbone, registry.tokenizer_for(backbone.config, source)


def _build_datasets(
    config: RunConfig, tasks: Sequence[TaskConfig], rows: Mapping[str, Rows],
    tokenizer: Tokenizer, vocabulary: int,
) -> list[TaskDataset]:  # fmt: skip
    """The dataset of each member; members with one task and prompt length share it.

    tasks: of each member.
    """
    members = config.members()
    keys = [(task.name, member.prompt_length) for member, task in zip(members, tasks, strict=True)]
    by_name = _by_name(tasks)
    built = {
        (name, length): build_dataset(by_name[name], rows, tokenizer, length, vocabulary)
        for name, length in dict.fromkeys(keys)
    }
    return [built[key] for key in keys]


def _check_positions(shape: registry.Config, trials: Sequence[Trial]) -> None:
    """Raise UserError for rows that are longer than the backbone can read."""
    for trial in trials if registry.masked(shape) else ():
        examples = [example for split in trial.dataset.splits() for example in split.examples]
        longest, answer = (
            max(len(getattr(example, name)) for example in examples)
            for name in ("inputs", "targets")
        )
        prefix = trial.config.prefix.length if "prefix" in trial.config.parts else 0
        registry.check_positions(shape, longest, answer, prefix)


def _describe_rows(rows: Mapping[str, Rows], reporter: Reporter) -> None:
    words = {"training": "train", "validation": "validation", "test": "test"}
    for name, splits in rows.items():
        counts = [f"{len(splits[s])} {word} rows" for word, s in words.items() if s in splits]
        reporter.say(f"task {name}: {', '.join(counts)}")


def _warnings(
    config: RunConfig, trials: Sequence[Trial], tokenizer: Tokenizer, mesh: Mesh
) -> list[str]:
    """What is likely a mistake of the user, a sentence each."""
    datasets = [members[0].dataset for members in by_task(trials).values()]
    truncated = itertools.chain(*map(truncation_warnings, datasets))
    targets = [text for dataset in datasets for text in target_warnings(dataset, tokenizer)]
    longest = max(trials, key=lambda trial: trial.length)
    sizes = length_warnings(longest.length, longest.dataset.training.examples)
    starts = start_warnings([t.config for t in trials], [t.task for t in trials])
    crowded = filter(None, [oversubscription_warning(mesh.devices.flatten().tolist())])
    rates = rate_warnings(config.train.optimizer, config.learning_rates())
    mistakes = [*schedule_warnings(config.train), *rates, *starts]
    return [*mistakes, *truncated, *targets, *sizes, *crowded]


def _starts(
    backbone: Backbone, trials: Sequence[Trial], tokenizer: Tokenizer, params: registry.Params
) -> list[Trainables]:
    """The trainables [1, ...] of each trial before step 0."""
    source = backbone._replace(params=params)
    return [
        init_trainables(t.config, t.task, source, tokenizer, t.dataset.training.examples)
        for t in trials
    ]


class BatchSize(NamedTuple):
    """What the batches of a run are, before they are cut.

    rows: examples of a batch, of all members that may share rows.
    devices: that these go over.
    length: virtual tokens of an example, at most.
    nodes: of the tree of labels, where labels are compared.
    apart: each member has rows of its own.
    drops: changes of layers have dropout, also at the virtual tokens; so each row computes its own.
    """

    rows: int
    devices: int
    length: int
    nodes: int | None = None
    apart: bool = False
    drops: bool = False


def plan_batches(
    model: registry.Model,
    settings: TrainConfig,
    examples: Sequence[Sequence[Example]],
    size: BatchSize,
) -> tuple[registry.Model, Cut]:
    """The model for the batches of a run, and how these are cut into micro-batches.

    Args:
        examples: all of the run, each sequence once.
    """
    inputs = [example.inputs for each in examples for example in each]
    longest = max(len(example.targets) for each in examples for example in each)
    logits = longest if size.nodes is None else max(longest, size.nodes)  # of each example
    if not size.drops:
        model = registry.with_shared_prefix(model, inputs, size.length)
    model, micro = registry.plan_microbatches(
        model.with_layout(one_member_per_row=True) if size.apart else model,
        [len(ids) for ids in inputs],
        batch_size=size.rows,
        devices=size.devices,
        rows=settings.micro_batch_size,
        target_length=logits,
        # with a window, rows have hardly any padding and their total lengths differ
        max_widths=4 if settings.length_bucketing_window == 0 else 0,
    )
    # rows that the user asks for are not cut again
    budget = (
        BatchBudget()
        if settings.micro_batch_size
        else registry.budget(model.config, size.devices, training=True)
    )
    budget = budget._replace(targets=budget.targets * longest / logits)
    return model, Cut(micro, model.layout, size.devices, budget)


class TestResult(TypedDict, total=False):
    """What ``result.json`` says of a task's test rows, where there are any."""

    test_rows: int
    test: Metrics
    test_error: str  # why there are no metrics


class TemplateResult(TypedDict, total=False):
    """What ``result.json`` says of the words that a search has found."""

    words: str
    template: str  # of the task with these words, and without virtual tokens
    template_value: float  # the metric of the bare backbone with it, on validation rows


class TaskResult(TestResult, TemplateResult):
    """What ``result.json`` says of a task."""

    task: str
    method: str
    metric: str  # the one that selects the best step
    value: float  # of it, on validation rows
    majority: float  # of always answering the commonest label
    untuned: float  # of the backbone without tuning
    rows: int  # validation rows
    best_step: int
    trainable_parameters: int
    prompt: str | None  # the directory of the tuned prompt
    model: str | None  # that of a tuned model


@dataclass
class Tuning:
    """A run that tunes prompts or whole models on a backbone; see ``loop.Job``.

    starts: the trainables of each trial before step 0, until the first state is made of them.
    shapes: their shapes and dtypes.
    """

    config: RunConfig
    method: Method
    run: RunDir
    reporter: Reporter
    signals: Signals
    mesh: Mesh
    backbone: Backbone
    tokenizer: Tokenizer
    rows: Mapping[str, Rows]
    trials: tuple[Trial, ...]
    evaluator: Evaluator
    all_inputs: inputs.Inputs
    starts: list[Trainables] | None
    shapes: list[Trainables]

    @property
    def names(self) -> list[MetricName]:
        return [trial.name for trial in self.trials]

    @property
    def sharded(self) -> bool:
        return not self.method.frozen

    @property
    def inputs(self) -> inputs.Inputs:
        """Digests of what decides what is learnt: test rows only give a figure at the end."""
        return {k: v for k, v in self.all_inputs.items() if not k.endswith("/test")}

    # -- states

    def start(self) -> tuple[TrainState, Progress]:
        """Measure the baselines, and make the state before step 0."""
        self.run.open_metrics(-1)
        numbers = [trial.number for trial in slot_order(self.trials)]
        progress = Progress.of_trials(numbers, inputs=self.inputs, **self._log_baselines())
        self.restore_files(progress)
        trainables = self._take_starts()
        state = first_state(
            self._stacked(trainables, progress),
            self.method,
            self._optimizer(progress),
            self.backbone.model,
            self.mesh,
        )
        self.run.checkpoints.save(0, state, progress.to_json())
        return state, progress

    def _log_baselines(self) -> dict[str, Metrics]:
        """The metric of each task without tuning, and of always giving the commonest label."""
        untuned: Metrics = {}
        majority: Metrics = {}
        row: Row = {"step": 0}
        for name, members in by_task(self.trials).items():
            task, prefix = members[0].task, members[0].prefix
            parts = {part.name: self._baselines(part) for part in parts_of(task)}
            untuned[name], majority[name] = map(fmean, zip(*parts.values(), strict=True))
            row[f"{prefix}untuned/{task.metrics[0]}"] = untuned[name]
            row[f"{prefix}majority"] = majority[name]
        self.run.metrics.write(row)
        return {"untuned": untuned, "majority": majority}

    def _baselines(self, task: TaskConfig) -> tuple[float, float]:
        """Of one task, see ``Evaluator.baselines``."""
        vocabulary, rows = self.backbone.config.vocab_size, self.rows[task.name]
        plain = build_split(task, "validation", rows, self.tokenizer, 0, vocabulary)
        return self.evaluator.baselines(self.backbone.params, task, plain, self.backbone.source)

    def _take_starts(self) -> list[Trainables]:
        params, starts = self.backbone.params, self.starts
        self.starts = None
        self._free_weights()
        return starts or _starts(self.backbone, self.trials, self.tokenizer, params)

    def _free_weights(self) -> None:
        """Where whole models are trained, their weights are in the state alone."""
        if not self.method.frozen:
            self.backbone = self.backbone._replace(params={})

    def check(self, progress: Progress) -> None:
        """Raise UserError where a checkpoint says that the run read something else."""
        if progress.untuned is None:
            raise UserError(
                f"The checkpoints in {str(self.run.path)!r} are of an earlier version; delete the "
                "directory to start again, or choose another output."
            )
        inputs.check_inputs(self.run.path, progress.inputs, self.inputs)

    def restore_files(self, progress: Progress) -> None:
        """Let the best prompts on disk be those of ``progress``."""
        result, frozen = self.run.path / "result.json", self.method.frozen
        restore = partial(restore_best, self.trials, progress, result, prompt=frozen)
        processes.on_process_zero(restore)

    def abstract_state(self, progress: Progress) -> TrainState:
        """Shapes, dtypes and shardings of a state, of which nothing is allocated."""
        self.starts = None
        self._free_weights()
        optimizer = self._optimizer(progress)

        def begin(shapes: list[Trainables]) -> TrainState:
            trainables = self._stacked(shapes, progress)
            return TrainState(jax.numpy.int32(0), trainables, optimizer.init(trainables))

        like = jax.eval_shape(begin, self.shapes)
        places = shardings(like, self.method, self.backbone.model, self.mesh)
        return parallel.with_sharding(like, places)

    def _active(self, progress: Progress) -> list[Trial]:
        """The trials that go on, by slot."""
        return [self.trials[number] for number in progress.active]

    def _stacked(self, trainables: Sequence[Trainables], progress: Progress) -> Trainables:
        """The trainables of the active trials as one, of those of all trials."""
        structures = [trial.structure for trial in self._active(progress)]
        return stack_trainables([trainables[number] for number in progress.active], structures)

    def _methods(self, progress: Progress) -> list[Method]:
        """The method of each structure that active trials have."""
        groups = itertools.groupby(self._active(progress), lambda trial: trial.structure)
        return [method_of(next(members).config) for _, members in groups]

    def _injections(self, state: TrainState, progress: Progress) -> list[Injection]:
        """The injection of each structure that active trials have."""
        pairs = zip(self._methods(progress), member_groups(state.trainables), strict=True)
        return [
            without_dropout(method.inject(group, self.backbone.params)) for method, group in pairs
        ]

    def _optimizer(self, progress: Progress) -> optax.GradientTransformation:
        factor = progress.learning_rate_factor()
        rates = [
            {part: rate * factor for part, rate in trial.config.learning_rates().items()}
            for trial in self._active(progress)
        ]
        lone = len(self.config.parts) == 1
        optimizer = per_member(
            self.config.train, [next(iter(each.values())) for each in rates] if lone else rates
        )
        return of_vectors(optimizer) if self.config.searches else optimizer

    # -- steps

    def steps(self, progress: Progress) -> Steps:
        """The compiled step of the active trials and their batches from this step on."""
        settings, active = self.config.train, self._active(progress)
        length = max(trial.length for trial in active)
        examples = [trial.dataset.training.examples for trial in active]
        soft = soft_verbalizer.NAME in self.config.parts
        tasks = [trial.task for trial in active]
        labels = label_choices(settings, tasks, self.tokenizer, soft)
        # where members change the layers, each has rows of its own
        apart = self.config.changes_layers and len(active) > 1
        model, cut = plan_batches(
            self.backbone.model,
            settings,
            list({id(each): each for each in examples}.values()),
            BatchSize(
                rows=settings.batch_size * (1 if apart else len(active)),
                devices=parallel.num_batch_shards(self.mesh),
                length=length,
                nodes=labels.nodes if labels else None,
                apart=apart,
                drops=any(trial.config.drops_inputs for trial in active),
            ),
        )
        loss = labels.loss if labels else cross_entropy(settings.z_loss)
        batches = training_batches(
            examples,
            Draw(
                settings.batch_size,
                [trial.config.train.seed for trial in active],
                settings.length_bucketing_window,
            ),
            cut,
            start=progress.step,
            relabel=partial(with_member, vocabulary=self.backbone.config.vocab_size, length=length),
            complete=labels.complete if labels else list,
        )
        step = self._step(model, loss, progress)
        return Steps(step, self.backbone.params, batches, self.mesh)

    def _step(self, model: registry.Model, loss: Loss | LabelLoss, progress: Progress) -> Step:
        optimizer, active = self._optimizer(progress), self._active(progress)
        if not self.config.searches:
            method = grouped(self._methods(progress))
            return make_train_step(model, method, optimizer, mesh=self.mesh, loss=loss)
        words = dict.fromkeys(word for trial in active for word in class_words(trial.task))
        rows, kind = self.backbone.config.vocab_size, self.config.search.allowed
        search = Search(
            model=model,
            plain=self.backbone.model,
            loss=loss,
            mesh=self.mesh,
            tokenizer=self.tokenizer,
            allowed=allowed_words(self.tokenizer, rows, kind, tuple(words)),
            settings=self.config.search,
            seeds=[trial.config.train.seed for trial in active],
        )
        return search_step(self.config.method, search, optimizer)

    # -- evaluation

    def evaluate(self, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
        """Score the active trials, keep the best, and stop the worse half where that is due."""
        active = self._active(progress)
        groups: list[Injection] = []
        if self.method.frozen:
            groups = self._injections(state, progress)
            scores = self.evaluator.validate(self.backbone.params, joined(groups), active)
        else:
            with without_member_axis(state.trainables) as params:
                scores = self.evaluator.validate(params, Injection(), active)
        # weights that are not finite may give finite metrics
        total = [sum(metrics.values()) for metrics in scores]
        finite = all_finite(state.trainables) & np.isfinite(total)
        ranked = [metrics[trial.metric] for trial, metrics in zip(active, scores, strict=True)]
        judgement = judge(progress, self.trials, ranked, finite.tolist())
        by_number = dict(zip(progress.active, scores, strict=True))
        # by slot, without what fills up the structures of other members
        alone = [some_members(g, np.array([k])) for g in groups for k in range(g.num_members)]
        self._keep_best(alone or [state.trainables], progress, judgement, by_number)
        shown = [k for k, ok in zip(progress.active, finite, strict=True) if ok]
        log_scores(
            self.run.metrics,
            self.reporter,
            progress.step,
            {number: by_number[number] for number in shown},
            self.names,
        )
        return self._halve(state, judgement.progress)

    def _keep_best(
        self,
        tuned: Sequence[Injection] | Sequence[Trainables],
        before: Progress,
        judgement: Judgement,
        scores: Mapping[int, Metrics],
    ) -> None:
        """Save the trials that improved, and of each task the best.

        tuned: of each active trial, by slot: its injection, or a whole model.
        """
        on_disk, saved = saved_best_steps(self.trials, before), self.run.checkpoints.latest_step()
        for number in judgement.improved:
            trial, slot = self.trials[number], before.active.index(number)
            metadata = metadata_for(trial, self.backbone, scores[number], judgement.progress)
            part = tuned[slot]
            if self.config.searches and isinstance(part, Injection):
                metadata["words"] = self._words(part)._asdict()
            folders = [trial.own_dir]
            if number in judgement.task_best:
                folders.append(trial.task_dir)
            for folder in folders:
                if folder is None:
                    continue
                known = on_disk[folder]
                if saved is None or known > saved:  # no checkpoint names it
                    known = -1
                self.run.remove_result()
                save_tuned(folder, part, self.backbone, metadata, known)

    def _words(self, injection: Injection) -> Words:
        """What a search has found, of an injection of one member."""
        bank = np.asarray(processes.fetch(injection.embeddings))
        return words_of(bank[0], table_of(self.backbone.params), self.tokenizer)

    def _halve(self, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
        """At the last step too: the run may get more of them."""
        if not progress.halving_due(Rules.of(self.config.train)):
            return state, progress
        kept = survivors(self.trials, progress, self.config.train.successive_halving_of)
        if len(kept) == len(progress.active):
            return state, progress
        state = keep_members(state, [progress.active.index(number) for number in kept])
        self.reporter.say(f"going on with {len(kept)} of {len(self.trials)} prompts")
        return state, replace(progress, active=kept)

    # -- checkpoints

    def before_checkpoint(self, state: TrainState, progress: Progress) -> None:
        """Nothing: the best prompts are saved when they are found."""

    def after_checkpoint(self, progress: Progress) -> None:
        """Remove what was kept aside for checkpoints that are gone."""
        if jax.process_index() == 0:
            oldest = self.run.oldest_checkpoint()
            oldest = progress.step if oldest is None else oldest
            tidy_best(self.trials, progress, oldest, prompt=self.method.frozen)

    # -- result

    def release(self, state: TrainState) -> TrainState | None:
        """Nothing of the state is needed at the end: a test takes what was saved as the best."""
        return None

    def finish(self, state: TrainState | None, progress: Progress, log: StepLog) -> Result:
        """Test the best prompt of each task, draw the curves and write the result."""
        tasks = by_task(self.trials)
        results = {name: self._task_result(members, progress) for name, members in tasks.items()}
        result: Result = {"tasks": results} if len(tasks) > 1 else {**next(iter(results.values()))}
        seconds, settings = log.clock.seconds(), self.config.train
        result |= {
            "steps": progress.step,
            "stopped_early": progress.out_of_patience(Rules.of(settings)),
            "seconds": round(seconds, 3),
            "examples_per_second": round(
                sum(progress.trained) * settings.batch_size / max(seconds, 1e-9), 3
            ),
            "frozen_parameters": (
                quantization.count(self.backbone.params) if self.method.frozen else 0
            ),
            "inputs": self.all_inputs,
        }
        if len(self.trials) > 1:
            table = population_table(self.config.choices(), self.trials, progress)
            result["population"] = table
            metrics = dict.fromkeys(trial.metric for trial in self.trials)
            markdown = as_markdown(table, " or ".join(metrics))
            if jax.process_index() == 0:
                write_atomically(self.run.path / "population.md", markdown)
            self.reporter.say(markdown)
        self.run.write_result(result)
        return result

    def _task_result(self, members: Sequence[Trial], progress: Progress) -> TaskResult:
        """What came of a task: its best trial, which is the one in ``task_dir``."""
        best = best_trial(progress, slot_order(members))
        folder, frozen = best.task_dir, self.method.frozen
        if progress.best_step[best.number] < 0:
            raise UserError(
                f"No scores of task {best.task.name!r} on its validation rows were finite numbers, "
                "so that nothing was saved as the best; lower train.learning_rate, or use "
                "model.dtype=float32, in another output."
            )
        result: TaskResult = {
            "task": best.task.name,
            "method": self.config.method,
            "metric": best.metric,
            "value": progress.best[best.number],
            "majority": (progress.majority or {})[best.task.name],
            "untuned": (progress.untuned or {})[best.task.name],
            "rows": len(best.dataset.validation.examples),
            "best_step": progress.best_step[best.number],
            "trainable_parameters": sum(x.size for x in jax.tree.leaves(self.shapes[best.number])),
            "prompt": str(folder / "prompt") if frozen else None,
            "model": None if frozen else str(folder / "model"),
            **self._test(best),
            **self._template(best),
        }
        if jax.process_index() == 0:
            rows = self.run.metrics.rows_of(best.prefix)
            draw_curves(rows, best.metric, result["majority"], folder / "curves.png")
        return result

    def _test(self, best: Trial) -> TestResult:
        """The metrics of a task's best prompt on the test rows, where there are any.

        Scores that are not finite are reported, and do not cost the run its result.
        """
        test = best.dataset.test
        if test is None:
            return {}
        params, injection, source = self._load_best(best)
        try:
            metrics = self.evaluator.test(params, injection, best.dataset, source)
        except UserError as error:
            self.reporter.say(f"warning: the test has no figure: {error}")
            return {"test_error": str(error)}
        if self.method.frozen:
            note_test(Path(source), metrics)
        return {"test_rows": len(test.examples), "test": metrics}

    def _template(self, best: Trial) -> TemplateResult:
        """The words that a search has found, and what they give without a soft prompt."""
        if not self.config.searches:
            return {}
        params, injection, source = self._load_best(best)
        words, task, vocabulary = self._words(injection), best.task, self.backbone.config.vocab_size
        result: TemplateResult = {"words": words.text}
        if not isinstance(task, Mixture):
            template = as_template(task.template, words.ids, self.tokenizer)
            task = task.model_copy(update={"template": template})
            rows = self.rows[task.name]
            plain = build_split(task, "validation", rows, self.tokenizer, 0, vocabulary)
            score = self.evaluator.measure_one(params, Injection(), task, plain, source)
            result |= {"template": template, "template_value": score[best.metric]}
        self.reporter.say(f"the words are: {words.text}")
        return result

    def _load_best(self, best: Trial) -> tuple[registry.Params, Injection, str]:
        """Parameters, injection and directory of what was saved as the best of a task."""
        if not self.method.frozen:
            # the first process answers, and has written the model by then
            path = processes.on_process_zero(lambda: str(best.task_dir / "model"))
            params = load_backbone(path, dtype=self.config.model.dtype, mesh=self.mesh).params
            return params, Injection(), path
        path = best.task_dir / "prompt"
        method = method_of(best.config)
        like = jax.eval_shape(method.inject, self.shapes[best.number], self.backbone.params)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        saved = processes.broadcast_from_zero(lambda: _numpy(load_prompt(path).injection), zeros)
        # the sharding of training, for which the programs are compiled already
        injection = jax.device_put(saved, parallel.replicated(self.mesh))
        return self.backbone.params, injection, str(path)


def _numpy(tree: Injection) -> Injection:
    return jax.tree.map(np.asarray, tree)
