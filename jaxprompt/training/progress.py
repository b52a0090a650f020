"""How far a run is: everything about it that is not an array, and the rules for what is due."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxprompt.config.schema import Optimization, TrainConfig
from jaxprompt.training.trial import Trial, by_task

MAX_ROLLBACKS = 10  # the learning rate is then a thousandth


class Rules(NamedTuple):
    """The settings that decide what is due at a step."""

    steps: int
    evaluate_every: int
    checkpoint_every: int
    patience: int | None = None  # evaluations without a better metric
    halve_every: int | None = None
    rolls_back: bool = False  # on a loss that is not finite

    @classmethod
    def of(cls, settings: Optimization) -> "Rules":
        rules = cls(settings.steps, settings.evaluate_every, settings.checkpoint_every)
        if not isinstance(settings, TrainConfig):
            return rules
        return rules._replace(
            patience=settings.patience,
            halve_every=settings.successive_halving_every,
            rolls_back=settings.on_divergence == "go_back",
        )


# names of the fields in the files of checkpoints, in their order there
_JSON_KEYS = {
    "active": "alive",
    "best": "best",
    "best_step": "best_step",
    "trained": "trained",
    "evals_since_improvement": "stale",
    "seconds": "seconds",
    "tokens": "tokens",
    "evaluated": "evaluated",
    "rollbacks": "rolled_back",
    "inputs": "inputs",
    "untuned": "untuned",
    "majority": "majority",
}


@dataclass(frozen=True)
class Progress:
    """How far a run is. A checkpoint holds it beside the arrays of the state.

    ``best``, ``best_step`` and ``trained`` have an entry for each trial, by its number.
    """

    step: int = 0  # steps that were taken
    active: tuple[int, ...] = ()  # numbers of the trials that are still trained, by slot
    best: tuple[float, ...] = ()  # minus infinity before the first finite metric
    best_step: tuple[int, ...] = ()  # -1 before that
    trained: tuple[int, ...] = ()  # the step of a trial's last evaluation
    evals_since_improvement: int = 0
    seconds: float = 0.0
    evaluated: int = 0  # the step of the last evaluation
    rollbacks: int = 0
    tokens: int | None = None  # that pre-training has read
    inputs: Mapping[str, object] | None = None  # digests of what the run reads
    untuned: Mapping[str, float] | None = None  # by task: the metric of the backbone alone
    majority: Mapping[str, float] | None = None  # by task: the metric of the commonest label alone

    @classmethod
    def of_trials(cls, active: Sequence[int], **fields: object) -> "Progress":
        """Before the first step of trials whose numbers are ``active``, in the order of slots."""
        count = len(active)
        start = cls(0, tuple(active), (-math.inf,) * count, (-1,) * count, (0,) * count)
        return dataclasses.replace(start, **fields)

    # -- in a checkpoint

    def to_json(self) -> dict[str, object]:
        """What a checkpoint holds; the step is the checkpoint's own name."""
        fields = {key: getattr(self, name) for name, key in _JSON_KEYS.items()}
        plain = lambda value: list(value) if isinstance(value, tuple) else value
        return {key: plain(value) for key, value in fields.items() if value is not None}

    def restored(self, step: int, values: Mapping[str, object]) -> "Progress":
        """What a checkpoint of ``step`` says; what it does not say is as before the first step."""
        fields = {name: values[key] for name, key in _JSON_KEYS.items() if key in values}
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return dataclasses.replace(self, step=step, **known)

    # -- what is due

    def at_evaluation(self, rules: Rules) -> bool:
        """Whether this is a step at which a longer run is evaluated too."""
        return self.step % rules.evaluate_every == 0

    def evaluation_due(self, rules: Rules) -> bool:
        last = self.step >= rules.steps
        return self.evaluated < self.step and (last or self.at_evaluation(rules))

    def out_of_patience(self, rules: Rules) -> bool:
        """Patience counts only at evaluations that a longer run has too."""
        return bool(
            rules.patience
            and self.at_evaluation(rules)
            and self.evals_since_improvement >= rules.patience
        )

    def is_over(self, rules: Rules) -> bool:
        return self.step >= rules.steps or self.out_of_patience(rules)

    def checkpoint_due(self, rules: Rules) -> bool:
        if self.step == 0:
            return False
        # after a rollback, the scores of the best prompt must be known, or a worse one replaces it
        just_evaluated = rules.rolls_back and self.evaluated == self.step
        return just_evaluated or self.step % rules.checkpoint_every == 0

    def halving_due(self, rules: Rules) -> bool:
        return bool(rules.halve_every) and self.step % (rules.halve_every or 1) == 0

    def may_roll_back(self, rules: Rules) -> bool:
        return rules.rolls_back and self.rollbacks < MAX_ROLLBACKS

    # -- what happens

    def advanced(self, tokens: int) -> "Progress":
        """One step further, which has read so many tokens."""
        total = None if self.tokens is None else self.tokens + tokens
        return dataclasses.replace(self, step=self.step + 1, tokens=total)

    def learning_rate_factor(self) -> float:
        """Each rollback halves the learning rate."""
        return 0.5**self.rollbacks


class Judgement(NamedTuple):
    """What an evaluation has come to."""

    progress: Progress
    improved: tuple[int, ...]  # numbers of the trials that are better than they ever were
    task_best: tuple[int, ...]  # of these, the ones that are the best of their task so far


def judge(
    progress: Progress, trials: Sequence[Trial], scores: Sequence[float], finite: Sequence[bool]
) -> Judgement:
    """Compare the scores of the active trials with the best ones so far.

    Args:
        trials: all trials of the run.
        scores: the selecting metric of each active trial, by slot.
        finite: whether all numbers of a trial and of its metrics are finite; others never improve.
    """
    best, steps, trained = map(list, (progress.best, progress.best_step, progress.trained))
    improved = []
    for number, score, sound in zip(progress.active, scores, finite, strict=True):
        trained[number] = progress.step
        if sound and score > best[number]:
            best[number], steps[number] = float(score), progress.step
            improved.append(number)
    task_best = []
    for members in by_task(trials).values():
        previous = max(progress.best[trial.number] for trial in members)
        numbers = {trial.number for trial in members}
        better = [k for k in improved if k in numbers and best[k] > previous]
        if better:
            task_best.append(max(better, key=lambda k: best[k]))  # the first of equals
    evaluated = dataclasses.replace(
        progress,
        best=tuple(best),
        best_step=tuple(steps),
        trained=tuple(trained),
        evaluated=progress.step,
        evals_since_improvement=0 if task_best else progress.evals_since_improvement + 1,
    )
    return Judgement(evaluated, tuple(improved), tuple(task_best))


def best_trial(progress: Progress, trials: Sequence[Trial]) -> Trial:
    """The trial with the best metric; of equals the first to reach it, then the first given."""
    return min(trials, key=lambda t: (-progress.best[t.number], progress.best_step[t.number]))
