"""The T5 family in one ``flax.linen`` module: T5 1.0, 1.1, LM-adapted, Flan, mT5, ByT5, umT5.

Modules own parameters, ``ops`` has the maths, and ``T5Model`` at the end is what the rest of the
package calls. The parameters are a plain pytree outside the module, layers stacked on axis 0.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprompt.models import blocks
from jaxprompt.models.base import Model, Params
from jaxprompt.models.blocks import Mlp, Norm, TokenEmbedder, abstract, named_axes, stacked
from jaxprompt.models.label_tree import Tree
from jaxprompt.models.ops import dropout, layers
from jaxprompt.models.ops.attention import flash_attention, per_example
from jaxprompt.models.ops.attention.per_example import Segments
from jaxprompt.models.ops.dropout import Noise
from jaxprompt.models.t5.config import AXES, T5Config
from jaxprompt.runtime.parallel import shard_activation


class Attention(nn.Module):
    """Projections of one attention; ``mix`` joins them with the maths."""

    model: "T5Model"

    def setup(self):
        c, runtime = self.model.config, self.model.runtime
        width = c.d_model // runtime.place.fsdp
        into, out = (width, c.num_heads, c.head_dim), (c.num_heads, c.head_dim, width)
        normal = nn.initializers.normal
        self.query = self.param("query", normal((c.d_model * c.head_dim) ** -0.5), into)
        self.key = self.param("key", normal(c.d_model**-0.5), into)
        self.value = self.param("value", normal(c.d_model**-0.5), into)
        self.out = self.param("out", normal((c.num_heads * c.head_dim) ** -0.5), out)
        self.drop_keys = blocks.DropKeys(runtime.dropout, c.num_heads)

    def keys_values(self, x):
        return self._project(x, self.key), self._project(x, self.value)

    def _project(self, x, kernel):
        runtime = self.model.runtime
        y = layers.dense("bsd,dnh->bsnh", x, kernel, runtime)
        return shard_activation(y, runtime.place, None, "heads", None)

    def mix(self, x, key, value, bias, seen, noise):
        runtime, query = self.model.runtime, self._project(x, self.query)
        keep = self.drop_keys(noise, x.dtype)
        if keep is not None:  # a dropped weight is a dropped value
            value = value * keep[..., None]
        if isinstance(seen, Segments):
            y = per_example.attention(query, key, value, bias, seen, mixed=runtime.mixed)
        elif isinstance(seen, flash_attention.Rows):
            y = flash_attention.attention(query, key, value, bias, seen)
        else:
            y = layers.attention(query, key, value, bias, seen, mixed=runtime.mixed)
        return layers.dense("btnh,nhd->btd", y, self.out, runtime)

    def mix_with(self, x, encoded, seen, noise):
        """The same to what is encoded, without keys and values where that is less work."""
        runtime = self.model.runtime
        if x.shape[1] >= self.model.config.head_dim // 2:
            return self.mix(x, *self.keys_values(encoded), None, seen, noise)
        query = self._project(x, self.query)
        keep = self.drop_keys(noise, x.dtype)
        y = layers.attention_to(query, self.key, self.value, encoded, seen, keep, runtime)
        return layers.dense("btnh,nhd->btd", y, self.out, runtime)


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
    model: "T5Model"

    def setup(self):
        c = self.model.config
        self.attention_norm, self.mlp_norm = Norm(c.norm_eps), Norm(c.norm_eps)
        self.attention, self.mlp = Attention(self.model), Mlp(self.model)
        self.dropout = blocks.Dropout(self.model.runtime.dropout)
        if c.per_layer_bias:
            self.relative_bias = _bias_table(self, c)

    def __call__(self, x, shared: Shared):
        bias = shared.bias
        if bias is None:
            bias = _bias(self.relative_bias, shared.queries, shared.keys, self.model.config, True)
        y, noise = self.attention_norm(x), shared.noise
        key, value = self.attention.keys_values(y)
        y = self.attention.mix(y, key, value, bias, shared.seen, noise)
        x = x + self.dropout(y, noise)
        x = x + self.dropout(self.mlp(self.mlp_norm(x), noise), noise)
        return shard_activation(x, self.model.runtime.place), None


class DecoderLayer(nn.Module):
    model: "T5Model"

    def setup(self):
        c, model = self.model.config, self.model
        self.self_attention_norm, self.cross_attention_norm = Norm(c.norm_eps), Norm(c.norm_eps)
        self.self_attention, self.cross_attention = Attention(model), Attention(model)
        self.mlp_norm, self.mlp = Norm(c.norm_eps), Mlp(model)
        self.dropout = blocks.Dropout(model.runtime.dropout)
        if c.per_layer_bias:
            self.relative_bias = _bias_table(self, c)

    def __call__(self, x, cache: LayerCache | None, shared: Shared):
        bias = shared.bias
        if bias is None:
            bias = _bias(self.relative_bias, shared.queries, shared.keys, self.model.config, False)
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
        return shard_activation(x, self.model.runtime.place), written


class Stack(nn.Module):
    """Scanned layers, final norm and, where the layers share one, the relative bias."""

    model: "T5Model"
    layer: type[nn.Module]
    depth: int

    def setup(self):
        c = self.model.config
        inputs: Any = (nn.broadcast,) if self.layer is EncoderLayer else (0, nn.broadcast)
        layers_of = stacked(self.layer, self.model.runtime, self.depth, inputs)
        self.layers = layers_of(self.model)
        self.final_norm = Norm(c.norm_eps)
        self.dropout = blocks.Dropout(self.model.runtime.dropout)
        if not c.per_layer_bias:
            self.relative_bias = _bias_table(self, c)

    def __call__(self, x, shared: Shared, cache: LayerCache | None = None):
        bidirectional = self.layer is EncoderLayer
        config = self.model.config
        if not config.per_layer_bias:
            table = self.relative_bias
            bias = _bias(table, shared.queries, shared.keys, config, bidirectional)
            shared = shared._replace(bias=bias)
        x = self.dropout(x, shared.noise)
        x, written = self.layers(x, shared) if bidirectional else self.layers(x, cache, shared)
        return self.dropout(self.final_norm(x), shared.noise), written


class T5(nn.Module):
    model: "T5Model"

    def setup(self):
        c, model = self.model.config, self.model
        self.token_embedder = TokenEmbedder(model)
        self.encoder = Stack(model, EncoderLayer, c.num_encoder_layers)
        self.decoder = Stack(model, DecoderLayer, c.num_decoder_layers)
        if not c.tied:
            init = nn.initializers.normal(c.d_model**-0.5)
            self.head = self.param("head", init, (c.d_model, c.vocab_size))

    def encode(self, inputs, segments, bank, noise=None):
        runtime, packed_widths = self.model.runtime, self.model.layout.packed_widths
        rows, width = inputs.shape
        many = rows * self.model.config.num_heads * width**2 > per_example.LOGITS_AT_ONCE
        if runtime.flash:
            seen = flash_attention.rows(segments, runtime.flash, packed=bool(packed_widths))
        elif runtime.per_example_attention and (packed_widths or many):
            seen = per_example.find(segments, packed_widths)
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
        of_inputs = layers.seen_of_inputs(
            target_segments, input_segments, self.model.layout.packed_widths
        )
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
        c = self.model.config
        if c.scale_output:
            y = y * c.d_model**-0.5
        table = self.token_embedder.embedding if c.tied else self.head
        return layers.head(y, table, self.model.runtime.mixed, c.tied)

    def __call__(self, inputs, segments, targets):
        encoded = self.encode(inputs, segments, None)
        return self.decode(encoded, segments, targets, jnp.ones_like(targets), None, None, None)


def init_params(config: T5Config, key: jax.Array) -> Params:
    """Random float32 parameters with T5's scales: embeddings N(0, 1), all else by fan-in."""
    ids = jnp.ones((1, 2), jnp.int32)
    variables: Any = T5(T5Model(config)).init({"params": key}, ids, ids, ids)
    return variables["params"]


