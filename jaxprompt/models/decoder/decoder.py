"""Decoder-only models in one ``flax.linen`` module: Llama, Mistral, Qwen2, SmolLM2.

To the rest of the package this looks like T5: inputs are read, targets answer them
(``models/base.py``). Here both are one sequence. A target begins with the last token of the input,
where T5 has its start id. So a pass over targets yields exactly their logits. The tokens before the
targets are read in the same pass or in an earlier one.

A prompt in front of the text does not attend to the text, unless all of the input attends to
itself. Where every row starts with a prompt (``layout.shared_prefix_length``), ``prepare`` computes
its keys and values once for all rows instead of once for each. It is exactly the same function, in
training too.

A prefix of keys and values (prefix tuning) is in front of all that. Its keys have been rotated, and
text and prompts have the positions after it.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxprompt.data.batches import AnyArray
from jaxprompt.data.layout import BatchLayout
from jaxprompt.models.base import LayerStates, Model, Params
from jaxprompt.models.blocks import (
    Mlp,
    Norm,
    TokenEmbedder,
    abstract,
    dropped,
    keep_residual,
    named_axes,
    recorded_residual,
    stacked,
    tuned,
)
from jaxprompt.models.blocks import variables as variables_of
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.decoder.rotary import rotary_frequencies, rotate
from jaxprompt.models.injection import (
    VERBALIZER,
    Injection,
    KeyValues,
    Layers,
    Prefix,
    has_dropout,
    leaf_at,
    refuse_label_rows,
)
from jaxprompt.models.label_tree import AnyTree, Tree
from jaxprompt.models.ops.attention.grouped import KeyBlock, grouped_attention
from jaxprompt.models.ops.changes import (
    Member,
    adapted,
    changed,
    label_logits,
    of_rows,
    project,
)
from jaxprompt.models.ops.dropout import DropoutSeeds, seeds_of_rows
from jaxprompt.models.ops.matmul import dense, head
from jaxprompt.models.ops.norm import rms_norm
from jaxprompt.models.ops.segments import (
    last_of_segment,
    positions_in_segments,
    segment_mask,
    shift_right,
)
from jaxprompt.runtime.parallel import shard_activation


class PastKeyValues(NamedTuple):
    """What earlier passes have computed for this pass to attend to."""

    prompt: KeyValues | None = None  # of a prompt that leads every row; rows are prompts
    inputs: KeyValues | None = None
    cache: KeyValues | None = None  # this pass writes into it


class LayerContext(NamedTuple):
    """What all layers read and none writes."""

    angles: Float[Array, "#B T half"]
    attention_mask: Bool[Array, "#B T S"]  # of the pass's own tokens, or of the cache
    prompt_numbers: Int[Array, " B"] | None = None  # the prompt that leads each row
    prompt_mask: Bool[Array, "#B #T P"] | None = None  # None: all of it
    input_mask: Bool[Array, "#B #T S"] | None = None
    cache_index: Int[Array, ""] | int = 0  # where the cache is written
    member: Int[Array, " B"] | None = None  # of each row of inputs, see ``Injection``
    prefix_mask: Bool[Array, "#B #T P"] | None = None  # of the method's prefix; None: all of it
    dropout: DropoutSeeds | None = None  # of low-rank changes; None: no dropout


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

    def _project(
        self, x: Float[Array, "B T D"], name: str, context: LayerContext
    ) -> Float[Array, "B T N H"]:
        spec = "bsd,dnh->bsnh" if name == "query" else "bsd,dgh->bsgh"
        y = dense(spec, x, getattr(self, name), self.model.runtime)
        if self.model.config.qkv_bias:
            y += getattr(self, f"{name}_bias").astype(y.dtype)
        change, member = tuned(self, name), context.member
        if change is None:
            return y
        read = dropped(self, change, x, member, context.dropout)
        return changed(y, spec, x if read is None else read, change, member)

    def __call__(
        self, x: Float[Array, "B T D"], past: PastKeyValues, context: LayerContext
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """Attention to the past and to ``x``, and the keys and values of ``x`` or of the cache."""
        member = context.member
        query = rotate(self._project(x, "query", context), context.angles)
        key = rotate(self._project(x, "key", context), context.angles)
        value = self._project(x, "value", context)
        if past.cache is not None:
            at = (0, context.cache_index, 0, 0)
            key = jax.lax.dynamic_update_slice(past.cache.key, key, at)
            value = jax.lax.dynamic_update_slice(past.cache.value, value, at)
        blocks = [KeyBlock(key, value, context.attention_mask)]
        if past.inputs is not None:
            blocks.insert(0, KeyBlock(*past.inputs, context.input_mask))
        if past.prompt is not None:
            prompt = past.prompt  # all rows share a lone prompt
            if prompt.key.shape[0] > 1:
                rows = context.prompt_numbers
                prompt = KeyValues(prompt.key[rows], prompt.value[rows])
            blocks.insert(0, KeyBlock(*prompt, context.prompt_mask))
        prefix = tuned(self, "prefix")
        if prefix is not None:
            front = of_rows(prefix, member, len(x))
            front_key, front_value = front.key.astype(x.dtype), front.value.astype(x.dtype)
            blocks.insert(0, KeyBlock(front_key, front_value, context.prefix_mask))
        y = grouped_attention(query, blocks)
        change, runtime = tuned(self, "out"), self.model.runtime
        read = dropped(self, change, y, member, context.dropout)
        y = project("btnh,nhd->btd", y, self.out, change, member, runtime, read)
        return y, KeyValues(key, value)


class Layer(nn.Module):
    model: "DecoderModel"

    def setup(self):
        c, model = self.model.config, self.model
        self.attention_norm, self.mlp_norm = Norm(c.norm_eps), Norm(c.norm_eps)
        self.attention, self.mlp = Attention(model), Mlp(model)

    def __call__(self, x: Float[Array, "B T D"], past: PastKeyValues, context: LayerContext):
        member = context.member
        h = self.attention_norm(x, member)
        y, key_values = self.attention(h, past, context)
        x = adapted(x, h, y, tuned(self, "attention_adapter"), member)
        h = self.mlp_norm(x, member)
        y = self.mlp(h, context.dropout, member)
        x = keep_residual(self, adapted(x, h, y, tuned(self, "mlp_adapter"), member))
        return shard_activation(x, self.model.runtime.place), key_values


class Decoder(nn.Module):
    model: "DecoderModel"

    def setup(self):
        c, model = self.model.config, self.model
        self.token_embedder = TokenEmbedder(model)
        self.layers = stacked(Layer, model.runtime, c.num_layers, (0, nn.broadcast))(model)
        self.final_norm = Norm(c.norm_eps)
        if not c.tied:
            init = nn.initializers.normal(c.d_model**-0.5)
            self.head = self.param("head", init, (c.d_model, c.vocab_size))

    def __call__(
        self,
        ids: Int[Array, "B T"],
        bank: Float[Array, "K P D"] | None,
        past: PastKeyValues,
        context: LayerContext,
        scored: int,
    ) -> tuple[Float[Array, "B t V"] | None, KeyValues]:
        """Logits of the last ``scored`` positions, and the keys and values of all."""
        x, key_values = self.layers(self.token_embedder(ids, bank), past, context)
        if scored == 0:
            return None, key_values
        return self.read_out(x[:, x.shape[1] - scored :], context.member), key_values

    def read_out(self, x: Float[Array, "B n D"], member: Member) -> Float[Array, "B n V"]:
        """Logits of states of the residual stream."""
        y = self.final_norm(x, member)
        labels, tied = tuned(self, VERBALIZER), self.model.config.tied
        if labels is not None:
            return label_logits(y, labels, member)
        table = self.token_embedder.embedding if tied else self.head
        return head(y, table, self.model.runtime.mixed, tied)

    def residual(self, ids: Int[Array, "B T"], context: LayerContext) -> Float[Array, "B T D"]:
        """The residual stream behind the last layer."""
        return self.layers(self.token_embedder(ids, None), PastKeyValues(), context)[0]


class Text(NamedTuple):
    """The inputs of a batch without the prompt that leads each row, if one does."""

    ids: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    # segments, 0 at the last token of each: a target attends to the others, and begins with that
    visible_segments: Int[Array, "B S"]
    prompt_numbers: Int[Array, " B"] | None


class Prefill(NamedTuple):
    """Inputs that have been read once and may be answered many times."""

    text: Text
    key_values: KeyValues


class DecodeCache(NamedTuple):
    """What generation keeps between two tokens."""

    prefill: Prefill
    answer: KeyValues


def _text(
    model: "DecoderModel",
    injection: Injection,
    inputs: Int[Array, "B S"],
    segments: Int[Array, "B S"],
) -> Text:
    prompt_numbers, prompt = None, model.layout.shared_prefix_length
    if prompt:
        prompt_numbers = jnp.maximum(inputs[:, 0] - model.config.vocab_size, 0) // prompt
        inputs, segments = inputs[:, prompt:], segments[:, prompt:]
    visible = jnp.where(last_of_segment(segments), 0, segments)
    start = _prefix_length(injection, len(inputs)) + prompt
    positions = start + positions_in_segments(segments)
    return Text(inputs, segments, positions, visible, prompt_numbers)


def _prefix(injection: Injection) -> Prefix | None:
    """The prefix of all layers, with leaves [K, L, P, ...]."""
    return leaf_at(injection.layers, ("layers", "attention", "prefix"))


def _prefix_length(injection: Injection, rows: int) -> Int[Array, "R 1"] | int:
    """The positions of the prefix in front of each row, the same in all layers."""
    prefix = _prefix(injection)
    if prefix is None:
        return 0
    if prefix.used is None:
        return prefix.key.shape[2]
    lengths = jnp.sum(prefix.used[:, 0], axis=-1, keepdims=True)
    return of_rows(lengths, injection.member, rows)


def _prefix_mask(
    config: DecoderConfig, injection: Injection, queries: Int[Array, "B T"]
) -> Bool[Array, "#B #T P"] | None:
    """Which keys of the prefix each query, at these positions, attends to; None for all or none."""
    prefix = _prefix(injection)
    if prefix is None or (prefix.used is None and config.window is None):
        return None
    size, rows = prefix.key.shape[2], len(queries)
    # a shorter prefix ends the places, the first of which then are before position 0
    keys = jnp.arange(size)[None] + _prefix_length(injection, rows) - size
    return (keys >= 0)[:, None] & _within_window(config, queries, keys)


def _angles(config: DecoderConfig, positions: Int[Array, "B T"]) -> Float[Array, "B T half"]:
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return positions[..., None].astype(jnp.float32) * frequencies.astype("float32")


def _within_window(
    config: DecoderConfig, queries: Int[Array, "B T"], keys: Int[Array, "#B S"]
) -> Bool[Array, "#B #T #S"]:
    """Which keys are within the window of each query, from their positions."""
    if config.window is None:
        return jnp.ones((1, 1, 1), bool)
    return queries[:, :, None] - keys[:, None, :] < config.window


def _self_mask(
    model: "DecoderModel",
    ids: Int[Array, "B T"],
    segments: Int[Array, "#B T"],
    positions: Int[Array, "#B T"],
    *,
    is_input: bool,
) -> Bool[Array, "B T T"]:
    """Which tokens of one pass attend to each other."""
    order = jnp.arange(segments.shape[1])
    allowed = order[None, :] <= order[:, None]
    if is_input and model.runtime.attention == "prefix":
        allowed = jnp.ones_like(allowed)
    elif is_input and model.runtime.attention == "prompt":
        virtual = ids >= model.config.vocab_size
        allowed = allowed | (virtual[:, :, None] & virtual[:, None, :])
    same = segment_mask(segments, segments)[:, 0]
    return same & allowed & _within_window(model.config, positions, positions)


def _input_mask(
    config: DecoderConfig, text: Text, segments: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> Bool[Array, "B T S"]:
    """Which tokens of the text each target attends to."""
    same = segment_mask(segments, text.visible_segments)[:, 0]
    return same & _within_window(config, positions, text.positions)


def _prompt_mask(
    model: "DecoderModel", injection: Injection, positions: Int[Array, "B T"]
) -> Bool[Array, "B T P"] | None:
    prompt = model.layout.shared_prefix_length
    if not prompt or model.config.window is None:
        return None
    keys = jnp.arange(prompt)[None]
    if _prefix(injection) is not None:
        keys += _prefix_length(injection, len(positions))
    return _within_window(model.config, positions, keys)


def _dropout(
    injection: Injection, seeds: Int[AnyArray, " B"] | None, positions: Int[Array, "B T"]
) -> DropoutSeeds | None:
    """The seeds of a pass whose tokens have these positions; None where nothing has dropout."""
    if seeds is None or not has_dropout(injection):
        return None
    return seeds_of_rows(jnp.asarray(seeds), positions.shape[1])


def _last_input_token(
    text: Text, segments: Int[Array, "B T"]
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The id and the position of the token that each segment of targets begins with."""
    same = segments[:, :, None] == text.segments[:, None, :]
    last = same & last_of_segment(text.segments)[:, None, :]
    ids = jnp.sum(jnp.where(last, text.ids[:, None, :], 0), axis=-1)
    return ids, jnp.max(jnp.where(last, text.positions[:, None, :], 0), axis=-1)


