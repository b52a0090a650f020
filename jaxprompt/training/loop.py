"""The loop of every run: restore or start, evaluate, keep the best, checkpoint, step, log.

``fit`` serves tuning (``tune.py``) and pre-training (``pretrain.py``), which prepare a ``Job``.
"""

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from jaxprompt.config.errors import UserError
from jaxprompt.config.pretrain import PretrainConfig
from jaxprompt.config.schema import RunConfig
from jaxprompt.data.rows import Rows
from jaxprompt.models import precision
from jaxprompt.runtime import processes
from jaxprompt.runtime.signals import Interrupted, Signals
from jaxprompt.training import tune, users
from jaxprompt.training.divergence import Diverged, check_members
from jaxprompt.training.inputs import Inputs
from jaxprompt.training.metric_log import MetricName, Reporter, StepLog
from jaxprompt.training.progress import Progress, Rules
from jaxprompt.training.reporters import automatic
from jaxprompt.training.run_dir import Result, RunDir
from jaxprompt.training.step import TrainState, all_finite
from jaxprompt.training.steps import Steps, num_tokens


@runtime_checkable
class Job(Protocol):
    """What is trained in a run, how, and what comes of it. The loop owns state and progress."""

    run: RunDir
    reporter: Reporter

    @property
    def names(self) -> Sequence[MetricName]:
        """How each trial is named in logs."""
        ...

    @property
    def sharded(self) -> bool:
        """Whether states are as large as a model."""
        ...

    @property
    def inputs(self) -> Inputs:
        """Digests of what the run reads; every checkpoint holds them."""
        ...

    def start(self) -> tuple[TrainState, Progress]:
        """The state before step 0."""
        ...

    def check(self, progress: Progress) -> None:
        """Raise UserError where a checkpoint is of a run that read something else."""

    def restore_files(self, progress: Progress) -> None:
        """Bring the files in the directory to the state that a checkpoint records."""

    def abstract_state(self, progress: Progress) -> TrainState:
        """Shapes, dtypes and shardings of the state of a checkpoint."""
        ...

    def steps(self, progress: Progress) -> Steps:
        """The compiled step and the batches from this step on."""
        ...

    def evaluate(self, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
        """Score what is trained, log it, and keep the best; trials may stop."""
        ...

    def before_checkpoint(self, state: TrainState, progress: Progress) -> None:
        """Write what goes with a checkpoint."""

    def after_checkpoint(self, progress: Progress) -> None:
        """Remove what no checkpoint needs any more."""

    def release(self, state: TrainState) -> TrainState | None:
        """What ``finish`` needs of the state; the memory of the rest is free then."""

    def finish(self, state: TrainState | None, progress: Progress, log: StepLog) -> Result:
        """Write the result, and return it."""
        ...


C = TypeVar("C", RunConfig, PretrainConfig)


@dataclass(frozen=True)
class Kind(Generic[C]):
    """A kind of run, before anything is loaded."""

    prepare: Callable[[C, RunDir, Reporter, Signals], Job]  # writes nothing but what it must
    known_inputs: Callable[[C], Inputs]  # of a complete run, as far as they are cheap


TUNING = Kind(tune.prepare, tune.inputs_of_files)


def train(
    config: RunConfig,
    reporter: Reporter | None = None,
    signals: Signals | None = None,
    held: Mapping[str, Rows] | None = None,
) -> Result:
    """Tune the prompts of ``config``, or resume the run in its output.

    Killed at any moment and called again, it ends with a bit-identical prompt: batch k is a pure
    function of seed and k, and so is all randomness.

    Args:
        config: what to tune, on what, and the output directory.
        reporter: gets lines of text and the figures of every step. None: a progress bar where
            standard error is a terminal or in a notebook, else nothing. ``NullReporter()``: none.
        signals: they end the run after a step whose state is saved.
        held: the rows of each split, where they are in memory. The task's source is their digest,
            by which a run that goes on knows them.

    Returns:
        What ``result.json`` holds.

    Raises:
        UserError: a mistake in ``config`` or in what it names; one sentence says how to mend it.
        Interrupted: one of ``signals`` came. The state is saved.
    """
    config = precision.resolve_config(config)
    with automatic(reporter, config.train.steps) as chosen:
        kind, signals = TUNING, signals or Signals(install=False)
        if config.users is not None:
            if held is not None:
                raise UserError("users cuts the rows of task.train; name a file there, not data=.")
            tune_shared = partial(_tune_shared, reporter=chosen, signals=signals)
            prepare = partial(users.prepare, tune=tune_shared)
            kind = Kind(prepare, users.known_inputs)
        elif held is not None:
            kind = replace(TUNING, prepare=partial(tune.prepare, held=held))
        return fit(config, kind, chosen, signals)


def _tune_shared(
    config: RunConfig,
    job: Callable[[RunDir], tune.Tuning],
    *,
    reporter: Reporter,
    signals: Signals,
) -> Result:
    """Run or resume the shared prompt of users, whose backbone and rows are loaded already."""
    kind = Kind(lambda config, run, *watching: job(run), lambda config: {})
    return fit(config, kind, reporter, signals)


def fit(config: C, kind: Kind[C], reporter: Reporter, signals: Signals) -> Result:
    """Run or resume ``config`` in its directory, and return its result.

    A kill at any line loses only the steps since the newest checkpoint.
    """
    processes.assert_equal_across_processes("config", config.model_dump(exclude={"output"}))
    rules = Rules.of(config.train)
    with RunDir(config, reporter.say) as run:
        result = run.finished(lambda: kind.known_inputs(config))
        if result is not None:
            return result
        job = kind.prepare(config, run, reporter, signals)
        run.open()  # locks the directory
        with signals.held():  # a signal waits for `check`
            run.open_checkpoints(sharded=job.sharded)
            state, progress = restore(job) or job.start()
            log = StepLog(run.metrics, reporter, job.names, progress.seconds)
            steps = job.steps(progress)
            while True:
                try:
                    if progress.evaluation_due(rules):
                        log.flush()
                        if not progress.at_evaluation(rules):
                            # a longer run resumes here as if this evaluation had never been
                            progress = save(job, state, progress, log)
                        active = progress.active
                        state, progress = job.evaluate(state, progress)
                        if progress.active != active:
                            steps = job.steps(progress)
                    over = progress.is_over(rules)
                    if over or progress.checkpoint_due(rules):
                        log.flush()
                        progress = save(job, state, progress, log)
                    if over:
                        break
                    signals.check(progress.step)
                    state, losses, batches = steps.take(state)
                    progress = progress.advanced(num_tokens(batches))
                    log.add(progress, losses, batches)
                except Interrupted as why:
                    raise save_interrupted(job, state, progress, log, rules, why) from None
                except Diverged as error:
                    if not progress.may_roll_back(rules):
                        raise
                    state = None  # free its memory, also what the error's traceback holds
                    traceback.clear_frames(error.__traceback__)
                    state, progress = roll_back(job, progress, log)
                    steps = job.steps(progress)
            state = job.release(state)
            return job.finish(state, progress, log)


def restore(job: Job) -> tuple[TrainState, Progress] | None:
    """The newest checkpoint; None for a run that begins."""
    step = job.run.checkpoints.latest_step()
    if step is None:
        return None
    state, progress = load_checkpoint(job, step)
    job.run.open_metrics(step)
    job.reporter.say(f"going on from step {step}")
    return state, progress


def load_checkpoint(job: Job, step: int) -> tuple[TrainState, Progress]:
    """State and progress of the newest checkpoint, which is of ``step``.

    Raises:
        UserError: it cannot be read, or the run has read something else until then.
    """
    checkpoints = job.run.checkpoints
    progress = Progress().restored(step, checkpoints.progress())
    job.check(progress)
    progress = replace(progress, inputs=job.inputs)
    job.restore_files(progress)
    return checkpoints.restore(job.abstract_state(progress)), progress


def save(job: Job, state: TrainState, progress: Progress, log: StepLog) -> Progress:
    """Save a checkpoint of this step, if there is none, and return what it says.

    A checkpoint that is there stays, also where the run was evaluated since.

    Raises:
        Diverged: of some task, no trial is finite any more.
    """
    lost = np.where(all_finite(state.trainables), 0.0, math.nan)
    check_members(progress.step, progress.active, lost, job.names)
    progress = replace(progress, seconds=log.clock.seconds())
    checkpoints = job.run.checkpoints
    if checkpoints.latest_step() != progress.step:
        job.before_checkpoint(state, progress)
        checkpoints.save(progress.step, state, progress.to_json())
        job.after_checkpoint(progress)
    return progress


def save_interrupted(
    job: Job, state: TrainState, progress: Progress, log: StepLog, rules: Rules, why: Interrupted
) -> Interrupted:
    """Save what an interrupted run has, and return the error that says so.

    Raises:
        Diverged: what it has is not finite, and it may not roll back.
    """
    step = progress.step
    try:
        log.flush()
        save(job, state, progress, log)
    except Diverged:
        if not progress.may_roll_back(rules):
            raise
        return Interrupted(
            f"{why} after step {step}, which is no number; the checkpoint before is good"
        )
    return Interrupted(f"{why} after step {step}, which is saved")


def roll_back(job: Job, progress: Progress, log: StepLog) -> tuple[TrainState, Progress]:
    """Go back to the newest checkpoint with half the learning rate."""
    step = job.run.checkpoints.latest_step() or 0
    state, restored = load_checkpoint(job, step)
    restored = replace(restored, rollbacks=progress.rollbacks + 1)
    log.truncate_after(step)
    job.reporter.say(
        f"warning: the loss was no number at step {progress.step}; going on from step {step} with "
        f"{restored.learning_rate_factor():g} of the learning rate"
    )
    return state, restored
