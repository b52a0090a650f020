"""What is compiled for serving: one pass over rows of any tasks, and generation in chunks.

A row's prompt is chosen by its ids and its slot, and a row's labels are a tree of its own. So which
requests are together never chooses a program: a program has a kind, an attention and a shape.

Changes of the layers are gathered from the slots first, so that a pass costs the same however many
slots there are, and an answer that is being generated needs no slot after its first chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt

from jaxprompt.data.batches import AnyArray
from jaxprompt.inference.engine import count_compilation
from jaxprompt.models import registry
from jaxprompt.models.injection import Injection, Layers
from jaxprompt.models.label_tree import Tree
from jaxprompt.serving.features import mean_hidden
from jaxprompt.serving.work import TOP

# why a row generates no more tokens
GOING, STOP, LENGTH, CANCELLED, NON_FINITE = range(5)


class Rows(NamedTuple):
    """Rows of inputs. Segment 0 is padding."""

    inputs: Int[AnyArray, "B S"]
    segments: Int[AnyArray, "B S"]
    slots: Int[AnyArray, " B"]


class Edges(NamedTuple):
    """The labels of each row as a tree, and its edges: see ``version.LabelPlan``."""

    tree: Tree  # leaves [B, n, ...]
    parents: Int[AnyArray, "B e"]
    tokens: Int[AnyArray, "B e"]


class Targets(NamedTuple):
    """What follows the inputs of each row."""

    ids: Int[AnyArray, "B T"]
    segments: Int[AnyArray, "B T"]


class TokenScores(NamedTuple):
    """log p of each token in nats, and the likeliest tokens of each position, best first."""

    log_probs: Float[Array, "*B T"]
    top_ids: Int[Array, "*B T top"]
    top_log_probs: Float[Array, "*B T top"]


class Choice(NamedTuple):
    """How each row of a batch chooses its tokens: see ``work.Sampling``."""

    temperature: Float[AnyArray, " B"]
    top_p: Float[AnyArray, " B"]
    seed: UInt[AnyArray, " B"]
    limit: Int[AnyArray, " B"]  # tokens at most
    eos: Int[AnyArray, " B"]  # -1: none
    cancelled: Bool[AnyArray, " B"]


class Answers(NamedTuple):
    """Answers that are being generated. It holds all that they need of the bank."""

    position: Int[Array, ""]  # tokens that each row has by now, unless it has ended
    ids: Int[Array, " B"]  # the last of each row
    finish: Int[Array, " B"]  # GOING, or why the row has ended
    cache: PyTree
    layers: Layers | None  # of each row, with leaves [B, L, ...]


class Tokens(NamedTuple):
    """The tokens of a chunk; -1 after a row's end."""

    ids: Int[Array, "B m"]
    scores: TokenScores
    finish: Int[Array, " B"]  # after it, see ``Answers``


def rows_injection(bank: Injection, slots: Int[Array, " B"]) -> Injection:
    """The injection of rows, with the changes of layers that each one's slot has."""
    if bank.layers is None:
        return bank
    take = lambda leaf: jnp.take(leaf, slots, axis=0, mode="clip")
    return _with_layers(bank.embeddings, jax.tree.map(take, bank.layers), len(slots))


def _with_layers(bank: Float[Array, "K P D"] | None, layers: Layers | None, rows: int) -> Injection:
    member = jnp.arange(rows) if layers is not None and rows > 1 else None
    return Injection(bank, layers, member=member)


def rank(
    params: registry.Params, bank: Injection, model: registry.Model, rows: Rows, edges: Edges
) -> Float[Array, "B e"]:
    """log p of each edge of each row's tree, in nats."""
    count_compilation(rank)
    injection = rows_injection(bank, jnp.asarray(rows.slots))
    prefill = model.prefill(params, injection, rows.inputs, rows.segments)
    logits = model.score_tree(params, injection, prefill, edges.tree)
    log_z, row = jax.nn.logsumexp(logits, axis=-1), jnp.arange(len(logits))[:, None]
    return logits[row, edges.parents, edges.tokens] - log_z[row, edges.parents]


def score(
    params: registry.Params, bank: Injection, model: registry.Model, rows: Rows, targets: Targets
) -> TokenScores:
    """The scores of given targets; what is after a target's end means nothing."""
    count_compilation(score)
    injection = rows_injection(bank, jnp.asarray(rows.slots))
    logits = model.logits(params, injection, rows.inputs, rows.segments, *targets)
    # virtual tokens are never given as targets, but padding may be anything
    ids = jnp.clip(jnp.asarray(targets.ids), 0, logits.shape[-1] - 1)
    return _scores(logits, ids)


def _scores(logits: Float[Array, "*B V"], ids: Int[Array, "*B"]) -> TokenScores:
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    top, top_ids = jax.lax.top_k(logits, TOP)
    return TokenScores(picked - log_z, top_ids, top - log_z[..., None])


def features(params: registry.Params, model: registry.Model, rows: Rows) -> Float[Array, "B D"]:
    """What the bare backbone makes of each row, see ``features.mean_hidden``."""
    count_compilation(features)
    return mean_hidden(params, model, rows.inputs, rows.segments)


