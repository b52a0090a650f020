"""The design of the study of sensitivity, and members of a population that are chosen."""

import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.tasks.registry import resolve_task
from jaxprompt.data.templates import to_target
from jaxprompt.studies import sensitivity
from jaxprompt.studies.options import StudyOptions
from jaxprompt.studies.reproduce import make_plan
from jaxprompt.studies.runs import Suite
from jaxprompt.studies.study import StudyPlan

TASK = resolve_task("supersense")
PLAN = StudyPlan(
    study="sensitivity", backbones={"b": "builtin-small"}, tasks={"supersense": TASK}, length=20,
    recipe="miniature",
)  # fmt: skip


def chosen(members):
    grid = {"seed": [0, 1, 2], "learning_rate": [0.1, 0.3]}
    prompt = {"population": grid, "population_members": members}
    return parse(RunConfig, {"task": "any", "output": "any", "prompt": prompt})


def test_chosen_members_of_a_population_are_those_of_the_grid_by_number():
    every, some = chosen(None).choices(), chosen([4, 1])
    assert some.choices() == [every[4], every[1]]
    assert [member.train.seed for member in some.members()] == [2, 0]


@pytest.mark.parametrize("members", [[], [6], [-1], [1, 1]])
def test_members_that_there_are_not_are_refused(members):
    with pytest.raises(UserError, match="population_members"):
        chosen(members)


def test_each_run_of_the_study_is_its_member_of_one_population(tmp_path):
    runs = sensitivity.runs_of(PLAN, "supersense")
    suite = Suite(tmp_path, PLAN.backbones, PLAN.tasks)
    config = sensitivity.population_config(runs[0], suite)
    assert len(config.choices()) == len(runs) == 27
    assert all(sensitivity.population_config(run, suite) == config for run in runs[13::13])
    for run, choice in zip(runs, config.choices(), strict=True):
        template, words, length, start, rate, seed = map(int, run.variant.split("-"))
        assert choice["task"]["name"] == f"supersense-t{template}-w{words}"
        assert choice["length"] == run.length == sensitivity.lengths(PLAN)[length]
        assert choice["init"] == sensitivity.INITS[start]
        assert choice["learning_rate"] == sensitivity.RATES[rate]
        assert choice["seed"] == run.seed == seed
        assert choice["task"]["test"] is None


def test_a_plan_that_the_study_cannot_run_is_refused():
    small = {"builtin-small": "builtin-small"}
    with pytest.raises(UserError, match="leave --seeds 5 out"):
        make_plan("sensitivity", StudyOptions(backbones=small, seeds=5))
    free = PLAN.model_copy(update={"tasks": {"free": TASK.model_copy(update={"labels": None})}})
    with pytest.raises(UserError, match="'free' has 0 labels"):
        sensitivity.check(free)


def test_formulations_ask_the_same_rows_in_other_words():
    asked = sensitivity.formulations(TASK)
    assert len(asked) == 9 and len({task.name for task in asked}) == 9
    assert [task.labels for task in asked[:3]] == sensitivity.words_of(TASK)
    for label in TASK.labels:  # a row's answer is the same label by number
        row = {"gloss": "any", "label": label}
        assert len({task.labels.index(to_target(task, row)) for task in asked}) == 1


def test_the_report_finds_the_axis_that_moves_the_score(tmp_path):
    runs, noise = sensitivity.runs_of(PLAN, "supersense"), np.random.default_rng(0)
    records = {
        run.key: {"metric": "accuracy", "test": 0.5 + 0.1 * one.start + 0.01 * noise.normal()}
        for run, one in zip(runs, sensitivity.design(), strict=True)
    }
    [sentence] = sensitivity.summary(PLAN, records)
    assert "largest component is start" in sentence and "p < 0.05: start." in sentence
    (_, parts), (_, levels) = sensitivity.tables(PLAN, records)
    assert parts[1][0] == "start" and len(parts) == 8 and len(levels) == 19
    assert sensitivity.draw(PLAN, records, tmp_path / "figure.png").is_file()
    assert sensitivity.tables(PLAN, dict([*records.items()][:26])) == []
