"""Hard prompts: which words a search may use, and how they are written."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers_data import WORDS, make_tokenizer, t5_tokenizer

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import RunConfig
from jaxprompt.config.validation import parse
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.methods.hard_prompt import (
    allowed_words,
    as_template,
    nearest,
    surviving,
    words_of,
)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("words")))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return load_tokenizer(t5_tokenizer(tmp_path_factory.mktemp("pieces")))


def test_the_nearest_words_are_those_of_least_distance():
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(50, 8)), jnp.float32)
    vectors = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32)
    distance = np.linalg.norm(np.asarray(vectors)[:, :, None] - np.asarray(table), axis=-1)
    np.testing.assert_array_equal(nearest(vectors, table), distance.argmin(-1))
    allowed = np.arange(50) % 7 == 0
    distance[..., ~allowed] = np.inf
    np.testing.assert_array_equal(nearest(vectors, table, allowed), distance.argmin(-1))


def texts(tokenizer, allowed):
    return {tokenizer.token_text(int(id)).strip() for id in np.flatnonzero(allowed)}


def test_allowed_words_are_letters_and_no_label(words):
    found = texts(words, allowed_words(words, 32, "words"))
    assert found == {*WORDS} - {":"}
    left = texts(words, allowed_words(words, 32, "words", ("Yes", "no good")))
    assert left == found - {"yes", "no", "good"}
    assert allowed_words(words, 32, "all").sum() == len(WORDS)


def test_any_sequence_of_allowed_words_is_read_as_it_was_written(pieces):
    allowed = np.flatnonzero(allowed_words(pieces, pieces.size, "words"))
    assert len(allowed) > 3
    ids = np.random.default_rng(0).choice(allowed, (40, 5))
    assert surviving(ids, pieces).all()
    # a piece that goes on with a word is read as another one
    inner = next(i for i in range(3, pieces.size) if pieces.piece(i) == "s")
    assert not surviving(np.array([[allowed[0], inner, allowed[1]]]), pieces).any()


def test_too_few_words_are_refused(words):
    with pytest.raises(UserError, match="search.allowed is words and the tokenizer has 0"):
        allowed_words(words, 5, "words", ("question",))


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("{text}", "good bad one {text}"),
        ("{text} [prompt:2] answer [prompt]:", "{text} good bad answer one :"),
        ("[prompt]\n{text}", "good bad one\n{text}"),
    ],
)
def test_found_words_stand_where_the_vectors_were(words, template, written):
    ids = [words.encode(word)[0] for word in ("good", "bad", "one")]
    assert as_template(template, ids, words) == written
    table = np.eye(32, dtype=np.float32)
    found = words_of(table[ids], jnp.asarray(table), words)
    assert found == ("good bad one", ids, True)


def config(**values):
    return parse(RunConfig, {"task": "boolq", "output": "x", "method": "gcg", **values})


def test_the_recipe_of_a_search_is_short():
    assert (config().prompt.length, config().train.steps) == (10, 300)
    assert config(train={"steps": 7}).train.steps == 7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "gcg+lora"}, "a search for words; join others"),
        ({"prompt": {"population": {"length": [3, 5]}}}, "varies length, and with method=gcg"),
        ({"prompt": {"population": {"search.swaps": [3, 5]}}}, "varies search.swaps"),
        ({"search": {"allowed": "letters"}}, "search.allowed"),
        ({"search": {"swaps": 0}}, "search.swaps"),
        ({"method": "pez", "search": {"fluency": 0.1}}, "search.fluency is 0.1, and method=pez"),
    ],
)
def test_what_a_search_cannot_do_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        config(**values)
