"""Decoder-only models in one ``flax.linen`` module: Llama, Mistral, Qwen2, SmolLM2.

To the rest of the package this looks like T5: inputs are read, targets answer them
(``models/registry.py``). Here both are one sequence. The last token of the input is what a target
begins with, as T5's start id is, so that a pass over targets yields exactly their logits; what
stands before it is read with or without the targets in the same pass.

A prompt in front of the text does not see the text, unless all of the input sees itself. Where
every row starts with one (``layout.shared_prefix_length``), ``prepare`` computes its keys and
values once for all rows instead of once for each: exactly the same function, in training too.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprompt.data.layout import BatchLayout
from jaxprompt.models.base import Model, Params
from jaxprompt.models.blocks import Mlp, Norm, TokenEmbedder, abstract, named_axes, stacked
from jaxprompt.models.decoder import layers as llama_layers
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.decoder.layers import Block, last_of_segment
from jaxprompt.models.label_tree import Tree
from jaxprompt.models.ops import layers
from jaxprompt.runtime.parallel import shard_activation


class KeysValues(NamedTuple):
    """A leading L where layers are stacked; K prompts or B rows."""

    key: Float[Array, "*L B S G H"]
    value: Float[Array, "*L B S G H"]


class Prompts(NamedTuple):
    """What virtual tokens stand for: vectors and, if they lead, what each layer makes of them."""

    bank: Float[Array, "K P D"] | None
    leading: KeysValues | None = None


class Past(NamedTuple):
    """What earlier passes have left for a pass to look at."""

    prompts: KeysValues | None = None  # rows are prompts
    inputs: KeysValues | None = None
    cache: KeysValues | None = None  # this pass writes into it


class Context(NamedTuple):
    """What all layers read and none writes."""

    angles: Float[Array, "#B T H/2"]
    mask: Bool[Array, "#B T S"]  # of the pass's own tokens, or of the cache
    owners: Int[Array, " B"] | None = None  # number of the prompt that leads each row
    prompt_mask: Bool[Array, "#B #T P"] | None = None
    input_mask: Bool[Array, "#B #T S"] | None = None
    at: Int[Array, ""] | int = 0  # where the cache is written


class Attention(nn.Module):
    model: "DecoderModel"

    def setup(self):
        c = self.model.config
        width = c.d_model // self.model.runtime.place.fsdp
        normal = nn.initializers.normal(c.d_model**-0.5)
        narrow = (c.num_kv_heads, c.head_dim)
        self.query = self.param("query", normal, (width, c.num_heads, c.head_dim))
        self.key = self.param("key", normal, (width, *narrow))
        self.value = self.param("value", normal, (width, *narrow))
        self.out = self.param("out", normal, (c.num_heads, c.head_dim, width))
        if c.qkv_bias:
            zeros = nn.initializers.zeros
            self.query_bias = self.param("query_bias", zeros, (c.num_heads, c.head_dim))
            self.key_bias = self.param("key_bias", zeros, narrow)
            self.value_bias = self.param("value_bias", zeros, narrow)

    def _project(self, x, name):
        spec = "bsd,dnh->bsnh" if name == "query" else "bsd,dgh->bsgh"
        y = layers.dense(spec, x, getattr(self, name), self.model.runtime)
        if self.model.config.qkv_bias:
            y += getattr(self, f"{name}_bias").astype(y.dtype)
        return y

    def __call__(self, x, past: Past, context: Context):
        query = llama_layers.rotate(self._project(x, "query"), context.angles)
        key = llama_layers.rotate(self._project(x, "key"), context.angles)
        value = self._project(x, "value")
        if past.cache is not None:
            at = (0, context.at, 0, 0)
            key = jax.lax.dynamic_update_slice(past.cache.key, key, at)
            value = jax.lax.dynamic_update_slice(past.cache.value, value, at)
        blocks = [Block(key, value, context.mask)]
        if past.inputs is not None:
            blocks.insert(0, Block(*past.inputs, context.input_mask))
        if past.prompts is not None:
            rows = past.prompts  # of one prompt all rows share them
            if rows.key.shape[0] > 1:
                rows = KeysValues(rows.key[context.owners], rows.value[context.owners])
            blocks.insert(0, Block(*rows, context.prompt_mask))
        y = llama_layers.grouped_attention(query, blocks)
        return layers.dense("btnh,nhd->btd", y, self.out, self.model.runtime), (key, value)


class Layer(nn.Module):
    model: "DecoderModel"

    def setup(self):
        c, model = self.model.config, self.model
        self.attention_norm, self.mlp_norm = Norm(c.norm_eps), Norm(c.norm_eps)
        self.attention, self.mlp = Attention(model), Mlp(model)

    def __call__(self, x, past: Past, context: Context):
        y, written = self.attention(self.attention_norm(x), past, context)
        x = x + y
        x = x + self.mlp(self.mlp_norm(x), None)
        return shard_activation(x, self.model.runtime.place), KeysValues(*written)


class Decoder(nn.Module):
    model: "DecoderModel"

    def setup(self):
        c, model = self.model.config, self.model
        self.token_embedder = TokenEmbedder(model)
        layers_of = stacked(Layer, model.runtime, c.num_layers, (0, nn.broadcast))
        self.layers = layers_of(model)
        self.final_norm = Norm(c.norm_eps)
        if not c.tied:
            init = nn.initializers.normal(c.d_model**-0.5)
            self.head = self.param("head", init, (c.d_model, c.vocab_size))

    def __call__(self, ids, bank, past: Past, context: Context, scored: int):
        """Logits of the last ``scored`` positions, and the keys and values of all."""
        x, written = self.layers(self.token_embedder(ids, bank), past, context)
        if scored == 0:
            return None, written
        y = self.final_norm(x[:, x.shape[1] - scored :])
        tied = self.model.config.tied
        table = self.token_embedder.embedding if tied else self.head
        return layers.head(y, table, self.model.runtime.mixed, tied), written


def _run(params, model, ids, bank, past, context, scored) -> tuple[Any, KeysValues]:
    module: Any = Decoder(model)
    return module.apply({"params": params}, ids, bank, past, context, scored)


def init_params(config: DecoderConfig, key: jax.Array) -> Params:
    """Random float32 parameters: embeddings N(0, 1), all else by fan-in."""
    ids, module = jnp.ones((1, 1), jnp.int32), Decoder(DecoderModel(config))
    context = Context(_angles(config, ids), jnp.ones((1, 1, 1), bool))
    variables: Any = module.init({"params": key}, ids, None, Past(), context, 1)
    return variables["params"]


def abstract_params(config: DecoderConfig, dtype: str = "float32") -> Params:
    """Shapes and dtypes of all parameters, without allocating any."""
    return abstract(init_params, config, dtype)


_AXES = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "query": ("embed", "heads", "kv"),
    "key": ("embed", "kv_heads", "kv"),
    "value": ("embed", "kv_heads", "kv"),
    "query_bias": ("heads", "kv"),
    "key_bias": ("kv_heads", "kv"),
    "value_bias": ("kv_heads", "kv"),
    "out": ("heads", "kv", "embed"),
    "wi_0": ("embed", "mlp"),
    "wi_1": ("embed", "mlp"),
    "wo": ("mlp", "embed"),
    "scale": ("norm",),
}


def logical_axes(config: DecoderConfig) -> dict[str, Any]:
    """Names of every parameter's axes, for sharding rules; stacked leaves start with "layers"."""
    return named_axes(_AXES, abstract_params(config))


