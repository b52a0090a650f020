"""The steps of a search for a hard prompt, see ``methods/hard_prompt.py``.

Both begin with the gradient of the loss with respect to the embeddings of the words, from the
ordinary step. PEZ descends with it and takes the nearest words. GCG draws changes of one word among
those that the gradient promises most of, computes the loss of each on the same rows, and keeps the
best. The prompt as it is is among them, so no step makes the loss of its own rows larger.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from jaxprompt.config.errors import UserError
from jaxprompt.config.methods import SearchConfig
from jaxprompt.data.batches import AnyArray, Batch
from jaxprompt.data.tokenizer import Tokenizer
from jaxprompt.losses import LabelLoss, Loss, Losses
from jaxprompt.methods.base import Trainables
from jaxprompt.methods.hard_prompt import IDS, VECTORS, nearest, rows_of, surviving, table_of
from jaxprompt.methods.prompt import PROMPT_TUNING
from jaxprompt.models import registry
from jaxprompt.models.injection import Injection
from jaxprompt.runtime import parallel, processes
from jaxprompt.training.step import Step, TrainState, make_train_step, summed_losses

Ids = Int[Array, "K P"]
# with respect to the embeddings of the words, and the losses of these
Gradient: TypeAlias = Callable[
    [TrainState, registry.Params, Sequence[Batch]], tuple[Float[Array, "K P D"], Losses]
]
# what compares the losses of candidates: (their ids [K, C, P], params, micro-batches) -> [K, C]
Scores: TypeAlias = Callable[
    [Int[Array, "K C P"], registry.Params, Sequence[Batch]], Float[Array, "K C"]
]


class Search(NamedTuple):
    """What the steps of a search need to know.

    model: for the batches of the run.
    loss: what is minimised.
    allowed: the words that may be used.
    seeds: of each member.
    plain: the model as it is, for the words alone.
    """

    model: registry.Model
    plain: registry.Model
    loss: Loss | LabelLoss
    mesh: Mesh
    tokenizer: Tokenizer
    allowed: Bool[np.ndarray, " V"]
    settings: SearchConfig
    seeds: Sequence[int]


def check_search(settings: SearchConfig, backbone: registry.ModelConfig) -> None:
    """Raise UserError where a search asks for what this backbone cannot compute."""
    if settings.fluency and not registry.one_sequence(backbone):
        raise UserError(
            f"search.fluency is {settings.fluency:g}, which needs a decoder-only backbone; set it "
            "to 0."
        )


def of_vectors(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer of the vectors of a search; words have none."""

    def init(params: Trainables) -> optax.OptState:
        return optimizer.init({VECTORS: params[VECTORS]}) if VECTORS in params else ()

    return optax.GradientTransformation(init, optimizer.update)


def search_step(method: str, search: Search, optimizer: optax.GradientTransformation) -> Step:
    """The step of ``gcg`` or ``pez``; its losses are those of the words before it."""
    descent = make_train_step(
        search.model, PROMPT_TUNING, _GRADIENT_AS_STATE, mesh=search.mesh, loss=search.loss
    )

    def gradient(
        state: TrainState, params: registry.Params, batches: Sequence[Batch]
    ) -> tuple[Float[Array, "K P D"], Losses]:
        rows = _rows(params, state.trainables[IDS])
        # the step donates its state
        before = TrainState(jnp.copy(state.step), {"prompt": rows}, {"prompt": jnp.copy(rows)})
        after, losses = descent(before, params, batches)
        return cast(dict[str, Array], after.optimizer)["prompt"], losses

    if method == "pez":
        return _descending(gradient, search, optimizer)
    return _swapping(gradient, search, candidate_losses(search))


def _zeros(params: Trainables) -> Trainables:
    return jax.tree.map(jnp.zeros_like, params)


def _keep_gradient(
    updates: Trainables, state: optax.OptState, params: Trainables | None = None
) -> tuple[Trainables, optax.OptState]:
    return _zeros(updates), updates


