"""The router: nearest task, margin, abstention; added and removed in closed form."""

import math

import numpy as np
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.serving.router import (
    Router,
    Settings,
    least_margin,
    load_router,
    save_router,
    shrinkage,
    statistics_of,
)

WIDTH = 12


def rows_of(task: int, count: int, seed: int = 0, spread: float = 1.0):
    """Rows around a mean of the task, with features that depend on each other."""
    random = np.random.default_rng([task, seed])
    mixing = np.random.default_rng(99).normal(size=(WIDTH, WIDTH))
    mean = np.random.default_rng([task, 7]).normal(size=WIDTH) * 6
    return (mean + spread * random.normal(size=(count, WIDTH)) @ mixing).astype(np.float32)


@pytest.fixture(scope="module")
def tasks():
    return {
        name: statistics_of(rows_of(i, 100), rows_of(i, 60, seed=1))
        for i, name in enumerate(("mail", "acme/news", "words"))
    }


def test_rows_go_to_their_task_and_others_nowhere(tasks):
    router = Router(tasks)
    for i, name in enumerate(("mail", "acme/news", "words")):
        decisions = [router.route(row) for row in rows_of(i, 200, seed=2)]
        assert np.mean([decision.name == name for decision in decisions]) > 0.9
    unlike = [router.route(row) for row in rows_of(9, 50)]
    assert np.mean([decision.name is None for decision in unlike]) > 0.9
    assert "unlike all tasks" in next(d.reason for d in unlike if d.name is None)
    assert unlike[0].nearest in router.names


def test_distances_are_those_of_mahalanobis_with_a_shrunk_covariance(tasks):
    """Against the textbook, from the rows themselves."""
    router, row = Router(tasks), rows_of(0, 1, seed=3)[0].astype(np.float64)
    every = [rows_of(i, 100).astype(np.float64) for i in range(3)]
    centred = np.concatenate([rows - rows.mean(0) for rows in every])
    covariance = centred.T @ centred / (300 - 3)
    scale = np.sqrt(np.diag(covariance))
    correlations = covariance / np.outer(scale, scale)
    share = shrinkage(correlations, 297)
    assert 0 < share < 0.2
    shrunk = (1 - share) * correlations + share * np.eye(WIDTH)
    inverse = np.linalg.inv(shrunk * np.outer(scale, scale))
    wanted = [(row - x.mean(0)) @ inverse @ (row - x.mean(0)) / WIDTH for x in every]
    found = dict(zip(router.names, router.distances(row[None])[0], strict=True))
    assert [found[name] for name in tasks] == pytest.approx(wanted, rel=1e-4)


def test_shrinkage_is_strong_where_rows_are_few():
    random = np.random.default_rng(0)
    shares = []
    for count in (10, 100, 10_000):
        rows = random.normal(size=(count, WIDTH))
        rows[:, 1] += rows[:, 0]
        shares.append(shrinkage(np.corrcoef(rows.T), count - 1))
    assert shares[0] > shares[1] > shares[2] and shares[2] < 0.02
    assert shrinkage(np.eye(3), 10) == 1.0 and shrinkage(np.ones((1, 1)), 10) == 0.0


def test_the_order_of_adding_and_removing_makes_no_difference_to_the_bit(tasks):
    names, row = list(tasks), rows_of(1, 4, seed=5)
    forth = Router({})
    for name in names:
        forth = forth.add(name, tasks[name])
    back = Router({}).add("other", statistics_of(rows_of(5, 50), rows_of(5, 20, seed=1)))
    for name in reversed(names):
        back = back.add(name, tasks[name])
    back = back.remove("other")
    assert np.array_equal(forth.distances(row), back.distances(row))
    assert np.array_equal(forth.limits, back.limits)
    assert forth.least_margin == back.least_margin
    with pytest.raises(KeyError):
        forth.remove("other")


