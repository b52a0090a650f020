"""Encoders with a mask in one ``flax.linen`` module: BERT, RoBERTa, DistilBERT.

Devlin et al. 2019 (arXiv 1810.04805), Liu et al. 2019 (arXiv 1907.11692), Sanh et al. 2019 (arXiv
1910.01108). To the rest of the package this looks like the other families (``models/base.py``):
inputs are read, targets answer them. Here an input holds one mask, and its answer takes the place
of it. Each token of an answer is predicted from the text and from all other tokens of the answer,
with the mask in its own place: the pseudo-log-likelihood of Salazar et al. 2020 (arXiv 1910.14659),
section 2. That is a pass for each token, so a single one for answers of one token.

The vectors of a prompt are embedded like words, before positions and types are added and before
the first norm. A prompt in front has the first positions, and the text those after it. A prefix of
keys and values takes positions too: text and prompts have those after it.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxprompt.data.batches import AnyArray
from jaxprompt.models import blocks
from jaxprompt.models.base import LayerStates, Model, Params
from jaxprompt.models.blocks import TokenEmbedder, abstract, dropped, named_axes, stacked, tuned
from jaxprompt.models.encoder.config import AXES, EncoderConfig
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
from jaxprompt.models.label_tree import AnyTree, Holes
from jaxprompt.models.ops.activations import ACTIVATIONS
from jaxprompt.models.ops.attention.grouped import KeyBlock, grouped_attention
from jaxprompt.models.ops.changes import (
    Member,
    adapted,
    changed,
    label_logits,
    of_rows,
    scaled,
)
from jaxprompt.models.ops.dropout import DropoutSeeds, seeds_of_rows
from jaxprompt.models.ops.matmul import dense, head, matmul
from jaxprompt.models.ops.norm import layer_norm
from jaxprompt.models.ops.segments import positions_in_segments, segment_mask
from jaxprompt.runtime.parallel import shard_activation

_SMALL = 0.02  # the deviation of random tables and matrices, as in BERT
_PREFIX = "encoder", "layers", "attention", "prefix"


class LayerContext(NamedTuple):
    """What all layers read and none writes."""

    mask: Bool[Array, "B T T"]  # which tokens attend to each other
    member: Int[Array, " B"] | None = None  # of each row, see ``Injection``
    dropout: DropoutSeeds | None = None  # of low-rank changes; None: no dropout


class LayerNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], member: Member = None) -> Float[Array, "B T D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        added = tuned(self, "scale")  # [K, D]
        if added is not None:
            scale = scale + of_rows(added, member, len(x))[:, None]
        return layer_norm(x, scale, bias, self.eps)


class _Projecting(nn.Module):
    """A module that has weights with biases, both of which a change follows."""

    model: "EncoderModel"

    def project(
        self, spec: str, x: Float[Array, "B T ..."], name: str, context: LayerContext
    ) -> Float[Array, "B T ..."]:
        """The product of ``x`` and the weight ``name``, its bias, and what is tuned there."""
        y = dense(spec, x, getattr(self, name), self.model.runtime)
        y = y + getattr(self, f"{name}_bias").astype(y.dtype)
        change, member = tuned(self, name), context.member
        if change is None:
            return y
        read = dropped(self, change, x, member, context.dropout)
        return changed(y, spec, x if read is None else read, change, member)


class Attention(_Projecting):
    def setup(self):
        c = self.model.config
        width = c.d_model // self.model.runtime.place.fsdp
        normal, zeros = nn.initializers.normal(_SMALL), nn.initializers.zeros
        into, heads = (width, c.num_heads, c.head_dim), (c.num_heads, c.head_dim)
        self.query = self.param("query", normal, into)
        self.key = self.param("key", normal, into)
        self.value = self.param("value", normal, into)
        self.out = self.param("out", normal, (c.num_heads, c.head_dim, width))
        self.query_bias = self.param("query_bias", zeros, heads)
        self.key_bias = self.param("key_bias", zeros, heads)
        self.value_bias = self.param("value_bias", zeros, heads)
        self.out_bias = self.param("out_bias", zeros, (c.d_model,))

    def __call__(self, x: Float[Array, "B T D"], context: LayerContext) -> Float[Array, "B T D"]:
        """Attention of all tokens to a prefix and to each other."""
        query, key, value = (
            self.project("bsd,dnh->bsnh", x, name, context) for name in ("query", "key", "value")
        )
        self.sow("keys_values", "made", KeyValues(key, value))  # nothing, unless they are asked for
        blocks = [KeyBlock(key, value, context.mask)]
        prefix = tuned(self, "prefix")
        if prefix is not None:
            front = of_rows(prefix, context.member, len(x))
            used = None if front.used is None else front.used[:, None]
            blocks.insert(0, KeyBlock(front.key.astype(x.dtype), front.value.astype(x.dtype), used))
        y = grouped_attention(query, blocks)
        return self.project("btnh,nhd->btd", y, "out", context)


class Mlp(_Projecting):
    def setup(self):
        c = self.model.config
        width = c.d_model // self.model.runtime.place.fsdp
        normal, zeros = nn.initializers.normal(_SMALL), nn.initializers.zeros
        self.wi = self.param("wi", normal, (width, c.d_ff))
        self.wo = self.param("wo", normal, (c.d_ff, width))
        self.wi_bias = self.param("wi_bias", zeros, (c.d_ff,))
        self.wo_bias = self.param("wo_bias", zeros, (c.d_model,))

    def __call__(self, x: Float[Array, "B T D"], context: LayerContext) -> Float[Array, "B T D"]:
        hidden = self.project("bsd,df->bsf", x, "wi", context)
        hidden = ACTIVATIONS[self.model.config.activation](hidden)
        scale = tuned(self, "hidden")  # [K, F]
        if scale is not None:
            hidden = scaled(hidden, scale, context.member)
        hidden = shard_activation(hidden, self.model.runtime.place, None, "mlp")
        return self.project("bsf,fd->bsd", hidden, "wo", context)


class Layer(nn.Module):
    """Attention and MLP, with a norm behind each sum."""

    model: "EncoderModel"

    def setup(self):
        eps, model = self.model.config.norm_eps, self.model
        self.attention_norm, self.mlp_norm = LayerNorm(eps), LayerNorm(eps)
        self.attention, self.mlp = Attention(model), Mlp(model)

    def __call__(self, x: Float[Array, "B T D"], context: LayerContext):
        # a sublayer reads the residual stream itself, which the norm before it has made
        member, y = context.member, self.attention(x, context)
        x = adapted(x, x, y, tuned(self, "attention_adapter"), member)
        x = self.attention_norm(x, member)
        y = self.mlp(x, context)
        x = adapted(x, x, y, tuned(self, "mlp_adapter"), member)
        x = blocks.keep_residual(self, self.mlp_norm(x, member))
        return shard_activation(x, self.model.runtime.place), None


class Stack(nn.Module):
    model: "EncoderModel"

    def setup(self):
        depth = self.model.config.num_layers
        self.layers = stacked(Layer, self.model.runtime, depth, (nn.broadcast,))(self.model)

    def __call__(self, x: Float[Array, "B T D"], context: LayerContext) -> Float[Array, "B T D"]:
        return self.layers(x, context)[0]


class Encoder(nn.Module):
    model: "EncoderModel"

    def setup(self):
        c, model = self.model.config, self.model
        normal, zeros = nn.initializers.normal(_SMALL), nn.initializers.zeros
        self.token_embedder = TokenEmbedder(model)
        self.position_embedding = self.param(
            "position_embedding", normal, (c.max_positions, c.d_model)
        )
        if c.num_types:
            self.type_embedding = self.param("type_embedding", normal, (c.num_types, c.d_model))
        self.embedding_norm, self.head_norm = LayerNorm(c.norm_eps), LayerNorm(c.norm_eps)
        self.encoder = Stack(model)
        self.transform = self.param("transform", normal, (c.d_model, c.d_model))
        self.transform_bias = self.param("transform_bias", zeros, (c.d_model,))
        self.head_bias = self.param("head_bias", zeros, (c.vocab_size,))

    def encode(
        self,
        ids: Int[Array, "B T"],
        bank: Float[Array, "K P D"] | None,
        positions: Int[Array, "B T"],
        context: LayerContext,
    ) -> Float[Array, "B T D"]:
        """The output of the last layer; padding may have positions beyond the table."""
        x = self.token_embedder(ids, bank)
        rows = jnp.minimum(positions, self.model.config.max_positions - 1)
        x = x + jnp.take(self.position_embedding, rows, axis=0).astype(x.dtype)
        if self.model.config.num_types:
            x = x + self.type_embedding[0].astype(x.dtype)
        x = self.embedding_norm(x, context.member)
        return self.encoder(shard_activation(x, self.model.runtime.place), context)

    def predict(
        self,
        ids: Int[Array, "B T"],
        bank: Float[Array, "K P D"] | None,
        positions: Int[Array, "B T"],
        context: LayerContext,
        places: Int[Array, "B t"],
    ) -> Float[Array, "B t V"]:
        """The logits at some places of each row."""
        x = self.encode(ids, bank, positions, context)
        return self.read_out(jnp.take_along_axis(x, places[..., None], axis=1), context.member)

    def read_out(self, x: Float[Array, "B n D"], member: Member) -> Float[Array, "B n V"]:
        """Logits of outputs of the last layer."""
        mixed = self.model.runtime.mixed
        y = matmul("btd,df->btf", x, self.transform, mixed)
        y = ACTIVATIONS[self.model.config.head_activation](y + self.transform_bias.astype(y.dtype))
        y = self.head_norm(y, member)
        labels = tuned(self, VERBALIZER)
        if labels is not None:
            return label_logits(y, labels, member)
        return head(y, self.token_embedder.embedding, mixed, tied=True) + self.head_bias


class Answers(NamedTuple):
    """An answer of each row, of which one token is to be predicted."""

    ids: Int[AnyArray, "#B T"]
    lengths: Int[AnyArray, "#B"]
    holes: Int[AnyArray, "#B"]  # the number of the token that is predicted


def with_answers(
    inputs: Int[Array, "B S"], segments: Int[Array, "B S"], answers: Answers, mask_id: int
) -> tuple[Int[Array, "B W"], Int[Array, "B W"], Int[Array, " B"]]:
    """Inputs in which answers stand in place of the mask, with the mask in place of one token.

    W is S + T - 1. An input [7 99 8] and the answer [4 5 6] with hole 1 give [7 4 99 6 8], where 99
    is the mask.

    Returns:
        Ids and segments, and the place of the token that is predicted.
    """
    width, size = inputs.shape[1], answers.ids.shape[1]
    at = jnp.argmax(inputs == mask_id, axis=1)[:, None]
    lengths, holes = jnp.maximum(answers.lengths, 1)[:, None], answers.holes[:, None]
    places = jnp.arange(width + size - 1)[None]
    source = jnp.where(places < at, places, places - lengths + 1)
    within = jnp.clip(source, 0, width - 1)
    text = jnp.take_along_axis(inputs, within, axis=1)
    marks = jnp.take_along_axis(segments, within, axis=1)
    number = places - at
    words = jnp.broadcast_to(answers.ids, (len(inputs), size))
    words = jnp.take_along_axis(words, jnp.clip(number, 0, size - 1), axis=1)
    words = jnp.where(number == holes, mask_id, words)
    inside = (number >= 0) & (number < lengths)
    marks = jnp.where(source < width, marks, 0)
    own = jnp.take_along_axis(segments, at, axis=1)
    return jnp.where(inside, words, text), jnp.where(inside, own, marks), (at + holes)[:, 0]


class Prefill(NamedTuple):
    """The inputs as they are: an answer changes what every layer makes of them."""

    inputs: Int[Array, "B S"]
    segments: Int[Array, "B S"]


@dataclasses.dataclass(frozen=True)
class EncoderModel(Model):
    """An encoder with a mask: see ``Model`` for what every family does.

    mask_each_target: target k of a row stands at mask k of its inputs, and one pass predicts all.
        It is for pre-training, where examples may share rows. Otherwise an input has one mask.
    """

    config: EncoderConfig
    mask_each_target: bool = False

    def init_params(self, key: jax.Array) -> Params:
        return init_params(self.config, key)

    def abstract_params(self, dtype: str = "float32") -> Params:
        return abstract(init_params, self.config, dtype)

    def logical_axes(self) -> Params:
        return named_axes(AXES, self.abstract_params())

    def prepare(self, params: Params, injection: Injection) -> Injection:
        """The injection itself: every activation depends on the text."""
        return injection

    def _apply(
        self,
        params: Params,
        injection: Injection,
        rows: Prefill,
        places: Int[Array, "B t"] | None,
        dropout_seed: Int[AnyArray, " B"] | None = None,
    ) -> PyTree:
        """Logits at the places of each row; where these are None the output of the last layer."""
        ids, segments = rows
        positions = self.config.first_position + positions_in_segments(segments)
        positions += _prefix_length(injection, len(ids))
        seeds = None
        if dropout_seed is not None and has_dropout(injection):
            seeds = seeds_of_rows(jnp.asarray(dropout_seed), ids.shape[1])
        context = LayerContext(segment_mask(segments, segments)[:, 0], injection.member, seeds)
        # a stream for each layer; a batch's seeds vary
        rngs = None if seeds is None else {"dropout": jax.random.key(0)}
        variables = blocks.variables(params, injection)
        apply = functools.partial(Encoder(self).apply, variables, rngs=rngs)
        read = ids, injection.embeddings, positions, context
        if places is None:
            return apply(*read, method="encode")
        return apply(*read, places, method="predict")

    def _predict(
        self,
        params: Params,
        injection: Injection,
        inputs: Prefill,
        answers: Answers,
        dropout_seed: Int[AnyArray, " B"] | None,
    ) -> Float[Array, "B V"]:
        """Logits of one token of each row's answer."""
        ids, segments, places = with_answers(*inputs, answers, self.config.mask_id)
        rows = Prefill(ids, segments)
        return self._apply(params, injection, rows, places[:, None], dropout_seed)[:, 0]

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
        """Logits of every target token given the input and all other target tokens.

        Only low-rank changes have dropout.
        """
        refuse_label_rows(injection)
        rows = Prefill(jnp.asarray(inputs), jnp.asarray(segments))
        size = targets.shape[1]
        if self.mask_each_target:
            # the places of the masks, in order; after the last of them any others
            masked = rows.inputs == self.config.mask_id
            places = jnp.argsort(~masked, axis=1, stable=True)[:, :size]
            return self._apply(params, injection, rows, places, dropout_seed)
        lengths = jnp.sum(jnp.asarray(target_segments) > 0, axis=1)

        def at(number):
            holes = jnp.minimum(number, jnp.maximum(lengths - 1, 0))
            answers = Answers(jnp.asarray(targets), lengths, holes)
            return self._predict(params, injection, rows, answers, dropout_seed)

        return _each(at, jnp.arange(size))

    def prefill(
        self,
        params: Params,
        injection: Injection,
        inputs: Int[AnyArray, "B S"],
        segments: Int[AnyArray, "B S"],
        dropout_seed: Int[AnyArray, " R"] | None = None,
    ) -> Prefill:
        return Prefill(jnp.asarray(inputs), jnp.asarray(segments))

    def score_tree(
        self,
        params: Params,
        injection: Injection,
        prefill: Prefill,
        tree: AnyTree,
        dropout_seed: Int[AnyArray, " R"] | None = None,
    ) -> Float[Array, "B n V"]:
        """Logits of the token that each of the n answers lacks, a pass for each."""
        assert isinstance(tree, Holes)

        def at(node):
            answers = Answers(*(jnp.asarray(leaf)[None] for leaf in node))
            return self._predict(params, injection, prefill, answers, dropout_seed)

        return _each(at, tuple(tree))

    def hidden(
        self, params: Params, inputs: Int[AnyArray, "B S"], segments: Int[AnyArray, "B S"]
    ) -> Float[Array, "B S D"]:
        rows = Prefill(jnp.asarray(inputs), jnp.asarray(segments))
        return self._apply(params, Injection(), rows, None)

    def states(
        self,
        params: Params,
        injection: Injection,
        inputs: Int[AnyArray, "B S"],
        segments: Int[AnyArray, "B S"],
    ) -> LayerStates:
        """The answer is one token, in place of the mask."""
        ids, segments = jnp.asarray(inputs), jnp.asarray(segments)
        positions = self.config.first_position + positions_in_segments(segments)
        positions += _prefix_length(injection, len(ids))
        context = LayerContext(segment_mask(segments, segments)[:, 0], injection.member)
        _, recorded = Encoder(self).apply(
            blocks.variables(params, injection), ids, injection.embeddings, positions, context,
            method="encode", mutable=["residual"],
        )  # fmt: skip
        states = blocks.recorded_residual(recorded, ("encoder", "layers"))
        at = jnp.argmax(ids == self.config.mask_id, axis=1)[:, None, None, None]
        return LayerStates(states, jnp.take_along_axis(states, at, axis=2)[:, :, 0])

    def read_out(
        self, params: Params, injection: Injection, states: Float[Array, "B n D"]
    ) -> Float[Array, "B n V"]:
        refuse_label_rows(injection)
        variables = blocks.variables(params, injection)
        apply = functools.partial(Encoder(self).apply, variables, method="read_out")
        return apply(states, injection.member)  # pyright: ignore[reportReturnType]

    def prefix_of_words(self, params: Params, ids: Int[AnyArray, " P"]) -> Layers:
        rows = jnp.asarray(ids)[None]
        positions = self.config.first_position + jnp.arange(len(ids))[None]
        context = LayerContext(jnp.ones((1, len(ids), len(ids)), bool))
        _, recorded = Encoder(self).apply(
            {"params": params}, rows, None, positions, context,
            method="encode", mutable=["keys_values"],
        )  # fmt: skip
        [made] = leaf_at(recorded["keys_values"], (*_PREFIX[:-1], "made"))  # pyright: ignore
        prefix = Prefix(made.key.swapaxes(0, 1), made.value.swapaxes(0, 1))
        return {"encoder": {"layers": {"attention": {"prefix": prefix}}}}


