import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprompt.config.schema import TrainConfig
from jaxprompt.training.optimizer import make_optimizer, per_member, schedule, schedule_warnings


def t5x_adafactor(prompt, grads, *, first_step):
    """T5X's Adafactor on one [P, D] prompt, restated in float64 NumPy from its formula.

    beta2 = 1 - (step + 1) ** -0.8; second moment factored where the smaller side is at least 128;
    update clipped to RMS 1; no momentum, no parameter scale; weight decay 1e-5, not times the rate.
    """
    length, width = prompt.shape
    factored = min(length, width) >= 128
    row, column, full = np.zeros(length), np.zeros(width), np.zeros((length, width))
    path = []
    for number, grad in enumerate(grads):
        decay = 1 - (first_step + number + 1) ** -0.8
        square = grad**2 + 1e-30
        if factored:
            row = decay * row + (1 - decay) * square.mean(axis=1)
            column = decay * column + (1 - decay) * square.mean(axis=0)
            second = np.outer(row / row.mean(), column)
        else:
            full = decay * full + (1 - decay) * square
            second = full
        update = grad / np.sqrt(second)
        update /= max(1.0, np.sqrt((update**2).mean()))
        prompt = prompt * (1 - 1e-5) - 0.3 * update
        path.append(prompt)
    return np.array(path)


@pytest.mark.parametrize("length", [100, 150])  # 150 is factored, 100 is not
@pytest.mark.parametrize("name, first_step", [("adafactor-t5x", 1_100_000), ("adafactor", 0)])
def test_adafactor_follows_the_original_for_400_steps(length, name, first_step):
    rng = np.random.default_rng(0)
    start = rng.uniform(-0.5, 0.5, (length, 128))
    scale = np.geomspace(1, 0.05, 400)[:, None, None]  # gradients that shrink, as they do
    grads = rng.normal(size=(400, length, 128)) * scale
    expected = t5x_adafactor(start, grads, first_step=first_step)

    optimizer = make_optimizer(TrainConfig(optimizer=name))

    def step(carry, grad):
        prompt, state = carry
        updates, state = optimizer.update(grad, state, prompt)
        prompt = prompt + updates
        return (prompt, state), prompt

    prompt = jnp.asarray(start, jnp.float32)
    run = jax.jit(lambda p, g: jax.lax.scan(step, (p, optimizer.init(p)), g)[1])
    got = np.asarray(run(prompt, jnp.asarray(grads, jnp.float32)))
    error = np.linalg.norm(got - expected, axis=(1, 2)) / np.linalg.norm(expected, axis=(1, 2))
    assert error.max() < 1e-5, error.max()


def test_the_originals_updates_stay_clipped_where_those_from_step_0_shrink():
    """The two forms are different algorithms (reason for offering both by name)."""
    grad = jnp.ones((4, 8))
    moves = {}
    for name in ("adafactor-t5x", "adafactor"):
        optimizer = make_optimizer(TrainConfig(optimizer=name, weight_decay=0.0))
        prompt = jnp.zeros((4, 8))
        state = optimizer.init(prompt)
        update = jax.jit(optimizer.update)
        for scale in (1.0, 0.1):
            updates, state = update(scale * grad, state, prompt)
        moves[name] = float(jnp.abs(updates).mean())
    assert moves["adafactor-t5x"] == pytest.approx(0.3, rel=1e-4)
    assert moves["adafactor"] < 0.1


@pytest.mark.parametrize("name", ["adafactor-t5x", "adafactor", "adamw"])
def test_prompts_updated_together_equal_prompts_updated_alone(name):
    settings, peaks = TrainConfig(optimizer=name, clip=0.5), [0.1, 0.3, 1.0]
    together = per_member(settings, peaks)
    rng = np.random.default_rng(0)
    prompts = jnp.asarray(rng.normal(size=(3, 130, 128)), jnp.float32)
    grads = jnp.asarray(rng.normal(size=(3, 130, 128)) * [[[1]], [[50]], [[0.01]]], jnp.float32)
    updates, _ = together.update(grads, together.init(prompts), prompts)
    for k in range(3):
        optimizer = make_optimizer(settings.model_copy(update={"learning_rate": peaks[k]}))
        alone, _ = optimizer.update(grads[k], optimizer.init(prompts[k]), prompts[k])
        np.testing.assert_allclose(updates[k], alone, rtol=1e-5, atol=1e-7)


def test_schedules():
    base = TrainConfig(steps=100, learning_rate=0.3, warmup_steps=10)
    rates = {
        name: [float(schedule(base.model_copy(update={"schedule": name}))(s)) for s in range(101)]
        for name in ("constant", "linear", "cosine", "rsqrt")
    }
    for name, rate in rates.items():
        np.testing.assert_allclose(rate[:10], 0.03 * np.arange(1, 11), rtol=1e-5, err_msg=name)
        assert rate[10] == pytest.approx(0.3, rel=1e-5), name
    assert rates["constant"][100] == pytest.approx(0.3)
    assert rates["linear"][55] == pytest.approx(0.15)
    assert rates["linear"][100] == pytest.approx(0, abs=1e-8)
    assert rates["cosine"][100] == pytest.approx(0, abs=1e-8)
    assert rates["rsqrt"][40] == pytest.approx(0.15)


