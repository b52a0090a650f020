"""The step of users' prompts: it reads and writes the users of its batch alone.

The state has a place for each of K users. A step gathers those of its M users into a small state,
in which they are members 0 to M - 1 of an ordinary run, takes the ordinary step, and scatters what
came of it. So its cost does not depend on K, and other users keep their bits, moments included.

What all users have in common is there once in the state and once for each member in the small one.
Its gradient is the mean over the members.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxprompt.config.schema import TaskConfig, TrainConfig
from jaxprompt.config.users import UsersConfig
from jaxprompt.data.batches import Batch, Example
from jaxprompt.data.sampling import Draw, training_batches
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.data.users import UserExamples
from jaxprompt.losses import Losses
from jaxprompt.methods.users import BASIS, OWN, SHARED, Leaves, change_of, first_leaves, user_method
from jaxprompt.models import registry
from jaxprompt.runtime import parallel
from jaxprompt.training.label_losses import label_choices
from jaxprompt.training.optimizer import make_optimizer
from jaxprompt.training.step import TrainState, TrainStep, make_train_step
from jaxprompt.training.steps import Steps
from jaxprompt.training.tune import BatchSize, plan_batches


class UserMoments(NamedTuple):
    """What the optimizer knows. ``ridge`` and ``own`` have a first axis of users.

    ridge: the factor of the squared norm of a user's change, lambda / n_u.
    own: moments of what is a user's own.
    common: moments of the vectors in common; () where there are none or they are frozen.
    """

    ridge: Float[Array, " K"]
    own: optax.OptState
    common: optax.OptState


class UserOptimizer(NamedTuple):
    """The optimizer of M users and of what they have in common.

    each: of a user's own numbers, vmapped over users.
    common: of the vectors in common; None: they stay as they are.
    """

    each: optax.GradientTransformation
    common: optax.GradientTransformation | None

    def init(self, leaves: Leaves, ridge: Float[Array, " K"]) -> UserMoments:
        """The state before step 0 of the leaves of K users, those in common without an axis K."""
        common: optax.OptState = ()
        if self.common is not None and BASIS in leaves:
            common = self.common.init(leaves[BASIS])
        return UserMoments(ridge, jax.vmap(self.each.init)(_own(leaves)), common)

    def update(
        self, gradient: Leaves, state: UserMoments, users: Leaves | None = None
    ) -> tuple[Leaves, UserMoments]:
        """The updates of M users, of which each leaf has a first axis M, as optax has it.

        The objective of a user is the mean of his rows and ``ridge`` times the squared norm of his
        change.
        """
        assert users is not None
        pull = jax.vmap(jax.grad(lambda user, ridge: ridge * jnp.sum(change_of(user) ** 2)))
        gradient = jax.tree.map(jnp.add, gradient, pull(users, state.ridge))
        found = jax.vmap(self.each.update)(_own(gradient), state.own, _own(users))
        own, moments = cast(tuple[Leaves, optax.OptState], found)
        updates = {name: own.get(name, jnp.zeros_like(leaf)) for name, leaf in users.items()}
        common = state.common
        if self.common is not None and BASIS in users:
            mean = jnp.mean(gradient[BASIS], axis=0)
            step, common = self.common.update(mean, common, users[BASIS][0])
            updates[BASIS] = jnp.broadcast_to(cast(Array, step), users[BASIS].shape)
        return updates, UserMoments(state.ridge, moments, common)


def _own(leaves: Leaves) -> dict[str, Array]:
    return {name: leaf for name, leaf in leaves.items() if name in OWN}


def user_optimizer(
    settings: TrainConfig, visits: int, *, factor: float = 1.0, frozen: bool = False
) -> UserOptimizer:
    """The optimizer that ``settings`` name.

    Args:
        visits: the steps of each user. Schedules of own numbers end with the last of them.
        factor: of all learning rates.
        frozen: what users have in common stays as it is.
    """
    rate, share = settings.learning_rate * factor, visits / settings.steps
    own = {
        "steps": visits,
        "warmup_steps": math.ceil(settings.warmup_steps * share),
        "cooldown_steps": math.ceil(settings.cooldown_steps * share),
    }
    return UserOptimizer(
        make_optimizer(settings.model_copy(update=own), rate),
        None if frozen else make_optimizer(settings, rate),
    )


# ---- states


def first_user_state(
    leaves: Leaves, optimizer: UserOptimizer, ridge: Float[Array, " K"]
) -> TrainState:
    """The state before step 0. All users together are the one member of the run (axis 0)."""
    moments = optimizer.init(leaves, ridge)
    alone = {name: leaf[None] for name, leaf in leaves.items()}
    return TrainState(jnp.int32(0), alone, moments)


def moments_of(state: TrainState) -> UserMoments:
    """What the optimizer knows of the users of a state."""
    return cast(UserMoments, state.optimizer)


def users_in(trainables: Leaves, users: Int[Array | np.ndarray, " M"]) -> dict[str, Array]:
    """The leaves of some users, each with a first axis M."""
    copies = lambda x: jnp.broadcast_to(x[0], (len(users), *x.shape[1:]))
    return {k: x[0][users] if k in OWN else copies(x) for k, x in trainables.items()}


@jax.jit
def gather(state: TrainState, users: Int[Array | np.ndarray, " M"]) -> TrainState:
    """The state of these users alone."""
    moments = moments_of(state)
    take = lambda tree: jax.tree.map(lambda x: x[users], tree)
    # a copy, since a step donates what it is given
    common = jax.tree.map(jnp.copy, moments.common)
    mine = UserMoments(take(moments.ridge), take(moments.own), common)
    return TrainState(jnp.copy(state.step), users_in(state.trainables, users), mine)


def scatter(
    state: TrainState, some: TrainState, users: Int[Array | np.ndarray, " M"]
) -> TrainState:
    """``state`` with what a step has made of these users; it is donated."""
    before, after = moments_of(state), moments_of(some)
    kept = _own(state.trainables), before.own
    own, moments = _put(kept, (_own(some.trainables), after.own), users)
    trainables = {
        name: own[name] if name in OWN else leaf if name == SHARED else some.trainables[name][:1]
        for name, leaf in state.trainables.items()
    }
    return TrainState(some.step, trainables, UserMoments(before.ridge, moments, after.common))


@partial(jax.jit, donate_argnums=0)
def _put(kept, new, users):
    """In place: an array of all users is never copied."""
    (leaves, moments), (some, theirs) = kept, new
    leaves = jax.tree.map(lambda x, part: x.at[0, users].set(part), leaves, some)
    return leaves, jax.tree.map(lambda x, part: x.at[users].set(part), moments, theirs)


class SparseStep(NamedTuple):
    """A step as ``Steps`` takes it, on a state of all users.

    step: of M members.
    users: the users of each step, from the current one on.
    """

    step: TrainStep
    users: Iterator[Int[np.ndarray, " M"]]

    def __call__(
        self, state: TrainState, params: registry.Params, batches: Sequence[Batch]
    ) -> tuple[TrainState, Losses]:
        users = next(self.users)
        some, losses = self.step(gather(state, users), params, batches)
        # one figure for all: a user that diverges ends the run
        return scatter(state, some, users), jax.tree.map(lambda x: x.mean(keepdims=True), losses)


# ---- the steps of a run


class Tuned(NamedTuple):
    """What users' prompts are tuned on.

    length: of each prompt.
    """

    model: registry.Model
    params: registry.Params
    tokenizer: Tokenizer
    mesh: Mesh
    task: TaskConfig
    length: int


def user_steps(
    tuned: Tuned,
    settings: TrainConfig,
    users: UsersConfig,
    examples: UserExamples,
    optimizer: UserOptimizer,
    start: int = 0,
) -> Steps:
    """The compiled step and the batches from step ``start`` on."""
    vocabulary, seed = tuned.model.config.vocab_size, settings.seed
    size = examples.size * examples.rows
    labels = label_choices(settings, [tuned.task] * examples.size, tuned.tokenizer)
    devices = parallel.num_batch_shards(tuned.mesh)
    nodes = labels.nodes if labels else None
    model, cut = plan_batches(
        tuned.model, settings, [examples], BatchSize(size, devices, tuned.length, nodes)
    )
    step = make_train_step(
        model,
        user_method(users),
        optax.GradientTransformation(
            cast(optax.TransformInitFn, _no_init), cast(optax.TransformUpdateFn, optimizer.update)
        ),
        mesh=tuned.mesh,
        z_loss=settings.z_loss,
        loss=labels.loss if labels else None,
    )

    def complete(chosen: Sequence[Example]) -> Sequence[Example]:
        placed = examples.in_slots(chosen, vocabulary, tuned.length)
        return labels.complete(placed) if labels else placed

    batches = training_batches([examples], Draw(size, [seed]), cut, start=start, complete=complete)
    drawn = (examples.users(seed, step) for step in range(start, 2**31))
    return Steps(SparseStep(step, drawn), tuned.params, batches, tuned.mesh)


def _no_init(params: Leaves) -> UserMoments:
    raise TypeError("The state of a step on users is gathered from that of all of them.")


def state_of_users(
    settings: TrainConfig,
    users: UsersConfig,
    optimizer: UserOptimizer,
    shared: Float[Array | np.ndarray, "P D"],
    rows: Int[np.ndarray, " K"],
) -> TrainState:
    """The state before step 0 of K users with so many training rows, on the default device."""
    leaves = first_leaves(users, shared, len(rows), settings.seed)
    ridge = jnp.asarray(users.ridge / np.maximum(rows, 1), jnp.float32)
    return first_user_state(leaves, optimizer, ridge)