def abstract_params(config: T5Config, dtype: str = "float32") -> Params:
    """Shapes and dtypes of all parameters, without allocating any."""
    return abstract(init_params, config, dtype)


def logical_axes(config: T5Config) -> dict[str, Any]:
    """Names of every parameter's axes, for sharding rules; stacked leaves start with "layers"."""
    return named_axes(AXES, abstract_params(config))


class Encoded(NamedTuple):
    """Inputs that have been encoded once and may be answered many times."""

    hidden: Float[Array, "B S D"]
    segments: Int[Array, "B S"]


class DecodeCache(NamedTuple):
    """What the decoder keeps between two tokens."""

    layers: LayerCache
    segments: Int[Array, "B S"]  # of the inputs


@dataclasses.dataclass(frozen=True)
class T5Model(Model):
    """A T5: see ``Model`` for what every family does."""

    config: T5Config

    def init_params(self, key: jax.Array) -> Params:
        return init_params(self.config, key)

    def abstract_params(self, dtype: str = "float32") -> Params:
        return abstract_params(self.config, dtype)

    def logical_axes(self) -> dict[str, Any]:
        return logical_axes(self.config)

    def _apply(self, params: Params, method: str, *args: Any) -> Any:
        rngs = {"dropout": jax.random.key(0)}  # a stream for each layer; a batch's seeds vary
        return T5(self).apply({"params": params}, *args, rngs=rngs, method=method)

    def encode(
        self,
        params: Params,
        bank: Float[Array, "K P D"] | None,
        inputs: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        dropout_seed: Int[Array, " R"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Encoder output for ids that may be virtual; segment 0 is padding."""
        return self._apply(params, "encode", inputs, segments, bank, dropout_seed)

    def decode(
        self,
        params: Params,
        bank: Float[Array, "K P D"] | None,
        encoded: Encoded,
        decoder_inputs: Int[Array, "R T"],
        target_segments: Int[Array, "R T"],
        dropout_seed: Int[Array, " R"] | None = None,
        tree: Tree | None = None,
    ) -> Float[Array, "R T V"]:
        """Teacher-forced float32 logits; ``decoder_inputs`` are the targets shifted right.

        R is B or, where each segment is answered in a row of its own, G x B (``data.batches``).
        tree: the targets are its nodes, and not one token after another.
        """
        hidden, segments = encoded
        args = hidden, segments, decoder_inputs, target_segments, bank, dropout_seed, tree
        return self._apply(params, "decode", *args)

    def prepare(self, params, bank):
        """The bank itself: in an encoder every activation depends on the text."""
        return bank

    def logits(
        self, params, prompts, inputs, segments, targets, target_segments, dropout_seed=None
    ):
        hidden = self.encode(params, prompts, inputs, segments, dropout_seed)
        shifted = layers.shift_right(targets, target_segments, self.config.decoder_start_id)
        encoded = Encoded(hidden, segments)
        return self.decode(params, prompts, encoded, shifted, target_segments, dropout_seed)

    def prefill(self, params, prompts, inputs, segments) -> Encoded:
        return Encoded(self.encode(params, prompts, inputs, segments), segments)

    def score_tree(self, params, prompts, prefill: Encoded, tree: Tree):
        rows = len(prefill.segments) * self.layout.examples_per_row
        ids = jnp.where(tree.ids < 0, self.config.decoder_start_id, tree.ids)
        ids = jnp.broadcast_to(ids, (rows, len(ids)))
        return self.decode(params, prompts, prefill, ids, jnp.ones_like(ids), None, tree)

    def init_decode(self, params, prefill: Encoded, length: int):
        """The start id of every row, and a cache with the half of cross-attention filled in.

        One product over the stacked kernels gives all layers at once.
        """
        c, (hidden, segments) = self.config, prefill
        kernels = params["decoder"]["layers"]["cross_attention"]
        cross_key, cross_value = (
            layers.dense("bsd,ldnh->lbsnh", hidden, kernels[name], self.runtime)
            for name in ("key", "value")
        )
        batch = len(segments)
        shape = c.num_decoder_layers, batch, length, c.num_heads, c.head_dim
        empty = jnp.zeros(shape, hidden.dtype)
        ids = jnp.full((batch,), c.decoder_start_id, jnp.int32)
        return ids, DecodeCache(LayerCache(empty, empty, cross_key, cross_value), segments)

    def decode_step(self, params, prompts, cache: DecodeCache, ids, index):
        args = *cache, ids, index, prompts
        logits, (key, value) = self._apply(params, "decode_step", *args)
        written = cache.layers._replace(self_key=key, self_value=value)
        return logits, cache._replace(layers=written)

    def tile_cache(self, cache: DecodeCache, times: int) -> DecodeCache:
        inner = jax.tree.map(lambda x: jnp.repeat(x, times, axis=1), cache.layers)
        return DecodeCache(inner, jnp.repeat(cache.segments, times, axis=0))

    def gather_beams(self, cache: DecodeCache, rows: Int[Array, " B"]) -> DecodeCache:
        inner = cache.layers
        keys, values = (jnp.take(x, rows, axis=1) for x in (inner.self_key, inner.self_value))
        return cache._replace(layers=inner._replace(self_key=keys, self_value=values))