@pytest.mark.parametrize("warmup", [0, 1, 4, 10, 11, 30])
@pytest.mark.parametrize("cooldown", [0, 1, 6, 7, 8, 10, 11, 30])
def test_a_run_that_ends_before_its_rate_is_reached_is_warned_of(warmup, cooldown):
    config = TrainConfig(steps=10, warmup_steps=warmup, cooldown_steps=cooldown)
    most = max(float(schedule(config)(step)) for step in range(10))
    told = schedule_warnings(config)
    assert bool(told) == (most < 0.2999)
    assert all(f"warmup_steps is {warmup}" in text and "never reaches 0.3" in text for text in told)


def test_a_clip_of_zero_turns_clipping_off():
    config = TrainConfig(optimizer="adafactor-t5x", weight_decay=0.0)
    moved = {}
    for clip in (0.0, 1.0):
        optimizer = make_optimizer(config.model_copy(update={"clip": clip}))
        prompt = jnp.zeros((2, 3))
        updates, _ = optimizer.update(jnp.ones((2, 3)), optimizer.init(prompt), prompt)
        moved[clip] = float(jnp.abs(updates).mean())
    # original.md: the unclipped update of the first step has RMS 261
    assert moved[1.0] == pytest.approx(0.3, rel=1e-5)
    assert moved[0.0] == pytest.approx(0.3 * 261, rel=0.01)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "rsqrt"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_a_cooldown_ends_any_schedule_at_zero(name, warmup):
    plain = TrainConfig(steps=100, learning_rate=0.3, warmup_steps=warmup, schedule=name)
    cooled = schedule(plain.model_copy(update={"cooldown_steps": 20}))
    steps = np.arange(121)
    before, after = (np.asarray(jax.vmap(rate)(steps)) for rate in (schedule(plain), cooled))
    np.testing.assert_allclose(after[:81], before[:81], rtol=1e-6)  # nothing changes before it
    expected = before[80:101] * np.linspace(1, 0, 21)
    np.testing.assert_allclose(after[80:101], expected, rtol=1e-5, atol=1e-8)
    assert after[99] > 0 or name == "linear"  # the last step still moves
    assert (after[100:] == 0).all()  # and none is taken backwards afterwards


def test_a_cooldown_of_the_whole_run_is_linear_decay():
    base = TrainConfig(steps=50, learning_rate=0.3)
    cooled = schedule(base.model_copy(update={"cooldown_steps": 50}))
    linear = schedule(base.model_copy(update={"schedule": "linear"}))
    for step in range(51):
        assert float(cooled(step)) == pytest.approx(float(linear(step)), abs=1e-7)


def test_a_cooldown_reaches_the_updates():
    settings = {"steps": 10, "optimizer": "adafactor", "weight_decay": 0.0, "cooldown_steps": 4}
    optimizer = make_optimizer(TrainConfig(**settings))
    prompt = jnp.zeros((4, 8))
    state, update, moves = optimizer.init(prompt), jax.jit(optimizer.update), []
    for _ in range(11):
        updates, state = update(jnp.ones((4, 8)), state, prompt)
        moves.append(float(jnp.abs(updates).mean()))
    np.testing.assert_allclose(moves, 0.3 * np.clip((10 - np.arange(11)) / 4, 0, 1), rtol=1e-5)


@pytest.mark.parametrize("name", ["adafactor-t5x", "adafactor"])
def test_momentum_is_a_moving_average_of_updates(name):
    rng = np.random.default_rng(0)
    grads = jnp.asarray(rng.normal(size=(6, 4, 8)), jnp.float32)
    moves = {}
    for momentum in (0.0, 0.9):
        optimizer = make_optimizer(TrainConfig(optimizer=name, momentum=momentum, weight_decay=0.0))
        prompt = jnp.zeros((4, 8))
        state, update, moves[momentum] = optimizer.init(prompt), jax.jit(optimizer.update), []
        for grad in grads:
            updates, state = update(grad, state, prompt)
            moves[momentum].append(np.asarray(updates))
    average = np.zeros((4, 8))
    for plain, smooth in zip(moves[0.0], moves[0.9], strict=True):
        average = 0.9 * average + 0.1 * plain
        np.testing.assert_allclose(smooth, average, rtol=1e-4, atol=1e-7)


def test_without_momentum_there_is_nothing_to_remember():
    def numbers(**settings):
        state = make_optimizer(TrainConfig(**settings)).init(jnp.zeros((4, 8)))
        return sum(x.size for x in jax.tree.leaves(state))

    assert numbers() == numbers(momentum=0.0) <= numbers(momentum=0.5) - 32
