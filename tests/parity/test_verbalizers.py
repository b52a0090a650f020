"""Labels of several words and calibrated labels: members together and each alone."""

import jax
import numpy as np
import pytest
from helpers_data import make_tokenizer

from jaxprompt.config.schema import TaskConfig
from jaxprompt.data.examples import tokenize
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.data.verbalizers import content_free_rows, label_words, log_prior
from jaxprompt.data.virtual_tokens import VirtualTokens
from jaxprompt.inference.engine import make_engine
from jaxprompt.inference.predict import predict, predict_per_member
from jaxprompt.models.injection import Injection

WORDS = {"yes": ["good", "True"], "no": ["bad", "False", "no it"]}
TASK = TaskConfig(name="t", template="it was {text}", labels=["yes", "no"], verbalizer=WORDS,
                  content_free=["question", ""])  # fmt: skip
ROWS = [{"text": text} for text in "one two three passage subject text True good".split()]


@pytest.fixture(scope="module")
def setting(tiny, tmp_path_factory):
    """Engines of two prompts together and of each alone, the tokenizer and the examples."""
    model, params = tiny
    bank = jax.random.normal(jax.random.key(1), (2, 3, model.config.d_model))
    banks = bank, bank[:1], bank[1:]
    engines = [make_engine(params, Injection(each), model) for each in banks]
    words = load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("words")))

    def examples(rows):
        virtual = VirtualTokens(model.config.vocab_size, 3)
        return tokenize(TASK, rows, words, virtual, need_targets=False)

    return engines, words, examples


def scores_of(setting, task, rows=ROWS, member=1):
    engines, words, examples = setting
    return predict(engines[member], task, examples(rows), words, batch_size=4).scores


@pytest.mark.parametrize("normalized", [False, True])
def test_a_label_has_the_pooled_scores_of_its_words(setting, normalized):
    words = label_words(TASK)
    flat = {"labels": list(words.texts), "verbalizer": None, "length_normalized": normalized}
    each = scores_of(setting, TASK.model_copy(update=flat))
    found = scores_of(setting, TASK.model_copy(update={"length_normalized": normalized}))
    summed = np.logaddexp.reduce(each[:, 2:], axis=1)
    np.testing.assert_allclose(found[:, 0], np.logaddexp(*each[:, :2].T), rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], summed, rtol=1e-5)


@pytest.mark.parametrize("calibration", [None, "content_free", "batch"])
def test_members_together_are_calibrated_as_each_alone(setting, calibration):
    engines, words, examples = setting
    task = TASK.model_copy(update={"calibration": calibration})
    together = predict_per_member(engines[0], task, examples(ROWS), words, batch_size=4)
    for number, each in enumerate(together, 1):
        alone = predict(engines[number], task, examples(ROWS), words, batch_size=4)
        np.testing.assert_allclose(each.scores, alone.scores, rtol=1e-4, atol=1e-4)
        assert each.predictions == alone.predictions and not each.non_finite_rows
        plain = scores_of(setting, TASK, member=number)
        of = {None: [], "batch": ROWS, "content_free": content_free_rows(TASK)}[calibration]
        prior = log_prior(scores_of(setting, TASK, of, number)) if of else 0.0
        np.testing.assert_allclose(alone.scores, plain - prior, rtol=1e-5, atol=1e-5)