def test_candidates_limit_the_choice(tasks):
    router, row = Router(tasks), rows_of(0, 1, seed=4)[0]
    assert router.route(row).name == "mail"
    assert router.route(row, ["words"]).name is None  # it is far from the only one
    assert router.route(row, ["mail", "unknown"]).name == "mail"
    assert router.route(row, ["mail"]).margin == math.inf
    for empty in (router.route(row, ["unknown"]), Router({}).route(row)):
        assert empty.name is None and "may be chosen" in empty.reason
    assert "not finite" in router.route(np.full(WIDTH, np.nan)).reason
    with pytest.raises(UserError, match="collect the library with this backbone"):
        router.route(np.zeros(3))


def test_the_thresholds_keep_what_the_settings_say(tasks):
    router = Router(tasks, Settings(inside=0.9))
    for place, task in enumerate(router.tasks.values()):
        inside = router.distances(task.held_out)[:, place] <= router.limits[place]
        assert inside.mean() == pytest.approx(0.9, abs=0.02)


def test_the_margin_keeps_wrong_answers_rare_where_tasks_overlap():
    near = {
        name: statistics_of(rows + shift, held + shift)
        for name, shift in (("a", 0.0), ("b", 0.5))
        for rows, held in [(rows_of(0, 200, seed=len(name)), rows_of(0, 200, seed=ord(name)))]
    }
    loose, strict = Router(near, Settings(wrong=0.5)), Router(near, Settings(wrong=0.02))
    assert loose.least_margin == 0.0 and 0 < strict.least_margin < math.inf
    rows = rows_of(0, 300, seed=77)  # of "a"
    for router, most in ((strict, 0.06),):
        decisions = [router.route(row) for row in rows]
        routed = [d.name for d in decisions if d.name]
        assert 0 < len(routed) < 300 and np.mean([name == "b" for name in routed]) <= most
        assert any("between tasks" in decision.reason for decision in decisions)


def test_the_least_margin_of_rows_that_are_all_wrong_routes_none():
    margins, weights = np.array([3.0, 2.0, 1.0]), np.ones(3)
    assert least_margin(margins, np.array([False] * 3), weights, 0.1) == math.inf
    assert least_margin(margins, np.array([True] * 3), weights, 0.0) == 0.0


def test_a_router_is_read_as_it_was_written(tasks, tmp_path):
    router = Router(tasks, Settings(0.9, 0.1), {"backbone": "abc"})
    save_router(tmp_path, router)
    again = load_router(tmp_path)
    row = rows_of(2, 5, seed=8)
    assert np.array_equal(again.distances(row), router.distances(row))
    assert (again.settings, again.facts) == (router.settings, router.facts)
    assert np.array_equal(again.limits, router.limits)
    save_router(tmp_path, Router({}))
    assert load_router(tmp_path).names == []


def test_a_damaged_or_missing_router_is_told(tasks, tmp_path):
    with pytest.raises(UserError, match="jaxprompt library"):
        load_router(tmp_path)
    save_router(tmp_path, Router(tasks))
    file = tmp_path / "router.safetensors"
    content = file.read_bytes()
    for wrong in (content[:-9], b"", content.replace(b'\\"format\\": 1', b'\\"format\\": 7')):
        file.write_bytes(wrong)
        with pytest.raises(UserError, match="make it again|make .* again"):
            load_router(tmp_path)


def test_statistics_need_rows_with_finite_features():
    rows = rows_of(0, 5)
    for features, held_out in ((rows[:1], rows), (rows, rows[:0])):
        with pytest.raises(UserError, match="at least 2 and 1"):
            statistics_of(features, held_out)
    with pytest.raises(UserError, match="not finite"):
        statistics_of(rows * np.float32("inf"), rows)
    with pytest.raises(UserError, match="one backbone"):
        Router({"a": statistics_of(rows, rows), "b": statistics_of(rows[:, :3], rows[:, :3])})