def _decoder_inputs(
    text: Text, targets: Int[Array, "B T"], segments: Int[Array, "B T"]
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Ids and positions of a pass over targets."""
    first, start = _last_input_token(text, segments)
    return shift_right(targets, segments, first), start + positions_in_segments(segments)


@dataclasses.dataclass(frozen=True)
class DecoderModel(Model):
    """A decoder-only model: see ``Model`` for what every family does."""

    config: DecoderConfig
    layout: BatchLayout = BatchLayout(fine_buckets=True)

    def init_params(self, key: jax.Array) -> Params:
        return init_params(self.config, key)

    def abstract_params(self, dtype: str = "float32") -> Params:
        return abstract_params(self.config, dtype)

    def logical_axes(self) -> Params:
        return logical_axes(self.config)

    def prepare(self, params: Params, injection: Injection) -> Injection:
        """The injection with the keys and values that every layer makes of leading prompts.

        They are a function of the vectors alone. They are computed once per step in training, and
        once for all batches in evaluation.
        """
        bank = injection.embeddings
        if bank is None or not self.layout.shared_prefix_length:
            return injection
        count, length, _ = bank.shape
        ids = self.config.vocab_size + jnp.arange(count * length).reshape(count, length)
        each = injection.for_rows(count, jnp.arange(count))
        positions = jnp.arange(length)[None]
        if _prefix(each) is not None:
            positions += _prefix_length(each, count)
        segments = jnp.ones((1, length), jnp.int32)
        mask = _self_mask(self, ids[:1], segments, positions, is_input=True)
        context = LayerContext(
            _angles(self.config, positions),
            mask,
            prefix_mask=_prefix_mask(self.config, each, positions),
        )
        _, key_values = self._apply(params, each, ids, PastKeyValues(), context, 0)
        return injection._replace(shared_prefix=key_values)

    def _apply(
        self,
        params: Params,
        injection: Injection,
        ids: Int[Array, "B T"],
        past: PastKeyValues,
        context: LayerContext,
        scored: int,
    ) -> PyTree:
        """Logits of the last ``scored`` positions or None, and the keys and values of all."""
        variables = variables_of(params, injection)
        context = context._replace(member=injection.member)
        # a stream for each layer; a batch's seeds vary
        rngs = None if context.dropout is None else {"dropout": jax.random.key(0)}
        apply = functools.partial(Decoder(self).apply, variables, rngs=rngs)
        return apply(ids, injection.embeddings, past, context, scored)

    def logits(
        self,
        params: Params,
        injection: Injection,
        inputs: Int[AnyArray, "B S"],
        segments: Int[AnyArray, "B S"],
        targets: Int[AnyArray, "B T"],
        target_segments: Int[AnyArray, "B T"],
        dropout_seed: Int[AnyArray, " B"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Teacher-forced logits in one pass over inputs and targets.

        Only low-rank changes have dropout, and none at a prompt that ``prepare`` has read.
        """
        refuse_label_rows(injection)
        text = _text(self, injection, jnp.asarray(inputs), jnp.asarray(segments))
        targets, target_segments = jnp.asarray(targets), jnp.asarray(target_segments)
        ids, positions = _decoder_inputs(text, targets, target_segments)
        text_mask = _self_mask(self, text.ids, text.segments, text.positions, is_input=True)
        target_mask = _self_mask(self, ids, target_segments, positions, is_input=False)
        input_mask = _input_mask(self.config, text, target_segments, positions)
        hidden = jnp.zeros((*text_mask.shape[:2], target_mask.shape[2]), bool)  # targets, from text
        mask = jnp.block([[text_mask, hidden], [input_mask, target_mask]])
        positions = jnp.concatenate([text.positions, positions], axis=1)
        angles = _angles(self.config, positions)
        prompt_mask = _prompt_mask(self, injection, positions)
        prefix_mask = _prefix_mask(self.config, injection, positions)
        context = LayerContext(
            angles, mask, text.prompt_numbers, prompt_mask, prefix_mask=prefix_mask,
            dropout=_dropout(injection, dropout_seed, positions),
        )  # fmt: skip
        ids, past = jnp.concatenate([text.ids, ids], axis=1), PastKeyValues(injection.shared_prefix)
        return self._apply(params, injection, ids, past, context, targets.shape[1])[0]

    def prefill(
        self,
        params: Params,
        injection: Injection,
        inputs: Int[AnyArray, "B S"],
        segments: Int[AnyArray, "B S"],
        dropout_seed: Int[AnyArray, " R"] | None = None,
    ) -> Prefill:
        """The keys and values of the inputs; as for dropout see ``logits``."""
        text = _text(self, injection, jnp.asarray(inputs), jnp.asarray(segments))
        context = LayerContext(
            _angles(self.config, text.positions),
            _self_mask(self, text.ids, text.segments, text.positions, is_input=True),
            text.prompt_numbers,
            _prompt_mask(self, injection, text.positions),
            prefix_mask=_prefix_mask(self.config, injection, text.positions),
            dropout=_dropout(injection, dropout_seed, text.positions),
        )
        past = PastKeyValues(injection.shared_prefix)
        _, key_values = self._apply(params, injection, text.ids, past, context, 0)
        return Prefill(text, key_values)

    def states(
        self,
        params: Params,
        injection: Injection,
        inputs: Int[AnyArray, "B S"],
        segments: Int[AnyArray, "B S"],
    ) -> LayerStates:
        """An answer begins with the last token of its input."""
        text = _text(self, injection, jnp.asarray(inputs), jnp.asarray(segments))
        context = LayerContext(
            _angles(self.config, text.positions),
            _self_mask(self, text.ids, text.segments, text.positions, is_input=True),
            prefix_mask=_prefix_mask(self.config, injection, text.positions),
            member=injection.member,
        )
        _, recorded = Decoder(self).apply(
            variables_of(params, injection), text.ids, injection.embeddings, PastKeyValues(),
            context, 0, mutable=["residual"],
        )  # fmt: skip
        states = recorded_residual(recorded, ("layers",))
        last = last_of_segment(text.segments)[:, None, :, None]
        return LayerStates(states, jnp.sum(jnp.where(last, states, 0), axis=2))

    def read_out(
        self, params: Params, injection: Injection, states: Float[Array, "B n D"]
    ) -> Float[Array, "B n V"]:
        refuse_label_rows(injection)
        variables = variables_of(params, injection)
        apply = functools.partial(Decoder(self).apply, variables, method="read_out")
        return apply(states, injection.member)  # pyright: ignore[reportReturnType]

    def hidden(
        self, params: Params, inputs: Int[AnyArray, "B S"], segments: Int[AnyArray, "B S"]
    ) -> Float[Array, "B S D"]:
        depth = (self.config.num_layers + 1) // 2
        half = self.with_config(num_layers=depth).with_layout(shared_prefix_length=0)
        params = params | {"layers": jax.tree.map(lambda leaf: leaf[:depth], params["layers"])}
        text = _text(half, Injection(), jnp.asarray(inputs), jnp.asarray(segments))
        mask = _self_mask(half, text.ids, text.segments, text.positions, is_input=True)
        context = LayerContext(_angles(self.config, text.positions), mask)
        apply = functools.partial(Decoder(half).apply, method="residual")
        x = apply(variables_of(params, Injection()), text.ids, context)
        return rms_norm(x, jnp.ones(self.config.d_model), self.config.norm_eps)

    def prefix_of_words(self, params: Params, ids: Int[AnyArray, " P"]) -> Layers:
        rows = jnp.asarray(ids)[None]
        plain = self.with_layout(shared_prefix_length=0)
        key, value = plain.prefill(params, Injection(), rows, jnp.ones_like(rows)).key_values
        prefix = Prefix(key.swapaxes(0, 1), value.swapaxes(0, 1))
        return {"layers": {"attention": {"prefix": prefix}}}

    def score_tree(
        self,
        params: Params,
        injection: Injection,
        prefill: Prefill,
        tree: AnyTree,
        dropout_seed: Int[AnyArray, " R"] | None = None,
    ) -> Float[Array, "B n V"]:
        assert isinstance(tree, Tree)
        text, shape = prefill.text, (len(prefill.text.ids), tree.ids.shape[-1])
        segments = jnp.ones(shape, jnp.int32)
        first, start = _last_input_token(text, segments)
        positions = start + tree.depths
        context = LayerContext(
            _angles(self.config, positions),
            jnp.asarray(tree.visible) & _within_window(self.config, positions, positions),
            text.prompt_numbers,
            _prompt_mask(self, injection, positions),
            _input_mask(self.config, text, segments, positions),
            prefix_mask=_prefix_mask(self.config, injection, positions),
            dropout=_dropout(injection, dropout_seed, positions),
        )
        past = PastKeyValues(injection.shared_prefix, prefill.key_values)
        ids = jnp.where(tree.ids < 0, first, tree.ids)
        return self._apply(params, injection, ids, past, context, shape[1])[0]

    def init_decode(
        self, params: Params, injection: Injection, prefill: Prefill, length: int
    ) -> tuple[Int[Array, " B"], DecodeCache]:
        """The last id of every input, with which its answer begins, and an empty cache."""
        text, key = prefill.text, prefill.key_values.key
        last = jnp.where(last_of_segment(text.segments), text.ids, 0)
        depth, batch, _, heads, width = key.shape
        empty = jnp.zeros((depth, batch, length, heads, width), key.dtype)
        return jnp.sum(last, axis=-1), DecodeCache(prefill, KeyValues(empty, empty))

    def decode_step(
        self,
        params: Params,
        injection: Injection,
        cache: DecodeCache,
        ids: Int[Array, " B"],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "B V"], DecodeCache]:
        refuse_label_rows(injection)
        text, answer = cache.prefill.text, cache.answer
        start = _prefix_length(injection, len(ids)) + self.layout.shared_prefix_length
        first = start + jnp.sum(text.visible_segments > 0, axis=-1, keepdims=True)
        positions = first + index
        cached = first + jnp.arange(answer.key.shape[2])
        window = _within_window(self.config, positions, cached)
        context = LayerContext(
            _angles(self.config, positions),
            (cached <= positions)[:, None] & window,
            text.prompt_numbers,
            _prompt_mask(self, injection, positions),
            _input_mask(self.config, text, jnp.ones_like(positions), positions),
            index,
            prefix_mask=_prefix_mask(self.config, injection, positions),
        )
        past = PastKeyValues(injection.shared_prefix, cache.prefill.key_values, answer)
        logits, answer = self._apply(params, injection, ids[:, None], past, context, 1)
        return logits[:, 0], cache._replace(answer=answer)

    def tile_cache(self, cache: DecodeCache, times: int) -> DecodeCache:
        (text, key_values), answer = cache
        tile = lambda tree: jax.tree.map(lambda x: jnp.repeat(x, times, axis=1), tree)
        text = jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), text)
        return DecodeCache(Prefill(text, tile(key_values)), tile(answer))

    def gather_beams(self, cache: DecodeCache, rows: Int[Array, " B"]) -> DecodeCache:
        answer = jax.tree.map(lambda x: jnp.take(x, rows, axis=1), cache.answer)
        return cache._replace(answer=answer)


def init_params(config: DecoderConfig, key: jax.Array) -> Params:
    """Random float32 parameters: embeddings N(0, 1), all else by fan-in."""
    ids, module = jnp.ones((1, 1), jnp.int32), Decoder(DecoderModel(config))
    context = LayerContext(_angles(config, ids), jnp.ones((1, 1, 1), bool))
    variables: PyTree = module.init({"params": key}, ids, None, PastKeyValues(), context, 1)
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


def logical_axes(config: DecoderConfig) -> Params:
    """Names of every parameter's axes, for sharding rules; stacked leaves start with "layers"."""
    return named_axes(_AXES, abstract_params(config))
