"""Users' prompts: rows cut by time, steps that touch the users of their batch alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers_step import D, P, V, examples, prompts

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig, TrainConfig
from jaxprompt.config.users import UsersConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.batches import make_batch, with_member
from jaxprompt.data.users import UserExamples, histories
from jaxprompt.methods.prompt import PROMPT_TUNING
from jaxprompt.methods.users import first_leaves, prompts_of, user_method
from jaxprompt.training.optimizer import per_member
from jaxprompt.training.step import init_state, make_train_step
from jaxprompt.training.user_step import (
    SparseStep,
    gather,
    scatter,
    state_of_users,
    user_optimizer,
    users_in,
)

SETTINGS = TrainConfig(optimizer="adamw", learning_rate=0.1, weight_decay=0.0, steps=10)
COUNT, CHOSEN = 5, np.array([3, 1])


def history(count, user, **more):
    return [{"who": user, "text": f"{user}{i}", **more} for i in range(count)]


def sparse(model, settings, ridge=1.0, rows=4):
    """The optimizer, the step and the state of five users."""
    users = UsersConfig(column="who", freedom=settings, rank=2, ridge=ridge)
    optimizer = user_optimizer(SETTINGS, visits=10)
    step = make_train_step(
        model, user_method(users), optax.GradientTransformation(lambda p: None, optimizer.update)
    )
    state = state_of_users(SETTINGS, users, optimizer, prompts(1)[0], np.full(COUNT, rows))
    return step, state


def batch_of(slots):
    """A batch with two rows of each chosen user, as those of members ``slots``."""
    rows = [examples(2, 0, seed) for seed in CHOSEN]
    return make_batch(
        [with_member(e, slot, V, P) for slot, own in zip(slots, rows, strict=True) for e in own]
    )


def test_a_sparse_step_is_the_dense_step_of_the_users_in_the_batch(tiny):
    model, params = tiny
    step, state = sparse(model, "full", ridge=0.0)
    state, losses = SparseStep(step, iter([CHOSEN]))(state, params, [batch_of([0, 1])])
    optimizer = per_member(SETTINGS)
    start = np.repeat(prompts(1), COUNT, axis=0)
    dense = init_state(PROMPT_TUNING, optimizer, params, start)
    dense, expected = make_train_step(model, PROMPT_TUNING, optimizer)(
        dense, params, [batch_of(CHOSEN.tolist())]
    )
    found = np.asarray(prompts_of(users_in(state.trainables, np.arange(COUNT))))
    wanted = np.asarray(dense.trainables["prompt"])
    np.testing.assert_allclose(found[CHOSEN], wanted[CHOSEN], atol=1e-5)
    assert np.abs(found[CHOSEN] - start[CHOSEN]).max() > 0.05
    np.testing.assert_allclose(losses.loss, [expected.loss[CHOSEN].mean()], rtol=1e-5)
    assert losses.loss.shape == (1,)


def test_users_outside_the_batch_keep_their_bits_and_their_moments(tiny):
    model, params = tiny
    step, state = sparse(model, "low_rank")
    before = jax.tree.map(np.array, state)
    take = SparseStep(step, iter([CHOSEN, CHOSEN]))
    for _ in range(2):  # after the first one, numbers and vectors in common both move
        state, _ = take(state, params, [batch_of([0, 1])])
    others = np.array([0, 2, 4])
    whole, own = before.optimizer, state.optimizer.own
    same = lambda old, new: np.testing.assert_array_equal(old[others], np.asarray(new)[others])
    same(before.trainables["numbers"][0], state.trainables["numbers"][0])
    jax.tree.map(same, whole.own, own)
    for name in ("basis", "shared"):
        moved = np.abs(before.trainables[name] - state.trainables[name]).max()
        assert (moved > 0) == (name == "basis"), name
    assert np.abs(state.trainables["numbers"][0][CHOSEN]).min() > 0
    assert int(state.step) == 2


def test_a_ridge_pulls_a_user_to_the_shared_prompt_the_more_the_fewer_rows_he_has(tiny):
    model, _ = tiny
    users = UsersConfig(column="who", freedom="full", ridge=2.0)
    optimizer = user_optimizer(SETTINGS, visits=10)
    state = state_of_users(SETTINGS, users, optimizer, prompts(1)[0], np.array([1, 4]))
    np.testing.assert_allclose(state.optimizer.ridge, [2.0, 0.5])
    some = gather(state, np.array([1]))
    some.trainables["change"] = some.trainables["change"] + 3.0
    nothing = jax.tree.map(jnp.zeros_like, some.trainables)
    sgd = optimizer._replace(each=optax.sgd(1.0))
    updates, _ = sgd.update(nothing, some.optimizer._replace(own=jax.vmap(sgd.each.init)({
        "change": some.trainables["change"]})), some.trainables)  # fmt: skip
    np.testing.assert_allclose(updates["change"], -2 * 0.5 * 3.0)
    assert not updates["shared"].any()


def test_a_state_gathered_and_scattered_is_the_same(tiny):
    _, state = sparse(tiny[0], "low_rank")
    before = jax.tree.map(np.array, state)
    after = scatter(state, gather(state, CHOSEN), CHOSEN)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, after))


def test_users_start_from_the_shared_prompt():
    for freedom in ("full", "low_rank"):
        users = UsersConfig(column="who", freedom=freedom, rank=2)
        leaves = first_leaves(users, prompts(1)[0], 3, seed=0)
        own = {k: x if len(x) == 3 else x[None].repeat(3, axis=0) for k, x in leaves.items()}
        if freedom == "full":
            own["shared"] = leaves["shared"][None].repeat(3, axis=0)
        assert leaves["shared"].shape == (P, D)
        np.testing.assert_array_equal(prompts_of(own), np.repeat(prompts(1), 3, axis=0))


def test_users_come_equally_often_and_a_step_is_a_function_of_seed_and_number():
    own = [examples(count, 0, seed) for seed, count in enumerate((3, 5, 1, 4, 6, 2))]
    drawn = UserExamples(own, size=2, rows=2)
    lengths = np.array([len(e.inputs) for e in drawn])
    first = [user for step in range(3) for user in drawn.users(7, step)]
    assert sorted(first) == [*range(6)] and drawn.visits == 3
    kwargs = {"batch_size": 4, "seed": 7, "window": 0}
    for step in (0, 11):
        numbers = drawn.indices(lengths, step=step, **kwargs)
        np.testing.assert_array_equal(numbers, drawn.indices(lengths, step=step, **kwargs))
        owners = [drawn[i].task for i in numbers]
        assert owners == [user for user in drawn.users(7, step) for _ in range(2)]
    placed = drawn.in_slots([drawn[i] for i in numbers], V, P)
    assert [e.member for e in placed] == [0, 0, 1, 1]


def test_times_of_a_csv_file_are_ordered_as_the_numbers_that_they_are():
    rows = [row for k in (9, 100, 20, 3) for row in history(1, "a", when=str(k))]
    found = histories(rows, UsersConfig(column="who", time="when", min_rows=3, test=0.2))
    assert [found.splits[name][-1]["when"] for name in ("train", "validation", "test")] == [
        "9", "20", "100",
    ]  # fmt: skip


def test_rows_are_cut_by_time_inside_each_user():
    rows = history(10, "a") + history(3, "b") + history(2, "c")
    for number, row in enumerate(rows):
        row["when"] = -number
    found = histories(rows, UsersConfig(column="who", time="when", min_rows=3, test=0.2))
    assert found.users == ("a", "b") and found.sharing == 1
    texts = {name: [row["text"] for row in split] for name, split in found.splits.items()}
    assert texts["test"] == ["a1", "a0", "b0"]  # the latest
    assert texts["validation"] == ["a3", "a2", "b1"]
    assert texts["train"] == [f"a{i}" for i in range(9, 3, -1)] + ["b2", "c0", "c1"]
    assert found.owners("who", "train").tolist() == [0] * 6 + [1, -1, -1]


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (history(4, None), {}, "Row 1 has None in users.column, 'who'"),
        (history(4, "a"), {"column": "whom"}, "Row 1 has None in users.column, 'whom'"),
        (history(4, "a"), {}, "None of 1 users in 'who' has users.min_rows, 5, rows"),
        (history(9, "a", when=[]), {"time": "when"}, r"A row has \[\] in users.time, 'when'"),
    ],
)
def test_rows_that_cannot_be_cut_are_told_in_a_sentence(rows, changes, words):
    with pytest.raises(UserError, match=words):
        histories(rows, UsersConfig(**{"column": "who", **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"users": {"column": "who", "rows": 5}}, "users.rows is 5"),
        ({"users": {"column": "who", "test": 0.5, "validation": 0.5}}, "sum below 0.9"),
        ({"users": {"column": "who"}, "method": "lora"}, "method=prompt-tuning"),
        ({"users": {"column": "who"}, "prompt": {"population": {"seed": [0, 1]}}}, "population"),
        ({"users": {"column": "who"}, "train": {"patience": 2}}, "train.patience"),
        ({"users": {"column": "who", "freedom": "none"}}, "users.freedom"),
        ({"users": {}}, "users.column"),
    ],
)
def test_settings_of_users_that_cannot_be_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        parse(RunConfig, {"task": "spam", "output": "out", **changes})


def test_a_run_with_users_has_the_usual_optimizer_of_users():
    run = parse(RunConfig, {"task": "spam", "output": "out", "users": {"column": "who"}})
    assert (run.train.optimizer, run.train.learning_rate) == ("adamw", 0.03)