# an optimizer whose state is the newest gradient
_GRADIENT_AS_STATE = optax.GradientTransformation(_zeros, _keep_gradient)
_rows = jax.jit(rows_of)


def _descending(
    gradient: Gradient, search: Search, optimizer: optax.GradientTransformation
) -> Step:
    @jax.jit
    def move(trainables: Trainables, moments, of_rows: Float[Array, "K P D"], table):
        vectors = {VECTORS: trainables[VECTORS]}
        updates, moments = optimizer.update({VECTORS: of_rows}, moments, vectors)
        moved = cast(dict[str, Array], optax.apply_updates(vectors, updates))[VECTORS]
        return {IDS: nearest(moved, table, search.allowed), VECTORS: moved}, moments

    def step(
        state: TrainState, params: registry.Params, batches: Sequence[Batch]
    ) -> tuple[TrainState, Losses]:
        of_rows, losses = gradient(state, params, batches)
        trainables, moments = move(state.trainables, state.optimizer, of_rows, table_of(params))
        return TrainState(state.step + 1, trainables, moments), losses

    return step


def _swapping(gradient: Gradient, search: Search, scores: Scores) -> Step:
    def step(
        state: TrainState, params: registry.Params, batches: Sequence[Batch]
    ) -> tuple[TrainState, Losses]:
        ids = state.trainables[IDS]
        of_rows, losses = gradient(state, params, batches)
        drawn = _drawn(
            search.settings.candidates, search.settings.swaps, of_rows, table_of(params),
            search.allowed, ids, _keys(np.asarray(search.seeds, np.uint32), state.step),
        )  # fmt: skip
        candidates = readable(drawn, search.tokenizer)
        found = scores(candidates, params, batches)
        return TrainState(state.step + 1, {IDS: _best(candidates, found)}, state.optimizer), losses

    return step


@jax.jit
def _best(candidates: Int[Array, "K C P"], losses: Float[Array, "K C"]) -> Ids:
    """The first of those with the least loss; a loss that is no number is never the least."""
    at = jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses), axis=1)
    return jnp.take_along_axis(candidates, at[:, None, None], axis=1)[:, 0]


@jax.jit
def _keys(seeds: Int[AnyArray, " K"], step: Int[Array, ""]) -> Key[Array, " K"]:
    """The keys of a step: those of a member do not depend on the others."""
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(seeds)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _drawn(
    top: int, swaps: int, of_rows: Float[Array, "K P D"], table: Float[Array, "V D"],
    allowed: Bool[AnyArray, " V"], ids: Ids, keys: Key[Array, " K"],
) -> Int[Array, "K C P"]:  # fmt: skip
    """The prompts as they are, and ``swaps`` changes of one word of each.

    A change takes one of the ``top`` words that lower the loss most, to first order.
    """
    length, top = ids.shape[1], min(top, len(table))

    def of_member(gradient, ids, key):
        gain = -gradient @ table.astype(jnp.float32).T  # [P, V]
        _, best = jax.lax.top_k(jnp.where(allowed, gain, -jnp.inf), top)
        places, ranks = jax.random.split(key)
        place = jax.random.randint(places, (swaps,), 0, length)
        # where fewer words are allowed, the last of ``best`` are not
        rank = jax.random.randint(ranks, (swaps,), 0, jnp.minimum(top, jnp.sum(allowed)))
        changed = jnp.tile(ids, (swaps, 1)).at[jnp.arange(swaps), place].set(best[place, rank])
        return jnp.concatenate([ids[None], changed]).astype(jnp.int32)

    return jax.vmap(of_member)(of_rows, ids, keys)


def readable(candidates: Int[Array, "K C P"], tokenizer: Tokenizer) -> Int[Array, "K C P"]:
    """The candidates; in place of one that is read as other ids there is the prompt as it is."""
    each = processes.fetch(candidates)
    members, count, length = each.shape
    kept = surviving(each.reshape(-1, length), tokenizer).reshape(members, count)
    return jnp.asarray(np.where(kept[..., None], each, each[:, :1]))


