"""A run that trains a prompt for each user: first the shared one, then what is a user's own.

The shared prompt is an ordinary run in ``shared/`` of the output. Then ``user_step.py`` trains all
users together. The prompts of the last step are kept. They are in ``users/``, a library that is
served as it is (``methods/user_library.py``).
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.schema import RunConfig, TrainConfig
from jaxprompt.config.users import UsersConfig
from jaxprompt.data.batches import Example, with_member
from jaxprompt.data.memory import digest_of
from jaxprompt.data.rows import Row
from jaxprompt.data.sources import read_rows
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.data.users import Histories, UserExamples, histories
from jaxprompt.evaluation.metrics import measure
from jaxprompt.inference.engine import make_engine
from jaxprompt.inference.predict import check_finite_scores, predict
from jaxprompt.inference.session import check_pair
from jaxprompt.methods.artefact import load_prompt, save_prompt
from jaxprompt.methods.tuned import Metadata, Prompt
from jaxprompt.methods.user_library import new_library
from jaxprompt.methods.users import BASIS, SHARED, first_leaves, prompts_of
from jaxprompt.models.injection import Injection
from jaxprompt.runtime import parallel
from jaxprompt.runtime.signals import Signals
from jaxprompt.training import inputs
from jaxprompt.training.datasets import Split, build_split, read_splits
from jaxprompt.training.metric_log import MetricName, Metrics, Reporter, StepLog, log_scores
from jaxprompt.training.progress import Progress
from jaxprompt.training.results import metadata_for
from jaxprompt.training.run_dir import Result, RunDir
from jaxprompt.training.step import TrainState
from jaxprompt.training.steps import Steps
from jaxprompt.training.tune import Tuning
from jaxprompt.training.tune import prepare as prepare_tuning
from jaxprompt.training.user_step import (
    Tuned,
    UserOptimizer,
    state_of_users,
    user_optimizer,
    user_steps,
    users_in,
)

LIBRARY = "users"  # in the output
FEW_VISITS = 20
_CHUNK = 256  # users whose prompts are on the device while rows are answered

# trains the shared prompt, which the job of an ordinary run is there for
TuneShared = Callable[[RunConfig, Callable[[RunDir], Tuning]], Result]


class Cut(NamedTuple):
    """The rows of a run with users, and the run of the shared prompt on them."""

    histories: Histories
    shared: RunConfig
    held: Mapping[str, list[Row]]


def cut(config: RunConfig) -> Cut:
    """Read the rows of ``task.train`` and cut them by time. Raises UserError."""
    users, task = _users(config), resolve_task(config.task)
    if task.train is None:
        raise UserError(f"Task {task.name!r} names no train data; give task.train.")
    found = histories(read_rows(task.source, task.train), users)
    names = {name: name if name in found.splits else None for name in ("train", "validation")}
    names["test"] = "test" if "test" in found.splits else None
    source = f"memory:{digest_of(found.splits)}"
    values = task.model_dump() | {"source": source} | names
    train = config.train.model_copy(
        update={
            "steps": users.shared_steps,
            "learning_rate": users.shared_learning_rate,
            "optimizer": "adafactor-t5x",
            "schedule": "linear",
            "weight_decay": 1e-5,
            "warmup_steps": 0,
            "cooldown_steps": 0,
        }
    )
    prompt = config.prompt
    if users.shared is not None:
        given = load_prompt(users.shared)
        if given.layers is not None or not len(given.vectors):
            raise UserError(
                f"users.shared is {shown(users.shared)}, which is more than virtual tokens, or has "
                "none; give a prompt of method prompt-tuning."
            )
        prompt = prompt.model_copy(
            update={"init": "file", "file": users.shared, "length": len(given.vectors)}
        )
    output = str(Path(config.output) / "shared")
    changes = {"users": None, "task": values, "train": train, "prompt": prompt, "output": output}
    return Cut(found, config.model_copy(update=changes), found.splits)


def _users(config: RunConfig) -> UsersConfig:
    assert config.users is not None
    return config.users


def known_inputs(config: RunConfig) -> inputs.Inputs:
    """Digests of the rows, to know a complete run by."""
    _, shared, held = cut(config)
    task = resolve_task(shared.task)
    return inputs.of_rows(task, read_splits(task, None, held))


def prepare(
    config: RunConfig, run: RunDir, reporter: Reporter, signals: Signals, *, tune: TuneShared
) -> "UserTuning":
    """Load the backbone and tokenize the rows. Nothing is written.

    Args:
        tune: trains the shared prompt.

    Raises:
        UserError: rows, users or a shared prompt that a run cannot have.
    """
    users = _users(config)
    found, shared, held = cut(config)
    base = prepare_tuning(shared, run, reporter, signals, held)
    if users.shared is not None:
        check_pair(load_prompt(users.shared), base.backbone)
    owners = {name: found.owners(users.column, name) for name in found.splits}
    size, count = config.train.batch_size // users.rows, len(found.users)
    if size > count:
        raise UserError(
            f"A step has rows of {size} users (train.batch_size / users.rows), and {count} have "
            f"users.min_rows, {users.min_rows}, rows or more; set train.batch_size="
            f"{count * users.rows}, or less."
        )
    rows = base.trials[0].dataset.training.examples
    own: list[list[Example]] = [[] for _ in found.users]
    for example, owner in zip(rows, owners["train"].tolist(), strict=True):
        if owner >= 0:
            own[owner].append(example)
    examples = UserExamples(own, size, users.rows)
    visits = config.train.steps // examples.visits
    reporter.say(
        f"{count:,} users have prompts of their own, with {visits} steps each; {found.sharing:,} "
        "keep the shared one"
    )
    if visits < FEW_VISITS:
        reporter.say(
            f"warning: each user is in {visits} of {config.train.steps} steps; "
            f"train.steps={FEW_VISITS * examples.visits} makes it {FEW_VISITS}"
        )
    return UserTuning(config, base, run, reporter, signals, found, owners, examples, tune)


@dataclass
class UserTuning:
    """The prompts of all users as one job; see ``loop.Job``.

    base: the run of the shared prompt, whose backbone and rows are used here too.
    owners: of each row of a split the number of its user, or -1.
    """

    config: RunConfig
    base: Tuning
    run: RunDir
    reporter: Reporter
    signals: Signals
    found: Histories
    owners: Mapping[str, Int[np.ndarray, " n"]]
    examples: UserExamples
    tune: TuneShared

    @property
    def names(self) -> list[MetricName]:
        return list(self.base.names)

    @property
    def sharded(self) -> bool:
        return False

    @property
    def inputs(self) -> inputs.Inputs:
        return self.base.inputs

    @property
    def settings(self) -> TrainConfig:
        return self.config.train

    @property
    def users(self) -> UsersConfig:
        return _users(self.config)

    @property
    def visits(self) -> int:
        """The steps that each user has, at least one."""
        return max(self.settings.steps // self.examples.visits, 1)

    @property
    def num_trained(self) -> int:
        """The numbers of all users, and of what they have in common."""
        shared = jax.ShapeDtypeStruct(
            (self._tuned().length, self.base.backbone.config.d_model), jnp.float32
        )
        count = len(self.found.users)
        leaves = jax.eval_shape(lambda vectors: first_leaves(self.users, vectors, count, 0), shared)
        return sum(leaf.size for name, leaf in leaves.items() if name != SHARED)

    # -- states

    def start(self) -> tuple[TrainState, Progress]:
        """Train the shared prompt, if none is given, and let all users start from it."""
        self.run.open_metrics(-1)
        vectors, baselines = self._shared_prompt()
        progress = Progress.of_trials([0], inputs=self.inputs, **baselines)
        state = self._placed(self._state(vectors, self._optimizer(progress)))
        self.run.checkpoints.save(0, state, progress.to_json())
        return state, progress

    def _shared_prompt(self) -> tuple[Float[np.ndarray, "P D"], dict[str, Metrics]]:
        """Its vectors, and the baselines of the task."""
        task, starts = self.base.trials[0].task, self.base.starts
        if self.users.shared is None:
            run = self.base.config
            result = self.tune(run, lambda folder: replace(self.base, run=folder, starts=starts))
            vectors = load_prompt(Path(run.output) / "prompt").vectors
            untuned, majority = result["untuned"], result["majority"]
        else:
            assert starts is not None
            vectors = np.asarray(starts[0]["prompt"][0])
            backbone = self.base.backbone
            plain = build_split(
                task, "validation", self.base.rows[task.name], self.base.tokenizer, 0,
                backbone.config.vocab_size,
            )  # fmt: skip
            untuned, majority = self.base.evaluator.baselines(
                backbone.params, task, plain, backbone.source
            )
        return vectors, {"untuned": {task.name: untuned}, "majority": {task.name: majority}}

    def _optimizer(self, progress: Progress) -> UserOptimizer:
        factor = progress.learning_rate_factor()
        return user_optimizer(self.settings, self.visits, factor=factor)

    def _state(self, shared: Float[Array | np.ndarray, "P D"], optimizer: UserOptimizer):
        owners, count = self.owners["train"], len(self.found.users)
        rows = np.bincount(owners[owners >= 0], minlength=count)
        return state_of_users(self.settings, self.users, optimizer, shared, rows)

    def _placed(self, state: TrainState) -> TrainState:
        return jax.device_put(state, parallel.replicated(self.base.mesh))

    def check(self, progress: Progress) -> None:
        """Raise UserError where a checkpoint is of a run that read something else."""
        inputs.check_inputs(self.run.path, progress.inputs, self.inputs)

    def restore_files(self, progress: Progress) -> None:
        """Nothing: prompts are written at the end."""

    def abstract_state(self, progress: Progress) -> TrainState:
        """Shapes, dtypes and shardings of a state."""
        shape = self._tuned().length, self.base.backbone.config.d_model
        optimizer = self._optimizer(progress)
        like = jax.eval_shape(lambda: self._state(jnp.zeros(shape), optimizer))
        place = parallel.replicated(self.base.mesh)
        return parallel.with_sharding(like, jax.tree.map(lambda x: place, like))

    # -- steps

    def _tuned(self) -> Tuned:
        base, trial = self.base, self.base.trials[0]
        return Tuned(
            base.backbone.model, base.backbone.params, base.tokenizer, base.mesh, trial.task,
            trial.length,
        )  # fmt: skip

    def steps(self, progress: Progress) -> Steps:
        """The compiled step and the batches from this step on."""
        optimizer = self._optimizer(progress)
        return user_steps(
            self._tuned(), self.settings, self.users, self.examples, optimizer, progress.step
        )

    # -- evaluation

    def evaluate(self, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
        """Score all users' prompts on validation rows, and log it."""
        split, task = self.base.trials[0].dataset.validation, self.base.trials[0].task
        scores = measure(task, self._answers(state, split, "validation"), split.references)
        log_scores(self.run.metrics, self.reporter, progress.step, {0: scores}, self.names)
        # the last step is kept, so it counts as the best
        return state, replace(
            progress,
            best=(float(scores[task.metrics[0]]),),
            best_step=(progress.step,),
            trained=(progress.step,),
            evaluated=progress.step,
        )

    def _answers(
        self, state: TrainState, split: Split, name: str, *, shared: bool = False
    ) -> list[str]:
        """The prediction for each row with the prompt of its user, or with the shared one."""
        base, task, owners = self.base, self.base.trials[0].task, self.owners[name]
        length, vocabulary = self._tuned().length, base.backbone.config.vocab_size
        count, answers = len(self.found.users), [""] * len(owners)
        chunk = min(_CHUNK, count)
        for first in range(0, count, chunk):
            rows = np.flatnonzero((owners >= first) & (owners < first + chunk)).tolist()
            if not rows:
                continue
            users = np.minimum(np.arange(first, first + chunk), count - 1)
            bank = _prompts(state.trainables, users)
            if shared:
                bank = jnp.broadcast_to(state.trainables[SHARED], bank.shape)
            engine = make_engine(
                base.backbone.params, Injection(bank), base.backbone.model, base.mesh
            )
            examples = [
                with_member(split.examples[i], int(owners[i]) - first, vocabulary, length)
                for i in rows
            ]
            with self.signals.interruptible():
                found = predict(
                    engine, task, examples, base.tokenizer,
                    batch_size=self.settings.eval_batch_size, pack=True,
                )  # fmt: skip
            check_finite_scores(found.non_finite_rows, len(rows), "A user's prompt")
            for i, answer in zip(rows, found.predictions, strict=True):
                answers[i] = answer
        return answers

    # -- checkpoints

    def before_checkpoint(self, state: TrainState, progress: Progress) -> None:
        """Nothing: all of a run is in its state."""

    def after_checkpoint(self, progress: Progress) -> None:
        """Nothing is kept aside."""

    # -- result

    def release(self, state: TrainState) -> TrainState | None:
        """The prompts of the last step are what the run leaves."""
        return state

    def finish(self, state: TrainState | None, progress: Progress, log: StepLog) -> Result:
        """Write the prompts and the result; checkpoints, which hold numbers of users, go."""
        assert state is not None
        trial, seconds = self.base.trials[0], log.clock.seconds()
        task, folder = trial.task, self.run.path / LIBRARY
        measured = {"validation": self._measured(state, trial.dataset.validation, "validation")}
        if trial.dataset.test is not None:
            measured["test"] = self._measured(state, trial.dataset.test, "test")
        size = self._write(state, progress, measured, folder)
        value = measured["validation"]
        result: Result = {
            "task": task.name,
            "method": self.config.method,
            "metric": task.metrics[0],
            "value": value.own[task.metrics[0]],
            "majority": (progress.majority or {})[task.name],
            "untuned": (progress.untuned or {})[task.name],
            "rows": len(trial.dataset.validation.examples),
            "best_step": progress.step,
            "trainable_parameters": self.num_trained,
            "prompt": str(folder / "shared"),
            "model": None,
            "users": {
                "library": str(folder),
                "with_prompts": len(self.found.users),
                "sharing": self.found.sharing,
                "steps_each": self.visits,
                "bytes_each": size,
                **{name: each.summary() for name, each in measured.items()},
            },
            "steps": progress.step,
            "stopped_early": False,
            "seconds": round(seconds, 3),
            "inputs": self.base.all_inputs,
        }
        if "test" in measured:
            result |= {
                "test_rows": len(self.owners["test"]), "test": measured["test"].own
            }  # fmt: skip
        self.run.write_result(result)
        if jax.process_index() == 0:
            shutil.rmtree(self.run.checkpoints.path, ignore_errors=True)
        return result

    def _measured(self, state: TrainState, split: Split, name: str) -> "Measured":
        task, owners = self.base.trials[0].task, self.owners[name]
        own = self._answers(state, split, name)
        shared = self._answers(state, split, name, shared=True)
        rows_of = [np.flatnonzero(owners == k).tolist() for k in range(len(self.found.users))]

        def score(answers: Sequence[str], rows: Sequence[int]) -> Metrics:
            wanted = [split.references[i] for i in rows]
            return measure(task, [answers[i] for i in rows], wanted)

        every = range(len(owners))
        each = [score(own, rows) for rows in rows_of]
        metric = task.metrics[0]
        gains = [
            mine[metric] - score(shared, rows)[metric]
            for mine, rows in zip(each, rows_of, strict=True)
        ]
        return Measured(metric, score(own, every), score(shared, every), each, gains)

    def _write(
        self, state: TrainState, progress: Progress, measured: Mapping[str, "Measured"],
        folder: Path,
    ) -> int:  # fmt: skip
        """Write the library; the bytes of the largest artefact of a user."""
        trial, basis = self.base.trials[0], state.trainables.get(BASIS)
        whole = measured["validation"].shared
        metadata = metadata_for(trial, self.base.backbone, whole, progress)
        metadata |= {
            "task": resolve_task(self.config.task).model_dump(),
            "config": self.config.model_dump(),
        }
        if jax.process_index() != 0:
            return 0
        shared = np.asarray(jax.device_get(state.trainables[SHARED]))[0]
        library = new_library(
            folder, self.config, self.visits, Prompt(shared, cast(Metadata, metadata)),
            None if basis is None else np.asarray(basis)[0],
        )  # fmt: skip
        count, size = len(self.found.users), 0
        for first in range(0, count, _CHUNK):
            numbers = range(first, min(first + _CHUNK, count))
            bank = np.asarray(_prompts(state.trainables, np.array(numbers)))
            for number, vectors in zip(numbers, bank, strict=True):
                own: dict[str, object] = {"metrics": measured["validation"].each[number]}
                own["rows"] = int((self.owners["validation"] == number).sum())
                if "test" in measured:
                    own["test"] = measured["test"].each[number]
                place = library.own_prompt(self.found.users[number])
                save_prompt(place, Prompt(vectors, cast(Metadata, metadata | own)))
                size = max(size, sum(file.stat().st_size for file in place.iterdir()))
        return size


@jax.jit
def _prompts(trainables, users):
    return prompts_of(users_in(trainables, users))


class Measured(NamedTuple):
    """Scores of users' prompts on a split.

    own, shared: all metrics over all rows of users with prompts of their own, with these and with
        the shared one.
    each: the metrics of each user on his rows.
    gains: the first metric of each user, less that of the shared prompt on the same rows.
    """

    metric: str
    own: Metrics
    shared: Metrics
    each: list[Metrics]
    gains: list[float]

    def summary(self) -> dict[str, float]:
        """What is told of all users together; nothing is told of one."""
        return {
            f"own_{self.metric}": self.own[self.metric],
            f"shared_{self.metric}": self.shared[self.metric],
            "mean_gain": fmean(self.gains),
            "helped": fmean(gain > 0 for gain in self.gains),
            "hurt": fmean(gain < 0 for gain in self.gains),
        }
