"""What is due at a step, what an evaluation changes, and what a checkpoint keeps of it."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from jaxprompt.config.pretrain import PretrainOptimization
from jaxprompt.config.schema import RunConfig, TaskConfig, TrainConfig
from jaxprompt.training.datasets import Split, TaskDataset
from jaxprompt.training.population import better_half, population_table, survivors
from jaxprompt.training.progress import MAX_ROLLBACKS, Progress, Rules, best_trial, judge
from jaxprompt.training.results import saved_best_steps
from jaxprompt.training.trial import MetricName, by_task, make_trials, slot_order

RULES = Rules(steps=12, evaluate_every=4, checkpoint_every=5)


def dataset(task: str = "mine", length: int = 3) -> TaskDataset:
    empty = Split([], [], None)  # type: ignore[arg-type]
    config = TaskConfig(name=task, template="{text}", metrics=["accuracy", "f1"])
    return TaskDataset(config, length, empty, empty, None)


def trials(*datasets: TaskDataset):
    config = RunConfig(
        task="sst2",
        prompt={"population": {"seed": list(range(len(datasets)))}} if len(datasets) > 1 else {},
        output="run",
    )  # fmt: skip
    return make_trials(config, datasets)


def at(step: int, **fields) -> Progress:
    return dataclasses.replace(Progress.of_trials([0]), step=step, **fields)


# -- trials


def test_a_lone_trial_is_kept_in_the_run_directory():
    [trial] = trials(dataset())
    assert (trial.task_dir, trial.own_dir) == (Path("run"), None)
    assert trial.name == MetricName("", "accuracy")


def test_trials_of_several_tasks_have_names_and_directories_of_their_own():
    mine, other = trials(dataset("mine"), dataset("other"))
    assert mine.name == MetricName("mine/", "accuracy")
    assert other.task_dir == Path("run/tasks/other") and other.own_dir == Path("run/population/1")
    assert list(by_task([mine, other, mine])) == ["mine", "other"]


def test_trials_of_one_length_stand_together_in_the_state():
    all_trials = trials(*(dataset(length=length) for length in (5, 3, 5, 3)))
    assert [trial.number for trial in slot_order(all_trials)] == [1, 3, 0, 2]


# -- what is due


@pytest.mark.parametrize(
    ("step", "evaluated", "due"),
    [(0, 0, False), (3, 0, False), (4, 0, True), (4, 4, False), (8, 4, True), (12, 8, True)],
)
def test_an_evaluation_is_due_once_every_so_many_steps(step, evaluated, due):
    assert at(step, evaluated=evaluated).evaluation_due(RULES) == due


def test_an_evaluation_is_due_at_the_last_step_whatever_its_number():
    rules = RULES._replace(steps=6)
    assert at(6, evaluated=4).evaluation_due(rules) and not at(6).at_evaluation(rules)
    assert at(7, evaluated=4).evaluation_due(rules)  # a run that has done more


def test_a_run_is_over_after_its_steps_or_out_of_patience():
    rules = RULES._replace(patience=2)
    assert at(12).is_over(rules) and not at(8).is_over(rules)
    assert at(8, evals_since_improvement=2).is_over(rules)
    assert not at(8, evals_since_improvement=1).is_over(rules)
    assert not at(8, evals_since_improvement=2).is_over(RULES)  # without patience it goes on


def test_an_evaluation_that_a_longer_run_has_not_ends_no_patience():
    rules = RULES._replace(steps=6, patience=1)
    assert not at(6, evals_since_improvement=1).out_of_patience(rules)


def test_checkpoints_are_due_every_so_many_steps_but_not_before_the_first():
    assert [step for step in range(12) if at(step).checkpoint_due(RULES)] == [5, 10]


def test_a_run_that_may_roll_back_saves_each_evaluation():
    rules = RULES._replace(rolls_back=True)
    assert at(4, evaluated=4).checkpoint_due(rules)
    assert not at(4, evaluated=4).checkpoint_due(RULES)
    assert not at(0).checkpoint_due(rules)


def test_rollbacks_halve_the_rate_and_end():
    rules = RULES._replace(rolls_back=True)
    assert at(3, rollbacks=2).learning_rate_factor() == 0.25
    assert at(3, rollbacks=MAX_ROLLBACKS - 1).may_roll_back(rules)
    assert not at(3, rollbacks=MAX_ROLLBACKS).may_roll_back(rules)
    assert not at(3).may_roll_back(RULES)


def test_rules_are_those_of_the_settings():
    settings = TrainConfig(steps=8, evaluate_every=2, patience=3, successive_halving_every=4)
    assert Rules.of(settings) == Rules(8, 2, 1000, 3, 4, False)
    assert Rules.of(TrainConfig(on_divergence="go_back")).rolls_back
    assert Rules.of(PretrainOptimization(steps=9)) == Rules(9, 1000, 1000)


def test_a_step_counts_tokens_only_where_they_are_counted():
    assert at(3).advanced(7).tokens is None
    after = at(3, tokens=10).advanced(7)
    assert (after.step, after.tokens) == (4, 17)


# -- in a checkpoint


def test_progress_survives_a_checkpoint():
    progress = at(
        5, best=(0.25,), best_step=(4,), trained=(4,), evals_since_improvement=1, seconds=1.5,
        evaluated=4, rollbacks=1, inputs={"tokenizer": "x"}, untuned={"mine": 0.5},
        majority={"mine": 0.4},
    )  # fmt: skip
    saved = json.loads(json.dumps(progress.to_json()))
    assert Progress().restored(5, saved) == progress


def test_a_checkpoint_of_an_earlier_version_is_read():
    tuning = {
        "alive": [1, 0], "best": [0.5, -math.inf], "best_step": [4, -1], "trained": [4, 4],
        "stale": 2, "seconds": 3.0, "evaluated": 4, "rolled_back": 1,
        "inputs": {"tokenizer": "x"}, "untuned": {"mine": 0.1}, "majority": {"mine": 0.2},
    }  # fmt: skip
    progress = Progress().restored(6, tuning)
    assert progress.active == (1, 0) and progress.best == (0.5, -math.inf)
    assert (progress.evals_since_improvement, progress.rollbacks, progress.step) == (2, 1, 6)
    assert progress.to_json() == tuning
    start = Progress.of_trials([0], tokens=0)
    pretraining = {"seconds": 2.0, "tokens": 40, "evaluated": 4, "inputs": {}}
    progress = start.restored(5, pretraining)
    assert (progress.active, progress.tokens, progress.evaluated) == ((0,), 40, 4)


# -- evaluations


def test_a_better_score_is_kept_and_an_equal_one_is_not():
    run = trials(dataset())
    first = judge(at(4), run, [0.5], [True])
    assert first.improved == first.task_best == (0,)
    assert (first.progress.best, first.progress.best_step) == ((0.5,), (4,))
    equal = judge(dataclasses.replace(first.progress, step=8), run, [0.5], [True])
    assert not equal.improved and equal.progress.best_step == (4,)
    assert (equal.progress.trained, equal.progress.evaluated) == ((8,), 8)
    assert equal.progress.evals_since_improvement == 1


def test_scores_of_what_is_not_finite_never_count():
    judgement = judge(at(4), trials(dataset()), [1.0], [False])
    assert not judgement.improved and judgement.progress.best == (-math.inf,)
    assert judge(at(4), trials(dataset()), [math.nan], [False]).progress.best == (-math.inf,)


def test_of_each_task_the_best_trial_is_kept_and_of_equals_the_first_slot():
    run = trials(dataset("mine"), dataset("mine"), dataset("other"), dataset("other"))
    progress = dataclasses.replace(Progress.of_trials([1, 0, 2, 3]), step=4)
    first = judge(progress, run, [0.5, 0.5, 0.1, 0.2], [True] * 4)
    assert first.improved == (1, 0, 2, 3) and first.task_best == (1, 3)
    second = judge(
        dataclasses.replace(first.progress, step=8, active=(0, 2)), run, [0.6, 0.15], [True] * 2
    )
    # trial 2 is better than before, and worse than trial 3, which has stopped
    assert second.improved == (0, 2) and second.task_best == (0,)
    assert second.progress.best == (0.6, 0.5, 0.15, 0.2)


def test_the_best_trial_is_the_first_to_reach_its_score():
    run = trials(dataset(), dataset(), dataset())
    progress = dataclasses.replace(
        Progress.of_trials([0, 1, 2]), best=(0.5, 0.7, 0.7), best_step=(4, 8, 4)
    )
    assert best_trial(progress, run).number == 2
    assert saved_best_steps(run, progress) == {
        Path("run/population/0"): 4, Path("run/population/1"): 8, Path("run/population/2"): 4,
        Path("run"): 4,
    }  # fmt: skip


# -- successive halving


def test_the_worse_half_of_each_task_stops():
    run = trials(*(dataset(task) for task in ("mine", "mine", "mine", "other")))
    progress = dataclasses.replace(Progress.of_trials(range(4)), best=(0.5, 0.1, 0.5, 0.0))
    assert [trial.number for trial in better_half(run[:2], progress)] == [0]
    assert survivors(run, progress) == (0, 2, 3)  # a lone trial of a task stays
    fewer = dataclasses.replace(progress, active=(1, 2))
    assert survivors(run, fewer) == (2,)


def test_the_worse_half_of_the_tasks_stops_with_all_its_trials_until_two_are_left():
    names = ("a", "a", "b", "b", "c", "c", "d", "d")
    run = trials(*map(dataset, names))
    best = (0.1, 0.9, 0.6, 0.6, 0.2, 0.1, 0.7, 0.2)
    progress = dataclasses.replace(Progress.of_trials(range(8)), best=best)
    assert survivors(run, progress, "tasks") == (0, 1, 2, 3)
    fewer = dataclasses.replace(progress, active=(0, 1, 2, 3))
    assert survivors(run, fewer, "tasks") == (0, 1, 2, 3)


def test_halving_is_due_every_so_many_steps():
    rules = RULES._replace(halve_every=4)
    assert [step for step in range(1, 13) if at(step).halving_due(rules)] == [4, 8, 12]
    assert not any(at(step).halving_due(RULES) for step in range(13))


def test_the_table_has_no_metric_of_a_trial_that_never_had_one():
    run = trials(dataset(), dataset())
    progress = dataclasses.replace(
        Progress.of_trials([0, 1]), best=(0.5, -math.inf), best_step=(4, -1), trained=(8, 4)
    )
    table = population_table([{"seed": 0}, {"seed": 1}], run, progress)
    assert table == [
        {"seed": 0, "value": 0.5, "best_step": 4, "steps": 8},
        {"seed": 1, "value": None, "best_step": -1, "steps": 4},
    ]