def candidate_losses(search: Search) -> Scores:
    """What computes the losses of candidates: of several of all members at once, forward alone."""
    model, mesh, loss, fluency = search.model, search.mesh, search.loss, search.settings.fluency
    placed = model.on(parallel.place_in(mesh, divided=True))

    def sums_of_rows(params, bank, batch):
        """On one device, with its own rows; bank: [K, C, P, D]."""
        members, count, length, width = bank.shape
        flat = Injection(bank.reshape(members * count, length, width))
        copies = for_candidates(batch, count, length, model.config.vocab_size)
        each, sums = summed_losses(params, flat, placed, copies, members * count, loss)
        return jax.tree.map(lambda x: x.reshape(members, count), (each, sums.num_tokens))

    def of_part(candidates, params, batch):
        work = parallel.shard_over_batch(sums_of_rows, mesh, model.logical_axes(), stacked=True)
        return parallel.psum_over_batch(work(params, rows_of(params, candidates), batch), mesh)

    of_part = jax.jit(of_part)
    of_text = jax.jit(functools.partial(negative_log_likelihood, search.plain))

    def scores(candidates, params, batches):
        count, parts = candidates.shape[1], []
        size = _at_once(search, batches, count)
        for start in range(0, count, size):
            # the last part begins earlier, so that all have one shape
            first = min(start, count - size)
            part = candidates[:, first : first + size]
            # one after another: passes of several CPU devices that run at once wait for each other
            sums = [jax.block_until_ready(of_part(part, params, batch)) for batch in batches]
            total, tokens = (sum(each) for each in zip(*sums, strict=True))
            mean = total / jnp.maximum(tokens, 1.0)
            if fluency:
                mean += fluency * of_text(params, part)
            parts.append(mean[:, start - first :])
        return jnp.concatenate(parts, axis=1)

    return scores


def _at_once(search: Search, batches: Sequence[Batch], count: int) -> int:
    """How many candidates share a pass over the rows."""
    devices = parallel.num_batch_shards(search.mesh)
    budget = registry.budget(search.model.config, devices, training=False)
    inputs = max(batch.inputs.size for batch in batches)
    targets = max(batch.targets.size for batch in batches)
    return int(np.clip(min(budget.positions // inputs, budget.targets // targets), 1, count))


def for_candidates(batch: Batch, count: int, length: int, vocabulary: int) -> Batch:
    """A batch of K members as one of K x count: copy c of a row has candidate c of its member.

    Args:
        length: virtual tokens of each.
        vocabulary: the first virtual id.
    """
    copies = lambda x: jnp.concatenate([jnp.asarray(x)] * count)
    copy = lambda x: jnp.repeat(jnp.arange(count, dtype=jnp.int32), len(x))
    number = copy(batch.inputs)[:, None]
    ids = copies(batch.inputs)
    member, place = jnp.divmod(ids - vocabulary, length)
    virtual = vocabulary + (member * count + number) * length + place
    member = copies(batch.member)
    each = copy(batch.member).reshape(-1, *[1] * (member.ndim - 1))
    return jax.tree.map(copies, batch)._replace(
        inputs=jnp.where(ids < vocabulary, ids, virtual), member=member * count + each
    )


def negative_log_likelihood(
    model: registry.Model, params: registry.Params, ids: Int[Array, "K C P"]
) -> Float[Array, "K C"]:
    """The mean over all words but the first, in nats, of texts in a model that reads from left."""
    rows = ids.reshape(-1, ids.shape[-1])
    ones = jnp.ones_like(rows)
    text = rows[:, :1], ones[:, :1], rows[:, 1:], ones[:, 1:]
    logits = model.logits(params, Injection(), *text)
    each = jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:, 1:, None], axis=-1)
    return -jnp.mean(each[..., 0], axis=-1).reshape(ids.shape[:-1])
