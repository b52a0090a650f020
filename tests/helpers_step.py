"""Examples, prompts and compiled steps of the tiny model, shared by the tests of training steps."""

import functools

import jax
import numpy as np

from jaxprompt.config.schema import TrainConfig
from jaxprompt.data.batches import Example
from jaxprompt.methods.registry import METHODS
from jaxprompt.training.optimizer import per_member
from jaxprompt.training.step import init_state, make_train_step

V, P, D = 61, 4, 16


def examples(count, member=0, seed=0):
    rng = np.random.default_rng([seed, member])
    virtual = np.arange(P) + V + member * P
    return [
        Example(
            np.concatenate([virtual, rng.integers(3, V, rng.integers(2, 9)), [1]]).astype(np.int32),
            np.append(rng.integers(3, V, rng.integers(1, 3)), 1).astype(np.int32),
            member,
            dropout_seed=100 * seed + number,
        )
        for number in range(count)
    ]


def prompts(count):
    return np.random.default_rng(5).normal(size=(count, P, D)).astype(np.float32)


@functools.cache
def trainer(model, method="prompt-tuning", name="adafactor-t5x", rate=0.3, mesh=None):
    """An optimizer and its compiled step, shared by the tests."""
    optimizer = per_member(TrainConfig(optimizer=name, learning_rate=rate))
    return optimizer, make_train_step(model, METHODS[method], optimizer, mesh=mesh, z_loss=1e-4)


def concatenated(*batches):
    return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)


def run(tuned, batches, start, *, method="prompt-tuning", put=lambda b: b, **settings):
    """The state after a step on each batch, and the last losses."""
    model, params = tuned
    optimizer, step = trainer(model, method, **settings)
    state = init_state(METHODS[method], optimizer, params, start)
    for batch in batches:
        parts = batch if isinstance(batch, list) else [batch]
        state, losses = step(state, params, put(parts))
        jax.block_until_ready(losses)
    return state, losses
