"""The T5 family in one ``flax.linen`` module: T5 1.0, 1.1, LM-adapted, Flan, mT5, ByT5, umT5.

Modules own parameters, ``layers.py`` has the maths, and the functions at the end are what the rest
of the package calls; the last ones are those that every family has (``models/registry.py``). The
parameters are a plain pytree outside the module, layers stacked on axis 0.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprompt.models import blocks
from jaxprompt.models.blocks import Mlp, Norm, TokenEmbedder, abstract, named_axes, stacked
from jaxprompt.models.label_tree import Tree
from jaxprompt.models.ops import dropout, layers
from jaxprompt.models.ops.attention import flash_attention, per_example
from jaxprompt.models.ops.attention.per_example import Segments
from jaxprompt.models.ops.dropout import Noise
from jaxprompt.models.t5.config import AXES, T5Config
from jaxprompt.runtime.parallel import fsdp_size, shard_activation

Params = dict[str, Any]


class Attention(nn.Module):
    """Projections of one attention; ``mix`` joins them with the maths."""

    config: T5Config

    def setup(self):
        c, width = self.config, self.config.d_model // fsdp_size()
        into, out = (width, c.num_heads, c.head_dim), (c.num_heads, c.head_dim, width)
        normal = nn.initializers.normal
        self.query = self.param("query", normal((c.d_model * c.head_dim) ** -0.5), into)
        self.key = self.param("key", normal(c.d_model**-0.5), into)
        self.value = self.param("value", normal(c.d_model**-0.5), into)
        self.out = self.param("out", normal((c.num_heads * c.head_dim) ** -0.5), out)
        self.drop_keys = blocks.DropKeys(c.dropout, c.num_heads)

    def keys_values(self, x):
        return self._project(x, self.key), self._project(x, self.value)

    def _project(self, x, kernel):
        found = layers.dense("bsd,dnh->bsnh", x, kernel, self.config.mixed)
        return shard_activation(found, None, "heads", None)

    def mix(self, x, key, value, bias, seen, noise):
        c, query = self.config, self._project(x, self.query)
        keep = self.drop_keys(noise, x.dtype)
        if keep is not None:  # a dropped weight is a dropped value
            value = value * keep[..., None]
        if isinstance(seen, Segments):
            y = per_example.attention(query, key, value, bias, seen, mixed=c.mixed)
        elif isinstance(seen, flash_attention.Rows):
            y = flash_attention.attention(query, key, value, bias, seen)
        else:
            y = layers.attention(query, key, value, bias, seen, mixed=c.mixed)
        return layers.dense("btnh,nhd->btd", y, self.out, c.mixed)

    def mix_with(self, x, encoded, seen, noise):
        """The same to what is encoded, without keys and values where that is less work."""
        c = self.config
        if x.shape[1] >= c.head_dim // 2:
            return self.mix(x, *self.keys_values(encoded), None, seen, noise)
        query = self._project(x, self.query)
        keep = self.drop_keys(noise, x.dtype)
        y = layers.attention_to(query, self.key, self.value, encoded, seen, keep, mixed=c.mixed)
        return layers.dense("btnh,nhd->btd", y, self.out, c.mixed)


class Shared(NamedTuple):
    """What all layers of a stack read and none writes."""

    queries: Int[Array, " T"]  # offsets in the row
    keys: Int[Array, " S"]
    seen: Float[Array, "#B 1 #T S"] | Segments | flash_attention.Rows  # a mask is additive
    bias: Float[Array, "1 N T S"] | None = None  # None: each layer has its own
    encoded: Float[Array, "B S D"] | None = None
    seen_of_inputs: Float[Array, "B 1 #T S"] | Segments | None = None
    noise: Noise | None = None  # None: no dropout
    noise_of_inputs: Noise | None = None


class LayerCache(NamedTuple):
    """Keys and values of the decoder; a leading L where layers are stacked."""

    self_key: Float[Array, "*L B T N H"]
    self_value: Float[Array, "*L B T N H"]
    cross_key: Float[Array, "*L B S N H"]
    cross_value: Float[Array, "*L B S N H"]


def _bias_table(module, c):
    shape = (c.buckets, c.num_heads)
    return module.param("relative_bias", nn.initializers.normal(c.d_model**-0.5), shape)


def _bias(table, queries, keys, c, bidirectional):
    return layers.relative_bias(
        table, queries, keys, bidirectional=bidirectional, max_distance=c.max_distance
    )


class EncoderLayer(nn.Module):
    config: T5Config

    def setup(self):
        c = self.config
        self.attention_norm, self.mlp_norm = Norm(c.norm_eps), Norm(c.norm_eps)
        self.attention, self.mlp = Attention(c), Mlp(c)
        self.dropout = blocks.Dropout(c.dropout)
        if c.per_layer_bias:
            self.relative_bias = _bias_table(self, c)

    def __call__(self, x, shared: Shared):
        bias = shared.bias
        if bias is None:
            bias = _bias(self.relative_bias, shared.queries, shared.keys, self.config, True)
        y, noise = self.attention_norm(x), shared.noise
        key, value = self.attention.keys_values(y)
        y = self.attention.mix(y, key, value, bias, shared.seen, noise)
        x = x + self.dropout(y, noise)
        return shard_activation(x + self.dropout(self.mlp(self.mlp_norm(x), noise), noise)), None


class DecoderLayer(nn.Module):
    config: T5Config

    def setup(self):
        c = self.config
        self.self_attention_norm, self.cross_attention_norm = Norm(c.norm_eps), Norm(c.norm_eps)
        self.self_attention, self.cross_attention = Attention(c), Attention(c)
        self.mlp_norm, self.mlp = Norm(c.norm_eps), Mlp(c)
        self.dropout = blocks.Dropout(c.dropout)
        if c.per_layer_bias:
            self.relative_bias = _bias_table(self, c)

    def __call__(self, x, cache: LayerCache | None, shared: Shared):
        bias = shared.bias
        if bias is None:
            bias = _bias(self.relative_bias, shared.queries, shared.keys, self.config, False)
        y, noise = self.self_attention_norm(x), shared.noise
        key, value = self.self_attention.keys_values(y)
        if cache is not None:
            at = (0, shared.queries[0], 0, 0)
            key = jax.lax.dynamic_update_slice(cache.self_key, key, at)
            value = jax.lax.dynamic_update_slice(cache.self_value, value, at)
        y = self.self_attention.mix(y, key, value, bias, shared.seen, noise)
        x = x + self.dropout(y, noise)
        y, attend = self.cross_attention_norm(x), self.cross_attention
        if cache is None:
            across = shared.encoded, shared.seen_of_inputs, shared.noise_of_inputs
            y = attend.mix_with(y, *across)
        else:
            known = cache.cross_key, cache.cross_value
            y = attend.mix(y, *known, None, shared.seen_of_inputs, None)
        x = x + self.dropout(y, noise)
        written = None if cache is None else (key, value)
        x = x + self.dropout(self.mlp(self.mlp_norm(x), noise), noise)
        return shard_activation(x), written


class Stack(nn.Module):
    """Scanned layers, final norm and, where the layers share one, the relative bias."""

    config: T5Config
    layer: type[nn.Module]
    depth: int

    def setup(self):
        c = self.config
        inputs: Any = (nn.broadcast,) if self.layer is EncoderLayer else (0, nn.broadcast)
        self.layers = stacked(self.layer, c, self.depth, inputs)(c)
        self.final_norm = Norm(c.norm_eps)
        self.dropout = blocks.Dropout(c.dropout)
        if not c.per_layer_bias:
            self.relative_bias = _bias_table(self, c)

    def __call__(self, x, shared: Shared, cache: LayerCache | None = None):
        bidirectional = self.layer is EncoderLayer
        if not self.config.per_layer_bias:
            table = self.relative_bias
            bias = _bias(table, shared.queries, shared.keys, self.config, bidirectional)
            shared = shared._replace(bias=bias)
        x = self.dropout(x, shared.noise)
        x, written = self.layers(x, shared) if bidirectional else self.layers(x, cache, shared)
        return self.dropout(self.final_norm(x), shared.noise), written


class T5(nn.Module):
    config: T5Config

    def setup(self):
        c = self.config
        self.token_embedder = TokenEmbedder(c)
        self.encoder = Stack(c, EncoderLayer, c.num_encoder_layers)
        self.decoder = Stack(c, DecoderLayer, c.num_decoder_layers)
        if not c.tied:
            init = nn.initializers.normal(c.d_model**-0.5)
            self.head = self.param("head", init, (c.d_model, c.vocab_size))

    def encode(self, inputs, segments, bank, noise=None):
        c, (rows, width) = self.config, inputs.shape
        many = rows * c.num_heads * width**2 > per_example.LOGITS_AT_ONCE
        if c.flash:
            seen = flash_attention.rows(segments, c.flash, packed=bool(c.packed))
        elif c.rows_in_turn and (c.packed or many):
            seen = per_example.find(segments, c.packed)
            width = seen.widths[-1]
        else:
            seen = layers.additive(layers.segment_mask(segments, segments))
        offsets = jnp.arange(width)
        own = None if noise is None else dropout.of_inputs(noise, segments)
        shared = Shared(offsets, offsets, seen, noise=own)
        return self.encoder(self.token_embedder(inputs, bank), shared)[0]

    def decode(self, encoded, input_segments, decoder_inputs, target_segments, bank, noise, tree):
        offsets = jnp.arange(decoder_inputs.shape[1]) if tree is None else tree.depths
        before = offsets[None, :] <= offsets[:, None] if tree is None else tree.seen
        seen = layers.additive(layers.segment_mask(target_segments, target_segments) & before)
        of_inputs = layers.seen_of_inputs(target_segments, input_segments, self.config.packed)
        shared = Shared(offsets, offsets, seen, encoded=encoded, seen_of_inputs=of_inputs)
        if noise is not None:
            pair = dropout.of_rows(noise, len(offsets)), dropout.of_inputs(noise, input_segments)
            shared = shared._replace(noise=pair[0], noise_of_inputs=pair[1])
        return self.logits(self.decoder(self.token_embedder(decoder_inputs, bank), shared)[0])

    def decode_step(self, cache, input_segments, ids, index, bank):
        keys = jnp.arange(cache.self_key.shape[2])
        seen = layers.additive(keys <= index)[None, None, None, :]
        of_inputs = layers.additive(input_segments > 0)[:, None, None, :]
        shared = Shared(index[None], keys, seen, seen_of_inputs=of_inputs)
        y, written = self.decoder(self.token_embedder(ids[:, None], bank), shared, cache)
        return self.logits(y)[:, 0], written

    def logits(self, y):
        if self.config.scale_output:
            y = y * self.config.d_model**-0.5
        tied = self.config.tied
        table = self.token_embedder.embedding if tied else self.head
        return layers.head(y, table, self.config.mixed, tied)

    def __call__(self, inputs, segments, targets):
        encoded = self.encode(inputs, segments, None)
        return self.decode(encoded, segments, targets, jnp.ones_like(targets), None, None, None)


def init_params(config: T5Config, key: jax.Array) -> Params:
    """Random float32 parameters with T5's scales: embeddings N(0, 1), all else by fan-in."""
    ids = jnp.ones((1, 2), jnp.int32)
    variables: Any = T5(config).init({"params": key}, ids, ids, ids)
    return variables["params"]