def _each(function, values: PyTree) -> Float[Array, "B n V"]:
    """Results [B, V] for each of the n values; several one after another, to save memory."""
    if len(jax.tree.leaves(values)[0]) == 1:
        return function(jax.tree.map(lambda x: x[0], values))[:, None]
    return jax.lax.map(function, values).swapaxes(0, 1)


def _prefix_length(injection: Injection, rows: int) -> Int[Array, "R 1"] | int:
    """The positions of the prefix in front of each row, the same in all layers."""
    prefix: Prefix | None = leaf_at(injection.layers, _PREFIX)
    if prefix is None:
        return 0
    if prefix.used is None:
        return prefix.key.shape[2]
    lengths = jnp.sum(prefix.used[:, 0], axis=-1, keepdims=True)
    return of_rows(lengths, injection.member, rows)


def init_params(config: EncoderConfig, key: jax.Array) -> Params:
    """Random float32 parameters, of deviation 0.02 as in BERT; biases of 0."""
    ids, module = jnp.ones((1, 1), jnp.int32), Encoder(EncoderModel(config))
    context = LayerContext(jnp.ones((1, 1, 1), bool))
    variables: PyTree = module.init(
        {"params": key}, ids, None, ids * 0, context, ids * 0, method="predict"
    )
    params = variables["params"]
    table = params["token_embedder"]["embedding"]  # the shared module's has a deviation of 1
    return {**params, "token_embedder": {"embedding": _SMALL * table}}
