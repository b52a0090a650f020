"""What a method exports is what the model was given, or the whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprompt.config.schema import PromptConfig
from jaxprompt.methods.base import inject, join_groups
from jaxprompt.methods.full import MODEL_TUNING, PRETRAINING
from jaxprompt.methods.registry import METHODS
from jaxprompt.models.injection import Injection

PROMPTS = sorted(name for name, method in METHODS.items() if method.uses_prompt)
WEIGHTS = {"token_embedder": {"embedding": jnp.ones((7, 4))}, "scale": jnp.arange(4.0)}


def first_trainables(method, length, members=1):
    config = PromptConfig(length=length, bottleneck=3, basis=length)
    shape = members, method.num_start_vectors(config), 4
    start = np.random.default_rng(length).normal(size=shape).astype(np.float32)
    return method.init(WEIGHTS, start, config, 0)


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_is_exported_as_the_model_is_given_it(name):
    method = METHODS[name]
    lengths = {2: 1, 3: 2}  # members by length
    groups = [first_trainables(method, *item) for item in lengths.items()]
    trainables = join_groups(groups)
    exported = method.export(trainables, inject(method, trainables, WEIGHTS))
    assert exported.keys() == {"prompt"} and exported["prompt"].shape == (3, 3, 4)
    alone = method.export(groups[0], inject(method, groups[0], WEIGHTS))
    np.testing.assert_array_equal(exported["prompt"][:1, :2], alone["prompt"])


def test_a_whole_model_is_exported_without_a_copy():
    trainables = first_trainables(MODEL_TUNING, 1)
    assert MODEL_TUNING.export(trainables, Injection()) is trainables
    both = first_trainables(PRETRAINING, 2)
    exported = PRETRAINING.export(both, Injection())
    assert exported is both["model"]
    restored = jax.tree.map(lambda x: x[0], exported)
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, WEIGHTS))
