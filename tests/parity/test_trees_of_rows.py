"""A tree of labels for each row gives what each row's labels give as the tree of a whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_step import V, examples, prompts

from jaxprompt.data.batches import make_batch
from jaxprompt.models.decoder.config import DecoderConfig
from jaxprompt.models.decoder.decoder import DecoderModel
from jaxprompt.models.injection import Injection, Prefix
from jaxprompt.models.label_tree import label_tree, stack_trees
from jaxprompt.models.t5.t5 import T5Config, T5Model

SMALL = {"vocab_size": V, "d_model": 16, "d_ff": 24, "head_dim": 4}
MODELS = {
    "t5": T5Model(T5Config(**SMALL, num_heads=3, num_encoder_layers=2, num_decoder_layers=2)),
    "umt5": T5Model(
        T5Config(
            **SMALL, num_heads=3, num_encoder_layers=2, num_decoder_layers=2, per_layer_bias=True
        )
    ),
    "decoder": DecoderModel(DecoderConfig(**SMALL, num_heads=4, num_kv_heads=2, num_layers=2)),
}
LABELS = (
    [[5, 1, -1], [5, 7, 1]],
    [[9, 1], [10, 1]],
    [[3, 4, 5, 1], [3, 4, 6, 1], [3, 8, 1, -1], [11, 1, -1, -1]],
    [[12, 1]],
)


def prefix(family):
    """Members 0 and 1 have prefixes of two lengths."""
    rng = np.random.default_rng(0)
    heads = 2 if family == "decoder" else 3
    draw = lambda: jnp.asarray(rng.normal(size=(2, 2, 3, heads, 4)), jnp.float32)
    used = jnp.ones((2, 2, 3), bool).at[1, :, 0].set(False)
    prefix = {"prefix": Prefix(draw(), draw(), used)}
    if family == "decoder":
        return {"layers": {"attention": prefix}}
    return {"decoder": {"layers": {"self_attention": prefix}}}


@functools.partial(jax.jit, static_argnums=1)
def score(params, model, injection, batch, tree):
    prefill = model.prefill(params, injection, batch.inputs, batch.segments)
    return model.score_tree(params, injection, prefill, tree)


@pytest.mark.parametrize("family", MODELS)
def test_rows_with_trees_of_their_own_score_as_in_a_batch_of_one_tree(family):
    model = MODELS[family]
    params = jax.jit(model.init_params)(jax.random.key(0))
    rows = [examples(1, member=i % 2, seed=i)[0] for i in range(len(LABELS))]
    batch = make_batch(rows, input_length=16)
    injection = Injection(jnp.asarray(prompts(2)), None if family == "umt5" else prefix(family))
    injection = injection.for_rows(len(rows), jnp.asarray(batch.member))
    trees = [label_tree(np.array(labels, np.int32))[0] for labels in map(padded, LABELS)]
    mixed = score(params, model, injection, batch, stack_trees(trees, len(rows), 8))
    for row, tree in enumerate(trees):
        alone = score(params, model, injection, batch, jax.tree.map(lambda x: x[0],
                      stack_trees([tree], 1, 8)))  # fmt: skip
        n = len(tree.ids)
        np.testing.assert_allclose(mixed[row, :n], alone[row, :n], atol=1e-6, rtol=1e-6)


def padded(labels):
    width = max(map(len, labels))
    return [[*row, *[-1] * (width - len(row))] for row in labels]