def abstract_params(config: T5Config, dtype: str = "float32") -> Params:
    """Shapes and dtypes of all parameters, without allocating any."""
    return abstract(init_params, config, dtype)


def logical_axes(config: T5Config) -> dict[str, Any]:
    """Names of every parameter's axes, for sharding rules; stacked leaves start with "layers"."""
    return named_axes(AXES, abstract_params(config))


def _apply(params, config, method, *args) -> Any:
    rngs = {"dropout": jax.random.key(0)}  # every layer's own stream; what varies is the noise
    return T5(config).apply({"params": params}, *args, rngs=rngs, method=method)


def encode(
    params: Params,
    bank: Float[Array, "K P D"] | None,
    config: T5Config,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    noise: Int[Array, " R"] | None = None,
) -> Float[Array, "B S D"]:
    """Encoder output for ids that may be virtual; segment 0 is padding.

    noise: what dropout is drawn from, see ``pipeline.Batch``; None: none is.
    """
    return _apply(params, config, "encode", inputs, segments, bank, noise)


def decode(
    params: Params,
    bank: Float[Array, "K P D"] | None,
    config: T5Config,
    encoded: Float[Array, "B S D"],
    segments: Int[Array, "B S"],
    decoder_inputs: Int[Array, "R T"],
    target_segments: Int[Array, "R T"],
    noise: Int[Array, " R"] | None = None,
    tree: Tree | None = None,
) -> Float[Array, "R T V"]:
    """Teacher-forced float32 logits; ``decoder_inputs`` are the targets shifted right.

    R is B or, where each segment is answered in a row of its own, G x B (``pipeline.Batch``).
    The head has V columns, so no virtual id can ever be predicted. tree: the targets are its nodes,
    and not one token after another.
    """
    args = encoded, segments, decoder_inputs, target_segments, bank, noise, tree
    return _apply(params, config, "decode", *args)


