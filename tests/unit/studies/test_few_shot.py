"""The study of few rows: what it starts from, what it plans, what it says."""

import numpy as np
import pytest
from scipy import stats

from jaxprompt.config.errors import UserError
from jaxprompt.studies import few_shot, few_shot_report
from jaxprompt.studies.few_shot_starts import halves, reptile_step
from jaxprompt.studies.options import StudyOptions, read_overrides
from jaxprompt.studies.reproduce import make_plan

SMALL = {"builtin-small": "builtin-small"}


def plan_of(*settings, **options):
    return make_plan("few-shot", StudyOptions(SMALL, settings=read_overrides(settings), **options))


# ---- starts


def test_halves_follow_in_every_second_pair_and_only_there():
    texts = [f"a{i} b{i} c{i} d{i} e{i}" for i in range(20)] + ["too short"]
    rows = halves(texts, seed=0)
    assert [row["label"] for row in rows] == ["yes", "no"] * 10
    for row in rows:
        own = f"{row['first']} {row['second']}" in texts
        assert own == (row["label"] == "yes")
    assert sorted(row["first"] for row in rows) == sorted(f"a{i} b{i}" for i in range(20))


def test_reptile_moves_towards_the_mean_of_what_the_tasks_have_tuned():
    start, tuned = np.zeros((2, 3)), np.stack([np.ones((2, 3)), np.full((2, 3), 3.0)])
    np.testing.assert_allclose(reptile_step(start, tuned, 0.5), 1.0)
    # one task at rate 1 is plain training
    np.testing.assert_allclose(reptile_step(start, tuned[1:], 1.0), tuned[1])


# ---- plans


def test_all_ways_have_the_same_steps_rows_and_one_learning_rate():
    runs = [few_shot.runs_of(plan_of(), method, 4)[0] for method in few_shot.TRAINED]
    for key in ("train.steps", "train.batch_size", "factors", "per_class"):
        assert len({str(run.settings[key]) for run in runs}) == 1
    assert runs[0].settings["factors"] == [1.0] and "rows" not in runs[0].settings


def test_the_users_settings_come_last():
    plan = plan_of("lora:train.learning_rate=0.1", "prompt:train.steps=7", "model.dtype=mixed")
    [lora, spot, hard] = [
        few_shot.runs_of(plan, m, 4)[0].settings for m in ("lora", "spot", "hard")
    ]
    assert lora["train.learning_rate"] == 0.1
    assert spot["start"]["train.steps"] == 7 and spot["train.steps"] > 7
    assert hard == {"per_class": 4, "model.dtype": "mixed"}


def test_a_plan_that_the_study_cannot_run_is_refused():
    with pytest.raises(UserError, match="'spot' learns from other tasks"):
        plan_of(tasks=["spam"])
    assert plan_of(tasks=["spam"], methods=["hard", "lora"]).rows == [4, 8, 16, 32, 64]
    with pytest.raises(UserError, match="'sport'; 'few-shot' compares"):
        plan_of(methods=["sport"])
    with pytest.raises(UserError, match="'lora' twice"):
        plan_of(methods=["lora", "lora"])
    with pytest.raises(UserError, match="has no labels"):
        plan_of(tasks=["squad"])


# ---- the report


def test_the_paired_test_is_that_of_scipy():
    differences = np.array([0.1, 0.05, 0.2, -0.01])
    expected = stats.ttest_1samp(differences, 0.0).pvalue
    assert few_shot_report.paired_t(differences) == pytest.approx(expected)
    assert few_shot_report.paired_t(np.zeros(4)) == 1.0
    low, high = few_shot_report.interval_of_mean([0.5, 0.6, 0.7])
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, 0.6, 0.1 / 3**0.5))


def test_the_report_says_who_is_best_who_is_worse_and_who_may_be_as_good(tmp_path):
    plan = plan_of(methods=["hard", "spot", "lora"], rows=[4, 64])
    wobble = np.array([0.02, -0.01, 0.0, 0.01, -0.02])
    scores = {"hard": 0.5 + wobble, "spot": 0.8 + wobble, "lora": 0.79 - wobble}
    records = {
        run.key: {"metric": "accuracy", "test": float(scores[method][run.seed])}
        for method in scores
        for run in few_shot.runs_of(plan, method, 4)
    }
    [sentence] = few_shot_report.summary(plan, records)  # nothing is known of 64
    assert sentence.startswith("4 of a class: the best mean is that of: prompt, from other tasks")
    assert "Worse than it: hand-written prompt. Not told from it: LoRA." in sentence
    [(_, lines)] = few_shot_report.tables(plan, records)
    assert [len(line) for line in lines] == [3] * 4 and lines[1][2] == "–"
    assert few_shot_report.draw(plan, records, tmp_path / "figure.png").is_file()
    assert few_shot_report.draw(plan, {}, tmp_path / "none.png") is None