def _angles(config: DecoderConfig, positions: Int[Array, "B T"]) -> Float[Array, "B T H/2"]:
    found = llama_layers.rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return positions[..., None].astype(jnp.float32) * found.astype("float32")


def _near(config: DecoderConfig, queries, keys) -> Bool[Array, "#B #T #S"]:
    """Which keys are within the window, from positions [B, T] and [B, S]."""
    if config.window is None:
        return jnp.ones((1, 1, 1), bool)
    return queries[:, :, None] - keys[:, None, :] < config.window


def _among(segments, positions, ids, model: "DecoderModel", *, input: bool) -> Bool[Array, "B T T"]:
    """What the tokens of one pass may see of each other."""
    order = jnp.arange(segments.shape[1])
    seen = order[None, :] <= order[:, None]
    if input and model.runtime.attention == "prefix":
        seen = jnp.ones_like(seen)
    elif input and model.runtime.attention == "prompt":
        virtual = ids >= model.config.vocab_size
        seen = seen | (virtual[:, :, None] & virtual[:, None, :])
    same = layers.segment_mask(segments, segments)[:, 0]
    return same & seen & _near(model.config, positions, positions)


class Text(NamedTuple):
    """The inputs of a batch without the prompt that leads each row, if one does."""

    ids: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    before: Int[Array, "B S"]  # segments, without the last token of each: what targets may see
    owners: Int[Array, " B"] | None