def init_cache(
    params: Params, config: T5Config, encoded: Float[Array, "B S D"], length: int
) -> LayerCache:
    """An empty cache for ``length`` decoder positions, with the cross-attention's half filled in.

    One product over the stacked kernels gives all layers at once.
    """
    kernels = params["decoder"]["layers"]["cross_attention"]
    cross_key, cross_value = (
        layers.dense("bsd,ldnh->lbsnh", encoded, kernels[name], config.mixed)
        for name in ("key", "value")
    )
    depth, batch = config.num_decoder_layers, encoded.shape[0]
    empty = jnp.zeros((depth, batch, length, config.num_heads, config.head_dim), encoded.dtype)
    return LayerCache(empty, empty, cross_key, cross_value)


def decode_step(
    params: Params,
    bank: Float[Array, "K P D"] | None,
    config: T5Config,
    cache: LayerCache,
    segments: Int[Array, "B S"],
    ids: Int[Array, " B"],
    index: Int[Array, ""],
) -> tuple[Float[Array, "B V"], LayerCache]:
    """One decoder position: logits after ``ids`` at ``index``, and the cache with it filled."""
    args = cache, segments, ids, index, bank
    logits, (key, value) = _apply(params, config, "decode_step", *args)
    return logits, cache._replace(self_key=key, self_value=value)