def prefill(
    params: registry.Params, bank: Injection, model: registry.Model, rows: Rows, length: int
) -> Answers:
    """Read the inputs, for answers of at most ``length`` tokens. Empty rows have ended."""
    count_compilation(prefill)
    injection = rows_injection(bank, jnp.asarray(rows.slots))
    read = model.prefill(params, injection, rows.inputs, rows.segments)
    first, cache = model.init_decode(params, injection, read, length)
    empty = ~jnp.any(jnp.asarray(rows.segments) > 0, axis=1)
    finish = jnp.where(empty, CANCELLED, GOING)
    return Answers(jnp.int32(0), first, finish, cache, injection.layers)


def decode(
    params: registry.Params,
    model: registry.Model,
    answers: Answers,
    choice: Choice,
    steps: Int[AnyArray, ""],
    most: int,
) -> tuple[Answers, Tokens]:
    """``steps`` more tokens of each row, of which ``most`` have room; fewer if all rows end."""
    count_compilation(decode)
    count, steps = len(answers.ids), jnp.minimum(steps, most)
    choice = jax.tree.map(jnp.asarray, choice)
    injection = _with_layers(None, answers.layers, count)
    finish = jnp.where((answers.finish == GOING) & choice.cancelled, CANCELLED, answers.finish)
    scores = TokenScores(
        jnp.zeros((count, most)),
        jnp.zeros((count, most, TOP), jnp.int32),
        jnp.zeros((count, most, TOP)),
    )
    ids = jnp.full((count, most), -1, jnp.int32)

    def unfinished(state):
        step, answers, *_ = state
        return (step < steps) & jnp.any(answers.finish == GOING)

    def one(state):
        step, answers, *said_before = state
        logits, cache = model.decode_step(
            params, injection, answers.cache, answers.ids, answers.position
        )
        ids, scores = choose(logits, answers.position, choice)
        finish = _finish(answers, choice, logits, ids)
        said = (finish == GOING) | ((finish == LENGTH) & (answers.finish == GOING))
        put = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, step, axis=1)
        all_said = jax.tree.map(put, tuple(said_before), (jnp.where(said, ids, -1), scores))
        ids = jnp.where(said, ids, model.config.pad_id)
        after = Answers(answers.position + 1, ids, finish, cache, answers.layers)
        return step + 1, after, *all_said

    state = jnp.int32(0), answers._replace(finish=finish), ids, scores
    _, answers, ids, scores = jax.lax.while_loop(unfinished, one, state)
    return answers, Tokens(ids, scores, answers.finish)


def _finish(
    answers: Answers, choice: Choice, logits: Float[Array, "B V"], ids: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Why rows have ended after another token, or that they go on. EOS does not count as one."""
    finish = jnp.where(answers.position + 1 >= choice.limit, LENGTH, GOING)
    finish = jnp.where(ids == choice.eos, STOP, finish)
    # the largest logit is NaN where any is
    finite = jnp.isfinite(jnp.max(logits, axis=-1))
    finish = jnp.where(finite, finish, NON_FINITE)
    return jnp.where(answers.finish == GOING, finish, answers.finish)


def choose(
    logits: Float[Array, "B V"], index: Int[Array, ""], choice: Choice
) -> tuple[Int[Array, " B"], TokenScores]:
    """The next token of each row, with the model's own log p whatever the temperature."""
    likeliest = jax.lax.top_k(logits, 1)[1][:, 0]

    def draw() -> Int[Array, " B"]:
        scaled = logits / jnp.maximum(choice.temperature, 1e-4)[:, None]
        kept = jnp.where(_nucleus(scaled, jnp.asarray(choice.top_p)), scaled, -jnp.inf)
        key = lambda seed: jax.random.fold_in(jax.random.key(seed), index)
        drawn = jax.vmap(jax.random.categorical)(jax.vmap(key)(choice.seed), kept)
        return jnp.where(choice.temperature > 0, drawn, likeliest)

    ids = jax.lax.cond(jnp.any(choice.temperature > 0), draw, lambda: likeliest)
    return ids, _scores(logits, ids)


def _nucleus(logits: Float[Array, "B V"], top_p: Float[Array, " B"]) -> Bool[Array, "B V"]:
    """The likeliest tokens that together have the probability ``top_p`` (Holtzman et al. 2019).

    No sort: the bits of numbers from 0 to 1 are in the order of the numbers, so 31 halvings find
    the largest bound above which enough is left. Tokens with one probability are kept together.
    """
    p = jax.nn.softmax(logits, axis=-1)
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        mass = jnp.sum(jnp.where(bits >= middle[:, None], p, 0.0), axis=-1)
        enough = mass >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    above_one = jax.lax.bitcast_convert_type(jnp.float32(1.5), jnp.int32)
    bounds = jnp.zeros(len(p), jnp.int32), jnp.full(len(p), above_one)
    low, _ = jax.lax.fori_loop(0, 31, halve, bounds)
    return (bits >= low[:, None]) | (top_p >= 1)[:, None]