def _text(model: "DecoderModel", inputs, segments) -> Text:
    owners, prefix = None, model.layout.shared_prefix_length
    if prefix:
        owners = jnp.maximum(inputs[:, 0] - model.config.vocab_size, 0) // prefix
        inputs, segments = inputs[:, prefix:], segments[:, prefix:]
    before = jnp.where(last_of_segment(segments), 0, segments)
    return Text(inputs, segments, prefix + layers.ranks(segments), before, owners)


class Prefill(NamedTuple):
    """Inputs that have been read once and may be answered many times."""

    text: Text
    keys_values: KeysValues


class DecodeCache(NamedTuple):
    """What generation keeps between two tokens."""

    prefill: Prefill
    written: KeysValues  # of the answer


def _prompt_mask(model: "DecoderModel", positions) -> Bool[Array, "B T P"] | None:
    prefix = model.layout.shared_prefix_length
    if not prefix or model.config.window is None:
        return None  # all of it
    return _near(model.config, positions, jnp.arange(prefix)[None])


def _answer(text: Text, targets, segments) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Ids and positions of a pass over targets."""
    first, start = _begin(text, segments)
    return layers.shift_right(targets, segments, first), start + layers.ranks(segments)


def _begin(text: Text, segments) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """What each segment of targets begins with: the last id of its input, and its position."""
    mine = segments[:, :, None] == text.segments[:, None, :]
    last = mine & last_of_segment(text.segments)[:, None, :]
    first = jnp.sum(jnp.where(last, text.ids[:, None, :], 0), axis=-1)
    return first, jnp.max(jnp.where(last, text.positions[:, None, :], 0), axis=-1)


def _across(config: DecoderConfig, text: Text, segments, positions) -> Bool[Array, "B T S"]:
    """What targets may see of the text."""
    seen = layers.segment_mask(segments, text.before)[:, 0]
    return seen & _near(config, positions, text.positions)


@dataclasses.dataclass(frozen=True)
class DecoderModel(Model):
    """A decoder-only model: see ``Model`` for what every family does."""

    config: DecoderConfig
    layout: BatchLayout = BatchLayout(fine_buckets=True)

    def init_params(self, key: jax.Array) -> Params:
        return init_params(self.config, key)

    def abstract_params(self, dtype: str = "float32") -> Params:
        return abstract_params(self.config, dtype)

    def logical_axes(self) -> dict[str, Any]:
        return logical_axes(self.config)

    def prepare(self, params, bank) -> Prompts:
        """The bank and, where prompts lead the rows, the keys and values that every layer makes.

        They are a function of the vectors alone: once per step in training, once for all batches in
        evaluation.
        """
        if bank is None or not self.layout.shared_prefix_length:
            return Prompts(bank)
        count, length, _ = bank.shape
        ids = self.config.vocab_size + jnp.arange(count * length).reshape(count, length)
        positions = jnp.arange(length)[None]
        mask = _among(jnp.ones((1, length), jnp.int32), positions, ids[:1], self, input=True)
        context = Context(_angles(self.config, positions), mask)
        return Prompts(bank, _run(params, self, ids, bank, Past(), context, 0)[1])

    def logits(
        self,
        params,
        prompts: Prompts,
        inputs,
        segments,
        targets,
        target_segments,
        dropout_seed=None,
    ):
        """Teacher-forced logits in one pass over inputs and targets; there is no dropout."""
        text = _text(self, inputs, segments)
        ids, positions = _answer(text, targets, target_segments)
        text_mask = _among(text.segments, text.positions, text.ids, self, input=True)
        own = _among(target_segments, positions, ids, self, input=False)
        across = _across(self.config, text, target_segments, positions)
        hidden = jnp.zeros((*text_mask.shape[:2], own.shape[2]), bool)  # no text sees a target
        mask = jnp.block([[text_mask, hidden], [across, own]])
        places = jnp.concatenate([text.positions, positions], axis=1)
        angles = _angles(self.config, places)
        context = Context(angles, mask, text.owners, _prompt_mask(self, places))
        ids, past = jnp.concatenate([text.ids, ids], axis=1), Past(prompts.leading)
        return _run(params, self, ids, prompts.bank, past, context, targets.shape[1])[0]

    def prefill(self, params, prompts: Prompts, inputs, segments) -> Prefill:
        """The keys and values of the inputs."""
        text = _text(self, inputs, segments)
        context = Context(
            _angles(self.config, text.positions),
            _among(text.segments, text.positions, text.ids, self, input=True),
            text.owners,
            _prompt_mask(self, text.positions),
        )
        past = Past(prompts.leading)
        return Prefill(text, _run(params, self, text.ids, prompts.bank, past, context, 0)[1])

    def score_tree(self, params, prompts: Prompts, prefill: Prefill, tree: Tree):
        text, shape = prefill.text, (len(prefill.text.ids), len(tree.ids))
        segments = jnp.ones(shape, jnp.int32)
        first, start = _begin(text, segments)
        positions = start + tree.depths
        context = Context(
            _angles(self.config, positions),
            jnp.asarray(tree.seen) & _near(self.config, positions, positions),
            text.owners,
            _prompt_mask(self, positions),
            _across(self.config, text, segments, positions),
        )
        past = Past(prompts.leading, prefill.keys_values)
        ids = jnp.where(tree.ids < 0, first, tree.ids)
        return _run(params, self, ids, prompts.bank, past, context, shape[1])[0]

    def init_decode(self, params, prefill: Prefill, length: int):
        """The last id of every input, with which its answer begins, and an empty cache."""
        text, key = prefill.text, prefill.keys_values.key
        last = jnp.where(last_of_segment(text.segments), text.ids, 0)
        depth, batch, _, heads, width = key.shape
        empty = jnp.zeros((depth, batch, length, heads, width), key.dtype)
        return jnp.sum(last, axis=-1), DecodeCache(prefill, KeysValues(empty, empty))

    def decode_step(self, params, prompts: Prompts, cache: DecodeCache, ids, index):
        text, written = cache.prefill.text, cache.written
        prefix = self.layout.shared_prefix_length
        first = prefix + jnp.sum(text.before > 0, axis=-1, keepdims=True)
        positions = first + index
        places = first + jnp.arange(written.key.shape[2])
        own = (places <= positions)[:, None] & _near(self.config, positions, places)
        context = Context(
            _angles(self.config, positions),
            own,
            text.owners,
            _prompt_mask(self, positions),
            _across(self.config, text, jnp.ones_like(positions), positions),
            index,
        )
        past = Past(prompts.leading, cache.prefill.keys_values, written)
        logits, written = _run(params, self, ids[:, None], prompts.bank, past, context, 1)
        return logits[:, 0], cache._replace(written=written)

    def tile_cache(self, cache: DecodeCache, times: int) -> DecodeCache:
        (text, keys_values), written = cache
        stacked = lambda tree: jax.tree.map(lambda x: jnp.repeat(x, times, axis=1), tree)
        text = jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), text)
        return DecodeCache(Prefill(text, stacked(keys_values)), stacked(written))

    def gather_beams(self, cache: DecodeCache, rows: Int[Array, " B"]) -> DecodeCache:
        written = jax.tree.map(lambda x: jnp.take(x, rows, axis=1), cache.written)
        return cache._replace(written=written)