class Reading(NamedTuple):
    """Inputs that have been read once and may be answered many times."""

    encoded: Float[Array, "B S D"]
    segments: Int[Array, "B S"]


def prepare(
    params: Params, bank: Float[Array, "K P D"] | None, config: T5Config
) -> Float[Array, "K P D"] | None:
    """The bank itself: in an encoder every activation depends on the text."""
    return bank


def logits(
    params, prompts, config: T5Config, inputs, segments, targets, target_segments, noise=None
) -> Float[Array, "B T V"]:
    """Teacher-forced logits of the targets, see ``models/registry.py``."""
    encoded = encode(params, prompts, config, inputs, segments, noise)
    shifted = layers.shift_right(targets, target_segments, config.decoder_start_id)
    return decode(params, prompts, config, encoded, segments, shifted, target_segments, noise)


def read(params, prompts, config: T5Config, inputs, segments) -> Reading:
    """Encode the inputs."""
    return Reading(encode(params, prompts, config, inputs, segments), segments)


def answer_logits(
    params, prompts, config: T5Config, reading: Reading, tree: Tree
) -> Float[Array, "R n V"]:
    """Logits after each beginning of an answer to inputs already read, R of them."""
    rows = len(reading.segments) * config.shared
    ids = jnp.where(tree.ids < 0, config.decoder_start_id, tree.ids)
    ids = jnp.broadcast_to(ids, (rows, len(ids)))
    return decode(params, prompts, config, *reading, ids, jnp.ones_like(ids), None, tree)


def start(params, config: T5Config, reading: Reading, length: int):
    """The ids that generation begins with, and the cache for ``length`` positions."""
    ids = jnp.full(reading.segments.shape[:1], config.decoder_start_id, jnp.int32)
    return ids, (init_cache(params, config, reading.encoded, length), reading.segments)


def step(params, prompts, config: T5Config, cache, ids, index):
    """Logits after ``ids`` at position ``index``, and the cache with it filled."""
    inner, segments = cache
    logits, inner = decode_step(params, prompts, config, inner, segments, ids, index)
    return logits, (inner, segments)


def repeat(cache, times: int):
    """A cache in which each row stands so many times, one after another."""
    inner = jax.tree.map(lambda x: jnp.repeat(x, times, axis=1), cache[0])
    return inner, jnp.repeat(cache[1], times, axis=0)


def reorder(cache, rows: Int[Array, " B"]):
    """What was decoded for these rows in the places of all; what is encoded stays."""
    inner, segments = cache
    written = {k: jnp.take(getattr(inner, k), rows, axis=1) for k in ("self_key", "self_value")}
    return inner._replace(**written), segments
