"""The T5 family in one ``flax.linen`` module: T5 1.0, 1.1, LM-adapted, Flan, mT5, ByT5, umT5.

Modules own parameters, ``ops`` has the maths, and ``T5Model`` at the end is what the rest of the
package calls. The parameters are a plain pytree outside the module, layers stacked on axis 0.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxprompt.data.batches import AnyArray
from jaxprompt.models import blocks
from jaxprompt.models.base import LayerStates, Model, Params
from jaxprompt.models.blocks import (
    Mlp,
    Norm,
    TokenEmbedder,
    abstract,
    named_axes,
    stacked,
    tuned,
)
from jaxprompt.models.injection import (
    VERBALIZER,
    Injection,
    KeyValues,
    Layers,
    Prefix,
    leaf_at,
    refuse_label_rows,
)
from jaxprompt.models.label_tree import AnyTree, Tree
from jaxprompt.models.ops.attention.dense import dense_mask
from jaxprompt.models.ops.attention.mask import (
    AttentionMask,
    CrossAttentionMask,
    CrossKernels,
    UnprojectedKernel,
    attend_unprojected,
    cross_attention_mask,
    encoder_mask,
)
from jaxprompt.models.ops.attention.prefix import with_prefix
from jaxprompt.models.ops.changes import (
    Member,
    adapted,
    changed,
    label_logits,
    of_rows,
    project,
)
from jaxprompt.models.ops.dropout import DropoutSeeds, seeds_of_rows, seeds_of_segments
from jaxprompt.models.ops.matmul import dense, head
from jaxprompt.models.ops.positions import bias_of_offsets, prefix_offsets, relative_bias
from jaxprompt.models.ops.segments import positions_in_segments, segment_mask, shift_right
from jaxprompt.models.t5.config import AXES, T5Config
from jaxprompt.runtime.parallel import shard_activation


class Attention(nn.Module):
    """The projections of one attention; the mask has the kernel that it is computed with."""

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

    def keys_values(
        self, x: Float[Array, "B S D"], member: Member, dropout: DropoutSeeds | None
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]:
        key, value = (self._project(x, name, member, dropout) for name in ("key", "value"))
        self.sow("keys_values", "made", KeyValues(key, value))  # nothing, unless they are asked for
        return key, value

    def _project(
        self, x: Float[Array, "B S D"], name: str, member: Member, dropout: DropoutSeeds | None
    ) -> Float[Array, "B S N H"]:
        runtime, change = self.model.runtime, tuned(self, name)
        read = blocks.dropped(self, change, x, member, dropout)
        y = project("bsd,dnh->bsnh", x, getattr(self, name), change, member, runtime, read)
        return shard_activation(y, runtime.place, None, "heads", None)

    def _out(
        self, y: Float[Array, "R T N H"], member: Member, dropout: DropoutSeeds | None
    ) -> Float[Array, "R T D"]:
        change, runtime = tuned(self, "out"), self.model.runtime
        read = blocks.dropped(self, change, y, member, dropout)
        return project("btnh,nhd->btd", y, self.out, change, member, runtime, read)

    def attend(
        self,
        x: Float[Array, "R T D"],
        keys_values: tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]],
        mask: AttentionMask,
        bias: "Bias",
        dropout: "AttentionDropout",
        member: Member,
    ) -> Float[Array, "R T D"]:
        """Attention of ``x`` to a prefix, keys and values."""
        query, (key, value) = self._project(x, "query", member, dropout.queries), keys_values
        keep = self.drop_keys(dropout.keys, x.dtype)
        if keep is not None:  # to drop a key's weight is to drop its value
            value = value * keep[..., None]
        mixed, prefix = self.model.runtime.mixed, self._prefix(member, len(x))
        if prefix is None:
            y = mask.attend(query, key, value, bias.text, mixed=mixed)
        else:
            part = mask.attend_part(query, key, value, bias.text, mixed=mixed)
            y = with_prefix(part, query, prefix, bias.prefix)
        return self._out(y, member, dropout.queries)

    def _prefix(self, member: Member, rows: int) -> Prefix | None:
        prefix = tuned(self, "prefix")
        return None if prefix is None else of_rows(prefix, member, rows)

    def cross_attend(
        self,
        x: Float[Array, "R T D"],
        encoded: Float[Array, "B S D"],
        mask: CrossAttentionMask,
        dropout: "AttentionDropout",
        member: Member,
    ) -> Float[Array, "R T D"]:
        """Attention of ``x`` to an encoder's output, without keys and values if that is less work.

        A bias and the dropout of a low-rank change are there for keys and values alone.
        """
        changes = tuned(self, "key"), tuned(self, "value")
        needed = any(
            blocks.drops(change, dropout.keys) or (change is not None and change.bias is not None)
            for change in changes
        )
        if x.shape[1] >= self.model.config.head_dim // 2 or needed:
            keys_values = self.keys_values(encoded, member, dropout.keys)
            return self.attend(x, keys_values, mask, Bias(), dropout, member)
        query = self._project(x, "query", member, dropout.queries)
        keep = self.drop_keys(dropout.keys, x.dtype)
        y = attend_unprojected(
            query,
            CrossKernels(
                UnprojectedKernel(self.key, changes[0]),
                UnprojectedKernel(self.value, changes[1]),
                self._prefix(member, len(x)),
            ),
            encoded,
            mask,
            keep,
            member,
            self.model.runtime,
        )
        return self._out(y, member, dropout.queries)


class Bias(NamedTuple):
    """What is added to the logits of an attention: nothing in cross-attention."""

    text: Float[Array, "1 N T S"] | None = None
    prefix: Float[Array, "#R N T P"] | None = None


class AttentionDropout(NamedTuple):
    """The seeds of what asks and of what is asked, which differ in cross-attention."""

    queries: DropoutSeeds | None = None
    keys: DropoutSeeds | None = None


class LayerContext(NamedTuple):
    """What all layers of a stack read and none writes."""

    query_positions: Int[Array, "*R T"]  # in the row; the same in all rows, or of each
    key_positions: Int[Array, "*R S"]
    attention_mask: AttentionMask
    bias: Bias | None = None  # None: each layer has its own
    encoded: Float[Array, "B S D"] | None = None
    cross_attention_mask: CrossAttentionMask | None = None
    dropout: DropoutSeeds | None = None  # None: no dropout
    cross_dropout: DropoutSeeds | None = None  # of the encoder's positions
    member: Int[Array, " B"] | None = None  # of each row of inputs, see ``Injection``
    # from each query to the keys of a prefix of self-attention; None: it has none
    prefix_offsets: Int[Array, "#R T P"] | None = None


class LayerCache(NamedTuple):
    """Keys and values of the decoder; a leading L where layers are stacked."""

    self_key: Float[Array, "*L B T N H"]
    self_value: Float[Array, "*L B T N H"]
    cross_key: Float[Array, "*L B S N H"]
    cross_value: Float[Array, "*L B S N H"]


def _bias_table(module: nn.Module, c: T5Config) -> Float[Array, "buckets N"]:
    shape = (c.buckets, c.num_heads)
    return module.param("relative_bias", nn.initializers.normal(c.d_model**-0.5), shape)


def _bias(
    table: Float[Array, "buckets N"], context: LayerContext, c: T5Config, bidirectional: bool
) -> Bias:
    queries, keys, offsets = context.query_positions, context.key_positions, context.prefix_offsets
    form = {"bidirectional": bidirectional, "max_distance": c.max_distance}
    if queries.ndim == 1:
        text = relative_bias(table, queries, keys, **form)
    else:
        text = bias_of_offsets(table, keys[:, None, :] - queries[:, :, None], **form)
    return Bias(text, None if offsets is None else bias_of_offsets(table, offsets, **form))


def _prefix_offsets(
    injection: Injection,
    path: tuple[str, ...],
    *,
    segments: Int[Array, "R T"] | None = None,
    positions: Int[Array, "*R T"] | None = None,
) -> Int[Array, "#R T P"] | None:
    """The offsets for the prefix at a path, from queries given by their segments.

    positions: where queries do not follow each other in a segment, their positions in it instead.
    """
    prefix = leaf_at(injection.layers, (*path, "prefix"))
    if prefix is None:
        return None
    if positions is None:
        assert segments is not None
        queries = positions_in_segments(segments)
    else:
        queries = positions if positions.ndim == 2 else positions[None]
    return prefix_offsets(queries, prefix.key.shape[2])


_ENCODER = "encoder", "layers", "attention"
_DECODER = "decoder", "layers", "self_attention"


class EncoderLayer(nn.Module):
    model: "T5Model"

    def setup(self):
        c = self.model.config
        self.attention_norm, self.mlp_norm = Norm(c.norm_eps), Norm(c.norm_eps)
        self.attention, self.mlp = Attention(self.model), Mlp(self.model)
        self.dropout = blocks.Dropout(self.model.runtime.dropout)
        if c.per_layer_bias:
            self.relative_bias = _bias_table(self, c)

    def __call__(self, x: Float[Array, "B S D"], context: LayerContext):
        bias, dropout = context.bias, context.dropout
        if bias is None:
            bias = _bias(self.relative_bias, context, self.model.config, True)
        member = context.member
        h = self.attention_norm(x, member)
        keys_values = self.attention.keys_values(h, member, dropout)
        both = AttentionDropout(dropout, dropout)
        y = self.attention.attend(h, keys_values, context.attention_mask, bias, both, member)
        y = self.dropout(y, dropout)
        x = adapted(x, h, y, tuned(self, "attention_adapter"), member)
        h = self.mlp_norm(x, member)
        y = self.dropout(self.mlp(h, dropout, member), dropout)
        x = adapted(x, h, y, tuned(self, "mlp_adapter"), member)
        x = blocks.keep_residual(self, x)
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

    def __call__(self, x: Float[Array, "R T D"], cache: LayerCache | None, context: LayerContext):
        bias, dropout = context.bias, context.dropout
        if bias is None:
            bias = _bias(self.relative_bias, context, self.model.config, False)
        member = context.member
        h = self.self_attention_norm(x, member)
        key, value = self.self_attention.keys_values(h, member, dropout)
        if cache is not None:
            at = (0, context.query_positions[0], 0, 0)
            key = jax.lax.dynamic_update_slice(cache.self_key, key, at)
            value = jax.lax.dynamic_update_slice(cache.self_value, value, at)
        both = AttentionDropout(dropout, dropout)
        y = self.self_attention.attend(h, (key, value), context.attention_mask, bias, both, member)
        y = self.dropout(y, dropout)
        x = adapted(x, h, y, tuned(self, "attention_adapter"), member)
        h = self.cross_attention_norm(x, member)
        y = self.dropout(self._cross_attend(h, cache, context), dropout)
        x = adapted(x, h, y, tuned(self, "cross_attention_adapter"), member)
        h = self.mlp_norm(x, member)
        y = self.dropout(self.mlp(h, dropout, member), dropout)
        x = blocks.keep_residual(self, adapted(x, h, y, tuned(self, "mlp_adapter"), member))
        filled = None if cache is None else (key, value)
        return shard_activation(x, self.model.runtime.place), filled

    def _cross_attend(self, y, cache: LayerCache | None, context: LayerContext):
        mask, attention = context.cross_attention_mask, self.cross_attention
        assert mask is not None
        if cache is None:
            assert context.encoded is not None
            dropout = AttentionDropout(context.dropout, context.cross_dropout)
            return attention.cross_attend(y, context.encoded, mask, dropout, context.member)
        keys_values = cache.cross_key, cache.cross_value
        return attention.attend(y, keys_values, mask, Bias(), AttentionDropout(), context.member)


class Stack(nn.Module):
    """Scanned layers, final norm and, where the layers share one, the relative bias."""

    model: "T5Model"
    layer: type[nn.Module]
    depth: int

    def setup(self):
        c = self.model.config
        in_axes = (nn.broadcast,) if self.layer is EncoderLayer else (0, nn.broadcast)
        self.layers = stacked(self.layer, self.model.runtime, self.depth, in_axes)(self.model)
        self.final_norm = Norm(c.norm_eps)
        self.dropout = blocks.Dropout(self.model.runtime.dropout)
        if not c.per_layer_bias:
            self.relative_bias = _bias_table(self, c)

    def __call__(
        self, x: Float[Array, "B S D"], context: LayerContext, cache: LayerCache | None = None
    ):
        """The output of the stack, and the keys and values of a decoder with a cache."""
        is_encoder = self.layer is EncoderLayer
        config = self.model.config
        if not config.per_layer_bias:
            bias = _bias(self.relative_bias, context, config, is_encoder)
            context = context._replace(bias=bias)
        x = self.dropout(x, context.dropout)
        x, filled = self.layers(x, context) if is_encoder else self.layers(x, cache, context)
        return self.dropout(self.final_norm(x, context.member), context.dropout), filled


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

    def encode(
        self,
        injection: Injection,
        inputs: Int[Array, "B S"],
        segments: Int[Array, "B S"],
        dropout_seed: Int[Array, " R"] | None = None,
    ) -> Float[Array, "B S D"]:
        mask, width = encoder_mask(segments, self.model)
        positions = jnp.arange(width)
        seeds = None if dropout_seed is None else seeds_of_segments(dropout_seed, segments)
        context = LayerContext(
            positions, positions, mask, dropout=seeds, member=injection.member,
            prefix_offsets=_prefix_offsets(injection, _ENCODER, segments=segments),
        )  # fmt: skip
        return self.encoder(self.token_embedder(inputs, injection.embeddings), context)[0]

    def decode(
        self,
        injection: Injection,
        encoded: "Encoded",
        decoder_inputs: Int[Array, "R T"],
        segments: Int[Array, "R T"],
        dropout_seed: Int[Array, " R"] | None,
        tree: Tree | None,
    ) -> Float[Array, "R T V"]:
        if tree is None:
            positions = jnp.arange(decoder_inputs.shape[1])
            offsets = _prefix_offsets(injection, _DECODER, segments=segments)
            visible = positions[None, :] <= positions[:, None]
        else:
            positions, visible = jnp.asarray(tree.depths), jnp.asarray(tree.visible)
            offsets = _prefix_offsets(injection, _DECODER, positions=positions)
            visible = visible if visible.ndim == 2 else visible[:, None]
        mask = dense_mask(segment_mask(segments, segments) & visible)
        widths = self.model.layout.packed_widths
        cross_mask = cross_attention_mask(segments, encoded.segments, widths)
        context = LayerContext(
            positions, positions, mask, encoded=encoded.hidden, cross_attention_mask=cross_mask,
            member=injection.member, prefix_offsets=offsets,
        )  # fmt: skip
        if dropout_seed is not None:
            context = context._replace(
                dropout=seeds_of_rows(dropout_seed, positions.shape[-1]),
                cross_dropout=seeds_of_segments(dropout_seed, encoded.segments),
            )
        x = self.token_embedder(decoder_inputs, injection.embeddings)
        return self.logits(self.decoder(x, context)[0], context.member)

    def decode_step(
        self,
        injection: Injection,
        cache: "DecodeCache",
        ids: Int[Array, " B"],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B V"], tuple[Float[Array, "L B T N H"], Float[Array, "L B T N H"]]]:
        positions, query = jnp.arange(cache.layers.self_key.shape[2]), index[None]
        context = LayerContext(
            query,
            positions,
            dense_mask((positions <= index)[None, None, None, :]),
            cross_attention_mask=dense_mask((cache.segments > 0)[:, None, None, :]),
            member=injection.member,
            prefix_offsets=_prefix_offsets(injection, _DECODER, positions=query),
        )
        x = self.token_embedder(ids[:, None], injection.embeddings)
        y, filled = self.decoder(x, context, cache.layers)
        return self.logits(y, context.member)[:, 0], filled

    def logits(self, y: Float[Array, "R T D"], member: Member) -> Float[Array, "R T V"]:
        c, labels = self.model.config, tuned(self, VERBALIZER)
        if c.scale_output:
            y = y * c.d_model**-0.5
        if labels is not None:
            return label_logits(y, labels, member)
        table = self.token_embedder.embedding if c.tied else self.head
        return head(y, table, self.model.runtime.mixed, c.tied)

    def read_out(self, x: Float[Array, "B n D"], member: Member) -> Float[Array, "B n V"]:
        """Logits of states of the decoder's residual stream."""
        return self.logits(self.decoder.final_norm(x, member), member)

    def __call__(self, inputs, segments, targets):
        encoded = Encoded(self.encode(Injection(), inputs, segments), segments)
        return self.decode(Injection(), encoded, targets, jnp.ones_like(targets), None, None)


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

    def logical_axes(self) -> Params:
        return logical_axes(self.config)

    def _apply(self, params: Params, method: str, injection: Injection, *args: PyTree) -> PyTree:
        rngs = {"dropout": jax.random.key(0)}  # a stream for each layer; a batch's seeds vary
        injection, *arrays = jax.tree.map(jnp.asarray, (injection, *args))
        variables = blocks.variables(params, injection)
        return T5(self).apply(variables, injection, *arrays, rngs=rngs, method=method)

    def encode(
        self,
        params: Params,
        injection: Injection,
        inputs: Int[AnyArray, "B S"],
        segments: Int[AnyArray, "B S"],
        dropout_seed: Int[AnyArray, " R"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Encoder output for ids that may be virtual; segment 0 is padding."""
        return self._apply(params, "encode", injection, inputs, segments, dropout_seed)

    def decode(
        self,
        params: Params,
        injection: Injection,
        encoded: Encoded,
        decoder_inputs: Int[AnyArray, "R T"],
        target_segments: Int[AnyArray, "R T"],
        dropout_seed: Int[AnyArray, " R"] | None = None,
        tree: Tree | None = None,
    ) -> Float[Array, "R T V"]:
        """Teacher-forced float32 logits.

        Args:
            params: of the model.
            injection: see ``Model.logits``.
            encoded: the inputs.
            decoder_inputs: the targets shifted right. R is B or, where each segment is answered in
                a row of its own, G x B (``data.batches``).
            target_segments: see ``Model.logits``.
            dropout_seed: of each example; None for no dropout.
            tree: the targets are its nodes, instead of one token after another.
        """
        args = injection, encoded, decoder_inputs, target_segments, dropout_seed, tree
        return self._apply(params, "decode", *args)

    def hidden(
        self, params: Params, inputs: Int[AnyArray, "B S"], segments: Int[AnyArray, "B S"]
    ) -> Float[Array, "B S D"]:
        return self.encode(params, Injection(), inputs, segments)

    def states(
        self,
        params: Params,
        injection: Injection,
        inputs: Int[AnyArray, "B S"],
        segments: Int[AnyArray, "B S"],
    ) -> LayerStates:
        """The decoder answers from its start id alone."""
        args = injection, jnp.asarray(inputs), jnp.asarray(segments)
        hidden, of_text = self._record(params, "encode", *args, None)
        ids = jnp.full((len(hidden), 1), self.config.decoder_start_id, jnp.int32)
        encoded, one = Encoded(hidden, args[2]), jnp.ones_like(ids)
        args = injection, encoded, ids, one, None, None
        _, of_answer = self._record(params, "decode", *args)
        text, answer = (
            blocks.recorded_residual(found, (part, "layers"))
            for found, part in ((of_text, "encoder"), (of_answer, "decoder"))
        )
        return LayerStates(text, answer[:, :, 0])

    def _record(
        self, params: Params, method: str, injection: Injection, *args: PyTree
    ) -> tuple[PyTree, PyTree]:
        """The result of a method, and the residual stream behind each layer."""
        variables = blocks.variables(params, injection)
        apply = functools.partial(T5(self).apply, variables, rngs={"dropout": jax.random.key(0)})
        return apply(injection, *args, method=method, mutable=["residual"])

    def read_out(
        self, params: Params, injection: Injection, states: Float[Array, "B n D"]
    ) -> Float[Array, "B n V"]:
        refuse_label_rows(injection)
        variables = blocks.variables(params, injection)
        apply = functools.partial(T5(self).apply, variables, method="read_out")
        return apply(states, injection.member)  # pyright: ignore[reportReturnType]

    def prepare(self, params: Params, injection: Injection) -> Injection:
        """The injection itself: in an encoder every activation depends on the text."""
        return injection

    def logits(
        self,
        params: Params,
        injection: Injection,
        inputs: Int[AnyArray, "B S"],
        segments: Int[AnyArray, "B S"],
        targets: Int[AnyArray, "R T"],
        target_segments: Int[AnyArray, "R T"],
        dropout_seed: Int[AnyArray, " R"] | None = None,
    ) -> Float[Array, "R T V"]:
        refuse_label_rows(injection)
        encoded = Encoded(
            self.encode(params, injection, inputs, segments, dropout_seed), jnp.asarray(segments)
        )
        shifted = shift_right(
            jnp.asarray(targets), jnp.asarray(target_segments), self.config.decoder_start_id
        )
        return self.decode(params, injection, encoded, shifted, target_segments, dropout_seed)

    def prefill(
        self,
        params: Params,
        injection: Injection,
        inputs: Int[AnyArray, "B S"],
        segments: Int[AnyArray, "B S"],
        dropout_seed: Int[AnyArray, " R"] | None = None,
    ) -> Encoded:
        hidden = self.encode(params, injection, inputs, segments, dropout_seed)
        return Encoded(hidden, jnp.asarray(segments))

    def score_tree(
        self,
        params: Params,
        injection: Injection,
        prefill: Encoded,
        tree: AnyTree,
        dropout_seed: Int[AnyArray, " R"] | None = None,
    ) -> Float[Array, "R n V"]:
        assert isinstance(tree, Tree)
        rows = len(prefill.segments) * self.layout.examples_per_row
        ids = jnp.where(tree.ids < 0, self.config.decoder_start_id, tree.ids)
        ids = jnp.broadcast_to(ids, (rows, ids.shape[-1]))
        segments = jnp.ones_like(ids)
        return self.decode(params, injection, prefill, ids, segments, dropout_seed, tree)

    def init_decode(
        self, params: Params, injection: Injection, prefill: Encoded, length: int
    ) -> tuple[Int[Array, " B"], DecodeCache]:
        """The start id of every row, and a cache in which only cross-attention is filled.

        One product over the stacked kernels gives all layers at once.
        """
        c, (hidden, segments) = self.config, prefill
        cross_key, cross_value = (
            self._cross_projection(params, injection, hidden, name) for name in ("key", "value")
        )
        batch = len(segments)
        shape = c.num_decoder_layers, batch, length, c.num_heads, c.head_dim
        empty = jnp.zeros(shape, hidden.dtype)
        ids = jnp.full((batch,), c.decoder_start_id, jnp.int32)
        return ids, DecodeCache(LayerCache(empty, empty, cross_key, cross_value), segments)

    def prefix_of_words(self, params: Params, ids: Int[AnyArray, " P"]) -> Layers:
        rows, one = jnp.asarray(ids)[None], jnp.ones((1, len(ids)), jnp.int32)
        rngs, nothing = {"dropout": jax.random.key(0)}, Injection()
        apply = functools.partial(T5(self).apply, {"params": params}, rngs=rngs)
        record = functools.partial(apply, mutable=["keys_values"])
        hidden, of_encoder = record(nothing, rows, one, method="encode")
        encoded = Encoded(hidden, one)
        _, of_decoder = record(nothing, encoded, rows, one, None, None, method="decode")
        names = "key", "value"
        cross = KeyValues(*(self._cross_projection(params, nothing, hidden, x) for x in names))

        def made(recorded: PyTree, path: tuple[str, ...]) -> Prefix:
            [both] = recorded["keys_values"][path[0]][path[1]][path[2]]["made"]
            return _prefix_of(both)

        decoder = {"self_attention": {"prefix": made(of_decoder, _DECODER)}}
        decoder["cross_attention"] = {"prefix": _prefix_of(cross)}
        encoder = {"attention": {"prefix": made(of_encoder, _ENCODER)}}
        return {"encoder": {"layers": encoder}, "decoder": {"layers": decoder}}

    def _cross_projection(
        self, params: Params, injection: Injection, hidden: Float[Array, "B S D"], name: str
    ) -> Float[Array, "L B S N H"]:
        """The keys or the values of all layers of the decoder."""
        path = "decoder", "layers", "cross_attention", name
        kernel: PyTree = leaf_at(params, path)
        change = leaf_at(injection.layers, path)
        y = dense("bsd,ldnh->lbsnh", hidden, kernel, self.runtime)
        if change is None:
            return y
        add = lambda y, change: changed(y, "bsd,dnh->bsnh", hidden, change, injection.member)
        return jax.vmap(add, in_axes=(0, 1))(y, change)

    def decode_step(
        self,
        params: Params,
        injection: Injection,
        cache: DecodeCache,
        ids: Int[Array, " B"],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B V"], DecodeCache]:
        refuse_label_rows(injection)
        logits, (key, value) = self._apply(params, "decode_step", injection, cache, ids, index)
        filled = cache.layers._replace(self_key=key, self_value=value)
        return logits, cache._replace(layers=filled)

    def tile_cache(self, cache: DecodeCache, times: int) -> DecodeCache:
        inner = jax.tree.map(lambda x: jnp.repeat(x, times, axis=1), cache.layers)
        return DecodeCache(inner, jnp.repeat(cache.segments, times, axis=0))

    def gather_beams(self, cache: DecodeCache, rows: Int[Array, " B"]) -> DecodeCache:
        inner = cache.layers
        keys, values = (jnp.take(x, rows, axis=1) for x in (inner.self_key, inner.self_value))
        return cache._replace(layers=inner._replace(self_key=keys, self_value=values))


def _prefix_of(made: KeyValues) -> Prefix:
    """The keys and values [L, 1, P, N, H] of one row as a prefix of one member."""
    return Prefix(made.key.swapaxes(0, 1), made.value.swapaxes(0, 1))


def init_params(config: T5Config, key: jax.Array) -> Params:
    """Random float32 parameters with T5's scales: embeddings N(0, 1), all else by fan-in."""
    ids = jnp.ones((1, 2), jnp.int32)
    variables: PyTree = T5(T5Model(config)).init({"params": key}, ids, ids, ids)
    return variables["params"]


def abstract_params(config: T5Config, dtype: str = "float32") -> Params:
    """Shapes and dtypes of all parameters, without allocating any."""
    return abstract(init_params, config, dtype)


def logical_axes(config: T5Config) -> Params:
    """Names of every parameter's axes, for sharding rules; stacked leaves start with "layers"."""
    return named_axes(AXES, abstract_params(config))
